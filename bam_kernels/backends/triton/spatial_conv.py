"""The dilated 3x3 convolutions of the spatial branch (Eq. 4), a launch each, and the projection.

The norm and ReLU in front of a convolution are applied as its input is loaded; statistics of its
output leave with it, one partial a program. The last one can make the projection to one channel.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bam_kernels.backends.triton.device_math import dot, narrow, relu
from bam_kernels.backends.triton.launch import conv_precision, launch
from bam_kernels.backends.triton.spatial_layout import NO_PARTIALS, Map, Norm, Partials
from bam_kernels.backends.triton.spatial_math import (
    affine,
    input_affine,
    project,
    scalar_affine,
    store_statistics,
    store_total,
    tap_mask,
    tap_steps,
    taps,
    tile_coordinates,
    tile_offsets,
    tile_positions,
    tile_start,
    total_of,
)

# --- kernels ----------------------------------------------------------------------------------


@triton.jit
def finish_logits(
    q,
    in_p,
    n_in_tile,
    index,
    count,
    at,
    logits,
    logits_partials,
    dlogits,
    final_sums,
    final_mean,
    final_variance,
    final_gamma,
    final_beta,
    FINAL_EPS: tl.constexpr,
    ACC: tl.constexpr,
):
    """What becomes of the projection q [BLOCK_P] of one tile.

    Forward it is stored: normalised where statistics are known, else with its partial. Backward
    (dlogits given) the sums of dlogits and of dlogits times the normalised q are left instead.
    """
    if dlogits is not None:
        mu, rstd, _, _ = scalar_affine(final_mean, final_variance, None, None, FINAL_EPS, ACC)
        grad = tl.load(dlogits + at, mask=in_p, other=0.0).to(ACC)
        store_total(final_sums + index, total_of(grad))
        product = tl.where(in_p, grad * ((q - mu) * rstd), 0.0)
        store_total(final_sums + count + index, total_of(product))
    else:
        if logits_partials is not None:
            total = total_of(tl.where(in_p, q, 0.0))
            off = tl.where(in_p, q - total / n_in_tile.to(ACC), 0.0)
            store_total(logits_partials + index, total)
            store_total(logits_partials + count + index, total_of(off * off))
        elif final_mean is not None:
            mu, _, scale, shift = scalar_affine(
                final_mean, final_variance, final_gamma, final_beta, FINAL_EPS, ACC
            )
            q = (q - mu) * scale + shift
        tl.store(logits + at, q, mask=in_p)


@triton.jit
def load_taps(
    source,
    source_bias,
    own,
    in_p,
    row,
    column,
    step,
    lane,
    ins,
    in_k,
    mu,
    scale,
    shift,
    H,
    W,
    hidden,
    part_stride,
    NORM: tl.constexpr,
    USED: tl.constexpr,
    DILATION: tl.constexpr,
    SPLITS: tl.constexpr,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
):
    """relu(norm(source)) at the neighbours of a step's taps, [taps x channels, positions].

    `source` points at the tile's first position.
    """
    down, right = taps(step, lane, USED, DILATION)
    mask = tap_mask(row, column, down, right, H, W) & in_k[:, None] & in_p[None, :]
    at = tile_offsets(ins, own, hidden) + ((down * W + right) * hidden)[:, None]
    value = tl.load(source + at, mask=mask, other=0.0)
    if SPLITS > 1:
        value = value.to(ACC)
        for split in tl.static_range(1, SPLITS):
            value += tl.load(source + split * part_stride + at, mask=mask, other=0.0)
        if source_bias is not None:
            offset = tl.load(source_bias + ins, mask=in_k, other=0.0).to(ACC)
            value = tl.where(mask, value + offset[:, None], 0.0)
        value = narrow(value, DTYPE)
    if NORM:
        value = value.to(ACC)
        value = (value - mu[:, None]) * scale[:, None] + shift[:, None]
        value = narrow(tl.where(mask, value, 0.0), DTYPE)
    return relu(value)


@triton.jit
def conv_tile(
    pid,
    source,
    source_bias,
    weight,
    bias,
    out,
    partials,
    statistics,
    mean,
    variance,
    gamma,
    beta,
    out_partials,
    next_mean,
    next_variance,
    next_gamma,
    next_beta,
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
    H,
    W,
    positions,
    total,
    count,
    partial_count,
    partial_block,
    hidden,
    DILATION: tl.constexpr,
    EPS: tl.constexpr,
    NEXT_EPS: tl.constexpr,
    FINAL_EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TAPS: tl.constexpr,
    USED: tl.constexpr,
    WRAPS: tl.constexpr,
    SPLITS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Every output channel of the BLOCK_P positions of tile `pid`.

    A dot takes `USED` taps at once, padded to TAPS. The weight is packed, [9, h, h]. With SPLITS
    above 1 the source is the reduction in parts [SPLITS, N * P, h] in the accumulator's type, to be
    added up with `source_bias` and rounded to DTYPE, the maps' type.
    """
    first, own, in_p, n_in_tile = tile_positions(pid, total, BLOCK_P)
    row, column = tile_coordinates(first, own, positions, W, WRAPS)
    units = tl.arange(0, BLOCK_H)
    in_h = units < hidden
    NORM: tl.constexpr = partials is not None or mean is not None
    source += tile_start(first, hidden)
    part_stride = tile_start(total, hidden)
    side = tl.arange(0, TAPS * BLOCK_K)
    lane = side // BLOCK_K

    acc = tl.zeros((BLOCK_H, BLOCK_P), ACC)
    for k in tl.static_range(0, BLOCK_H, BLOCK_K):
        ins = k + side % BLOCK_K
        in_k = (ins < hidden) & (lane < USED)
        mu, scale, shift = input_affine(
            partials, partial_count, partial_block, total, statistics, mean, variance, gamma, beta,
            ins, in_k, hidden, EPS, ACC, TAPS * BLOCK_K, BLOCK_T,
        )  # fmt: skip
        at_w = units[:, None] * hidden + (lane * hidden * hidden + ins)[None, :]
        in_w = in_h[:, None] & in_k[None, :]
        for step in range(tap_steps(hidden, USED, NORM, DTYPE)):
            value = load_taps(
                source, source_bias, own, in_p, row, column, step, lane, ins, in_k, mu, scale,
                shift, H, W, hidden, part_stride, NORM, USED, DILATION, SPLITS, DTYPE, ACC,
            )  # fmt: skip
            w = tl.load(weight + step * USED * hidden * hidden + at_w, mask=in_w, other=0.0)
            acc = dot(w, value, acc, PRECISION)
    if bias is not None:
        acc += tl.load(bias + units, mask=in_h, other=0.0).to(ACC)[:, None]

    rounded = narrow(acc, DTYPE)
    mask = in_h[:, None] & in_p[None, :]
    if out is not None:
        tl.store(
            out + tile_start(first, hidden) + tile_offsets(units, own, hidden), rounded, mask=mask
        )
    value = rounded.to(ACC)
    if out_partials is not None:
        store_statistics(value, mask, n_in_tile, out_partials, pid, count, units, in_h, hidden, ACC)
    if project_weight is not None:
        mu, _, scale, shift = affine(
            next_mean, next_variance, next_gamma, next_beta, units, in_h, NEXT_EPS, ACC, BLOCK_H
        )
        _, _, _, q = project(
            value, mu, scale, shift, units, in_h, project_weight, project_bias, ACC
        )
        finish_logits(
            q, in_p, n_in_tile, pid, count, first + own, logits, logits_partials, dlogits,
            final_sums, final_mean, final_variance, final_gamma, final_beta, FINAL_EPS, ACC,
        )  # fmt: skip


