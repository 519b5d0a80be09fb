"""Whether a client's BAM computes what ours does: a run of copies, with random weights and inputs.

Names and sizes of layers do not tell what a forward does with them. A fork with another activation,
another way to combine the branches, or a dropout, has the same keys.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from bam_kernels import reference
from bam_kernels.config import POOL_MODES
from bam_kernels.integrate.match import HOOKS, Match, build, find

_BOUND = 1e-9
"""Of the relative difference, in float64."""

_SAMPLES = 6
_DRAWS, _MOST_DRAWS = 2, 12
"""Of weights: with few hidden units a draw may leave them all below zero."""

_SQUARE, _WIDE = (6, 6), (5, 7)


def pooling(module: nn.Module, match: Match) -> str:
    """What the module pools over: "global" or "square", of `bam_kernels.config.POOL_MODES`.

    Raises:
        ValueError: it computes something else than the client's BAM, or could not be run.
    """
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.autocast("cpu", enabled=False),
            torch.inference_mode(False),
        ):
            return _pooling(module, match)
    except _DiffersError as difference:
        raise ValueError(f"{difference}{_hint(module, match)}") from None
    except Exception as error:  # their code: it may raise anything
        text = " ".join(str(error).split())
        raise ValueError(f"a run of a copy failed: {type(error).__name__}: {text}") from error


class _DiffersError(Exception):
    """Numbers that ours does not have."""


def _pooling(module: nn.Module, match: Match) -> str:
    config = match.config
    square, wide = _SQUARE, _WIDE
    if config.shrinkage:
        square, wide = (config.shrinkage + 1,) * 2, None
    generator = torch.Generator().manual_seed(0)
    twin = _bare_copy(module)
    alive: set[str] = set()
    poolings = set(POOL_MODES)
    draws = 0
    while draws < _DRAWS or (draws < _MOST_DRAWS and len(alive) < len(match.layers)):
        draws += 1
        _randomize(twin, generator)
        x = _input(config.channels, square, generator)
        for training, what in ((False, "in inference"), (True, "in training")):
            steps = _steps(twin, "global", x, training)
            if not training:
                alive |= steps[0].alive
            for name in ("numbers", "gradients", "statistics"):
                if _far(*(getattr(step, name) for step in steps)):
                    raise _DiffersError(f"{what} it gives other {name} than ours")
        if wide is None:
            continue
        x = _input(config.channels, wide, generator)
        for pool in sorted(poolings):
            theirs, ours = _steps(twin, pool, x, False)
            if _far(theirs.numbers, ours.numbers):
                poolings.remove(pool)
        if not poolings:
            raise _DiffersError(
                f"for inputs of {wide[0]}x{wide[1]} it gives other numbers than ours"
            )
    dead = {name for name, layer in match.layers.items() if [*layer.parameters()]} - alive
    if dead:
        raise _DiffersError(f"its layer for {min(dead)} has no effect in runs of a copy")
    return "global" if "global" in poolings else "square"


def _input(channels: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Samples whose means differ: behind a pooling nothing else is left of them."""
    options = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    x = torch.randn((_SAMPLES, channels, *size), **options)
    return x + 2 * torch.randn((_SAMPLES, channels, 1, 1), **options)


@dataclasses.dataclass(frozen=True)
class _Step:
    """What a forward and backward leave behind, each as one tensor; and by our names the layers
    whose weights have an effect."""

    numbers: Tensor
    gradients: Tensor
    statistics: Tensor
    alive: set[str]


def _steps(twin: nn.Module, pool: str, x: Tensor, training: bool) -> tuple[_Step, _Step]:
    """Of a copy of the module as it is, and of ours over another copy's layers."""
    theirs, inside = _bare_copy(twin), _bare_copy(twin)
    seen, again = find(theirs), find(inside)
    ours = build(again, inside, pool)
    return (
        _step(theirs, theirs.train(training), seen.layers, x),
        _step(partial(reference.BAM.forward, ours), ours.train(training), again.layers, x),
    )


def _step(
    call: Callable[[Tensor], Tensor], module: nn.Module, layers: dict[str, nn.Module], x: Tensor
) -> _Step:
    module.requires_grad_(True)
    x = x.clone().requires_grad_()
    names = sorted(layers)
    parameters = [p for name in names for p in layers[name].parameters()]
    buffers = [b for name in names for b in layers[name].buffers()]
    with torch.enable_grad():
        out = call(x)
        grads = torch.autograd.grad(
            (out * torch.cos(x)).sum(), [x, *parameters], allow_unused=True, materialize_grads=True
        )
    by_parameter = dict(zip(parameters, grads[1:], strict=True))
    return _Step(
        out.detach(),
        torch.cat([grad.flatten() for grad in grads]),
        torch.cat([out.new_zeros(1), *(b.double().flatten() for b in buffers)]),
        {n for n in names if any(by_parameter[p].any() for p in layers[n].parameters())},
    )


def _far(a: Tensor, b: Tensor) -> bool:
    return a.shape != b.shape or not (a - b).norm() <= _BOUND * b.norm()


class _LoneBatchNorm(nn.modules.batchnorm._BatchNorm):
    """What a SyncBatchNorm is to a single process, on any device."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


def _bare_copy(module: nn.Module) -> nn.Module:
    """A deep copy on the CPU, in float64, without hooks: those may hold, and do, anything. Its
    norms wait for no other process."""
    memo: dict[int, object] = {}
    for part in module.modules():
        for name in HOOKS:
            hooks = vars(part).get(name)
            if isinstance(hooks, dict):
                memo[id(hooks)] = type(hooks)()
        if isinstance(part, nn.SyncBatchNorm) and part.process_group is not None:
            memo[id(part.process_group)] = None
    twin = copy.deepcopy(module, memo)
    for part in twin.modules():
        if type(part) is nn.SyncBatchNorm:
            part.__class__ = _LoneBatchNorm
    if any(t.is_meta for t in (*twin.parameters(), *twin.buffers())):
        return twin.to_empty(device="cpu").to(torch.float64)
    return twin.to("cpu", torch.float64)


def _randomize(module: nn.Module, generator: torch.Generator) -> None:
    """Weights under which every layer counts; a new network's norms are the identity."""
    with torch.no_grad():
        for part in module.modules():
            norm = isinstance(part, nn.modules.batchnorm._BatchNorm)
            for name, t in (*part._parameters.items(), *part._buffers.items()):
                if t is None or not t.is_floating_point():
                    continue
                if norm and name in ("weight", "running_var"):
                    t.uniform_(0.5, 1.5, generator=generator)
                else:
                    t.normal_(generator=generator)
                    t.div_(t[0].numel() ** 0.5 if t.dim() > 1 else 2.0)


def _hint(module: nn.Module, match: Match) -> str:
    """What about a module that computes something else stands out."""
    layers = set(match.layers.values())
    known = (nn.ReLU, nn.Sigmoid, nn.Sequential, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Identity)
    odd = [
        f"{name!r} is a {type(part).__name__}"
        for name, part in module.named_modules()
        if part not in layers
        and type(part).__module__.startswith("torch.")
        and type(part) not in known
    ]
    for name, part in module.named_modules():
        if "gate_activation" in vars(part):
            activation = vars(part)["gate_activation"]
            text = getattr(activation, "__name__", None) or repr(activation)
            odd.append(f"{name}.gate_activation is {text}")
    return f" ({'; '.join(odd[:3])})" if odd else ""
