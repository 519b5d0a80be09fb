"""The one table of what tests run on: shapes, layouts, options; and how their inputs are made."""

from __future__ import annotations

import torch
from torch import Tensor

# [N, C, H, W]: 1x1 to 28x28, odd sizes, H != W, C below, off and on the multiples of 16.
SHAPES = (
    (3, 16, 1, 1),
    (3, 37, 7, 7),
    (2, 64, 9, 11),
    (4, 100, 14, 14),
    (2, 256, 28, 28),
    (2, 48, 5, 16),
)
SMALL_SHAPES = SHAPES[:3]

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
COMBINES = ("sum", "product", "max", "sigmoid_sum")
PRESETS = ("paper", "official")
LAYOUTS = ("nchw", "channels_last", "sliced", "sliced_channels_last", "strided")


def name(value: object) -> str:
    """A short test id: 2x64x9x11, float16."""
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return str(value).removeprefix("torch.")


def make_map(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, layout: str = "nchw"
) -> Tensor:
    """Normal data [N, C, H, W] in a layout.

    ``sliced`` cuts N and C from a larger map, which the kernels walk as it lies; ``strided`` cuts
    W, which they cannot, and must copy.
    """
    n, c, h, w = shape
    if layout == "strided":
        return torch.randn(n, c, h, w + 3, device=device).to(dtype)[..., 2 : 2 + w]
    if layout.startswith("sliced"):
        big = torch.randn(n + 2, c + 5, h, w, device=device).to(dtype)
        if layout.endswith("channels_last"):
            big = big.contiguous(memory_format=torch.channels_last)
        return big[1 : n + 1, 3 : 3 + c]
    x = torch.randn(shape, device=device).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x


def memory_format(layout: str) -> torch.memory_format:
    return torch.channels_last if layout.endswith("channels_last") else torch.contiguous_format
