"""The CPU benchmark: its arithmetic on made-up times, its command line, and a whole quick run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich", reason="the benchmark draws its tables with rich")

from bam_kernels import cli
from bam_kernels.benchmarking.cpu import machine as cpu_machine
from bam_kernels.benchmarking.cpu import memory as cpu_memory
from bam_kernels.benchmarking.cpu import peers as cpu_peers
from bam_kernels.benchmarking.cpu import report as cpu_report
from bam_kernels.benchmarking.cpu import run as cpu

ROOT = Path(__file__).resolve().parent.parent

PROBLEM = cpu_peers.Problem((2, 32, 4, 5), "float32", "inference", "paper")


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = (
        os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"} | {"PYTHONPATH": str(ROOT)}
    )
    return subprocess.run(
        [sys.executable, "-m", "bam_kernels", "bench", *map(str, arguments)],
        capture_output=True, text=True, timeout=300, env=environment,
    )  # fmt: skip


def times(**medians: float) -> dict[str, dict[str, float]]:
    return {key.replace("_", " ", 1): {"median_ms": ms} for key, ms in medians.items()}


def made_row(problem=PROBLEM, reasons=None, **medians):
    found = times(**medians)
    limits = {
        "matmul_gflops": {"float32": 100.0, "bfloat16": 400.0},
        "copy_gigabytes_per_second": {"2x32x4x5": 10.0},
    }
    return cpu_report.row(problem, found, dict.fromkeys(found, 1e-7), reasons or {}, limits)


# --- arithmetic -------------------------------------------------------------------------------


def test_flops_are_those_of_the_layers(seed):
    """Counted by torch on the module itself, which counts its convolutions and products alone."""
    from torch.utils.flop_counter import FlopCounterMode

    setting = cpu_peers.Setting.make(PROBLEM, 1)
    with FlopCounterMode(display=False) as counter:
        setting.module.spatial(setting.x)
    gate_and_pool = 5 * setting.x.numel()
    assert cpu_report.flops(PROBLEM) == counter.get_total_flops() + gate_and_pool
    training = cpu_peers.Problem(PROBLEM.size, "float32", "training", "paper")
    extra = cpu_report.flops(training) - cpu_report.flops(PROBLEM)
    assert extra == 2 * counter.get_total_flops() + 8 * setting.x.numel()


def test_moved_bytes_are_three_and_eight_passes():
    assert cpu_report.moved_bytes(PROBLEM) == 3 * 2 * 32 * 20 * 4
    training = cpu_peers.Problem(PROBLEM.size, "bfloat16", "training", "paper")
    assert cpu_report.moved_bytes(training) == 8 * 2 * 32 * 20 * 2


def test_a_ratio_is_to_the_best_peer_in_any_layout():
    row = made_row(ours_nchw=2.0, ours_channels_last=1.0, eager_nchw=8.0, compile_channels_last=3.0)
    assert row["best_peer"] == "compile channels_last"
    assert row["ratios"] == {"nchw": 1.5, "channels_last": 3.0}
    rates = row["achieved"]["channels_last"]
    assert rates["gflops"] == pytest.approx(row["flops"] / 1e6)
    assert rates["of_copy"] == pytest.approx(row["moved_bytes"] / 1e6 / 10)


def test_a_row_without_peers_or_without_ours_has_no_ratio():
    assert made_row(ours_nchw=2.0)["ratios"] == {}
    row = made_row(reasons={"ours nchw": "wrong"}, eager_nchw=2.0)
    assert row["ratios"] == {} and row["not_run"] == {"ours nchw": "wrong"}


def judged(rows=(), **rest) -> list[tuple[str, bool]]:
    return [(b["bar"], b["pass"]) for b in cpu_report.bars({"rows": list(rows), **rest})]


@pytest.mark.parametrize(
    ("dtype", "mode", "eager", "expected"),
    [
        ("float32", "inference", 1.6, True),
        ("float32", "inference", 1.4, False),
        ("float32", "training", 1.4, False),
        ("float32", "training", 1.5, True),
        ("bfloat16", "inference", 1.0, True),
        ("bfloat16", "training", 0.9, False),
    ],
)
def test_bars_of_a_row(dtype, mode, eager, expected):
    problem = cpu_peers.Problem(PROBLEM.size, dtype, mode, "paper")
    row = made_row(problem, ours_nchw=1.0, ours_channels_last=1.0, eager_nchw=eager)
    found = judged([row])
    assert len(found) == 2 and all(mode in bar and dtype in bar for bar, _ in found)
    assert {passed for _, passed in found} == {expected}


def test_what_was_not_measured_is_a_miss():
    row = made_row(ours_nchw=1.0, eager_nchw=9.0)
    assert [passed for _, passed in judged([row])] == [True, False]
    site = {"side": "ours", "site": "s", "dtype": "d", "layout": "l", "x_bytes": 8 << 20}
    memory = [
        {**site, "peak": 0.2, "first_call": 0.4},
        {**site, "peak": 0.2, "first_call": 0.1},
        {**site, "error": "no /proc"},
        {**site, "x_bytes": 1 << 20, "peak": 9.0, "first_call": 9.0},  # too small to judge
        {**site, "side": "eager", "peak": 3.0, "first_call": 3.0},
    ]
    assert [passed for _, passed in judged(memory=memory)] == [False, True, False]
    for ratio, expected in ((0.5, True), (0.6, False), (None, False)):
        assert judged(overhead={"site": "s", "ratio": ratio})[0][1] is expected


def test_training_takes_more_than_one_sample():
    todo, left = cpu.problems(cpu.Options(sites=((1, 32, 4, 4), (2, 32, 4, 4))))
    assert {(each.size[0], each.mode) for each in left} == {(1, "training")}
    assert len(todo) == 6 and len(left) == 2


def test_summary_has_quartiles():
    found = cpu.summary([5.0, 1.0, 2.0, 4.0, 3.0])
    assert found == {"median_ms": 3.0, "min_ms": 1.0, "q1_ms": 2.0, "q3_ms": 4.0, "rounds": 5}


def test_interleave_turns_and_leaves_out_what_fails():
    order: list[str] = []

    def side(name: str, fails: bool = False) -> cpu_peers.Side:
        def loop(calls: int) -> None:
            if fails:
                raise RuntimeError("no\nmemory")
            order.append(name)

        return cpu_peers.Side(name, "nchw", loop, dict)

    made = [side("a"), side("b", fails=True), side("c")]
    found, failed = cpu.interleave(made, 3, 0)
    assert list(found) == ["a nchw", "c nchw"] and found["a nchw"]["rounds"] == 3
    assert failed == {"b nchw": "RuntimeError: no memory"}
    rounds = "".join(order)[4:]  # behind the round that finds the repeats; two loops a turn
    assert rounds == "aacc" + "ccaa" + "ccaa"


def test_a_wrong_side_is_not_timed(seed, monkeypatch):
    build = cpu_peers.build

    def wrong(setting, name, layout):
        side = build(setting, name, layout)
        if layout == "channels_last":
            return cpu_peers.Side(name, layout, side.loop, lambda: {"out": 1.01 * setting.x})
        return side

    monkeypatch.setattr(cpu_peers, "build", wrong)
    import bam_kernels

    with bam_kernels.use_backend("reference"):
        sides, errors, reasons = cpu_peers.sides(cpu_peers.Setting.make(PROBLEM, 1), ("eager",))
    assert [side.key for side in sides] == list(errors) == ["ours nchw", "eager nchw"]
    assert list(reasons) == ["ours channels_last", "eager channels_last"]
    assert all(reason.startswith("wrong: relative error") for reason in reasons.values())


@pytest.mark.parametrize("peer", ("onnxruntime", "openvino"))
def test_runtimes_say_what_they_lack(peer, monkeypatch):
    monkeypatch.setattr(cpu_peers.importlib.util, "find_spec", lambda name: None)
    assert "pip install onnx onnxscript" in cpu_peers.missing(peer)
    with pytest.raises(cpu_peers.UnavailableError, match="not installed"):
        cpu_peers.build(cpu_peers.Setting.make(PROBLEM, 1), peer, "nchw")


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("layout", cpu_peers.LAYOUTS)
@pytest.mark.parametrize("peer", ("onnxruntime", "openvino"))
def test_runtimes_compute_bam(peer, layout, dtype, seed):
    if cpu_peers.missing(peer) is not None:
        pytest.skip(cpu_peers.missing(peer))
    if peer == "onnxruntime" and (dtype, layout) != ("float32", "nchw"):
        pytest.skip("ONNX Runtime is timed in float32 and NCHW")
    problem = cpu_peers.Problem(PROBLEM.size, dtype, "inference", "official")
    setting = cpu_peers.Setting.make(problem, 1)
    side = cpu_peers.build(setting, peer, layout)
    side.loop(2)
    assert setting.error(side) < setting.limit()


# --- the machine ------------------------------------------------------------------------------


def test_the_machine_is_told():
    found = cpu_machine.environment(2)
    assert found["machine"]["cpu"] and found["machine"]["threads"] == 2
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["python"].count(".") == 2
    json.dumps(found)


def test_no_foreign_commit_is_told(tmp_path, monkeypatch):
    """Of a package that is installed inside of another repository."""
    from bam_kernels.benchmarking.gpu import environment

    told = environment.commit()["told_by"]
    assert told == "git" or not (ROOT / ".git").exists()
    for words in (["init", "-q"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q",
                  "--allow-empty", "-m", "theirs"]):  # fmt: skip
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    (tmp_path / "bam_kernels").mkdir()
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    assert environment.commit() == {"commit": "unknown", "dirty": None, "told_by": None}


def test_limits_are_positive():
    assert cpu_machine.copy_gigabytes(1 << 20, 2) > 0
    assert cpu_machine.matmul_gflops(torch.float32, 1) > 0


def test_memory_is_measured_in_a_process_of_its_own():
    """Eager holds a few maps beside its output; torch's allocator and the system agree on that."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of resident memory is reset through Linux's /proc")
    request = {
        "size": [4, 64, 64, 64], "dtype": "float32", "side": "eager", "layout": "nchw",
        "preset": "paper", "threads": 1, "backend": "reference",
    }  # fmt: skip
    found = cpu_memory.in_child(request, 1)
    assert "error" not in found, found
    assert 1 <= found["torch_allocator"] < 6
    assert found["peak"] == pytest.approx(found["torch_allocator"], abs=0.5)


