"""Whose dilated convolutions a GPU runs: the rule, what it is predicted from, and what it changes.

The rule is for GPUs. Here the CPU's tensors are taken for a GPU's, in Triton's interpreter.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from test_module import compare, step
from tolerances import assert_parity

from bam_kernels import BAM, convolution_choice, explain, use_backend
from bam_kernels.backends import triton
from bam_kernels.benchmarking import convolutions, cost
from bam_kernels.benchmarking.gpu import peers
from bam_kernels.benchmarking.sites import INFERENCE, RESNET50, TRAINING, Site
from bam_kernels.convolution_choice import by_library

SITES = {site.channels // 16: site for site in (*RESNET50, Site("layer4", 2048, 7, 7))}
PRECISIONS = {"float16": "half", "tf32": "tf32", "ieee": "ieee"}


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(convolution_choice, "on_gpu", lambda x: True)
    with convolution_choice.convolutions("auto"):  # tests run ours where nothing else is said
        yield


@pytest.fixture
def ours_fails(monkeypatch):
    """Our convolutions cannot be launched: who takes them fails."""
    monkeypatch.delattr(triton, "spatial_branch_forward")


def of_products(precision):
    """A fixture: float32 convolutions multiply in this precision."""

    @pytest.fixture(name=precision)
    def setting():
        before = torch.backends.cudnn.conv.fp32_precision
        torch.backends.cudnn.conv.fp32_precision = precision
        yield
        torch.backends.cudnn.conv.fp32_precision = before

    return setting


ieee, tf32 = of_products("ieee"), of_products("tf32")


MEASURED = json.loads(
    (Path(__file__).parent.parent / "benchmarks/results/gpu-nvidia-h200.json").read_text()
)


def measured(site, dtype):
    """How many times as fast a training step is with our convolutions, case by case."""
    found = []
    for entry in MEASURED["cases"]:
        case, peers = entry["case"], entry["peers"]
        if (case["site"], case["dtype"], case["mode"]) == (site.name, dtype, TRAINING):
            ours, library = (peers.get(f"{name}_graphed") for name in ("fused", "fused_library"))
            if ours and library:
                found.append(library["median_ms"] / ours["median_ms"])
    return found


@pytest.mark.parametrize("hidden", (16, 32, 64))
def test_the_rule_is_the_measurements(hidden):
    """Ours at the widths at which they were the faster ones, both as CUDA graphs."""
    ratios = measured(SITES[hidden], "float16")
    assert len(ratios) >= 2
    assert (hidden <= convolution_choice.WIDEST_TRAINED["half"]) == (min(ratios) > 1), ratios


@pytest.mark.parametrize(
    "hidden,precision",
    [(h, p) for h, site in SITES.items() for p in PRECISIONS if not measured(site, p)],
)
def test_the_rule_is_the_cost_models(hidden, precision):
    """What was not measured: the library's where ours would have to reach over half of the peak on
    every GPU."""
    site = SITES[hidden]
    size = (256, site.channels, site.height, site.width)
    dtype = "float16" if precision == "float16" else "float32"
    case = cost.case_of(size, dtype, "channels_last", TRAINING)
    bars = [convolutions.break_even(case, machine, precision) for machine in cost.MACHINES]
    widest = convolution_choice.WIDEST_TRAINED[PRECISIONS[precision]]
    assert (hidden > widest) == (min(bars) > 0.5), bars
    assert abs(min(bars) - 0.5) > 0.05, "too close to call"


@pytest.mark.parametrize(
    ("hidden", "dtype", "expected"),
    [
        (64, torch.float16, None), (65, torch.float16, "more than 64 channels inside (half"),
        (65, torch.bfloat16, "half"), (64, torch.float32, None), (65, torch.float32, "tf32"),
        (128, torch.float64, None),
    ],
)  # fmt: skip
def test_the_rule(on_gpu, tf32, hidden, dtype, expected):
    found = by_library(hidden, torch.empty(0, dtype=dtype))
    assert (found is None) if expected is None else (expected in found)
    assert by_library(hidden, torch.empty(0, dtype=dtype), inference=True) is None


def test_the_rule_without_tf32(on_gpu, ieee):
    x = torch.empty(0)
    assert by_library(32, x) is None
    assert "more than 32 channels inside (ieee" in by_library(33, x)


def test_on_cpus_there_is_no_choice():
    for choice in convolution_choice.CHOICES:
        with convolution_choice.convolutions(choice):
            assert by_library(128, torch.empty(0)) is None


@pytest.mark.parametrize("preset", ("paper", "official"))
def test_training_by_the_library(on_gpu, ieee, large_tiles, ours_fails, preset, device, seed):
    """Its spatial branch runs as PyTorch's own operators; the numbers stay."""
    make, shape = partial(BAM, 148, 4, preset=preset, device=device), (3, 148, 5, 7)
    (note,) = explain(make(), torch.randn(shape, device=device)).notes
    assert "the spatial branch runs as PyTorch's own: in training the library's" in note
    compare(make, shape, torch.float32, device)


