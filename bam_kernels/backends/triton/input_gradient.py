"""The gradient of x and of the reduction weight, from one read of dout and one of x.

    dx  = dout * (1 + M) + W0^T dreduced + dpooled / P
    dW0 = sum over (n, p) of dreduced x^T,   db0 = sum over (n, p) of dreduced

Any of the three terms of dx may be absent, and so may dx, dW0 or db0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bam_kernels import layout
from bam_kernels.backends.triton import configs
from bam_kernels.backends.triton.device_math import attention_map, dot, map_offsets, narrow
from bam_kernels.backends.triton.launch import (
    accumulator,
    accumulator_dtype,
    cdiv,
    compute_capability,
    conv_precision,
    device_guard,
    launch,
    registers,
    units,
    walk,
    warps,
)
from bam_kernels.backends.triton.replay import replayed
from bam_kernels.backends.triton.sum_splits import Job, sum_splits

_SIZES = [
    "outer",
    "inner_units",
    "dout_stride_n",
    "dout_stride_outer",
    "x_stride_n",
    "x_stride_outer",
    "dx_stride_n",
    "dx_stride_outer",
    "position_tiles",
    "tiles",
    "tiles_per_split",
    "channel_blocks",
]


@triton.jit
def _load_weight(weight, rows, some_h, C, hidden):
    """W0's block, transposed: [BLOCK_C, BLOCK_H]."""
    return tl.load(
        weight + some_h[None, :] * C + rows[:, None],
        mask=(some_h < hidden)[None, :] & (rows < C)[:, None],
        other=0.0,
    )


@triton.jit
def _load_reduced(dreduced, n, columns, some_h, P, hidden, CHANNELS_LAST: tl.constexpr):
    """Hidden channels `some_h` of dreduced at positions `columns`: [BLOCK_H, BLOCK_P]."""
    at = map_offsets(some_h, columns, hidden if CHANNELS_LAST else P, 1, CHANNELS_LAST)
    mask = (some_h < hidden)[:, None] & (columns < P)[None, :]
    return tl.load(dreduced + n * hidden * P + at, mask=mask, other=0.0)


