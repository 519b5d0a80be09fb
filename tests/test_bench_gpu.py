"""``bench`` of a GPU, tried on toys in the interpreter; what it refuses; its table and picture."""

from __future__ import annotations

import json

import pytest
import torch

from bam_kernels.benchmarking import plot, results
from bam_kernels.benchmarking.gpu import bench
from bam_kernels.cli import bench as command
from bam_kernels.cli import main

rich = pytest.importorskip("rich.console")
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is of machines without a GPU")


@pytest.fixture(scope="module")
def result() -> dict:
    """A smoke run where the kernels run in this session."""
    options = bench.dataclasses.replace(
        bench.SMOKE, device="cuda" if torch.cuda.is_available() else "cpu"
    )
    return bench.run(options, rich.Console(stderr=True, quiet=True))


def test_result(result, tmp_path):
    assert result["not_a_measurement"] is True
    assert bench.wrong(result) == []
    assert {entry["case"]["mode"] for entry in result["cases"]} == {"inference", "training"}
    for entry in result["cases"]:
        assert {"fused", "eager", "compile"} <= set(entry["peers"])
        assert all(entry["peers"][name]["median_ms"] > 0 for name in ("fused", "eager", "compile"))
        assert entry["ratio_plain"] > 0 and entry["spot_check"]["ok"]
        assert 0 < entry["share_of_copy"]["fused"]
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(result))
    loaded = results.load(file)  # the very form of the long run's
    assert loaded.kind == "gpu" and not loaded.measured
    assert results.NOT_MEASURED in results.table(loaded)
    header, rows = results.gpu_rows(result)
    assert len(rows) == len(result["cases"]) and all(len(row) == len(header) for row in rows)


def test_picture(result, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "gpu.png"
    plot.draw(result, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_wrong_numbers_are_told(result):
    broken = json.loads(json.dumps(result))
    broken["cases"][0]["spot_check"]["ok"] = False
    broken["cases"][1] = {"case": broken["cases"][1]["case"], "error": "RuntimeError: no"}
    told = bench.wrong(broken)
    assert "wrong numbers" in told[0] and "RuntimeError: no" in told[1]


@on_cpu
def test_no_gpu(tmp_path, capsys):
    file = tmp_path / "gpu.json"
    assert main(["bench", "--device", "cuda", "--quick", "--json", str(file)]) == 2
    told = "--device cuda: expected an NVIDIA GPU, got none that torch sees"
    assert capsys.readouterr().err == f"bam_kernels bench: error: {told}\n"
    assert not file.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    (
        (("--dtype", "float16"), "--dtype float16: expected a GPU's run"),
        (("--device", "cuda", "--check"), "--check: expected a run on the CPU"),
        (("--peers", "openvino"), "--peers openvino: expected eager or compile on a GPU"),
    ),
)
def test_unsuited(arguments, words, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: arguments[0] != "--dtype")
    assert main(["bench", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_two_devices(monkeypatch, tmp_path, capsys, result):
    """With a GPU both are measured, each into a file of its own; the worse status comes out."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench, "run", lambda options, console: result)
    seen = []
    monkeypatch.setattr(command, "_on_cpu", lambda args, out: seen.append(args.json) or 0)
    file = tmp_path / "both.json"
    assert main(["bench", "--smoke", "--json", str(file)]) == 0
    assert seen == [file]
    assert json.loads((tmp_path / "both-gpu.json").read_text())["cases"]
    assert "fused, graph" in capsys.readouterr().out
