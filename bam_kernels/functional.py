"""The functional interface: validation, autocast, and the composition of a whole module.

Every check of an argument stands here, before any kernel starts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bam_kernels import inference, ops, reference, training  # noqa: F401 - importing ops registers the operators
from bam_kernels.config import check_combine
from bam_kernels.dispatch import DTYPES, choose_backend, log_once, under_autocast
from bam_kernels.fusable import (
    has_hooks,
    unfusable,
    unfusable_mlp,
    unfusable_spatial,
    uses_batch_stats,
)
from bam_kernels.reference import ChannelBranch, SpatialBranch
from bam_kernels.training import Taken


def gate(
    x: Tensor,
    channel_logits: Tensor | None,
    spatial_logits: Tensor | None,
    combine: str = "sum",
    residual: bool = True,
) -> Tensor:
    """F' = F + F * sigmoid(Mc + Ms) in one read and one write of F (Eq. 1-2).

    Args:
        x: F, [N, C, H, W], float64, float32, float16 or bfloat16, any memory format.
        channel_logits: Mc [N, C], any of these dtypes, or None.
        spatial_logits: Ms [N, 1, H, W], or None. With one of the two absent, M is the sigmoid of
            the other.
        combine: "sum", "product", "max" or "sigmoid_sum" (Table 1b).
        residual: False gives F * M (Table 1b, "No identity").

    Returns:
        [N, C, H, W] in x's dtype and memory format. Logits of another dtype are taken as they are;
        the map is computed in float32 (float64 for a float64 x).

    Raises:
        TypeError: not a tensor, or an unsupported dtype.
        ValueError: a wrong shape, mixed devices, an unknown combine mode, no logits at all.
        BackendUnavailableError: a backend was asked for by name and cannot run.
    """
    _check_map(x, "x")
    check_combine(combine)
    n, c, h, w = x.shape
    if channel_logits is None and spatial_logits is None:
        raise ValueError("channel_logits, spatial_logits: expected at least one, got None for both")
    if channel_logits is not None:
        _check(channel_logits, "channel_logits", (n, c), x)
    if spatial_logits is not None:
        _check(spatial_logits, "spatial_logits", (n, 1, h, w), x)
    if n == 0 or choose_backend(x) == "reference":
        return reference.gate(x, channel_logits, spatial_logits, combine, residual).to(x.dtype)
    return torch.ops.bam_kernels.gate(x, channel_logits, spatial_logits, combine, residual)


def pool_reduce(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Global average pool and 1x1 convolution from one read of x: the heads of Eq. 3 and 4.

    Args:
        x: [N, C, H, W], float64, float32, float16 or bfloat16, any memory format.
        weight: [h, C], or [h, C, 1, 1] as a 1x1 convolution keeps it; of x's dtype, or any under
            autocast.
        bias: [h], or None.

    Returns:
        pooled [N, C] and reduced [N, h, H, W], both in x's dtype; reduced in x's memory format.

    Raises:
        TypeError: not a tensor, an unsupported dtype, or dtypes that differ outside of autocast.
        ValueError: a wrong shape, mixed devices.
        BackendUnavailableError: a backend was asked for by name and cannot run.
    """
    _check_map(x, "x")
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: expected a torch.Tensor, got {type(weight).__name__}")
    if weight.dim() == 4 and weight.shape[2:] == (1, 1):
        weight = weight.flatten(1)
    if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"weight: expected [h, {x.shape[1]}] or [h, {x.shape[1]}, 1, 1] for x of "
            f"{x.shape[1]} channels, got {list(weight.shape)}"
        )
    weight = _as_dtype_of(x, weight, "weight")
    if bias is not None:
        _check(bias, "bias", (weight.shape[0],), x)
        bias = _as_dtype_of(x, bias, "bias")
    _check_device(weight, "weight", x)
    if x.shape[0] == 0 or choose_backend(x) == "reference":
        return x.mean(dim=(2, 3)), nn.functional.conv2d(x, weight[:, :, None, None], bias)
    return torch.ops.bam_kernels.pool_reduce(x, weight, bias, True)


