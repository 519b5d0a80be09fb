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
    registers,
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
    "outer",
    "inner_units",
    "dout_stride_n",
    "dout_stride_outer",
    "x_stride_n",
    "x_stride_outer",
]


@triton.jit(do_not_specialize=["inner_tiles", "splits", "blocks_per_split", *_REDUCE_SIZES])
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
    inner_tiles,
    splits,
    blocks_per_split,
    ALIGN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    COMBINE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: a block of the dense axis in one sample, walking over its split of the other.

    The sum over the walk is kept element by element and taken across threads once, at the end; the
    sum over the dense axis, which mostly stays within a warp, is taken each step. A program owns
    [n, split, its dense block] of the one gradient and [n, inner_tile, its split] of the other: no
    two programs write one address. Grid: samples x splits x inner tiles, flat.
    """
    BLOCK_INNER: tl.constexpr = BLOCK_C if CHANNELS_LAST else BLOCK_P
    BLOCK_OUTER: tl.constexpr = BLOCK_P if CHANNELS_LAST else BLOCK_C
    inner = inner_units * ALIGN
    pid = tl.program_id(0)
    inner_tile = pid % inner_tiles
    rest = pid // inner_tiles
    split = rest % splits
    n = (rest // splits).to(tl.int64)
    dense = inner_tile * BLOCK_INNER + tl.arange(0, BLOCK_INNER)
    in_dense = dense < inner
    dout += n * dout_stride_n * ALIGN
    x += n * x_stride_n * ALIGN
    by_inner = channel if CHANNELS_LAST else spatial
    by_outer = spatial if CHANNELS_LAST else channel
    dinner = dchannel if CHANNELS_LAST else dspatial
    douter = dspatial if CHANNELS_LAST else dchannel

    i = None
    if by_inner is not None:
        i = tl.load(by_inner + n * inner + dense, mask=in_dense, other=0.0).to(ACC)[None, :]
    total = tl.zeros((BLOCK_OUTER, BLOCK_INNER), ACC)
    first = split * blocks_per_split * BLOCK_OUTER
    last = tl.minimum(first + blocks_per_split * BLOCK_OUTER, outer)
    for start in tl.range(first, last, BLOCK_OUTER, num_stages=STAGES):
        walked = start + tl.arange(0, BLOCK_OUTER)
        in_walk = walked < outer
        mask = in_walk[:, None] & in_dense[None, :]
        o = None
        if by_outer is not None:
            o = tl.load(by_outer + n * outer + walked, mask=in_walk, other=0.0).to(ACC)[:, None]
        far = walked.to(tl.int64)
        at_dout = (far * dout_stride_outer * ALIGN)[:, None] + dense[None, :]
        at_x = (far * x_stride_outer * ALIGN)[:, None] + dense[None, :]
        product = tl.load(dout + at_dout, mask=mask, other=0.0).to(ACC)
        product *= tl.load(x + at_x, mask=mask, other=0.0).to(ACC)
        if CHANNELS_LAST:
            to_inner, to_outer = logit_gradients(product, i, o, COMBINE)
        else:
            to_outer, to_inner = logit_gradients(product, o, i, COMBINE)
        # Outside the mask the product is 0, but an infinite logit there makes it NaN.
        if by_outer is not None:
            step = tl.sum(tl.where(mask, to_outer, 0.0), axis=1)
            tl.store(douter + (n * inner_tiles + inner_tile) * outer + walked, step, mask=in_walk)
        if by_inner is not None:
            total += tl.where(mask, to_inner, 0.0)
    if by_inner is not None:
        at = dinner + (n * splits + split) * inner + dense
        tl.store(at, tl.sum(total, axis=0), mask=in_dense)


@replayed
def gate_backward_reduce(
    dout: Tensor, x: Tensor, channel: Tensor | None, spatial: Tensor | None, combine: str
) -> tuple[Tensor, Tensor]:
    """(dchannel [N, C], dspatial [N, 1, H, W]) in their logits' dtypes; empty where absent."""
    x = layout.walkable(x)
    dout = layout.like(dout, x)
    w = walk(x, dout)
    t = configs.tile("gate_backward_reduce", x.dtype, w.c, w.p, 0, w.channels_last)
    position_tiles, channel_tiles = cdiv(w.p, t.block_p), cdiv(w.c, t.block_c)
    inner_tiles, blocks = position_tiles, channel_tiles
    if w.channels_last:
        inner_tiles, blocks = channel_tiles, position_tiles
    blocks_per_split = cdiv(blocks, configs.split_walk(blocks, w.n * inner_tiles, t.num_warps))
    splits = cdiv(blocks, blocks_per_split)
    channel_parts, position_parts = inner_tiles, splits
    if w.channels_last:
        channel_parts, position_parts = splits, inner_tiles
    partial = {"device": x.device, "dtype": accumulator_dtype(x.dtype)}
    dchannel = dspatial = x.new_empty(0)
    if channel is not None:
        dchannel = torch.empty((w.n, channel_parts, w.c), **partial)
    if spatial is not None:
        dspatial = torch.empty((w.n, position_parts, w.p), **partial)
    with device_guard(x):
        launch(
            _gate_backward_reduce_kernel,
            (w.n * splits * inner_tiles,),
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
            inner_tiles,
            splits,
            blocks_per_split,
            ALIGN=w.align,
            CHANNELS_LAST=w.channels_last,
            COMBINE=combine,
            ACC=accumulator(x.dtype),
            BLOCK_C=t.block_c,
            BLOCK_P=t.block_p,
            STAGES=t.num_stages,
            **({} if t.registers is None else registers(t.registers, t.num_warps)),
            num_warps=t.num_warps,
            num_stages=t.num_stages,
        )
        jobs = []
        if channel is not None:
            out = torch.empty_like(channel, memory_format=torch.contiguous_format)
            jobs.append(Job(dchannel, out, channel_parts))
            dchannel = out
        if spatial is not None:
            out = torch.empty_like(spatial, memory_format=torch.contiguous_format)
            jobs.append(Job(dspatial, out, position_parts))
            dspatial = out
        sum_splits(jobs)
    return dchannel, dspatial
