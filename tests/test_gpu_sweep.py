"""The GPU run's sweep: what it tries, what it chooses from made-up times, what it prints."""

from __future__ import annotations

import dataclasses
import itertools
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import gpu_choice  # noqa: E402
import gpu_sweep  # noqa: E402
import gpu_workers  # noqa: E402

from bam_kernels.backends.triton import configs  # noqa: E402
from bam_kernels.backends.triton.configs import Tile  # noqa: E402
from bam_kernels.benchmarking import sites  # noqa: E402
from bam_kernels.benchmarking.gpu import peers  # noqa: E402
from bam_kernels.benchmarking.gpu import report as gpu_report  # noqa: E402


def sweep_entry(cell: gpu_sweep.Cell, old_ms: float, tried: dict[Tile, float]) -> dict[str, Any]:
    precision = "tf32" if gpu_sweep.hidden_width(cell) and cell.shape.dtype == "float32" else "ieee"
    ours = {**dataclasses.asdict(gpu_sweep.shipped(cell)), "median_ms": old_ms}
    rows = [{**dataclasses.asdict(t), "ok": True, "median_ms": ms} for t, ms in tried.items()]
    return {
        "kernel": cell.kernel, **cell.shape.record(), "precision": precision, "shipped": ours,
        "best": [], "tried": rows, "untried": 0,
    }  # fmt: skip


def cells(kernel: str, dtype: str = "float16", layout: str = sites.CHANNELS_LAST):
    return [
        gpu_sweep.Cell(kernel, sites.Shape(site, 256, dtype, layout)) for site in sites.RESNET50
    ]


GOOD, FAST_AT_ONE, WIDE = Tile(128, 32, 4, 1), Tile(64, 64, 4, 1), Tile(64, 512, 8, 1)


def test_sites_that_share_an_entry_share_the_tile_that_serves_all():
    one, two, three = cells("gate")
    entries = [
        sweep_entry(one, 1.0, {GOOD: 0.9, FAST_AT_ONE: 0.5, WIDE: 0.8}),
        sweep_entry(two, 0.5, {GOOD: 0.45, FAST_AT_ONE: 0.6, WIDE: 0.40}),
        # 14x14 cuts the wide tile down, to one that was timed.
        sweep_entry(three, 0.4, {GOOD: 0.36, FAST_AT_ONE: 0.3, Tile(64, 256, 8, 1): 0.32}),
    ]
    (chosen,) = gpu_choice.choose(entries)
    assert chosen["new"] == dataclasses.asdict(WIDE)
    assert chosen["gain"] == pytest.approx(1.25)
    assert [site["new_ms"] for site in chosen["sites"]] == [0.8, 0.40, 0.32]
    entries[1]["tried"] = entries[1]["tried"][:2]  # the wide one was not timed there
    assert gpu_choice.choose(entries)[0]["new"] == dataclasses.asdict(GOOD)


def test_noise_changes_no_table():
    entries = [sweep_entry(cell, 1.0, {GOOD: 0.98}) for cell in cells("gate")]
    (chosen,) = gpu_choice.choose(entries)
    assert chosen["new"] == chosen["old"] and chosen["gain"] == 1.0
    assert gpu_choice.tiles_for(cells("gate")[0].shape, [chosen]) == {}


@pytest.mark.parametrize("kernel", gpu.KERNELS)
def test_pasted_lines_are_the_choice_and_nothing_else(kernel):
    """The lines at the top of their functions, in a copy of the tables: every entry, before and
    after."""
    entries = []
    for dtype, layout in itertools.product(
        ("float16", "float32"), (sites.NCHW, sites.CHANNELS_LAST)
    ):
        for cell in cells(kernel, dtype, layout):
            tile = Tile(32, 32, 8, 3)
            entries.append(sweep_entry(cell, 1.0, {tile: 0.5 if layout == sites.NCHW else 0.99}))
    chosen = gpu_choice.choose(entries)
    text = gpu_choice.paste(chosen, {"device": "NVIDIA H200", "commit": "0" * 40})
    assert "stays" in text and max(map(len, text.splitlines())) <= 100
    source = Path(configs.__file__).read_text()
    function = f"def _{kernel}({gpu_choice._SIGNATURE}) -> Tile:\n"
    assert source.count(function) == 1 and text.count(function) == 1
    lines = text.split(function)[1]
    module = types.ModuleType("pasted")
    sys.modules["pasted"] = module  # where its dataclasses look for their annotations
    try:
        exec(compile(source.replace(function, function + lines + "\n"), "pasted", "exec"),
             module.__dict__)  # fmt: skip
    finally:
        del sys.modules["pasted"]
    keys = {
        (key.itemsize, key.hidden, key.channels_last, key.precision)
        for key in (gpu_choice.key_of(gpu_choice.cell_of(e), e["precision"]) for e in entries)
    }
    others = {(8, 16, False, "ieee"), (2, 7, False, "ieee"), (4, 16, False, "ieee")}
    for key in keys | (
        others if gpu_sweep.hidden_width(cells(kernel)[0]) else {(8, 0, False, "ieee")}
    ):
        old, new = configs._TABLES[kernel](*key), module._TABLES[kernel](*key)
        changed = key in keys and not key[2]
        expected = (32, 32, 8, 3) if changed else dataclasses.astuple(old)[:4]
        assert dataclasses.astuple(new)[:4] == expected, key