def test_a_failed_process_is_an_error_in_the_result():
    found = cpu_memory.in_child({"size": [1, 32, 4, 4], "dtype": "float32"}, 1)
    assert "KeyError" in found["error"]


# --- the command ------------------------------------------------------------------------------


def check_result(path: Path, backend: str) -> None:
    found = json.loads(path.read_text())
    assert found["settings"]["backend"] == backend and found["not_a_measurement"]
    assert len(found["commit"]) >= 7 and found["machine"]["cores"] >= 1
    assert found["limits"]["matmul_gflops"]["float32"] > 0
    assert [row["mode"] for row in found["rows"]] == ["inference", "training"]
    for row in found["rows"]:
        assert row["not_run"] == {}
        assert set(row["ratios"]) == {"nchw", "channels_last"}
        keys = [f"{name} {layout}" for name in ("ours", "eager") for layout in cpu_peers.LAYOUTS]
        assert list(row["sides"]) == keys
        for side in row["sides"].values():
            assert 0 < side["min_ms"] <= side["q1_ms"] <= side["median_ms"] <= side["q3_ms"]
            assert side["rounds"] == 3 and side["relative_error"] < 1e-3
        assert row["achieved"]["nchw"]["gflops"] > 0
    assert found["overhead"]["ratio"] > 0
    assert {each["side"] for each in found["memory"]} == {"ours", "eager"}
    assert len(found["bars"]) == 5


