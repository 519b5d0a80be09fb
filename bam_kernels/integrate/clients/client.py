"""What a client is: another BAM's layers, by ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from bam_kernels.config import PRESETS

Name = str | Callable[[int], str]
"""A layer's name within its BAM; of layers that are counted, a function of the index."""

MOST = 16
"""Layers of a kind that are looked for."""

_COUNTED = (("fc", "fc_norm"), ("dilated", "dilated_norm"))
_ARITHMETIC = ("combine", "norm_hidden", "norm_final", "norm_dilated", "bare_reduction", "dilation")


@dataclasses.dataclass(frozen=True)
class Client:
    """A BAM that people have, and what its layers are called. None: it has no such layer.

    Attributes:
        name: of the client, and of its preset (`bam_kernels.config.PRESETS`).
        what: the class, for people.
        channel: the channel branch's name.
        spatial: the spatial branch's name.
        fc: the MLP's hidden layers.
        fc_norm: their batch norms.
        last_fc: the MLP's last layer; None: the last of `fc`.
        channel_norm: the batch norm at the channel branch's end.
        reduce: the 1x1 convolution to C // r.
        reduce_norm: its batch norm.
        dilated: the 3x3 convolutions.
        dilated_norm: their batch norms.
        project: the 1x1 convolution to one channel.
        spatial_norm: the batch norm at the spatial branch's end.
        optional_norms: whether a BAM may lack any of the norms that are named here.
    """

    name: str
    what: str
    channel: str
    spatial: str
    fc: Name
    reduce: str
    dilated: Name
    project: str
    last_fc: str | None = None
    fc_norm: Name | None = None
    channel_norm: str | None = None
    reduce_norm: str | None = None
    dilated_norm: Name | None = None
    spatial_norm: str | None = None
    optional_norms: bool = False

    def names(self) -> Iterator[str]:
        """Every name that a layer of this client can have."""
        for field in ("last_fc", "channel_norm", "reduce", "reduce_norm", "project"):
            name = getattr(self, field)
            if name is not None:
                yield name
        if self.spatial_norm is not None:
            yield self.spatial_norm
        for pair in _COUNTED:
            for field in pair:
                name = getattr(self, field)
                if name is not None:
                    yield from ((name,) if isinstance(name, str) else map(name, range(MOST)))

    def depth(self, has: Callable[[str], bool]) -> tuple[int, int]:
        """(hidden layers of the MLP, 3x3 convolutions), by the layers that there are."""
        fc, dilated = (self._last(kinds, has) + 1 for kinds in _COUNTED)
        if self.last_fc is None:
            return max(fc - 1, 0), dilated
        return max(fc, 1), max(dilated, 1)

    def _last(self, kinds: tuple[str, str], has: Callable[[str], bool]) -> int:
        """The last index of which there is a layer or a norm: one missing before it is missed."""
        if isinstance(getattr(self, kinds[0]), str):
            return 0
        named = [getattr(self, kind) for kind in kinds if getattr(self, kind) is not None]
        found = [i for i in range(MOST) for name in named if has(name(i))]
        return max(found, default=-1)

    def why_not(self, mlp_layers: int, num_dilated: int) -> str | None:
        """Why the client has no BAM of this depth; None if it has."""
        for field, count, what in (
            ("fc", mlp_layers, "hidden layers in its MLP"),
            ("dilated", num_dilated, "3x3 convolutions"),
        ):
            if isinstance(getattr(self, field), str) and count != 1:
                return f"{self.name} has 1 {what}, not {count}"
        return None

    def layers(
        self, mlp_layers: int, num_dilated: int, has: Callable[[str], bool] | None = None
    ) -> dict[str, str]:
        """Our layers' names, and the client's, of a BAM of this depth.

        `has` tells which of the optional norms there are; without it all are.
        """
        last = f"channel.fc.{mlp_layers}"
        found = {f"channel.fc.{i}": _at(self.fc, i) for i in range(mlp_layers)}
        found[last] = _at(self.fc, mlp_layers) if self.last_fc is None else self.last_fc
        norms: dict[str, str | None] = {
            f"channel.hidden_norm.{i}": _at(self.fc_norm, i) for i in range(mlp_layers)
        }
        norms["channel.norm"] = self.channel_norm
        found["spatial.reduce"] = self.reduce
        found |= {f"spatial.dilated.{i}": _at(self.dilated, i) for i in range(num_dilated)}
        found["spatial.project"] = self.project
        norms["spatial.hidden_norm.0"] = self.reduce_norm
        for i in range(num_dilated):
            norms[f"spatial.hidden_norm.{i + 1}"] = _at(self.dilated_norm, i)
        norms["spatial.norm"] = self.spatial_norm
        for ours, name in norms.items():
            if name is not None and (not self.optional_norms or has is None or has(name)):
                found[ours] = name
        return found

    def arithmetic(self) -> dict[str, object]:
        """What of its preset the layers do not tell, or tell only in part."""
        preset = PRESETS[self.name]
        return {name: preset[name] for name in _ARITHMETIC if name in preset}


def _at(name: Name | None, i: int) -> str | None:
    return name if name is None or isinstance(name, str) else name(i)
