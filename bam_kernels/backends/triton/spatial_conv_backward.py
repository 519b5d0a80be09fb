"""The gradient of one dilated convolution of the spatial branch, in one launch.

It applies the gradient of the batch norm behind it as it loads, makes the gradient of its input
and, in other programs of the grid, of its weight, and leaves the two sums that the gradient of the
batch norm in front of it needs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bam_kernels.backends.triton.device_math import dot, map_offsets, narrow
from bam_kernels.backends.triton.launch import conv_precision, launch
from bam_kernels.backends.triton.spatial_conv import norm_arguments, spread
from bam_kernels.backends.triton.spatial_layout import Map, Norm, Partials
from bam_kernels.backends.triton.spatial_math import affine, merge_sums, relu, store_sums, tap_mask


@triton.jit
def sums_of_norm(
    sums, sums_count, dnorm, units, in_h, hidden, writes, ACC: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """A batch norm's two sums; one program leaves them as the gradients of gamma and beta."""
    beta, gamma = merge_sums(sums, sums_count, units, in_h, hidden, ACC, BLOCK_H, BLOCK_T)
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
    N,
    positions,
    EPS: tl.constexpr,
    BATCH_STATS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """(mean, 1 / std, scale, mean gradient, mean product) [BLOCK_H], for `load_gradient`."""
    mu, rstd, scale, _ = affine(mean, variance, gamma, None, units, in_h, EPS, ACC, BLOCK_H)
    mean_grad = tl.zeros((BLOCK_H,), ACC)
    mean_product = mean_grad
    if sums is not None:
        if BATCH_STATS:
            dbeta, dgamma = sums_of_norm(
                sums, sums_count, dnorm, units, in_h, hidden, writes, ACC, BLOCK_H, BLOCK_T
            )
            total = N.to(ACC) * positions.to(ACC)
            mean_grad = dbeta / total
            mean_product = dgamma / total
        elif writes:
            sums_of_norm(sums, sums_count, dnorm, units, in_h, hidden, True, ACC, BLOCK_H, BLOCK_T)
    return mu, rstd, scale, mean_grad, mean_product


