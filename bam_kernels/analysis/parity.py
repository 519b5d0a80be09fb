"""Parity and cost of a module against another: one training step and one inference, measured."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

# Parity, by the error against float64. Both paths round, in different orders, and neither is the
# more exact one; where the module amplifies rounding (a batch norm over few values does) it
# amplifies that of both. Hence a bar of FACTOR times PyTorch's own float32 error, and under it a
# floor for where that error happens to come out small.
FACTOR = 3.0
OUTPUT_FLOOR = 2e-6
# Rounding shows in gradients by 1e-6 to 6e-5, most in the channel MLP, behind a batch norm over N
# values; what a kernel does wrong shows at 1e-3 and more.
GRADIENT_FLOOR = 1e-4
# Through a whole untrained network rounding flips some ReLUs, at which the gradient jumps: PyTorch
# against itself in another memory format is off by 0.2 to 4% (ResNet-50, 16 trials).
DEEP_GRADIENT_FLOOR = 0.1
# Gradients that are zero but for rounding have no relative error: those under this share of the
# module's largest are left out.
VANISHING = 1e-9


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One tensor's relative errors against float64, norm(a - truth) / norm(truth)."""

    what: str
    fused: float
    pytorch: float
    floor: float

    @property
    def bar(self) -> float:
        """The largest error of the fused path that counts as parity."""
        return max(self.floor, FACTOR * self.pytorch)

    @property
    def passed(self) -> bool:
        return self.fused <= self.bar  # False for NaN


@dataclasses.dataclass(frozen=True)
class Cost:
    """Seconds of the halves of a training step, and the bytes kept between them.

    `kept` leaves out parameters; `kept_input` is the share of it that is the module's input.
    """

    forward: float
    backward: float
    kept: int
    kept_input: int


@dataclasses.dataclass(frozen=True)
class Run:
    """What `measure` found: the tensors to compare, and the cost.

    `outputs` are those of the training step and of the inference behind it; `gradients` are by
    parameter name.
    """

    outputs: dict[str, Tensor]
    input_gradient: Tensor
    gradients: dict[str, Tensor]
    cost: Cost


def measure(
    module: nn.Module, x: Tensor, backward: Callable[[Tensor], None], repeats: int = 1
) -> Run:
    """A training step of `module` on x, whose running statistics it moves, and an inference.

    Args:
        module: any; it is left in eval mode.
        x: its input.
        backward: runs the backward pass from the output.
        repeats: training steps in all; the first gives the tensors, and the median of the others
            the seconds. With one step, its own seconds.
    """
    module.train()
    forward_seconds, backward_seconds = [], []
    for i in range(repeats):
        module.zero_grad(set_to_none=True)
        leaf = x.detach().clone().requires_grad_()
        with contextlib.ExitStack() as stack:
            storages = stack.enter_context(_kept_storages()) if i == 0 else {}
            start = _now(x.device)
            output = module(leaf)
            middle = _now(x.device)
        backward(output)
        end = _now(x.device)
        forward_seconds.append(middle - start)
        backward_seconds.append(end - middle)
        if i == 0:
            own = [t.untyped_storage().data_ptr() for t in module.parameters()]
            kept = {key: size for key, (size, _) in storages.items() if key not in own}
            trained = output.detach()
            input_gradient = leaf.grad
            gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
            kept_input = kept.get(leaf.untyped_storage().data_ptr(), 0)
    module.eval()
    with torch.inference_mode():
        inferred = module(x)
    skip = 1 if repeats > 1 else 0
    cost = Cost(
        statistics.median(forward_seconds[skip:]),
        statistics.median(backward_seconds[skip:]),
        sum(kept.values()),
        kept_input,
    )
    outputs = {"output, training": trained, "output, inference": inferred}
    return Run(outputs, input_gradient, gradients, cost)


def compare(fused: Run, pytorch: Run, truth: Run, *, deep: bool = False) -> list[Comparison]:
    """The errors of the outputs, of the input's gradient, and of the layers' gradients.

    Of the latter the worst: the fused path's, which is named, against PyTorch's. With `deep`, for
    a whole network, the median.
    """
    floor = DEEP_GRADIENT_FLOOR if deep else GRADIENT_FLOOR
    comparisons = [
        Comparison(
            what,
            _error(fused.outputs[what], exact),
            _error(pytorch.outputs[what], exact),
            OUTPUT_FLOOR,
        )
        for what, exact in truth.outputs.items()
    ]
    exact = truth.input_gradient
    errors = _error(fused.input_gradient, exact), _error(pytorch.input_gradient, exact)
    comparisons.append(Comparison("gradient of the input", *errors, floor))

    exact_gradients = _by_layer(truth.gradients)
    norms = {layer: float(gradient.norm()) for layer, gradient in exact_gradients.items()}
    least = VANISHING * max(norms.values())
    fused_errors, pytorch_errors = (
        {
            layer: _error(gradient, exact_gradients[layer])
            for layer, gradient in _by_layer(run.gradients).items()
            if norms[layer] > least
        }
        for run in (fused, pytorch)
    )
    # NaN, which no comparison orders, counts as the worst of all.
    worst = max(fused_errors, key=lambda n: (math.isnan(fused_errors[n]), fused_errors[n]))
    if deep and not math.isnan(fused_errors[worst]):
        what = f"gradients of {len(fused_errors)} layers, median"
        errors = (statistics.median(e.values()) for e in (fused_errors, pytorch_errors))
    else:
        what = f"gradient of {worst}, the worst layer's"
        errors = fused_errors[worst], max(pytorch_errors.values())
    comparisons.append(Comparison(what, *errors, floor))
    return comparisons


def _by_layer(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each layer's weight and bias in one vector.

    By itself a bias in front of a batch norm has a gradient of nothing but rounding, and a norm's
    weight that is a single number may have one that cancels to nothing.
    """
    layers: dict[str, list[Tensor]] = {}
    for name, gradient in gradients.items():
        layers.setdefault(name.rpartition(".")[0] or name, []).append(gradient.flatten())
    return {layer: torch.cat(parts) for layer, parts in layers.items()}


def _error(t: Tensor, truth: Tensor) -> float:
    return float((t - truth).norm() / truth.norm())


@contextlib.contextmanager
def _kept_storages() -> Iterator[dict[int, tuple[int, torch.UntypedStorage]]]:
    """By address, the storages that autograd keeps for backward: bytes, and the storage itself.

    The storage is held so that its address is not given to another one meanwhile.
    """
    storages: dict[int, tuple[int, torch.UntypedStorage]] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        storages[storage.data_ptr()] = (storage.nbytes(), storage)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield storages


def _now(device: torch.device) -> float:
    """Seconds on a clock, once the device has finished."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)
    return time.perf_counter()
