"""The kinks of ReLUs: a unit that rounding switches moves gradients by far more than rounding does.

In eager as much as in the kernels; only where both have the same units on can they be compared.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from bam_kernels.reference import ChannelBranch, SpatialBranch

NEAR = 1e-5
"""In float32 the values in front of ReLUs agree to about 1e-6."""


def _branches(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, ChannelBranch | SpatialBranch)]


def _hidden_layers(branch: nn.Module) -> list[nn.Module]:
    if isinstance(branch, SpatialBranch):
        return [branch.reduce, *branch.dilated]
    return list(branch.fc[:-1])


def without_kinks(module: nn.Module) -> nn.Module:
    """Every hidden unit clearly on or clearly off: for half types, whose rounding is coarse."""
    with torch.no_grad():
        for branch in _branches(module):
            for layer in _hidden_layers(branch):
                layer.weight.mul_(0.1)
                layer.bias.copy_(3.0 - 6.0 * (torch.arange(len(layer.bias)) % 3 == 2))
            for norm in branch.hidden_norm or ():
                norm.bias.copy_(9.0 - 18.0 * (torch.arange(len(norm.bias)) % 3 == 2))
            last = branch.project if isinstance(branch, SpatialBranch) else branch.fc[-1]
            last.weight.mul_(0.1)  # and no sigmoid saturated
    return module


@contextlib.contextmanager
def closest_to_a_kink(module: nn.Module) -> Iterator[list[float]]:
    """The least distance of a hidden unit from zero, over the forwards of a reference module."""
    closest = [math.inf]

    def watch(layer: nn.Module, args: object, out: Tensor) -> None:
        closest[0] = min(closest[0], out.detach().abs().min().item())

    layers = [
        layer
        for branch in _branches(module)
        for layer in (branch.hidden_norm or _hidden_layers(branch))
    ]
    handles = [layer.register_forward_hook(watch) for layer in layers]
    try:
        yield closest
    finally:
        for handle in handles:
            handle.remove()


class NoClearInputError(AssertionError):
    """A unit is near its kink whatever the input: one behind units that are off, by its bias."""


def module_and_input(
    make_module: Callable[[], tuple[nn.Module, nn.Module]], make_input: Callable[[], Tensor]
) -> tuple[nn.Module, nn.Module, Tensor]:
    """(module, its float64 twin, an input that is clear of their kinks), drawn anew together where
    no input is clear of a module's."""
    for _ in range(4):
        module, truth = make_module()
        with contextlib.suppress(NoClearInputError):
            return module, truth, clear_of_kinks(make_input, truth, truth)
    raise NoClearInputError("no module of 4 draws that has an input clear of its kinks")


def clear_of_kinks(
    make: Callable[[], Tensor], module: nn.Module, call: Callable[[Tensor], object]
) -> Tensor:
    """An input of `make` with which no hidden unit of the float64 `module` is near its kink.

    `call` runs the module on it; its batch norms' buffers stay as they are.
    """
    state = {key: value.clone() for key, value in module.state_dict().items()}
    for _ in range(50):
        made = make()
        with torch.no_grad(), closest_to_a_kink(module) as closest:
            call(made.double())
        module.load_state_dict(state)
        if closest[0] > NEAR or made.dtype != torch.float32:
            return made
    raise NoClearInputError("no input without a unit near its kink in 50 draws")
