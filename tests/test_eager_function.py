"""The one function that eager training runs as (`bam_kernels.training`), beside the operators that
torch.compile and dispatch modes see: the same numbers, bit for bit, and all derivatives."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import COMBINES, PRESETS, make_map
from test_cpp_parity import need_cpp
from test_module import randomize, step, twin
from tolerances import relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from bam_kernels import BAM, SqueezeExcite, explain, training, use_backend

SHAPE = (5, 24, 6, 7)
OPTIONS = (
    *({"preset": preset} for preset in PRESETS),
    *({"combine": combine} for combine in COMBINES[1:]),
    {"channel": False},
    {"spatial": False},
    {"residual": False, "num_dilated": 0},
)


@pytest.fixture(params=("triton", "cpp"), autouse=True)
def backend(request, device):
    if request.param == "cpp":
        if device.type != "cpu":
            pytest.skip(f"the C++ backend has no kernels for {device.type}")
        need_cpp()
    with use_backend(request.param):
        yield request.param


class Seen(TorchDispatchMode):
    """Under it the operators run; which ones is noted."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("train", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize("layout", ("nchw", "channels_last"))
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_function_and_the_operators_agree(options, layout, train, device, seed, monkeypatch):
    """Output, gradients and buffers; and each way is the one that it should be."""
    ours = randomize(BAM(24, 4, **options, device=device)).train(train)
    other = copy.deepcopy(ours)
    x = make_map(SHAPE, torch.float32, device, layout)
    dout = torch.randn_like(x)
    calls = []
    apply = training._Refine.apply
    monkeypatch.setattr(training._Refine, "apply", lambda *a: calls.append(1) or apply(*a))
    found = step(ours, x, dout)
    assert calls == [1]
    with Seen() as seen:
        want = step(other, x, dout)
    assert calls == [1]
    assert any("bam_kernels.gate_linked" in name for name in seen.names)
    assert list(found) == list(want)
    for key, b in want.items():
        assert found[key].dtype == b.dtype and found[key].shape == b.shape, key
        assert torch.equal(found[key], b), key


@pytest.mark.parametrize("preset", PRESETS)
def test_every_parameter_alone(preset, device, seed):
    """What is frozen gets no gradient, and the others the ones that they had."""
    ours = randomize(BAM(24, 4, preset=preset, device=device, dtype=torch.float64)).train()
    x = make_map(SHAPE, torch.float64, device)
    dout = torch.randn_like(x)
    whole = step(ours, x, dout)
    largest = max(t.norm() for key, t in whole.items() if key.startswith("d"))
    for name, _ in ours.named_parameters():
        for key, parameter in ours.named_parameters():
            parameter.requires_grad_(key == name)
        ours.zero_grad(set_to_none=True)
        ours(x).backward(dout)
        for key, parameter in ours.named_parameters():
            if key != name:
                assert parameter.grad is None, key
        grad, want = dict(ours.named_parameters())[name].grad, whole[f"d{name}"]
        # A bias in front of batch statistics has none but rounding: beside the largest gradient.
        assert (grad - want).norm() <= 1e-12 * max(want.norm(), 1e-3 * largest), name


@pytest.mark.parametrize(
    "module", (lambda **f: BAM(24, 4, **f), lambda **f: SqueezeExcite(24, 4, **f))
)
def test_second_and_batched_derivatives(module, device, seed):
    """A gradient penalty, and several gradients at once, as the plain module has them."""
    ours = randomize(module(device=device, dtype=torch.float64)).eval()
    plain = twin(ours, torch.float64)
    x = make_map(SHAPE, torch.float64, device)
    douts = torch.randn(3, *SHAPE, dtype=torch.float64, device=device)
    results = []
    for each in (ours, plain):
        leaf = x.clone().requires_grad_()
        out = each(leaf)
        rows = torch.autograd.grad(out, leaf, douts, is_grads_batched=True, retain_graph=True)[0]
        (first,) = torch.autograd.grad(out, leaf, douts[0], create_graph=True)
        parameters = [p for p in each.parameters() if p.requires_grad]
        second = torch.autograd.grad(
            first.square().sum(), [leaf, *parameters], allow_unused=True, materialize_grads=True
        )
        results.append([rows, first.detach(), *second])
    for a, b in zip(*results, strict=True):
        if b.norm() > 0:
            assert relative_error(a, b) <= 1e-10
        else:
            assert a.norm() == 0


def test_a_strided_input_and_an_expanded_gradient(device, seed, backend):
    """Which the kernels cannot walk: copied, and the gradient is that of the input itself."""
    ours = randomize(BAM(24, 4, device=device, dtype=torch.float64)).eval()
    plain = twin(ours, torch.float64)
    x = make_map(SHAPE, torch.float64, device, "strided")
    assert explain(ours, x).backend == backend
    found, want = (
        step(m, x, torch.ones(1, 1, 1, 1, dtype=x.dtype).expand(SHAPE)) for m in (ours, plain)
    )
    for key, b in want.items():
        if b.is_floating_point():
            assert relative_error(found[key], b) <= 1e-10, key
