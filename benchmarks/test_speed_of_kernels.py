"""The two operators that touch maps of F's size: the gate (Eq. 1-2), and pooling with reduction."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import suite
import torch
from torch import Tensor, nn

from bam_kernels import functional, reference
from bam_kernels.benchmarking import timing
from bam_kernels.benchmarking.sites import INFERENCE, Shape, normal


@pytest.fixture
def run(pytestconfig: pytest.Config) -> suite.Suite:
    return pytestconfig.suite


def _plain_pool_reduce(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(dim=(2, 3)), nn.functional.conv2d(x, weight[:, :, None, None], bias)


def _gate_arguments(run: suite.Suite, shape: Shape) -> list[Tensor]:
    n, c, h, w = shape.size
    return [
        shape.random(run.device),
        normal((n, c), shape.torch_dtype, run.device),
        normal((n, 1, h, w), shape.torch_dtype, run.device),
    ]


def _pool_arguments(run: suite.Suite, shape: Shape) -> list[Tensor]:
    channels = shape.site.channels
    hidden = max(1, channels // 16)
    weight = normal((hidden, channels), shape.torch_dtype, run.device) / channels**0.5
    return [shape.random(run.device), weight, normal((hidden,), shape.torch_dtype, run.device)]


_KERNELS = {
    # Ours, the plain one, arguments, and the least of x-sized passes forward and backward.
    "gate": (functional.gate, reference.gate, _gate_arguments, 2, 3),
    "pool_reduce": (functional.pool_reduce, _plain_pool_reduce, _pool_arguments, 1, 2),
}


def _tuple(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def _side(run: suite.Suite, side: str, kernel: str) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    ours, plain, *_ = _KERNELS[kernel]
    return ours if side == suite.FUSED else run.compiled(plain) if side == suite.COMPILE else plain


def _error(run: suite.Suite, call: Callable, kernel: str, arguments: list[Tensor], shape: Shape):
    with torch.no_grad():
        expected = _tuple(_KERNELS[kernel][1](*(t.double() for t in arguments)))
        found = _tuple(call(*arguments))
    error = max(map(timing.relative_error, found, expected))
    assert error <= run.limit(shape, INFERENCE)
    return error


@pytest.mark.parametrize("kernel", tuple(_KERNELS))
def test_forward_of(run, measure, kernel, shape, kernel_side):
    _, _, make, passes, _ = _KERNELS[kernel]
    with run.backend(kernel_side), torch.no_grad():
        call = _side(run, kernel_side, kernel)
        inputs = [make(run, shape) for _ in range(run.sets(shape))]
        error = _error(run, call, kernel, inputs[0], shape)
        calls = [lambda each=each: call(*each) for each in inputs]
        measure(run.rotating(calls, kernel_side), passes * shape.x_bytes, relative_error=error)


@pytest.mark.parametrize("kernel", tuple(_KERNELS))
def test_backward_of(run, measure, kernel, shape, kernel_side):
    _, _, make, _, passes = _KERNELS[kernel]
    with run.backend(kernel_side):
        call = _side(run, kernel_side, kernel)
        arguments = make(run, shape)
        error = _error(run, call, kernel, arguments, shape)
        wanted = [t.requires_grad_() for t in arguments]
        out = _tuple(call(*arguments))
        douts = [torch.randn_like(t) for t in out]

        def backward():
            torch.autograd.grad(out, wanted, douts, retain_graph=True)

        measure(backward, passes * shape.x_bytes, relative_error=error)
