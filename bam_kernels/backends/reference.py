"""The ops in plain PyTorch: what runs where Triton cannot, and the source of second derivatives.

Each computes in the accumulator's type, as the kernels do: fp32 for half types, fp64 for fp64. The
forwards are differentiable; the ops' autograd differentiates them when it is asked for a graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bam_kernels import layout
from bam_kernels import reference as oracle
from bam_kernels.dispatch import no_autocast


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logits, hidden layer in front of its norm, hidden mean and variance, mean and variance)."""
    wide = accumulator_dtype(pooled.dtype)

    def to(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(wide)

    hidden_taken, taken = (
        [pooled.new_empty(0, dtype=wide) for _ in "mv"],
        [pooled.new_empty(0, dtype=wide) for _ in "mv"],
    )
    y = kept = torch.nn.functional.linear(to(pooled), to(weight0), to(bias0))
    if hidden_norm:
        used = _statistics(y) if hidden_batch_stats else (to(hidden_mean), to(hidden_var))
        hidden_taken = used if hidden_batch_stats else hidden_taken
        y = (y - used[0]) * torch.rsqrt(used[1] + hidden_eps)
        y = _affine(y, to(hidden_gamma), to(hidden_beta))
    y = torch.nn.functional.linear(torch.relu(y), to(weight1), to(bias1))
    if norm:
        used = _statistics(y) if batch_stats else (to(mean), to(var))
        taken = used if batch_stats else taken
        y = _affine((y - used[0]) * torch.rsqrt(used[1] + eps), to(gamma), to(beta))
    return y, kept, *hidden_taken, *taken


def _statistics(y: Tensor) -> tuple[Tensor, Tensor]:
    mean = y.mean(dim=0)
    return mean, (y - mean).square().mean(dim=0)


def _affine(y: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    if gamma is not None:
        y = y * gamma
    return y if beta is None else y + beta


def channel_mlp_backward(
    dlogits: Tensor,
    kept: Tensor,
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
    need_pooled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of pooled, weight0, bias0, weight1, bias1, hidden gamma and beta, gamma, beta.

    Each in the dtype of what it belongs to; a norm that does not exist has empty gradients, and a
    bias's gradient is there whether it exists or not, in its weight's dtype.
    """
    wide = accumulator_dtype(pooled.dtype)
    a, w0, w1 = pooled.to(wide), weight0.to(wide), weight1.to(wide)
    dgamma = dbeta = (weight1 if gamma is None else gamma).new_empty(0)
    dhidden_gamma = dhidden_beta = (weight0 if hidden_gamma is None else hidden_gamma).new_empty(0)
    y = kept
    if hidden_norm:
        hidden = _Norm(
            y, hidden_gamma, hidden_beta, hidden_mean, hidden_var, hidden_batch_stats, hidden_eps
        )
        y = hidden.out
    active = torch.relu(y)
    dout = dlogits.to(wide)
    if norm:
        out = torch.nn.functional.linear(active, w1, _wide(bias1, pooled.dtype))
        dout, *found = _Norm(out, gamma, None, mean, var, batch_stats, eps).backward(dout)
        dgamma, dbeta = (t.to(dgamma.dtype) for t in found)
    dy = torch.ops.aten.threshold_backward(dout @ w1, active, 0)
    if hidden_norm:
        dy, *found = hidden.backward(dy)
        dhidden_gamma, dhidden_beta = (t.to(dhidden_gamma.dtype) for t in found)
    return (
        (dy @ w0).to(pooled.dtype) if need_pooled else pooled.new_empty(0),
        (dy.t() @ a).to(weight0.dtype),
        dy.sum(dim=0).to(weight0.dtype),
        (dout.t() @ active).to(weight1.dtype),
        dout.sum(dim=0).to(weight1.dtype),
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


# --- the spatial branch -----------------------------------------------------------------------


def norm_widths(hidden: int, convolutions: int, hidden_norm: bool, norm: bool) -> list[int]:
    """The channels of each batch norm of a spatial branch; the last has one."""
    return [hidden] * (convolutions + 1 if hidden_norm else 0) + [1] * norm


def pairs_size(widths: list[int], kept: list[bool] | None = None) -> int:
    """The length of a flat tensor of two vectors a norm: of those `kept`, of all by default."""
    return sum(2 * w for w, keep in zip(widths, kept or [True] * len(widths), strict=True) if keep)


def split_pairs(
    flat: Tensor, widths: list[int], kept: list[bool] | None = None
) -> list[Tensor | None]:
    """Views [2, width] by norm of such a tensor, None for a norm that it does not hold."""
    rows: list[Tensor | None] = []
    start = 0
    for width, keep in zip(widths, kept or [True] * len(widths), strict=True):
        rows.append(flat[start : start + 2 * width].view(2, width) if keep else None)
        start += 2 * width if keep else 0
    return rows


def split_spatial_gradients(
    dconvs: Tensor,
    dprojection: Tensor,
    dnorms: Tensor,
    gammas: list[Tensor],
    convolutions: int,
    hidden_norm: bool,
    norm: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor, list[Tensor], list[Tensor]]:
    """What `spatial_branch_backward` packs together, in the backend's dtypes: the gradients of the
    convolutions' weights (flat) and biases, of the projection's weight and bias, of the norms'
    scales and shifts.

    The convolutions' are empty lists where they were not asked for. The norms' come in the first
    scale's dtype: a cast of all together is one launch.
    """
    hidden = dprojection.numel() - 1
    if gammas:
        dnorms = dnorms.to(gammas[0].dtype)
    rows = dconvs.view(convolutions, -1).unbind() if dconvs.numel() > 0 else ()
    pairs = split_pairs(dnorms, norm_widths(hidden, convolutions, hidden_norm, norm))
    return (
        [row[:-hidden] for row in rows],
        [row[-hidden:] for row in rows],
        dprojection[:hidden],
        dprojection[hidden:],
        [pair[0] for pair in pairs],
        [pair[1] for pair in pairs],
    )


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
    """(logits [N, 1, H, W], statistics): mean and biased variance of each norm that takes them from
    the batch, flat."""
    wide = accumulator_dtype(reduced.dtype)
    known = iter(zip(means, variances, strict=True))
    taken: list[Tensor] = []

    def normalize(y: Tensor, i: int) -> Tensor:
        if batch_stats[i]:
            mean = y.mean(dim=(0, 2, 3))
            var = (y - mean[:, None, None]).square().mean(dim=(0, 2, 3))
            taken.append(torch.stack((mean, var)).detach().flatten())
        else:
            mean, var = (t.to(wide) for t in next(known))
        y = (y - mean[:, None, None]) * torch.rsqrt(var + eps[i])[:, None, None]
        if not gammas:
            return y
        return y * gammas[i].to(wide)[:, None, None] + betas[i].to(wide)[:, None, None]

    y = reduced.to(wide)
    for i in range(len(weights) + 1):
        if i > 0:
            bias = biases[i - 1].to(wide) if biases else None
            weight = weights[i - 1].to(wide)
            y = torch.nn.functional.conv2d(y, weight, bias, padding=dilation, dilation=dilation)
        y = torch.relu(normalize(y, i) if hidden_norm else y)
    weight = project_weight.to(wide)[None, :, None, None]
    y = torch.nn.functional.conv2d(y, weight, _wide(project_bias, reduced.dtype))
    if norm:
        y = normalize(y, len(batch_stats) - 1)
    y = y.contiguous()
    return y, torch.cat(taken) if taken else reduced.new_empty(0, dtype=wide)


def spatial_branch_backward(
    dlogits: Tensor, statistics: Tensor, reduced: Tensor, weights: list[Tensor], *rest: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dreduced, dconvolutions flat, dprojection flat, dnorms flat), by torch's autograd."""
    biases, project_weight, project_bias, gammas, betas = rest[:5]
    *rest, need_reduced, need_weights = rest[5:]
    named = [reduced, *weights, *biases, project_weight, project_bias, *gammas, *betas]
    with torch.enable_grad(), no_autocast(reduced):
        leaves = [None if t is None else t.detach().requires_grad_() for t in named]
        parts = iter(leaves)

        def take(values: list[Tensor]) -> list[Tensor]:
            return [next(parts) for _ in values]

        logits, _ = spatial_branch_forward(
            next(parts), take(weights), take(biases), next(parts), next(parts), take(gammas),
            take(betas), *rest,
        )  # fmt: skip
        wanted = [t for t in leaves if t is not None]
        found = iter(torch.autograd.grad(logits, wanted, dlogits, allow_unused=True))
    grads = [None if t is None else next(found) for t in leaves]
    grads = [
        torch.zeros_like(t) if g is None and t is not None else g
        for g, t in zip(grads, leaves, strict=True)
    ]
    dreduced, grads = grads[0], grads[1:]
    convolutions, hidden = len(weights), reduced.shape[1]
    dconvs = []
    for i in range(convolutions):
        dbias = grads[convolutions + i] if biases else grads[i].new_zeros(hidden)
        dconvs += [grads[i].flatten(), dbias.to(grads[i].dtype)]
    grads = grads[convolutions + len(biases) :]
    dbias = reduced.new_zeros(1) if grads[1] is None else grads[1]
    dprojection = torch.cat([grads[0], dbias.to(grads[0].dtype)])
    grads = grads[2:]
    widths = norm_widths(hidden, convolutions, *rest[2:4])  # hidden_norm, norm
    dnorms = statistics.new_zeros(pairs_size(widths))
    if gammas:
        pairs = zip(grads[: len(gammas)], grads[len(gammas) :], strict=True)
        torch.cat([t.flatten().to(dnorms.dtype) for pair in pairs for t in pair], out=dnorms)
    empty = reduced.new_empty(0)
    return (
        layout.like(dreduced, reduced).contiguous(memory_format=_format(reduced))
        if need_reduced
        else empty,
        torch.cat(dconvs) if need_weights and dconvs else (weights or [reduced])[0].new_empty(0),
        dprojection,
        dnorms,
    )


def _format(t: Tensor) -> torch.memory_format:
    if t.is_contiguous() or not t.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last


def update_running(
    means: list[Tensor],
    variances: list[Tensor],
    counters: list[Tensor],
    batch_means: list[Tensor],
    batch_variances: list[Tensor],
    counts: list[int],
    momenta: list[float],
) -> None:
    """In place, for each norm: counter + 1, and its statistics moved towards the batch's.

    counts are the values of a channel in the batch, n, whose variance is made unbiased by
    n / (n - 1); a negative momentum asks for a cumulative average, 1 / counter.
    """
    for i, (mean, variance, counter) in enumerate(zip(means, variances, counters, strict=True)):
        counter.add_(1)
        weight = momenta[i] if momenta[i] >= 0 else 1.0 / counter.to(batch_means[i].dtype)
        unbiased = batch_variances[i] * (counts[i] / (counts[i] - 1))
        # Not old + weight * (new - old), which leaves nothing of a new value far below the old one.
        mean.copy_((1 - weight) * mean.to(unbiased.dtype) + weight * batch_means[i])
        variance.copy_((1 - weight) * variance.to(unbiased.dtype) + weight * unbiased)