def test_chosen_tiles_are_used_where_they_belong():
    entries = [sweep_entry(cell, 1.0, {GOOD: 0.5}) for cell in cells("pool_reduce")[:1]]
    chosen = gpu_choice.choose(entries)
    shape = cells("pool_reduce")[0].shape
    half = dataclasses.replace(shape, dtype="bfloat16", batch=32)  # the same entry of the table
    assert gpu_choice.tiles_for(shape, chosen) == {"pool_reduce": GOOD}
    assert gpu_choice.tiles_for(half, chosen) == {"pool_reduce": GOOD}
    for other in (
        dataclasses.replace(shape, dtype="float32"),
        dataclasses.replace(shape, layout=sites.NCHW),
        dataclasses.replace(shape, site=sites.RESNET50[1]),
    ):
        assert gpu_choice.tiles_for(other, chosen) == {}


def test_tuned_tiles_are_told_apart_from_the_shipped():
    ms = {"fused": 3.0, "fused_graphed": 2.0, "fused_tuned_graphed": 1.6, "eager": 6.0}
    told = peers.conclude({name: {"median_ms": t} for name, t in ms.items()}, 10**9, 4000.0)
    assert told["ratio_tuned"] == pytest.approx(1.25)
    assert told["ratio_plain"] == pytest.approx(2.0)
    assert told["ratio_best"] == pytest.approx(3.0)  # of the shipped tables
    assert told["share_of_copy"]["fused_tuned_graphed"] == pytest.approx(1 / 6.4)


def test_spills_are_read_off_the_binaries_of_one_launch():
    binary = types.SimpleNamespace
    function = types.SimpleNamespace(
        device_caches={0: ({"a": binary(n_spills=0), "b": binary(n_spills=6)}, {}, None)}
    )
    assert gpu_sweep.most_spills(function) == 6
    gpu_sweep.forget_binaries(function)
    assert gpu_sweep.most_spills(function) is None
    for kernel in gpu.KERNELS:
        assert gpu_sweep.jit_function(kernel).fn.__name__.endswith("_kernel")


def test_a_candidate_that_fails_spills_or_hangs_is_not_chosen(tmp_path, monkeypatch):
    cell = cells("gate")[0]
    tiles = gpu_sweep.candidates(cell)[:5]
    compiled = {
        (cell, tiles[0]): gpu_workers.Outcome("CompilationError: no"),
        (cell, tiles[1]): gpu_workers.Outcome(None, 12),
        (cell, tiles[2]): gpu_workers.Outcome(None, 0),
        (cell, tiles[3]): gpu_workers.Outcome(None, None),
    }

    def call(task, seconds):
        name, arguments = task
        if name.endswith("warm_up"):
            return gpu_workers.Outcome(None)
        if name.endswith("time_tiles"):
            rows = [{**dataclasses.asdict(t), "median_ms": 1.0 - n / 10}
                    for n, t in enumerate(arguments[1])]  # fmt: skip
            return gpu_workers.Outcome(None, rows)
        if arguments[1] == tiles[2]:
            return gpu_workers.Outcome("killed: it took more than 30 s")
        return gpu_workers.Outcome(None, {"ok": True, "relative_error": 0.0, "median_ms": 0.8})

    report = gpu_report.Report(tmp_path / "r.json", {})
    budget = gpu_report.Budget(100.0, ["sweep"], report)
    child = types.SimpleNamespace(call=call, close=lambda: None)
    settings = peers.Settings(torch.device("cpu"), None, 1, 1, 0.1, "eager", True)
    gpu_sweep.run_sweep([cell], compiled, settings, budget.section("sweep"), report, child, 5)
    (entry,) = report.data["sweep"]
    assert [part.get("error", "")[:6] for part in entry["tried"]] == ["Compil", "", "killed", ""]
    assert entry["tried"][1] == {**dataclasses.asdict(tiles[1]), "spills": 12, "ok": False}
    assert [gpu_sweep.tile_of(part) for part in entry["best"]] == [tiles[3]]
    assert entry["untried"] == 1 and "1 candidates" in report.data["left_out"][0]["what"]
