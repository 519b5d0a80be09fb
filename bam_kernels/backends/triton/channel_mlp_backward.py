"""The gradient of the channel branch behind the pooling (Eq. 3), in two launches.

Large batches and wide hidden layers take those of `channel_mlp_backward_steps`. Of the two here the
first owns blocks of the logits' channels: the last norm, the second layer, and a partial of the
hidden layer's gradient. The second owns blocks of the input's channels, adds those partials in
order, and makes the rest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bam_kernels.backends.triton import configs
from bam_kernels.backends.triton.channel_mlp import dense
from bam_kernels.backends.triton.channel_mlp_backward_steps import launch_backward_steps
from bam_kernels.backends.triton.channel_mlp_steps import batch_statistics
from bam_kernels.backends.triton.device_math import dot, narrow
from bam_kernels.backends.triton.launch import (
    accumulator,
    accumulator_dtype,
    cdiv,
    device_guard,
    launch,
    registers,
)
from bam_kernels.backends.triton.replay import replayed


@triton.jit
def _normalized(
    value, in_n, N, at, in_at, mean, var, BATCH_STATS: tl.constexpr, EPS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """((value - mean) / std, 1 / std), with the statistics of value itself or with known ones."""
    if BATCH_STATS:
        mu, sigma2 = batch_statistics(value, in_n, N, ACC)
    else:
        mu = tl.load(mean + at, mask=in_at, other=0.0).to(ACC)
        sigma2 = tl.load(var + at, mask=in_at, other=1.0).to(ACC)
    rstd = 1 / tl.sqrt(sigma2 + EPS)
    return (value - mu[None, :]) * rstd[None, :], rstd


@triton.jit
def _hidden(
    y, in_n, N, units, in_h, gamma, beta, mean, var, NORM: tl.constexpr,
    BATCH_STATS: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(normalised y, 1 / std * gamma, input of the ReLU) of the hidden layer."""
    normalized = y
    scale = tl.sum(y, axis=0) * 0 + 1
    u = y
    if NORM:
        normalized, scale = _normalized(y, in_n, N, units, in_h, mean, var, BATCH_STATS, EPS, ACC)
        u = normalized
        if gamma is not None:
            weight = tl.load(gamma + units, mask=in_h, other=0.0).to(ACC)
            scale *= weight
            u *= weight[None, :]
        if beta is not None:
            u += tl.load(beta + units, mask=in_h, other=0.0).to(ACC)[None, :]
    return normalized, scale, u


@triton.jit
def _through_norm(grad, normalized, scale, N, BATCH_STATS: tl.constexpr, ACC: tl.constexpr):
    """(gradient in front, gamma's, beta's) from the one behind a norm of this block of samples."""
    dgamma = tl.sum(grad * normalized, axis=0)
    dbeta = tl.sum(grad, axis=0)
    if BATCH_STATS:
        count = N.to(ACC)
        grad = grad - (dbeta / count)[None, :] - normalized * (dgamma / count)[None, :]
    return grad * scale[None, :], dgamma, dbeta


