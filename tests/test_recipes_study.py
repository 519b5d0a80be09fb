"""The study: its runs, what it computes of them, what it says and refuses."""

from __future__ import annotations

import json
import statistics
import sys
import types
from pathlib import Path

import pytest
import recipe_toys
import torch
from test_recipes import rows, run, toys
from test_recipes_errors import content, refused
from test_recipes_runs import environment

from bam_kernels import cli
from bam_kernels.recipes import study, study_report

for package in ("matplotlib", "scipy"):
    pytest.importorskip(package, reason="pip install '.[train]'")

__all__ = ["toys"]  # a fixture of every test here


class Here:
    """`subprocess.Popen` of a ``train`` command, run in this process before it returns."""

    def __init__(self, words, env, stdout, stderr) -> None:
        assert words[:3] == list(study.PROGRAM) and env["OMP_NUM_THREADS"] == "1"
        before = sys.stderr
        sys.stderr = stderr
        try:
            self.returncode = cli.main(words[3:])
        finally:
            sys.stderr = before

    def poll(self) -> int:
        return self.returncode

    def terminate(self) -> None: ...

    def wait(self) -> int:
        return self.returncode


def in_this_process(monkeypatch, popen) -> None:
    monkeypatch.setattr(study, "subprocess", types.SimpleNamespace(Popen=popen))


def words(out: Path, *more: object) -> list[str]:
    return ["--recipe=toy", "--epochs=1", f"--out={out}", "--processes=2", *map(str, more)]


def test_a_study_of_processes(tmp_path, monkeypatch, capsys):
    """Its runs in processes of their own, two at a time."""
    monkeypatch.setattr(study, "PROGRAM", (sys.executable, recipe_toys.__file__))
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    run("study", *words(tmp_path, "--seeds=1"))
    assert capsys.readouterr().err.count("test error") == 4
    found = json.loads((tmp_path / "study.json").read_text())
    assert [each["variant"] for each in found["variants"]] == ["baseline", "+SE", "+BAM-C", "+BAM"]
    assert found["commit"] and found["versions"]["torch"] and found["machine"]["cpu"]
    sizes = [each["parameters"] for each in found["variants"]]
    assert sizes[0] == min(sizes) and sizes[2] == max(sizes)
    assert all(each["step_ms"] > 0 and len(each["errors"]) == 1 for each in found["variants"])
    assert all(each["error"]["half"] is None for each in found["variants"])  # of one value


def test_a_study_goes_on_and_grows(tmp_path, monkeypatch, capsys):
    in_this_process(monkeypatch, Here)
    seconds = {name: [0.5] for name in study.VARIANTS}
    monkeypatch.setattr(study, "step_seconds", lambda plan: seconds)
    run("study", *words(tmp_path, "--seeds=1"))
    first = {p: p.read_bytes() for p in tmp_path.rglob("checkpoint.pth")}
    assert len(first) == 4
    refused(capsys, "holds a study; --resume", *words(tmp_path), command="study")
    changed = words(tmp_path, "--resume", "--lr=0.5")
    refused(capsys, "recipe.lr is 0.05 there, 0.5 here", *changed, command="study")
    run("study", *words(tmp_path, "--seeds=3", "--resume"))
    assert all(path.read_bytes() == content for path, content in first.items())
    found = json.loads((tmp_path / "study.json").read_text())
    for each in found["variants"]:
        name = each["variant"].removeprefix("+").lower()
        last = [rows(tmp_path / f"runs/{name}-{k}")[-1]["test_top1_error"] for k in range(3)]
        assert each["errors"] == last
        assert each["error"]["mean"] == pytest.approx(statistics.mean(last))
    out = capsys.readouterr().out
    assert "+BAM-C" in out and "500.0" in out
    from PIL import Image

    assert Image.open(tmp_path / "study.png").size[0] > 500
    assert (tmp_path / "study.png").stat().st_size < 150_000


def test_a_failing_run_is_told_and_the_rest_is_kept(tmp_path, monkeypatch, capsys):
    in_this_process(monkeypatch, Here)
    bad = tmp_path / "runs/bam-0"
    bad.mkdir(parents=True)
    (bad / "metrics.csv").write_text("mine")
    refused(capsys, "holds runs that are no study's", *words(tmp_path), command="study")
    (tmp_path / "study_settings.json").write_text("{}")
    refused(capsys, "holds another study", *words(tmp_path, "--resume"), command="study")
    (tmp_path / "study_settings.json").unlink()
    bad.rename(tmp_path / "aside")
    (tmp_path / "runs").rmdir()

    class Failing(Here):
        def __init__(self, words, *args, **kwargs) -> None:
            if "--attention=bam" in words:
                words = [*words, "--batch=1000"]
            super().__init__(words, *args, **kwargs)

    in_this_process(monkeypatch, Failing)
    capsys.readouterr()
    assert cli.main(["study", *words(tmp_path, "--seeds=1")]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "error: the run +BAM, seed 0: bam_kernels train: error: --batch: expected" in told
    assert not (tmp_path / "study.json").exists()
    kept = content(tmp_path / "runs/se-0")
    in_this_process(monkeypatch, Here)
    run("study", *words(tmp_path, "--seeds=1", "--resume"))
    assert content(tmp_path / "runs/se-0") == kept and (tmp_path / "study.json").exists()


def test_bad_arguments(tmp_path, capsys):
    for message, *bad in (
        ("--recipe: expected one of", "--recipe=mnist"),
        ("--model: expected one of", "--model=vgg"),
        ("--device: expected one that is here", "--device=abacus"),
        ("--resume: no study in", "--resume"),
        ("argument --seeds: expected a whole number of at least 1, got '0'", "--seeds=0"),
        ("at least reduction=100", "--reduction=100"),
    ):
        refused(capsys, message, *words(tmp_path / "new", *bad), command="study")
    assert not (tmp_path / "new").exists()


def test_intervals_are_students(seed):
    """Of normal numbers, nine in ten and more intervals of 95 % hold the mean that they have."""
    draws = (torch.randn(400, 5, dtype=torch.float64) * 3 + 7).tolist()
    found = [study_report.mean_of(values) for values in draws]
    held = sum(abs(each.mean - 7) <= each.half for each in found) / len(found)
    assert 0.90 < held < 0.99  # a standard deviation is 0.011
    assert found[0].deviation == pytest.approx(statistics.stdev(draws[0]))
    # Student's 97.5 % quantile at four degrees of freedom is 2.776 (any table of it).
    assert found[0].half == pytest.approx(2.776 * found[0].deviation / 5**0.5, rel=1e-3)


def test_gains_are_seed_by_seed():
    errors = {"baseline": [10.0, 20.0, 30.0], "+BAM": [9.0, 18.0, 30.0]}
    found = study_report.summary(errors, {"baseline": 1, "+BAM": 2}, {k: [1.0] for k in errors})
    assert found[0]["gain"] is None
    assert found[1]["gain"]["mean"] == 1.0 and found[1]["gain"]["deviation"] == 1.0
    cells = study_report.rows(found)[1]
    assert cells[:2] == ["+BAM", "19.00"] and cells[4] == "+1.00" and cells[6] == "2"
