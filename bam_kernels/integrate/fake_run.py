"""A forward of a copy of a model on fake tensors: shapes, and nothing computed or changed."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bam_kernels import reference

_DEFAULT_INPUT = (1, 3, 224, 224)


@dataclasses.dataclass(frozen=True)
class Example:
    """What the model is run on."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def square(self) -> bool:
        """Whether it is a batch of images as high as wide."""
        return len(self.shape) == 4 and self.shape[2] == self.shape[3]


def example(model: nn.Module, given: Tensor | Sequence[int] | None) -> Example:
    """The example that a caller gave as a tensor or as a shape, or the default.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(given, Tensor):
        return Example(tuple(given.shape), given.dtype, given.device)
    shape = _DEFAULT_INPUT if given is None else given
    if not isinstance(shape, Sequence) or not all(type(size) is int for size in shape):
        raise TypeError(
            "example_input: expected a tensor, or its shape as a sequence of ints, "
            f"got {type(shape).__name__} {shape!r}"
        )
    like = first_parameter(model)
    if like is None:
        return Example(tuple(shape), torch.get_default_dtype(), torch.get_default_device())
    return Example(tuple(shape), like.dtype, like.device)


def first_parameter(module: nn.Module) -> nn.Parameter | None:
    """The first floating-point parameter, which tells a module's device and dtype."""
    return next((p for p in module.parameters() if p.is_floating_point()), None)


@contextlib.contextmanager
def fake_twin(model: nn.Module, like: Example) -> Iterator[tuple[nn.Module, Tensor]]:
    """A copy of `model` in eval mode and its input, both of fake tensors, in their mode."""
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    twin = _fake_copy(model, fake_mode).eval()
    with fake_mode, torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield twin, torch.empty(like.shape, dtype=like.dtype, device=like.device)


def outputs(
    model: nn.Module, names: Sequence[str], like: Example
) -> tuple[dict[str, list[Any]], Exception | None]:
    """What the layers `names` put out, call by call, up to the forward's end or its failure."""
    found: dict[str, list[Any]] = {}
    try:
        with fake_twin(model, like) as (twin, x):
            for name in names:

                def record(_: nn.Module, args: Any, output: Any, name: str = name) -> None:
                    found.setdefault(name, []).append(output)

                twin.get_submodule(name).register_forward_hook(record)
            twin(x)
    except Exception as error:  # the model's own code: it may raise anything
        return found, error
    return found, None


def _fake_copy(model: nn.Module, fake_mode: FakeTensorMode) -> nn.Module:
    """A deep copy with a fake in the place of every tensor: no memory, no shared state.

    A copy, since a forward may keep things on its module (caches, counters) that would outlive it.
    """
    memo: dict[int, Any] = {}
    for part in model.modules():
        # Plain attributes as well: a weight that a parametrization computes cannot be deep-copied.
        for store in (part._parameters, part._buffers, vars(part)):
            for value in store.values():
                if isinstance(value, Tensor) and id(value) not in memo:
                    memo[id(value)] = fake_mode.from_tensor(value)
    twin = copy.deepcopy(model, memo)
    for part in twin.modules():
        # Functions are not copied: a hook that collects outputs would collect fakes.
        part._forward_hooks.clear()
        if isinstance(part, reference.BAM | reference.SqueezeExcite):
            vars(part).pop("observer", None)
    return twin
