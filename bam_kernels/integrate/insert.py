"""`insert_bam`: put BAMs into any network, keeping its state_dict's keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from bam_kernels.integrate import fake_run, names, places
from bam_kernels.integrate.channels import (
    loops_over_children,
    output_channels,
    runs_children_in_order,
)
from bam_kernels.integrate.identity import start_as_identity
from bam_kernels.integrate.places import Place
from bam_kernels.modules import BAM

_CHILD = "bam"  # the name under which a layer holds its BAM, hence the prefix of the new keys


def insert_bam(
    model: nn.Module,
    after: Sequence[str] | None = None,
    *,
    at: str | None = None,
    identity_start: bool = False,
    module: Callable[..., nn.Module] = BAM,
    example_input: Tensor | Sequence[int] | None = None,
    **options: Any,
) -> dict[str, nn.Module]:
    """Refine the output of layers of `model`, in place, each by a BAM of its own.

    Which layers is said by name, with `after`, or by their place in the network, with `at`:

    - ``at="bottlenecks"``, the paper's: the end of each stage, right before the map is downsampled
      (Fig. 1). In a ResNet these are layer1, layer2 and layer3. What stands before the network's
      first block, its stem, has none, as in the paper.
    - ``at="blocks"``, its BAM-C (Table 2): behind every residual block, or block whose branches are
      concatenated (Fire, Inception, dense blocks). Blocks of the same class without a shortcut are
      blocks as well.

    Both are found by following the maps through a run, not by names. Where a stage is put out by a
    container with a loop of its own (a dense block), the BAM stands first in the ``nn.Sequential``
    that follows: in a DenseNet ``features.transition1.bam``.

    No key of the state_dict is renamed: a layer ``layer1`` gains the keys ``layer1.bam.*``. Into an
    ``nn.Sequential`` the BAM goes as the last child; any other layer gets it as a child ``bam``
    and runs it on its output in a forward hook. Hooks registered before see the unrefined output.

    The number of channels is that of the layer's output in a run of a copy of the model, in eval
    mode and on fake tensors: nothing is computed, and the model's buffers, modes and the random
    number generators stay as they are. A model whose forward cannot run that way is asked what its
    layers declare, where that leaves no doubt; `at` needs the run.

    A fresh BAM changes what the network puts out: M is about 0.5 at first, so each one scales
    its features by about 1.5. A network that is trained already is better served by
    ``identity_start=True``: M begins as 0.0067 everywhere, so that each BAM scales its features by
    1.0067. The gradients of the branches begin 40 times smaller than in a fresh BAM: train them
    with an optimizer that does not mind (AdamW), and with a larger learning rate than the rest.
    With ``residual=False, combine="sigmoid_sum"`` besides, M is 1 at the start: the outputs are
    equal bit for bit, the gradients as large as any, and a BAM may weaken features as well.

    Args:
        model: any module.
        after: names of layers as in ``model.named_modules()``, or globs of them as `fnmatch` has
            them ("layer?", "*.conv2"; a * takes dots too). Their outputs are [N, C, H, W]. A glob
            leaves out the insides of a BAM or SqueezeExcite.
        at: "bottlenecks" or "blocks", in place of `after`.
        identity_start: whether what is inserted begins as the identity, nearly.
        module: makes what is inserted, ``module(channels, **options)``: `bam_kernels.BAM`,
            `bam_kernels.SqueezeExcite`, their peers in `bam_kernels.reference`, or any other.
        example_input: the model's input in that run, a tensor or its shape; [1, 3, 224, 224] unless
            given, in the dtype and on the device of the model's first parameter.
        **options: passed on to `module` (reduction, preset, combine, ...).

    Returns:
        By name in the changed model ("layer1.bam"), what was inserted, in the order of `after` or
        of the forward: on the device, in the dtype and in the training mode of the layer that it
        refines.

    Raises:
        TypeError: an argument of the wrong type, or an option that `module` does not take;
            `identity_start` with a `module` that makes neither BAMs nor SqueezeExcites.
        ValueError: neither or both of `after` and `at`; a name that matches no layer, or an `at`
            that no layer stands at; a layer that has a child ``bam`` already, that the
            model never calls, whose output is no [N, C, H, W], or that loops over its children by
            itself (a ModuleDict with a forward, say); an option out of range. The model is
            unchanged after any error.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not callable(module):
        raise TypeError(f"module: expected a class like bam_kernels.BAM, got {module!r}")
    if not isinstance(identity_start, bool):
        raise TypeError(f"identity_start: expected a bool, got {type(identity_start).__name__}")
    for name in ("device", "dtype"):
        if name in options:
            raise TypeError(f"{name}: is that of the refined layer; expected not to be given")
    if (after is None) == (at is None):
        raise ValueError(
            f"after, at: expected one of the two, got {'neither' if at is None else 'both'}"
        )
    if at is None:
        targets = names.match(model, after)
        _check(targets, "after")
        channels = output_channels(model, targets, fake_run.example(model, example_input))
        found = [Place(name, target, channels[name]) for name, target in targets.items()]
    else:
        found = places.find(model, at, fake_run.example(model, example_input))
        _check({place.name: place.module for place in found}, "at")
    inserted = {place.name: _make(module, place, model, options) for place in found}
    if identity_start:
        for made in inserted.values():
            start_as_identity(made)

    for place in found:
        target = place.module
        target.add_module(_CHILD, inserted[place.name])
        if place.front:
            others = [name for name in target._modules if name != _CHILD]
            for name in others:  # behind the BAM, under their names and in their order
                target._modules[name] = target._modules.pop(name)
        elif not runs_children_in_order(target):
            # A hook and not a subclass, an overridden `forward` or a wrapper: those rename keys,
            # break pickling (a class made at run time) or go on pointing to the original after a
            # deepcopy (a bound method). A module-level function that finds the BAM through the
            # module that it is called with copies, pickles, traces and exports.
            target.register_forward_hook(_refine_output)
    return {f"{name}.{_CHILD}": bam for name, bam in inserted.items()}


def _check(targets: dict[str, nn.Module], argument: str) -> None:
    for name, target in targets.items():
        if hasattr(target, _CHILD):
            raise ValueError(
                f"{argument}: expected layers without a {_CHILD!r} of their own, "
                f"but {name!r} has one already ({type(getattr(target, _CHILD)).__name__})"
            )
        if loops_over_children(target):
            raise ValueError(
                f"{argument}: {name!r} is a {type(target).__name__}, a container with a loop of "
                f"its own over its children, which would take a {_CHILD!r} for one of them; "
                "name a layer inside or around it"
            )


def _refine_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return getattr(module, _CHILD)(output)


def _make(
    module: Callable[..., nn.Module], place: Place, model: nn.Module, options: dict[str, Any]
) -> nn.Module:
    try:
        made = module(place.channels, **options)
    except (TypeError, ValueError) as error:
        where = f"{'before' if place.front else 'after'} {place.name!r}"
        raise type(error)(f"{where} ({place.channels} channels): {error}") from error
    if not isinstance(made, nn.Module):
        raise TypeError(f"module: expected it to make a torch.nn.Module, got {type(made).__name__}")
    like = fake_run.first_parameter(place.module)
    like = fake_run.first_parameter(model) if like is None else like
    if like is not None:
        made = made.to(device=like.device, dtype=like.dtype)
    return made.train(place.module.training)
