"""`replace_bam`: ours in the place of every BAM of a network, whoever wrote it."""

from __future__ import annotations

import copy
import weakref
from typing import Any

from torch import nn

from bam_kernels import reference
from bam_kernels.config import POOL_MODES
from bam_kernels.integrate import match, probe
from bam_kernels.integrate.report import LeftAlone, Replaced, ReplaceReport
from bam_kernels.modules import BAM

_SQUARE_NOTE = (
    "the authors' code pools over a window of H x H, bam_kernels over all of H x W: the same where "
    "H = W; pool='square' does as theirs"
)


def replace_bam(model: nn.Module, *, inplace: bool = True, pool: str = "global") -> ReplaceReport:
    """Swap every known BAM in `model` for `bam_kernels.BAM`, over the same layers.

    Known are the authors' released code and its copies, pytorchcv's ``BamBlock``, fightingcv's
    ``BAMBlock``, changzy00's ``BAM``, and `bam_kernels.reference.BAM`. A module is one of them by
    the names, kinds and sizes of its layers and by what it computes: copies, with random weights,
    are run on the CPU beside ours, in inference and in training, and have the same output,
    gradients and statistics. What looks like a BAM and is none of these is left alone, and named
    with the reason.

    The layers of a BAM become layers of ours as they are: the same Parameter objects and buffers,
    on their devices, in their dtypes and training modes, frozen or not, with their hooks, so that
    an optimizer that was built before goes on working. The module's own hooks and attributes go
    along. A module in several places is swapped once; a second call finds nothing to do.
    `bam_kernels.strip` makes plain modules of torch of ours.

    The keys of the state_dict change, from the client's to ours: `convert_state_dict` makes one of
    the other, for checkpoints from before. So does the order of the parameters: an optimizer's
    state_dict fits the model as it was when the optimizer was built.

    Args:
        model: any module.
        inplace: False changes a deep copy instead. A model that is itself a BAM is not changed, but
            replaced: ``report.model`` is the new module then.
        pool: what a BAM becomes that pools over windows of H x H, as the authors' code does:
            "global" pools over all of H x W, which is the same where H = W, and warns, once, of
            other inputs; "square" does as the authors' code, in plain PyTorch.

    Returns:
        What was replaced, what was left alone and why, and the model.

    Raises:
        TypeError: `model` is no module.
        ValueError: an unknown `pool`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if pool not in POOL_MODES:
        raise ValueError(f"pool: expected one of {', '.join(POOL_MODES)}, got {pool!r}")
    if not inplace:
        model = copy.deepcopy(model)
    swapped: dict[nn.Module, Replaced] = {}
    left: list[LeftAlone] = []
    already: list[str] = []
    inside: set[nn.Module] = set()
    places = _places(model)
    for module, names in places.items():
        if module in inside:
            continue
        if isinstance(module, BAM):
            already += names
            continue
        found = _examine(module, names, pool)
        if isinstance(found, Replaced):
            swapped[module] = found
            inside.update(module.modules())
        elif found is not None:
            left.append(found)
    # Everything has been looked at; from here on nothing fails.
    for module, replaced in swapped.items():
        _take_over(replaced.module, module)
    for parent in places:
        for name, child in parent._modules.items():
            if child in swapped:
                parent._modules[name] = swapped[child].module
    if model in swapped:
        model = swapped[model].module
    return ReplaceReport(model, tuple(swapped.values()), tuple(left), tuple(already))


def _places(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """Every module of the model, and its names."""
    found: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found.setdefault(module, []).append(name)
    return {module: tuple(names) for module, names in found.items()}


def _examine(module: nn.Module, names: tuple[str, ...], pool: str) -> Replaced | LeftAlone | None:
    was = type(module).__name__
    if isinstance(module, reference.BAM):
        reason = _unlike_reference(module)
        if reason is not None:
            return LeftAlone(names, was, reason)
        made = BAM.__new__(BAM)
        nn.Module.__init__(made)
        for store in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            getattr(made, store).update(getattr(module, store))
        made.training = module.training
        return Replaced(names, was, "reference", made)
    found = match.find(module)
    if not isinstance(found, match.Match):
        return None if found is None else LeftAlone(names, was, found)
    try:
        pooled = probe.pooling(module, found)
    except ValueError as reason:
        return LeftAlone(names, was, str(reason))
    note = None
    if pooled == "square" and pool == "global":
        # Left to the preset, whose warning tells of inputs on which the two differ.
        pooled, note = None, _SQUARE_NOTE
    made = match.build(found, module, pooled)
    for name, value in _own_attributes(module).items():
        if hasattr(nn.Module, name) and callable(value):
            return LeftAlone(names, was, f"it has a {name!r} of its own instance")
        if hasattr(made, name) and not hasattr(nn.Module, name):
            reason = f"its attribute {name!r} would stand in the place of ours"
            return LeftAlone(names, was, reason)
    return Replaced(names, was, found.client.name, made, note)


def _unlike_reference(module: reference.BAM) -> str | None:
    """Why a module of the reference is more than that; None if it is not."""
    if type(module) is not reference.BAM:
        return f"it is a subclass of bam_kernels.reference.BAM, {type(module).__name__}"
    if "forward" in vars(module):
        return "it has a forward of its own instance"
    if module.observer is not None:
        return "it is observed by attention_maps()"
    return None


def _own_attributes(module: nn.Module) -> dict[str, Any]:
    """What was set on a module beside what every module has."""
    every = vars(nn.Module())
    return {name: value for name, value in vars(module).items() if name not in every}


def _take_over(made: BAM, module: nn.Module) -> None:
    """The module's hooks and attributes, as they are: its handles remove them from ours too."""
    for name in match.HOOKS:
        vars(made)[name] = vars(module)[name]
    for hooks in (vars(module)[name] for name in match.HOOKS):
        for hook in hooks.values() if isinstance(hooks, dict) else ():
            # torch hands such a hook its module, by a weak reference.
            if getattr(hook, "with_module", False):
                hook.module = weakref.ref(made)
    vars(made).update(_own_attributes(module))