def bam(
    x: Tensor,
    channel: ChannelBranch | None,
    spatial: SpatialBranch | None,
    *,
    combine: str = "sum",
    residual: bool = True,
    observer: reference.Observer | None = None,
) -> Tensor:
    """A whole module (Eq. 1-4) on the parameters of its branches, either of which may be None.

    x [N, C, H, W] to the same shape, dtype and memory format: 3 passes over x-sized memory forward
    and 5 backward. Runs in plain PyTorch where the fused path cannot see everything that a branch
    does; `bam_kernels.explain` says when and why. `observer` is called with both branches' logits.

    Raises:
        TypeError: not a tensor, or an unsupported dtype.
        ValueError: a wrong rank, channel count or device, H * W = 0, or a batch norm that would see
            one value per channel while training.
        BackendUnavailableError: a backend was asked for by name and cannot run.
    """
    if observer is None:
        out = inference.refine(x, channel, spatial, combine, residual)
        if out is not None:
            return out
    check_module_input(x, channel, spatial)
    check_combine(combine)
    backend = choose_backend(x)
    if x.shape[0] == 0 or backend == "reference":
        return _plain(x, channel, spatial, combine, residual, observer)
    reason = unfusable(channel, spatial)
    if reason is not None:
        log_once(f"running plain PyTorch: {reason}")
        return _plain(x, channel, spatial, combine, residual, observer)
    # Under autocast a module of float32 parameters takes another x: the operator casts.
    if observer is None and under_autocast(x):
        arguments = inference.arguments(x, channel, spatial, combine, residual)
        if arguments is not None and (backend == "cpp" or inference.fits_triton(arguments, x)):
            return torch.ops.bam_kernels.bam(x, *arguments)
    if observer is None:
        out = training.refine(x, channel, spatial, combine, residual, backend)
        if out is not None:
            return out

    weight = bias = None
    if spatial is not None:
        weight = _as_dtype_of(x, spatial.reduce.weight.flatten(1), "spatial.reduce.weight")
        if spatial.reduce.bias is not None:
            bias = _as_dtype_of(x, spatial.reduce.bias, "spatial.reduce.bias")
    pooled, reduced, *links = torch.ops.bam_kernels.pool_reduce_linked(
        x, weight, bias, channel is not None, combine, residual
    )
    taken: list[Taken] = []
    c = None if channel is None else _channel_logits(pooled, channel, taken)
    s = None if spatial is None else _spatial_logits(reduced, spatial, taken)
    training.update_running(taken, torch.ops.bam_kernels)
    if observer is not None:
        observer(c, s)
    n, _, h, w = x.shape
    reason = _not_logits(c, "channel", (*x.shape[:2],), x) or _not_logits(
        s, "spatial", (n, 1, h, w), x
    )
    if reason is not None:
        log_once(f"running plain PyTorch's gate: {reason}")
        return reference.gate(x, c, s, combine, residual).to(x.dtype)
    return torch.ops.bam_kernels.gate_linked(x, c, s, *links, combine, residual)


def _not_logits(t: Tensor | None, branch: str, shape: tuple[int, ...], x: Tensor) -> str | None:
    """Why the kernels cannot take what a branch returned: a layer was replaced, and torch would
    broadcast its logits, or raise; None if they can."""
    if t is None or (tuple(t.shape) == shape and t.dtype in DTYPES and t.device == x.device):
        return None
    return f"the {branch} branch gives {str(t.dtype).removeprefix('torch.')} {list(t.shape)}"


def _plain(
    x: Tensor,
    channel: ChannelBranch | None,
    spatial: SpatialBranch | None,
    combine: str,
    residual: bool,
    observer: reference.Observer | None,
) -> Tensor:
    c = None if channel is None else channel(x)
    s = None if spatial is None else spatial(x)
    if observer is not None:
        observer(c, s)
    return reference.gate(x, c, s, combine, residual).to(x.dtype)


def _channel_logits(pooled: Tensor, branch: ChannelBranch, taken: list[Taken]) -> Tensor:
    """Mc from the pooled vector: fused where the MLP has the paper's one hidden layer."""
    samples = pooled.shape[0]
    reason = unfusable_mlp(branch, samples)
    if reason is not None:
        log_once(f"the channel MLP runs as PyTorch's own operators: {reason}")
        return branch.from_pooled(pooled)
    call = training.channel_call(branch)
    logits, _, *statistics = torch.ops.bam_kernels.channel_mlp(pooled, *call.tensors, *call.options)
    taken += call.taken(statistics, samples)
    return logits


def _spatial_logits(reduced: Tensor, branch: SpatialBranch, taken: list[Taken]) -> Tensor:
    """Ms from the reduction."""
    reason = unfusable_spatial(branch, reduced)
    if reason is not None:
        log_once(f"the spatial branch runs as PyTorch's own operators: {reason}")
        return branch.from_reduced(reduced)
    n, _, h, w = reduced.shape
    call = training.spatial_call(branch)
    tensors = [*call.tensors]
    tensors[2] = tensors[2].flatten()
    logits, statistics = torch.ops.bam_kernels.spatial_branch(reduced, *tensors, *call.options)
    taken += call.taken(statistics, n * h * w)
    return logits


# --- checks -----------------------------------------------------------------------------------


