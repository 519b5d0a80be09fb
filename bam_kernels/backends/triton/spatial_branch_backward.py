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
from bam_kernels.backends.triton.device_math import narrow
from bam_kernels.backends.triton.launch import cdiv, device_guard, launch
from bam_kernels.backends.triton.replay import replayed
from bam_kernels.backends.triton.spatial_branch import launch_project
from bam_kernels.backends.triton.spatial_conv import (
    launch_conv,
    norm_arguments,
    projection_arguments,
)
from bam_kernels.backends.triton.spatial_conv_backward import (
    launch_conv_backward,
    load_gradient,
    sums_of_norm,
)
from bam_kernels.backends.triton.spatial_layout import (
    Map,
    Norm,
    activate,
    map_of,
    norm_apart,
    norms_of,
    settle,
)
from bam_kernels.backends.triton.spatial_math import (
    affine,
    merge_scalar_sums,
    project,
    scalar_affine,
    store_map,
    store_sums,
    tile_offsets,
    tile_positions,
    tile_start,
)
from bam_kernels.backends.triton.spatial_pack import prepare
from bam_kernels.backends.triton.sum_splits import Job, sum_splits, tall_job

# --- kernels ----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["positions", "total", "count", "final_count"])
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
    positions,
    total,
    count,
    final_count,
    hidden,
    EPS: tl.constexpr,
    FINAL_EPS: tl.constexpr,
    FINAL_BATCH_STATS: tl.constexpr,
    TURNED: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Through the last norm, the projection and the ReLU in front of it, for one tile.

    du is the gradient behind the norm of z. dproject [count, hidden + 1] are partials.
    """
    pid = tl.program_id(0)
    first, own, in_p, _ = tile_positions(pid, total, BLOCK_P)
    units = tl.arange(0, BLOCK_H)
    in_h = units < hidden
    mask = in_h[:, None] & in_p[None, :]
    mu, rstd, scale, shift = affine(mean, variance, gamma, beta, units, in_h, EPS, ACC, BLOCK_H)
    at = tile_offsets(units, own, hidden)
    value = tl.load(z + tile_start(first, hidden) + at, mask=mask, other=0.0).to(ACC)
    u, active, weight, q = project(
        value, mu, scale, shift, units, in_h, project_weight, project_bias, ACC
    )
    grad = tl.load(dlogits + first + own, mask=in_p, other=0.0).to(ACC)
    if final_mean is not None:
        final_mu, final_rstd, final_scale, _ = scalar_affine(
            final_mean, final_variance, final_gamma, None, FINAL_EPS, ACC
        )
        dbeta, dgamma = merge_scalar_sums(final_sums, final_count, ACC)
        if pid == 0:
            tl.store(dfinal, dgamma)
            tl.store(dfinal + 1, dbeta)
        if FINAL_BATCH_STATS:
            centred = (q - final_mu) * final_rstd
            grad = grad - dbeta / total.to(ACC) - centred * (dgamma / total.to(ACC))
        grad = tl.where(in_p, grad * final_scale, 0.0)
    # A ReLU's gradient masks: an infinite one gives 0 where the unit was off.
    through = narrow(
        tl.where((u > 0) & mask, weight[:, None] * grad[None, :], 0.0), du.dtype.element_ty
    )
    store_map(du, through, first, own, units, mask, positions, hidden, TURNED)
    if sums is not None:
        behind = through.to(ACC)
        product = tl.where(mask, behind * ((value - mu[:, None]) * rstd[:, None]), 0.0)
        store_sums(
            tl.sum(behind, axis=1), tl.sum(product, axis=1), sums, pid, count, units, in_h, hidden
        )
    dweight = tl.sum(tl.where(mask, active * grad[None, :], 0.0), axis=1)
    tl.store(dproject + pid * (hidden + 1) + units, dweight, mask=in_h)
    tl.store(dproject + pid * (hidden + 1) + hidden, tl.sum(grad, axis=0))


@triton.jit(do_not_specialize=["positions", "total", "count", "sums_count"])
def _norm_backward_kernel(
    du,
    z,
    dz,
    sums,
    dnorm,
    mean,
    variance,
    gamma,
    positions,
    total,
    count,
    sums_count,
    hidden,
    EPS: tl.constexpr,
    BATCH_STATS: tl.constexpr,
    TURNED: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Through the first norm, to the reduction's output; dz None wants gamma's and beta's alone."""
    pid = tl.program_id(0)
    first, own, in_p, _ = tile_positions(pid, total, BLOCK_P)
    units = tl.arange(0, BLOCK_H)
    in_h = units < hidden
    mu, rstd, scale, _ = affine(mean, variance, gamma, None, units, in_h, EPS, ACC, BLOCK_H)
    dbeta, dgamma = sums_of_norm(
        sums, sums_count, dnorm, units, in_h, hidden, pid == 0, ACC, BLOCK_H, BLOCK_T
    )
    if dz is not None:
        mask = in_h[:, None] & in_p[None, :]
        if z is not None:
            z += tile_start(first, hidden)
        grad = load_gradient(
            du + tile_start(first, hidden), z, tile_offsets(units, own, hidden), mask, mu, rstd,
            scale, dbeta / total.to(ACC), dgamma / total.to(ACC), True, BATCH_STATS, ACC,
        )  # fmt: skip
        rounded = narrow(grad, dz.dtype.element_ty)
        store_map(dz, rounded, first, own, units, mask, positions, hidden, TURNED)


