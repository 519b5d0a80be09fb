"""The ops in plain PyTorch: what runs where Triton cannot, and the source of second derivatives.

Each computes in the accumulator's type, as the kernels do: fp32 for half types, fp64 for fp64. The
forwards are differentiable; the ops' autograd differentiates them when it is asked for a graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bam_kernels import layout
from bam_kernels import reference as oracle


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _wide(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(accumulator_dtype(dtype))


def gate_forward(
    x: Tensor, channel: Tensor | None, spatial: Tensor | None, combine: str, residual: bool
) -> Tensor:
    wide = accumulator_dtype(x.dtype)
    out = oracle.gate(
        x.to(wide), _wide(channel, x.dtype), _wide(spatial, x.dtype), combine, residual
    )
    return out.to(x.dtype)


def _map(channel: Tensor | None, spatial: Tensor | None, combine: str) -> Tensor:
    c = None if channel is None else channel[:, :, None, None]
    if c is None or spatial is None:
        return torch.sigmoid(spatial if c is None else c)
    return oracle.attention_map(c, spatial, combine)


def gate_backward_reduce(
    dout: Tensor, x: Tensor, channel: Tensor | None, spatial: Tensor | None, combine: str
) -> tuple[Tensor, Tensor]:
    wide = accumulator_dtype(x.dtype)
    grad = dout.to(wide) * x.to(wide)
    by_c, by_s = _logit_gradients(grad, _wide(channel, x.dtype), _wide(spatial, x.dtype), combine)
    dchannel = dspatial = x.new_empty(0)
    if channel is not None:
        dchannel = by_c.sum(dim=(2, 3)).to(channel.dtype)
    if spatial is not None:
        dspatial = by_s.sum(dim=1, keepdim=True).to(spatial.dtype)
    return dchannel, dspatial


def _logit_gradients(
    grad: Tensor, channel: Tensor | None, spatial: Tensor | None, combine: str
) -> tuple[Tensor, Tensor]:
    def through_sigmoid(z: Tensor) -> Tensor:
        m = torch.sigmoid(z)
        return grad * (m * (1 - m))

    c = None if channel is None else channel[:, :, None, None]
    if c is None or spatial is None:
        value = through_sigmoid(spatial if c is None else c)
        return value, value
    if combine == "sigmoid_sum":
        return through_sigmoid(c), through_sigmoid(spatial)
    if combine == "sum":
        value = through_sigmoid(c + spatial)
        return value, value
    if combine == "product":
        value = through_sigmoid(c * spatial)
        return value * spatial, value * c
    value = through_sigmoid(torch.maximum(c, spatial))
    shared = torch.where(c == spatial, value * 0.5, value)
    return shared.masked_fill(c < spatial, 0), shared.masked_fill(spatial < c, 0)


def pool_reduce_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, pool: bool
) -> tuple[Tensor, Tensor]:
    pooled = reduced = x.new_empty(0)
    if pool:
        wide = accumulator_dtype(x.dtype)
        pooled = x.to(wide).mean(dim=(2, 3)).to(x.dtype)
    if weight is not None:
        reduced = torch.nn.functional.conv2d(x, weight[:, :, None, None], bias)
        fmt = torch.channels_last if layout.is_channels_last(x) else torch.contiguous_format
        reduced = reduced.contiguous(memory_format=fmt)
    return pooled, reduced


def gate_input_gradient(
    dout: Tensor, channel: Tensor | None, spatial: Tensor | None, combine: str, residual: bool
) -> Tensor:
    """dout * (1 + M), or dout * M: the gate's gradient of x."""
    wide = accumulator_dtype(dout.dtype)
    m = _map(_wide(channel, dout.dtype), _wide(spatial, dout.dtype), combine)
    grad = dout.to(wide) * m
    return (grad + dout.to(wide) if residual else grad).to(dout.dtype)


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
    dx = dweight = dbias = x.new_empty(0)
    if need_dx:
        dx = pool_reduce_input_gradient(x, dpooled, dreduced, weight)
        if dout is not None:
            dx = dx + gate_input_gradient(dout, channel, spatial, combine, residual)
        dx = layout.like(dx, layout.walkable(x))
    if need_dweight:
        dweight = torch.einsum("nhij,ncij->hc", dreduced.to(x.dtype), x)
    if need_dbias:
        dbias = dreduced.to(x.dtype).sum(dim=(0, 2, 3))
    return dx, dweight, dbias


def pool_reduce_input_gradient(
    x: Tensor, dpooled: Tensor | None, dreduced: Tensor | None, weight: Tensor | None
) -> Tensor:
    """W0^T dreduced + dpooled / P: the gradient of x through the pooling and the reduction."""
    dx = torch.zeros_like(x)
    if dreduced is not None and weight is not None:
        dx = dx + torch.einsum("nhij,hc->ncij", dreduced.to(x.dtype), weight)
    if dpooled is not None:
        dx = dx + (dpooled.to(x.dtype) / (x.shape[2] * x.shape[3]))[:, :, None, None]
    return dx


