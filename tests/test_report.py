"""The cost model, occupancy, and ``report``: what it finds, what it prints, what it refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

from bam_kernels.benchmarking import cost
from bam_kernels.benchmarking.kernel_report import problems
from bam_kernels.benchmarking.occupancy import occupancy
from bam_kernels.benchmarking.sites import INFERENCE, TRAINING
from bam_kernels.testing import aot

needs_compiler = pytest.mark.skipif(
    aot.is_available(in_subprocess=True) is not None,
    reason=str(aot.is_available(in_subprocess=True)),
)

# --- the cost model -----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ("nchw", "channels_last"))
@pytest.mark.parametrize("preset", ("paper", "official"))
def test_passes(preset, layout):
    """At a size that no test can run: three passes forward and five back."""
    size = (256, 256, 56, 56)
    inference = cost.cost(cost.case_of(size, "float16", layout, INFERENCE, preset))
    training = cost.cost(cost.case_of(size, "float16", layout, TRAINING, preset))
    assert inference.passes == pytest.approx(3, rel=0.01)
    assert training.passes == pytest.approx(8, rel=0.01)
    assert inference.moved_bytes == pytest.approx(3 * 2 * 256 * 256 * 56 * 56, rel=0.15)
    eager = cost.cost(cost.case_of(size, "float16", layout, TRAINING, preset), "eager")
    assert eager.passes > 30 and eager.launches > training.launches


def test_time():
    """Launches and bytes, each at its price."""
    machine = cost.Machine("toy", "", bandwidth=1000.0, launch_us=2.0)
    found = cost.Cost(launches=7, read_bytes=3_000_000, written_bytes=2_000_000, passes=0.0)
    assert found.moved_bytes == 5_000_000
    assert found.predicted_us(machine) == pytest.approx(7 * 2.0 + 5.0)
    dearer = dataclasses.replace(machine, launch_us=3.0)
    assert found.predicted_us(dearer) == pytest.approx(7 * 3.0 + 5.0)


def test_cost_grows_with_what_it_is_of():
    """In proportion to N; the reduction's maps with 1 / r."""
    one, two = (
        cost.cost(cost.case_of((n, 256, 56, 56), "float16", "nchw", INFERENCE)) for n in (64, 128)
    )
    assert two.moved_bytes == pytest.approx(2 * one.moved_bytes, rel=0.02)
    case = cost.case_of((64, 256, 56, 56), "float16", "nchw", INFERENCE)
    assert cost.cost(case, reduction=4).moved_bytes > cost.cost(case, reduction=16).moved_bytes


def test_cost_refuses():
    case = cost.case_of((2, 32, 8, 8), "float32", "nchw", INFERENCE)
    with pytest.raises(
        ValueError, match="kind: expected one of fused, eager, ours, library, got 'fast'"
    ):
        cost.cost(case, "fast")
    with pytest.raises(ValueError, match="more than one value per channel"):
        cost.cost(cost.case_of((1, 32, 8, 8), "float32", "nchw", TRAINING))


# --- what a report says of a kernel ---------------------------------------------------------------


def kernel(**changes) -> aot.KernelReport:
    whole = aot.Access(frozenset({128}), frozenset({128}))
    fine = aot.KernelReport(
        name="_gate_forward_kernel", target="sm_90", signature={"x": "*fp16", "out": "*fp16"},
        constants={"ALIGN": 16}, divisible_by_16=(), num_warps=4, num_stages=1, registers=64,
        stack_bytes=0, spill_bytes=0, shared_bytes=0, accesses={"x": whole, "out": whole},
    )  # fmt: skip
    return dataclasses.replace(fine, **changes)


def test_problems():
    assert problems(kernel()) == []
    assert problems(kernel(spill_bytes=8)) == ["8 bytes spilled"]
    assert "shared memory" in problems(kernel(shared_bytes=300 << 10))[0]
    narrow = {"x": aot.Access(frozenset({64})), "out": aot.Access(frozenset(), frozenset({32}))}
    assert problems(kernel(accesses=narrow)) == [
        "x: loads of 64 bits, expected 128", "out: stores of 32 bits, expected 128",
    ]  # fmt: skip
    # Positions that are a multiple of 4 only allow 64 bits of a half type, and 128 of float32.
    assert problems(kernel(accesses=narrow, constants={"ALIGN": 4})) == [
        "out: stores of 32 bits, expected 64"
    ]
    assert len(problems(kernel(accesses=narrow, constants={"ALIGN": 4},
                               signature={"x": "*fp32", "out": "*fp32"}))) == 2  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    (
        # NVIDIA's occupancy calculator: 64 registers allow all of 32 warps x 2 on sm_90; 128 half
        # of them; 255 an eighth, as two blocks of 4 warps do not share a quarter's registers.
        ({"registers": 32}, 1.0),
        ({"registers": 64}, 0.5),
        ({"registers": 128}, 0.25),
        ({"registers": 255}, 0.125),
        ({"registers": 32, "shared_bytes": 100 << 10}, 2 * 4 / 64),
        ({"registers": 32, "shared_bytes": 300 << 10}, 0.0),
        ({"registers": 32, "target": "sm_86"}, 1.0),
        ({"registers": 32, "num_warps": 1, "target": "sm_86"}, 16 / 48),
        ({"registers": 64, "target": "gfx942"}, 1.0),
        ({"registers": 128, "target": "gfx942"}, 0.5),
    ),
)
def test_occupancy(changes, expected):
    assert occupancy(kernel(**changes)) == pytest.approx(expected)


