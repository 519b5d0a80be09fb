"""Runs in processes of their own: killed and resumed, and two in place of one."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tolerances import relative_error

pytest.importorskip("tqdm", reason="pip install '.[train]'")

TOYS = Path(__file__).resolve().parent / "recipe_toys.py"
ROOT = TOYS.parent.parent


def environment() -> dict[str, str]:
    """This process's, with the CPU's kernels in place of Triton's interpreter."""
    found = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, (str(ROOT), found.get("PYTHONPATH"))))
    return {**found, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}


def command(*words: str) -> list[str]:
    return [sys.executable, str(TOYS), *words]


def completed(words: list[str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def rows(folder: Path) -> list[dict[str, float]]:
    found = csv.DictReader((folder / "metrics.csv").read_text().splitlines())
    return [{key: float(value) for key, value in row.items()} for row in found]


def kill_in_epoch(words: list[str], epoch: int) -> None:
    """Run until it is two steps into an epoch, and end it there with SIGKILL."""
    running = subprocess.Popen(words, env=environment(), stderr=subprocess.PIPE, text=True)
    for line in running.stderr:
        if line.startswith(f"epoch {epoch}/5 step 2/6"):
            running.send_signal(signal.SIGKILL)
            break
    running.stderr.close()
    assert running.wait(60) == -signal.SIGKILL


def test_a_run_killed_in_an_epoch_ends_as_one_that_was_not(seed, tmp_path):
    """The same bits: of metrics.csv, of every weight, and of the optimizer's state. Killed twice:
    in the first epoch, when there is no checkpoint yet, and later."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    words = ["train", "--recipe=toy", "--attention=bam", "--reduction=4", f"--seed={seed}"]
    words += ["--epochs=5", "--log-every=1"]
    kill_in_epoch(command(*words, f"--out={broken}"), 1)
    kill_in_epoch(command(*words, f"--out={broken}", "--resume"), 3)
    # A slow reader of its lines may have let it go on a little: not to the end, and no less.
    assert 2 <= len(rows(broken)) < 5
    completed(command(*words, f"--out={broken}", "--resume"))
    completed(command(*words, f"--out={whole}"))

    assert len(rows(whole)) == 5
    assert (broken / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    ours, theirs = (
        torch.load(folder / "checkpoint.pth", weights_only=True) for folder in (broken, whole)
    )
    assert ours["model"].keys() == theirs["model"].keys()
    assert any(".bam." in key for key in ours["model"])
    for key, value in ours["model"].items():
        assert torch.equal(value, theirs["model"][key]), key
    ours, theirs = ours["optimizer"]["state"], theirs["optimizer"]["state"]
    assert ours.keys() == theirs.keys() and len(ours) > 20
    for key, state in ours.items():
        assert torch.equal(state["momentum_buffer"], theirs[key]["momentum_buffer"]), key


def test_two_processes_train_as_one(seed, tmp_path):
    """On halves of each batch each, by torchrun: losses, errors and weights are those of one
    process on the whole, to rounding. The network has no batch norm: batch statistics are each
    process's own."""
    one, two = tmp_path / "one", tmp_path / "two"
    words = ["train", "--recipe=toy", "--model=toy_groups", "--attention=none"]
    words += [f"--seed={seed}", "--epochs=3", "--device=cpu"]
    completed(command(*words, f"--out={one}"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node=2", str(TOYS)]
    done = completed([*torchrun, *words, f"--out={two}"])
    assert done.stdout.count("test error:") == 1  # the first process tells, and it alone

    ours, theirs = rows(two), rows(one)
    assert len(ours) == len(theirs) == 3
    assert ours[0]["train_loss"] != ours[1]["train_loss"]
    for a, b in zip(ours, theirs, strict=True):
        for key, value in b.items():
            assert a[key] == pytest.approx(value, rel=1e-5), key
    ours, theirs = (
        torch.load(folder / "checkpoint.pth", weights_only=True)["model"] for folder in (two, one)
    )
    flat = [torch.cat([v.flatten() for v in state.values()]) for state in (ours, theirs)]
    assert relative_error(*flat) < 1e-5


def test_torchrun_with_a_bad_argument_tells_it_in_one_line_a_process(tmp_path):
    (tmp_path / "settings.json").write_text("{}")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node=2", str(TOYS), "train", "--recipe=toy", f"--out={tmp_path}"]
    done = subprocess.run(torchrun, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    lines = [x for x in done.stderr.splitlines() if x.startswith("bam_kernels train: error")]
    assert 1 <= len(lines) <= 2 and len(set(lines)) == 1
    assert "holds a run" in lines[0]
    assert [p.name for p in tmp_path.iterdir()] == ["settings.json"]
    assert (tmp_path / "settings.json").read_text() == "{}"
