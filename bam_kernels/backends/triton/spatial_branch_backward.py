"""The gradient of the spatial branch behind the reduction (Eq. 4).

The maps between the layers are computed anew from the reduction, 1/16 of the input's size, rather
than kept. Then a launch a layer, from the last to the first: each applies the batch norm's gradient
as it loads, makes the gradient of its input and, in other programs of the grid, of its weight, and
leaves the two sums that the next batch norm's gradient needs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bam_kernels.backends.reference import norm_widths, pairs_size, split_pairs
from bam_kernels.backends.triton import configs
from bam_kernels.backends.triton.device_math import dot, map_offsets, narrow
from bam_kernels.backends.triton.launch import conv_precision, device_guard
from bam_kernels.backends.triton.spatial_branch import (
    launch_conv,
    launch_project,
    norm_arguments,
    projection_arguments,
    spread,
)
from bam_kernels.backends.triton.spatial_layout import (
    Map,
    Norm,
    Partials,
    map_of,
    norms_of,
    settle,
)
from bam_kernels.backends.triton.spatial_math import (
    affine,
    merge_scalar_sums,
    merge_sums,
    project,
    relu,
    scalar_affine,
    store_sums,
    tap_mask,
)
from bam_kernels.backends.triton.sum_splits import Job, sum_splits

# --- kernels ----------------------------------------------------------------------------------


@triton.jit
def _sums_of_norm(
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
    """(mean, 1 / std, scale, mean gradient, mean product) [BLOCK_H], for `_load_gradient`."""
    mu, rstd, scale, _ = affine(mean, variance, gamma, None, units, in_h, EPS, ACC, BLOCK_H)
    mean_grad = tl.zeros((BLOCK_H,), ACC)
    mean_product = mean_grad
    if sums is not None:
        if BATCH_STATS:
            dbeta, dgamma = _sums_of_norm(
                sums, sums_count, dnorm, units, in_h, hidden, writes, ACC, BLOCK_H, BLOCK_T
            )
            total = N.to(ACC) * positions.to(ACC)
            mean_grad = dbeta / total
            mean_product = dgamma / total
        elif writes:
            _sums_of_norm(sums, sums_count, dnorm, units, in_h, hidden, True, ACC, BLOCK_H, BLOCK_T)
    return mu, rstd, scale, mean_grad, mean_product


@triton.jit
def _load_gradient(
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


@triton.jit(do_not_specialize=["N", "positions", "tiles", "count", "final_count"])
def _project_backward_kernel(
    z,
    dlogits,
    du,
    sums,
    dproject,
    mean,
    variance,
    gamma,
    beta,
    project_weight,
    project_bias,
    final_sums,
    dfinal,
    final_mean,
    final_variance,
    final_gamma,
    N,
    positions,
    tiles,
    count,
    final_count,
    hidden,
    EPS: tl.constexpr,
    FINAL_EPS: tl.constexpr,
    FINAL_BATCH_STATS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Through the last norm, the projection and the ReLU in front of it, for one tile.

    du is the gradient behind the norm of z. dproject [count, hidden + 1] are partials.
    """
    pid = tl.program_id(0)
    n = (pid // tiles).to(tl.int64)
    columns = (pid % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    in_p = columns < positions
    units = tl.arange(0, BLOCK_H)
    in_h = units < hidden
    mask = in_h[:, None] & in_p[None, :]
    mu, rstd, scale, shift = affine(mean, variance, gamma, beta, units, in_h, EPS, ACC, BLOCK_H)
    at = map_offsets(units, columns, hidden if CHANNELS_LAST else positions, 1, CHANNELS_LAST)
    at += n * hidden * positions
    value = tl.load(z + at, mask=mask, other=0.0).to(ACC)
    u, active, weight, q = project(
        value, mu, scale, shift, units, in_h, project_weight, project_bias, ACC
    )
    grad = tl.load(dlogits + n * positions + columns, mask=in_p, other=0.0).to(ACC)
    if final_mean is not None:
        final_mu, final_rstd, final_scale, _ = scalar_affine(
            final_mean, final_variance, final_gamma, None, FINAL_EPS, ACC
        )
        dbeta, dgamma = merge_scalar_sums(final_sums, final_count, ACC)
        if pid == 0:
            tl.store(dfinal, dgamma)
            tl.store(dfinal + 1, dbeta)
        if FINAL_BATCH_STATS:
            total = N.to(ACC) * positions.to(ACC)
            centred = (q - final_mu) * final_rstd
            grad = grad - dbeta / total - centred * (dgamma / total)
        grad = tl.where(in_p, grad * final_scale, 0.0)
    # A ReLU's gradient masks: an infinite one gives 0 where the unit was off.
    through = narrow(
        tl.where((u > 0) & mask, weight[:, None] * grad[None, :], 0.0), du.dtype.element_ty
    )
    tl.store(du + at, through, mask=mask)
    if sums is not None:
        behind = through.to(ACC)
        product = tl.where(mask, behind * ((value - mu[:, None]) * rstd[:, None]), 0.0)
        store_sums(
            tl.sum(behind, axis=1), tl.sum(product, axis=1), sums, pid, count, units, in_h, hidden
        )
    dweight = tl.sum(tl.where(mask, active * grad[None, :], 0.0), axis=1)
    tl.store(dproject + pid * (hidden + 1) + units, dweight, mask=in_h)
    tl.store(dproject + pid * (hidden + 1) + hidden, tl.sum(grad, axis=0))


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
            grad = _load_gradient(
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
        grad = _load_gradient(
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
        _sums_of_norm(
            sums, sums_count, dnorm, units, units < hidden, hidden, True, ACC, BLOCK_H, BLOCK_T
        )


@triton.jit(do_not_specialize=["N", "positions", "tiles", "sums_count"])
def _norm_backward_kernel(
    du,
    z,
    dz,
    sums,
    dnorm,
    mean,
    variance,
    gamma,
    N,
    positions,
    tiles,
    sums_count,
    hidden,
    EPS: tl.constexpr,
    BATCH_STATS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Through the first norm, to the reduction's output; dz None wants gamma's and beta's alone."""
    pid = tl.program_id(0)
    n = (pid // tiles).to(tl.int64)
    columns = (pid % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    units = tl.arange(0, BLOCK_H)
    in_h = units < hidden
    mu, rstd, scale, _ = affine(mean, variance, gamma, None, units, in_h, EPS, ACC, BLOCK_H)
    dbeta, dgamma = _sums_of_norm(
        sums, sums_count, dnorm, units, in_h, hidden, pid == 0, ACC, BLOCK_H, BLOCK_T
    )
    if dz is not None:
        total = N.to(ACC) * positions.to(ACC)
        at = map_offsets(units, columns, hidden if CHANNELS_LAST else positions, 1, CHANNELS_LAST)
        at += n * hidden * positions
        mask = in_h[:, None] & (columns < positions)[None, :]
        grad = _load_gradient(
            du, z, at, mask, mu, rstd, scale, dbeta / total, dgamma / total, True, BATCH_STATS, ACC
        )
        tl.store(dz + at, narrow(grad, dz.dtype.element_ty), mask=mask)


# --- launchers --------------------------------------------------------------------------------


def _recompute(
    m: Map,
    reduced: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    hidden: list[Norm | None],
    final: Norm | None,
    projection: dict[str, object],
    dilation: int,
) -> list[Tensor]:
    """The maps in front of each hidden norm, from known statistics; `projection` with the last."""
    maps = [reduced]
    for i, weight in enumerate(weights):
        out = m.empty()
        last = i == len(weights) - 1 and final is not None
        launch_conv(
            m, maps[-1], weight, biases[i] if biases else None, dilation, hidden[i], None, None,
            out, None, projection if last else None,
        )  # fmt: skip
        maps.append(out)
    if not weights and final is not None:
        launch_project(m, reduced, hidden[-1], None, None, projection)
    return maps


def spatial_branch_backward(
    dlogits: Tensor,
    statistics: Tensor,
    reduced: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    project_weight: Tensor,
    project_bias: Tensor | None,
    gammas: list[Tensor],
    betas: list[Tensor],
    means: list[Tensor],
    variances: list[Tensor],
    hidden_norm: bool,
    norm: bool,
    batch_stats: list[bool],
    eps: list[float],
    dilation: int,
    need_reduced: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dreduced [N, h, H, W], dconvolutions, dprojection, dnorms), the first empty if not needed.

    dconvolutions is flat, [h, h, 3, 3] and [h] of each convolution in turn, in the weights' dtype,
    and empty unless `need_weights`; dprojection [h + 1] of the projection's weight and bias, in its
    weight's; dnorms, in the accumulator's type, holds those of each norm: gamma's, then beta's.
    """
    m, reduced = map_of(reduced)
    widths = norm_widths(m.hidden, len(weights), hidden_norm, norm)
    taken = split_pairs(statistics, widths, batch_stats)
    norms = norms_of(gammas, betas, means, variances, batch_stats, eps)
    hidden: list[Norm | None] = [None] * (len(weights) + 1)
    if hidden_norm:
        hidden = [each.known(taken[i]) for i, each in enumerate(norms[: len(weights) + 1])]
    final = norms[-1].known(taken[-1]) if norm else None
    dlogits = dlogits.contiguous()

    dnorms = m.workspace(pairs_size(widths))
    dtaken = split_pairs(dnorms, widths)
    if not hidden_norm:
        dtaken = [None] * (len(weights) + 1) + dtaken
    final_sums = m.workspace(2, m.count, 1) if final is not None else None
    projection = projection_arguments(
        hidden[-1], project_weight, project_bias, final, dlogits=dlogits, final_sums=final_sums
    )
    length = m.hidden * m.hidden * 9 + m.hidden
    tiles_per_split = triton.cdiv(m.count, configs.split_weight_gradient(m.count))
    splits = triton.cdiv(m.count, tiles_per_split)
    dconvs = None
    if need_weights and weights:
        dconvs = m.workspace(splits, len(weights) * length)

    with device_guard(reduced):
        maps = _recompute(m, reduced, weights, biases, hidden, final, projection, dilation)
        du, sums = m.empty(), _sums(m, hidden[-1])
        dproject = m.workspace(m.count, m.hidden + 1)
        settled_final = None if final is None else settle(final_sums, m, 1, centred=False)
        _project_backward_kernel[(m.count,)](
            maps[-1],
            dlogits,
            du,
            sums,
            dproject,
            project_weight=project_weight.contiguous(),
            project_bias=project_bias,
            final_sums=None if final is None else settled_final.data,
            dfinal=None if final is None else dtaken[-1],
            final_mean=None if final is None else final.mean,
            final_variance=None if final is None else final.variance,
            final_gamma=None if final is None else final.gamma,
            N=m.n,
            positions=m.positions,
            tiles=m.tiles,
            count=m.count,
            final_count=0 if final is None else settled_final.count,
            hidden=m.hidden,
            EPS=0.0 if hidden[-1] is None else hidden[-1].eps,
            FINAL_EPS=0.0 if final is None else final.eps,
            FINAL_BATCH_STATS=final is not None and final.batch_stats,
            BLOCK_T=m.block_t,
            **norm_arguments(hidden[-1]),
            **m.constants(),
        )
        for i in reversed(range(len(weights))):
            settled = None if sums is None else settle(sums, m, m.hidden, centred=False)
            needed = i > 0 or need_reduced or hidden[0] is not None
            if not (needed or dconvs is not None or settled is not None):
                continue
            source_sums = _sums(m, hidden[i]) if needed else None
            dsource = m.empty() if needed else None
            _launch_conv_backward(
                m, du, maps[i + 1], settled, dtaken[i + 1], hidden[i + 1], weights[i], maps[i],
                hidden[i], dsource, source_sums,
                None if dconvs is None else dconvs[:, i * length :], tiles_per_split, splits,
                dilation,
            )  # fmt: skip
            du, sums = dsource, source_sums
        dreduced = du if need_reduced else reduced.new_empty(0)
        if hidden[0] is not None:
            dreduced = _norm_backward(m, du, reduced, sums, hidden[0], dtaken[0], need_reduced)
        jobs = [Job(dproject[None], project_weight.new_empty(m.hidden + 1), m.count, tall=True)]
        if dconvs is not None:
            out = weights[0].new_empty(len(weights) * length)
            jobs.append(Job(dconvs[None], out, splits))
        sum_splits(jobs)
    dconvolutions = jobs[1].out if dconvs is not None else reduced.new_empty(0)
    return dreduced, dconvolutions, jobs[0].out, dnorms


def _sums(m: Map, norm: Norm | None) -> Tensor | None:
    return None if norm is None else m.workspace(2, m.count, m.hidden)


def _launch_conv_backward(
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
    _dilated_conv_backward_kernel[(max(1, data_programs + weight_programs),)](
        du,
        z,
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


def _norm_backward(
    m: Map,
    du: Tensor,
    z: Tensor,
    sums: Tensor,
    norm: Norm,
    dnorm: Tensor,
    need_dz: bool,
) -> Tensor:
    settled = settle(sums, m, m.hidden, centred=False)
    dz = m.empty() if need_dz else z.new_empty(0)
    known = norm_arguments(norm)
    del known["beta"]
    _norm_backward_kernel[(m.count if need_dz else 1,)](
        du,
        z,
        dz if need_dz else None,
        settled.data,
        dnorm,
        N=m.n,
        positions=m.positions,
        tiles=m.tiles,
        sums_count=settled.count,
        hidden=m.hidden,
        EPS=norm.eps,
        BATCH_STATS=norm.batch_stats,
        BLOCK_T=m.block_t,
        **known,
        **m.constants(),
    )
    return dz