def test_occupancy_of_an_unknown_target():
    assert occupancy(kernel(target="sm_70")) is None


# --- the command ----------------------------------------------------------------------------------


def run(*arguments: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bam_kernels", "report", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)


@needs_compiler
def test_report(tmp_path):
    """Two targets, one site: green, with a table each and all of it in the JSON."""
    file = tmp_path / "report.json"
    done = run(
        "--targets", "sm_90", "gfx942", "--sites", "4x64x28x28", "--dtype", "float16", "--layouts",
        "nchw", "--presets", "paper", "--bandwidth", "900", "--launch-us", "2", "--processes", "1",
        "--json", str(file),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "no spills, no access narrower than it can be" in done.stdout
    assert "predicted, not measured" in done.stdout and "900 GB/s" in done.stdout
    data = json.loads(file.read_text())
    assert data["not_a_measurement"] is True and data["versions"]["triton"]
    assert {each["target"] for each in data["kernels"]} == {"sm_90", "gfx942"}
    gates = [each for each in data["kernels"] if each["kernel"] == "_gate_forward_kernel"]
    x_bytes = 2 * 4 * 64 * 28 * 28
    for each in gates:
        assert each["read_bytes"] == pytest.approx(x_bytes, rel=0.05)
        assert each["written_bytes"] == x_bytes
        assert each["problems"] == [] and 0 < each["occupancy"] <= 1
    assert gates[0]["access_bits"]["x"]["load"] == [128]
    kinds = {(each["mode"], each["kind"]) for each in data["predictions"]}
    assert kinds == {(m, k) for m in ("training", "inference") for k in ("fused", "eager")}
    for each in data["predictions"]:
        expected = each["launches"] * 2.0 + each["moved_bytes"] / 900e3
        assert each["predicted_us"]["900 GB/s"] == pytest.approx(expected)


@needs_compiler
def test_report_fails_where_a_kernel_spills(tmp_path):
    """A tile that holds more than there are registers, in the table's place."""
    code = (
        "import sys\n"
        "from bam_kernels.benchmarking import kernel_report\n"
        "from bam_kernels.backends.triton.configs import Tile, override\n"
        "from bam_kernels import cli\n"
        "def here(targets, cases, processes):\n"
        "    with override(input_gradient=Tile(128, 256, 4, 1)):\n"
        "        for target in targets:\n"
        "            yield from (kernel_report.compile_case(target, case) for case in cases)\n"
        "kernel_report.compile_all = here\n"
        "sys.exit(cli.main(['report', '--quick', '--sites', '4x64x28x28']))\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    assert "bytes spilled" in done.stdout and "input_gradient" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    (
        (("--targets", "sm_70"), "argument --targets: invalid choice: 'sm_70'"),
        (("--sites", "8x8x8"), "argument --sites: expected NxCxHxW"),
        (("--dtype", "int8"), "argument --dtype: invalid choice: 'int8'"),
        (("--bandwidth", "0"), "argument --bandwidth: expected a number above 0, got '0'"),
        (("--launch-us", "nan"), "argument --launch-us: expected a number above 0, got 'nan'"),
        (("--json", "/nowhere/report.json"), "--json: no such folder: /nowhere"),
    ),
)
def test_report_refuses(arguments, words, capsys):
    from bam_kernels.cli import main

    try:
        status = main(["report", *arguments])
    except SystemExit as end:
        status = end.code
    told = capsys.readouterr().err
    assert status == 2 and words in told and told.count("\n") == 1


def test_report_needs_triton(monkeypatch, capsys):
    from bam_kernels.cli import main, report

    find = report.importlib.util.find_spec
    monkeypatch.setattr(
        report.importlib.util, "find_spec", lambda name: None if name == "triton" else find(name)
    )
    assert main(["report"]) == 2
    assert capsys.readouterr().err == (
        "bam_kernels report: error: triton is not installed; pip install triton\n"
    )


def test_nothing_is_run():
    """Predicting takes no memory of a map's size: 100 GB here."""
    found = cost.cost(cost.case_of((4096, 1024, 112, 112), "float16", "nchw", INFERENCE))
    assert found.moved_bytes > 3e11 and torch.get_num_threads() > 0
