"""A module's parameters as inference takes them: the operator `bam`'s flat lists, by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import Tensor

from bam_kernels.backends.triton.channel_mlp import dense
from bam_kernels.backends.triton.spatial_layout import Norm
from bam_kernels.config import COMBINE_MODES


@dataclasses.dataclass(slots=True)
class Layer:
    """A linear layer or a convolution, and the norm behind or in front of it, if any."""

    weight: Tensor
    bias: Tensor | None
    norm: Norm | None


@dataclasses.dataclass(slots=True)
class Module:
    """What the operator `bam` is given, by branch; see csrc/operators.h.

    Norms stand behind the linear layers and the projection, and in front of the convolutions; the
    one in front of the projection is `last`.
    """

    combine: str
    residual: bool
    channel: tuple[Layer, ...]
    reduce: Layer | None
    convs: tuple[Layer, ...]
    last: Norm | None
    project: Layer | None
    dilation: int

    @classmethod
    def read(cls, params: list[Tensor], options: list[int], eps: list[float]) -> Module:
        """From the operator's flat lists."""
        tensors, numbers = iter(params), iter(eps)
        combine, residual, linears, hidden_norm, norm, spatial, convs, dilation = options[:8]
        spatial_hidden_norm, spatial_norm = options[8:10]
        channel = [
            _layer(tensors, numbers, bool(norm if i == linears - 1 else hidden_norm))
            for i in range(linears)
        ]
        reduce = last = project = None
        found: list[Layer] = []
        if spatial:
            reduce = _layer(tensors, numbers, False)
            for _ in range(convs):
                before = _norm(tensors, numbers) if spatial_hidden_norm else None
                conv = _layer(tensors, numbers, False)
                conv.norm = before
                found.append(conv)
            last = _norm(tensors, numbers) if spatial_hidden_norm else None
            project = _layer(tensors, numbers, bool(spatial_norm))
        return cls(
            COMBINE_MODES[combine], bool(residual), tuple(channel), reduce, tuple(found), last,
            project, dilation,
        )  # fmt: skip


def _given(t: Tensor) -> Tensor | None:
    return t if t.numel() else None


def _layer(tensors: Iterator[Tensor], numbers: Iterator[float], norm: bool) -> Layer:
    weight, bias = next(tensors), _given(next(tensors))
    return Layer(weight, bias, _norm(tensors, numbers) if norm else None)


def _norm(tensors: Iterator[Tensor], numbers: Iterator[float]) -> Norm:
    gamma, beta, mean, variance = (dense(_given(next(tensors))) for _ in range(4))
    return Norm(gamma, beta, mean, variance, False, next(numbers))


def linear_arguments(layers: tuple[Layer, ...], prefix: str = "") -> dict[str, object]:
    """The MLP's tensors and norms by a kernel's names."""
    found: dict[str, object] = {}
    for i, (layer, part) in enumerate(zip(layers, ("hidden_", ""), strict=True)):
        norm, upper = layer.norm, (prefix + part).upper()
        found[f"{prefix}weight{i}"] = layer.weight.contiguous()
        found[f"{prefix}bias{i}"] = dense(layer.bias)
        for name in ("gamma", "beta", "mean", "variance"):
            found[f"{prefix}{part}{name}"] = None if norm is None else getattr(norm, name)
        found[f"{upper}NORM"] = norm is not None
        found[f"{upper}EPS"] = 0.0 if norm is None else norm.eps
    return found
