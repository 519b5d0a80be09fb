"""What the convolutions of the spatial branch read, laid out for wide loads, in one launch.

A [h, h, 3, 3] weight has its taps innermost: a tile of one tap would be a gather of elements of two
bytes. Packed as [9, h, h], taps outermost and inputs innermost, it is read 16 bytes at a time. A
reduction that comes as NCHW is laid as [N * H * W, h] with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from bam_kernels.backends.triton.device_math import narrow
from bam_kernels.backends.triton.launch import cdiv, launch
from bam_kernels.backends.triton.spatial_layout import Map, Partials, settle
from bam_kernels.backends.triton.spatial_math import (
    load_map,
    store_statistics,
    tile_offsets,
    tile_positions,
    tile_start,
)

PACK_BLOCK = 512
"""Elements that a program packs at a time."""

PACKED_AT_ONCE = 4
"""Weights that one launch packs."""

PACKING_SIZES = ["pack_blocks", "pack_weights", "stride_out", "stride_in", "stride_tap"]


@triton.jit
def pack_block(
    index,
    weight0,
    weight1,
    weight2,
    weight3,
    packed,
    pack_blocks,
    hidden,
    stride_out,
    stride_in,
    stride_tap,
    BLOCK: tl.constexpr,
):
    """BLOCK elements of one of the weights; `index` counts weights times `pack_blocks`."""
    which = index // pack_blocks
    chosen = tl.zeros((BLOCK,), tl.int32) + which
    i = (index % pack_blocks) * BLOCK + tl.arange(0, BLOCK)
    square = hidden * hidden
    mask = i < 9 * square
    tap = i // square
    rest = i - tap * square
    out = rest // hidden
    at = out * stride_out + (rest - out * hidden) * stride_in + tap * stride_tap
    value = tl.load(weight0 + at, mask=mask & (chosen == 0), other=0.0)
    if weight1 is not None:
        value += tl.load(weight1 + at, mask=mask & (chosen == 1), other=0.0)
    if weight2 is not None:
        value += tl.load(weight2 + at, mask=mask & (chosen == 2), other=0.0)
    if weight3 is not None:
        value += tl.load(weight3 + at, mask=mask & (chosen == 3), other=0.0)
    at_out = which * 9 * square + i
    tl.store(packed + at_out, narrow(value, packed.dtype.element_ty), mask=mask)


@triton.jit
def _source_tile(
    pid,
    source,
    laid,
    partials,
    positions,
    total,
    count,
    hidden,
    TURNED: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """A tile of the reduction: laid as the branch's maps lie, if TURNED, and its statistics."""
    first, own, in_p, n_in_tile = tile_positions(pid, total, BLOCK_P)
    units = tl.arange(0, BLOCK_H)
    in_h = units < hidden
    mask = in_h[:, None] & in_p[None, :]
    value = load_map(source, first, own, units, mask, positions, hidden, TURNED)
    if laid is not None:
        at = tile_offsets(units, own, hidden)
        tl.store(laid + tile_start(first, hidden) + at, value, mask=mask)
    if partials is not None:
        value = value.to(ACC)
        store_statistics(value, mask, n_in_tile, partials, pid, count, units, in_h, hidden, ACC)