def test_compiled(on_gpu, ieee, large_tiles, ours_fails, device, seed):
    """The choice breaks no graph. One vector of all gradients: a lone one may be rounding."""
    module, x = BAM(148, 4, device=device), torch.randn(3, 148, 5, 7, device=device)
    dout = torch.randn_like(x)
    expected = step(copy.deepcopy(module), x, dout)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    compiled(x).backward(dout)
    found = torch.cat([p.grad.flatten() for p in module.parameters()])
    names = [f"d{name}" for name, _ in module.named_parameters()]
    assert_parity("gradients", found, torch.cat([expected[name].flatten() for name in names]))


def test_inference_stays_in_one_operator(on_gpu, ieee, large_tiles, device, seed):
    module, x = BAM(148, 4, device=device).eval(), torch.randn(2, 148, 5, 7, device=device)
    with use_backend("triton"), torch.no_grad():
        assert explain(module, x).notes == ()
        expected = module(x)
        with convolution_choice.convolutions("library"):
            (note,) = explain(module, x).notes
            assert "were asked for" in note
            found = module(x)
    assert_parity("out", found, expected)
    assert not torch.equal(found, expected)  # another order of summation: something did change


def test_ours_on_request(on_gpu, ieee, device):
    module, x = BAM(148, 4, device=device), torch.randn(2, 148, 5, 7, device=device)
    with use_backend("triton"), convolution_choice.convolutions("fused"):
        assert explain(module, x).notes == ()


def test_bad_choice():
    with pytest.raises(ValueError, match="choice: expected one of auto, fused, library, got 'x'"):
        with convolution_choice.convolutions("x"):
            pass


NAME = "BAM_KERNELS_CONVOLUTIONS"


def test_the_environment():
    """A bad value is told at import, a good one is the process's choice."""
    code = "from bam_kernels import convolution_choice as c; print(c._choice)"
    run = lambda value: subprocess.run(  # noqa: E731
        [sys.executable, "-c", code], env=os.environ | {NAME: value},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run("library").stdout.strip() == "library"
    told = run("cudnn").stderr.strip().splitlines()[-1]
    expected = "BAM_KERNELS_CONVOLUTIONS: expected one of auto, fused, library, got 'cudnn'"
    assert told == f"ValueError: {expected}"


@pytest.mark.parametrize(
    ("mode", "other"), [(TRAINING, "fused_ours"), (INFERENCE, "fused_library")]
)
def test_the_gpu_run_measures_what_is_not_taken(on_gpu, ieee, large_tiles, mode, other, device):
    """40 channels inside: training is left to the library, inference is not."""
    case = cost.case_of((2, 640, 3, 5), "float32", "nchw", mode)
    settings = peers.Settings(device, None, 1, 0, 0.0, "eager", True)
    with use_backend("triton"):
        entry = peers.measure_case(case, settings, lambda: False)
    called = {name for name in entry["peers"] if not name.endswith("_graphed")}
    assert called == {"fused", "eager", other}
    times = {name: peer["median_ms"] for name, peer in entry["peers"].items()}
    assert entry["ratio_convolutions"] == pytest.approx(times[other] / times["fused"])
