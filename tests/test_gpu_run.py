"""The GPU run's parts that need no GPU: its processes, its matrix, its sanitizer, and what is left
of a run that breaks off."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import gpu_matrix  # noqa: E402
import gpu_pool  # noqa: E402
import gpu_run  # noqa: E402
import gpu_sanitizer  # noqa: E402
import gpu_table  # noqa: E402
import gpu_workers  # noqa: E402

from bam_kernels.backends.triton import configs  # noqa: E402
from bam_kernels.benchmarking.gpu import environment  # noqa: E402
from bam_kernels.benchmarking.gpu import report as gpu_report  # noqa: E402

# --- processes --------------------------------------------------------------------------------


def test_a_process_that_hangs_or_dies_costs_its_task_alone():
    child = gpu_workers.Child()
    try:
        assert child.call(("math:sqrt", (9.0,))) == gpu_workers.Outcome(None, 3.0)
        first = child._process.pid
        assert child.call(("time:sleep", (600.0,)), 0.2).error.startswith("killed")
        assert child.call(("os:_exit", (3,))).error.endswith("exit status 3")
        assert child.call(("os:abort", ())).error.endswith("exit status -6")
        assert child.call(("math:sqrt", (4.0,))).result == 2.0
        assert child._process.pid != first
        unsendable = child.call(("threading:Lock", ()))
        assert "pickle" in unsendable.error
        assert child.call(("math:sqrt", (1.0,))).result == 1.0
    finally:
        child.close()
    assert child.call(("math:sqrt", (1.0,))).error == "the process did not start"


def test_what_a_task_has_started_ends_with_it(tmp_path):
    """A sanitizer, say, under a task that is out of time."""
    held = tmp_path / "held"
    os.mkfifo(held)
    reader = os.open(held, os.O_RDONLY | os.O_NONBLOCK)
    command = f"exec 3>{held}; echo started >&3; sleep 600"
    child = gpu_workers.Child()
    try:
        outcome = child.call(("subprocess:run", (["sh", "-c", command],)), 1.0)
        assert outcome.error.startswith("killed")
        os.set_blocking(reader, True)
        while os.read(reader, 100):  # until nobody holds the other end
            pass
    finally:
        child.close()
        os.close(reader)


def test_a_spoilt_device_ends_its_process(monkeypatch):
    assert gpu_workers.device_is_usable()
    cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=lambda: 1 / 0)
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
    assert not gpu_workers.device_is_usable()


def test_workers_go_on_beside_tasks_that_crash():
    tasks = [("os:_exit", (1,)), *[("math:sqrt", (float(n * n),)) for n in range(6)]]
    workers = gpu_workers.Workers(tasks, 2)
    workers.wait(120.0, [1, 2])
    assert workers.done[1].result == 0.0
    workers.wait(120.0)
    workers.stop()
    assert "exit status 1" in workers.done[0].error
    assert [workers.done[n].result for n in range(1, 7)] == list(map(float, range(6)))


def test_pool_tells_groups_apart_and_runs_what_is_waited_for():
    jobs = [gpu_pool.Job("a", n, ("math:sqrt", (float(n),))) for n in range(4)]
    jobs += [gpu_pool.Job("b", "x", ("math:nothing", ()))]
    pool = gpu_pool.Pool(jobs, 0)
    pool.wait(60.0, "a", [1, 4])
    assert {key: o.result for key, o in pool.outcomes("a").items()} == {1: 1.0}
    pool.wait(60.0)
    pool.stop()
    assert set(pool.outcomes("a")) == {0, 1, 2, 3}
    assert pool.outcomes("b")["x"].error.startswith("AttributeError")


def test_jobs_take_turns():
    a, b = ([gpu_pool.Job(g, n, ("m:f", ())) for n in range(5)] for g in "ab")
    order = "".join(job.group for job in gpu_pool.in_turn((a, 1), (b, 3), ([], 2)))
    assert order == "abbbabbaaa"


# --- the matrix -------------------------------------------------------------------------------


def test_core_of_the_matrix_shows_every_pair_of_values():
    rows = gpu_matrix.rows(1000)
    assert len({dataclasses.astuple(row)[:5] for row in rows}) == len(rows) == 240
    assert [row.seed for row in rows] == list(range(1000, 1240))
    fields = {
        "dtype": gpu_matrix.DTYPES, "layout": gpu_matrix.LAYOUTS, "combine": gpu_matrix.COMBINES,
        "preset": gpu_matrix.PRESETS, "mode": gpu_matrix.MODES, "size": ("even", "odd"),
    }  # fmt: skip
    for mode in gpu_matrix.MODES:
        counts = Counter(row.size for row in rows if row.mode == mode)
        assert min(counts.values()) >= 50 and len(counts) == 2
    core = rows[: gpu_matrix.CORE]
    for (a, values), (b, others) in itertools.combinations(fields.items(), 2):
        seen = {(getattr(row, a), getattr(row, b)) for row in core}
        assert seen == set(itertools.product(values, others)), (a, b)


def run_row(mode: str, **changes: str) -> dict[str, Any]:
    seed = torch.initial_seed() % 2**31
    row = gpu_matrix.Row("float32", "sliced", "sum", "paper", mode, "toy", seed)
    row = dataclasses.replace(row, **changes)
    return gpu_matrix.check_row(row, "cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("dtype", ["float64", "float32_tf32", "bfloat16"])
def test_a_right_row_passes(dtype, seed):
    before = torch.backends.cudnn.allow_tf32, torch.are_deterministic_algorithms_enabled()
    found = run_row("training", dtype=dtype)
    assert found["wrong"] == []
    assert {"out", "dx", "statistics", "small gradients"} < set(found["errors"])
    assert before == (
        torch.backends.cudnn.allow_tf32,
        torch.are_deterministic_algorithms_enabled(),
    )


@pytest.mark.parametrize("fault", ["unwritten", "scaled", "nan", "other bits"])
def test_a_wrong_row_is_told(fault, seed, monkeypatch):
    forward, calls = gpu_matrix.bam_kernels.BAM.forward, itertools.count()

    def wrong(module, x):
        out = forward(module, x)
        if fault == "scaled":
            return out * (1 + 1e-4)
        if fault == "nan":
            return out.masked_fill(torch.arange(out.shape[-1], device=x.device) == 3, float("nan"))
        if fault == "other bits":
            return out if next(calls) else out * (1 + 2e-7)
        whole = torch.empty_like(out)
        # What was there by luck is what should have been written, unless somebody has seen to it.
        rest = whole[..., 0]
        whole = torch.where(rest.isnan(), rest, out[..., 0])[..., None].expand_as(out).clone()
        whole[..., 1:] = out[..., 1:]
        return whole

    monkeypatch.setattr(gpu_matrix.bam_kernels.BAM, "forward", wrong)
    found = run_row("inference")
    assert found["wrong"]
    told = "the second time" if fault in ("unwritten", "other bits") else "out: error"
    assert any(told in line for line in found["wrong"])


def test_matrix_tells_the_worst_and_what_failed():
    rows = gpu_matrix.rows(7)[:3]

    def outcome(error: float, wrong: list[str]) -> gpu_workers.Outcome:
        pair = {"fused": error, "eager": 1e-3, "bound": 1e-2}
        return gpu_workers.Outcome(None, {"errors": {"out": pair}, "wrong": wrong})

    outcomes = {
        0: outcome(1e-3, []),
        1: outcome(float("nan"), ["out: nan"]),
        2: gpu_workers.Outcome("killed: it took more than 120 s"),
    }
    found = gpu_matrix.summarize(rows, outcomes)
    assert not found["ok"] and found["done"] == 3
    assert [failure["seed"] for failure in found["failures"]] == [8, 9]
    assert "killed" in found["failures"][1]["wrong"][0]
    report = {"matrix": json.loads(json.dumps(gpu_report.finite(found)))}
    text = "\n".join(gpu_table.matrix_lines(report))
    assert "nan" in text and "--sections matrix --seed 7" in text and "1.0e-03 (1.0e-03)" in text
    assert gpu_matrix.summarize(rows, {0: outcomes[0]})["ok"]
    assert not gpu_matrix.summarize(rows, {})["ok"]


# --- the sanitizer ----------------------------------------------------------------------------

RAN = gpu_sanitizer._RAN
CLEAN = f"{RAN}\n========= ERROR SUMMARY: 0 errors\n"
INVALID = f"========= Invalid __global__ read of size 2\n{RAN}\n========= ERROR SUMMARY: 4 errors\n"
RACE = f"{RAN}\n========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n"
NO_RACE = f"{RAN}\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
DENIED = "========= Error: Device not supported\n========= ERROR SUMMARY: 1 error\n"


@pytest.mark.parametrize(
    ("status", "text", "expected"),
    [
        (0, CLEAN, ("clean", 0)),
        (0, NO_RACE, ("clean", 0)),
        (99, INVALID, ("found", 4)),
        (99, INVALID.replace(RAN, ""), ("found", 4)),
        (99, RACE, ("found", 2)),
        (99, DENIED, ("refused", None)),
        (99, DENIED + RAN, ("refused", None)),  # they ran, but not under it
        (1, "error 999", ("refused", None)),
        (0, "========= ERROR SUMMARY: 0 errors\n", ("refused", None)),
        (0, RAN, ("refused", None)),
        (None, CLEAN, ("timeout", None)),
    ],
)
def test_what_a_sanitizer_says(status, text, expected):
    found = gpu_sanitizer.verdict(status, text)
    assert (found["outcome"], found["errors"]) == expected


def fake_sanitizer(folder: Path, monkeypatch, body: str, target: str = f"print('{RAN}')") -> None:
    script = folder / "compute-sanitizer"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    (folder / "target.py").write_text(target)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(gpu_sanitizer, "__file__", str(folder / "target.py"))


RUN_TARGET = 'echo "$@" >args; echo $PYTORCH_NO_CUDA_MEMORY_CACHING >>args; shift 6; "$@"; '


def test_sanitizer_runs_the_kernels_under_the_tool(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fake_sanitizer(tmp_path, monkeypatch, RUN_TARGET + "echo '= ERROR SUMMARY: 0 errors'")
    found = gpu_sanitizer.check("memcheck", 120.0)
    assert found["outcome"] == "clean" and "tail" not in found
    options, caching = (tmp_path / "args").read_text().splitlines()
    assert options.startswith("--tool memcheck --error-exitcode 99 --report-api-errors no ")
    assert caching == "1"
    fake_sanitizer(
        tmp_path, monkeypatch, RUN_TARGET + "echo '= RACECHECK SUMMARY: 3 hazards'; exit 99"
    )
    found = gpu_sanitizer.check("racecheck", 120.0)
    assert (found["outcome"], found["errors"]) == ("found", 3)
    assert any("3 hazards" in line for line in found["tail"])


def test_sanitizer_that_is_absent_or_hangs_or_kernels_that_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_sanitizer, "_FOLDERS", ())
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_sanitizer.check("memcheck", 10.0) == {"outcome": "absent"}
    monkeypatch.undo()
    # The plain run is quick; what the fake starts holds the output open until it is ended too.
    fake_sanitizer(tmp_path, monkeypatch, "sleep 600 & sleep 600")
    monkeypatch.setattr(gpu_sanitizer, "_PLAIN_PART", 60.0)
    assert gpu_sanitizer.check("memcheck", 1.0)["outcome"] == "timeout"
    fake_sanitizer(tmp_path, monkeypatch, "exit 0", "raise SystemExit('no such kernel')")
    found = gpu_sanitizer.check("memcheck", 120.0)
    assert found["outcome"] == "broken" and "no such kernel" in found["tail"][-1]


def test_sanitizer_has_every_kernel_to_run(device, capsys, monkeypatch):
    from triton.runtime import interpreter, jit

    launched = set()
    owner = jit.JITFunction if device.type == "cuda" else interpreter.InterpretedFunction
    launch = owner.run

    def record(function, *args, **kwargs):
        launched.add(function.fn.__name__)
        return launch(function, *args, **kwargs)

    monkeypatch.setattr(owner, "run", record)
    gpu_sanitizer.launch_all(str(device))
    assert gpu_sanitizer._RAN in capsys.readouterr().out
    sources = Path(configs.__file__).parent.glob("*.py")
    known = set(re.findall(r"^def (_\w+_kernel)\(", "".join(f.read_text() for f in sources), re.M))
    assert known == launched


# --- what is left of a run --------------------------------------------------------------------

PARTS = """
import os, signal, sys, threading, time
sys.path[:0] = {paths!r}
os.environ["TRITON_INTERPRET"] = "1"
import gpu, gpu_run
arguments = ["--device", "cpu", "--smoke", "--sections", "bandwidth,times,kernels", *sys.argv[2:]]
args = gpu.parse([*arguments, "--output", sys.argv[1]])
class Run(gpu_run.Run):
    def _times(self):
        raise RuntimeError("a kernel of this section is no good")
    def _kernels(self):
        {last}
