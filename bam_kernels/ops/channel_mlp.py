"""The channel branch behind the pooling (Eq. 3)."""

from __future__ import annotations

import torch

from bam_kernels.backends import reference
from bam_kernels.dispatch import no_autocast
from bam_kernels.ops.registry import (
    backend_of,
    differentiable_backward,
    register,
    register_autograd,
)

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
    kept = (pooled.shape[0], weight0.shape[0])
    sizes = [tuple(pooled.shape), kept, (hidden,), (hidden,), (channels,), (channels,)]
    return tuple(pooled.new_empty(size, dtype=wide) for size in sizes)


register(
    f"channel_mlp({_MLP_TENSORS}, {_MLP_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor,"
    " Tensor)",
    lambda pooled, *rest: backend_of(pooled).channel_mlp_forward(pooled, *rest),
    _channel_mlp_fake,
)

_MLP_BACKWARD_TENSORS = _MLP_TENSORS.replace(" Tensor? beta,", "")


def _channel_mlp_backward(dlogits, *rest):
    with no_autocast(dlogits):
        return backend_of(dlogits).channel_mlp_backward(dlogits, *rest)


def _channel_mlp_backward_fake(dlogits, kept, pooled, weight0, bias0, weight1, *rest):
    hidden_gamma, gamma, hidden_norm, norm, need_pooled = (
        rest[1],
        rest[5],
        rest[8],
        rest[11],
        rest[14],
    )
    h, c = weight0.shape
    like_hidden = weight0 if hidden_gamma is None else hidden_gamma
    like = weight1 if gamma is None else gamma
    return (
        pooled.new_empty(tuple(pooled.shape) if need_pooled else 0),
        weight0.new_empty((h, c)),
        weight0.new_empty(h),
        weight1.new_empty((c, h)),
        weight1.new_empty(c),
        *(like_hidden.new_empty(h if hidden_norm else 0) for _ in range(2)),
        *(like.new_empty(c if norm else 0) for _ in range(2)),
    )


register(
    f"channel_mlp_backward(Tensor dlogits, Tensor kept, {_MLP_BACKWARD_TENSORS}, {_MLP_OPTIONS},"
    " bool need_pooled)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _channel_mlp_backward,
    _channel_mlp_backward_fake,
)


def _channel_mlp_setup(ctx, inputs, output):
    ctx.options = inputs[13:]
    ctx.save_for_backward(output[1], *inputs[:13])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])


def _channel_mlp_autograd_backward(ctx, dlogits, *_):
    if dlogits is None:
        return (None,) * 19
    kept, *inputs = ctx.saved_tensors
    needs = ctx.needs_input_grad[:13]
    if torch.is_grad_enabled():
        return tuple(
            differentiable_backward(
                reference.channel_mlp_forward, (*inputs, *ctx.options), needs, [dlogits]
            )
        )
    grads = torch.ops.bam_kernels.channel_mlp_backward(
        dlogits, kept, *inputs[:10], *inputs[11:], *ctx.options, needs[0]
    )
    # From the gradients' order to the inputs': the statistics have none.
    ordered = [*grads[:7], None, None, *grads[7:], None, None]
    return *(
        grad.to(t.dtype) if need and grad is not None else None
        for grad, need, t in zip(ordered, needs, inputs, strict=True)
    ), *(None,) * 6


register_autograd("channel_mlp", _channel_mlp_setup, _channel_mlp_autograd_backward)
