"""A whole module as one autograd function: training in eager mode, on the backends' own functions.

The operators of `bam_kernels.ops` are what torch.compile, dispatch modes and tensor subclasses see;
each costs its way through the dispatcher and through Python's autograd, together more than the
kernels of a small map. Here a forward is four calls of the backend and a backward four more. What
asks for more than first derivatives of plain tensors gets them from the plain composition.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from bam_kernels import layout
from bam_kernels.backends import reference
from bam_kernels.backends.reference import split_pairs
from bam_kernels.dispatch import no_autocast, under_autocast
from bam_kernels.fusable import unfusable_mlp, unfusable_spatial, uses_batch_stats
from bam_kernels.ops.registry import backend_module, differentiable_backward
from bam_kernels.reference import ChannelBranch, SpatialBranch

_PLAIN = (Tensor, nn.Parameter)


@dataclasses.dataclass(frozen=True)
class Taken:
    """Batch statistics that a batch norm took in a forward: [h] each, of n values a channel."""

    norm: nn.modules.batchnorm._BatchNorm
    mean: Tensor
    variance: Tensor  # biased
    n: int


def update_running(taken: Sequence[Taken], backend: Any) -> None:
    """What a training forward of `nn.BatchNorm1d` and `nn.BatchNorm2d` does to their buffers.

    `backend` has the operator, or is ``torch.ops.bam_kernels``.
    """
    kept = [
        each
        for each in taken
        if each.norm.training
        and each.norm.track_running_stats
        and each.norm.running_mean is not None
    ]
    if not kept:
        return
    with torch.no_grad():
        backend.update_running(
            [each.norm.running_mean for each in kept],
            [each.norm.running_var for each in kept],
            [each.norm.num_batches_tracked for each in kept],
            [each.mean for each in kept],
            [each.variance for each in kept],
            [each.n for each in kept],
            [-1.0 if each.norm.momentum is None else each.norm.momentum for each in kept],
        )


# --- what the operators take of a branch ------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ChannelCall:
    """The arguments of ``channel_mlp`` behind the pooled vector, and the norms (or None) of both
    layers."""

    tensors: list[Tensor | None]
    options: tuple[Any, ...]
    norms: tuple[nn.BatchNorm1d | None, nn.BatchNorm1d | None]

    def taken(self, statistics: Sequence[Tensor], samples: int) -> list[Taken]:
        """By the operator's four outputs: the hidden layer's mean and variance, the last's."""
        return [
            Taken(norm, *statistics[2 * i : 2 * i + 2], samples)
            for i, norm in enumerate(self.norms)
            if uses_batch_stats(norm)
        ]


def _norm_tensors(norm: nn.BatchNorm1d | None) -> tuple[Tensor | None, ...]:
    if norm is None:
        return None, None, None, None
    # Statistics that are not read are not passed: they are about to be updated in place.
    stats = (None, None) if uses_batch_stats(norm) else (norm.running_mean, norm.running_var)
    return norm.weight, norm.bias, *stats


def channel_call(branch: ChannelBranch) -> ChannelCall:
    """Of a branch in which `fusable.unfusable_mlp` finds nothing."""
    fc0, fc1 = branch.fc
    hidden_norm = None if branch.hidden_norm is None else branch.hidden_norm[0]
    norm = branch.norm
    return ChannelCall(
        [
            fc0.weight,
            fc0.bias,
            fc1.weight,
            fc1.bias,
            *_norm_tensors(hidden_norm),
            *_norm_tensors(norm),
        ],
        (
            hidden_norm is not None,
            uses_batch_stats(hidden_norm),
            1e-5 if hidden_norm is None else hidden_norm.eps,
            norm is not None,
            uses_batch_stats(norm),
            1e-5 if norm is None else norm.eps,
        ),
        (hidden_norm, norm),
    )


@dataclasses.dataclass(frozen=True)
class SpatialCall:
    """The arguments of ``spatial_branch`` behind the reduction, and the norms; the projection's
    weight is as its layer has it."""

    tensors: list[Any]
    options: tuple[Any, ...]
    norms: list[nn.BatchNorm2d]

    def taken(self, statistics: Tensor, n: int) -> list[Taken]:
        """By the operator's second output."""
        batch_stats = self.options[2]
        if not any(batch_stats):
            return []
        rows = split_pairs(statistics, [norm.num_features for norm in self.norms], batch_stats)
        return [
            Taken(norm, row[0], row[1], n)
            for norm, row in zip(self.norms, rows, strict=True)
            if row is not None
        ]


