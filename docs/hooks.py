"""What mkdocs fills in when it builds: tables from results files, drawings, the commands' help.

A line ``<!-- fill: NAME -->`` in a page is replaced; an unknown name is an error.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
sys.path.insert(0, str(ROOT))

from bam_kernels.benchmarking import results  # noqa: E402


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def traffic() -> str:
    """traffic.json, a table a memory format."""
    found = results.load(RESULTS / "traffic.json")
    parts = []
    for layout, title in (("nchw", "NCHW"), ("channels_last", "channels_last")):
        parts += [f"{title}:", results.traffic_markdown(found.data["rows"], layout)]
    parts.append(f"{found.data['what']}; {results.provenance(found)}.")
    return "\n\n".join(parts)


def cpu() -> str:
    """Each results file of the CPU benchmark: machine, versions, and its table."""
    parts = []
    for path in sorted(RESULTS.glob("cpu-*.json")):
        found = results.load(path)
        parts += [f"`{path.name}`: {results.provenance(found)}.", results.table(found)]
    return "\n\n".join(parts)


def gpu() -> str:
    """Each results file of the GPU run: GPU, versions, and its table."""
    parts = []
    for path in sorted(RESULTS.glob("gpu-*.json")):
        found = results.load(path)
        parts += [f"`{path.name}`: {results.provenance(found)}.", results.table(found)]
    return "\n\n".join(parts)


def predictions() -> str:
    """The cost model's launches, bytes and times at ResNet-50's sites."""
    from bam_kernels.benchmarking import cost
    from bam_kernels.benchmarking.sites import INFERENCE, RESNET50, TRAINING

    names = [machine.name for machine in cost.MACHINES]
    header = ["x", "mode", "launches", "MB", "eager's launches", "MB", *names]
    lines = [header, ["---"] * len(header)]
    for mode in (INFERENCE, TRAINING):
        for site in RESNET50:
            size = (32, site.channels, site.height, site.width)
            case = cost.case_of(size, "float16", "channels_last", mode)
            fused, eager = (cost.cost(case, kind) for kind in cost.KINDS)
            cells = ["x".join(map(str, size)), mode]
            for each in (fused, eager):
                cells += [str(each.launches), f"{each.moved_bytes / 1e6:.0f}"]
            for machine in cost.MACHINES:
                us, peer = fused.predicted_us(machine), eager.predicted_us(machine)
                cells.append(f"{us:.0f} ({peer / us:.1f})")
            lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def convolutions() -> str:
    """Where our dilated convolutions are predicted to be the better choice, as shares of a peak."""
    from bam_kernels.benchmarking import convolutions, cost
    from bam_kernels.benchmarking.sites import INFERENCE, RESNET50, TRAINING, Site

    machines = [machine for machine in cost.MACHINES if machine.name in ("H200", "A100", "L4")]
    kinds = [(p, m) for p in ("float16", "tf32", "ieee") for m in machines]
    header = ["x", "width inside", "mode", *(f"{p} {m.name}" for p, m in kinds)]
    lines = [header, ["---"] * len(header)]
    for site in (*RESNET50, Site("layer4", 2048, 7, 7)):
        for batch, mode in ((1, INFERENCE), (32, INFERENCE), (256, INFERENCE), (256, TRAINING)):
            size = (batch, site.channels, site.height, site.width)
            cells = ["x".join(map(str, size)), str(site.channels // 16), mode]
            for precision, machine in kinds:
                dtype = "float16" if precision == "float16" else "float32"
                case = cost.case_of(size, dtype, "channels_last", mode)
                cells.append(f"{convolutions.break_even(case, machine, precision):.2f}")
            lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def tolerances() -> str:
    """The table of tests/tolerances.py."""
    found = _load(ROOT / "tests/tolerances.py")
    lines = ["| dtype | largest relative error against float64 |", "|---|---|"]
    lines += [f"| {str(t).removeprefix('torch.')} | {v:.0e} |" for t, v in found.PARITY.items()]
    return "\n".join(lines) + (
        f"\n\nBeside eager's own error in the same dtype: at most {found.PEER} times, where there "
        f"are {found.PEER_ELEMENTS} elements or more."
    )


def commands() -> str:
    """The help of every command, as argparse prints it."""
    from bam_kernels import cli

    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "88"
    try:
        parser = cli._parser()
        parts = [f"```text\n{parser.format_help().strip()}\n```"]
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, each in action.choices.items():
                    parts.append(f"## {name}\n\n```text\n{each.format_help().strip()}\n```")
                    parts += [
                        f"### {name} {inner}\n\n```text\n{sub.format_help().strip()}\n```"
                        for nested in each._actions
                        if isinstance(nested, argparse._SubParsersAction)
                        for inner, sub in nested.choices.items()
                    ]
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
    return "\n\n".join(parts)


def public() -> str:
    """A line for mkdocstrings a name of ``bam_kernels.__all__``, but its modules."""
    import bam_kernels

    names = [n for n in bam_kernels.__all__ if callable(getattr(bam_kernels, n))]
    return "\n\n".join(f"::: bam_kernels.{name}" for name in names)


def paper() -> str:
    """The paper's tables of parameters and GFLOPs, each figure beside ours."""
    from bam_kernels import paper
    from bam_kernels.paper import formatting

    return formatting.document(paper.compare(paper.TABLES))


