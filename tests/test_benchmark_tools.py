"""The GPU run's tools: times and budgets by arithmetic, and the whole run on toy shapes."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from bam_kernels.benchmarking import sites, timing
from bam_kernels.benchmarking.gpu import bandwidth
from bam_kernels.benchmarking.gpu import peers as gpu_peers
from bam_kernels.benchmarking.gpu import report as gpu_report

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import gpu_matrix  # noqa: E402
import gpu_parity  # noqa: E402
import gpu_run  # noqa: E402
import gpu_table  # noqa: E402
import gpu_workers  # noqa: E402


class FakeClock:
    """Measures the time that a run says it takes."""

    def measure(self, run) -> tuple[float, float]:
        self.total = 0.0
        run()
        return self.total, self.total / 2

    def run(self, ms: float):
        def spend() -> None:
            self.total = getattr(self, "total", 0.0) + ms

        return spend


# --- times ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "q", "expected"),
    [([3.0], 0.2, 3.0), ([2.0, 1.0], 0.5, 1.5), ([5, 1, 3, 2, 4], 0.2, 1.8), ([1, 2], 1, 2)],
)
def test_quantile_is_linear_between_neighbours(values, q, expected):
    assert timing.quantile(values, q) == pytest.approx(expected)


@pytest.mark.parametrize(("values", "q"), [([], 0.5), ([1.0], 20)])
def test_quantile_refuses_what_has_none(values, q):
    with pytest.raises(ValueError, match="expected"):
        timing.quantile(values, q)


def test_interleave_divides_by_calls_and_repeats():
    clock = FakeClock()
    peers = {"a": timing.Peer(clock.run(0.5), calls=4), "b": timing.Peer(clock.run(50.0))}
    found = timing.interleave(peers, clock, rounds=6, warmups=1, least_ms=2.0)
    assert found["a"]["median_ms"] == pytest.approx(0.125)
    assert found["a"]["repeats"] == 4
    assert found["a"]["calls"] == 16
    assert found["a"]["host_ms"] == pytest.approx(0.0625)
    assert found["b"]["repeats"] == 1
    assert found["b"]["rounds"] == 6


def test_interleave_turns_the_order_every_round():
    clock, order = FakeClock(), []

    def peer(name: str) -> timing.Peer:
        def run() -> None:
            order.append(name)
            clock.total = 10.0

        return timing.Peer(run)

    timing.interleave({n: peer(n) for n in "abc"}, clock, rounds=3, warmups=0)
    assert "".join(order[3:]) == "abc" + "bca" + "cab"


def test_interleave_goes_on_without_a_peer_that_raises():
    clock, runs = FakeClock(), itertools.count()

    def fails() -> None:
        raise RuntimeError("out of\n registers")

    def fails_late() -> None:
        if next(runs) > 4:
            raise ValueError("late")
        clock.total = 10.0

    peers = {
        "early": timing.Peer(fails),
        "late": timing.Peer(fails_late),
        "good": timing.Peer(clock.run(10.0)),
    }
    found = timing.interleave(peers, clock, rounds=8, warmups=1)
    assert found["early"] == {"error": "RuntimeError: out of registers"}
    assert found["late"] == {"error": "ValueError: late"}
    assert found["good"]["rounds"] == 8


def test_interleave_ends_early_but_not_before_a_few_rounds():
    clock = FakeClock()
    found = timing.interleave(
        {"a": timing.Peer(clock.run(10.0))}, clock, rounds=20, expired=lambda: True
    )
    assert found["a"]["rounds"] == timing.FEWEST_ROUNDS


def test_relative_error_never_passes_nan():
    good = torch.ones(3)
    assert timing.relative_error(good, good) == 0
    assert not timing.relative_error(torch.tensor([1.0, float("nan"), 1.0]), good) <= 1.0


# --- sites ------------------------------------------------------------------------------------


def test_moved_bytes_are_three_and_eight_passes():
    shape = sites.Shape(sites.RESNET50[0], 32, "float16", sites.NCHW)
    assert shape.x_bytes == 32 * 256 * 56 * 56 * 2
    assert sites.Case(shape, sites.INFERENCE).moved_bytes == 3 * shape.x_bytes
    assert sites.Case(shape, sites.TRAINING).moved_bytes == 8 * shape.x_bytes


@pytest.mark.parametrize("shape", sites.Selection().shapes(), ids=str)
def test_input_sets_outgrow_the_cache(shape):
    cache = 60 << 20
    assert shape.sets(cache) >= 2
    assert shape.sets(cache) * shape.x_bytes > 3 * cache


def test_cases_start_with_the_most_valuable_and_name_each_once():
    cases = sites.Selection().cases()
    assert len(set(cases)) == len(cases)
    assert cases[0].shape.dtype == "float16"
    assert cases[0].preset == "paper"
    assert {case.preset for case in cases[-6:]} == {"official"}


# --- the budget and the report ----------------------------------------------------------------


def make_budget(tmp_path: Path, seconds: float, sections: list[str]):
    now = types.SimpleNamespace(value=100.0)
    report = gpu_report.Report(tmp_path / "r.json", {})
    budget = gpu_report.Budget(seconds, sections, report, now=lambda: now.value)
    return budget, now, report


def test_sections_share_what_is_left(tmp_path):
    budget, now, _ = make_budget(tmp_path, 100.0, ["times", "kernels"])
    times = budget.section("times")
    share = gpu_report.WEIGHTS["times"] / (
        gpu_report.WEIGHTS["times"] + gpu_report.WEIGHTS["kernels"]
    )
    assert 0.5 < share < 1
    assert times.left() == pytest.approx(100 * share)
    now.value += 40
    assert times.left() == pytest.approx(100 * share - 40)
    assert budget.section("kernels").left() == pytest.approx(60)
    assert budget.section("kernels", at_most=7).left() == 7


def test_what_does_not_fit_is_left_out_and_said(tmp_path):
    budget, now, report = make_budget(tmp_path, 10.0, ["times"])
    section = budget.section("times")
    assert section.allows(9.0, "one")
    now.value += 8
    assert not section.allows(9.0, "two")
    assert not section.expired()
    now.value += 2
    assert section.expired()
    (entry,) = report.data["left_out"]
    assert entry["section"] == "times"
    assert entry["what"] == "two"
    assert "2.0 s were left" in entry["why"]


def test_estimate_follows_the_last_pieces():
    estimate = gpu_report.Estimate(8.0)
    expected = (8.0, 20.0, 1.5, 2.25, 3.0, 3.0, 4.5)
    for known, seconds in zip(expected, (20.0, 1.0, 2.0, 9.0, 2.0, 4.0, 3.0), strict=True):
        assert estimate.next() == pytest.approx(known)  # neither the first nor one straggler counts
        estimate.add(seconds)


def test_copy_is_the_fastest_of_all_ways(monkeypatch):
    """Of the methods at a size, and of all sizes; what failed is told and does not count."""
    settings = gpu_peers.Settings(torch.device("cpu"), None, 1, 0, 0.0, "eager", True)
    times = {"copy_": {"median_ms": 4.0}, "neg": {"median_ms": 2.0}}
    seen = []

    def interleave(peers, *_, **__):
        for peer in peers.values():
            peer.run()
        seen.append({name: peer.calls for name, peer in peers.items()})
        return {name: dict(times[name]) for name in peers}

    monkeypatch.setattr(bandwidth, "interleave", interleave)
    large = bandwidth.measure_copy(1 << 20, 3, settings)
    assert seen == [{"copy_": 3, "neg": 3}]
    assert large["method"] == "neg" and large["gbs"] == pytest.approx((2 << 20) / 2e-3 / 1e9)
    assert large["methods"]["copy_"]["gbs"] == pytest.approx(large["gbs"] / 2)
    times["neg"] = {"error": "RuntimeError: no"}
    assert bandwidth.measure_copy(1 << 20, 1, settings)["method"] == "copy_"
    times["copy_"] = {"error": "RuntimeError: neither"}
    failed = bandwidth.measure_copy(1 << 20, 1, settings)
    assert "gbs" not in failed and bandwidth.fastest([failed, {}]) is None
    small = {"bytes": 9, "method": "copy_", "gbs": 1e9}
    assert bandwidth.fastest([failed, large, small]) == small


def test_ways_to_copy_read_and_write_everything():
    source = torch.arange(1.0, 100.0, dtype=torch.float16)
    for name, way in bandwidth.WAYS.items():
        target = torch.zeros_like(source)
        way(source, target)
        assert torch.equal(target.abs(), source), name


def test_shares_are_of_the_fastest_copy(tmp_path, monkeypatch):
    """A small copy that is faster than the large one is the ceiling."""
    settings = gpu_peers.Settings(torch.device("cpu"), None, 1, 0, 0.0, "eager", True)
    report = gpu_report.Report(tmp_path / "r.json", {})
    section = gpu_report.Budget(60.0, ["bandwidth"], report).section("bandwidth")
    monkeypatch.setattr(
        bandwidth, "measure_copy",
        lambda size, *_: {"bytes": size, "method": "neg", "gbs": 2e6 / size},
    )  # fmt: skip
    shapes = [sites.Shape(sites.RESNET50[1], n, "float16", sites.NCHW) for n in (1, 2)]
    found = bandwidth.run_bandwidth(shapes, settings, section, report)
    smallest = min(shape.x_bytes for shape in shapes)
    assert smallest < bandwidth.SMALL_BYTES
    assert found == 2e6 / smallest
    assert report.data["bandwidth"]["best"] == {"bytes": smallest, "method": "neg", "gbs": found}
    (line,) = [line for line in gpu_table.summary_lines(report.data) if line.startswith("copy of")]
    assert line == f"copy of {smallest} bytes by neg: {found:.0f} GB/s read + written"


def test_report_is_whole_json_whatever_it_holds(tmp_path):
    report = gpu_report.Report(tmp_path / "deep" / "r.json", {"smoke": True})
    report.data["bad"] = [float("nan"), {"inf": float("inf")}, (1, 2.5)]
    report.save()
    report.save()
    found = json.loads(report.path.read_text())
    assert found["bad"] == ["nan", {"inf": "inf"}, [1, 2.5]]
    assert [p.name for p in report.path.parent.iterdir()] == ["r.json"]


def test_hard_limit_breaks_off_what_is_running():
    budget = types.SimpleNamespace(left=lambda: -2 * gpu_run.GRACE)
    run = types.SimpleNamespace(budget=budget, _abandon=lambda: None)
    limit = gpu_run.Run._hard_limit(run)
    begin = time.monotonic()
    with pytest.raises(gpu_report.OutOfTime), limit:
        try:
            time.sleep(30)
        except Exception:  # as a library in between may do
            time.sleep(30)
    assert time.monotonic() - begin < 10


# --- parity -----------------------------------------------------------------------------------

XML = """<?xml version="1.0"?><testsuites><testsuite>
<testcase classname="tests.a" name="good"/>
<testcase classname="tests.a" name="bad"><failure message="m">first
E   one
E   two
E   three
E   four</failure></testcase>
<testcase classname="tests.a" name="broken"><error message="no fixture"/></testcase>
<testcase classname="tests.a" name="left"><skipped type="pytest.skip"/></testcase>
<testcase classname="tests.a" name="known"><skipped type="pytest.xfail"/></testcase>
</testsuite></testsuites>"""


def test_parity_reads_counts_and_last_words(tmp_path):
    (tmp_path / "r.xml").write_text(XML)
    found = gpu_parity.read_results(tmp_path / "r.xml", tmp_path / "none")
    kinds = ("passed", "failed", "errors", "skipped", "xfailed")
    assert [found[kind] for kind in kinds] == [1] * 5
    bad, broken = found["failures"]
    assert bad["test"] == "tests.a::bad"
    assert bad["message"].splitlines()[-1] == "E   four"
    assert "first" not in bad["message"]
    assert broken["message"] == "no fixture"


@pytest.mark.parametrize("xml", [None, "<testsuites><test"])
def test_parity_falls_back_on_the_log(tmp_path, xml):
    if xml is not None:
        (tmp_path / "r.xml").write_text(xml)
    (tmp_path / "r.log").write_text("..F\n== 1 failed, 12 passed, 2 errors in 3.2s ==\n\n")
    found = gpu_parity.read_results(tmp_path / "r.xml", tmp_path / "r.log")
    assert (found["failed"], found["passed"], found["errors"]) == (1, 12, 2)
    assert found["counted_by"] == "log"


def test_parity_cut_short_still_tells_what_it_saw(tmp_path, monkeypatch):
    """The time that it was given ends here once the second test runs, however fast the machine."""
    started, tests = tmp_path / "started", tmp_path / "test_slow.py"
    tests.write_text(
        "import pathlib, time\ndef test_quick(): pass\n"
        f"def test_slow(): pathlib.Path({str(started)!r}).touch(); time.sleep(300)\n"
    )
    wait = subprocess.Popen.wait

    def wait_for_the_slow_test(process, timeout=None):
        if timeout != 285.0:  # what is left of it when 15 s are kept for the report
            return wait(process, timeout)
        while not started.exists() and process.poll() is None:
            time.sleep(0.05)
        raise subprocess.TimeoutExpired(process.args, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait_for_the_slow_test)
    found = gpu_parity.run_parity([str(tests)], tmp_path / "run", 300.0, 1, on_gpu=False)
    assert started.exists()
    assert not found["complete"] and not found["ok"]
    assert found["passed"] == 1
    assert found["seconds"] < 285


# --- workers ----------------------------------------------------------------------------------


def test_tasks_name_what_their_processes_can_import():
    """Those of a whole run, by the names under which a fresh process finds them."""
    import gpu_sweep

    for function in (gpu_peers.fill_compile_cache, gpu_sweep.compile_candidate):
        module, name = gpu_workers.task_name(function).split(":")
        code = f"import importlib; print(importlib.import_module({module!r}).{name}.__name__)"
        path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.stdout.strip() == function.__name__, done.stderr[-500:]


@pytest.mark.parametrize("count", [0, 2])
def test_workers_run_tasks_and_report_what_failed(count):
    tasks = [("math:sqrt", (4.0,)), ("math:sqrt", (-1.0,)), ("math:nothing", ())]
    workers = gpu_workers.Workers(tasks, count)
    workers.wait(60.0)
    workers.stop()
    assert workers.done[0] == gpu_workers.Outcome(None, 2.0)
    assert workers.done[1].error.startswith("ValueError")
    assert workers.done[2].error.startswith("AttributeError")


def test_workers_are_ended_in_the_middle_of_a_task():
    workers = gpu_workers.Workers([("time:sleep", (300.0,))] * 3, 2)
    workers.wait(0.5)
    begin = time.monotonic()
    workers.stop()
    assert time.monotonic() - begin < 30
    assert workers.done == {}


# --- peers and tables -------------------------------------------------------------------------


def test_ratios_compare_with_the_best_peer_of_the_same_kind():
    ms = {"fused": 2.0, "eager": 8.0, "compile": 3.0, "fused_graphed": 1.0, "eager_graphed": 4.0}
    found: dict[str, dict[str, Any]] = {name: {"median_ms": value} for name, value in ms.items()}
    found["compile_graphed"] = {"error": "RuntimeError: no"}
    told = gpu_peers.conclude(found, moved_bytes=10**9, copy_gbs=4000.0)
    assert told["ratio_plain"] == pytest.approx(1.5)
    assert told["ratio_graphed"] == pytest.approx(4.0)
    assert told["ratio_best"] == pytest.approx(3.0)
    # 1 GB in 1 ms is 1000 GB/s.
    assert told["share_of_copy"]["fused_graphed"] == pytest.approx(0.25)


def test_spot_check_catches_a_wrong_result(device):
    case = sites.Case(sites.Shape(sites.TINY[0], 2, "float32", sites.NCHW), sites.TRAINING)
    plain, fused = gpu_peers.build(case, device)
    assert gpu_peers.spot_check(case, plain, fused)["ok"]
    with torch.no_grad():
        fused.spatial.norm.bias.add_(1.0)
    assert not gpu_peers.spot_check(case, plain, fused)["ok"]


@pytest.mark.parametrize("kernel", gpu.KERNELS)
@pytest.mark.parametrize("layout", [sites.NCHW, sites.CHANNELS_LAST])
def test_sweep_candidates_surround_the_table(kernel, layout):
    pytest.importorskip("triton")
    import gpu_sweep  # imports Triton

    cell = gpu_sweep.Cell(kernel, sites.Shape(sites.RESNET50[2], 32, "float16", layout))
    ours, found = gpu_sweep.shipped(cell), gpu_sweep.candidates(cell)
    assert len(found) >= 20
    assert len(set(found)) == len(found)
    assert ours not in found
    distances = [gpu_sweep.distance(tile, ours) for tile in found]
    assert distances == sorted(distances)
    ranked = list(gpu_sweep.by_rank([cell, cell], 3))
    assert [tile for _, tile in ranked] == [tile for tile in found[:3] for _ in range(2)]


def full_report() -> dict[str, Any]:
    """Every case of a whole run, with long numbers."""
    names = [*gpu_peers.OURS, "eager", "compile", "eager_graphed", "compile_graphed"]
    peers = {name: {"median_ms": 123.45678} for name in names}
    cases = [
        {"case": case.record(), "peers": peers, **gpu_peers.conclude(peers, 10**9, 4300.0)}
        for case in sites.Selection().cases()
    ]
    failures = [
        {"test": "tests.test_gate::" + "x" * 90, "outcome": "failed", "message": "E " + "y" * 300}
    ] * 50
    return {
        "budget_s": 540,
        "seconds": 539.5,
        "environment": {"device": "NVIDIA H200", "commit": "0" * 40, "dirty": True},
        "parity": {
            "ok": False, "complete": False, "passed": 900, "failed": 50, "errors": 0, "skipped": 3,
            "xfailed": 0, "seconds": 240.0, "failures": failures,
        },
        "bandwidth": {"large": {"bytes": 1 << 30, "gbs": 4312.3}},
        "cases": cases,
        "failed_spot_checks": [str(case) for case in sites.Selection().cases()],
        "left_out": [{"section": "compile", "what": "x", "why": "y"}] * 60,
    }  # fmt: skip


def test_summary_of_a_full_run_fits_a_screen():
    data = full_report()
    lines = gpu_table.summary_lines(data)
    text = "\n".join(lines)
    assert len(lines) <= gpu_table.SUMMARY_LINES
    assert len(text) < 12_000
    for entry in data["cases"]:
        assert gpu_table.label(entry["case"]) in text
    assert "900 passed, 50 failed" in text
    assert "CUT SHORT" in text
    assert "4312 GB/s" in text
    assert "60 in compile" in text


def test_tables_hold_errors():
    shape = sites.Shape(sites.RESNET50[1], 32, "bfloat16", sites.NCHW)
    data: dict[str, Any] = {
        "left_out": [],
        "parity": {"error": "OSError: no"},
        "cases": [{"case": sites.Case(shape, "training").record(), "error": "RuntimeError: x"}],
        "kernels": [{"kernel": "gate", **shape.record(), "error": "RuntimeError: y"}],
        "sweep": [{"kernel": "gate", **shape.record(), "error": "RuntimeError: z"}],
    }
    assert "RuntimeError: x" in "\n".join(gpu_table.summary_lines(data))
    assert "error" in "\n".join(gpu_table.kernel_lines(data))
    assert "RuntimeError: z" in "\n".join(gpu_table.sweep_lines(data))


# --- the whole run ----------------------------------------------------------------------------


def run_script(tmp_path: Path, *arguments: str, **environment: str):
    # An empty list of devices hides a GPU that is there.
    clean = {k: v for k, v in os.environ.items() if k not in ("OUT", "PYTHONPATH")}
    return subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *arguments],
        env={**clean, "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable, **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=1000,
    )


def test_without_a_gpu_one_line_and_nothing_written(tmp_path):
    done = run_script(tmp_path, OUT=str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "no NVIDIA GPU" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_without_torch_one_line_and_nothing_written(tmp_path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    done = run_script(tmp_path, PYTHON=str(bare), OUT=str(tmp_path / "out"))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "torch is not installed" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["python"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sections", "tea"], "--sections"),
        (["--device", "cpu"], "--smoke"),
        (["--budget", "0"], "--budget"),
    ],
)
def test_a_wrong_command_line_is_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as left:
        gpu.parse(arguments)
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_selection_narrows_and_checks_names():
    args = gpu.parse(["--sites", "layer3", "--batches", "8", "--dtypes", "float32"])
    found = gpu_run.select(args)
    assert [str(site) for site in found.sites] == ["1024x14x14"]
    assert found.batches == (8,)
    assert found.dtypes == ("float32",)
    with pytest.raises(ValueError, match="--layouts: expected names among"):
        gpu_run.select(gpu.parse(["--layouts", "nhwc"]))


NO_GPU = pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a GPU the run itself goes through these parts"
)
SMOKE = ("--device", "cpu", "--smoke")


@NO_GPU
def test_smoke_run_fills_the_whole_report(tmp_path):
    tests = tmp_path / "test_three.py"
    tests.write_text(
        "import pytest\n\ndef test_good(): pass\n\n"
        "def test_bad(): assert 1 == 2, 'one is not two'\n\n"
        "@pytest.mark.skip\ndef test_left(): pass\n"
    )
    done = run_script(
        tmp_path, "out.json", *SMOKE, "--budget", "900", "--tests", str(tests),
        "--presets", "paper", "--layouts", "channels_last", "--candidates", "1",
        "--test-workers", "1", "--rounds", "1",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr  # a test failed, and all was measured nonetheless
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["smoke"] and data["not_a_measurement"] and data["exit_status"] == 1
    assert "errors" not in data and data["left_out"] == []
    for name in ("date_utc", "commit", "torch", "triton", "device", "fp32", "l2_bytes"):
        assert name in data["environment"]
    parity = data["parity"]
    assert [parity[kind] for kind in ("passed", "failed", "skipped")] == [1, 1, 1]
    assert parity["counted_by"] == "xml"
    assert "one is not two" in parity["failures"][0]["message"]
    assert data["bandwidth"]["large"]["gbs"] > 0
    rates = [copy["gbs"] for copy in (data["bandwidth"]["large"], *data["bandwidth"]["sizes"])]
    assert data["bandwidth"]["best"]["gbs"] == max(rates)
    assert {entry["case"]["mode"] for entry in data["cases"]} == {"training", "inference"}
    for entry in data["cases"]:
        assert entry["spot_check"]["ok"], entry["spot_check"]
        # By the luck of toy times the sweep may have found a better tile.
        tuned = {"fused_tuned"} if "tiles" in entry else set()
        assert set(entry["peers"]) == {"fused", "eager", *gpu_peers.COMPILE_MODES} | tuned
        assert not tuned or entry["spot_check_tuned"]["ok"]
        for peer in entry["peers"].values():
            assert peer["p20_ms"] <= peer["median_ms"] <= peer["p80_ms"]
        assert entry["ratio_plain"] > 0 and entry["share_of_copy"]["fused"] > 0
        assert {"fused", "eager"} < set(entry["earlier_median_ms"])
    assert [entry["kernel"] for entry in data["kernels"]] == list(gpu.KERNELS)
    assert all(entry["gbs"] > 0 for entry in data["kernels"])
    assert [entry["kernel"] for entry in data["sweep"]] == list(gpu.KERNELS)
    for entry in data["sweep"]:
        assert entry["shipped"]["median_ms"] > 0
        assert entry["tried"], entry
        assert all(tried.get("ok") for tried in entry["tried"]), entry["tried"]
    assert len(data["launch_table"]["entries"]) == len(gpu.KERNELS)
    assert {entry["kernel"] for entry in data["launch_table"]["entries"]} == set(gpu.KERNELS)
    assert data["matrix"]["ok"] and data["matrix"]["done"] == data["matrix"]["rows"] >= 6
    assert set(data["matrix"]["worst"]) == set(gpu_matrix.DTYPES)
    assert "NOT A MEASUREMENT" in done.stdout
    assert "parity: FAILED: 1 passed, 1 failed" in done.stdout


@NO_GPU
def test_without_time_everything_is_left_out_and_said(tmp_path):
    done = run_script(tmp_path, *SMOKE, "--budget", "1", OUT=str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    (output,) = (tmp_path / "out").iterdir()
    assert output.name.startswith("smoke-") and output.suffix == ".json"
    data = json.loads(output.read_text())
    left = {entry["section"] for entry in data["left_out"]}
    assert left == {"matrix", "parity", "bandwidth", "times", "kernels", "sweep", "compile"}
    assert data.get("cases") == [] and data["kernels"] == [] and "parity" not in data
    assert "left out for want of time" in done.stdout
