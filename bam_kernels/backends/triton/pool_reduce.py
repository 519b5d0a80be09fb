"""Average pool and 1x1 reduction from one read of x: the heads of both branches (Eq. 3, 4)."""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from bam_kernels import layout
from bam_kernels.backends.triton import configs
from bam_kernels.backends.triton.device_math import dot, map_offsets, narrow
from bam_kernels.backends.triton.launch import (
    accumulator,
    accumulator_dtype,
    cdiv,
    conv_precision,
    device_guard,
    launch,
    registers,
    units,
    walk,
)
from bam_kernels.backends.triton.replay import replayed
from bam_kernels.backends.triton.spatial_pack import (
    NO_PACKING,
    PACK_BLOCK,
    PACKING_SIZES,
    Packing,
    pack_block,
)
from bam_kernels.backends.triton.sum_splits import Job, sum_splits

_SIZES = ["outer", "inner_units", "x_stride_n", "x_stride_outer", "samples"]


@triton.jit(
    do_not_specialize=["position_tiles", "splits", "blocks_per_split", *PACKING_SIZES, *_SIZES]
)
def _pool_reduce_kernel(
    x,
    weight,
    bias,
    pooled,
    reduced,
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
    samples,
    outer,
    inner_units,
    x_stride_n,
    x_stride_outer,
    hidden,
    position_tiles,
    splits,
    blocks_per_split,
    ALIGN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    REDUCED_LAST: tl.constexpr,
    POOL_WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PACK_BLOCK: tl.constexpr,
):
    """One program: BLOCK_P positions of one sample, walking over its split of the channels.

    It owns pooled [n, position_tile, its channels] (a sum; the mean where POOL_WHOLE says that one
    tile holds the whole map) and reduced [split, n, its hidden block, its positions], in which
    channels are the dense axis where REDUCED_LAST.
    Grid: (samples x splits x position tiles, hidden blocks). Only hidden block 0 pools. Before
    that, the programs pack the weights of convolutions to come.
    """
    if packed is not None:
        if tl.program_id(1) == 0:
            for block in range(tl.program_id(0), pack_weights * pack_blocks, tl.num_programs(0)):
                pack_block(
                    block, weight0, weight1, weight2, weight3, packed, pack_blocks, hidden,
                    stride_out, stride_in, stride_tap, PACK_BLOCK,
                )  # fmt: skip
    inner = inner_units * ALIGN
    C = inner if CHANNELS_LAST else outer
    P = outer if CHANNELS_LAST else inner
    pid = tl.program_id(0)
    position_tile = pid % position_tiles
    rest = pid // position_tiles
    split = rest % splits
    n = (rest // splits).to(tl.int64)
    columns = position_tile * BLOCK_P + tl.arange(0, BLOCK_P)
    in_p = columns < P
    units_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_h = units_h < hidden
    x += n * x_stride_n * ALIGN

    acc = tl.zeros((BLOCK_H, BLOCK_P), ACC)
    first = split * blocks_per_split * BLOCK_C
    last = tl.minimum(first + blocks_per_split * BLOCK_C, C)
    for start in range(first, last, BLOCK_C):
        rows = start + tl.arange(0, BLOCK_C)
        in_c = rows < C
        offsets = map_offsets(rows, columns, x_stride_outer, ALIGN, CHANNELS_LAST)
        tile = tl.load(x + offsets, mask=in_c[:, None] & in_p[None, :], other=0.0)
        if weight is not None:
            w = tl.load(
                weight + units_h[:, None] * C + rows[None, :],
                mask=in_h[:, None] & in_c[None, :],
                other=0.0,
            )
            acc = dot(w, tile, acc, PRECISION)
        if pooled is not None:
            if tl.program_id(1) == 0:
                total = tl.sum(tile.to(ACC), axis=1)
                if POOL_WHOLE:
                    total = total / P.to(ACC)
                at = (n * position_tiles + position_tile) * C + rows
                tl.store(pooled + at, narrow(total, pooled.dtype.element_ty), mask=in_c)
    if weight is not None:
        if bias is not None:
            acc += tl.load(bias + units_h, mask=in_h, other=0.0).to(ACC)[:, None]
        reduced += (split * samples + n) * hidden * P
        offsets = map_offsets(units_h, columns, hidden if REDUCED_LAST else P, 1, REDUCED_LAST)
        mask = in_h[:, None] & in_p[None, :]
        tl.store(reduced + offsets, narrow(acc, reduced.dtype.element_ty), mask=mask)


@dataclasses.dataclass(slots=True)
class Parts:
    """What one launch leaves of both heads: whole, or in parts that are still to be added up.

    Args:
        pooled: [N, C] in x's dtype; with `tiles` above 1 sums [N, tiles, C] in the accumulator's
            type, of H * W in all; empty without pooling.
        reduced: [N, h, H, W] in x's dtype; with `splits` above 1 [splits, N * h * H * W] in the
            accumulator's type, the bias still to be added; empty without a reduction.
        tiles, splits: how many parts.
        channels_last: whether the reduction's values lie so.
    """

    pooled: Tensor
    reduced: Tensor
    tiles: int
    splits: int
    channels_last: bool


def pool_reduce_parts(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    pool: bool,
    channels_last: bool | None = None,
    packing: Packing | None = None,
) -> Parts:
    """The one launch over x.

    Args:
        x: [N, C, H, W], walkable.
        weight: [h, C], of x's dtype.
        bias: [h].
        pool: whether to pool.
        channels_last: whether the reduction is to lie so; as x does if None.
        packing: weights that the launch packs beside this, of h channels too.
    """
    w = walk(x)
    channels_last = w.channels_last if channels_last is None else channels_last
    hidden = 0 if weight is None else weight.shape[0]
    precision = conv_precision(x.dtype)
    t = configs.tile("pool_reduce", x.dtype, w.c, w.p, hidden, w.channels_last, precision)
    block_h = configs.block_hidden("pool_reduce", x.dtype, hidden)
    hidden_blocks = max(1, cdiv(hidden, block_h))
    position_tiles, blocks = cdiv(w.p, t.block_p), cdiv(w.c, t.block_c)
    blocks_per_split = cdiv(
        blocks,
        configs.split_channels(blocks, w.n * position_tiles * hidden_blocks, w.c, hidden),
    )
    splits = cdiv(blocks, blocks_per_split)
    partial = {"device": x.device, "dtype": accumulator_dtype(x.dtype)}
    pooled = reduced = x.new_empty(0)
    if pool:
        shape = (w.n, w.c) if position_tiles == 1 else (w.n, position_tiles, w.c)
        pooled = x.new_empty(shape) if position_tiles == 1 else torch.empty(shape, **partial)
    if hidden and splits > 1:
        reduced = torch.empty((splits, w.n * hidden * w.p), **partial)
    elif hidden:
        reduced = _empty_reduced(x, hidden, channels_last)
    with device_guard(x):
        launch(
            _pool_reduce_kernel,
            (w.n * splits * position_tiles, hidden_blocks),
            x,
            None if weight is None else weight.contiguous(),
            bias.contiguous() if bias is not None and splits == 1 else None,
            pooled if pool else None,
            reduced if hidden else None,
            *(NO_PACKING if packing is None else packing.arguments()),
            w.n,
            w.p if w.channels_last else w.c,
            w.inner // w.align,
            *units(x, w),
            hidden,
            position_tiles,
            splits,
            blocks_per_split,
            ALIGN=w.align,
            CHANNELS_LAST=w.channels_last,
            REDUCED_LAST=channels_last,
            POOL_WHOLE=position_tiles == 1,
            PRECISION=precision,
            ACC=accumulator(x.dtype),
            BLOCK_C=t.block_c,
            BLOCK_P=t.block_p,
            BLOCK_H=block_h,
            PACK_BLOCK=PACK_BLOCK,
            **({} if t.registers is None else registers(t.registers, t.num_warps)),
            num_warps=t.num_warps,
            num_stages=t.num_stages,
        )
    return Parts(
        pooled, reduced, position_tiles if pool else 1, splits if hidden else 1, channels_last
    )


def _empty_reduced(x: Tensor, hidden: int, channels_last: bool) -> Tensor:
    """An uninitialised reduction [N, h, H, W] of x, in its dtype."""
    fmt = torch.channels_last if channels_last else torch.contiguous_format
    size = (x.shape[0], hidden, *x.shape[2:])
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=fmt)


