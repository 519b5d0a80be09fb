"""The gradient of one dilated convolution of the spatial branch, in one launch.

It applies the gradient of the batch norm behind it as it loads, makes the gradient of its input
and, in other programs of the grid, of its weight, and leaves the two sums that the gradient of the
batch norm in front of it needs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bam_kernels.backends.triton.device_math import dot, narrow
from bam_kernels.backends.triton.launch import conv_precision, launch
from bam_kernels.backends.triton.spatial_conv import load_taps, norm_arguments
from bam_kernels.backends.triton.spatial_layout import Map, Norm, Partials
from bam_kernels.backends.triton.spatial_math import (
    affine,
    merge_sums,
    store_map,
    store_sums,
    tap_mask,
    tap_steps,
    taps,
    tile_coordinates,
    tile_offsets,
    tile_positions,
    tile_start,
)


@triton.jit
def sums_of_norm(
    sums, sums_count, dnorm, units, in_h, hidden, writes, ACC: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """A batch norm's two sums; one program leaves them as the gradients of gamma and beta."""
    beta, gamma = merge_sums(
        sums, 0, sums_count, sums_count, units, in_h, hidden, ACC, BLOCK_H, BLOCK_T
    )
    if writes:
        tl.store(dnorm + units, gamma, mask=in_h)
        tl.store(dnorm + hidden + units, beta, mask=in_h)
    return beta, gamma


