"""The gradient of the channel branch behind the pooling (Eq. 3), a launch a step.

First through the last norm, if there is one, by channels over the whole batch. Then the hidden
layer's gradient and the second layer's, which do not wait for each other, by tiles in one launch;
then likewise the input's and the first layer's. Only what a norm needs is held for a whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from bam_kernels.backends.triton import configs
from bam_kernels.backends.triton.channel_mlp_steps import (
    known_or_batch_statistics,
    normalize,
    product_tile,
    second_layer,
)
from bam_kernels.backends.triton.device_math import dot, narrow
from bam_kernels.backends.triton.launch import cdiv, launch, registers


@triton.jit(do_not_specialize=["N"])
def _channel_mlp_backward_norm_kernel(
    dlogits,
    hidden_in,
    weight1,
    bias1,
    hidden_gamma,
    hidden_beta,
    hidden_mean,
    hidden_var,
    gamma,
    mean,
    var,
    dout,
    dgamma,
    dbeta,
    N,
    C,
    hidden,
    HIDDEN_NORM: tl.constexpr,
    HIDDEN_BATCH_STATS: tl.constexpr,
    HIDDEN_EPS: tl.constexpr,
    BATCH_STATS: tl.constexpr,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """One program: BLOCK_C channels of the gradient in front of the last norm."""
    pid = tl.program_id(0)
    samples = tl.arange(0, BLOCK_N).to(tl.int64)
    in_n = samples < N
    own = pid * BLOCK_C + tl.arange(0, BLOCK_C)
    in_own = own < C
    out = second_layer(
        pid, hidden_in, weight1, bias1, hidden_gamma, hidden_beta, hidden_mean, hidden_var, None,
        None, samples, in_n, own, in_own, N, hidden, HIDDEN_NORM, HIDDEN_BATCH_STATS, HIDDEN_EPS,
        ACC, BLOCK_N, BLOCK_C, BLOCK_U,
    )  # fmt: skip
    mu, sigma2 = known_or_batch_statistics(out, in_n, N, own, in_own, mean, var, BATCH_STATS, ACC)
    scale = 1 / tl.sqrt(sigma2 + EPS)
    normalized = (out - mu[None, :]) * scale[None, :]
    at = samples[:, None] * C + own[None, :]
    mask = in_n[:, None] & in_own[None, :]
    grad = tl.load(dlogits + at, mask=mask, other=0.0).to(ACC)
    by_gamma = tl.sum(grad * normalized, axis=0)
    by_beta = tl.sum(grad, axis=0)
    tl.store(dgamma + own, narrow(by_gamma, dgamma.dtype.element_ty), mask=in_own)
    tl.store(dbeta + own, narrow(by_beta, dbeta.dtype.element_ty), mask=in_own)
    if BATCH_STATS:
        count = N.to(ACC)
        grad = grad - (by_beta / count)[None, :] - normalized * (by_gamma / count)[None, :]
    if gamma is not None:
        scale *= tl.load(gamma + own, mask=in_own, other=0.0).to(ACC)
    tl.store(dout + at, grad * scale[None, :], mask=mask)


@triton.jit(do_not_specialize=["N", "unit_blocks", "hidden_programs"])
def _channel_mlp_backward_second_kernel(
    dout,
    hidden_in,
    weight1,
    hidden_gamma,
    hidden_beta,
    hidden_mean,
    hidden_var,
    dactive,
    dweight1,
    dbias1,
    N,
    C,
    hidden,
    unit_blocks,
    hidden_programs,
    HIDDEN_NORM: tl.constexpr,
    HIDDEN_BATCH_STATS: tl.constexpr,
    HIDDEN_EPS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_C: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """One program: TILE_N samples of the hidden layer's gradient, behind its ReLU, or TILE_C
    channels of the second layer's; of BLOCK_U units. Grid: all of the former, then the latter."""
    pid = tl.program_id(0)
    units = (pid % unit_blocks) * BLOCK_U + tl.arange(0, BLOCK_U)
    in_h = units < hidden
    if pid < hidden_programs:
        samples = ((pid // unit_blocks) * TILE_N + tl.arange(0, TILE_N)).to(tl.int64)
        in_n = samples < N
        da = product_tile(
            dout, weight1, samples, in_n, units, in_h, C, hidden, False, ACC, TILE_N, BLOCK_U,
            TILE_K,
        )  # fmt: skip
        at = samples[:, None] * hidden + units[None, :]
        tl.store(dactive + at, da, mask=in_n[:, None] & in_h[None, :])
    if pid >= hidden_programs:
        channel_block = (pid - hidden_programs) // unit_blocks
        own = channel_block * TILE_C + tl.arange(0, TILE_C)
        in_c = own < C
        if HIDDEN_NORM:
            samples = tl.arange(0, BLOCK_N).to(tl.int64)
            in_n = samples < N
            at = samples[:, None] * hidden + units[None, :]
            y = tl.load(hidden_in + at, mask=in_n[:, None] & in_h[None, :], other=0.0)
            mu, sigma2 = known_or_batch_statistics(
                y, in_n, N, units, in_h, hidden_mean, hidden_var, HIDDEN_BATCH_STATS, ACC
            )
        dw = tl.zeros((TILE_C, BLOCK_U), ACC)
        db = tl.zeros((TILE_C,), ACC)
        for start in range(0, N, TILE_K):
            rows = (start + tl.arange(0, TILE_K)).to(tl.int64)
            in_k = rows < N
            mask_h = in_k[:, None] & in_h[None, :]
            a = tl.load(hidden_in + rows[:, None] * hidden + units[None, :], mask=mask_h, other=0.0)
            if HIDDEN_NORM:
                a = normalize(
                    a, units, in_h, mu, sigma2, hidden_gamma, hidden_beta, HIDDEN_EPS, ACC
                )
            a = tl.where(mask_h, tl.where(a < 0, 0.0, a), 0.0)
            grad = tl.load(
                dout + rows[None, :] * C + own[:, None],
                mask=in_k[None, :] & in_c[:, None],
                other=0.0,
            ).to(ACC)
            dw = dot(grad, a, dw, "ieee")
            db += tl.sum(grad, axis=1)
        at_w = own[:, None] * hidden + units[None, :]
        mask_w = in_c[:, None] & in_h[None, :]
        tl.store(dweight1 + at_w, narrow(dw, dweight1.dtype.element_ty), mask=mask_w)
        if pid % unit_blocks == 0:
            tl.store(dbias1 + own, narrow(db, dbias1.dtype.element_ty), mask=in_c)


@triton.jit
def _before_norm(
    da,
    y,
    mask,
    units,
    in_h,
    mu,
    sigma2,
    hidden_gamma,
    hidden_beta,
    HIDDEN_EPS: tl.constexpr,
    ACC: tl.constexpr,
):
    """(gradient behind the hidden norm, normalised y, 1 / std * gamma)."""
    rstd = 1 / tl.sqrt(sigma2 + HIDDEN_EPS)
    normalized = (y - mu[None, :]) * rstd[None, :]
    u = normalized
    scale = rstd
    if hidden_gamma is not None:
        weight = tl.load(hidden_gamma + units, mask=in_h, other=0.0).to(ACC)
        u = u * weight[None, :]
        scale = scale * weight
    if hidden_beta is not None:
        u += tl.load(hidden_beta + units, mask=in_h, other=0.0).to(ACC)[None, :]
    return tl.where(mask & (u > 0), da, 0.0), normalized, scale


@triton.jit
def _before_layer(grad, normalized, scale, by_gamma, by_beta, N, BATCH_STATS: tl.constexpr):
    """The gradient in front of the hidden norm, from sums over the whole batch."""
    if BATCH_STATS:
        count = N.to(grad.dtype)
        grad = grad - (by_beta / count)[None, :] - normalized * (by_gamma / count)[None, :]
    return grad * scale[None, :]


@triton.jit(do_not_specialize=["N", "unit_blocks", "weight_programs"])
def _channel_mlp_backward_first_kernel(
    dactive,
    hidden_in,
    pooled,
    weight0,
    hidden_gamma,
    hidden_beta,
    hidden_mean,
    hidden_var,
    dpooled,
    dweight0,
    dbias0,
    dhidden_gamma,
    dhidden_beta,
    N,
    C,
    hidden,
    unit_blocks,
    weight_programs,
    HIDDEN_NORM: tl.constexpr,
    HIDDEN_BATCH_STATS: tl.constexpr,
    HIDDEN_EPS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_U: tl.constexpr,
    TILE_C: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """One program: BLOCK_U units and TILE_C channels of the first layer's gradient, or BLOCK_C
    channels of the input's. Grid: all of the former, then, where it is wanted, the latter."""
    pid = tl.program_id(0)
    samples = tl.arange(0, BLOCK_N).to(tl.int64)
    in_n = samples < N
    if pid < weight_programs:
        units = (pid % unit_blocks) * BLOCK_U + tl.arange(0, BLOCK_U)
        in_h = units < hidden
        own = (pid // unit_blocks) * TILE_C + tl.arange(0, TILE_C)
        in_c = own < C
        if HIDDEN_NORM:
            mask_h = in_n[:, None] & in_h[None, :]
            at = samples[:, None] * hidden + units[None, :]
            y = tl.load(hidden_in + at, mask=mask_h, other=0.0)
            da = tl.load(dactive + at, mask=mask_h, other=0.0)
            mu, sigma2 = known_or_batch_statistics(
                y, in_n, N, units, in_h, hidden_mean, hidden_var, HIDDEN_BATCH_STATS, ACC
            )
            grad, normalized, _ = _before_norm(
                da, y, mask_h, units, in_h, mu, sigma2, hidden_gamma, hidden_beta, HIDDEN_EPS, ACC
            )
            by_gamma = tl.sum(grad * normalized, axis=0)
            by_beta = tl.sum(grad, axis=0)
            if pid < unit_blocks:
                gamma_type: tl.constexpr = dhidden_gamma.dtype.element_ty
                tl.store(dhidden_gamma + units, narrow(by_gamma, gamma_type), mask=in_h)
                tl.store(dhidden_beta + units, narrow(by_beta, gamma_type), mask=in_h)
        dw = tl.zeros((BLOCK_U, TILE_C), ACC)
        db = tl.zeros((BLOCK_U,), ACC)
        for start in range(0, N, TILE_K):
            rows = (start + tl.arange(0, TILE_K)).to(tl.int64)
            in_k = rows < N
            mask_k = in_k[:, None] & in_h[None, :]
            at_k = rows[:, None] * hidden + units[None, :]
            y_k = tl.load(hidden_in + at_k, mask=mask_k, other=0.0)
            da_k = tl.load(dactive + at_k, mask=mask_k, other=0.0)
            if HIDDEN_NORM:
                g, normalized_k, scale_k = _before_norm(
                    da_k, y_k, mask_k, units, in_h, mu, sigma2, hidden_gamma, hidden_beta,
                    HIDDEN_EPS, ACC,
                )  # fmt: skip
                g = _before_layer(
                    g, normalized_k, scale_k, by_gamma, by_beta, N, HIDDEN_BATCH_STATS
                )
                g = tl.where(mask_k, g, 0.0)
            else:
                g = tl.where(mask_k & (y_k > 0), da_k, 0.0)
            p = tl.load(
                pooled + rows[:, None] * C + own[None, :],
                mask=in_k[:, None] & in_c[None, :],
                other=0.0,
            ).to(ACC)
            dw = dot(tl.trans(g), p, dw, "ieee")
            db += tl.sum(g, axis=0)
        at_w = units[:, None] * C + own[None, :]
        mask_w = in_h[:, None] & in_c[None, :]
        tl.store(dweight0 + at_w, narrow(dw, dweight0.dtype.element_ty), mask=mask_w)
        if pid < unit_blocks:
            tl.store(dbias0 + units, narrow(db, dbias0.dtype.element_ty), mask=in_h)
    if pid >= weight_programs:
        if dpooled is not None:
            mine = (pid - weight_programs) * BLOCK_C + tl.arange(0, BLOCK_C)
            in_mine = mine < C
            dp = tl.zeros((BLOCK_N, BLOCK_C), ACC)
            for first in range(0, hidden, BLOCK_U):
                each = first + tl.arange(0, BLOCK_U)
                in_each = each < hidden
                mask_e = in_n[:, None] & in_each[None, :]
                at_e = samples[:, None] * hidden + each[None, :]
                y_e = tl.load(hidden_in + at_e, mask=mask_e, other=0.0)
                da_e = tl.load(dactive + at_e, mask=mask_e, other=0.0)
                if HIDDEN_NORM:
                    mu_e, sigma2_e = known_or_batch_statistics(
                        y_e, in_n, N, each, in_each, hidden_mean, hidden_var, HIDDEN_BATCH_STATS,
                        ACC,
                    )  # fmt: skip
                    g_e, normalized_e, scale_e = _before_norm(
                        da_e, y_e, mask_e, each, in_each, mu_e, sigma2_e, hidden_gamma, hidden_beta,
                        HIDDEN_EPS, ACC,
                    )  # fmt: skip
                    by_gamma_e = tl.sum(g_e * normalized_e, axis=0)
                    by_beta_e = tl.sum(g_e, axis=0)
                    g_e = _before_layer(
                        g_e, normalized_e, scale_e, by_gamma_e, by_beta_e, N, HIDDEN_BATCH_STATS
                    )
                    g_e = tl.where(mask_e, g_e, 0.0)
                else:
                    g_e = tl.where(mask_e & (y_e > 0), da_e, 0.0)
                w = tl.load(
                    weight0 + each[:, None] * C + mine[None, :],
                    mask=in_each[:, None] & in_mine[None, :],
                    other=0.0,
                ).to(ACC)
                dp = dot(g_e, w, dp, "ieee")
            at_p = samples[:, None] * C + mine[None, :]
            tl.store(
                dpooled + at_p,
                narrow(dp, dpooled.dtype.element_ty),
                mask=in_n[:, None] & in_mine[None, :],
            )


def launch_backward_steps(
    dlogits: Tensor,
    kept: Tensor,
    pooled: Tensor,
    weight0: Tensor,
    second: Sequence[Tensor | None],
    hidden_vectors: Sequence[Tensor | None],
    last_vectors: Sequence[Tensor | None],
    dfirst: Sequence[Tensor | None],
    dsecond: Sequence[Tensor],
    dlast: Sequence[Tensor] | None,
    options: dict[str, object],
    last_options: dict[str, object],
) -> None:
    """All launches: two, and one for a last norm.

    Args:
        dlogits: [N, C], dense, as are all others.
        kept: [N, h], the hidden layer.
        pooled: [N, C].
        weight0: of the first layer.
        second: the second layer's weight and bias.
        hidden_vectors: gamma, beta, mean and variance of the hidden norm.
        last_vectors: gamma, mean and variance of the last.
        dfirst: to be written: gradients of pooled or None, of weight0 and bias0, and of the hidden
            norm's gamma and beta or None.
        dsecond: of weight1 and bias1.
        dlast: of the last norm's gamma and beta; None without a norm.
        options: ACC and the constants by which the hidden norm is applied.
        last_options: the same of the last norm.
    """
    n, c = pooled.shape
    hidden = kept.shape[1]
    block_n, block_c, block_u, num_warps = configs.channel_mlp_columns(n)
    columns = {
        "BLOCK_N": block_n,
        "BLOCK_U": block_u,
        "num_warps": num_warps,
        "num_stages": 1,
        **registers(255, num_warps),
    }
    dout = dlogits
    if dlast is not None:
        dout = torch.empty((n, c), dtype=kept.dtype, device=kept.device)
        launch(
            _channel_mlp_backward_norm_kernel,
            (cdiv(c, block_c),),
            dlogits,
            kept,
            *second,
            *hidden_vectors,
            *last_vectors,
            dout,
            *dlast,
            n,
            c,
            hidden,
            BLOCK_C=block_c,
            **options,
            **last_options,
            **columns,
        )
    tile_n, tile_c, tile_k = configs.channel_mlp_gradient_tiles(kept.itemsize)
    unit_blocks = cdiv(hidden, block_u)
    hidden_programs = cdiv(n, tile_n) * unit_blocks
    weight_programs = cdiv(c, tile_c) * unit_blocks
    dactive = torch.empty_like(kept)
    launch(
        _channel_mlp_backward_second_kernel,
        (hidden_programs + weight_programs,),
        dout,
        kept,
        second[0],
        *hidden_vectors,
        dactive,
        *dsecond,
        n,
        c,
        hidden,
        unit_blocks,
        hidden_programs,
        TILE_N=tile_n,
        TILE_C=tile_c,
        TILE_K=tile_k,
        **options,
        **columns,
    )
    launch(
        _channel_mlp_backward_first_kernel,
        (weight_programs + (0 if dfirst[0] is None else cdiv(c, block_c)),),
        dactive,
        kept,
        pooled,
        weight0,
        *hidden_vectors,
        *dfirst,
        n,
        c,
        hidden,
        unit_blocks,
        weight_programs,
        BLOCK_C=block_c,
        TILE_C=tile_c,
        TILE_K=tile_k,
        **options,
        **columns,
    )
