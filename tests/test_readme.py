"""The README's Python blocks run, in order; its table is that of the results file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from bam_kernels.dispatch import why_not

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run(large_tiles, seed):
    pytest.importorskip("torchvision", reason="the README inserts BAM in a torchvision ResNet-50")
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len(blocks) >= 3
    namespace: dict[str, object] = {}
    for block in blocks:
        if 'use_backend("cpp")' in block and why_not("cpp", "cpu") is not None:
            continue  # no compiler here; that it raises then has tests of its own
        # The batch of the first example is for a GPU; one sample less to interpret here.
        exec(compile(block.replace("randn(8, 256", "randn(2, 256"), "README.md", "exec"), namespace)
    x, y = namespace["x"], namespace["y"]
    assert isinstance(y, torch.Tensor) and y.shape == x.shape and not torch.equal(x, y)
    assert namespace["maps"]["layer2.bam"].spatial_map.shape == (1, 28, 28)


def test_the_table_of_times_is_the_results_file():
    pytest.importorskip("rich")
    from bam_kernels.benchmarking.cpu import report

    data = json.loads((ROOT / "benchmarks/results/cpu-xeon-2-threads.json").read_text())
    told = report.markdown(data) + "\n"
    assert told.count("\n") == 2 + sum(row["preset"] == "paper" for row in data["rows"]) > 2
    assert told in README


def test_the_table_is_the_results_file():
    rows = json.loads((ROOT / "benchmarks/results/traffic.json").read_text())["rows"]
    rows = [row for row in rows if row["layout"] == "nchw"]
    assert len(rows) == 12
    for row in rows:
        passes, launches = row["passes"], row["launches"]
        cells = [
            "x".join(map(str, row["shape"])), row["preset"], row["module"],
            f"{passes['forward']:.1f}", f"{passes['backward']:.1f}", f"{passes['inference']:.1f}",
            str(launches["forward"]), str(launches["backward"]), str(launches["inference"]),
            f"{row['kept_for_backward']:.2f} x", f"{row['peak']:.2f} x",
        ]  # fmt: skip
        assert "| " + " | ".join(cells) + " |" in README