@triton.jit
def _gradient_vectors(
    sums,
    sums_count,
    dnorm,
    mean,
    variance,
    gamma,
    units,
    in_h,
    hidden,
    writes,
    total,
    EPS: tl.constexpr,
    BATCH_STATS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """(mean, 1 / std, scale, mean gradient, mean product) [BLOCK_H], for `through_norm`."""
    mu, rstd, scale, _ = affine(mean, variance, gamma, None, units, in_h, EPS, ACC, BLOCK_H)
    mean_grad = tl.zeros((BLOCK_H,), ACC)
    mean_product = mean_grad
    if sums is not None:
        if BATCH_STATS:
            dbeta, dgamma = sums_of_norm(
                sums, sums_count, dnorm, units, in_h, hidden, writes, ACC, BLOCK_H, BLOCK_T
            )
            mean_grad = dbeta / total.to(ACC)
            mean_product = dgamma / total.to(ACC)
        elif writes:
            sums_of_norm(sums, sums_count, dnorm, units, in_h, hidden, True, ACC, BLOCK_H, BLOCK_T)
    return mu, rstd, scale, mean_grad, mean_product


@triton.jit
def load_gradient(
    du, z, at, mask, mu, rstd, scale, mean_grad, mean_product, NORM: tl.constexpr,
    BATCH_STATS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradient in front of a batch norm, from the one behind it; 0 outside of the mask.

    In the maps' type where there is no norm, else in the accumulator's.
    """
    grad = tl.load(du + at, mask=mask, other=0.0)
    if NORM:
        grad = grad.to(ACC)
        if BATCH_STATS:
            centred = (tl.load(z + at, mask=mask, other=0.0).to(ACC) - mu[:, None]) * rstd[:, None]
            grad = grad - mean_grad[:, None] - centred * mean_product[:, None]
        grad = tl.where(mask, grad * scale[:, None], 0.0)
    return grad


@triton.jit
def _conv_input_gradient(
    pid,
    du,
    z,
    sums,
    sums_count,
    dnorm,
    mean,
    variance,
    gamma,
    weight,
    source,
    source_mean,
    source_variance,
    source_gamma,
    source_beta,
    dsource,
    source_sums,
    H,
    W,
    positions,
    total,
    count,
    hidden,
    DILATION: tl.constexpr,
    EPS: tl.constexpr,
    SOURCE_EPS: tl.constexpr,
    BATCH_STATS: tl.constexpr,
    TURNED: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TAPS: tl.constexpr,
    USED: tl.constexpr,
    WRAPS: tl.constexpr,
):
    """One tile of the gradient behind the norm of the convolution's input, masked by its ReLU."""
    first, own, in_p, _ = tile_positions(pid, total, BLOCK_P)
    row, column = tile_coordinates(first, own, positions, W, WRAPS)
    units = tl.arange(0, BLOCK_H)
    in_h = units < hidden
    DTYPE: tl.constexpr = du.dtype.element_ty
    NORM: tl.constexpr = mean is not None
    du += tile_start(first, hidden)
    if z is not None:
        z += tile_start(first, hidden)
    side = tl.arange(0, TAPS * BLOCK_K)
    lane = side // BLOCK_K
    acc = tl.zeros((BLOCK_H, BLOCK_P), ACC)
    for k in tl.static_range(0, BLOCK_H, BLOCK_K):
        outs = k + side % BLOCK_K
        in_k = (outs < hidden) & (lane < USED)
        mu, rstd, scale, mean_grad, mean_product = _gradient_vectors(
            sums, sums_count, dnorm, mean, variance, gamma, outs, in_k, hidden, pid == 0, total,
            EPS, BATCH_STATS, ACC, TAPS * BLOCK_K, BLOCK_T,
        )  # fmt: skip
        # The transposed weight, as it lies: outputs (a dot's reduction) by inputs.
        at_w = (lane * hidden * hidden + outs * hidden)[:, None] + units[None, :]
        in_w = in_k[:, None] & in_h[None, :]
        for step in range(tap_steps(hidden, USED, NORM, DTYPE)):
            down, right = taps(step, lane, USED, -DILATION)
            mask = tap_mask(row, column, down, right, H, W) & in_k[:, None] & in_p[None, :]
            at = tile_offsets(outs, own, hidden) + ((down * W + right) * hidden)[:, None]
            grad = load_gradient(
                du, z, at, mask, mu, rstd, scale, mean_grad, mean_product, NORM, BATCH_STATS, ACC
            )
            w = tl.load(weight + step * USED * hidden * hidden + at_w, mask=in_w, other=0.0)
            acc = dot(tl.trans(w), narrow(grad, DTYPE), acc, PRECISION)
    mask = in_h[:, None] & in_p[None, :]
    at = tile_offsets(units, own, hidden)
    value = tl.load(source + tile_start(first, hidden) + at, mask=mask, other=0.0).to(ACC)
    source_mu, source_rstd, source_scale, source_shift = affine(
        source_mean, source_variance, source_gamma, source_beta, units, in_h, SOURCE_EPS, ACC,
        BLOCK_H,
    )  # fmt: skip
    u = (value - source_mu[:, None]) * source_scale[:, None] + source_shift[:, None]
    through = narrow(tl.where((u > 0) & mask, acc, 0.0), DTYPE)
    store_map(dsource, through, first, own, units, mask, positions, hidden, TURNED)
    if source_sums is not None:
        behind = through.to(ACC)
        centred = (value - source_mu[:, None]) * source_rstd[:, None]
        product = tl.where(mask, behind * centred, 0.0)
        store_sums(
            tl.sum(behind, axis=1), tl.sum(product, axis=1), source_sums, pid, count, units, in_h,
            hidden,
        )  # fmt: skip


@triton.jit
def _conv_weight_gradient(
    pid,
    du,
    z,
    sums,
    sums_count,
    dnorm,
    writes,
    mean,
    variance,
    gamma,
    source,
    source_mean,
    source_variance,
    source_gamma,
    source_beta,
    active,
    dweight,
    dbias_at,
    H,
    W,
    positions,
    total,
    count,
    tiles_per_split,
    row_length,
    hidden,
    DILATION: tl.constexpr,
    EPS: tl.constexpr,
    SOURCE_EPS: tl.constexpr,
    BATCH_STATS: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TAPS: tl.constexpr,
    USED: tl.constexpr,
    WRAPS: tl.constexpr,
):
    """Some taps, one block of input channels and one split of the tiles: a partial of dW and db."""
    step = pid % (9 // USED)
    blocks = BLOCK_H // BLOCK_K
    block = (pid // (9 // USED)) % blocks
    split = pid // ((9 // USED) * blocks)
    side = tl.arange(0, TAPS * BLOCK_K)
    lane = side // BLOCK_K
    units = tl.arange(0, BLOCK_H)
    in_h = units < hidden
    ins = block * BLOCK_K + side % BLOCK_K
    in_k = (ins < hidden) & (lane < USED)
    DTYPE: tl.constexpr = du.dtype.element_ty
    NORM: tl.constexpr = mean is not None
    SOURCE_NORM: tl.constexpr = source_mean is not None and active is None
    value_of = source
    if active is not None:
        value_of = active
    mu, rstd, scale, mean_grad, mean_product = _gradient_vectors(
        sums, sums_count, dnorm, mean, variance, gamma, units, in_h, hidden, writes, total, EPS,
        BATCH_STATS, ACC, BLOCK_H, BLOCK_T,
    )  # fmt: skip
    source_mu, _, source_scale, source_shift = affine(
        source_mean, source_variance, source_gamma, source_beta, ins, in_k, SOURCE_EPS, ACC,
        TAPS * BLOCK_K,
    )  # fmt: skip
    dw = tl.zeros((BLOCK_H, TAPS * BLOCK_K), ACC)
    db = tl.zeros((BLOCK_H,), ACC)
    begin = split * tiles_per_split
    for tile in range(begin, tl.minimum(begin + tiles_per_split, count)):
        first, own, in_p, _n_in_tile = tile_positions(tile, total, BLOCK_P)
        row, column = tile_coordinates(first, own, positions, W, WRAPS)
        z_tile = None
        if z is not None:
            z_tile = z + tile_start(first, hidden)
        grad = load_gradient(
            du + tile_start(first, hidden), z_tile, tile_offsets(units, own, hidden),
            in_h[:, None] & in_p[None, :], mu, rstd, scale, mean_grad, mean_product, NORM,
            BATCH_STATS, ACC,
        )  # fmt: skip
        value = load_taps(
            value_of + tile_start(first, hidden), None, own, in_p, row, column, step, lane, ins,
            in_k, source_mu, source_scale, source_shift, H, W, hidden, 0, SOURCE_NORM, USED,
            DILATION, 1, DTYPE, ACC,
        )  # fmt: skip
        dw = dot(narrow(grad, DTYPE), tl.trans(value), dw, PRECISION)
        if (step == 0) & (block == 0):
            db += tl.sum(grad.to(ACC), axis=1)
    dweight += split.to(tl.int64) * row_length
    at = (units[:, None] * hidden + ins[None, :]) * 9 + (step * USED + lane)[None, :]
    tl.store(dweight + at, dw, mask=in_h[:, None] & in_k[None, :])
    if (step == 0) & (block == 0):
        tl.store(dweight + dbias_at + units, db, mask=in_h)


_CONV_RUNTIME = ["H", "W", "positions", "total", "count", "sums_count", "weight_programs"]
_CONV_RUNTIME += ["tiles_per_split", "row_length", "dbias_at"]


@triton.jit(do_not_specialize=_CONV_RUNTIME)
def _dilated_conv_backward_kernel(
    du,
    z,
    sums,
    dnorm,
    mean,
    variance,
    gamma,
    weight,
    source,
    source_mean,
    source_variance,
    source_gamma,
    source_beta,
    dsource,
    source_sums,
    active,
    dweight,
    H,
    W,
    positions,
    total,
    count,
    sums_count,
    weight_programs,
    tiles_per_split,
    row_length,
    dbias_at,
    hidden,
    DILATION: tl.constexpr,
    EPS: tl.constexpr,
    SOURCE_EPS: tl.constexpr,
    BATCH_STATS: tl.constexpr,
    TURNED: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TAPS: tl.constexpr,
    USED: tl.constexpr,
    WRAPS: tl.constexpr,
    TAPS_T: tl.constexpr,
):
    """A dilated convolution between two norms and ReLUs: z = conv(relu(norm(source))).

    du is the gradient behind the norm of z, dsource behind the norm of source, as NCHW where it is
    TURNED. The first `weight_programs` programs, which have most to do, make dW's partials, the
    others dsource, a tile each. The weight is packed.
    """
    pid = tl.program_id(0)
    if pid < weight_programs:
        if dweight is not None:
            _conv_weight_gradient(
                pid, du, z, sums, sums_count, dnorm, pid == 0, mean, variance, gamma, source,
                source_mean, source_variance, source_gamma, source_beta, active, dweight, dbias_at,
                H, W, positions, total, count, tiles_per_split, row_length, hidden, DILATION, EPS,
                SOURCE_EPS, BATCH_STATS, PRECISION, ACC, BLOCK_P, BLOCK_H, BLOCK_K, BLOCK_T,
                TAPS, USED, WRAPS,
            )  # fmt: skip
    elif dsource is not None:
        _conv_input_gradient(
            pid - weight_programs, du, z, sums, sums_count, dnorm, mean, variance, gamma, weight,
            source, source_mean, source_variance, source_gamma, source_beta, dsource, source_sums,
            H, W, positions, total, count, hidden, DILATION, EPS, SOURCE_EPS, BATCH_STATS, TURNED,
            PRECISION, ACC, BLOCK_P, BLOCK_H, BLOCK_K, TAPS_T, TAPS, USED,
            WRAPS,
        )  # fmt: skip
    elif sums is not None:  # frozen on both sides: the norm's own gradients are left
        units = tl.arange(0, BLOCK_H)
        sums_of_norm(
            sums, sums_count, dnorm, units, units < hidden, hidden, True, ACC, BLOCK_H, BLOCK_T
        )


def launch_conv_backward(
    m: Map,
    du: Tensor,
    z: Tensor,
    sums: Partials | None,
    dnorm: Tensor | None,
    norm: Norm | None,
    weight: Tensor,
    source: Tensor,
    source_norm: Norm | None,
    dsource: Tensor | None,
    source_sums: Tensor | None,
    active: Tensor | None,
    dconv: Tensor | None,
    tiles_per_split: int,
    splits: int,
    dilation: int,
) -> None:
    """The gradients of one convolution whose weight is packed, [9, h, h].

    `active` is relu(norm(source)) where that was made before; `norm` None says that `du` is the
    gradient of the convolution's output itself.
    """
    data_programs = 0 if dsource is None else m.count
    weight_programs = 0 if dconv is None else 9 // m.taps[1] * splits * (m.block_h // m.block_k)
    known = norm_arguments(norm)
    del known["beta"]
    # With neither, a program is left that finishes the norm's own gradients.
    launch(
        _dilated_conv_backward_kernel,
        (max(1, data_programs + weight_programs),),
        du,
        z if norm is not None and norm.batch_stats else None,
        None if sums is None else sums.data,
        dnorm,
        weight=weight,
        source=source,
        dsource=dsource,
        source_sums=source_sums,
        active=active,
        dweight=dconv,
        H=m.h,
        W=m.w,
        positions=m.positions,
        sums_count=0 if sums is None else sums.count,
        weight_programs=weight_programs,
        tiles_per_split=tiles_per_split,
        row_length=0 if dconv is None else dconv.stride(0),
        dbias_at=9 * m.hidden * m.hidden,
        DILATION=dilation,
        EPS=0.0 if norm is None else norm.eps,
        SOURCE_EPS=0.0 if source_norm is None else source_norm.eps,
        BATCH_STATS=norm is not None and norm.batch_stats,
        TURNED=dsource is not None and not m.lies_well(dsource),
        PRECISION=conv_precision(m.dtype),
        BLOCK_K=m.block_k,
        BLOCK_T=m.block_t,
        TAPS=m.taps[0],
        USED=m.taps[1],
        WRAPS=m.wraps,
        TAPS_T=max(16, m.block_t // m.taps[0]),
        **m.sizes(),
        **known,
        **norm_arguments(source_norm, "source_"),
        **m.constants(),
    )
