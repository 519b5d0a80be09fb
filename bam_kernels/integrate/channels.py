"""How many channels the output of a layer has: from a run, or from what its class declares."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bam_kernels.integrate import fake_run


def output_channels(
    model: nn.Module, targets: dict[str, nn.Module], like: fake_run.Example
) -> dict[str, int]:
    """By name the channels of each target's output.

    Raises:
        ValueError: a target is never called, its output is no [N, C, H, W], or the model cannot run
            and the target's class does not tell.
    """
    outputs, failure = fake_run.outputs(model, list(targets), like)
    channels: dict[str, int] = {}
    for name, target in targets.items():
        if name in outputs:
            channels[name] = channels_of(name, outputs[name], like.square)
            continue
        if failure is None:
            raise ValueError(
                f"after: expected layers that the model calls; {name!r} "
                f"({type(target).__name__}) is never called in eval mode"
            )
        declared = _declared_channels(target)
        if declared is None:
            raise ValueError(
                f"model: a run on an input of shape {list(like.shape)} failed before {name!r}: "
                f"{type(failure).__name__}: {failure}; pass example_input="
            ) from failure
        channels[name] = declared
    return channels


def channels_of(name: str, outputs: list[Any], square: bool, argument: str = "after") -> int:
    """C of a layer's outputs [N, C, H, W]; `square` where the model's input is as high as wide.

    Raises:
        ValueError: an output is none such, or they differ in C; `argument` is what named the layer.
    """
    for output in outputs:
        if not isinstance(output, Tensor) or output.dim() != 4:
            raise ValueError(
                f"{argument}: expected layers with an output [N, C, H, W]; "
                f"{name!r} puts out {_describe(output)}"
            )
        # From a square image come square maps: where the square stands tells the layouts apart.
        if square and output.shape[1] == output.shape[2] != output.shape[3]:
            raise ValueError(
                f"{argument}: expected layers with an output [N, C, H, W]; {name!r} puts out "
                f"{_describe(output)}, which looks like [N, H, W, C]"
            )
    found = sorted({output.shape[1] for output in outputs})
    if len(found) > 1:
        raise ValueError(
            f"{argument}: expected one number of channels; {name!r} is called {len(outputs)} times "
            f"and puts out {found}"
        )
    return found[0]


def _describe(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor of shape {list(output.shape)}"
    return f"a {type(output).__name__}"


def runs_children_in_order(module: nn.Module) -> bool:
    """Whether a child that is added runs on the output: a Sequential with nothing overridden."""
    return (
        isinstance(module, nn.Sequential)
        and type(module).forward is nn.Sequential.forward
        and "forward" not in vars(module)
    )


def loops_over_children(module: nn.Module) -> bool:
    """Whether it is a container with a loop of its own: a child that is added would be in it."""
    return isinstance(module, _CONTAINERS) and not runs_children_in_order(module)


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_KEEP_CHANNELS = (
    nn.Identity,
    nn.ReLU,
    nn.ReLU6,
    nn.SiLU,
    nn.GELU,
    nn.Hardswish,
    nn.LeakyReLU,
    nn.Dropout,
    nn.Dropout2d,
    nn.MaxPool2d,
    nn.AvgPool2d,
)
_RESNET_MODULES = ("torchvision.models.resnet", "timm.models.resnet")


def _declared_channels(module: nn.Module) -> int | None:
    """The output channels where the module's class settles them; None where it takes a guess."""
    kind = type(module)
    if kind in (nn.Conv2d, nn.ConvTranspose2d):
        return module.out_channels
    if kind in (nn.BatchNorm2d, nn.SyncBatchNorm):
        return module.num_features
    if kind.__module__ in _RESNET_MODULES and kind.__name__ in ("BasicBlock", "Bottleneck"):
        return (module.conv3 if kind.__name__ == "Bottleneck" else module.conv2).out_channels
    if runs_children_in_order(module):
        for child in reversed(module):
            if type(child) not in _KEEP_CHANNELS:
                return _declared_channels(child)
    return None
