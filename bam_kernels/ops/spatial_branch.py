"""The spatial branch behind the reduction (Eq. 4)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from bam_kernels.backends import reference
from bam_kernels.dispatch import no_autocast
from bam_kernels.ops.registry import backend_of, register, register_autograd

_TENSORS = (
    "Tensor reduced, Tensor[] weights, Tensor[] biases, Tensor project_weight,"
    " Tensor? project_bias, Tensor[] gammas, Tensor[] betas, Tensor[] means, Tensor[] variances"
)
_OPTIONS = "bool hidden_norm, bool norm, bool[] batch_stats, float[] eps, int dilation"


def _fake(reduced, weights, biases, project_weight, project_bias, *rest):
    hidden_norm, norm, batch_stats = rest[4:7]
    n, hidden, h, w = reduced.shape
    wide = reference.accumulator_dtype(reduced.dtype)
    widths = reference.norm_widths(hidden, len(weights), hidden_norm, norm)
    size = reference.pairs_size(widths, batch_stats)
    return reduced.new_empty((n, 1, h, w), dtype=wide), reduced.new_empty(size, dtype=wide)


register(
    f"spatial_branch({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor)",
    lambda reduced, *rest: backend_of(reduced).spatial_branch_forward(reduced, *rest),
    _fake,
)


def _backward_fake(dlogits, statistics, reduced, weights, biases, project_weight, *rest):
    need_reduced, need_weights = rest[-2:]
    hidden_norm, norm = rest[5:7]
    hidden = reduced.shape[1]
    widths = reference.norm_widths(hidden, len(weights), hidden_norm, norm)
    length = len(weights) * hidden * (9 * hidden + 1) if need_weights else 0
    like = weights[0] if weights else reduced
    dense = reduced.is_contiguous() or not reduced.is_contiguous(memory_format=torch.channels_last)
    fmt = torch.contiguous_format if dense else torch.channels_last
    return (
        torch.empty_like(reduced, memory_format=fmt) if need_reduced else reduced.new_empty(0),
        like.new_empty(length),
        project_weight.new_empty(hidden + 1),
        statistics.new_empty(reference.pairs_size(widths)),
    )


register(
    f"spatial_branch_backward(Tensor dlogits, Tensor statistics, {_TENSORS}, {_OPTIONS},"
    " bool need_reduced, bool need_weights) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda dlogits, *rest: backend_of(dlogits).spatial_branch_backward(dlogits, *rest),
    _backward_fake,
)


def _flatten(inputs: Iterable[Any]) -> tuple[list[Tensor], list[int | None]]:
    """The tensors of an argument list, and how many each argument holds; None: itself or None."""
    flat: list[Tensor] = []
    lengths: list[int | None] = []
    for value in inputs:
        flat += value if isinstance(value, list) else [value]
        lengths.append(len(value) if isinstance(value, list) else None)
    return flat, lengths


def _unflatten(flat: Iterable[Any], lengths: list[int | None]) -> list[Any]:
    items = iter(flat)
    return [
        next(items) if length is None else [next(items) for _ in range(length)]
        for length in lengths
    ]


def _setup(ctx, inputs, output):
    tensors, ctx.options = [*inputs[:9]], inputs[9:]
    flat, ctx.lengths = _flatten(list(t) if isinstance(t, tuple) else t for t in tensors)
    ctx.save_for_backward(output[1], *flat)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])


def _differentiable(ctx, dlogits: Tensor, flat: list[Tensor | None]) -> list[Any]:
    needs, _ = _flatten(ctx.needs_input_grad[:9])
    with torch.enable_grad(), no_autocast(dlogits):
        # Partial derivatives, by aliases: one input may depend on another.
        flat = [None if t is None else t.view_as(t) for t in flat]
        logits, _ = reference.spatial_branch_forward(*_unflatten(flat, ctx.lengths), *ctx.options)
        wanted = [t for t, need in zip(flat, needs, strict=True) if need]
        found = iter(
            torch.autograd.grad(logits, wanted, dlogits, create_graph=True, allow_unused=True)
        )
    return _unflatten([next(found) if need else None for need in needs], ctx.lengths)


def _backward(ctx, dlogits, _):
    none = [None if length is None else [None] * length for length in ctx.lengths]
    # An empty list of numbers passes for one of tensors.
    rest = [
        [] if isinstance(option, list | tuple) and not option else None for option in ctx.options
    ]
    if dlogits is None:
        return *none, *rest
    statistics, *flat = ctx.saved_tensors
    # Batched gradients (is_grads_batched) too: torch makes no fallback for lists of tensors.
    if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(dlogits):
        return *_differentiable(ctx, dlogits, flat), *rest
    inputs = _unflatten(flat, ctx.lengths)
    needs = ctx.needs_input_grad[:7]
    need_convs = any(needs[1]) or any(needs[2])
    dreduced, *packed = torch.ops.bam_kernels.spatial_branch_backward(
        dlogits, statistics, *inputs, *ctx.options, needs[0], need_convs
    )
    grads = reference.split_spatial_gradients(*packed, inputs[5], len(inputs[1]), *ctx.options[:2])
    found = [dreduced, *grads]
    return (
        *(_where(*each) for each in zip(needs, found, inputs[:7], strict=True)),
        *none[7:],
        *rest,
    )


def _where(need: Any, grad: Any, like: Any) -> Any:
    """A gradient, or a list of them, where it is needed: in the argument's shape and dtype."""
    if not isinstance(need, Sequence):
        return grad.view(like.shape).to(like.dtype) if need else None
    if not need:
        return []
    return [_where(*each) for each in zip(need, grad or need, like, strict=True)]


register_autograd("spatial_branch", _setup, _backward)