@triton.jit(do_not_specialize=[*PACKING_SIZES, "positions", "total", "count"])
def _pack_kernel(
    weight0,
    weight1,
    weight2,
    weight3,
    packed,
    pack_blocks,
    pack_weights,
    stride_out,
    stride_in,
    stride_tap,
    source,
    laid,
    partials,
    positions,
    total,
    count,
    hidden,
    TURNED: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Grid: `pack_weights` times `pack_blocks` programs, then a tile of the source each."""
    pid = tl.program_id(0)
    if pid < pack_weights * pack_blocks:
        if packed is not None:
            pack_block(
                pid, weight0, weight1, weight2, weight3, packed, pack_blocks, hidden, stride_out,
                stride_in, stride_tap, BLOCK,
            )  # fmt: skip
    elif source is not None:
        _source_tile(
            pid - pack_weights * pack_blocks, source, laid, partials, positions, total, count,
            hidden, TURNED, ACC, BLOCK_P, BLOCK_H,
        )  # fmt: skip


@dataclasses.dataclass(slots=True)
class Packing:
    """Up to `PACKED_AT_ONCE` weights [h, h, 3, 3] that a launch packs.

    Args:
        weights: of the convolutions.
        packed: [as many, 9, h, h], to be filled, in the maps' dtype.
    """

    weights: Sequence[Tensor]
    packed: Tensor

    @property
    def blocks(self) -> int:
        """Of one weight."""
        return cdiv(self.packed[0].numel(), PACK_BLOCK)

    def arguments(self) -> tuple[object, ...]:
        """Of a kernel, from `weight0` to `stride_tap`."""
        weights, strides = spread(self.weights)
        absent = [None] * (PACKED_AT_ONCE - len(weights))
        return *weights, *absent, self.packed, self.blocks, len(weights), *strides


NO_PACKING = (*[None] * (PACKED_AT_ONCE + 1), 1, 0, 0, 0, 0)


def spread(weights: Sequence[Tensor]) -> tuple[list[Tensor], tuple[int, int, int]]:
    """[h, h, 3, 3] weights that lie alike, and their strides along output, input and tap."""
    strides = {weight.stride() for weight in weights}
    if len(strides) > 1 or any(stride[2] != 3 * stride[3] for stride in strides):
        weights = [weight.contiguous() for weight in weights]
    first = weights[0]
    return list(weights), (first.stride(0), first.stride(1), first.stride(3))


def packings(m: Map, weights: Sequence[Tensor]) -> tuple[Tensor, list[Packing]]:
    """(packed [k, 9, h, h], to be filled by these packings) of a branch's weights."""
    packed = m.empty_packed(len(weights))
    step = PACKED_AT_ONCE
    parts = range(0, len(weights), step)
    return packed, [Packing(weights[i : i + step], packed[i : i + step]) for i in parts]


def prepare(
    m: Map, reduced: Tensor, weights: Sequence[Tensor], statistics: bool = False
) -> tuple[Tensor, Tensor, Partials | None]:
    """(reduced as the branch's maps lie, packed [k, 9, h, h] in their dtype, the reduction's
    statistics): in a launch, or none.

    Args:
        m: the branch's maps.
        reduced: [N, h, H, W], dense in either memory format.
        weights: of the convolutions, [h, h, 3, 3] each.
        statistics: whether to take them.
    """
    packed, todo = packings(m, weights)
    laid = None if m.lies_well(reduced) else m.empty()
    partials = m.workspace(2, m.count, m.hidden) if statistics else None
    if todo or laid is not None or statistics:
        launch_pack(m, todo[0] if todo else None, reduced, laid, partials)
    for packing in todo[1:]:
        launch_pack(m, packing)
    settled = settle(partials, m, m.hidden, centred=True) if statistics else None
    return reduced if laid is None else laid, packed, settled


def launch_pack(
    m: Map,
    packing: Packing | None,
    reduced: Tensor | None = None,
    laid: Tensor | None = None,
    partials: Tensor | None = None,
) -> None:
    """Pack weights and, where they are given, lay `reduced` as the branch's maps lie and take the
    partials of its statistics."""
    programs = 0 if packing is None else len(packing.weights) * packing.blocks
    looks = laid is not None or partials is not None
    launch(
        _pack_kernel,
        (programs + (m.count if looks else 0),),
        *(NO_PACKING if packing is None else packing.arguments()),
        reduced if looks else None,
        laid,
        partials,
        m.positions,
        TURNED=laid is not None,
        BLOCK=PACK_BLOCK,
        **m.sizes(),
        **m.constants(),
    )
