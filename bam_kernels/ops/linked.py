"""The pair that a whole module uses, joined by links: see `bam_kernels.ops`."""

from __future__ import annotations

import torch
from torch import Tensor

from bam_kernels import layout
from bam_kernels.backends import reference
from bam_kernels.ops import pool_reduce
from bam_kernels.ops.gate import logit_gradients
from bam_kernels.ops.registry import (
    backend_of,
    differentiable_backward,
    register,
    register_autograd,
)


def _links(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs without data, of the shapes of the factors that come back as their gradients."""
    n, c, h, w = x.shape
    wide = reference.accumulator_dtype(x.dtype)
    return (
        x.new_empty(1).expand(n, c, h, w),
        x.new_empty(1, dtype=wide).expand(n, c),
        x.new_empty(1, dtype=wide).expand(n, 1, h, w),
    )


def _pool_reduce_linked(x, weight, bias, pool, combine, residual):
    return *backend_of(x).pool_reduce_forward(x, weight, bias, pool), *_links(x)


register(
    "pool_reduce_linked(Tensor x, Tensor? weight, Tensor? bias, bool pool, str combine,"
    " bool residual) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _pool_reduce_linked,
    lambda x, weight, bias, pool, *_: (*pool_reduce.fake(x, weight, bias, pool), *_links(x)),
)


def _pool_reduce_linked_setup(ctx, inputs, output):
    pool_reduce.setup(ctx, inputs, output)
    ctx.combine, ctx.residual = inputs[4:]


def _pool_reduce_linked_backward(ctx, dpooled, dreduced, dout, channel, spatial):
    if torch.is_grad_enabled():
        # gate_linked, in the same mode, sent its true gradient of x in the place of dout.
        grads = pool_reduce.differentiable_gradient(ctx, dpooled, dreduced)
        if ctx.needs_input_grad[0] and dout is not None:
            grads[0] = dout if grads[0] is None else grads[0] + dout
        return *grads, None, None
    grads = pool_reduce.gradient(
        ctx, dpooled, dreduced, dout, channel, spatial, ctx.combine, ctx.residual
    )
    return *grads, None, None, None


register_autograd("pool_reduce_linked", _pool_reduce_linked_setup, _pool_reduce_linked_backward)


def _gate_linked(x, channel, spatial, x_link, channel_link, spatial_link, combine, residual):
    return backend_of(x).gate_forward(x, channel, spatial, combine, residual)


register(
    "gate_linked(Tensor x, Tensor? channel_logits, Tensor? spatial_logits, Tensor x_link,"
    " Tensor channel_link, Tensor spatial_link, str combine, bool residual) -> Tensor",
    _gate_linked,
    lambda x, *_: torch.empty_like(layout.walkable(x)),
)


def _gate_linked_setup(ctx, inputs, output):
    x, channel, spatial = inputs[:3]
    ctx.combine, ctx.residual = inputs[6:]
    ctx.save_for_backward(x, channel, spatial)
    ctx.set_materialize_grads(False)


def _gate_linked_backward(ctx, dout):
    if dout is None:
        return (None,) * 8
    x, channel, spatial = ctx.saved_tensors
    need_x = ctx.needs_input_grad[3]
    if torch.is_grad_enabled():
        inputs = (x, channel, spatial, ctx.combine, ctx.residual)
        needs = (need_x, *ctx.needs_input_grad[1:3])
        dx, dchannel, dspatial, _, _ = differentiable_backward(
            reference.gate_forward, inputs, needs, [dout]
        )
        return None, dchannel, dspatial, dx, None, None, None, None
    wide = reference.accumulator_dtype(x.dtype)
    return (
        None,
        *logit_gradients(ctx, dout, x, channel, spatial),
        dout if need_x else None,
        None if channel is None or not need_x else channel.detach().to(wide),
        None if spatial is None or not need_x else spatial.detach().to(wide),
        None,
        None,
    )


register_autograd("gate_linked", _gate_linked_setup, _gate_linked_backward)
