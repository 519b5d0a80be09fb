"""The operators ``torch.ops.bam_kernels.*``: schemas, fakes and autograd.

Python owns the namespace, so that the operators exist wherever torch does; which backend computes
them is decided at each call. They check nothing: `bam_kernels.functional` does, before it calls
them. All are functional and of fixed arity; an output that is not asked for is empty.

First derivatives run on the backend's own backward operators. Where a graph of the backward is
asked for (``create_graph=True``), the gradient is that of the plain PyTorch composition of the same
operator (`bam_kernels.backends.reference`), which autograd can differentiate any number of times.

``pool_reduce_linked`` and ``gate_linked`` are one differentiable function in two parts, as used by
a whole module, where both read the same x. Apart, each would make an x-sized gradient and autograd
would add them: 9 passes over x-sized memory. Linked, the gate's gradient of x stays in factors:
dout * (1 + M(c, s)) travels as its factors dout, c and s, as the gradients of three link outputs of
``pool_reduce_linked`` (which hold no data), and one kernel there makes the sum: 5 passes. The true
gradient of x leaves ``pool_reduce_linked``; no factor is visible outside of the pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bam_kernels import dispatch, layout
from bam_kernels.backends import reference

_DEVICES = ("CPU", "CUDA", "XPU")

_library = torch.library.Library("bam_kernels", "DEF")


def _backend(x: Tensor) -> ModuleType:
    if dispatch.choose_backend(x) == "triton":
        from bam_kernels.backends import triton

        return triton
    return reference


def _register(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema[: schema.index("(")]
    _library.define(schema)
    for device in _DEVICES:
        _library.impl(name, run, device)
    torch.library.register_fake(f"bam_kernels::{name}", fake, lib=_library)


def _register_autograd(
    name: str, setup: Callable[..., None], backward: Callable[..., tuple[Tensor | None, ...]]
) -> None:
    torch.library.register_autograd(
        f"bam_kernels::{name}", backward, setup_context=setup, lib=_library
    )


def _differentiable_backward(
    forward: Callable[..., Any],
    inputs: Sequence[Any],
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradient of a plain composition as a graph; `grads` belong to its outputs, in order."""
    with torch.enable_grad():
        outputs = forward(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [
            (out, grad)
            for out, grad in zip(outputs, grads, strict=False)
            if grad is not None and out.requires_grad
        ]
        wanted = [t for t, need in zip(inputs, needs, strict=False) if need]
        if not pairs or not wanted:
            return [None] * len(inputs)
        found = iter(
            torch.autograd.grad(
                [out for out, _ in pairs],
                wanted,
                [grad for _, grad in pairs],
                create_graph=True,
                allow_unused=True,
            )
        )
    result: list[Tensor | None] = [next(found) if need else None for need in needs]
    return result + [None] * (len(inputs) - len(result))


# --- gate (Eq. 1-2) ---------------------------------------------------------------------------


def _gate_fake(x, channel_logits, spatial_logits, combine, residual):
    return torch.empty_like(layout.walkable(x))


_register(
    "gate(Tensor x, Tensor? channel_logits, Tensor? spatial_logits, str combine, bool residual)"
    " -> Tensor",
    lambda x, *rest: _backend(x).gate_forward(x, *rest),
    _gate_fake,
)


def _gate_backward_reduce_fake(dout, x, channel_logits, spatial_logits, combine):
    def like(t):
        if t is None:
            return x.new_empty(0)
        return torch.empty_like(t, memory_format=torch.contiguous_format)

    return like(channel_logits), like(spatial_logits)


_register(
    "gate_backward_reduce(Tensor dout, Tensor x, Tensor? channel_logits, Tensor? spatial_logits,"
    " str combine) -> (Tensor, Tensor)",
    lambda dout, x, *rest: _backend(x).gate_backward_reduce(dout, x, *rest),
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


_register(
    "input_gradient(Tensor? dout, Tensor x, Tensor? channel_logits, Tensor? spatial_logits,"
    " Tensor? dpooled, Tensor? dreduced, Tensor? weight, str combine, bool residual,"
    " bool need_dx, bool need_dweight, bool need_dbias) -> (Tensor, Tensor, Tensor)",
    lambda dout, x, *rest: _backend(x).input_gradient(dout, x, *rest),
    _input_gradient_fake,
)


def _gate_setup(ctx, inputs, output):
    x, channel, spatial, ctx.combine, ctx.residual = inputs
    ctx.save_for_backward(x, channel, spatial)
    ctx.set_materialize_grads(False)


def _gate_reduce(ctx, dout, x, channel, spatial):
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
            _differentiable_backward(
                reference.gate_forward, inputs, ctx.needs_input_grad[:3], [dout]
            )
        )
    dx = None
    if ctx.needs_input_grad[0]:
        dx, _, _ = torch.ops.bam_kernels.input_gradient(
            dout, x, channel, spatial, None, None, None, ctx.combine, ctx.residual,
            True, False, False,
        )  # fmt: skip
    return dx, *_gate_reduce(ctx, dout, x, channel, spatial), None, None


_register_autograd("gate", _gate_setup, _gate_backward)


# --- pool_reduce (the heads of Eq. 3 and 4) ---------------------------------------------------


def _pool_reduce_fake(x, weight, bias, pool):
    x = layout.walkable(x)
    return (
        x.new_empty((x.shape[0], x.shape[1]) if pool else 0),
        x.new_empty(0) if weight is None else layout.empty_map(x, weight.shape[0], x.dtype),
    )


_register(
    "pool_reduce(Tensor x, Tensor? weight, Tensor? bias, bool pool) -> (Tensor, Tensor)",
    lambda x, *rest: _backend(x).pool_reduce_forward(x, *rest),
    _pool_reduce_fake,
)


def _pool_reduce_setup(ctx, inputs, output):
    x, weight, bias, ctx.pool = inputs[:4]
    ctx.save_for_backward(x, weight, bias)
    ctx.set_materialize_grads(False)


def _of_outputs_that_exist(ctx, dpooled, dreduced):
    """An output that was not asked for is empty, and so would be the gradient that it is given."""
    weight = ctx.saved_tensors[1]
    return dpooled if ctx.pool else None, None if weight is None else dreduced


def _pool_reduce_gradient(ctx, dpooled, dreduced, dout, channel, spatial, combine, residual):
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


def _pool_reduce_differentiable(ctx, dpooled, dreduced):
    inputs = (*ctx.saved_tensors, ctx.pool)
    grads = _of_outputs_that_exist(ctx, dpooled, dreduced)
    return _differentiable_backward(
        reference.pool_reduce_forward, inputs, ctx.needs_input_grad[:3], grads
    )


def _pool_reduce_backward(ctx, dpooled, dreduced):
    if torch.is_grad_enabled():
        return tuple(_pool_reduce_differentiable(ctx, dpooled, dreduced))
    return (
        *_pool_reduce_gradient(ctx, dpooled, dreduced, None, None, None, "sum", True),
        None,
    )


_register_autograd("pool_reduce", _pool_reduce_setup, _pool_reduce_backward)


# --- the linked pair --------------------------------------------------------------------------


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
    return *_backend(x).pool_reduce_forward(x, weight, bias, pool), *_links(x)


_register(
    "pool_reduce_linked(Tensor x, Tensor? weight, Tensor? bias, bool pool, str combine,"
    " bool residual) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _pool_reduce_linked,
    lambda x, weight, bias, pool, *_: (*_pool_reduce_fake(x, weight, bias, pool), *_links(x)),
)


def _pool_reduce_linked_setup(ctx, inputs, output):
    _pool_reduce_setup(ctx, inputs, output)
    ctx.combine, ctx.residual = inputs[4:]


def _pool_reduce_linked_backward(ctx, dpooled, dreduced, dout, channel, spatial):
    if torch.is_grad_enabled():
        # gate_linked, in the same mode, sent its true gradient of x in the place of dout.
        grads = _pool_reduce_differentiable(ctx, dpooled, dreduced)
        if ctx.needs_input_grad[0] and dout is not None:
            grads[0] = dout if grads[0] is None else grads[0] + dout
        return *grads, None, None
    grads = _pool_reduce_gradient(
        ctx, dpooled, dreduced, dout, channel, spatial, ctx.combine, ctx.residual
    )
    return *grads, None, None, None


_register_autograd("pool_reduce_linked", _pool_reduce_linked_setup, _pool_reduce_linked_backward)


def _gate_linked(x, channel, spatial, x_link, channel_link, spatial_link, combine, residual):
    return _backend(x).gate_forward(x, channel, spatial, combine, residual)


_register(
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
        dx, dchannel, dspatial, _, _ = _differentiable_backward(
            reference.gate_forward, inputs, needs, [dout]
        )
        return None, dchannel, dspatial, dx, None, None, None, None
    wide = reference.accumulator_dtype(x.dtype)
    return (
        None,
        *_gate_reduce(ctx, dout, x, channel, spatial),
        dout if need_x else None,
        None if channel is None or not need_x else channel.detach().to(wide),
        None if spatial is None or not need_x else spatial.detach().to(wide),
        None,
        None,
    )


_register_autograd("gate_linked", _gate_linked_setup, _gate_linked_backward)


# --- channel_mlp (Eq. 3 behind the pooling) ---------------------------------------------------

_MLP_TENSORS = (
    "Tensor pooled, Tensor weight0, Tensor? bias0, Tensor weight1, Tensor? bias1,"
    " Tensor? hidden_gamma, Tensor? hidden_beta, Tensor? hidden_mean, Tensor? hidden_var,"
    " Tensor? gamma, Tensor? beta, Tensor? mean, Tensor? var"
)
_MLP_OPTIONS = (
    "bool hidden_norm, bool hidden_batch_stats, float hidden_eps, bool norm, bool batch_stats,"
    " float eps"
)


def _channel_mlp_fake(pooled, weight0, bias0, weight1, bias1, *rest):
    hidden_norm, hidden_batch_stats, _, norm, batch_stats, _ = rest[8:]
    wide = reference.accumulator_dtype(pooled.dtype)
    hidden = weight0.shape[0] if hidden_norm and hidden_batch_stats else 0
    channels = pooled.shape[1] if norm and batch_stats else 0
    sizes = [tuple(pooled.shape), (hidden,), (hidden,), (channels,), (channels,)]
    return tuple(pooled.new_empty(size, dtype=wide) for size in sizes)


_register(
    f"channel_mlp({_MLP_TENSORS}, {_MLP_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda pooled, *rest: _backend(pooled).channel_mlp_forward(pooled, *rest),
    _channel_mlp_fake,
)

_MLP_BACKWARD_TENSORS = _MLP_TENSORS.replace(" Tensor? beta,", "")


def _channel_mlp_backward_fake(dlogits, pooled, weight0, bias0, weight1, *rest):
    hidden_norm, norm = rest[8], rest[11]
    wide = reference.accumulator_dtype(pooled.dtype)
    h, c = weight0.shape
    h_norm, c_norm = h if hidden_norm else 0, c if norm else 0
    sizes = [
        tuple(pooled.shape), (h, c), (h,), (c, h), (c,), (h_norm,), (h_norm,), (c_norm,), (c_norm,),
    ]  # fmt: skip
    return tuple(pooled.new_empty(size, dtype=wide) for size in sizes)


_register(
    f"channel_mlp_backward(Tensor dlogits, {_MLP_BACKWARD_TENSORS}, {_MLP_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.channel_mlp_backward,
    _channel_mlp_backward_fake,
)


def _channel_mlp_setup(ctx, inputs, output):
    ctx.options = inputs[13:]
    ctx.save_for_backward(*inputs[:13])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])


def _channel_mlp_autograd_backward(ctx, dlogits, *_):
    if dlogits is None:
        return (None,) * 19
    inputs = ctx.saved_tensors
    needs = ctx.needs_input_grad[:13]
    if torch.is_grad_enabled():
        return tuple(
            _differentiable_backward(
                reference.channel_mlp_forward, (*inputs, *ctx.options), needs, [dlogits]
            )
        )
    grads = torch.ops.bam_kernels.channel_mlp_backward(
        dlogits, *inputs[:10], *inputs[11:], *ctx.options
    )
    # From the gradients' order to the inputs': the statistics have none.
    ordered = [*grads[:7], None, None, *grads[7:], None, None]
    return *(
        grad.to(t.dtype) if need and grad is not None else None
        for grad, need, t in zip(ordered, needs, inputs, strict=True)
    ), *(None,) * 6


_register_autograd("channel_mlp", _channel_mlp_setup, _channel_mlp_autograd_backward)