# --- launchers --------------------------------------------------------------------------------


def _recompute(
    m: Map,
    reduced: Tensor,
    weights: Tensor,
    biases: list[Tensor],
    hidden: list[Norm | None],
    final: Norm | None,
    projection: dict[str, object],
    dilation: int,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The maps in front of each hidden norm, from known statistics, and behind it where that is
    made apart; `projection` with the last."""
    maps, actives = [reduced], []
    for i, weight in enumerate(weights):
        out = m.empty()
        last = i == len(weights) - 1 and final is not None
        apart = norm_apart(m, hidden[i])
        actives.append(activate(m, maps[-1], hidden[i], None, None) if apart else None)
        launch_conv(
            m, actives[-1] if apart else maps[-1], weight, biases[i] if biases else None, dilation,
            None if apart else hidden[i], None, None, out, None, projection if last else None,
        )  # fmt: skip
        maps.append(out)
    if not len(weights) and final is not None:
        launch_project(m, reduced, hidden[-1], None, None, projection)
    return maps, actives


@replayed
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
    tiles_per_split = cdiv(m.count, configs.split_weight_gradient(m.count, m.hidden))
    splits = cdiv(m.count, tiles_per_split)
    dconvs = None
    if need_weights and weights:
        dconvs = m.workspace(splits, len(weights) * length)

    with device_guard(reduced):
        # The last of the maps' gradients lies as the reduction does.
        in_place = not reduced.is_contiguous()
        source, packed, _ = prepare(m, reduced, weights)
        maps, actives = _recompute(m, source, packed, biases, hidden, final, projection, dilation)
        du = m.empty(in_place or bool(weights) or hidden[0] is not None)
        sums = _sums(m, hidden[-1])
        dproject = m.workspace(m.count, m.hidden + 1)
        settled_final = None if final is None else settle(final_sums, m, 1, centred=False)
        launch(
            _project_backward_kernel,
            (m.count,),
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
            positions=m.positions,
            final_count=0 if final is None else settled_final.count,
            EPS=0.0 if hidden[-1] is None else hidden[-1].eps,
            FINAL_EPS=0.0 if final is None else final.eps,
            FINAL_BATCH_STATS=final is not None and final.batch_stats,
            TURNED=not m.lies_well(du),
            BLOCK_T=m.block_t,
            **norm_arguments(hidden[-1]),
            **m.sizes(),
            **m.constants(),
        )
        for i in reversed(range(len(weights))):
            needed = i > 0 or need_reduced or hidden[0] is not None
            if not (needed or dconvs is not None or sums is not None):
                continue
            norm_behind, settled = hidden[i + 1], None
            if norm_apart(m, norm_behind) and (needed or dconvs is not None):
                du = _norm_backward(
                    m, du, maps[i + 1], sums, norm_behind, dtaken[i + 1], True, True
                )
                norm_behind = None
            elif sums is not None:
                settled = settle(sums, m, m.hidden, centred=False)
            source_sums = _sums(m, hidden[i]) if needed else None
            dsource = m.empty(in_place or i > 0 or hidden[0] is not None) if needed else None
            launch_conv_backward(
                m, du, maps[i + 1], settled, dtaken[i + 1], norm_behind, packed[i], maps[i],
                hidden[i], dsource, source_sums, actives[i],
                None if dconvs is None else dconvs[:, i * length : (i + 1) * length],
                tiles_per_split, splits,
                dilation,
            )  # fmt: skip
            du, sums = dsource, source_sums
        dreduced = du if need_reduced else reduced.new_empty(0)
        if hidden[0] is not None:
            dreduced = _norm_backward(
                m, du, source, sums, hidden[0], dtaken[0], need_reduced, in_place
            )
        jobs = [tall_job(dproject, project_weight.new_empty(m.hidden + 1))]
        if dconvs is not None:
            out = weights[0].new_empty(len(weights) * length)
            jobs.append(Job(dconvs[None], out, splits))
        sum_splits(jobs)
    dconvolutions = jobs[1].out if dconvs is not None else reduced.new_empty(0)
    return dreduced, dconvolutions, jobs[0].out, dnorms


def _sums(m: Map, norm: Norm | None) -> Tensor | None:
    return None if norm is None else m.workspace(2, m.count, m.hidden)


def _norm_backward(
    m: Map,
    du: Tensor,
    z: Tensor,
    sums: Tensor,
    norm: Norm,
    dnorm: Tensor,
    need_dz: bool,
    channels_last: bool,
) -> Tensor:
    settled = settle(sums, m, m.hidden, centred=False)
    dz = m.empty(channels_last) if need_dz else z.new_empty(0)
    known = norm_arguments(norm)
    del known["beta"]
    launch(
        _norm_backward_kernel,
        (m.count if need_dz else 1,),
        du,
        z if norm.batch_stats else None,
        dz if need_dz else None,
        settled.data,
        dnorm,
        positions=m.positions,
        sums_count=settled.count,
        EPS=norm.eps,
        BATCH_STATS=norm.batch_stats,
        TURNED=need_dz and not m.lies_well(dz),
        BLOCK_T=m.block_t,
        **m.sizes(),
        **known,
        **m.constants(),
    )
    return dz
