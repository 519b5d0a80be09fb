"""A whole BAM: inference, forward, backward and a training step, each side checked first."""

from __future__ import annotations

import copy

import pytest
import suite
import torch

from bam_kernels.benchmarking import saved, timing
from bam_kernels.benchmarking.sites import (
    BACKWARD_PASSES,
    FORWARD_PASSES,
    INFERENCE,
    TRAINING,
    Shape,
)


@pytest.fixture
def run(pytestconfig: pytest.Config) -> suite.Suite:
    return pytestconfig.suite


def _side(run: suite.Suite, side: str, shape: Shape, preset: str, training: bool):
    """The module to hold and the callable to time, compared with float64."""
    plain, fused = suite.modules(shape, preset, run.device, training)
    module = fused if side == suite.FUSED else plain
    call = run.compiled(module) if side == suite.COMPILE else module
    x = shape.random(run.device)
    exact = copy.deepcopy(plain).double()
    before = copy.deepcopy(module.state_dict())
    with torch.no_grad():
        expected, found = exact(x.double()), call(x)
    module.load_state_dict(before)
    error = timing.relative_error(found, expected)
    assert error <= run.limit(shape, TRAINING if training else INFERENCE)
    return module, call, error


def test_inference(run, measure, shape, preset, side):
    with run.backend(side), torch.inference_mode(side != suite.COMPILE), torch.no_grad():
        _, call, error = _side(run, side, shape, preset, training=False)
        inputs = [shape.random(run.device) for _ in range(run.sets(shape))]
        calls = [lambda x=x: call(x) for x in inputs]
        measure(
            run.rotating(calls, side), FORWARD_PASSES * shape.x_bytes,
            relative_error=error, peak_bytes=run.peak_bytes(calls[0]),
        )  # fmt: skip


def test_forward(run, measure, shape, preset, side):
    """In training, with what it keeps for the backward."""
    with run.backend(side):
        module, call, error = _side(run, side, shape, preset, training=True)
        inputs = [shape.random(run.device).requires_grad_() for _ in range(run.sets(shape))]
        calls = [lambda x=x: call(x) for x in inputs]
        kept = saved.saved_bytes(call, inputs[0], module)
        measure(
            run.rotating(calls, side), FORWARD_PASSES * shape.x_bytes,
            relative_error=error, saved_bytes=kept, saved_share=kept / shape.x_bytes,
        )  # fmt: skip


def test_backward(run, measure, shape, preset, side):
    """Of one graph again and again, which frees nothing: what one call takes of the two above."""
    if side == suite.GRAPHED:
        pytest.skip("a graph of the backward alone has no forward's memory to read")
    with run.backend(side):
        module, call, error = _side(run, side, shape, preset, training=True)
        x, dout = shape.random(run.device).requires_grad_(), shape.random(run.device)
        out = call(x)
        wanted = [x, *module.parameters()]

        def backward():
            torch.autograd.grad(out, wanted, dout, retain_graph=True, allow_unused=True)

        measure(backward, BACKWARD_PASSES * shape.x_bytes, relative_error=error)


def test_training_step(run, measure, shape, preset, side):
    with run.backend(side):
        module, call, error = _side(run, side, shape, preset, training=True)
        parameters = list(module.parameters())

        def step(x, dout):
            call(x).backward(dout)
            x.grad = None
            for parameter in parameters:
                parameter.grad = None

        inputs = [
            (shape.random(run.device).requires_grad_(), shape.random(run.device))
            for _ in range(run.sets(shape))
        ]
        calls = [lambda each=each: step(*each) for each in inputs]
        measure(
            run.rotating(calls, side), (FORWARD_PASSES + BACKWARD_PASSES) * shape.x_bytes,
            relative_error=error, peak_bytes=run.peak_bytes(calls[0]),
        )  # fmt: skip
