"""How a [N, C, H, W] tensor lies in memory, and whether the kernels can walk it without a copy.

The kernels see N x C x P with P = H * W. They need H and W to be one evenly strided axis, and
either P (NCHW) or C (channels_last) to be dense; slices over N and C keep both.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Strides:
    """Strides in elements: between samples, and along the axis that is not dense."""

    n: int
    outer: int


def strides(x: Tensor, channels_last: bool) -> Strides | None:
    """Strides of x as N x C x P, or None where it cannot be walked in that order.

    The outer axis is C for NCHW and P for channels_last. An axis of length 1 has no meaningful
    stride: it is given the one a contiguous tensor would have.
    """
    n, c, h, w = x.shape
    sn, sc, sh, sw = x.stride()
    if h > 1 and w > 1 and sh != w * sw:
        return None
    p = h * w
    sp = sw if w > 1 else sh
    inner_length, inner, outer_length, outer = (c, sc, p, sp) if channels_last else (p, sp, c, sc)
    if inner_length > 1 and inner != 1:
        return None
    outer = outer if outer_length > 1 else inner_length
    return Strides(sn if n > 1 else outer * outer_length, outer)


def is_channels_last(x: Tensor) -> bool:
    """Whether C is x's dense axis. A 1x1 map is both; dense C then gives the wider rows."""
    if strides(x, channels_last=False) is None:
        return strides(x, channels_last=True) is not None
    return x.shape[2] * x.shape[3] == 1 and x.shape[1] > 1 and x.stride(1) == 1


def walkable(x: Tensor) -> Tensor:
    """x itself where the kernels can walk it, otherwise a contiguous copy in its memory format."""
    if strides(x, False) is not None or strides(x, True) is not None:
        return x
    if x.is_contiguous(memory_format=torch.channels_last) or _channels_are_densest(x):
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous()


def _channels_are_densest(x: Tensor) -> bool:
    sc = x.stride(1)
    return x.shape[1] > 1 and sc == 1 and x.stride(3) > 1


def like(t: Tensor, x: Tensor) -> Tensor:
    """t in the layout of the walkable x, copied only if it must be (an expanded gradient, say)."""
    if strides(t, is_channels_last(x)) is not None:
        return t
    return torch.empty_like(x, dtype=t.dtype).copy_(t)


def empty_map(x: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised dense [N, channels, H, W] map in x's memory format."""
    n, _, h, w = x.shape
    fmt = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    return torch.empty((n, channels, h, w), dtype=dtype, device=x.device, memory_format=fmt)
