"""The C++ backend for CPU tensors: the operators on ``torch.ops.bam_kernels_cpp``.

The raw operators write into tensors that are made here; a tensor without elements stands for None.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bam_kernels import layout
from bam_kernels.backends import ABSENT, cpp_library, reference
from bam_kernels.backends.reference import (
    accumulator_dtype,
    norm_widths,
    pairs_size,
)
from bam_kernels.config import COMBINE_MODES

__all__ = [
    "bam_forward",
    "channel_mlp_backward",
    "channel_mlp_forward",
    "gate_backward_reduce",
    "gate_forward",
    "input_gradient",
    "pool_reduce_forward",
    "spatial_branch_backward",
    "spatial_branch_forward",
    "update_running",
]

cpp_library.load()
_raw = torch.ops.bam_kernels_cpp
_MODES = {name: i for i, name in enumerate(COMBINE_MODES)}


def _given(t: Tensor | None) -> Tensor:
    return ABSENT if t is None else t


def bam_forward(x: Tensor, params: list[Tensor], options: list[int], eps: list[float]) -> Tensor:
    """A whole module whose batch norms have known statistics; see csrc/operators.h."""
    x = layout.walkable(x)
    out = torch.empty_like(x)
    _raw.bam_forward(x, out, params, options, eps)
    return out


def pool_reduce_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, pool: bool
) -> tuple[Tensor, Tensor]:
    """(pooled [N, C], reduced [N, h, H, W] in x's memory format), in x's dtype; empty where absent.

    x [N, C, H, W]; weight [h, C], of x's dtype; bias [h].
    """
    x = layout.walkable(x)
    pooled = x.new_empty(x.shape[:2] if pool else 0)
    reduced = x.new_empty(0)
    if weight is not None:
        reduced = layout.empty_map(x, weight.shape[0], x.dtype)
    _raw.pool_reduce(x, _given(weight), _given(bias), pooled, reduced)
    return pooled, reduced


def gate_forward(
    x: Tensor, channel: Tensor | None, spatial: Tensor | None, combine: str, residual: bool
) -> Tensor:
    """x + x * M (or x * M). x [N, C, H, W]; channel [N, C]; spatial [N, 1, H, W], or None."""
    x = layout.walkable(x)
    out = torch.empty_like(x)
    _raw.gate_forward(x, _given(channel), _given(spatial), out, _MODES[combine], residual)
    return out


def gate_backward_reduce(
    dout: Tensor, x: Tensor, channel: Tensor | None, spatial: Tensor | None, combine: str
) -> tuple[Tensor, Tensor]:
    """The logits' gradients [N, C] and [N, 1, H, W], in the logits' dtypes; empty where absent."""
    x = layout.walkable(x)
    dout = layout.like(dout, x)
    dchannel, dspatial = (
        x.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (channel, spatial)
    )
    _raw.gate_gradient(
        dout, x, _given(channel), _given(spatial), dchannel, dspatial, _MODES[combine]
    )
    return dchannel, dspatial


def input_gradient(
    dout: Tensor | None,
    x: Tensor,
    channel: Tensor | None,
    spatial: Tensor | None,
    dpooled: Tensor | None,
    dreduced: Tensor | None,
    weight: Tensor | None,
    combine: str,
    residual: bool,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight [h, C], dbias [h]) in x's dtype; empty where not needed.

    dx is dout * (1 + M) + W^T dreduced + dpooled / (H * W), of what is given.
    """
    x = layout.walkable(x)
    hidden = 0 if dreduced is None else dreduced.shape[1]
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    dweight = x.new_empty((hidden, x.shape[1]) if need_dweight else 0)
    dbias = x.new_empty(hidden if need_dbias else 0)
    if dreduced is not None:
        dreduced = layout.walkable(dreduced)
    _raw.input_gradient(
        ABSENT if dout is None else layout.like(dout, x),
        x,
        _given(channel),
        _given(spatial),
        _given(dpooled),
        _given(dreduced),
        _given(weight),
        dx,
        dweight,
        dbias,
        _MODES[combine],
        residual,
    )
    return dx, dweight, dbias


def channel_mlp_forward(
    pooled: Tensor,
    *rest: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The channel branch behind the pooling; see `backends.reference.channel_mlp_forward`."""
    tensors, (hidden_norm, hidden_batch, hidden_eps, norm, batch, eps) = rest[:12], rest[12:]
    n, c = pooled.shape
    h = tensors[0].shape[0]
    wide = accumulator_dtype(pooled.dtype)
    hidden, last = (h if hidden_norm and hidden_batch else 0), (c if norm and batch else 0)
    logits, kept, *taken = (
        pooled.new_empty(size, dtype=wide) for size in ((n, c), (n, h), hidden, hidden, last, last)
    )
    _raw.channel_forward(
        pooled, [_given(t) for t in tensors], logits, kept, taken,
        [hidden_norm, hidden_batch, norm, batch], [hidden_eps, eps],
    )  # fmt: skip
    return logits, kept, *taken


def channel_mlp_backward(
    dlogits: Tensor, kept: Tensor, pooled: Tensor, *rest: object
) -> tuple[Tensor, ...]:
    """Its gradients; see `backends.reference.channel_mlp_backward`."""
    (hidden_norm, hidden_batch, hidden_eps, norm, batch, eps, need_pooled) = rest[11:]
    # The last norm's shift changes no gradient, and is not passed.
    tensors = [_given(t) for t in (*rest[:9], None, *rest[9:11])]
    weight0, _, weight1, _, hidden_gamma = tensors[:5]
    gamma = tensors[8]
    h, c = weight0.shape
    like_hidden = weight0 if hidden_gamma.numel() == 0 else hidden_gamma
    like = weight1 if gamma.numel() == 0 else gamma
    grads = [
        pooled.new_empty(pooled.shape if need_pooled else 0),
        weight0.new_empty((h, c)),
        weight0.new_empty(h),
        weight1.new_empty((c, h)),
        weight1.new_empty(c),
        *(like_hidden.new_empty(h if hidden_norm else 0) for _ in "gb"),
        *(like.new_empty(c if norm else 0) for _ in "gb"),
    ]
    _raw.channel_backward(
        dlogits.contiguous(), kept, pooled, tensors, grads,
        [hidden_norm, hidden_batch, norm, batch], [hidden_eps, eps],
    )  # fmt: skip
    return tuple(grads)


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
    """(logits [N, 1, H, W], statistics), as `backends.triton.spatial_branch_forward`."""
    reduced = layout.walkable(reduced)
    n, hidden, h, w = reduced.shape
    wide = accumulator_dtype(reduced.dtype)
    widths = norm_widths(hidden, len(weights), hidden_norm, norm)
    logits = reduced.new_empty((n, 1, h, w), dtype=wide)
    statistics = reduced.new_empty(pairs_size(widths, batch_stats), dtype=wide)
    _raw.spatial_forward(
        reduced, weights, biases, project_weight, _given(project_bias), gammas, betas, means,
        variances, logits, statistics, hidden_norm, norm, batch_stats, eps, dilation,
    )  # fmt: skip
    return logits, statistics


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
    """(dreduced, dconvolutions, dprojection, dnorms), as `backends.triton` has them."""
    reduced = layout.walkable(reduced)
    hidden = reduced.shape[1]
    widths = norm_widths(hidden, len(weights), hidden_norm, norm)
    dreduced = (
        layout.empty_map(reduced, hidden, reduced.dtype) if need_reduced else reduced.new_empty(0)
    )
    like = weights[0] if weights else reduced
    length = len(weights) * hidden * (9 * hidden + 1) if need_weights else 0
    dconvolutions = like.new_empty(length)
    dprojection = project_weight.new_empty(hidden + 1)
    dnorms = statistics.new_empty(pairs_size(widths))
    _raw.spatial_backward(
        dlogits.contiguous(), statistics, reduced, weights, biases, project_weight,
        _given(project_bias), gammas, betas, means, variances, dreduced, dconvolutions,
        dprojection, dnorms, hidden_norm, norm, batch_stats, eps, dilation,
    )  # fmt: skip
    return dreduced, dconvolutions, dprojection, dnorms


def update_running(
    means: list[Tensor],
    variances: list[Tensor],
    counters: list[Tensor],
    batch_means: list[Tensor],
    batch_variances: list[Tensor],
    counts: list[int],
    momenta: list[float],
) -> None:
    """In place, for each norm; see `backends.reference.update_running`."""
    if all(t.is_contiguous() for t in (*means, *variances)):
        _raw.update_running(
            means, variances, counters, batch_means, batch_variances, counts, momenta
        )
    else:
        reference.update_running(
            means, variances, counters, batch_means, batch_variances, counts, momenta
        )