@triton.jit
def load_gradient(
    du, z, at, mask, mu, rstd, scale, mean_grad, mean_product, NORM: tl.constexpr,
    BATCH_STATS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradient in front of a batch norm, from the one behind it; 0 outside of the mask."""
    grad = tl.load(du + at, mask=mask, other=0.0).to(ACC)
    if NORM:
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
    N,
    H,
    W,
    positions,
    tiles,
    count,
    stride_out,
    stride_in,
    stride_tap,
    hidden,
    DILATION: tl.constexpr,
    EPS: tl.constexpr,
    SOURCE_EPS: tl.constexpr,
    BATCH_STATS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One tile of the gradient behind the norm of the convolution's input, masked by its ReLU."""
    n = (pid // tiles).to(tl.int64)
    columns = (pid % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    in_p = columns < positions
    row = columns // W
    column = columns % W
    units = tl.arange(0, BLOCK_H)
    in_h = units < hidden
    stride = hidden if CHANNELS_LAST else positions
    base = n * hidden * positions
    DTYPE: tl.constexpr = du.dtype.element_ty
    NORM: tl.constexpr = mean is not None
    acc = tl.zeros((BLOCK_H, BLOCK_P), ACC)
    for k in tl.static_range(0, BLOCK_H, BLOCK_K):
        outs = k + tl.arange(0, BLOCK_K)
        in_k = outs < hidden
        mu, rstd, scale, mean_grad, mean_product = _gradient_vectors(
            sums, sums_count, dnorm, mean, variance, gamma, outs, in_k, hidden, pid == 0, N,
            positions, EPS, BATCH_STATS, ACC, BLOCK_K, BLOCK_T,
        )  # fmt: skip
        at = map_offsets(outs, columns, stride, 1, CHANNELS_LAST) + base
        at_w = outs[None, :] * stride_out + units[:, None] * stride_in
        in_w = in_k[None, :] & in_h[:, None]
        for tap in range(9):
            down = (1 - tap // 3) * DILATION
            right = (1 - tap % 3) * DILATION
            inside = tap_mask(row, column, down, right, H, W, in_p)
            step = down * W + right
            if CHANNELS_LAST:
                step *= hidden
            grad = load_gradient(
                du, z, at + step, in_k[:, None] & inside[None, :], mu, rstd, scale, mean_grad,
                mean_product, NORM, BATCH_STATS, ACC,
            )  # fmt: skip
            w = tl.load(weight + (at_w + tap * stride_tap), mask=in_w, other=0.0)
            acc = dot(narrow(w.to(ACC), DTYPE), narrow(grad, DTYPE), acc, PRECISION)
    mask = in_h[:, None] & in_p[None, :]
    at = base + map_offsets(units, columns, stride, 1, CHANNELS_LAST)
    value = tl.load(source + at, mask=mask, other=0.0).to(ACC)
    source_mu, source_rstd, source_scale, source_shift = affine(
        source_mean, source_variance, source_gamma, source_beta, units, in_h, SOURCE_EPS, ACC,
        BLOCK_H,
    )  # fmt: skip
    u = (value - source_mu[:, None]) * source_scale[:, None] + source_shift[:, None]
    through = narrow(tl.where((u > 0) & mask, acc, 0.0), DTYPE)
    tl.store(dsource + at, through, mask=mask)
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
    dweight,
    dbias_at,
    N,
    H,
    W,
    positions,
    tiles,
    count,
    tiles_per_split,
    row_length,
    hidden,
    DILATION: tl.constexpr,
    EPS: tl.constexpr,
    SOURCE_EPS: tl.constexpr,
    BATCH_STATS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One tap, one block of input channels and one split of the tiles: a partial of dW and db."""
    tap = pid % 9
    blocks = BLOCK_H // BLOCK_K
    block = (pid // 9) % blocks
    split = pid // (9 * blocks)
    down = (tap // 3 - 1) * DILATION
    right = (tap % 3 - 1) * DILATION
    units = tl.arange(0, BLOCK_H)
    in_h = units < hidden
    ins = block * BLOCK_K + tl.arange(0, BLOCK_K)
    in_k = ins < hidden
    stride = hidden if CHANNELS_LAST else positions
    DTYPE: tl.constexpr = du.dtype.element_ty
    NORM: tl.constexpr = mean is not None
    SOURCE_NORM: tl.constexpr = source_mean is not None
    mu, rstd, scale, mean_grad, mean_product = _gradient_vectors(
        sums, sums_count, dnorm, mean, variance, gamma, units, in_h, hidden, writes, N, positions,
        EPS, BATCH_STATS, ACC, BLOCK_H, BLOCK_T,
    )  # fmt: skip
    source_mu, _, source_scale, source_shift = affine(
        source_mean, source_variance, source_gamma, source_beta, ins, in_k, SOURCE_EPS, ACC, BLOCK_K
    )
    dw = tl.zeros((BLOCK_H, BLOCK_K), ACC)
    db = tl.zeros((BLOCK_H,), ACC)
    first = split * tiles_per_split
    for tile in range(first, tl.minimum(first + tiles_per_split, count)):
        n = (tile // tiles).to(tl.int64)
        base = n * hidden * positions
        columns = (tile % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
        in_p = columns < positions
        row = columns // W
        column = columns % W
        inside = tap_mask(row, column, down, right, H, W, in_p)
        at = base + map_offsets(units, columns, stride, 1, CHANNELS_LAST)
        grad = load_gradient(
            du, z, at, in_h[:, None] & in_p[None, :], mu, rstd, scale, mean_grad, mean_product,
            NORM, BATCH_STATS, ACC,
        )  # fmt: skip
        at = map_offsets(ins, columns + (down * W + right), stride, 1, CHANNELS_LAST)
        mask = in_k[:, None] & inside[None, :]
        value = tl.load(source + base + at, mask=mask, other=0.0).to(ACC)
        if SOURCE_NORM:
            value = (value - source_mu[:, None]) * source_scale[:, None] + source_shift[:, None]
            value = tl.where(mask, value, 0.0)
        value = narrow(relu(value), DTYPE)
        dw = dot(narrow(grad, DTYPE), tl.trans(value), dw, PRECISION)
        if (tap == 4) & (block == 0):
            db += tl.sum(grad, axis=1)
    dweight += split.to(tl.int64) * row_length
    at = (units[:, None] * hidden + ins[None, :]) * 9 + tap
    tl.store(dweight + at, dw, mask=in_h[:, None] & in_k[None, :])
    if (tap == 4) & (block == 0):
        tl.store(dweight + dbias_at + units, db, mask=in_h)


_CONV_RUNTIME = ["N", "H", "W", "positions", "tiles", "count", "sums_count", "data_programs"]
_CONV_RUNTIME += ["tiles_per_split", "row_length", "dbias_at"]


@triton.jit(do_not_specialize=[*_CONV_RUNTIME, "stride_out", "stride_in", "stride_tap"])
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
    dweight,
    N,
    H,
    W,
    positions,
    tiles,
    count,
    sums_count,
    data_programs,
    tiles_per_split,
    row_length,
    dbias_at,
    stride_out,
    stride_in,
    stride_tap,
    hidden,
    DILATION: tl.constexpr,
    EPS: tl.constexpr,
    SOURCE_EPS: tl.constexpr,
    BATCH_STATS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """A dilated convolution between two norms and ReLUs: z = conv(relu(norm(source))).

    du is the gradient behind the norm of z, dsource behind the norm of source. The first
    `data_programs` programs make dsource, a tile each, and the others dW's partials.
    """
    pid = tl.program_id(0)
    if pid < data_programs:
        if dsource is not None:
            _conv_input_gradient(
                pid, du, z, sums, sums_count, dnorm, mean, variance, gamma, weight, source,
                source_mean, source_variance, source_gamma, source_beta, dsource, source_sums, N, H,
                W, positions, tiles, count, stride_out, stride_in, stride_tap, hidden, DILATION,
                EPS, SOURCE_EPS, BATCH_STATS, CHANNELS_LAST, PRECISION, ACC, BLOCK_P, BLOCK_H,
                BLOCK_K, BLOCK_T,
            )  # fmt: skip
    elif dweight is not None:
        _conv_weight_gradient(
            pid - data_programs, du, z, sums, sums_count, dnorm, pid == 0, mean, variance, gamma,
            source, source_mean, source_variance, source_gamma, source_beta, dweight, dbias_at, N,
            H, W, positions, tiles, count, tiles_per_split, row_length, hidden, DILATION, EPS,
            SOURCE_EPS, BATCH_STATS, CHANNELS_LAST, PRECISION, ACC, BLOCK_P, BLOCK_H, BLOCK_K,
            BLOCK_T,
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
    dconv: Tensor | None,
    tiles_per_split: int,
    splits: int,
    dilation: int,
) -> None:
    weight, (stride_out, stride_in, stride_tap) = spread(weight)
    data_programs = 0 if dsource is None else m.count
    weight_programs = 0 if dconv is None else 9 * splits * (m.block_h // m.block_k)
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
        dweight=dconv,
        N=m.n,
        H=m.h,
        W=m.w,
        positions=m.positions,
        tiles=m.tiles,
        count=m.count,
        sums_count=0 if sums is None else sums.count,
        data_programs=data_programs,
        tiles_per_split=tiles_per_split,
        row_length=0 if dconv is None else dconv.stride(0),
        dbias_at=9 * m.hidden * m.hidden,
        stride_out=stride_out,
        stride_in=stride_in,
        stride_tap=stride_tap,
        hidden=m.hidden,
        DILATION=dilation,
        EPS=0.0 if norm is None else norm.eps,
        SOURCE_EPS=0.0 if source_norm is None else source_norm.eps,
        BATCH_STATS=norm is not None and norm.batch_stats,
        PRECISION=conv_precision(m.dtype),
        BLOCK_K=m.block_k,
        BLOCK_T=m.block_t,
        **known,
        **norm_arguments(source_norm, "source_"),
        **m.constants(),
    )