sys.exit(Run(args, gpu_run.select(args), time.monotonic()).run())
"""


def run_parts(tmp_path: Path, last: str, *arguments: str) -> tuple[int, str, dict[str, Any]]:
    paths = [str(ROOT), str(ROOT / "benchmarks")]
    script, output = tmp_path / "run.py", tmp_path / "out.json"
    script.write_text(textwrap.dedent(PARTS).format(paths=paths, last=last))
    done = subprocess.run(
        [sys.executable, str(script), str(output), *arguments],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert output.exists(), done.stderr[-2000:]
    return done.returncode, done.stdout, json.loads(output.read_text())


def test_a_run_that_is_killed_leaves_what_it_had(tmp_path):
    status, _, data = run_parts(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    assert status == -signal.SIGKILL
    assert data["bandwidth"]["large"]["gbs"] > 0
    assert "no good" in data["errors"]["times"]["error"]


def test_a_run_that_is_asked_to_end_tells_what_it_had(tmp_path):
    status, out, data = run_parts(tmp_path, "os.kill(os.getpid(), signal.SIGTERM); time.sleep(600)")
    assert status == 1  # of the section that broke off before
    assert {"section": "kernels", "what": "the rest", "why": "it was asked to end"} in data[
        "left_out"
    ]
    assert "section times broke off" in out and "left out" in out


def test_a_run_that_hangs_is_abandoned_and_tells_what_it_had(tmp_path):
    """In a call that hears of no signal, as of a device that does not answer."""
    status, out, data = run_parts(
        tmp_path, "threading.Timer(0.2, self._abandon).start(); time.sleep(600)"
    )
    assert status == 1 and data["exit_status"] == 1
    assert "hung" in data["errors"]["kernels"]["error"]
    assert data["bandwidth"]["large"]["gbs"] > 0 and "wrote" in out


def test_the_hard_limit_does_not_rely_on_a_signal(monkeypatch):
    abandoned = threading.Event()
    run = types.SimpleNamespace(
        budget=types.SimpleNamespace(left=lambda: -gpu_run.GRACE), _abandon=abandoned.set
    )
    monkeypatch.setattr(gpu_run, "ABANDON", 0.2)
    with pytest.raises(gpu_report.OutOfTime), gpu_run.Run._hard_limit(run):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
        try:
            abandoned.wait(60.0)
        finally:  # the signal waits, and comes now
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    assert abandoned.is_set()


def fake_run(tmp_path: Path, monkeypatch, *arguments: str):
    """A run on a clock that only a test moves, its pool with it."""
    args = gpu.parse(
        ["--device", "cpu", "--smoke", "--output", str(tmp_path / "r.json"), *arguments]
    )
    now = types.SimpleNamespace(value=0.0)
    run = gpu_run.Run(args, gpu_run.select(args), 0.0)
    run.budget = gpu_report.Budget(args.budget, args.sections, run.report, 0.0, lambda: now.value)
    waited: list[float] = []

    def wait(seconds: float, *_: object) -> None:
        waited.append(seconds)
        now.value += seconds

    run.pool = types.SimpleNamespace(
        jobs=[], wait=wait, stop=lambda: None, outcomes=lambda group: {}
    )
    return run, now, waited


def test_phases_end_when_the_budget_says(tmp_path, monkeypatch):
    run, now, waited = fake_run(tmp_path, monkeypatch, "--budget", "500")
    found: dict[str, float] = {}
    monkeypatch.setattr(
        gpu_run, "run_parity",
        lambda tests, stem, seconds, *_, **__: found.update(parity=seconds) or {"complete": True},
    )  # fmt: skip
    monkeypatch.setattr(gpu_run, "run_bandwidth", lambda *_: found.update(bandwidth=now.value))
    run._matrix()
    assert waited == [pytest.approx(gpu_run.MATRIX_PART * 500)]
    run._parity()
    assert found["parity"] == pytest.approx(min(150.0, (gpu_run.NOISY_PART - 0.2) * 500))
    run._bandwidth()
    assert found["bandwidth"] == pytest.approx(gpu_run.NOISY_PART * 500)
    assert run.pool is None
    quiet = run.budget.section("times").left()
    assert 0.2 * 500 * 0.5 < quiet < 0.3 * 500
    now.value = 499.0
    run._parity()
    (*_, last) = run.report.data["left_out"]
    assert last["section"] == "parity"


def test_the_noisy_phase_ends_with_its_jobs(tmp_path, monkeypatch):
    """Not when its time is up: whatever is measured next has what is left."""
    run, _, _ = fake_run(tmp_path, monkeypatch, "--budget", "4000")
    jobs = [gpu_pool.Job("matrix", n, ("time:sleep", (0.1,))) for n in range(3)]
    run.pool = pool = gpu_pool.Pool(jobs, 1)
    monkeypatch.setattr(run, "_report_matrix", lambda pool: None)
    begin = time.monotonic()
    run._stop_pool()
    assert time.monotonic() - begin < 300 < run._noisy_seconds()
    assert len(pool.outcomes("matrix")) == 3 and run.pool is None


@pytest.mark.parametrize(
    ("data", "failed"),
    [
        ({}, False),
        ({"matrix": {"failures": []}}, False),
        ({"matrix": {"failures": [{}]}}, True),
        (
            {"parity": {"ok": False, "complete": False, "passed": 9, "failed": 0, "errors": 0}},
            False,
        ),
        ({"parity": {"ok": False, "complete": False, "passed": 9, "failed": 1, "errors": 0}}, True),
        ({"parity": {"ok": False, "complete": True, "passed": 0, "failed": 0, "errors": 0}}, True),
        ({"sanitizer": {"memcheck": {"outcome": "refused"}}}, False),
        ({"sanitizer": {"racecheck": {"outcome": "found"}}}, True),
        ({"errors": {"times": {}}}, True),
        ({"left_out": [{}]}, False),
    ],
)
def test_time_is_no_failure_and_faults_are(data, failed):
    assert any(gpu_run.failures(data)) is failed


# --- the commit -------------------------------------------------------------------------------


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    return subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_commit_is_this_projects_or_none(tmp_path, monkeypatch):
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "another project")
    installed = tmp_path / "lib"
    (installed / "bam_kernels").mkdir(parents=True)
    unknown = {"commit": "unknown", "dirty": None, "told_by": None}
    monkeypatch.setattr(environment, "ROOT", installed)
    assert environment.commit() == unknown
    (installed / "csrc").mkdir()  # a copy of the sources, in another's repository
    assert environment.commit() == unknown
    assert environment.commit("abc")["commit"] == "abc"
    git(installed, "init", "-q")
    (installed / "csrc" / "a").touch()
    git(installed, "add", "csrc")
    git(installed, "commit", "-q", "-m", "ours")
    head = git(installed, "rev-parse", "HEAD")
    assert environment.commit() == {"commit": head, "dirty": False, "told_by": "git"}
    assert environment.commit("abc") == {"commit": "abc", "dirty": None, "told_by": "option"}
    (installed / "csrc" / "a").write_text("x")
    assert environment.commit()["dirty"] is True
