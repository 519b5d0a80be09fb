"""The gate (Eq. 1-2) and the two reductions of its gradient.

Forward reads x once and writes out once; the map M lives in registers. The reductions read dout and
x once each: dc sums over positions, ds over channels, of dout * x * dM; M is recomputed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bam_kernels import layout
from bam_kernels.backends.triton import configs
from bam_kernels.backends.triton.device_math import (
    attention_map,
    logit_gradients,
    map_offsets,
    narrow,
)
from bam_kernels.backends.triton.launch import (
    accumulator,
    accumulator_dtype,
    cdiv,
    device_guard,
    launch,
    units,
    walk,
)
from bam_kernels.backends.triton.replay import replayed
from bam_kernels.backends.triton.sum_splits import Job, sum_splits

_SIZES = ["inner_units", "x_stride_n", "x_stride_outer", "out_stride_n", "out_stride_outer"]


@triton.jit(do_not_specialize=["outer", "position_tiles", "channel_tiles", *_SIZES])
def _gate_forward_kernel(
    x,
    channel,
    spatial,
    out,
    outer,
    inner_units,
    x_stride_n,
    x_stride_outer,
    out_stride_n,
    out_stride_outer,
    position_tiles,
    channel_tiles,
    ALIGN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    COMBINE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One program: one [BLOCK_C, BLOCK_P] tile of one sample. Grid: samples x tiles, flat."""
    inner = inner_units * ALIGN
    C = inner if CHANNELS_LAST else outer
    P = outer if CHANNELS_LAST else inner
    pid = tl.program_id(0)
    if CHANNELS_LAST:  # neighbours in the grid are neighbours in memory
        channel_tile = pid % channel_tiles
        rest = pid // channel_tiles
        position_tile = rest % position_tiles
        n = (rest // position_tiles).to(tl.int64)
    else:
        position_tile = pid % position_tiles
        rest = pid // position_tiles
        channel_tile = rest % channel_tiles
        n = (rest // channel_tiles).to(tl.int64)
    rows = channel_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    columns = position_tile * BLOCK_P + tl.arange(0, BLOCK_P)
    mask = (rows < C)[:, None] & (columns < P)[None, :]

    c = None
    s = None
    if channel is not None:
        c = tl.load(channel + n * C + rows, mask=rows < C, other=0.0).to(ACC)[:, None]
    if spatial is not None:
        s = tl.load(spatial + n * P + columns, mask=columns < P, other=0.0).to(ACC)[None, :]
    m = attention_map(c, s, COMBINE)

    x += n * x_stride_n * ALIGN
    out += n * out_stride_n * ALIGN
    value = tl.load(x + map_offsets(rows, columns, x_stride_outer, ALIGN, CHANNELS_LAST), mask=mask)
    value = value.to(ACC)
    gated = value * m
    if RESIDUAL:
        gated += value
    offsets = map_offsets(rows, columns, out_stride_outer, ALIGN, CHANNELS_LAST)
    tl.store(out + offsets, narrow(gated, out.dtype.element_ty), mask=mask)


@replayed
def gate_forward(
    x: Tensor, channel: Tensor | None, spatial: Tensor | None, combine: str, residual: bool
) -> Tensor:
    """x + x * M (or x * M). x [N, C, H, W]; channel [N, C]; spatial [N, 1, H, W], or None."""
    x = layout.walkable(x)
    out = torch.empty_like(x)
    w = walk(x, out)
    t = configs.tile("gate", x.dtype, w.c, w.p, 0, w.channels_last)
    position_tiles, channel_tiles = cdiv(w.p, t.block_p), cdiv(w.c, t.block_c)
    with device_guard(x):
        launch(
            _gate_forward_kernel,
            (w.n * position_tiles * channel_tiles,),
            x,
            None if channel is None else channel.contiguous(),
            None if spatial is None else spatial.contiguous(),
            out,
            w.p if w.channels_last else w.c,
            w.inner // w.align,
            *units(x, w),
            *units(out, w),
            position_tiles,
            channel_tiles,
            ALIGN=w.align,
            CHANNELS_LAST=w.channels_last,
            COMBINE=combine,
            RESIDUAL=residual,
            ACC=accumulator(x.dtype),
            BLOCK_C=t.block_c,
            BLOCK_P=t.block_p,
            num_warps=t.num_warps,
            num_stages=t.num_stages,
        )
    return out


_REDUCE_SIZES = [
    "inner_units",
    "dout_stride_n",
    "dout_stride_outer",
    "x_stride_n",
    "x_stride_outer",
]


@triton.jit(
    do_not_specialize=["outer", "position_tiles", "splits", "blocks_per_split", *_REDUCE_SIZES]
)
def _gate_backward_reduce_kernel(
    dout,
    x,
    channel,
    spatial,
    dchannel,
    dspatial,
    outer,
    inner_units,
    dout_stride_n,
    dout_stride_outer,
    x_stride_n,
    x_stride_outer,
    position_tiles,
    splits,
    blocks_per_split,
    ALIGN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    COMBINE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One program: BLOCK_P positions of one sample, walking over its split of the channels.

    It owns dspatial [n, split, its positions] and dchannel [n, position_tile, its channels]: no two
    programs write one address. Grid: samples x splits x position tiles, flat.
    """
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
    dout += n * dout_stride_n * ALIGN
    x += n * x_stride_n * ALIGN

    s = None
    if spatial is not None:
        s = tl.load(spatial + n * P + columns, mask=in_p, other=0.0).to(ACC)[None, :]
    ds = tl.zeros((BLOCK_P,), ACC)
    first = split * blocks_per_split * BLOCK_C
    last = tl.minimum(first + blocks_per_split * BLOCK_C, C)
    for start in range(first, last, BLOCK_C):
        rows = start + tl.arange(0, BLOCK_C)
        in_c = rows < C
        mask = in_c[:, None] & in_p[None, :]
        c = None
        if channel is not None:
            c = tl.load(channel + n * C + rows, mask=in_c, other=0.0).to(ACC)[:, None]
        at_dout = map_offsets(rows, columns, dout_stride_outer, ALIGN, CHANNELS_LAST)
        at_x = map_offsets(rows, columns, x_stride_outer, ALIGN, CHANNELS_LAST)
        product = tl.load(dout + at_dout, mask=mask, other=0.0).to(ACC)
        product *= tl.load(x + at_x, mask=mask, other=0.0).to(ACC)
        by_c, by_s = logit_gradients(product, c, s, COMBINE)
        if channel is not None:
            # Outside the mask the product is 0, but an infinite logit there makes it NaN.
            dc = tl.sum(tl.where(mask, by_c, 0.0), axis=1)
            tl.store(dchannel + (n * position_tiles + position_tile) * C + rows, dc, mask=in_c)
        if spatial is not None:
            ds += tl.sum(tl.where(mask, by_s, 0.0), axis=0)
    if spatial is not None:
        tl.store(dspatial + (n * splits + split) * P + columns, ds, mask=in_p)


@replayed
def gate_backward_reduce(
    dout: Tensor, x: Tensor, channel: Tensor | None, spatial: Tensor | None, combine: str
) -> tuple[Tensor, Tensor]:
    """(dchannel [N, C], dspatial [N, 1, H, W]) in their logits' dtypes; empty where absent."""
    x = layout.walkable(x)
    dout = layout.like(dout, x)
    w = walk(x, dout)
    t = configs.tile("gate_backward_reduce", x.dtype, w.c, w.p, 0, w.channels_last)
    position_tiles, blocks = cdiv(w.p, t.block_p), cdiv(w.c, t.block_c)
    blocks_per_split = cdiv(blocks, configs.split_channels(blocks, w.n * position_tiles))
    splits = cdiv(blocks, blocks_per_split)
    partial = {"device": x.device, "dtype": accumulator_dtype(x.dtype)}
    dchannel = dspatial = x.new_empty(0)
    if channel is not None:
        dchannel = torch.empty((w.n, position_tiles, w.c), **partial)
    if spatial is not None:
        dspatial = torch.empty((w.n, splits, w.p), **partial)
    with device_guard(x):
        launch(
            _gate_backward_reduce_kernel,
            (w.n * splits * position_tiles,),
            dout,
            x,
            None if channel is None else channel.contiguous(),
            None if spatial is None else spatial.contiguous(),
            None if channel is None else dchannel,
            None if spatial is None else dspatial,
            w.p if w.channels_last else w.c,
            w.inner // w.align,
            *units(dout, w),
            *units(x, w),
            position_tiles,
            splits,
            blocks_per_split,
            ALIGN=w.align,
            CHANNELS_LAST=w.channels_last,
            COMBINE=combine,
            ACC=accumulator(x.dtype),
            BLOCK_C=t.block_c,
            BLOCK_P=t.block_p,
            num_warps=t.num_warps,
            num_stages=t.num_stages,
        )
        jobs = []
        if channel is not None:
            out = torch.empty_like(channel, memory_format=torch.contiguous_format)
            jobs.append(Job(dchannel, out, position_tiles))
            dchannel = out
        if spatial is not None:
            out = torch.empty_like(spatial, memory_format=torch.contiguous_format)
            jobs.append(Job(dspatial, out, splits))
            dspatial = out
        sum_splits(jobs)
    return dchannel, dspatial
