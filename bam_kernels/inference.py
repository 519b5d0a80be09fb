"""Inference in one operator: where nothing is differentiated and every norm's statistics are known.

Here is decided whether a module can take it, and its parameters are put in the operator's order
(csrc/operators.h). It runs at every call, before microseconds of work on a small map; so it looks
into the modules' own dictionaries, which `nn.Module.__getattr__` would do several times slower.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bam_kernels.backends import ABSENT
from bam_kernels.config import COMBINE_MODES
from bam_kernels.convolution_choice import by_library
from bam_kernels.dispatch import DTYPES, BackendUnavailableError, choose_backend
from bam_kernels.fusable import MOST_HIDDEN, MOST_MLP_HIDDEN, has_hooks, unfusable
from bam_kernels.ops.registry import backend_module
from bam_kernels.reference import ChannelBranch, SpatialBranch

Arguments = tuple[list[Tensor], list[int], list[float]]
"""(parameters, options, eps), as the operator `bam` takes them."""

_MODES = {name: i for i, name in enumerate(COMBINE_MODES)}


_PLAIN = (Tensor, nn.Parameter)


class _NotPlainError(Exception):
    """A layer that does more, or has less, than the operator would see."""


def refine(
    x: Tensor,
    channel: ChannelBranch | None,
    spatial: SpatialBranch | None,
    combine: str,
    residual: bool,
) -> Tensor | None:
    """The module's output, where kernels run and all that is asked for is inference.

    None where that is not so, or where x does not fit: the caller goes the long way, which tells.
    """
    if not (isinstance(x, Tensor) and x.dim() == 4 and x.dtype in DTYPES):
        return None
    if x.numel() == 0 or combine not in _MODES:
        return None
    try:
        backend = choose_backend(x)
    except BackendUnavailableError:  # raised again, behind the checks of the input
        return None
    if backend == "reference" or unfusable(channel, spatial) is not None:
        return None
    found = arguments(x, channel, spatial, combine, residual)
    if found is None or (backend == "triton" and not fits_triton(found, x)):
        return None
    params = found[0]
    for branch, name in ((spatial, "reduce"), (channel, "fc")):
        if branch is not None:
            first = branch._modules[name]
            first = first if name == "reduce" else first._modules["0"]
            weight = first._parameters["weight"]
            if weight.dtype != x.dtype or weight.shape[1] != x.shape[1]:
                return None
            if not weight.is_cpu if backend == "cpp" else weight.device != x.device:
                return None
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return torch.ops.bam_kernels.bam(x, *found)
    if type(x) not in _PLAIN or any(type(t) not in _PLAIN for t in params):
        return torch.ops.bam_kernels.bam(x, *found)
    # Past the dispatcher, which here takes as long as a small map.
    return backend_module(backend).bam_forward(x, *found)


def fits_triton(arguments: Arguments, x: Tensor) -> bool:
    """Whether the Triton kernels take a module: one hidden layer, no wider than they hold, and our
    own convolutions."""
    params, options, _ = arguments
    layers, spatial, hidden = options[2], options[5], options[10]
    if layers and (layers != 2 or params[0].shape[0] > MOST_MLP_HIDDEN):
        return False
    if not spatial:
        return True
    return hidden <= MOST_HIDDEN and by_library(hidden, x, inference=True) is None


def arguments(
    x: Tensor,
    channel: ChannelBranch | None,
    spatial: SpatialBranch | None,
    combine: str,
    residual: bool,
) -> Arguments | None:
    """What the operator `bam` takes for these branches, or None if it cannot stand for them.

    The branches themselves are what `bam_kernels.fusable.unfusable` lets pass.
    """
    params: list[Tensor] = []
    eps: list[float] = []
    try:
        layers, hidden_norm, norm = 0, False, False
        if channel is not None:
            layers, hidden_norm, norm = _channel(channel, x.shape[1], params, eps)
        options = [_MODES[combine], int(residual), layers, int(hidden_norm), int(norm)]
        options += [0, 0, 1, 0, 0, 0] if spatial is None else _spatial(spatial, params, eps)
    except _NotPlainError:
        return None
    if torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in params)):
        return None
    return params, options, eps


def _channel(
    branch: ChannelBranch, channels: int, params: list[Tensor], eps: list[float]
) -> tuple[int, bool, bool]:
    modules = branch._modules
    fcs, norm = list(modules["fc"]._modules.values()), modules.get("norm")
    hidden = modules.get("hidden_norm")
    norms = [None] * (len(fcs) - 1) if hidden is None else list(hidden._modules.values())
    norms.append(norm)
    width = channels
    for fc, each in zip(fcs, norms, strict=True):
        weight = _layer(fc, nn.Linear, params)
        if weight.shape[1] != width:
            raise _NotPlainError
        width = weight.shape[0]
        _norm(each, nn.BatchNorm1d, width, params, eps)
    if width != channels:
        raise _NotPlainError
    return len(fcs), hidden is not None, norm is not None


def _spatial(branch: SpatialBranch, params: list[Tensor], eps: list[float]) -> list[int]:
    if branch.bare_reduction:  # the operator puts a ReLU there; an Identity among the norms is seen
        raise _NotPlainError
    modules = branch._modules
    convs, norm = list(modules["dilated"]._modules.values()), modules.get("norm")
    hidden = modules.get("hidden_norm")
    norms = [None] * (len(convs) + 1) if hidden is None else list(hidden._modules.values())
    width = _layer(modules["reduce"], nn.Conv2d, params).shape[0]
    dilation = convs[0].dilation[0] if convs else 1
    for i, conv in enumerate(convs):
        _norm(norms[i], nn.BatchNorm2d, width, params, eps)
        weight = _layer(conv, nn.Conv2d, params)
        same = (dilation, dilation)
        if (
            tuple(weight.shape) != (width, width, 3, 3)
            or conv.padding != same
            or conv.dilation != same
            or conv.stride != (1, 1)
            or conv.padding_mode != "zeros"
        ):
            raise _NotPlainError
    _norm(norms[-1], nn.BatchNorm2d, width, params, eps)
    project = modules["project"]
    weight = _layer(project, nn.Conv2d, params)
    if (
        tuple(weight.shape) != (1, width, 1, 1)
        or project.stride != (1, 1)
        or project.padding != (0, 0)
    ):
        raise _NotPlainError
    _norm(norm, nn.BatchNorm2d, 1, params, eps)
    return [1, len(convs), dilation, int(hidden is not None), int(norm is not None), width]


def _layer(module: nn.Module, kind: type[nn.Module], params: list[Tensor]) -> Tensor:
    if type(module) is not kind or has_hooks(module) or "forward" in module.__dict__:
        raise _NotPlainError
    parameters = module._parameters
    weight, bias = parameters["weight"], parameters["bias"]
    params += (weight, ABSENT if bias is None else bias)
    return weight


def _norm(
    module: nn.Module | None,
    kind: type[nn.Module],
    width: int,
    params: list[Tensor],
    eps: list[float],
) -> None:
    if module is None:
        return
    if type(module) is not kind or has_hooks(module) or "forward" in module.__dict__:
        raise _NotPlainError
    buffers, parameters = module._buffers, module._parameters
    mean, variance = buffers["running_mean"], buffers["running_var"]
    if module.training or mean is None or variance is None or mean.shape[0] != width:
        raise _NotPlainError
    gamma, beta = parameters["weight"], parameters["bias"]
    params += (
        ABSENT if gamma is None else gamma,
        ABSENT if beta is None else beta,
        mean,
        variance,
    )
    eps.append(module.eps)