def spatial_call(branch: SpatialBranch) -> SpatialCall:
    """Of a branch in which `fusable.unfusable_spatial` finds nothing."""
    convs = list(branch.dilated)
    norms = [] if branch.hidden_norm is None else list(branch.hidden_norm)
    norms += [] if branch.norm is None else [branch.norm]
    batch_stats = [uses_batch_stats(norm) for norm in norms]
    known = [norm for norm, batch in zip(norms, batch_stats, strict=True) if not batch]
    affine = len(norms) > 0 and norms[0].weight is not None
    project = branch.project
    return SpatialCall(
        [
            [conv.weight for conv in convs],
            [conv.bias for conv in convs] if convs and convs[0].bias is not None else [],
            project.weight,
            project.bias,
            [norm.weight for norm in norms] if affine else [],
            [norm.bias for norm in norms] if affine else [],
            [norm.running_mean for norm in known],
            [norm.running_var for norm in known],
        ],
        (
            branch.hidden_norm is not None,
            branch.norm is not None,
            batch_stats,
            [norm.eps for norm in norms],
            convs[0].dilation[0] if convs else 1,
        ),
        norms,
    )


# --- the module -------------------------------------------------------------------------------


class _Call:
    """What a forward and its backward run, and how the function's flat tensors belong together."""

    def __init__(
        self,
        channel: ChannelCall | None,
        spatial: SpatialCall | None,
        combine: str,
        residual: bool,
        backend: ModuleType,
    ) -> None:
        self.channel, self.spatial = channel, spatial
        self.combine, self.residual, self.backend = combine, residual, backend
        self.lengths = [
            len(t) if isinstance(t, list) else None for t in (spatial.tensors if spatial else ())
        ]

    def flat(self, weight: Tensor | None, bias: Tensor | None) -> list[Tensor | None]:
        """The reduction's weight and bias, the channel branch's tensors, the spatial branch's."""
        tensors = [weight, bias]
        if self.channel is not None:
            tensors += self.channel.tensors
        if self.spatial is not None:
            for t in self.spatial.tensors:
                tensors += t if isinstance(t, list) else (t,)
        return tensors

    def split(self, flat: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """The channel's and the spatial branch's parts of what is in the order of `flat`."""
        at = 2 + (12 if self.channel is not None else 0)
        channel, spatial = list(flat[2:at]), []
        for length in self.lengths:
            spatial.append(flat[at] if length is None else list(flat[at : at + length]))
            at += 1 if length is None else length
        return channel, spatial

    def arguments(self, flat: Sequence[Any]) -> tuple[Tensor | None, list[Any], list[Any]]:
        """The reduction's weight and both branches' tensors, as the backends' functions take them:
        the weights of 1x1 convolutions as matrices and vectors."""
        channel, spatial = self.split(flat)
        if self.spatial is None:
            return None, channel, spatial
        spatial[2] = spatial[2].flatten()
        return flat[0].flatten(1), channel, spatial

    def compose(self, x: Tensor, *flat: Tensor | None) -> Tensor:
        """The same module of plain operators, which autograd can differentiate to any order."""
        weight, channel, spatial = self.arguments(flat)
        pooled, reduced = reference.pool_reduce_forward(
            x, weight, flat[1], self.channel is not None
        )
        c = s = None
        if self.channel is not None:
            c = reference.channel_mlp_forward(pooled, *channel, *self.channel.options)[0]
        if self.spatial is not None:
            s = reference.spatial_branch_forward(reduced, *spatial, *self.spatial.options)[0]
        return reference.gate_forward(x, c, s, self.combine, self.residual)


class _Refine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, x: Tensor, *flat: Tensor | None) -> Tensor:
        run = call.backend
        weight, channel, spatial = call.arguments(flat)
        seen = layout.walkable(x)
        pooled, reduced = run.pool_reduce_forward(seen, weight, flat[1], call.channel is not None)
        c = s = kept = statistics = None
        norms: list[Taken] = []
        if call.channel is not None:
            c, kept, *taken = run.channel_mlp_forward(pooled, *channel, *call.channel.options)
            norms += call.channel.taken(taken, x.shape[0])
        if call.spatial is not None:
            s, statistics = run.spatial_branch_forward(reduced, *spatial, *call.spatial.options)
            n, _, h, w = x.shape
            norms += call.spatial.taken(statistics, n * h * w)
        # Here: a recomputation for a checkpoint ends where this function's tensors are saved.
        update_running(norms, run)
        ctx.call = call
        ctx.save_for_backward(x, pooled, reduced, kept, c, s, statistics, *flat)
        ctx.set_materialize_grads(False)
        return run.gate_forward(seen, c, s, call.combine, call.residual)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[1:]
        if dout is None:
            return (None,) * (1 + len(needs))
        x, pooled, reduced, kept, c, s, statistics, *flat = ctx.saved_tensors
        call = ctx.call
        if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(dout):
            grads = differentiable_backward(call.compose, [x, *flat], needs, [dout])
            return None, *grads
        with no_autocast(x):
            return None, *_gradients(
                call, dout, x, pooled, reduced, kept, c, s, statistics, flat, needs
            )


