"""The dilated 3x3 convolutions of the spatial branch (Eq. 4), a launch each, and the projection.

The norm and ReLU in front of a convolution are applied as its input is loaded; statistics of its
output leave with it, one partial a program. The last one can make the projection to one channel.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bam_kernels.backends.triton.device_math import dot, map_offsets, narrow
from bam_kernels.backends.triton.launch import conv_precision, launch
from bam_kernels.backends.triton.spatial_layout import NO_PARTIALS, Map, Norm, Partials
from bam_kernels.backends.triton.spatial_math import (
    affine,
    input_affine,
    project,
    relu,
    scalar_affine,
    store_statistics,
    store_total,
    tap_mask,
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
    N,
    H,
    W,
    positions,
    tiles,
    count,
    partial_count,
    partial_tiles,
    partial_positions,
    partial_block,
    stride_out,
    stride_in,
    stride_tap,
    hidden,
    DILATION: tl.constexpr,
    EPS: tl.constexpr,
    NEXT_EPS: tl.constexpr,
    FINAL_EPS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SPLITS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Every output channel of BLOCK_P positions of one sample; `pid` is its tile of N x tiles.

    With SPLITS above 1 the source is the reduction in parts [N, SPLITS, h * P] in the accumulator's
    type, to be added up with `source_bias` and rounded to DTYPE, the maps' type.
    """
    n = (pid // tiles).to(tl.int64)
    tile = pid % tiles
    columns = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    in_p = columns < positions
    row = columns // W
    column = columns % W
    units = tl.arange(0, BLOCK_H)
    in_h = units < hidden
    stride = hidden if CHANNELS_LAST else positions
    NORM: tl.constexpr = partials is not None or mean is not None
    source += n * SPLITS * hidden * positions

    acc = tl.zeros((BLOCK_H, BLOCK_P), ACC)
    for k in tl.static_range(0, BLOCK_H, BLOCK_K):
        ins = k + tl.arange(0, BLOCK_K)
        in_k = ins < hidden
        mu, scale, shift = input_affine(
            partials, partial_count, partial_tiles, partial_positions, partial_block, N,
            statistics, mean, variance, gamma, beta, ins, in_k, hidden, EPS, ACC, BLOCK_K, BLOCK_T,
        )  # fmt: skip
        at = map_offsets(ins, columns, stride, 1, CHANNELS_LAST)
        at_w = units[:, None] * stride_out + ins[None, :] * stride_in
        in_w = in_h[:, None] & in_k[None, :]
        for tap in range(9):
            down = (tap // 3 - 1) * DILATION
            right = (tap % 3 - 1) * DILATION
            inside = tap_mask(row, column, down, right, H, W, in_p)
            step = down * W + right
            if CHANNELS_LAST:
                step *= hidden
            mask = in_k[:, None] & inside[None, :]
            value = tl.load(source + (at + step), mask=mask, other=0.0).to(ACC)
            for split in tl.static_range(1, SPLITS):
                part = source + split * hidden * positions
                value += tl.load(part + (at + step), mask=mask, other=0.0)
            if SPLITS > 1:
                if source_bias is not None:
                    offset = tl.load(source_bias + ins, mask=in_k, other=0.0).to(ACC)
                    value = tl.where(mask, value + offset[:, None], 0.0)
                value = narrow(value, DTYPE).to(ACC)
            if NORM:
                value = (value - mu[:, None]) * scale[:, None] + shift[:, None]
                value = tl.where(mask, value, 0.0)
            w = tl.load(weight + (at_w + tap * stride_tap), mask=in_w, other=0.0)
            acc = dot(narrow(w.to(ACC), DTYPE), narrow(relu(value), DTYPE), acc, PRECISION)
    if bias is not None:
        acc += tl.load(bias + units, mask=in_h, other=0.0).to(ACC)[:, None]

    rounded = narrow(acc, DTYPE)
    mask = in_h[:, None] & in_p[None, :]
    if out is not None:
        at = map_offsets(units, columns, stride, 1, CHANNELS_LAST)
        tl.store(out + n * hidden * positions + at, rounded, mask=mask)
    value = rounded.to(ACC)
    n_in_tile = tl.minimum(positions - tile * BLOCK_P, BLOCK_P)
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
            q, in_p, n_in_tile, pid, count, n * positions + columns, logits, logits_partials,
            dlogits, final_sums, final_mean, final_variance, final_gamma, final_beta, FINAL_EPS,
            ACC,
        )  # fmt: skip


RUNTIME = ["N", "positions", "tiles", "partial_count", "partial_tiles", "partial_positions"]
RUNTIME += ["partial_block", "count"]


@triton.jit(do_not_specialize=[*RUNTIME, "H", "W", "stride_out", "stride_in", "stride_tap"])
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
    N,
    H,
    W,
    positions,
    tiles,
    count,
    partial_count,
    partial_tiles,
    partial_positions,
    partial_block,
    stride_out,
    stride_in,
    stride_tap,
    hidden,
    DILATION: tl.constexpr,
    EPS: tl.constexpr,
    NEXT_EPS: tl.constexpr,
    FINAL_EPS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One program: every output channel of BLOCK_P positions of one sample. Grid: N x tiles."""
    conv_tile(
        tl.program_id(0), source, None, weight, bias, out, partials, statistics, mean, variance,
        gamma, beta, out_partials, next_mean, next_variance, next_gamma, next_beta,
        project_weight, project_bias, logits, logits_partials, dlogits, final_sums, final_mean,
        final_variance, final_gamma, final_beta, N, H, W, positions, tiles, count, partial_count,
        partial_tiles, partial_positions, partial_block, stride_out, stride_in, stride_tap,
        hidden, DILATION, EPS, NEXT_EPS, FINAL_EPS, CHANNELS_LAST, PRECISION, ACC, BLOCK_P,
        BLOCK_H, BLOCK_K, BLOCK_T, 1, source.dtype.element_ty,
    )  # fmt: skip


# --- launchers ----------------------------------------------------------------------------------


def norm_arguments(norm: Norm | None, prefix: str = "") -> dict[str, Tensor | None]:
    """gamma and beta, and the statistics where they are known."""
    named = ("mean", "variance", "gamma", "beta")
    return {prefix + name: None if norm is None else getattr(norm, name) for name in named}


def spread(weight: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """A [h, h, 3, 3] weight, and its strides along output, input and tap."""
    if weight.stride(2) != 3 * weight.stride(3):
        weight = weight.contiguous()
    return weight, (weight.stride(0), weight.stride(1), weight.stride(3))


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
    """One dilated convolution of relu(norm(source)); `projection` as `projection_arguments`."""
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
    weight, (stride_out, stride_in, stride_tap) = spread(weight)
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
        "N": 1 if partials is not None and partials.count == 1 else m.n,
        "H": m.h,
        "W": m.w,
        "positions": m.positions,
        "tiles": m.tiles,
        "count": m.count,
        "stride_out": stride_out,
        "stride_in": stride_in,
        "stride_tap": stride_tap,
        "hidden": m.hidden,
        "DILATION": dilation,
        "EPS": 0.0 if norm is None else norm.eps,
        "PRECISION": conv_precision(m.dtype),
        "BLOCK_K": m.block_k,
        "BLOCK_T": m.block_t,
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
