"""The channel branch behind the pooling (Eq. 3) in two launches, for batches and widths that one
would be slow on or could not hold.

The first makes the hidden layer, by tiles of samples and units. A program of the second owns a few
channels over the whole batch, which the statistics of both norms need, and takes the hidden layer a
few units at a time: what it holds grows with the batch and not with the hidden layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from bam_kernels.backends.triton import configs
from bam_kernels.backends.triton.device_math import dot, product
from bam_kernels.backends.triton.launch import accumulator, cdiv, launch, registers, stages


@triton.jit
def batch_statistics(value, in_n, N, ACC: tl.constexpr):
    """Mean and biased variance over axis 0 of value [BLOCK_N, columns], as a batch norm applies."""
    count = N.to(ACC)
    mean = tl.sum(tl.where(in_n[:, None], value, 0.0), axis=0) / count
    centred = tl.where(in_n[:, None], value - mean[None, :], 0.0)
    return mean, tl.sum(centred * centred, axis=0) / count


@triton.jit
def known_or_batch_statistics(
    value, in_n, N, at, in_at, mean, var, BATCH_STATS: tl.constexpr, ACC: tl.constexpr
):
    """Mean and variance of the columns `at`: of the value itself, the whole batch, or known."""
    if BATCH_STATS:
        mu, sigma2 = batch_statistics(value, in_n, N, ACC)
    else:
        mu = tl.load(mean + at, mask=in_at, other=0.0).to(ACC)
        sigma2 = tl.load(var + at, mask=in_at, other=1.0).to(ACC)
    return mu, sigma2


@triton.jit
def normalize(value, at, in_at, mean, var, gamma, beta, EPS: tl.constexpr, ACC: tl.constexpr):
    value = (value - mean[None, :]) * (1 / tl.sqrt(var + EPS))[None, :]
    if gamma is not None:
        value *= tl.load(gamma + at, mask=in_at, other=0.0).to(ACC)[None, :]
    if beta is not None:
        value += tl.load(beta + at, mask=in_at, other=0.0).to(ACC)[None, :]
    return value


@triton.jit
def product_tile(
    source,
    weight,
    samples,
    in_n,
    units,
    in_h,
    C,
    hidden,
    UNITS_FIRST: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[BLOCK_N, BLOCK_U] of source [N, C] @ weight, [C, h] or, with UNITS_FIRST, [h, C]^T."""
    y = tl.zeros((BLOCK_N, BLOCK_U), ACC)
    for start in range(0, C, BLOCK_K):
        rows = start + tl.arange(0, BLOCK_K)
        in_c = rows < C
        a = tl.load(
            source + samples[:, None] * C + rows[None, :],
            mask=in_n[:, None] & in_c[None, :],
            other=0.0,
        )
        if UNITS_FIRST:
            at = units[None, :] * C + rows[:, None]
        else:
            at = rows[:, None] * hidden + units[None, :]
        b = tl.load(weight + at, mask=in_h[None, :] & in_c[:, None], other=0.0)
        y = product(a, b, y)
    return y


