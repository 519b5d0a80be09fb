"""Launches that are kept and replayed: the same results, and only where nothing else happened."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import PRESETS, make_map
from conftest import kernel_device
from test_module import randomize, step
from torch import Tensor

import bam_kernels
from bam_kernels import use_backend
from bam_kernels.backends import triton
from bam_kernels.backends.triton import replay
from bam_kernels.testing import aot

LAUNCHERS = [getattr(triton, name) for name in triton.__all__ if name != "INTERPRETED"]


@pytest.fixture
def replays(monkeypatch):
    """Calls on any device are kept, and none is at first. Yields how many kinds each learns."""
    monkeypatch.setattr(replay, "applies", lambda x: True)
    for launcher in LAUNCHERS:
        launcher.kept.clear()
    yield lambda: {each.__name__: list(each.kept.values()) for each in LAUNCHERS if each.kept}
    for launcher in LAUNCHERS:
        launcher.kept.clear()


def inference(module, x: Tensor, dout: Tensor) -> dict[str, Tensor]:
    module.eval()
    with torch.no_grad():
        return {"out": module(x)}


@pytest.mark.parametrize("layout", ("nchw", "channels_last", "sliced"))
@pytest.mark.parametrize("options", ({}, {"num_dilated": 3}, {"spatial": False}), ids=str)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("call", (inference, step))
@pytest.mark.filterwarnings("ignore:.*pools over")
def test_same_bits_as_the_launchers(
    monkeypatch, replays, large_tiles, seed, call, preset, options, layout
):
    """The third call of a kind, with weights, statistics and a map that no call had before."""
    if preset != "paper" and "num_dilated" in options:
        options = {**options, "num_dilated": 1}
    module = bam_kernels.BAM(36, 9, preset=preset, **options).to(kernel_device())
    with use_backend("triton"):
        for _ in range(2):
            randomize(module)
            x = make_map((3, 36, 5, 7), torch.float32, kernel_device(), layout)
            call(module, x, torch.randn_like(x))
        learnt = replays()
        assert learnt and all(each is not None for found in learnt.values() for each in found)
        randomize(module)
        buffers = {k: v.clone() for k, v in module.state_dict().items()}
        x = make_map((3, 36, 5, 7), torch.float32, kernel_device(), layout)
        dout = torch.randn_like(x)
        again = call(module, x, dout)
        assert replays() == learnt  # nothing was learnt: all of it was replayed
        module.load_state_dict(buffers)
        monkeypatch.setattr(replay, "applies", lambda x: False)
        expected = call(module, x, dout)
    assert set(again) == set(expected)
    for name, value in expected.items():
        assert torch.equal(again[name], value), name
        assert again[name].stride() == value.stride(), name


def test_what_a_kind_is(replays, large_tiles, seed):
    """Shape, layout, alignment and dtype of x, and TF32, tell kinds apart; its values do not."""
    device = kernel_device()
    module = randomize(bam_kernels.BAM(32)).to(device).eval()
    flat = torch.randn(2 * 32 * 4 * 6 + 1, device=device)
    maps = [
        torch.randn(2, 32, 4, 6, device=device),
        torch.randn(3, 32, 4, 6, device=device),
        torch.randn(2, 32, 4, 6, device=device).contiguous(memory_format=torch.channels_last),
        flat[1:].view(2, 32, 4, 6),
    ]
    with use_backend("triton"), torch.no_grad():
        for kinds, x in enumerate(maps, 1):
            for _ in range(2):
                module(torch.empty_like(x).normal_() if kinds < 4 else x.normal_())
                assert len(triton.bam_forward.kept) == kinds
        module.double()
        module(maps[0].double())
        assert len(triton.bam_forward.kept) == 5
        before = torch.backends.cudnn.conv.fp32_precision
        try:
            torch.backends.cudnn.conv.fp32_precision = "tf32" if before != "tf32" else "ieee"
            module(maps[0].double())
        finally:
            torch.backends.cudnn.conv.fp32_precision = before
        assert len(triton.bam_forward.kept) == 6


def test_arguments_that_overlap_are_not_kept(replays, large_tiles, seed):
    """Two arguments that are one tensor in one call may be two in the next."""
    device = kernel_device()
    x, dout = torch.randn(2, 20, 3, 5, device=device), torch.randn(2, 20, 3, 5, device=device)
    c, s = torch.randn(2, 20, device=device), torch.randn(2, 1, 3, 5, device=device)

    def run(*maps: Tensor) -> tuple[Tensor, ...]:
        return triton.gate_backward_reduce(*maps, c, s, "sum")

    run(x, x)
    assert not triton.gate_backward_reduce.kept
    found = run(dout, x), run(dout, x)
    assert len(triton.gate_backward_reduce.kept) == 1
    for first, second in zip(*found, strict=True):
        assert (first is None) == (second is None)
        assert first is None or torch.equal(first, second)
    # And the replay on one tensor for both is what the launcher makes of it.
    for again, plain in zip(run(x, x), run(x, x.clone()), strict=True):
        assert again is None or torch.equal(again, plain)


def test_copies_are_not_kept(replays, large_tiles, seed):
    """A weight that has to be copied first: the launcher runs at every call, and is right."""
    device = kernel_device()
    module = randomize(bam_kernels.BAM(32)).to(device).eval()
    with use_backend("triton"), torch.no_grad():
        wide = torch.randn(2, 64, device=device)
        module.channel.fc[0].weight = torch.nn.Parameter(wide[:, ::2])
        for _ in range(3):
            x = torch.randn(2, 32, 4, 6, device=device)
            wide.normal_()
            out = module(x)
            with use_backend("reference"):
                plain = module(x)
            assert (out - plain).norm() < 1e-5 * plain.norm()
    assert list(triton.bam_forward.kept.values()) == [None]


def test_operators_are_not_kept(replays, large_tiles, seed):
    """What PyTorch does to a result is no launch: such a launcher runs at every call."""
    device = kernel_device()

    @replay.replayed
    def gate_and_one(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
        return triton.gate_forward(x, c, s, "sum", True).add_(1)

    for _ in range(2):
        x, c = torch.randn(2, 20, 3, 5, device=device), torch.randn(2, 20, device=device)
        s = torch.randn(2, 1, 3, 5, device=device)
        assert torch.equal(gate_and_one(x, c, s), triton.gate_forward(x, c, s, "sum", True) + 1)
    assert list(gate_and_one.kept.values()) == [None]


def test_kinds_are_forgotten(monkeypatch, replays, large_tiles, seed):
    monkeypatch.setattr(replay, "_MOST", 2)
    module = randomize(bam_kernels.BAM(32)).to(kernel_device()).eval()
    with use_backend("triton"), torch.no_grad():
        for n in (1, 2, 3, 4, 3):
            module(torch.randn(n, 32, 3, 4, device=kernel_device()))
            assert 0 < len(triton.bam_forward.kept) <= 2


def test_every_launch_can_be_seen():
    """No file launches a kernel but by `launch`: what is not seen would not be replayed."""
    folder = Path(triton.__file__).parent
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("kernel"):
                assert file.name == "launch.py", f"{file.name}:{node.lineno}"


CODE = """
import torch
from triton.runtime.jit import JITFunction
import bam_kernels
from bam_kernels import dispatch
from bam_kernels.backends.triton import launch, replay
from bam_kernels.testing import aot

