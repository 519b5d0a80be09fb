"""The spatial branch behind the reduction (Eq. 4), forward: dilated 3x3s, 1x1 to 1, batch norms.

A launch a dilated convolution. The norm and ReLU in front of a layer are applied as its input is
loaded; statistics of its output leave with it, one partial a program. The last convolution also
makes the projection to one channel, where the norm between them has known statistics or is none.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bam_kernels.backends.reference import norm_widths, pairs_size, split_pairs
from bam_kernels.backends.triton.launch import accumulator, cdiv, device_guard, launch
from bam_kernels.backends.triton.replay import replayed
from bam_kernels.backends.triton.spatial_conv import (
    RUNTIME,
    finish_logits,
    launch_conv,
    norm_arguments,
    projection_arguments,
)
from bam_kernels.backends.triton.spatial_layout import (
    NO_PARTIALS,
    Map,
    Norm,
    Partials,
    activate,
    map_of,
    norm_apart,
    norms_of,
    settle,
)
from bam_kernels.backends.triton.spatial_math import (
    input_affine,
    project,
    tile_offsets,
    tile_positions,
    tile_start,
)
from bam_kernels.backends.triton.spatial_pack import prepare

# --- kernels ----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=RUNTIME)
def _project_kernel(
    source,
    partials,
    statistics,
    mean,
    variance,
    gamma,
    beta,
    project_weight,
    project_bias,
    logits,
    logits_partials,
    dlogits,
    final_sums,
    final_mean,
    final_variance,
    final_gamma,
    final_beta,
    total,
    count,
    partial_count,
    partial_block,
    hidden,
    EPS: tl.constexpr,
    FINAL_EPS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The projection by itself, where the norm in front of it needs a pass of its own."""
    pid = tl.program_id(0)
    first, own, in_p, n_in_tile = tile_positions(pid, total, BLOCK_P)
    units = tl.arange(0, BLOCK_H)
    in_h = units < hidden
    mu, scale, shift = input_affine(
        partials, partial_count, partial_block, total, statistics, mean, variance, gamma, beta,
        units, in_h, hidden, EPS, ACC, BLOCK_H, BLOCK_T,
    )  # fmt: skip
    at = tile_offsets(units, own, hidden)
    mask = in_h[:, None] & in_p[None, :]
    value = tl.load(source + tile_start(first, hidden) + at, mask=mask, other=0.0).to(ACC)
    _, _, _, q = project(value, mu, scale, shift, units, in_h, project_weight, project_bias, ACC)
    finish_logits(
        q, in_p, n_in_tile, pid, count, first + own, logits, logits_partials, dlogits, final_sums,
        final_mean, final_variance, final_gamma, final_beta, FINAL_EPS, ACC,
    )  # fmt: skip


@triton.jit(do_not_specialize=["total", "partial_count", "partial_block"])
def _normalize_logits_kernel(
    logits,
    out,
    partials,
    statistics,
    gamma,
    beta,
    total,
    partial_count,
    partial_block,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The last norm with batch statistics: one channel, N * P values."""
    one = tl.arange(0, 1)
    mu, scale, shift = input_affine(
        partials, partial_count, partial_block, total, statistics, None, None, gamma, beta, one,
        one < 1, 1, EPS, ACC, 1, BLOCK_T,
    )  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(logits + i, mask=i < total, other=0.0)
    tl.store(out + i, (value - mu) * scale + shift, mask=i < total)


# --- launchers ----------------------------------------------------------------------------------


def launch_project(
    m: Map,
    source: Tensor,
    norm: Norm | None,
    partials: Partials | None,
    statistics: Tensor | None,
    projection: dict[str, object],
) -> None:
    """The projection of relu(norm(source)) by itself."""
    rest = {key: value for key, value in projection.items() if not key.lower().startswith("next_")}
    arguments = norm_arguments(norm)
    if partials is not None:
        arguments |= {"mean": None, "variance": None}
    launch(
        _project_kernel,
        (m.count,),
        source,
        None if partials is None else partials.data,
        None if partials is None else statistics,
        EPS=0.0 if norm is None else norm.eps,
        BLOCK_T=m.block_t,
        **m.sizes(),
        **(NO_PARTIALS if partials is None else partials.arguments()),
        **arguments,
        **rest,
        **m.constants(),
    )


@replayed
def spatial_branch_forward(
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
) -> tuple[Tensor, Tensor]:
    """(logits [N, 1, H, W], statistics), both in the accumulator's type (fp32, or fp64 for fp64).

    reduced [N, h, H, W]; weights [h, h, 3, 3] each; project_weight [h]. The norms' lists hold the
    hidden ones (after the reduction and after each convolution) and then the last; means and
    variances only those of norms that use running statistics. `statistics` holds, one after the
    other, mean and biased variance of each norm that takes them from the batch: [2, h] of the
    hidden ones, [2] of the last.
    """
    m, reduced = map_of(reduced)
    norms = norms_of(gammas, betas, means, variances, batch_stats, eps)
    hidden = norms[: len(weights) + 1] if hidden_norm else [None] * (len(weights) + 1)
    final = norms[-1] if norm else None
    widths = norm_widths(m.hidden, len(weights), hidden_norm, norm)
    statistics = m.workspace(pairs_size(widths, batch_stats))
    rows = split_pairs(statistics, widths, batch_stats)
    if not hidden_norm:
        rows = [None] * (len(weights) + 1) + rows
    logits = m.workspace(m.n, 1, m.h, m.w)
    final_partials = m.workspace(2, m.count, 1) if final and final.batch_stats else None

    with device_guard(reduced):
        takes_stats = hidden[0] is not None and hidden[0].batch_stats
        source, packed, partials = prepare(m, reduced, weights, takes_stats)
        projection = projection_arguments(
            None, project_weight, project_bias, final, logits=logits, logits_partials=final_partials
        )
        projected = False
        for i, weight in enumerate(packed):
            following = hidden[i + 1]
            takes_stats = following is not None and following.batch_stats
            last = i == len(packed) - 1
            projected = last and not takes_stats
            out = None if projected else m.empty()
            out_partials = m.workspace(2, m.count, m.hidden) if takes_stats else None
            after = projection | norm_arguments(following, "next_")
            after["NEXT_EPS"] = 0.0 if following is None else following.eps
            norm_before = hidden[i]
            if norm_apart(m, norm_before):
                source = activate(m, source, norm_before, partials, rows[i])
                norm_before = partials = None
            launch_conv(
                m, source, weight, biases[i] if biases else None, dilation, norm_before, partials,
                rows[i], out, out_partials, after if projected else None,
            )  # fmt: skip
            source = out
            partials = settle(out_partials, m, m.hidden, centred=True) if takes_stats else None
        if not projected:
            launch_project(m, source, hidden[-1], partials, rows[len(weights)], projection)
        if final_partials is not None:
            logits = _normalize_logits(m, logits, final_partials, final, rows[-1])
    return logits, statistics


def _normalize_logits(
    m: Map, logits: Tensor, partials: Tensor, norm: Norm, statistics: Tensor
) -> Tensor:
    out = torch.empty_like(logits)
    settled = settle(partials, m, 1, centred=True)
    total = logits.numel()
    launch(
        _normalize_logits_kernel,
        (cdiv(total, 512),),
        logits,
        out,
        settled.data,
        statistics,
        norm.gamma,
        norm.beta,
        total=total,
        EPS=norm.eps,
        ACC=accumulator(m.dtype),
        BLOCK=512,
        BLOCK_T=128,
        num_warps=4,
        **settled.arguments(),
    )
    return out