RUNTIME = ["total", "count", "partial_count", "partial_block"]


@triton.jit(do_not_specialize=[*RUNTIME, "H", "W", "positions"])
def _dilated_conv_kernel(
    source,
    weight,
    bias,
    out,
    partials,
    statistics,
    mean,
    variance,
    gamma,
    beta,
    out_partials,
    next_mean,
    next_variance,
    next_gamma,
    next_beta,
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
    H,
    W,
    positions,
    total,
    count,
    partial_count,
    partial_block,
    hidden,
    DILATION: tl.constexpr,
    EPS: tl.constexpr,
    NEXT_EPS: tl.constexpr,
    FINAL_EPS: tl.constexpr,
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
    """One program: every output channel of BLOCK_P positions. Grid: tiles."""
    conv_tile(
        tl.program_id(0), source, None, weight, bias, out, partials, statistics, mean, variance,
        gamma, beta, out_partials, next_mean, next_variance, next_gamma, next_beta,
        project_weight, project_bias, logits, logits_partials, dlogits, final_sums, final_mean,
        final_variance, final_gamma, final_beta, H, W, positions, total, count, partial_count,
        partial_block, hidden, DILATION, EPS, NEXT_EPS, FINAL_EPS, PRECISION, ACC, BLOCK_P,
        BLOCK_H, BLOCK_K, BLOCK_T, TAPS, USED, WRAPS, 1, source.dtype.element_ty,
    )  # fmt: skip


# --- launchers ----------------------------------------------------------------------------------


def norm_arguments(norm: Norm | None, prefix: str = "") -> dict[str, Tensor | None]:
    """gamma and beta, and the statistics where they are known."""
    named = ("mean", "variance", "gamma", "beta")
    return {prefix + name: None if norm is None else getattr(norm, name) for name in named}


def launch_conv(
    m: Map,
    source: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilation: int,
    norm: Norm | None,
    partials: Partials | None,
    statistics: Tensor | None,
    out: Tensor | None,
    out_partials: Tensor | None = None,
    projection: dict[str, object] | None = None,
) -> None:
    """One dilated convolution of relu(norm(source)); `projection` as `projection_arguments`.

    The weight is packed, [9, h, h] (`spatial_pack.prepare`).
    """
    launch(_dilated_conv_kernel, (m.count,),
        **conv_arguments(
            m, source, weight, bias, dilation, norm, partials, statistics, out, out_partials,
            projection,
        )
    )  # fmt: skip


def conv_arguments(
    m: Map,
    source: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilation: int,
    norm: Norm | None,
    partials: Partials | None,
    statistics: Tensor | None,
    out: Tensor | None,
    out_partials: Tensor | None = None,
    projection: dict[str, object] | None = None,
) -> dict[str, object]:
    """Of a kernel of `conv_tile`, by name, launch options among them."""
    arguments = norm_arguments(norm)
    if norm is None or partials is not None:
        arguments |= {"mean": None, "variance": None}
    return {
        "source": source,
        "weight": weight,
        "bias": None if bias is None else bias.contiguous(),
        "out": out,
        "partials": None if partials is None else partials.data,
        "statistics": None if partials is None else statistics,
        "out_partials": out_partials,
        "H": m.h,
        "W": m.w,
        "positions": m.positions,
        "DILATION": dilation,
        "EPS": 0.0 if norm is None else norm.eps,
        "PRECISION": conv_precision(m.dtype),
        "BLOCK_K": m.block_k,
        "BLOCK_T": max(16, m.block_t // m.taps[0]),
        "TAPS": m.taps[0],
        "USED": m.taps[1],
        "WRAPS": m.wraps,
        **m.sizes(),
        **(NO_PARTIALS if partials is None else partials.arguments()),
        **arguments,
        **(NO_PROJECTION if projection is None else projection),
        **m.constants(),
    }


def projection_arguments(
    next_norm: Norm | None,
    weight: Tensor,
    bias: Tensor | None,
    final: Norm | None,
    *,
    logits: Tensor | None = None,
    logits_partials: Tensor | None = None,
    dlogits: Tensor | None = None,
    final_sums: Tensor | None = None,
) -> dict[str, object]:
    """The arguments of a projection after a convolution."""
    return {
        **norm_arguments(next_norm, "next_"),
        "project_weight": weight.contiguous(),
        "project_bias": bias,
        "logits": logits,
        "logits_partials": logits_partials,
        "dlogits": dlogits,
        "final_sums": final_sums,
        **norm_arguments(final, "final_"),
        "NEXT_EPS": 0.0 if next_norm is None else next_norm.eps,
        "FINAL_EPS": 0.0 if final is None else final.eps,
    }


NO_PROJECTION = dict.fromkeys(
    (
        "next_mean", "next_variance", "next_gamma", "next_beta", "project_weight", "project_bias",
        "logits", "logits_partials", "dlogits", "final_sums",
        "final_mean", "final_variance", "final_gamma", "final_beta",
    )
) | {"NEXT_EPS": 0.0, "FINAL_EPS": 0.0}  # fmt: skip
