"""The gate (Eq. 1-2) and the reductions of its gradient."""

from __future__ import annotations

import torch

from bam_kernels import layout
from bam_kernels.backends import reference
from bam_kernels.ops.registry import (
    backend_of,
    differentiable_backward,
    register,
    register_autograd,
)


def _gate_fake(x, channel_logits, spatial_logits, combine, residual):
    return torch.empty_like(layout.walkable(x))


register(
    "gate(Tensor x, Tensor? channel_logits, Tensor? spatial_logits, str combine, bool residual)"
    " -> Tensor",
    lambda x, *rest: backend_of(x).gate_forward(x, *rest),
    _gate_fake,
)


def _gate_backward_reduce_fake(dout, x, channel_logits, spatial_logits, combine):
    def like(t):
        if t is None:
            return x.new_empty(0)
        return torch.empty_like(t, memory_format=torch.contiguous_format)

    return like(channel_logits), like(spatial_logits)


register(
    "gate_backward_reduce(Tensor dout, Tensor x, Tensor? channel_logits, Tensor? spatial_logits,"
    " str combine) -> (Tensor, Tensor)",
    lambda dout, x, *rest: backend_of(x).gate_backward_reduce(dout, x, *rest),
    _gate_backward_reduce_fake,
)


def _input_gradient_fake(
    dout, x, channel, spatial, dpooled, dreduced, weight, combine, residual,
    need_dx, need_dweight, need_dbias,
):  # fmt: skip
    hidden = 0 if dreduced is None else dreduced.shape[1]
    return (
        torch.empty_like(layout.walkable(x)) if need_dx else x.new_empty(0),
        x.new_empty((hidden, x.shape[1])) if need_dweight else x.new_empty(0),
        x.new_empty(hidden) if need_dbias else x.new_empty(0),
    )


register(
    "input_gradient(Tensor? dout, Tensor x, Tensor? channel_logits, Tensor? spatial_logits,"
    " Tensor? dpooled, Tensor? dreduced, Tensor? weight, str combine, bool residual,"
    " bool need_dx, bool need_dweight, bool need_dbias) -> (Tensor, Tensor, Tensor)",
    lambda dout, x, *rest: backend_of(x).input_gradient(dout, x, *rest),
    _input_gradient_fake,
)


def _gate_setup(ctx, inputs, output):
    x, channel, spatial, ctx.combine, ctx.residual = inputs
    ctx.save_for_backward(x, channel, spatial)
    ctx.set_materialize_grads(False)


def logit_gradients(ctx, dout, x, channel, spatial):
    _, need_channel, need_spatial = ctx.needs_input_grad[:3]
    if not (need_channel or need_spatial):
        return None, None
    dchannel, dspatial = torch.ops.bam_kernels.gate_backward_reduce(
        dout, x, channel, spatial, ctx.combine
    )
    return dchannel if need_channel else None, dspatial if need_spatial else None


def _gate_backward(ctx, dout):
    if dout is None:
        return (None,) * 5
    x, channel, spatial = ctx.saved_tensors
    if torch.is_grad_enabled():
        inputs = (x, channel, spatial, ctx.combine, ctx.residual)
        return tuple(
            differentiable_backward(
                reference.gate_forward, inputs, ctx.needs_input_grad[:3], [dout]
            )
        )
    dx = None
    if ctx.needs_input_grad[0]:
        dx, _, _ = torch.ops.bam_kernels.input_gradient(
            dout, x, channel, spatial, None, None, None, ctx.combine, ctx.residual,
            True, False, False,
        )  # fmt: skip
    return dx, *logit_gradients(ctx, dout, x, channel, spatial), None, None


register_autograd("gate", _gate_setup, _gate_backward)
