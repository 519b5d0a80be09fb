"""What the convolutions of the spatial branch read, laid out for wide loads, in one launch.

A [h, h, 3, 3] weight has its taps innermost: a tile of one tap would be a gather of elements of two
bytes. Packed as [9, h, h], taps outermost and inputs innermost, it is read 16 bytes at a time. A
reduction that comes as NCHW is laid as [N * H * W, h] with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from bam_kernels.backends.triton.device_math import narrow
from bam_kernels.backends.triton.launch import cdiv, launch
from bam_kernels.backends.triton.spatial_layout import Map

_BLOCK = 512
_AT_ONCE = 4
"""Weights that one launch packs."""


@triton.jit
def pack_block(
    block, weight, packed, hidden, stride_out, stride_in, stride_tap, BLOCK: tl.constexpr
):
    """BLOCK elements of one packed weight [9, h, h]."""
    i = block * BLOCK + tl.arange(0, BLOCK)
    square = hidden * hidden
    mask = i < 9 * square
    tap = i // square
    rest = i - tap * square
    out = rest // hidden
    at = out * stride_out + (rest - out * hidden) * stride_in + tap * stride_tap
    value = tl.load(weight + at, mask=mask, other=0.0)
    tl.store(packed + i, narrow(value, packed.dtype.element_ty), mask=mask)


@triton.jit
def _transpose_tile(pid, source, out, positions, tiles, hidden, BLOCK_P: tl.constexpr,
                    BLOCK_H: tl.constexpr):  # fmt: skip
    """A tile of a sample's [h, P] as [P, h]."""
    n = (pid // tiles).to(tl.int64)
    columns = (pid % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    units = tl.arange(0, BLOCK_H)
    mask = (units < hidden)[:, None] & (columns < positions)[None, :]
    base = n * hidden * positions
    at = units.to(tl.int64)[:, None] * positions + columns[None, :]
    value = tl.load(source + base + at, mask=mask, other=0.0)
    at = units[:, None] + columns.to(tl.int64)[None, :] * hidden
    tl.store(out + base + at, value, mask=mask)


@triton.jit(
    do_not_specialize=["pack_blocks", "tiles", "stride_out", "stride_in", "stride_tap", "weights"]
)
def _pack_kernel(
    weight0,
    weight1,
    weight2,
    weight3,
    packed,
    source,
    transposed,
    pack_blocks,
    weights,
    hidden,
    stride_out,
    stride_in,
    stride_tap,
    positions,
    tiles,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Grid: `weights` times `pack_blocks` programs, then a tile of the source each."""
    pid = tl.program_id(0)
    which = pid // tl.maximum(pack_blocks, 1)
    block = pid % tl.maximum(pack_blocks, 1)
    if pid < weights * pack_blocks:
        packed += which * 9 * hidden * hidden
        if weight0 is not None:
            if which == 0:
                pack_block(
                    block, weight0, packed, hidden, stride_out, stride_in, stride_tap, BLOCK
                )
        if weight1 is not None:
            if which == 1:
                pack_block(
                    block, weight1, packed, hidden, stride_out, stride_in, stride_tap, BLOCK
                )
        if weight2 is not None:
            if which == 2:
                pack_block(
                    block, weight2, packed, hidden, stride_out, stride_in, stride_tap, BLOCK
                )
        if weight3 is not None:
            if which == 3:
                pack_block(
                    block, weight3, packed, hidden, stride_out, stride_in, stride_tap, BLOCK
                )
    elif transposed is not None:
        _transpose_tile(
            pid - weights * pack_blocks, source, transposed, positions, tiles, hidden, BLOCK_P,
            BLOCK_H,
        )  # fmt: skip


def spread(weights: Sequence[Tensor]) -> tuple[list[Tensor], tuple[int, int, int]]:
    """[h, h, 3, 3] weights that lie alike, and their strides along output, input and tap."""
    strides = {weight.stride() for weight in weights}
    if len(strides) > 1 or any(stride[2] != 3 * stride[3] for stride in strides):
        weights = [weight.contiguous() for weight in weights]
    first = weights[0]
    return list(weights), (first.stride(0), first.stride(1), first.stride(3))


def prepare(m: Map, reduced: Tensor | None, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(reduced as the branch's maps lie, packed [k, 9, h, h] in their dtype): a launch, or none.

    Args:
        m: the branch's maps.
        reduced: [N, h, H, W], dense in either memory format; None where it is there already.
        weights: of the convolutions, [h, h, 3, 3] each.
    """
    packed = m.empty_packed(len(weights))
    turned = None if reduced is None or m.lies_well(reduced) else m.empty()
    for first in range(0, max(len(weights), 1), _AT_ONCE):
        some, strides = list(weights[first : first + _AT_ONCE]), (0, 0, 0)
        if some:
            some, strides = spread(some)
        transposed = turned if first == 0 else None
        pack_blocks = cdiv(9 * m.hidden * m.hidden, _BLOCK) if some else 0
        tiles = cdiv(m.positions, 64)
        programs = len(some) * pack_blocks + (0 if transposed is None else m.n * tiles)
        if not programs:
            continue
        launch(
            _pack_kernel,
            (programs,),
            *some,
            *[None] * (_AT_ONCE - len(some)),
            packed[first:] if some else None,
            None if transposed is None else reduced,
            transposed,
            pack_blocks,
            len(some),
            m.hidden,
            *strides,
            m.positions,
            tiles,
            BLOCK=_BLOCK,
            BLOCK_P=64,
            BLOCK_H=m.block_h,
            num_warps=4,
        )
    return reduced if turned is None else turned, packed