def test_a_quick_run(tmp_path):
    path, picture = tmp_path / "cpu.json", tmp_path / "cpu.png"
    done = call(
        "--smoke", "--backend", "reference", "--threads", 1, "--json", path, "--plot", picture
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2x32x8x8" in done.stdout and "ratio nchw" in done.stdout
    check_result(path, "reference")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["cpu.json", "cpu.png"]
    assert_shows_something(picture)


def assert_shows_something(picture: Path) -> None:
    """Content in both columns, above and below: bars, and points under a roof."""
    image = pytest.importorskip("PIL.Image").open(picture).convert("L")
    width, height = image.size
    assert width > 1000 and height > 500
    for box in ((0, 0, width // 2, height // 2), (0, height // 2, width // 2, height)):
        part = image.crop(box)
        assert part.getextrema()[0] < 60 and len(part.getcolors(256) or range(257)) > 20


def test_check_judges_what_was_measured():
    done = call(
        "--smoke", "--backend", "reference", "--threads", 1, "--mode", "inference",
        "--no-memory", "--check",
    )  # fmt: skip
    assert "  a call's overhead at most 0.5 of eager's" in done.stdout, done.stderr
    assert "bars passed" in done.stdout.splitlines()[-1]
    assert done.returncode == ("MISS  " in done.stdout)


def status(arguments: list[str]) -> int:
    """The exit status, whether the command returns it or argparse leaves with it."""
    try:
        return cli.main(arguments)
    except SystemExit as left:
        return left.code


@pytest.mark.parametrize("passes", ((True, True), (True, False)))
def test_check_sets_the_exit_status(passes, monkeypatch, capsys):
    bars = [{"bar": "a bar", "where": "here", "found": 1.0, "pass": each} for each in passes]
    limits = {"matmul_gflops": {}, "copy_gigabytes_per_second": {}}
    monkeypatch.setattr(cpu, "run", lambda *_: {"rows": [], "limits": limits, "bars": bars})
    assert cli.main(["bench", "--check"]) == (not all(passes))
    assert f"{sum(passes)} of 2 bars passed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sites", "8x256x56"], "argument --sites: expected NxCxHxW"),
        (["--sites", "8x8x7x7"], "C of at least 16"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--mode", "test"], "argument --mode: invalid choice"),
        (["--rounds", "0"], "argument --rounds: expected a whole number of at least 1, got '0'"),
        (["--threads", "two"], "argument --threads: expected a whole number"),
        (["--json", "/nowhere/cpu.json"], "--json: no such folder: /nowhere"),
        (["--json", "/"], "--json: expected a file, got the folder /"),
        (["--plot", "/nowhere/cpu.png"], "--plot: no such folder: /nowhere"),
        (["--plot", "cpu.svg"], "--plot: expected a name that ends in .png, got cpu.svg"),
        (["--peers", "tvm"], "argument --peers: invalid choice: 'tvm'"),
        (["--quick", "--smoke"], "not allowed with argument --quick"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, capsys):
    assert status(["bench", *arguments]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    command = "bam_kernels" if "unrecognized" in message else "bam_kernels bench"
    assert told.err.startswith(f"{command}: error: ") and message in told.err
    assert told.err.count("\n") == 1


def test_a_backend_that_cannot_run_is_one_line(monkeypatch, capsys):
    from bam_kernels.backends import cpp_library

    monkeypatch.setattr(cpp_library, "why_not", lambda: "there is no\ncompiler")
    assert status(["bench", "--smoke", "--no-memory", "--threads", "1"]) == 2
    told = capsys.readouterr()
    assert told.err.splitlines()[-1].endswith("cannot run: there is no compiler")


def test_help_and_list():
    done = call("--help")
    assert done.returncode == 0 and "exit status" in done.stdout
    done = call("--list")
    assert done.returncode == 0 and "8x256x56x56" in done.stdout
    assert all(f"{peer}: " in done.stdout for peer in cpu_peers.PEERS)
