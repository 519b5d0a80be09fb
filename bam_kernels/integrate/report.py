"""What `replace_bam` did, for people and for programs."""

from __future__ import annotations

import dataclasses

from torch import nn

from bam_kernels.config import resolve
from bam_kernels.modules import BAM


@dataclasses.dataclass(frozen=True)
class Replaced:
    """A module that was swapped.

    Attributes:
        names: where it is in the model; more than one where it is used in several places, and ""
            where it is the model itself.
        was: its class.
        client: whose it was: a client's preset, or "reference".
        module: what stands there now.
        note: what may differ, or None.
    """

    names: tuple[str, ...]
    was: str
    client: str
    module: BAM
    note: str | None = None


@dataclasses.dataclass(frozen=True)
class LeftAlone:
    """A module that was not swapped: where it is, its class, and why not."""

    names: tuple[str, ...]
    was: str
    reason: str


@dataclasses.dataclass(frozen=True)
class ReplaceReport:
    """What `replace_bam` did; its string is made for reading.

    Attributes:
        model: the model with ours in it; a new module where the model was itself a BAM.
        replaced: what was swapped.
        left_alone: what looks like a BAM and was not, and why.
        already: where there were modules of ours before.
    """

    model: nn.Module
    replaced: tuple[Replaced, ...]
    left_alone: tuple[LeftAlone, ...]
    already: tuple[str, ...]

    def __str__(self) -> str:
        lines = []
        if self.replaced:
            rows = [("name", "was", "became")]
            rows += [(_names(r.names), f"{r.was} ({r.client})", describe(r)) for r in self.replaced]
            widths = [max(len(row[i]) for row in rows) for i in range(2)]
            lines += [f"{a:{widths[0]}}  {b:{widths[1]}}  {c}" for a, b, c in rows]
            notes = dict.fromkeys(r.note for r in self.replaced if r.note is not None)
            lines += [f"note: {note}" for note in notes]
        else:
            lines.append("no BAM was replaced")
        lines += [f"left alone: {_names(x.names)} ({x.was}): {x.reason}" for x in self.left_alone]
        if self.already:
            lines.append(f"bam_kernels' already: {', '.join(map(repr, self.already))}")
        return "\n".join(lines)


def describe(replaced: Replaced) -> str:
    """The call that makes such a module."""
    config = replaced.module.config
    shown = [str(config.channels)]
    preset = "paper" if replaced.client == "reference" else replaced.client
    plain = resolve(config.channels, config.reduction, preset, dilation=config.dilation)
    if config.reduction != 16:
        shown.append(f"reduction={config.reduction}")
    if preset != "paper":
        shown.append(f"preset={preset!r}")
    if config.dilation != resolve(config.channels, config.reduction, preset).dilation:
        shown.append(f"dilation={config.dilation}")
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != getattr(plain, field.name):
            shown.append(f"{field.name}={value!r}")
    return f"BAM({', '.join(shown)})"


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(name or "the model itself" for name in names)