@triton.jit(do_not_specialize=["N", "unit_blocks"])
def _channel_mlp_hidden_kernel(
    pooled,
    weight0,
    bias0,
    hidden_out,
    N,
    C,
    hidden,
    unit_blocks,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: a tile of the hidden layer. Grid: sample blocks x unit blocks, flat."""
    pid = tl.program_id(0)
    samples = ((pid // unit_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    in_n = samples < N
    units = (pid % unit_blocks) * BLOCK_U + tl.arange(0, BLOCK_U)
    in_h = units < hidden
    y = product_tile(
        pooled, weight0, samples, in_n, units, in_h, C, hidden, True, ACC, BLOCK_N, BLOCK_U,
        BLOCK_K,
    )  # fmt: skip
    if bias0 is not None:
        y += tl.load(bias0 + units, mask=in_h, other=0.0).to(ACC)[None, :]
    at = samples[:, None] * hidden + units[None, :]
    tl.store(hidden_out + at, y, mask=in_n[:, None] & in_h[None, :])


@triton.jit
def second_layer(
    pid,
    hidden_in,
    weight1,
    bias1,
    hidden_gamma,
    hidden_beta,
    hidden_mean,
    hidden_var,
    hidden_batch_mean,
    hidden_batch_var,
    samples,
    in_n,
    own,
    in_own,
    N,
    hidden,
    HIDDEN_NORM: tl.constexpr,
    HIDDEN_BATCH_STATS: tl.constexpr,
    HIDDEN_EPS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """[BLOCK_N, BLOCK_C] of the second layer's output, of the whole batch, in front of its norm.

    Program 0 leaves the hidden layer's statistics where there is a place for them.
    """
    out = tl.zeros((BLOCK_N, BLOCK_C), ACC)
    for start in range(0, hidden, BLOCK_U):
        units = start + tl.arange(0, BLOCK_U)
        in_h = units < hidden
        mask_h = in_n[:, None] & in_h[None, :]
        y = tl.load(hidden_in + samples[:, None] * hidden + units[None, :], mask=mask_h, other=0.0)
        if HIDDEN_NORM:
            mu, sigma2 = known_or_batch_statistics(
                y, in_n, N, units, in_h, hidden_mean, hidden_var, HIDDEN_BATCH_STATS, ACC
            )
            if hidden_batch_mean is not None:
                if pid == 0:
                    tl.store(hidden_batch_mean + units, mu, mask=in_h)
                    tl.store(hidden_batch_var + units, sigma2, mask=in_h)
            y = normalize(y, units, in_h, mu, sigma2, hidden_gamma, hidden_beta, HIDDEN_EPS, ACC)
        y = tl.where(y < 0, 0.0, y)  # a ReLU that lets NaN through, as torch's does
        w = tl.load(
            weight1 + own[None, :] * hidden + units[:, None],
            mask=in_own[None, :] & in_h[:, None],
            other=0.0,
        )
        out = dot(tl.where(mask_h, y, 0.0), w.to(ACC), out, "ieee")
    if bias1 is not None:
        out += tl.load(bias1 + own, mask=in_own, other=0.0).to(ACC)[None, :]
    return out


@triton.jit(do_not_specialize=["N"])
def _channel_mlp_logits_kernel(
    hidden_in,
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
    hidden_batch_mean,
    hidden_batch_var,
    batch_mean,
    batch_var,
    N,
    C,
    hidden,
    HIDDEN_NORM: tl.constexpr,
    HIDDEN_BATCH_STATS: tl.constexpr,
    HIDDEN_EPS: tl.constexpr,
    NORM: tl.constexpr,
    BATCH_STATS: tl.constexpr,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """One program: BLOCK_C channels of the logits, of the whole batch."""
    pid = tl.program_id(0)
    samples = tl.arange(0, BLOCK_N).to(tl.int64)
    in_n = samples < N
    own = pid * BLOCK_C + tl.arange(0, BLOCK_C)
    in_own = own < C
    out = second_layer(
        pid, hidden_in, weight1, bias1, hidden_gamma, hidden_beta, hidden_mean, hidden_var,
        hidden_batch_mean, hidden_batch_var, samples, in_n, own, in_own, N, hidden, HIDDEN_NORM,
        HIDDEN_BATCH_STATS, HIDDEN_EPS, ACC, BLOCK_N, BLOCK_C, BLOCK_U,
    )  # fmt: skip
    if NORM:
        mu, sigma2 = known_or_batch_statistics(
            out, in_n, N, own, in_own, mean, var, BATCH_STATS, ACC
        )
        if BATCH_STATS:
            tl.store(batch_mean + own, mu, mask=in_own)
            tl.store(batch_var + own, sigma2, mask=in_own)
        out = normalize(out, own, in_own, mu, sigma2, gamma, beta, EPS, ACC)
    at = samples[:, None] * C + own[None, :]
    tl.store(logits + at, out, mask=in_n[:, None] & in_own[None, :])


def launch_steps(
    pooled: Tensor,
    first: Sequence[Tensor | None],
    second: Sequence[Tensor | None],
    norms: Sequence[Tensor | None],
    logits: Tensor,
    kept: Tensor,
    statistics: Sequence[Tensor | None],
    options: dict[str, object],
) -> None:
    """Both launches.

    Args:
        pooled: [N, C], dense, as are all others.
        first: the first layer's weight and bias.
        second: the second layer's.
        norms: gamma, beta, mean and variance of the hidden norm, and of the last.
        logits: [N, C], to be written.
        kept: [N, h], the hidden layer, to be written.
        statistics: mean and variance of the hidden norm and of the last, to be written; None where
            they are not taken.
        options: the constants by which norms are applied.
    """
    n, c = pooled.shape
    hidden = kept.shape[1]
    acc = accumulator(pooled.dtype)
    half = pooled.itemsize == 2 and first[0].dtype == pooled.dtype
    tile = configs.channel_mlp_tile(half)
    unit_blocks = cdiv(hidden, tile.block_u)
    launch(
        _channel_mlp_hidden_kernel,
        (cdiv(n, tile.block_n) * unit_blocks,),
        pooled,
        *first,
        kept,
        n,
        c,
        hidden,
        unit_blocks,
        ACC=acc,
        BLOCK_N=tile.block_n,
        BLOCK_U=tile.block_u,
        BLOCK_K=tile.block_k,
        num_warps=tile.num_warps,
        num_stages=stages(tile.num_stages),
    )
    block_n, block_c, block_u, num_warps = configs.channel_mlp_columns(n)
    launch(
        _channel_mlp_logits_kernel,
        (cdiv(c, block_c),),
        kept,
        *second,
        *norms,
        logits,
        *statistics,
        n,
        c,
        hidden,
        **options,
        ACC=acc,
        BLOCK_N=block_n,
        BLOCK_C=block_c,
        BLOCK_U=block_u,
        num_warps=num_warps,
        num_stages=1,
        **registers(255, num_warps),
    )
