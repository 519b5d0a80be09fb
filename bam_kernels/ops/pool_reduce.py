"""Average pool and 1x1 reduction, the heads of Eq. 3 and 4, from one read of x."""

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


def fake(x, weight, bias, pool):
    x = layout.walkable(x)
    return (
        x.new_empty((x.shape[0], x.shape[1]) if pool else 0),
        x.new_empty(0) if weight is None else layout.empty_map(x, weight.shape[0], x.dtype),
    )


register(
    "pool_reduce(Tensor x, Tensor? weight, Tensor? bias, bool pool) -> (Tensor, Tensor)",
    lambda x, *rest: backend_of(x).pool_reduce_forward(x, *rest),
    fake,
)


def setup(ctx, inputs, output):
    x, weight, bias, ctx.pool = inputs[:4]
    ctx.reduce = weight is not None
    ctx.save_for_backward(x, weight, bias)
    ctx.set_materialize_grads(False)


def _of_outputs_that_exist(ctx, dpooled, dreduced):
    """An output that was not asked for is empty, and so would be the gradient that it is given."""
    return dpooled if ctx.pool else None, dreduced if ctx.reduce else None


def gradient(ctx, dpooled, dreduced, dout, channel, spatial, combine, residual):
    """(dx, dweight, dbias): of the pooling and reduction, and of the gate where dout is given."""
    x, weight, _ = ctx.saved_tensors
    dpooled, dreduced = _of_outputs_that_exist(ctx, dpooled, dreduced)
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    need_weight = need_weight and dreduced is not None
    need_bias = need_bias and dreduced is not None
    if dpooled is None and dreduced is None and dout is None:
        return None, None, None
    # The bias's gradient comes with the weight's walk; alone it is a sum over a small map.
    dx, dweight, dbias = torch.ops.bam_kernels.input_gradient(
        dout, x, channel, spatial, dpooled, dreduced, weight, combine, residual,
        need_x, need_weight, need_weight and need_bias,
    )  # fmt: skip
    if need_bias and not need_weight:
        dbias = dreduced.sum(dim=(0, 2, 3)).to(x.dtype)
    return (
        dx if need_x else None,
        dweight if need_weight else None,
        dbias if need_bias else None,
    )


def differentiable_gradient(ctx, dpooled, dreduced):
    inputs = (*ctx.saved_tensors, ctx.pool)
    grads = _of_outputs_that_exist(ctx, dpooled, dreduced)
    return differentiable_backward(
        reference.pool_reduce_forward, inputs, ctx.needs_input_grad[:3], grads
    )


def _pool_reduce_backward(ctx, dpooled, dreduced):
    if torch.is_grad_enabled():
        return tuple(differentiable_gradient(ctx, dpooled, dreduced))
    return (
        *gradient(ctx, dpooled, dreduced, None, None, None, "sum", True),
        None,
    )


register_autograd("pool_reduce", setup, _pool_reduce_backward)
