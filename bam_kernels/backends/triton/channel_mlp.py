"""The channel branch behind the pooling (Eq. 3): linear layers, ReLU, batch norms.

In one launch where that is little work, else in the two of `channel_mlp_steps`. With running
statistics the one launch cuts the batch into blocks; with batch statistics each of its programs
holds the whole batch, so that the statistics need no second launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bam_kernels.backends.triton import configs
from bam_kernels.backends.triton.channel_mlp_steps import (
    batch_statistics,
    launch_steps,
    normalize,
)
from bam_kernels.backends.triton.device_math import dot, product
from bam_kernels.backends.triton.launch import (
    accumulator,
    accumulator_dtype,
    cdiv,
    device_guard,
    launch,
)
from bam_kernels.backends.triton.replay import replayed


@triton.jit
def mlp_block(
    pid,
    pooled,
    weight0,
    bias0,
    weight1,
    bias1,
    hidden_gamma,
    hidden_beta,
    hidden_mean,
    hidden_var,
    gamma,
    beta,
    mean,
    var,
    logits,
    hidden_out,
    hidden_batch_mean,
    hidden_batch_var,
    batch_mean,
    batch_var,
    N,
    C,
    hidden,
    channel_blocks,
    pooled_tiles,
    pooled_divisor,
    HIDDEN_NORM: tl.constexpr,
    HIDDEN_BATCH_STATS: tl.constexpr,
    HIDDEN_EPS: tl.constexpr,
    NORM: tl.constexpr,
    BATCH_STATS: tl.constexpr,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """BLOCK_N samples and BLOCK_C channels of the logits; `pid` counts sample x channel blocks.

    Each computes the hidden layer of its samples anew: N * h * C multiplications on weights that
    sit in L2, in exchange for a launch. `pooled` may be in parts [N, pooled_tiles, C], sums to be
    added up and divided; None for pooled_tiles says that it is [N, C].
    """
    channel_block = pid % channel_blocks
    samples = ((pid // channel_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    in_n = samples < N
    units_h = tl.arange(0, BLOCK_H)
    in_h = units_h < hidden
    own = channel_block * BLOCK_C + tl.arange(0, BLOCK_C)
    in_own = own < C

    y = tl.zeros((BLOCK_N, BLOCK_H), ACC)
    for start in range(0, C, BLOCK_C):
        rows = start + tl.arange(0, BLOCK_C)
        in_c = rows < C
        at = samples[:, None] * C + rows[None, :]
        in_nc = in_n[:, None] & in_c[None, :]
        if pooled_tiles is None:
            a = tl.load(pooled + at, mask=in_nc, other=0.0)
        else:
            a = tl.zeros((BLOCK_N, BLOCK_C), ACC)
            for tile in range(pooled_tiles):
                part = (samples[:, None] * pooled_tiles + tile) * C + rows[None, :]
                a += tl.load(pooled + part, mask=in_nc, other=0.0)
            a = a / pooled_divisor.to(ACC)
        b = tl.load(
            weight0 + units_h[None, :] * C + rows[:, None],
            mask=in_h[None, :] & in_c[:, None],
            other=0.0,
        )
        y = product(a, b, y)
    if bias0 is not None:
        y += tl.load(bias0 + units_h, mask=in_h, other=0.0).to(ACC)[None, :]
    if hidden_out is not None and channel_block == 0:
        at = samples[:, None] * hidden + units_h[None, :]
        tl.store(hidden_out + at, y, mask=in_n[:, None] & in_h[None, :])
    if HIDDEN_NORM:
        if HIDDEN_BATCH_STATS:
            mu, sigma2 = batch_statistics(y, in_n, N, ACC)
            if channel_block == 0:
                tl.store(hidden_batch_mean + units_h, mu, mask=in_h)
                tl.store(hidden_batch_var + units_h, sigma2, mask=in_h)
        else:
            mu = tl.load(hidden_mean + units_h, mask=in_h, other=0.0).to(ACC)
            sigma2 = tl.load(hidden_var + units_h, mask=in_h, other=1.0).to(ACC)
        y = normalize(y, units_h, in_h, mu, sigma2, hidden_gamma, hidden_beta, HIDDEN_EPS, ACC)
    y = tl.where(y < 0, 0.0, y)  # a ReLU that lets NaN through, as torch's does

    w = tl.load(
        weight1 + own[None, :] * hidden + units_h[:, None],
        mask=in_own[None, :] & in_h[:, None],
        other=0.0,
    )
    out = dot(tl.where(in_h[None, :], y, 0.0), w.to(ACC), tl.zeros((BLOCK_N, BLOCK_C), ACC), "ieee")
    if bias1 is not None:
        out += tl.load(bias1 + own, mask=in_own, other=0.0).to(ACC)[None, :]
    if NORM:
        if BATCH_STATS:
            mu, sigma2 = batch_statistics(out, in_n, N, ACC)
            tl.store(batch_mean + own, mu, mask=in_own)
            tl.store(batch_var + own, sigma2, mask=in_own)
        else:
            mu = tl.load(mean + own, mask=in_own, other=0.0).to(ACC)
            sigma2 = tl.load(var + own, mask=in_own, other=1.0).to(ACC)
        out = normalize(out, own, in_own, mu, sigma2, gamma, beta, EPS, ACC)
    at = samples[:, None] * C + own[None, :]
    tl.store(logits + at, out, mask=in_n[:, None] & in_own[None, :])


@triton.jit(do_not_specialize=["N", "channel_blocks"])
def _channel_mlp_kernel(
    pooled,
    weight0,
    bias0,
    weight1,
    bias1,
    hidden_gamma,
    hidden_beta,
    hidden_mean,
    hidden_var,
    gamma,
    beta,
    mean,
    var,
    logits,
    hidden_out,
    hidden_batch_mean,
    hidden_batch_var,
    batch_mean,
    batch_var,
    N,
    C,
    hidden,
    channel_blocks,
    HIDDEN_NORM: tl.constexpr,
    HIDDEN_BATCH_STATS: tl.constexpr,
    HIDDEN_EPS: tl.constexpr,
    NORM: tl.constexpr,
    BATCH_STATS: tl.constexpr,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One program: a block. Grid: sample blocks x channel blocks, flat."""
    mlp_block(
        tl.program_id(0), pooled, weight0, bias0, weight1, bias1, hidden_gamma, hidden_beta,
        hidden_mean, hidden_var, gamma, beta, mean, var, logits, hidden_out, hidden_batch_mean,
        hidden_batch_var, batch_mean, batch_var, N, C, hidden, channel_blocks, None, None,
        HIDDEN_NORM, HIDDEN_BATCH_STATS, HIDDEN_EPS, NORM, BATCH_STATS, EPS, ACC, BLOCK_N,
        BLOCK_C, BLOCK_H,
    )  # fmt: skip


def dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


@replayed
def channel_mlp_forward(
    pooled: Tensor,
    weight0: Tensor,
    bias0: Tensor | None,
    weight1: Tensor,
    bias1: Tensor | None,
    hidden_gamma: Tensor | None,
    hidden_beta: Tensor | None,
    hidden_mean: Tensor | None,
    hidden_var: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    hidden_norm: bool,
    hidden_batch_stats: bool,
    hidden_eps: float,
    norm: bool,
    batch_stats: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logits [N, C], hidden [N, h], hidden batch mean, variance [h], batch mean, variance [C]).

    All in the accumulator's type (fp32, or fp64 for fp64). `hidden` is the first layer's output, in
    front of norm and ReLU, for the backward. The variances are biased, as a norm
    applies them. A statistic that was not taken is empty.
    pooled [N, C]; weight0 [h, C]; weight1 [C, h]; the norms' vectors [h] and [C].
    """
    n, c = pooled.shape
    hidden = weight0.shape[0]
    made = {"device": pooled.device, "dtype": accumulator_dtype(pooled.dtype)}
    logits = torch.empty((n, c), **made)
    kept = torch.empty((n, hidden), **made)
    # Four tensors, not rows of one: an operator's outputs may not share storage.
    hidden_stats = [
        torch.empty(hidden if hidden_norm and hidden_batch_stats else 0, **made) for _ in range(2)
    ]
    stats = [torch.empty(c if norm and batch_stats else 0, **made) for _ in range(2)]
    statistics = (
        *(hidden_stats if hidden_norm and hidden_batch_stats else (None, None)),
        *(stats if norm and batch_stats else (None, None)),
    )
    norms = (
        dense(hidden_gamma),
        dense(hidden_beta),
        None if hidden_batch_stats else dense(hidden_mean),
        None if hidden_batch_stats else dense(hidden_var),
        dense(gamma),
        dense(beta),
        None if batch_stats else dense(mean),
        None if batch_stats else dense(var),
    )
    first, second = (weight0.contiguous(), dense(bias0)), (weight1.contiguous(), dense(bias1))
    options = {
        "HIDDEN_NORM": hidden_norm,
        "HIDDEN_BATCH_STATS": hidden_batch_stats,
        "HIDDEN_EPS": hidden_eps,
        "NORM": norm,
        "BATCH_STATS": batch_stats,
        "EPS": eps,
    }
    blocks = configs.channel_mlp_blocks(
        n, hidden, (hidden_norm and hidden_batch_stats) or (norm and batch_stats), logits.itemsize
    )
    with device_guard(pooled):
        if configs.channel_mlp_in_steps(n, c, blocks, pooled.itemsize):
            launch_steps(
                pooled.contiguous(), first, second, norms, logits, kept, statistics, options
            )
        else:
            block_n, block_c, block_h, num_warps = blocks
            channel_blocks = cdiv(c, block_c)
            launch(
                _channel_mlp_kernel,
                (cdiv(n, block_n) * channel_blocks,),
                pooled.contiguous(),
                *first,
                *second,
                *norms,
                logits,
                kept,
                *statistics,
                n,
                c,
                hidden,
                channel_blocks,
                **options,
                ACC=accumulator(pooled.dtype),
                BLOCK_N=block_n,
                BLOCK_C=block_c,
                BLOCK_H=block_h,
                num_warps=num_warps,
            )
    return logits, kept, *hidden_stats, *stats