def recipes() -> str:
    """The paper's two recipes, value by value, with their sources."""
    from bam_kernels.recipes import RECIPES

    parts = []
    for name in ("cifar100", "imagenet"):
        parts += [f"**`{name}`**", "| | value | source |\n|---|---|---|"]
        parts[-1] += "".join(f"\n| {' | '.join(row)} |" for row in RECIPES[name].rows())
    return "\n\n".join(parts)


def study() -> str:
    """The study's outcome, and its plot."""
    from bam_kernels.recipes import study_report

    found = json.loads((RESULTS / "study-textures.json").read_text(encoding="utf-8"))
    return "\n\n".join(
        [
            study_report.markdown(found),
            "![Each seed's test error, the means, and the differences](study-textures.png)",
            f"`study-textures.json`: {study_report.provenance(found)}.",
        ]
    )


def attention_cost() -> str:
    """What attention costs a network, fused and eager, as measured."""
    name = "compare-cifar-resnet50.json"
    found = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    header = ["attention", "kernels", "inference, ms", "x", "training step, ms", "x",
              "peak MiB, inference", "peak MiB, training"]  # fmt: skip
    lines = [header, ["---", "---", *["---:"] * 6]]
    for row in found["rows"]:
        cells = [row["attention"], row["kind"]]
        for mode in ("inference", "training"):
            cells.append(f"{row[mode]['median_ms']:.1f}")
            cells.append(f"{row['ratios'][f'{mode} median_ms']:.2f}")
        cells += [f"{row[m]['peak_bytes'] / 2**20:.0f}" for m in ("inference", "training")]
        lines.append(cells)
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    versions = f"torch {found['versions']['torch']}, commit {found['commit'][:12]}"
    return (
        f"{table}\n\n{found['what']}; x: to the baseline. `{name}`: {found['machine']['cpu']}, "
        f"{found['machine']['threads']} threads, {found['backend']} kernels, {versions}."
    )


def _drawing(name: str) -> Callable[[], str]:
    return lambda: _load(ROOT / "docs/drawings.py").svg(name)


FILLS: dict[str, Callable[[], str]] = {
    "traffic": traffic,
    "cpu": cpu,
    "gpu": gpu,
    "predictions": predictions,
    "convolutions": convolutions,
    "tolerances": tolerances,
    "commands": commands,
    "paper": paper,
    "public": public,
    "recipes": recipes,
    "study": study,
    "attention_cost": attention_cost,
    "forward": _drawing("forward"),
    "backward": _drawing("backward"),
}


def fill(markdown: str) -> str:
    """The page with its marks replaced."""
    return re.sub(r"^<!-- fill: (\S+) -->$", lambda m: FILLS[m[1]](), markdown, flags=re.M)


def on_page_markdown(markdown: str, **_: Any) -> str:
    return fill(markdown)
