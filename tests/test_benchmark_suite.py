"""``pytest benchmarks``: every benchmark runs, on toys; the JSON says what it is; bad options."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str) -> subprocess.CompletedProcess:
    # Of their own device and backends: this process's settings are for Triton's interpreter. And
    # pytest-benchmark measures nothing in what looks like a worker of pytest-xdist.
    env = {
        k: v
        for k, v in os.environ.items()
        if k not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS") and not k.startswith("PYTEST_XDIST")
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist",
               "benchmarks", *arguments]  # fmt: skip
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_every_benchmark_runs(tmp_path):
    file = tmp_path / "suite.json"
    done = run("--tiny", "--device", "cpu", "--benchmark-json", str(file))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    found = json.loads(file.read_text())
    machine = found["machine_info"]["bam_kernels"]
    assert machine["not_a_measurement"] is True
    assert {"commit", "versions", "machine"} <= set(machine)
    names = {each["name"].split("[")[0] for each in found["benchmarks"]}
    assert names == {
        "test_forward_of", "test_backward_of", "test_inference", "test_forward", "test_backward",
        "test_training_step", "test_resnet50_inference", "test_resnet50_training_step",
    }  # fmt: skip
    groups: dict[str, set[str]] = {}
    for each in found["benchmarks"]:
        sides = [v for k, v in each["params"].items() if k.endswith("side")]
        groups.setdefault(each["group"], set()).update(sides)
        assert each["extra_info"]["relative_error"] < 0.05
        if each["name"].startswith("test_forward["):
            assert each["extra_info"]["saved_bytes"] > 0
        if each["name"].startswith(("test_inference", "test_training_step")):
            assert each["extra_info"]["peak_bytes"] > 0
    for group, sides in groups.items():
        network = group.startswith("resnet50")
        assert sides == ({"fused", "eager"} | (set() if network else {"compile"})), group


@pytest.mark.parametrize(
    ("arguments", "words"),
    (
        (("--tiny", "--quick"), "--quick, --tiny: expected one of them"),
        (("--batch", "1"), "--batch: expected at least 2, got 1"),
        (("--threads", "0"), "--threads: expected at least 1, got 0"),
        (("--device", "tpu"), "--device: invalid choice: 'tpu'"),
    ),
)
def test_bad_options(arguments, words):
    done = run(*arguments)
    assert done.returncode == 4  # pytest's own status of a bad command line
    assert words in done.stderr