@triton.jit
def _finish_dx(
    grad,
    dout,
    channel,
    spatial,
    dpooled,
    dx,
    n,
    rows,
    columns,
    C,
    P,
    dout_stride_n,
    dout_stride_outer,
    dx_stride_n,
    dx_stride_outer,
    ALIGN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    COMBINE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACC: tl.constexpr,
):
    """Add the pool's and the gate's terms to `grad`, which holds W0^T dreduced, and store dx."""
    in_c = rows < C
    in_p = columns < P
    mask = in_c[:, None] & in_p[None, :]
    if dpooled is not None:
        dp = tl.load(dpooled + n * C + rows, mask=in_c, other=0.0).to(ACC)
        grad += (dp / P.to(ACC))[:, None]
    if dout is not None:
        at_dout = map_offsets(rows, columns, dout_stride_outer, ALIGN, CHANNELS_LAST)
        g = tl.load(dout + n * dout_stride_n * ALIGN + at_dout, mask=mask, other=0.0)
        g = g.to(ACC)
        c = None
        s = None
        if channel is not None:
            c = tl.load(channel + n * C + rows, mask=in_c, other=0.0).to(ACC)[:, None]
        if spatial is not None:
            s = tl.load(spatial + n * P + columns, mask=in_p, other=0.0).to(ACC)[None, :]
        grad += g * attention_map(c, s, COMBINE)
        if RESIDUAL:
            grad += g
    at_dx = map_offsets(rows, columns, dx_stride_outer, ALIGN, CHANNELS_LAST)
    tl.store(dx + n * dx_stride_n * ALIGN + at_dx, narrow(grad, dx.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def _input_gradient_kernel(
    dout,
    x,
    channel,
    spatial,
    dpooled,
    dreduced,
    weight,
    dx,
    dweight,
    dbias,
    outer,
    inner_units,
    dout_stride_n,
    dout_stride_outer,
    x_stride_n,
    x_stride_outer,
    dx_stride_n,
    dx_stride_outer,
    hidden,
    position_tiles,
    tiles,
    tiles_per_split,
    channel_blocks,
    ALIGN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    COMBINE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HIDDEN_BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: BLOCK_C channels, walking over its split of the (sample, position tile) pairs.

    dW0's block stays in registers over the walk, so its partials number splits, not tiles; so does
    W0's where there is one hidden block, and dreduced is then loaded once a step for both products.
    Grid: (channel blocks x splits, hidden blocks): neighbours share dreduced. Hidden block 0 writes
    dx; each writes its rows of dW0.
    """
    inner = inner_units * ALIGN
    C = inner if CHANNELS_LAST else outer
    P = outer if CHANNELS_LAST else inner
    pid = tl.program_id(0)
    channel_block = pid % channel_blocks
    split = pid // channel_blocks
    hidden_block = tl.program_id(1)
    rows = channel_block * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = rows < C
    own_h = tl.arange(0, BLOCK_H)
    if HIDDEN_BLOCKS > 1:
        own_h += hidden_block * BLOCK_H

    w = None
    if HIDDEN_BLOCKS == 1 and weight is not None and dx is not None:
        w = _load_weight(weight, rows, own_h, C, hidden)
    dw = tl.zeros((BLOCK_H, BLOCK_C), ACC)
    db = tl.zeros((BLOCK_H,), ACC)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tiles)
    for tile in tl.range(first, last, num_stages=STAGES):
        n = (tile // position_tiles).to(tl.int64)
        columns = (tile % position_tiles) * BLOCK_P + tl.arange(0, BLOCK_P)

        dr = None
        if dweight is not None or w is not None:
            dr = _load_reduced(dreduced, n, columns, own_h, P, hidden, CHANNELS_LAST)
        if dweight is not None:
            at_x = map_offsets(rows, columns, x_stride_outer, ALIGN, CHANNELS_LAST)
            mask = in_c[:, None] & (columns < P)[None, :]
            value = tl.load(x + n * x_stride_n * ALIGN + at_x, mask=mask, other=0.0)
            dw = dot(dr, tl.trans(value), dw, PRECISION)
            if dbias is not None:
                db += tl.sum(dr.to(ACC), axis=1)

        if dx is not None:
            grad = tl.zeros((BLOCK_C, BLOCK_P), ACC)
            if HIDDEN_BLOCKS == 1:  # no branch at run time, so that the loads can be prefetched
                if weight is not None:
                    grad = dot(w, dr, grad, PRECISION)
                _finish_dx(
                    grad, dout, channel, spatial, dpooled, dx, n, rows, columns, C, P,
                    dout_stride_n, dout_stride_outer, dx_stride_n, dx_stride_outer,
                    ALIGN, CHANNELS_LAST, COMBINE, RESIDUAL, ACC,
                )  # fmt: skip
            elif hidden_block == 0:
                for block in tl.static_range(HIDDEN_BLOCKS):
                    some_h = block * BLOCK_H + tl.arange(0, BLOCK_H)
                    part = _load_reduced(dreduced, n, columns, some_h, P, hidden, CHANNELS_LAST)
                    some_w = _load_weight(weight, rows, some_h, C, hidden)
                    grad = dot(some_w, part, grad, PRECISION)
                _finish_dx(
                    grad, dout, channel, spatial, dpooled, dx, n, rows, columns, C, P,
                    dout_stride_n, dout_stride_outer, dx_stride_n, dx_stride_outer,
                    ALIGN, CHANNELS_LAST, COMBINE, RESIDUAL, ACC,
                )  # fmt: skip

    if dweight is not None:
        at = (split.to(tl.int64) * hidden + own_h)[:, None] * C + rows[None, :]
        tl.store(dweight + at, dw, mask=(own_h < hidden)[:, None] & in_c[None, :])
        if dbias is not None:
            if channel_block == 0:
                tl.store(dbias + split * hidden + own_h, db, mask=own_h < hidden)


def _registers(t: configs.Tile, x: Tensor, hidden: int, channels_last: bool) -> dict[str, int]:
    """What the tile says. For compute capability 10 the assembler keeps to 128 for one of them,
    and spills."""
    most = t.registers
    if most is None and channels_last and x.dtype.itemsize == 2 and 8 < hidden <= 16:
        most = 168 if compute_capability() // 10 == 10 else None
    return {} if most is None else registers(most, t.num_warps)


@replayed
def input_gradient(
    dout: Tensor | None,
    x: Tensor,
    channel: Tensor | None,
    spatial: Tensor | None,
    dpooled: Tensor | None,
    dreduced: Tensor | None,
    weight: Tensor | None,
    combine: str,
    residual: bool,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx like x, dweight [h, C], dbias [h]), each empty where it is not asked for.

    dout and x [N, C, H, W]; channel [N, C] and spatial [N, 1, H, W] are the gate's logits; dpooled
    [N, C]; dreduced [N, h, H, W]; weight [h, C]. dbias is only had together with dweight.
    """
    x = layout.walkable(x)
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    maps = [dx] if need_dx else []
    if dout is not None:
        dout = layout.like(dout, x)
        maps.append(dout)
    w = walk(x, *maps)
    hidden = 0 if dreduced is None else dreduced.shape[1]
    precision = conv_precision(x.dtype)
    t = configs.tile("input_gradient", x.dtype, w.c, w.p, hidden, w.channels_last, precision)
    block_h = configs.block_hidden("input_gradient", x.dtype, hidden)
    hidden_blocks = max(1, cdiv(hidden, block_h))
    position_tiles, channel_blocks = cdiv(w.p, t.block_p), cdiv(w.c, t.block_c)
    tiles = w.n * position_tiles
    partial_bytes = hidden * w.c * accumulator_dtype(x.dtype).itemsize
    parts = tiles  # without a partial in each, as many as there are
    if need_dweight:
        parts = configs.split_tiles(tiles, channel_blocks, t.num_warps, partial_bytes)
    tiles_per_split = cdiv(tiles, parts)
    splits = cdiv(tiles, tiles_per_split)

    dweight = dbias = x.new_empty(0)
    partial = {"device": x.device, "dtype": accumulator_dtype(x.dtype)}
    dweight_out = torch.empty((splits, hidden * w.c), **partial) if need_dweight else None
    dbias_out = torch.empty((splits, hidden), **partial) if need_dbias else None
    if dreduced is not None:
        fmt = torch.channels_last if w.channels_last else torch.contiguous_format
        dreduced = dreduced.to(x.dtype).contiguous(memory_format=fmt)
    with device_guard(x):
        launch(
            _input_gradient_kernel,
            (channel_blocks * splits, hidden_blocks if need_dweight else 1),
            dout,
            x if need_dweight else None,
            None if channel is None or dout is None else channel.contiguous(),
            None if spatial is None or dout is None else spatial.contiguous(),
            None if dpooled is None else dpooled.contiguous(),
            dreduced,
            weight.contiguous() if weight is not None and dreduced is not None else None,
            dx if need_dx else None,
            dweight_out,
            dbias_out,
            w.p if w.channels_last else w.c,
            w.inner // w.align,
            *(units(dout, w) if dout is not None else (0, 0)),
            *units(x, w),
            *(units(dx, w) if need_dx else (0, 0)),
            hidden,
            position_tiles,
            tiles,
            tiles_per_split,
            channel_blocks,
            ALIGN=w.align,
            CHANNELS_LAST=w.channels_last,
            COMBINE=combine,
            RESIDUAL=residual,
            PRECISION=precision,
            ACC=accumulator(x.dtype),
            BLOCK_C=t.block_c,
            BLOCK_P=t.block_p,
            BLOCK_H=block_h,
            HIDDEN_BLOCKS=hidden_blocks,
            STAGES=t.num_stages,
            num_warps=warps(t.num_warps),
            **_registers(t, x, hidden, w.channels_last),
            num_stages=t.num_stages,
        )
        jobs = []
        if need_dweight:
            dweight = x.new_empty((hidden, w.c))
            jobs.append(Job(dweight_out, dweight, splits))
        if need_dbias:
            dbias = x.new_empty(hidden)
            jobs.append(Job(dbias_out, dbias, splits))
        # The partials stand as [splits, length]: one row of `splits` partials.
        sum_splits([Job(j.partials[None], j.out, j.splits) for j in jobs])
    return dx, dweight, dbias
