"""Putting a description's attention into its network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from bam_kernels.integrate import insert_bam
from bam_kernels.models.description import Description, Places
from bam_kernels.modules import BAM, SqueezeExcite

ATTENTION = ("bam", "bam-c", "se", "block")
"""What `create` takes as `attention`, beside None."""


def check(
    description: Description,
    attention: str | None,
    module: Callable[..., nn.Module] | None,
    options: dict[str, Any],
) -> None:
    """Raise TypeError or ValueError where `refine` could not do what is asked, before any work."""
    if attention is not None and not isinstance(attention, str):
        raise TypeError(
            f"attention: expected None or a str, got {type(attention).__name__} {attention!r}"
        )
    if attention is not None and attention not in ATTENTION:
        raise ValueError(
            f"attention: expected None or one of {', '.join(ATTENTION)}, got {attention!r}"
        )
    if attention is not None and _places(description, attention) is None:
        raise ValueError(f"attention: {description.name} has no {attention!r} in the paper")
    if attention == "block" and description.block is None:
        raise ValueError(f"attention: {description.name} has no 'block' in the paper's Table 1c")
    if attention not in ("bam", "bam-c"):  # whose options are BAM's to refuse
        takes = ("reduction",) if attention == "se" else ()
        for name in (each for each in options if each not in takes):
            of = "without attention" if attention is None else f"attention={attention!r}"
            raise TypeError(f"{name}: {of} takes no such option")
    if module is not None:
        if attention in (None, "block"):
            raise TypeError(f"attention_module: expected None with attention={attention!r}")
        if not callable(module):
            raise TypeError(
                f"attention_module: expected a class like bam_kernels.BAM, got {module!r}"
            )


def refine(
    model: nn.Module,
    description: Description,
    attention: str,
    module: Callable[..., nn.Module] | None,
    example: tuple[int, ...],
    options: dict[str, Any],
) -> None:
    """Insert what `attention` asks for, in place.

    Raises:
        TypeError, ValueError: an option that the module does not take, or out of range.
    """
    if module is None:
        module = {"se": SqueezeExcite, "block": description.block}.get(attention, BAM)
    part = model.get_submodule(description.encoder)
    for place in _places(description, attention):
        insert_bam(part, module=module, example_input=example, **place, **options)


def _places(description: Description, attention: str) -> Places | None:
    return description.blocks if attention in ("bam-c", "se") else description.bottlenecks
