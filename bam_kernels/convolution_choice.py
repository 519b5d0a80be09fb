"""Whose dilated convolutions a GPU runs: those of the kernels, or the library's (cuDNN's).

Ours save launches and bytes, the library's may come closer to the arithmetic peak. The wider a
module is inside, the more the arithmetic decides; in training more than in inference, as its three
products are fused with less. So beyond a width training takes the library's. The widths are those
of the cost model (`bam_kernels.benchmarking.convolutions`), a prediction that measurements are to
replace; `tests/test_convolutions.py` holds them to it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from bam_kernels import env

CHOICES = env.CONVOLUTIONS

WIDEST_TRAINED = {"half": 64, "tf32": 64, "ieee": 32}
"""Channels inside up to which training runs on our convolutions, by the precision of products."""

_choice = env.convolutions()


@contextlib.contextmanager
def convolutions(choice: str) -> Iterator[None]:
    """Take these convolutions while the context lasts, in every thread: to compare the two.

    Args:
        choice: "fused", "library", or "auto", the rule.

    Raises:
        ValueError: it is none of these.
    """
    global _choice
    if choice not in CHOICES:
        raise ValueError(f"choice: expected one of {', '.join(CHOICES)}, got {choice!r}")
    before, _choice = _choice, choice
    try:
        yield
    finally:
        _choice = before


def by_library(hidden: int, x: Tensor, *, inference: bool = False) -> str | None:
    """Why the library's convolutions are taken for a module so wide inside; None if ours are.

    Args:
        hidden: channels inside.
        x: the module's input, or what else has its device and dtype.
        inference: whether neither gradients nor batch statistics are asked for.
    """
    if _choice == "fused" or (inference and _choice == "auto") or not on_gpu(x):
        return None
    if _choice == "library":
        return "the library's convolutions were asked for"
    precision = precision_of(x.dtype) if hidden > min(WIDEST_TRAINED.values()) else "half"
    widest = WIDEST_TRAINED.get(precision, hidden)
    if hidden <= widest:
        return None
    return (
        f"in training the library's convolutions are predicted to be faster for more than {widest} "
        f"channels inside ({precision} products)"
    )


def on_gpu(x: Tensor) -> bool:
    """Whether the rule is for x's device; a meta tensor stands for a GPU's in a dry run."""
    return x.device.type in ("cuda", "meta")


def precision_of(dtype: torch.dtype) -> str:
    """Of a convolution's products: "half", "tf32" or "ieee" (float32), "double"."""
    if dtype == torch.float32:
        return "tf32" if tf32_convolutions() else "ieee"
    return "double" if dtype == torch.float64 else "half"


def tf32_convolutions() -> bool:
    """Whether PyTorch lets float32 convolutions multiply in TF32."""
    setting = torch.backends.cudnn.conv.fp32_precision
    if setting == "none":  # not set for convolutions: the parents decide
        setting = torch.backends.cudnn.fp32_precision
    if setting == "none":
        setting = torch.backends.fp32_precision
    return setting == "tf32"


# What torch.compiler.assume_constant_result does, which would import the compiler now: it cannot
# trace the setting, and a program is compiled for the one that it was compiled under.
tf32_convolutions._dynamo_marked_constant = True