dispatch.why_not = lambda backend, device_type: None
replay.applies = lambda x: True
bound_here, bound_by_triton = [], []
own = launch._bound

def bound(kernel, compiled, grid, args, options):
    runner, values = own(kernel, compiled, grid, args, options)
    bound_here.append(values)
    *_, binder = kernel.device_caches[0]
    given, *_ = binder(*args, **options)
    bound_by_triton.append(list(given.values()))
    return runner, values

launch._bound = bound
kernels = []
with bam_kernels.use_backend("triton"), aot.without_launches("sm_90", kernels.append):
    for preset in ("paper", "official"):
        for channels_last in (False, True):
            module = bam_kernels.BAM(32, preset=preset)
            x = torch.randn(2, 32, 4, 4)
            if channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            for training in (True, False):
                module.train(training)
                runs = []
                for _ in range(2):
                    kernels.clear()
                    if training:
                        out = module(x.clone().requires_grad_())
                        out.sum().backward()
                    else:
                        with torch.no_grad():
                            module(x)
                    runs.append(list(kernels))
                assert runs[0] and len(runs[0]) == len(runs[1])
                assert all(a is b for a, b in zip(*runs))
assert bound_here and len(bound_here) == len(bound_by_triton)
for ours, theirs in zip(bound_here, bound_by_triton):
    assert len(ours) == len(theirs)
    assert all(a is b or a == b for a, b in zip(ours, theirs))
print(len(bound_here))
"""


@pytest.mark.skipif(
    aot.is_available(in_subprocess=True) is not None,
    reason=str(aot.is_available(in_subprocess=True)),
)
def test_compiled_kernels_get_what_triton_hands_them():
    """For a GPU that is not there: a replay launches the kernels that the first call launched,
    and the values that it keeps are those that Triton binds to the kernel's parameters."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 20
