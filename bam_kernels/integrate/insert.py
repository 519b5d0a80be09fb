"""`insert_bam`: put BAMs behind named layers of any network, keeping its state_dict's keys."""

from __future__ import annotations

import copy
import difflib
import fnmatch
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bam_kernels import reference
from bam_kernels.modules import BAM

_CHILD = "bam"  # the name under which a layer holds its BAM, hence the prefix of the new keys
_DEFAULT_INPUT = (1, 3, 224, 224)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def insert_bam(
    model: nn.Module,
    after: Sequence[str],
    *,
    module: Callable[..., nn.Module] = BAM,
    example_input: Tensor | Sequence[int] | None = None,
    **options: Any,
) -> dict[str, nn.Module]:
    """Refine the output of layers of `model`, in place, each by a BAM of its own.

    For a torchvision or timm ResNet, ``after=["layer1", "layer2", "layer3"]`` are the paper's
    places: every bottleneck of the network (Fig. 1), where the map is about to be downsampled.

    No key of the state_dict is renamed: a layer ``layer1`` gains the keys ``layer1.bam.*``. Into an
    ``nn.Sequential`` the BAM goes as the last child; any other layer gets it as a child ``bam``
    and runs it on its output in a forward hook. Hooks registered before see the unrefined output.

    The number of channels is that of the layer's output in a run of a copy of the model, in eval
    mode and on fake tensors: nothing is computed, and the model's buffers, modes and the random
    number generators stay as they are. A model whose forward cannot run that way is asked what its
    layers declare, where that leaves no doubt.

    Args:
        model: any module.
        after: names of layers as in ``model.named_modules()``, or globs of them as `fnmatch` has
            them ("layer?", "*.conv2"; a * takes dots too). Their outputs are [N, C, H, W]. A glob
            leaves out the insides of a BAM or SqueezeExcite.
        module: makes what is inserted, ``module(channels, **options)``: `bam_kernels.BAM`,
            `bam_kernels.SqueezeExcite`, their peers in `bam_kernels.reference`, or any other.
        example_input: the model's input in that run, a tensor or its shape; [1, 3, 224, 224] unless
            given, in the dtype and on the device of the model's first parameter.
        **options: passed on to `module` (reduction, preset, combine, ...).

    Returns:
        By name in the changed model ("layer1.bam"), what was inserted, in the order of `after`: on
        the device, in the dtype and in the training mode of the layer that it refines.

    Raises:
        TypeError: an argument of the wrong type, or an option that `module` does not take.
        ValueError: a name that matches no layer; a layer that has a child ``bam`` already, that the
            model never calls, whose output is no [N, C, H, W], or that loops over its children by
            itself (a ModuleDict with a forward, say); an option out of range. The model is
            unchanged after any error.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not callable(module):
        raise TypeError(f"module: expected a class like bam_kernels.BAM, got {module!r}")
    for name in ("device", "dtype"):
        if name in options:
            raise TypeError(f"{name}: is that of the refined layer; expected not to be given")
    targets = _match(model, after)
    for name, target in targets.items():
        if hasattr(target, _CHILD):
            raise ValueError(
                f"after: expected layers without a {_CHILD!r} of their own, "
                f"but {name!r} has one already ({type(getattr(target, _CHILD)).__name__})"
            )
        if isinstance(target, _CONTAINERS) and not _runs_children_in_order(target):
            raise ValueError(
                f"after: {name!r} is a {type(target).__name__}, a container with a loop of its own "
                f"over its children, which would take a {_CHILD!r} for one of them; "
                "name a layer inside or around it"
            )
    channels = _output_channels(model, targets, example_input)
    inserted = {
        name: _make(module, name, target, channels[name], model, options)
        for name, target in targets.items()
    }

    for name, target in targets.items():
        target.add_module(_CHILD, inserted[name])
        if not _runs_children_in_order(target):
            # A hook and not a subclass, an overridden `forward` or a wrapper: those rename keys,
            # break pickling (a class made at run time) or go on pointing to the original after a
            # deepcopy (a bound method). A module-level function that finds the BAM through the
            # module that it is called with copies, pickles, traces and exports.
            target.register_forward_hook(_refine_output)
    return {f"{name}.{_CHILD}": bam for name, bam in inserted.items()}


def _refine_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return getattr(module, _CHILD)(output)


def _runs_children_in_order(module: nn.Module) -> bool:
    """Whether a child that is added runs on the output: a Sequential with nothing overridden."""
    return (
        isinstance(module, nn.Sequential)
        and type(module).forward is nn.Sequential.forward
        and "forward" not in vars(module)
    )


def _make(
    module: Callable[..., nn.Module],
    name: str,
    target: nn.Module,
    channels: int,
    model: nn.Module,
    options: dict[str, Any],
) -> nn.Module:
    try:
        made = module(channels, **options)
    except (TypeError, ValueError) as error:
        raise type(error)(f"after {name!r} ({channels} channels): {error}") from error
    if not isinstance(made, nn.Module):
        raise TypeError(f"module: expected it to make a torch.nn.Module, got {type(made).__name__}")
    like = _first_parameter(target)
    like = _first_parameter(model) if like is None else like
    if like is not None:
        made = made.to(device=like.device, dtype=like.dtype)
    return made.train(target.training)


def _first_parameter(module: nn.Module) -> nn.Parameter | None:
    return next((p for p in module.parameters() if p.is_floating_point()), None)


# --- which layers -----------------------------------------------------------------------------


def _match(model: nn.Module, after: Sequence[str]) -> dict[str, nn.Module]:
    """The layers that `after` names, each once, in its order."""
    if isinstance(after, str) or not isinstance(after, Iterable):
        hint = f"; write after=[{after!r}]" if isinstance(after, str) else ""
        raise TypeError(f"after: expected a list of names, got {type(after).__name__}{hint}")
    patterns = list(after)
    if not patterns:
        raise ValueError("after: expected at least one name, got an empty list")
    # A layer that is used in two places has two names; both are good.
    modules = dict(model.named_modules(remove_duplicate=False))
    del modules[""]
    open_to_globs = _outside_attention(modules)
    targets: dict[str, nn.Module] = {}
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"after: expected names (str), got {type(pattern).__name__}")
        found = [pattern] if pattern in modules else fnmatch.filter(open_to_globs, pattern)
        if not found:
            close = difflib.get_close_matches(pattern, modules, n=3)
            hint = f"; did you mean {', '.join(map(repr, close))}?" if close else ""
            raise ValueError(f"after: {pattern!r} matches no layer of {type(model).__name__}{hint}")
        for name in found:
            if not any(modules[name] is target for target in targets.values()):
                targets[name] = modules[name]
    return targets


def _outside_attention(modules: dict[str, nn.Module]) -> list[str]:
    """The names that are neither an attention module nor inside of one."""
    attention = tuple(
        name
        for name, module in modules.items()
        if isinstance(module, reference.BAM | reference.SqueezeExcite)
    )
    inside = tuple(f"{name}." for name in attention)
    return [name for name in modules if name not in attention and not name.startswith(inside)]


# --- how many channels ------------------------------------------------------------------------


def _output_channels(
    model: nn.Module,
    targets: dict[str, nn.Module],
    example_input: Tensor | Sequence[int] | None,
) -> dict[str, int]:
    shape, dtype, device = _example(model, example_input)
    outputs, failure = _fake_outputs(model, targets, shape, dtype, device)
    square = len(shape) == 4 and shape[2] == shape[3]
    channels: dict[str, int] = {}
    for name, target in targets.items():
        if name in outputs:
            channels[name] = _channels_of(name, outputs[name], square)
            continue
        if failure is None:
            raise ValueError(
                f"after: expected layers that the model calls; {name!r} "
                f"({type(target).__name__}) is never called in eval mode"
            )
        declared = _declared_channels(target)
        if declared is None:
            raise ValueError(
                f"model: a run on an input of shape {list(shape)} failed before {name!r}: "
                f"{type(failure).__name__}: {failure}; pass example_input="
            ) from failure
        channels[name] = declared
    return channels


def _example(
    model: nn.Module, example_input: Tensor | Sequence[int] | None
) -> tuple[tuple[int, ...], torch.dtype, torch.device]:
    if isinstance(example_input, Tensor):
        return tuple(example_input.shape), example_input.dtype, example_input.device
    shape = _DEFAULT_INPUT if example_input is None else example_input
    if not isinstance(shape, Sequence) or not all(type(size) is int for size in shape):
        raise TypeError(
            "example_input: expected a tensor, or its shape as a sequence of ints, "
            f"got {type(shape).__name__} {shape!r}"
        )
    like = _first_parameter(model)
    if like is None:
        return tuple(shape), torch.get_default_dtype(), torch.get_default_device()
    return tuple(shape), like.dtype, like.device


def _fake_outputs(
    model: nn.Module,
    targets: dict[str, nn.Module],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[dict[str, list[Any]], Exception | None]:
    """What the targets put out, call by call, up to the end of the forward or to its failure."""
    outputs: dict[str, list[Any]] = {}
    try:
        fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        twin = _fake_copy(model, fake_mode).eval()
        for name in targets:

            def record(_: nn.Module, args: Any, output: Any, name: str = name) -> None:
                outputs.setdefault(name, []).append(output)

            twin.get_submodule(name).register_forward_hook(record)
        with fake_mode, torch.no_grad(), torch.compiler.set_stance("force_eager"):
            twin(torch.empty(shape, dtype=dtype, device=device))
    except Exception as error:  # the model's own code: it may raise anything
        return outputs, error
    return outputs, None


def _fake_copy(model: nn.Module, fake_mode: FakeTensorMode) -> nn.Module:
    """A deep copy with a fake in the place of every tensor: no memory, no shared state.

    A copy, since a forward may keep things on its module (caches, counters) that would outlive it.
    """
    memo: dict[int, Any] = {}
    for part in model.modules():
        # Plain attributes as well: a weight that a parametrization computes cannot be deep-copied.
        for store in (part._parameters, part._buffers, vars(part)):
            for value in store.values():
                if isinstance(value, Tensor) and id(value) not in memo:
                    memo[id(value)] = fake_mode.from_tensor(value)
    twin = copy.deepcopy(model, memo)
    for part in twin.modules():
        # Functions are not copied: a hook that collects outputs would collect fakes.
        part._forward_hooks.clear()
        if isinstance(part, reference.BAM | reference.SqueezeExcite):
            vars(part).pop("observer", None)
    return twin


def _channels_of(name: str, outputs: list[Any], square: bool) -> int:
    for output in outputs:
        if not isinstance(output, Tensor) or output.dim() != 4:
            raise ValueError(
                f"after: expected layers with an output [N, C, H, W]; "
                f"{name!r} puts out {_describe(output)}"
            )
        # From a square image come square maps: where the square stands tells the layouts apart.
        if square and output.shape[1] == output.shape[2] != output.shape[3]:
            raise ValueError(
                f"after: expected layers with an output [N, C, H, W]; {name!r} puts out "
                f"{_describe(output)}, which looks like [N, H, W, C]"
            )
    found = sorted({output.shape[1] for output in outputs})
    if len(found) > 1:
        raise ValueError(
            f"after: expected one number of channels; {name!r} is called {len(outputs)} times "
            f"and puts out {found}"
        )
    return found[0]


def _describe(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor of shape {list(output.shape)}"
    return f"a {type(output).__name__}"


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
    if _runs_children_in_order(module):
        for child in reversed(module):
            if type(child) not in _KEEP_CHANNELS:
                return _declared_channels(child)
    return None