def whole(
    x: Tensor,
    parts: Parts,
    hidden: int,
    bias: Tensor | None,
    *,
    pooled: bool = True,
    reduced: bool = True,
) -> Parts:
    """The parts added up in one launch, or in none where there are none: both heads, or one."""
    jobs, found = [], parts
    positions = x.shape[2] * x.shape[3]
    if pooled and parts.tiles > 1:
        out = x.new_empty(x.shape[:2])
        jobs.append(Job(parts.pooled, out, parts.tiles, divisor=positions))
        found = dataclasses.replace(found, pooled=out, tiles=1)
    if reduced and parts.splits > 1:
        out = _empty_reduced(x, hidden, parts.channels_last)
        run = 1 if parts.channels_last else positions
        jobs.append(Job(parts.reduced[None], out, parts.splits, bias=bias, bias_run=run))
        found = dataclasses.replace(found, reduced=out, splits=1)
    with device_guard(x):
        sum_splits(jobs)
    return found


@replayed
def pool_reduce_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, pool: bool
) -> tuple[Tensor, Tensor]:
    """(pooled [N, C], reduced [N, h, H, W] in x's memory format), in x's dtype; empty where absent.

    x [N, C, H, W]; weight [h, C], of x's dtype; bias [h].
    """
    x = layout.walkable(x)
    parts = pool_reduce_parts(x, weight, bias, pool)
    parts = whole(x, parts, 0 if weight is None else weight.shape[0], bias)
    return parts.pooled, parts.reduced