@triton.jit(do_not_specialize=["N"])
def _channel_mlp_backward_out_kernel(
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
    dweight1,
    dbias1,
    dgamma,
    dbeta,
    dactive,
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
    LOOP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One program: BLOCK_C channels of the logits, over all samples; dactive [blocks, N, h]."""
    pid = tl.program_id(0)
    own = pid * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = own < C
    units = tl.arange(0, BLOCK_H)
    in_h = units < hidden
    at_w = own[:, None] * hidden + units[None, :]
    w = tl.load(weight1 + at_w, mask=in_c[:, None] & in_h[None, :], other=0.0).to(ACC)
    dw = tl.zeros((BLOCK_C, BLOCK_H), ACC)
    db = tl.zeros((BLOCK_C,), ACC)
    total_gamma = tl.zeros((BLOCK_C,), ACC)
    total_beta = tl.zeros((BLOCK_C,), ACC)
    for start in range(0, N if LOOP else 1, BLOCK_N):
        samples = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        in_n = samples < N
        at_h = samples[:, None] * hidden + units[None, :]
        mask_h = in_n[:, None] & in_h[None, :]
        y = tl.load(hidden_in + at_h, mask=mask_h, other=0.0)
        _, _, u = _hidden(
            y, in_n, N, units, in_h, hidden_gamma, hidden_beta, hidden_mean, hidden_var,
            HIDDEN_NORM, HIDDEN_BATCH_STATS, HIDDEN_EPS, ACC,
        )  # fmt: skip
        active = tl.where(mask_h, tl.where(u < 0, 0.0, u), 0.0)
        mask_c = in_n[:, None] & in_c[None, :]
        at_c = samples[:, None] * C + own[None, :]
        grad = tl.load(dlogits + at_c, mask=mask_c, other=0.0).to(ACC)
        if NORM:
            out = dot(active, tl.trans(w), tl.zeros((BLOCK_N, BLOCK_C), ACC), "ieee")
            if bias1 is not None:
                out += tl.load(bias1 + own, mask=in_c, other=0.0).to(ACC)[None, :]
            normalized, scale = _normalized(
                out, in_n, N, own, in_c, mean, var, BATCH_STATS, EPS, ACC
            )
            if gamma is not None:
                scale *= tl.load(gamma + own, mask=in_c, other=0.0).to(ACC)
            grad, by_gamma, by_beta = _through_norm(grad, normalized, scale, N, BATCH_STATS, ACC)
            grad = tl.where(mask_c, grad, 0.0)
            total_gamma += by_gamma
            total_beta += by_beta
        dw = dot(tl.trans(grad), active, dw, "ieee")
        db += tl.sum(grad, axis=0)
        da = dot(grad, w, tl.zeros((BLOCK_N, BLOCK_H), ACC), "ieee")
        tl.store(dactive + pid.to(tl.int64) * N * hidden + at_h, da, mask=mask_h)
    tl.store(
        dweight1 + at_w, narrow(dw, dweight1.dtype.element_ty), mask=in_c[:, None] & in_h[None, :]
    )
    tl.store(dbias1 + own, narrow(db, dbias1.dtype.element_ty), mask=in_c)
    if NORM:
        tl.store(dgamma + own, narrow(total_gamma, dgamma.dtype.element_ty), mask=in_c)
        tl.store(dbeta + own, narrow(total_beta, dbeta.dtype.element_ty), mask=in_c)


@triton.jit(do_not_specialize=["N", "blocks"])
def _channel_mlp_backward_in_kernel(
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
    blocks,
    C,
    hidden,
    HIDDEN_NORM: tl.constexpr,
    HIDDEN_BATCH_STATS: tl.constexpr,
    HIDDEN_EPS: tl.constexpr,
    ACC: tl.constexpr,
    LOOP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One program: BLOCK_C channels of the input, over all samples; program 0 has the vectors."""
    pid = tl.program_id(0)
    own = pid * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = own < C
    units = tl.arange(0, BLOCK_H)
    in_h = units < hidden
    at_w = units[:, None] * C + own[None, :]
    mask_w = in_h[:, None] & in_c[None, :]
    w = tl.load(weight0 + at_w, mask=mask_w, other=0.0).to(ACC)
    dw = tl.zeros((BLOCK_H, BLOCK_C), ACC)
    db = tl.zeros((BLOCK_H,), ACC)
    total_gamma = tl.zeros((BLOCK_H,), ACC)
    total_beta = tl.zeros((BLOCK_H,), ACC)
    for start in range(0, N if LOOP else 1, BLOCK_N):
        samples = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        in_n = samples < N
        at_h = samples[:, None] * hidden + units[None, :]
        mask_h = in_n[:, None] & in_h[None, :]
        da = tl.zeros((BLOCK_N, BLOCK_H), ACC)
        for block in range(blocks):
            da += tl.load(dactive + block * N * hidden + at_h, mask=mask_h, other=0.0)
        y = tl.load(hidden_in + at_h, mask=mask_h, other=0.0)
        normalized, scale, u = _hidden(
            y, in_n, N, units, in_h, hidden_gamma, hidden_beta, hidden_mean, hidden_var,
            HIDDEN_NORM, HIDDEN_BATCH_STATS, HIDDEN_EPS, ACC,
        )  # fmt: skip
        grad = tl.where(mask_h & (u > 0), da, 0.0)
        if HIDDEN_NORM:
            grad, by_gamma, by_beta = _through_norm(
                grad, normalized, scale, N, HIDDEN_BATCH_STATS, ACC
            )
            grad = tl.where(mask_h, grad, 0.0)
            total_gamma += by_gamma
            total_beta += by_beta
        at_c = samples[:, None] * C + own[None, :]
        mask_c = in_n[:, None] & in_c[None, :]
        a = tl.load(pooled + at_c, mask=mask_c, other=0.0).to(ACC)
        dw = dot(tl.trans(grad), a, dw, "ieee")
        db += tl.sum(grad, axis=0)
        if dpooled is not None:
            dp = dot(grad, w, tl.zeros((BLOCK_N, BLOCK_C), ACC), "ieee")
            tl.store(dpooled + at_c, narrow(dp, dpooled.dtype.element_ty), mask=mask_c)
    tl.store(dweight0 + at_w, narrow(dw, dweight0.dtype.element_ty), mask=mask_w)
    if pid == 0:
        tl.store(dbias0 + units, narrow(db, dbias0.dtype.element_ty), mask=in_h)
        if HIDDEN_NORM:
            at = units
            gamma_type: tl.constexpr = dhidden_gamma.dtype.element_ty
            tl.store(dhidden_gamma + at, narrow(total_gamma, gamma_type), mask=in_h)
            tl.store(dhidden_beta + at, narrow(total_beta, gamma_type), mask=in_h)


@replayed
def channel_mlp_backward(
    dlogits: Tensor,
    kept: Tensor,
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
    mean: Tensor | None,
    var: Tensor | None,
    hidden_norm: bool,
    hidden_batch_stats: bool,
    hidden_eps: float,
    norm: bool,
    batch_stats: bool,
    eps: float,
    need_pooled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of pooled, weight0, bias0, weight1, bias1, hidden gamma and beta, gamma, beta.

    dlogits [N, C]; kept [N, h] from the forward. Each in the dtype of what it belongs to; a bias's
    gradient is there whether it exists or not, in its weight's dtype; a norm that does not exist
    has empty ones, and one without gamma and beta has them in its weight's dtype.
    """
    n, c = pooled.shape
    hidden = weight0.shape[0]
    wide = accumulator_dtype(pooled.dtype)
    found = configs.channel_mlp_blocks(
        n,
        hidden,
        (hidden_norm and hidden_batch_stats) or (norm and batch_stats),
        wide.itemsize,
        backward=True,
    )
    block_n, block_c, block_h, num_warps = found
    dpooled = pooled.new_empty((n, c) if need_pooled else 0)
    dweight0, dbias0 = weight0.new_empty((hidden, c)), weight0.new_empty(hidden)
    dweight1, dbias1 = weight1.new_empty((c, hidden)), weight1.new_empty(c)
    like_hidden = weight0 if hidden_gamma is None else hidden_gamma
    like = weight1 if gamma is None else gamma
    dhidden_gamma, dhidden_beta = (
        like_hidden.new_empty(hidden if hidden_norm else 0) for _ in range(2)
    )
    dgamma, dbeta = (like.new_empty(c if norm else 0) for _ in range(2))
    hidden_vectors = (
        dense(hidden_gamma),
        dense(hidden_beta),
        None if hidden_batch_stats else dense(hidden_mean),
        None if hidden_batch_stats else dense(hidden_var),
    )
    vectors = (
        dense(gamma),
        None if batch_stats else dense(mean),
        None if batch_stats else dense(var),
    )
    dhidden = (dhidden_gamma, dhidden_beta) if hidden_norm else (None, None)
    options = {
        "HIDDEN_NORM": hidden_norm,
        "HIDDEN_BATCH_STATS": hidden_batch_stats,
        "HIDDEN_EPS": hidden_eps,
        "ACC": accumulator(pooled.dtype),
    }
    result = (
        dpooled, dweight0, dbias0, dweight1, dbias1, dhidden_gamma, dhidden_beta, dgamma, dbeta,
    )  # fmt: skip
    if configs.channel_mlp_in_steps(n, c, found, pooled.itemsize, backward=True):
        with device_guard(pooled):
            launch_backward_steps(
                dlogits.contiguous(),
                kept,
                pooled.contiguous(),
                weight0.contiguous(),
                (weight1.contiguous(), dense(bias1)),
                hidden_vectors,
                vectors,
                (dpooled if need_pooled else None, dweight0, dbias0, *dhidden),
                (dweight1, dbias1),
                (dgamma, dbeta) if norm else None,
                options,
                {"BATCH_STATS": batch_stats, "EPS": eps},
            )
        return result
    blocks = cdiv(c, block_c)
    dactive = torch.empty((blocks, n, hidden), dtype=wide, device=pooled.device)
    constants = {
        **options,
        "LOOP": n > block_n,
        "BLOCK_N": block_n,
        "BLOCK_C": block_c,
        "BLOCK_H": block_h,
        "num_warps": num_warps,
        "num_stages": 1,  # nothing to hide: pipelining these short loops only costs registers
        # One program a multiprocessor or less: no occupancy to save registers for.
        **registers(255, num_warps),
    }
    with device_guard(pooled):
        launch(
            _channel_mlp_backward_out_kernel,
            (blocks,),
            dlogits.contiguous(),
            kept,
            weight1.contiguous(),
            dense(bias1) if norm else None,
            *hidden_vectors,
            *vectors,
            dweight1,
            dbias1,
            dgamma if norm else None,
            dbeta if norm else None,
            dactive,
            n,
            c,
            hidden,
            NORM=norm,
            BATCH_STATS=batch_stats,
            EPS=eps,
            **constants,
        )
        launch(
            _channel_mlp_backward_in_kernel,
            (blocks,),
            dactive,
            kept,
            pooled.contiguous(),
            weight0.contiguous(),
            *hidden_vectors,
            dpooled if need_pooled else None,
            dweight0,
            dbias0,
            *dhidden,
            n,
            blocks,
            c,
            hidden,
            **constants,
        )
    return result
