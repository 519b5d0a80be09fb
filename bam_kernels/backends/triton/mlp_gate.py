"""The gate of the channel branch alone (Squeeze-and-Excitation), which computes the MLP for itself.

One launch behind the pooling in place of two, for what its programs read of the weights again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bam_kernels.backends.triton import configs
from bam_kernels.backends.triton.channel_mlp import normalize
from bam_kernels.backends.triton.device_math import map_offsets, narrow, sigmoid
from bam_kernels.backends.triton.inference_layers import Layer, linear_arguments
from bam_kernels.backends.triton.launch import (
    accumulator,
    cdiv,
    device_guard,
    launch,
    registers,
    units,
    walk,
)
from bam_kernels.backends.triton.pool_reduce import Parts

_SIZES = ["outer", "inner_units", "x_stride_n", "x_stride_outer", "out_stride_n"]
_SIZES += ["out_stride_outer", "channel_blocks", "splits", "tiles_per_split", "pooled_tiles"]


@triton.jit(do_not_specialize=_SIZES)
def _mlp_gate_kernel(
    x,
    out,
    pooled,
    weight0,
    bias0,
    weight1,
    bias1,
    hidden_gamma,
    hidden_beta,
    hidden_mean,
    hidden_variance,
    gamma,
    beta,
    mean,
    variance,
    outer,
    inner_units,
    x_stride_n,
    x_stride_outer,
    out_stride_n,
    out_stride_outer,
    hidden,
    channel_blocks,
    splits,
    tiles_per_split,
    pooled_tiles,
    ALIGN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    RESIDUAL: tl.constexpr,
    HIDDEN_NORM: tl.constexpr,
    HIDDEN_EPS: tl.constexpr,
    NORM: tl.constexpr,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: BLOCK_C channels of one sample, over its split of the positions; the MLP of the
    sample first, which every program computes for itself. Grid: samples x splits x blocks, flat."""
    inner = inner_units * ALIGN
    C = inner if CHANNELS_LAST else outer
    P = outer if CHANNELS_LAST else inner
    pid = tl.program_id(0)
    rows = (pid % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    rest = pid // channel_blocks
    split = rest % splits
    n = (rest // splits).to(tl.int64)
    in_c = rows < C
    units_h = tl.arange(0, BLOCK_H)
    in_h = units_h < hidden

    y = tl.zeros((BLOCK_H,), ACC)
    for start in range(0, C, BLOCK_K):
        ins = start + tl.arange(0, BLOCK_K)
        in_k = ins < C
        if pooled_tiles is None:
            a = tl.load(pooled + n * C + ins, mask=in_k, other=0.0).to(ACC)
        else:
            a = tl.zeros((BLOCK_K,), ACC)
            for tile in range(pooled_tiles):
                a += tl.load(pooled + (n * pooled_tiles + tile) * C + ins, mask=in_k, other=0.0)
            a = a / P.to(ACC)
        w = tl.load(
            weight0 + units_h[:, None] * C + ins[None, :],
            mask=in_h[:, None] & in_k[None, :],
            other=0.0,
        )
        y += tl.sum(w.to(ACC) * a[None, :], axis=1)
    if bias0 is not None:
        y += tl.load(bias0 + units_h, mask=in_h, other=0.0).to(ACC)
    if HIDDEN_NORM:
        mu = tl.load(hidden_mean + units_h, mask=in_h, other=0.0).to(ACC)
        sigma2 = tl.load(hidden_variance + units_h, mask=in_h, other=1.0).to(ACC)
        y = tl.sum(
            normalize(
                y[None, :], units_h, in_h, mu, sigma2, hidden_gamma, hidden_beta, HIDDEN_EPS, ACC
            ),
            axis=0,
        )
    y = tl.where(in_h, tl.where(y < 0, 0.0, y), 0.0)  # a ReLU that lets NaN through

    w = tl.load(
        weight1 + rows[:, None] * hidden + units_h[None, :],
        mask=in_c[:, None] & in_h[None, :],
        other=0.0,
    )
    c = tl.sum(w.to(ACC) * y[None, :], axis=1)
    if bias1 is not None:
        c += tl.load(bias1 + rows, mask=in_c, other=0.0).to(ACC)
    if NORM:
        mu = tl.load(mean + rows, mask=in_c, other=0.0).to(ACC)
        sigma2 = tl.load(variance + rows, mask=in_c, other=1.0).to(ACC)
        c = tl.sum(normalize(c[None, :], rows, in_c, mu, sigma2, gamma, beta, EPS, ACC), axis=0)
    m = sigmoid(c)[:, None]

    x += n * x_stride_n * ALIGN
    out += n * out_stride_n * ALIGN
    for tile in range(split * tiles_per_split, (split + 1) * tiles_per_split):
        columns = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        mask = in_c[:, None] & (columns < P)[None, :]
        at = map_offsets(rows, columns, x_stride_outer, ALIGN, CHANNELS_LAST)
        value = tl.load(x + at, mask=mask).to(ACC)
        gated = value * m
        if RESIDUAL:
            gated += value
        at = map_offsets(rows, columns, out_stride_outer, ALIGN, CHANNELS_LAST)
        tl.store(out + at, narrow(gated, out.dtype.element_ty), mask=mask)


def mlp_gate_forward(
    x: Tensor, parts: Parts, layers: tuple[Layer, ...], residual: bool
) -> Tensor | None:
    """x + x * sigmoid(MLP(pooled)), or without x; None where two launches are the cheaper way.

    x [N, C, H, W], walkable; parts of its pooling; the two linear layers with their norms.
    """
    n, c, h, w = x.shape
    first, second = layers
    hidden = first.weight.shape[0]
    row_bytes = hidden * second.weight.itemsize
    whole_bytes = first.weight.numel() * first.weight.itemsize
    whole_bytes += parts.pooled.numel() // n * parts.pooled.itemsize
    found = configs.mlp_gate_tile(n, c, h * w, hidden, row_bytes, whole_bytes)
    if found is None:
        return None
    t, splits = found
    blocks = cdiv(c, t.block_c)
    out = torch.empty_like(x)
    w = walk(x, out)
    (x_stride_n, x_stride_outer), (out_stride_n, out_stride_outer) = units(x, w), units(out, w)
    tiles = cdiv(w.p, t.block_p)
    with device_guard(x):
        launch(
            _mlp_gate_kernel,
            (w.n * splits * blocks,),
            x,
            out,
            parts.pooled,
            **linear_arguments(layers),
            outer=w.p if w.channels_last else w.c,
            inner_units=w.inner // w.align,
            x_stride_n=x_stride_n,
            x_stride_outer=x_stride_outer,
            out_stride_n=out_stride_n,
            out_stride_outer=out_stride_outer,
            hidden=hidden,
            channel_blocks=blocks,
            splits=splits,
            tiles_per_split=cdiv(tiles, splits),
            pooled_tiles=parts.tiles if parts.tiles > 1 else None,
            ALIGN=w.align,
            CHANNELS_LAST=w.channels_last,
            RESIDUAL=residual,
            ACC=accumulator(x.dtype),
            BLOCK_C=t.block_c,
            BLOCK_P=t.block_p,
            BLOCK_H=configs.block_whole(hidden),
            BLOCK_K=32,
            num_warps=t.num_warps,
            num_stages=t.num_stages,
            **({} if t.registers is None else registers(t.registers, t.num_warps)),
        )
    return out