def channel_mlp_forward(
    pooled: Tensor,
    weight0: Tensor,
    bias0: Tensor | None,
    weight1: Tensor,
    bias1: Tensor | None,
    hidden_gamma: Tensor | None,
    hidden_beta: Tensor | None,
    hidden_mean: Tensor | None,
    hidden_var: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    hidden_norm: bool,
    hidden_batch_stats: bool,
    hidden_eps: float,
    norm: bool,
    batch_stats: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = accumulator_dtype(pooled.dtype)

    def to(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(wide)

    hidden_taken, taken = (
        [pooled.new_empty(0, dtype=wide) for _ in "mv"],
        [pooled.new_empty(0, dtype=wide) for _ in "mv"],
    )
    y = torch.nn.functional.linear(to(pooled), to(weight0), to(bias0))
    if hidden_norm:
        used = _statistics(y) if hidden_batch_stats else (to(hidden_mean), to(hidden_var))
        hidden_taken = _unbiased(used, y) if hidden_batch_stats else hidden_taken
        y = (y - used[0]) * torch.rsqrt(used[1] + hidden_eps)
        y = _affine(y, to(hidden_gamma), to(hidden_beta))
    y = torch.nn.functional.linear(torch.relu(y), to(weight1), to(bias1))
    if norm:
        used = _statistics(y) if batch_stats else (to(mean), to(var))
        taken = _unbiased(used, y) if batch_stats else taken
        y = _affine((y - used[0]) * torch.rsqrt(used[1] + eps), to(gamma), to(beta))
    return y, *hidden_taken, *taken


def _statistics(y: Tensor) -> tuple[Tensor, Tensor]:
    mean = y.mean(dim=0)
    return mean, (y - mean).square().mean(dim=0)


def _unbiased(statistics: tuple[Tensor, Tensor], y: Tensor) -> tuple[Tensor, Tensor]:
    mean, var = statistics
    return mean, var * (y.shape[0] / (y.shape[0] - 1))


def _affine(y: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    if gamma is not None:
        y = y * gamma
    return y if beta is None else y + beta


def channel_mlp_backward(
    dlogits: Tensor,
    pooled: Tensor,
    weight0: Tensor,
    bias0: Tensor | None,
    weight1: Tensor,
    bias1: Tensor | None,
    hidden_gamma: Tensor | None,
    hidden_beta: Tensor | None,
    hidden_mean: Tensor | None,
    hidden_var: Tensor | None,
    gamma: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    hidden_norm: bool,
    hidden_batch_stats: bool,
    hidden_eps: float,
    norm: bool,
    batch_stats: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of pooled, weight0, bias0, weight1, bias1, hidden gamma and beta, gamma, beta.

    Both layers, and their batch statistics, are computed anew from pooled: [N, h] and [N, C] are
    cheaper to make than to keep, and a normalised value fits the statistics of the very same
    values. All in the accumulator's type; a norm that does not exist has empty gradients, and a
    bias's gradient is there whether it exists or not.
    """
    wide = accumulator_dtype(pooled.dtype)
    dgamma = dbeta = dhidden_gamma = dhidden_beta = pooled.new_empty(0, dtype=wide)
    a, w0, w1 = pooled.to(wide), weight0.to(wide), weight1.to(wide)
    y = torch.nn.functional.linear(a, w0, _wide(bias0, pooled.dtype))
    if hidden_norm:
        hidden = _Norm(
            y, hidden_gamma, hidden_beta, hidden_mean, hidden_var, hidden_batch_stats, hidden_eps
        )
        y = hidden.out
    active = torch.relu(y)
    dout = dlogits.to(wide)
    if norm:
        out = torch.nn.functional.linear(active, w1, _wide(bias1, pooled.dtype))
        dout, dgamma, dbeta = _Norm(out, gamma, None, mean, var, batch_stats, eps).backward(dout)
    dy = torch.ops.aten.threshold_backward(dout @ w1, active, 0)
    if hidden_norm:
        dy, dhidden_gamma, dhidden_beta = hidden.backward(dy)
    return (
        dy @ w0,
        dy.t() @ a,
        dy.sum(dim=0),
        dout.t() @ active,
        dout.sum(dim=0),
        dhidden_gamma,
        dhidden_beta,
        dgamma,
        dbeta,
    )


class _Norm:
    """A batch norm of [N, C] values, and its gradient, on torch's own kernels."""

    def __init__(
        self,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        batch_stats: bool,
        eps: float,
    ) -> None:
        self.x, self.batch_stats, self.eps = x, batch_stats, eps
        self.gamma = x.new_ones(x.shape[1]) if gamma is None else gamma.to(x.dtype)
        beta = None if beta is None else beta.to(x.dtype)
        self.running = (None, None) if batch_stats else (mean.to(x.dtype), var.to(x.dtype))
        self.out, *self.saved = torch.ops.aten.native_batch_norm(
            x, self.gamma, beta, *self.running, batch_stats, 0.0, eps
        )

    def backward(self, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(dx, dgamma, dbeta)."""
        return torch.ops.aten.native_batch_norm_backward(
            dy,
            self.x,
            self.gamma,
            *self.running,
            *self.saved,
            self.batch_stats,
            self.eps,
            [True, True, True],
        )
