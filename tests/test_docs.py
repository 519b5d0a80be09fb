"""The site's code runs, its commands and targets exist, its figures are the results files'."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
NOT_RUN = [
    ("benchmarks.md", "bash"),  # a minute of counting
    ("benchmarks.md", "bash"),  # minutes of timing; tests/test_benchmark_suite.py has it on toys
    ("benchmarks.md", "bash"),  # takes a GPU
    ("contributing.md", "bash"),  # the whole test suite; the targets are looked up
    ("training.md", "python"),  # a compilation; tests/test_compile.py has it
]
"""Blocks that are marked `notest`: each has its reason here."""


def _load(name: str):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks, drawings = _load("hooks"), _load("drawings")


def _blocks(page: Path) -> list[tuple[str, str, str]]:
    """(language, mark, code) of each fenced block."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)[ ]*(\w*)\n(.*?)^```$", text, flags=re.S | re.M)
    assert text.count("```") == 2 * len(found), f"{page.name}: a fence that is not understood"
    return found


def test_blocks_that_do_not_run_are_listed():
    marks = [(p.name, *b[:2]) for p in PAGES for b in _blocks(p)]
    assert {mark for _, _, mark in marks} <= {"", "notest", "fresh"}
    assert {language for _, language, _ in marks} <= {"python", "bash"}
    assert [(p, language) for p, language, mark in marks if mark == "notest"] == NOT_RUN


@pytest.mark.parametrize(
    "page", [p for p in PAGES if "```python" in p.read_text()], ids=lambda p: p.stem
)
def test_python_blocks_run(page, large_tiles, seed):
    namespace: dict[str, object] = {}
    for language, mark, code in _blocks(page):
        if language != "python" or mark == "notest":
            continue
        if mark == "fresh":
            subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
        else:
            exec(compile(code, page.name, "exec"), namespace)


def test_commands_exist():
    from bam_kernels import cli

    lines = [s for p in PAGES for lang, _, b in _blocks(p) if lang == "bash" for s in b.split("\n")]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    seen = set()
    for words in map(shlex.split, filter(None, lines)):
        if words[:3] == ["python", "-m", "bam_kernels"]:
            cli._parser().parse_args(words[3:])
        elif words[:3] == ["python", "-m", "pytest"]:
            assert (ROOT / words[3]).is_dir()
        elif words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]) is not None
            subprocess.run([sys.executable, *words[1:]], cwd=ROOT, check=True, capture_output=True)
        elif words[0] == "torchrun":
            assert words[1:5] == ["--nproc-per-node", "8", "-m", "bam_kernels"]
            cli._parser().parse_args(words[5:])
        elif words[0] == "make":
            assert words[1] in targets
        elif words[0] in ("python", "bash"):
            assert (ROOT / words[1]).is_file()
        else:
            assert words[:2] == ["pip", "install"], words
        seen.add(words[0])
    assert seen == {"python", "make", "bash", "pip", "torchrun"}
    mentioned = {m for p in PAGES for m in re.findall(r"`make ([\w-]+)`", p.read_text())}
    assert "docs" in mentioned and mentioned <= targets


def test_figures_are_the_results_files():
    """Every table is filled in; the drawings' passes are those that were counted."""
    assert all(f"<!-- fill: {name} -->" in "".join(p.read_text() for p in PAGES)
               for name in hooks.FILLS)  # fmt: skip
    page = hooks.fill((DOCS / "benchmarks.md").read_text())
    assert "<!-- fill" not in page
    rows = json.loads((ROOT / "benchmarks/results/traffic.json").read_text())["rows"]
    for row in rows:
        shape = "x".join(map(str, row["shape"]))
        passes = [f"{row['passes'][k]:.1f}" for k in ("forward", "backward", "inference")]
        cells = [shape, row["preset"], row["module"], *passes]
        line = "| " + " | ".join(cells) + " |"
        assert line in page.split("channels_last:\n")[row["layout"] == "channels_last"]
        if row["preset"] == "paper":
            side = 0 if row["module"] == "eager" else 1
            for name, drawing in drawings.DRAWINGS.items():
                assert drawings.passes(drawing[side]) == row["passes"][name]
            assert row["passes"]["inference"] == row["passes"]["forward"]
    times = json.loads((ROOT / "benchmarks/results/cpu-xeon-2-threads.json").read_text())["rows"]
    times = [row for row in times if row["preset"] == "paper"]
    assert len(times) > 2
    for row in times:
        ours = [
            f"{row['sides'][f'ours {key}']['median_ms']:.2f}" for key in ("nchw", "channels_last")
        ]
        cells = [row["mode"], row["dtype"], row["site"], *ours]
        assert "| " + " | ".join(cells) + " |" in page
    assert not re.search(r"\d+\.\d+ ms|\d+x faster", "".join(p.read_text() for p in PAGES))


def test_every_command_has_its_help():
    from bam_kernels import cli

    text = hooks.commands()
    for module in cli.COMMANDS:
        assert f"\n## {module.__name__.rpartition('.')[2]}\n" in text


@pytest.mark.once
def test_the_site_builds_strictly(tmp_path):
    pytest.importorskip("mkdocs", reason="pip install '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stdout + run.stderr
    reference = (tmp_path / "api.html").read_text()
    for name in (
        "BAM",
        "SqueezeExcite",
        "insert_bam",
        "functional.gate",
        "testing.aot.compile_only",
    ):
        assert f'id="bam_kernels.{name}"' in reference
    loaded = r"""<(?:script|img|iframe)[^>]*\ssrc=["']?(?:https?:)?//|<link[^>]*rel=["']?(?:stylesheet|preload|preconnect)["']?[^>]*//"""  # noqa: E501
    for page in tmp_path.rglob("*.html"):
        assert not re.search(loaded, page.read_text()), f"{page.name} fetches from the net"
