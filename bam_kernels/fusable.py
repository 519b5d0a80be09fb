"""What the fused path can see of a module, and why it leaves the rest to PyTorch's own operators.

It takes parameters out of the layers and never calls them. Hooks, layers of other classes, forwards
of an instance's own and the like would be passed by; each has its reason here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from bam_kernels.convolution_choice import by_library
from bam_kernels.reference import ChannelBranch, SpatialBranch

MOST_MLP_SAMPLES = 512
"""Samples whose batch statistics the channel MLP takes: a program holds some channels, or some
hidden units, of all of them in registers. More would spill, by ahead-of-time compilation."""

MOST_HIDDEN = 128
"""Channels inside of the spatial branch: its kernels hold all of a tile's."""

MOST_MLP_HIDDEN = 256
"""Hidden units of the channel MLP: without batch statistics programs may hold those of 16 samples
at a time, and spill beyond."""


def unfusable(channel: ChannelBranch | None, spatial: SpatialBranch | None) -> str | None:
    """Why these branches cannot take the fused path; None if they can."""
    if _transformed():
        return "torch.func or forward-mode derivatives, which the operators do not have"
    if nn.modules.module._has_any_global_hook():
        return "global module hooks, which the fused path would not call"
    if spatial is not None:
        # The branch first: what is not a SpatialBranch may have no reduction.
        reason = _unseen(spatial, "the spatial branch", SpatialBranch)
        if reason is None:
            reason = _unseen(spatial.reduce, "spatial.reduce", nn.Conv2d)
        if reason is not None:
            return reason
        reduce = spatial.reduce
        plain = (reduce.kernel_size, reduce.stride, reduce.groups) == ((1, 1), (1, 1), 1)
        if not plain or reduce.padding not in ((0, 0), "valid", "same"):
            return "spatial.reduce is not a plain 1x1 convolution"
    if channel is not None:
        reason = _unseen(channel, "the channel branch", ChannelBranch)
        if reason is None and channel.pool != "global":
            return f"the channel branch pools with pool={channel.pool!r}; the kernels pool globally"
        return reason
    return None


def _unseen(module: nn.Module, name: str, kind: type[nn.Module]) -> str | None:
    """Why calling this module may do more than `kind`'s own forward; None if it does just that."""
    if type(module) is not kind:
        return f"{name} is a {type(module).__name__}, not {kind.__name__}"
    if has_hooks(module):
        return f"{name} has hooks, which the fused path would not call"
    if "forward" in module.__dict__:
        return f"{name} has a forward of its own, which the fused path would not call"
    return None


def _transformed() -> bool:
    """Whether torch.func (vmap, grad, jvp, ...) or forward-mode differentiation is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def unfusable_mlp(branch: ChannelBranch, samples: int) -> str | None:
    """Why the channel MLP runs as PyTorch's own operators; None if it runs as one kernel."""
    if len(branch.fc) != 2:
        return f"the channel MLP has {len(branch.fc) - 1} hidden layers; the kernel takes one"
    fc0, fc1 = branch.fc
    hidden_norm = None if branch.hidden_norm is None else branch.hidden_norm[0]
    norms = [norm for norm in (hidden_norm, branch.norm) if norm is not None]
    for module in (fc0, fc1, *norms):
        if type(module) not in (nn.Linear, nn.BatchNorm1d):
            return f"the channel MLP holds a {type(module).__name__}"
        if has_hooks(module):
            return "a layer of the channel MLP has hooks, which the kernel would not call"
        if "forward" in module.__dict__:
            return "a layer of the channel MLP has a forward of its own"
    if any(map(_is_odd, norms)):
        return "a batch norm of the channel MLP lacks one of its buffers"
    widths = (fc1.out_features, fc1.in_features)
    if widths != (fc0.in_features, fc0.out_features) or any(
        norm is not None and norm.num_features != width
        for norm, width in ((hidden_norm, fc0.out_features), (branch.norm, fc0.in_features))
    ):
        return "the channel MLP's layers do not fit C to h to C"
    if fc0.out_features > MOST_MLP_HIDDEN:
        return (
            f"its hidden layer has {fc0.out_features} units; the kernels take {MOST_MLP_HIDDEN} at "
            "most"
        )
    # One comparison, and no size in the words: torch.compile would tie its graph to the batch.
    if any(uses_batch_stats(norm) for norm in norms) and samples > MOST_MLP_SAMPLES:
        return (
            f"the batch is over {MOST_MLP_SAMPLES} samples, the most whose statistics one program "
            "takes"
        )
    return None