def check_module_input(
    x: Tensor, channel: ChannelBranch | None, spatial: SpatialBranch | None
) -> None:
    """Raise ValueError or TypeError, naming what was expected and what came, before any launch."""
    _check_map(x, "x")
    n, c, h, w = x.shape
    for branch, layer, expected in _first_layers(channel, spatial):
        if c != expected:
            raise ValueError(f"x: expected {expected} channels, got {c} in shape {list(x.shape)}")
        if has_hooks(branch) or has_hooks(layer):
            continue  # they may put other parameters in place: FSDP's gather, cast and move them
        weight = layer.weight
        if weight.device != x.device:
            raise ValueError(
                f"x: expected a tensor on the parameters' device {weight.device}, got {x.device}"
            )
        if weight.dtype != x.dtype and not under_autocast(x):
            raise TypeError(
                f"x: expected the parameters' dtype {weight.dtype} outside of autocast, "
                f"got {x.dtype}"
            )
    _check_size(x, channel, spatial)
    if n == 0:
        return
    if channel is not None and n == 1:
        _check_batch_norms(channel, "channel", "batch 1", x)
    if spatial is not None and n * h * w == 1:
        _check_batch_norms(spatial, "spatial", "one pixel", x)


def _check_size(x: Tensor, channel: ChannelBranch | None, spatial: SpatialBranch | None) -> None:
    """What the paper's BAM does not ask: that H and W fit a client's pooling or padding."""
    h, w = x.shape[2:]
    if isinstance(channel, ChannelBranch) and channel.pool == "square" and not h <= w < 2 * h:
        raise ValueError(
            f"x: expected H <= W < 2 H, as the pooling over H x H (pool='square') takes it, "
            f"got shape {list(x.shape)}"
        )
    if isinstance(spatial, SpatialBranch) and spatial.shrinkage:
        side = spatial.shrinkage + 1
        if (h, w) != (side, side):
            raise ValueError(
                f"x: expected H = W = {side}, the only size that 3x3 convolutions padded by less "
                f"than their dilation take, got shape {list(x.shape)}"
            )


def _first_layers(
    channel: ChannelBranch | None, spatial: SpatialBranch | None
) -> list[tuple[nn.Module, nn.Module, int]]:
    """By branch the layer that takes x, and its channels. Only torch's own: another may compute its
    weight anew, with effects, whenever it is looked at (spectral_norm), and checks for itself."""
    found: list[tuple[nn.Module, nn.Module, int]] = []
    if isinstance(channel, ChannelBranch) and type(channel.fc[0]) is nn.Linear:
        found.append((channel, channel.fc[0], channel.fc[0].in_features))
    if isinstance(spatial, SpatialBranch) and type(spatial.reduce) is nn.Conv2d:
        found.append((spatial, spatial.reduce, spatial.reduce.in_channels))
    return found


def _check_batch_norms(branch: nn.Module, name: str, what: str, x: Tensor) -> None:
    for part, module in branch.named_modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        if uses_batch_stats(module) and not _synchronised(module):
            raise ValueError(
                f"x: expected more than one value per channel in the batch norm {name}.{part} "
                f"while it takes batch statistics, got {what} in shape {list(x.shape)}; "
                "use a larger batch, or eval()"
            )


def _synchronised(norm: nn.Module) -> bool:
    """Whether the statistics are those of several processes, so that one value in each is enough.

    As `nn.SyncBatchNorm` decides: while training, in a process group of more than one.
    """
    return (
        isinstance(norm, nn.SyncBatchNorm)
        and norm.training
        and torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size(norm.process_group) > 1
    )


def _check_map(x: Tensor, name: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"{name}: expected 4 dimensions [N, C, H, W], got {list(x.shape)}")
    _check_dtype(x, name)
    if x.shape[1] == 0 or x.shape[2] * x.shape[3] == 0:
        raise ValueError(f"{name}: expected C, H and W of at least 1, got shape {list(x.shape)}")


def _check_dtype(t: Tensor, name: str) -> None:
    if t.dtype not in DTYPES:
        known = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"{name}: expected one of {known}, got {t.dtype}")


def _check_device(t: Tensor, name: str, x: Tensor) -> None:
    if t.device != x.device:
        raise ValueError(f"{name}: expected a tensor on x's device {x.device}, got {t.device}")


def _check(t: Tensor, name: str, shape: tuple[int, ...], x: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
    if tuple(t.shape) != shape:
        raise ValueError(
            f"{name}: expected shape {list(shape)} for x of {list(x.shape)}, got {list(t.shape)}"
        )
    _check_dtype(t, name)
    _check_device(t, name, x)


def _as_dtype_of(x: Tensor, t: Tensor, name: str) -> Tensor:
    """t in x's dtype: a cast under autocast, an error outside of it, as torch's own layers do."""
    if t.dtype == x.dtype:
        return t
    if under_autocast(x):
        return t.to(x.dtype)
    raise TypeError(f"{name}: expected x's dtype {x.dtype} outside of autocast, got {t.dtype}")