def _gradients(
    call: _Call,
    dout: Tensor,
    x: Tensor,
    pooled: Tensor,
    reduced: Tensor,
    kept: Tensor | None,
    c: Tensor | None,
    s: Tensor | None,
    statistics: Tensor | None,
    flat: list[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Of x and of the flat tensors, what is needed of them."""
    run = call.backend
    weight, channel, spatial = call.arguments(flat)
    need_x, need_weight, need_bias = needs[:3]
    need_channel, need_spatial = call.split(needs[1:])
    need_reduced = need_x or need_weight or need_bias
    through_c = c is not None and (need_x or any(need_channel))
    wanted = any(any(n) if isinstance(n, list) else n for n in need_spatial)
    through_s = s is not None and (need_reduced or wanted)
    x, dchannel, dspatial = layout.walkable(x), None, None
    dout = layout.like(dout, x)
    if through_c or through_s:
        dchannel, dspatial = run.gate_backward_reduce(dout, x, c, s, call.combine)
    channel_grads: list[Tensor | None] = [None] * len(channel)
    spatial_grads: list[Any] = [None if n is None else [None] * n for n in call.lengths]
    dpooled = dreduced = None
    if through_c:
        dpooled, *grads = run.channel_mlp_backward(
            dchannel, kept, pooled, *channel[:9], *channel[10:], *call.channel.options, need_x
        )
        # From the gradients' order to the arguments': the statistics have none.
        channel_grads = [*grads[:6], None, None, *grads[6:], None, None]
    if through_s:
        dreduced, spatial_grads = _spatial_gradients(
            call, dspatial, statistics, reduced, spatial, need_spatial, need_reduced
        )
    dx, dweight, dbias = run.input_gradient(
        dout, x, c, s, dpooled if need_x else None, dreduced if need_reduced else None,
        weight, call.combine, call.residual, need_x, need_weight, need_weight and need_bias,
    )  # fmt: skip
    if need_bias and not need_weight:
        dbias = dreduced.sum(dim=(0, 2, 3))
    found = [dx, dweight, dbias, *channel_grads]
    for grads in spatial_grads:
        found += grads if isinstance(grads, list) else [grads]
    return [
        None if not need else grad if _fits(grad, t) else grad.reshape(t.shape).to(t.dtype)
        for grad, need, t in zip(found, needs, [x, *flat], strict=True)
    ]


def _fits(grad: Tensor, t: Tensor) -> bool:
    return grad.shape == t.shape and grad.dtype == t.dtype


def _spatial_gradients(
    call: _Call,
    dlogits: Tensor,
    statistics: Tensor,
    reduced: Tensor,
    spatial: list[Any],
    needs: list[Any],
    need_reduced: bool,
) -> tuple[Tensor, list[Any]]:
    """Of the reduction, and of the spatial branch's tensors."""
    options = call.spatial.options
    need_convs = any(needs[0]) or any(needs[1])
    dreduced, *packed = call.backend.spatial_branch_backward(
        dlogits, statistics, reduced, *spatial, *options, need_reduced, need_convs
    )
    found = reference.split_spatial_gradients(*packed, spatial[4], len(spatial[0]), *options[:2])
    absent = [None if n is None else [None] * n for n in call.lengths]
    # No list where none was asked for, and none where there are no such tensors.
    grads = [
        each if none is None or len(each) == len(none) else none
        for each, none in zip((*found, [], []), absent, strict=True)
    ]
    return dreduced, grads


def refine(
    x: Tensor,
    channel: ChannelBranch | None,
    spatial: SpatialBranch | None,
    combine: str,
    residual: bool,
    backend: str,
) -> Tensor | None:
    """The module's output by a backend's functions, batch norms' buffers updated; None where the
    operators must be seen, or where part of a branch runs as PyTorch's own.

    The branches are what `fusable.unfusable` lets pass, and x what `functional` has checked.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return None
    if torch._C._len_torch_function_stack() > 0 or type(x) not in _PLAIN:
        return None
    if channel is not None and unfusable_mlp(channel, x.shape[0]) is not None:
        return None
    if spatial is not None and unfusable_spatial(spatial, x) is not None:
        return None
    weight = bias = None
    if spatial is not None:
        weight, bias = spatial.reduce.weight, spatial.reduce.bias
        if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
            return None  # cast under autocast, an error outside of it
    call = _Call(
        None if channel is None else channel_call(channel),
        None if spatial is None else spatial_call(spatial),
        combine,
        residual,
        backend_module(backend),
    )
    flat = call.flat(weight, bias)
    if any(t is not None and type(t) not in _PLAIN for t in flat):
        return None
    if under_autocast(x):
        with no_autocast(x):
            return _Refine.apply(call, x, *flat)
    return _Refine.apply(call, x, *flat)