def unfusable_spatial(branch: SpatialBranch, x: Tensor) -> str | None:
    """Why what follows the reduction runs as PyTorch's own operators in training; None if it is
    fused. x is the module's input, or what else has its device and dtype."""
    convs = list(branch.dilated)
    norms = [] if branch.hidden_norm is None else list(branch.hidden_norm)
    norms += [] if branch.norm is None else [branch.norm]
    hidden = branch.reduce.out_channels
    if branch.bare_reduction:
        return "no ReLU follows its reduction; the kernels put one there"
    if any(type(norm) is nn.Identity for norm in norms):
        return "norms follow some of its hidden layers only"
    if hidden > MOST_HIDDEN:
        return f"it is {hidden} channels wide inside; the kernels take {MOST_HIDDEN} at most"
    if convs and (reason := by_library(hidden, x)) is not None:
        return reason
    for module in (*convs, branch.project, *norms):
        if type(module) not in (nn.Conv2d, nn.BatchNorm2d):
            return f"it holds a {type(module).__name__}"
        if has_hooks(module):
            return "one of its layers has hooks, which the kernels would not call"
        if "forward" in module.__dict__:
            return "one of its layers has a forward of its own"
    if any(map(_is_odd, norms)):
        return "one of its batch norms lacks one of its buffers"
    for i, conv in enumerate(convs):
        d = convs[0].dilation[0]
        expected = ((hidden, hidden, 3, 3), (1, 1), (d, d), (d, d), "zeros")
        found = (tuple(conv.weight.shape), conv.stride, conv.dilation, conv.padding)
        if (*found, conv.padding_mode) != expected:
            return f"dilated.{i} is not a 3x3 convolution of {hidden} channels that keeps the size"
        if (conv.bias is None) != (convs[0].bias is None):
            return "some of its dilated convolutions have a bias and some have none"
    project = branch.project
    if tuple(project.weight.shape) != (1, hidden, 1, 1) or project.stride != (1, 1):
        return "project is not a 1x1 convolution to one channel"
    if project.padding != (0, 0):
        return "project is padded"
    if any(norm.num_features != width for norm, width in _widths(branch, hidden)):
        return "its batch norms do not fit its layers"
    if len({part is None for norm in norms for part in (norm.weight, norm.bias)}) > 1:
        return "some of its batch norms have a scale and a shift and some lack one"
    return None


def _is_odd(norm: nn.Module) -> bool:
    """Whether a batch norm has been robbed of a single buffer, of which torch makes its own."""
    uncounted = norm.running_mean is not None and norm.num_batches_tracked is None
    return uncounted or (norm.running_mean is None) != (norm.running_var is None)


def _widths(branch: SpatialBranch, hidden: int) -> list[tuple[nn.Module, int]]:
    """The spatial branch's norms, and how many channels each should have."""
    found = [] if branch.hidden_norm is None else [(norm, hidden) for norm in branch.hidden_norm]
    return found if branch.norm is None else [*found, (branch.norm, 1)]


def has_hooks(module: nn.Module) -> bool:
    """Whether something is called with the module that its forward alone does not do."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def uses_batch_stats(norm: nn.Module | None) -> bool:
    """As torch's batch norm decides: while training, or where no statistics are kept."""
    return norm is not None and (norm.training or norm.running_mean is None)
