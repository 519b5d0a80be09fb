"""`attention_maps`: the logits and the maps M of every BAM in a network, at each forward pass."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bam_kernels import reference
from bam_kernels.reference import Observer


@dataclasses.dataclass(frozen=True)
class AttentionMap:
    """What one BAM or SqueezeExcite attended to in its last forward pass.

    Attributes:
        channel_logits: Mc [N, C] (Eq. 3), detached; None without a channel branch.
        spatial_logits: Ms [N, 1, H, W] (Eq. 4), detached; None without a spatial branch.
        channels: C.
        combine: how the two become M; one of `bam_kernels.config.COMBINE_MODES`.
    """

    channel_logits: Tensor | None
    spatial_logits: Tensor | None
    channels: int
    combine: str = "sum"

    @property
    def map(self) -> Tensor:
        """M [N, C, H, W] (Eq. 2), in float32, or float64 for float64 logits.

        Without a channel branch, the spatial map for each of the C channels. Without a spatial
        branch M is [N, C, 1, 1]: the same everywhere.
        """
        c, s = _at_least_float32(self.channel_logits), _at_least_float32(self.spatial_logits)
        if c is None:
            return torch.sigmoid(s).expand(-1, self.channels, -1, -1)
        c = c[:, :, None, None]
        return torch.sigmoid(c) if s is None else reference.attention_map(c, s, self.combine)

    @property
    def spatial_map(self) -> Tensor:
        """M averaged over the channels, [N, H, W]: the 2-D maps of Fig. 5."""
        if self.channel_logits is None:
            return self.map[:, 0]
        return self.map.mean(dim=1)

    @property
    def channel_profile(self) -> Tensor:
        """M averaged over the positions, [N, C]: the channel attention profiles of Fig. 5."""
        return self.map.mean(dim=(2, 3))


def _at_least_float32(logits: Tensor | None) -> Tensor | None:
    # The kernels, too, compute the map of half-precision logits in float32.
    return logits.float() if logits is not None and logits.itemsize < 4 else logits


def attention_modules(model: nn.Module) -> dict[str, reference.BAM | reference.SqueezeExcite]:
    """Every BAM and SqueezeExcite of `model`, by its name in ``model.named_modules()``.

    Raises:
        TypeError: `model` is no module.
        ValueError: there is none in it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    modules = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, reference.BAM | reference.SqueezeExcite)
    }
    if not modules:
        raise ValueError(
            f"model: expected one with a BAM or SqueezeExcite of bam_kernels in it, got "
            f"{type(model).__name__} without any; see bam_kernels.insert_bam"
        )
    return modules


@contextlib.contextmanager
def attention_maps(model: nn.Module) -> Iterator[dict[str, AttentionMap]]:
    """Collect the attention of every BAM and SqueezeExcite of `model`, fused or reference.

        with attention_maps(model) as maps:
            model(images)
        maps["layer1.bam"].spatial_map          # [N, H, W]

    The dict is empty at first; each forward pass writes an `AttentionMap` for each module that it
    runs, under the module's name in ``model.named_modules()`` ("" for the model itself), and so
    replaces the one of the pass before, or of the same pass where a module runs twice. It stays
    filled behind the context. The logits alone are kept, so it costs no memory of the size of M.

    Args:
        model: a network that holds at least one module of `bam_kernels` or of its `reference`.

    Raises:
        TypeError: `model` is no module.
        ValueError: there is no BAM in it.
    """
    modules = attention_modules(model)
    maps: dict[str, AttentionMap] = {}
    # An observer of the instance's own, be it an enclosing attention_maps', goes on being called.
    before = {name: vars(module).get("observer") for name, module in modules.items()}
    try:
        for name, module in modules.items():
            module.observer = _observer(maps, name, module, before[name])
        yield maps
    finally:
        for name, module in modules.items():
            if before[name] is not None:
                module.observer = before[name]
            else:
                vars(module).pop("observer", None)


def _observer(
    maps: dict[str, AttentionMap],
    name: str,
    module: reference.BAM | reference.SqueezeExcite,
    previous: Observer | None,
) -> Observer:
    channels, combine = module.config.channels, module.config.combine

    def observe(c: Tensor | None, s: Tensor | None) -> None:
        maps[name] = AttentionMap(
            None if c is None else c.detach(), None if s is None else s.detach(), channels, combine
        )
        if previous is not None:
            previous(c, s)

    return observe
