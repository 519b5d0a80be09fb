"""The profile of a call's kernels: several calls as one, beside the cost model's bytes."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import gpu_profile  # noqa: E402
import gpu_run  # noqa: E402

from bam_kernels.benchmarking import cost, sites  # noqa: E402
from bam_kernels.benchmarking.gpu import peers, report  # noqa: E402


def seen(*calls: tuple[tuple[str, float], ...], every: float = 100.0):
    """Calls that begin `every` us after one another, their kernels 10 us."""
    return [
        (number * every + 10.0 * place, name, us)
        for number, call in enumerate(calls)
        for place, (name, us) in enumerate(call)
    ]


def test_several_calls_are_one_of_medians():
    calls = [(("a", 1.0), ("b", us)) for us in (2.0, 9.0, 4.0)]
    found = gpu_profile.by_call(seen(*calls), 3, [("a", "3x1", 1000), ("b", "7", 8000)], 4.0)
    assert found == {
        "kernels": [
            # 1000 bytes in 1 us are 1 GB/s.
            {"name": "a", "us": 1.0, "grid": "3x1", "bytes": 1000, "share_of_copy": 0.25},
            {"name": "b", "us": 4.0, "grid": "7", "bytes": 8000, "share_of_copy": 0.5},
        ],
        "kernels_us": 5.0,
        "call_us": 100.0,
    }


def test_launches_are_found_by_name_in_order():
    """In whatever order different kernels come; two of one name in the model's order."""
    call = (("b", 1.0), ("a", 1.0), ("a", 1.0))
    expected = [("a", "first", 10), ("a", "second", 20), ("b", "only", 30)]
    found = gpu_profile.by_call(seen(call, call), 2, expected, None)["kernels"]
    assert [(k["name"], k["grid"], k["bytes"]) for k in found] == [
        ("b", "only", 30), ("a", "first", 10), ("a", "second", 20),
    ]  # fmt: skip
    assert not any("share_of_copy" in kernel for kernel in found)


def test_kernels_that_the_model_does_not_know_have_times_alone():
    """One of another library, and one more launch than the model counts."""
    call = (("a", 1.0), ("vectorized_elementwise", 3.0), ("a", 2.0))
    found = gpu_profile.by_call(seen(call), 1, [("a", "4", 10), ("missing", "1", 5)], 100.0)
    first, *others = found["kernels"]
    assert first["bytes"] == 10 and first["share_of_copy"] > 0
    assert others == [{"name": "vectorized_elementwise", "us": 3.0}, {"name": "a", "us": 2.0}]
    assert found["kernels_us"] == 6.0 and found["call_us"] is None  # one call has no next


@pytest.mark.parametrize(
    "calls",
    [
        [(("a", 1.0), ("b", 1.0)), (("b", 1.0), ("a", 1.0))],  # another order
        [(("a", 1.0), ("b", 1.0)), (("a", 1.0),)],  # one is missing
        [(("a", 1.0), ("b", 1.0)), (("a", 1.0), ("c", 1.0))],
        [(), ()],
    ],
)
def test_calls_that_are_not_alike_are_refused(calls):
    with pytest.raises(ValueError, match="kernels in 2 calls: they are not alike"):
        gpu_profile.by_call(seen(*calls), 2, [], None)


def test_lines():
    call = (("_gate_forward_kernel", 2.0), ("x" * 80, 1.5))
    found = gpu_profile.by_call(seen(call, call), 2, [(call[0][0], "8x2", 3_000_000)], 3000.0)
    data = {"profile": [{"case": "good", **found}, {"case": "bad", "error": "RuntimeError: no"}]}
    head, first, second, failed = gpu_profile.lines(data)
    assert head == "good: kernels 3.5 us, a call every 100.0 us"
    assert first.split() == ["2.00", "us", "3.00", "MB", "0.50", "_gate_forward_kernel", "8x2"]
    assert second.split() == ["1.50", "us", "x" * 60]
    assert failed == "bad: RuntimeError: no"
    assert first.index("_gate") == second.index("xxx")
    assert list(gpu_profile.lines({})) == []


@pytest.mark.parametrize("mode", (sites.INFERENCE, sites.TRAINING))
def test_the_model_names_the_kernels_that_are_launched(mode):
    """Names without a match would leave a profile without bytes, and nobody would notice."""
    case = cost.case_of((2, 32, 4, 5), "float32", "nchw", mode)
    expected = gpu_profile._expected(case)
    ours = [name for name, grid, _ in expected if grid]
    assert "_pool_reduce_kernel" in ours and all(name.startswith("_") for name in ours)
    assert all(nbytes > 0 for _, grid, nbytes in expected if grid)


def test_a_case_that_fails_leaves_the_others(tmp_path, monkeypatch):
    cases = [cost.case_of((2, c, 4, 5), "float32", "nchw", sites.INFERENCE) for c in (32, 48)]
    good = gpu_profile.by_call(seen((("a", 1.0),)), 1, [], None)

    def profile_case(case, settings):
        if case is cases[0]:
            raise RuntimeError("no profiler here")
        return good

    monkeypatch.setattr(gpu_profile, "profile_case", profile_case)
    made = report.Report(tmp_path / "r.json", {})
    section = report.Budget(60.0, ["profile"], made).section("profile")
    settings = peers.Settings(torch.device("cpu"), None, 1, 0, 0.0, "eager", True)
    gpu_profile.run_profile(cases, settings, section, made)
    first, second = made.data["profile"]
    assert "no profiler here" in first["error"] and second["kernels"] == good["kernels"]
    section = types.SimpleNamespace(allows=lambda *_: False)
    gpu_profile.run_profile(cases, settings, section, made)
    assert made.data["profile"] == []


def test_on_a_cpu_the_section_is_left_out(tmp_path):
    arguments = ["--device", "cpu", "--smoke", "--sections", "profile"]
    args = gpu.parse([*arguments, "--output", str(tmp_path / "r.json")])
    run = gpu_run.Run(args, gpu_run.select(args), 0.0)
    run._section("profile")
    assert "errors" not in run.report.data and "profile" not in run.report.data
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]
