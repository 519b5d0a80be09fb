"""``python -m bam_kernels results``."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from bam_kernels.cli.output import FAILED, error


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command and its options."""
    results = commands.add_parser(
        "results",
        help="turn results files into Markdown tables, plots, and the README's tables",
        description="Read the JSON of the CPU benchmark or of bench, of the GPU run and of the "
        "traffic meter, each known by its content, and print Markdown tables. A document holds a "
        "table between the lines <!-- results: NAME --> and <!-- end -->, where NAME is cpu, gpu "
        "or traffic, or a file's name without its suffix.",
        epilog="Exit status: 0: done; 1: --check finds a document out of date; 2: bad arguments or "
        "files, and then nothing is written.",
    )
    add = results.add_argument
    add("files", nargs="+", type=Path, metavar="FILE", help="a results file, JSON")
    add("--plot", type=Path, metavar="DIR", help="draw the plots, PNG, into this folder as well")
    document = results.add_mutually_exclusive_group()
    document.add_argument("--update", type=Path, metavar="README.md",
        help="put the tables in their places in a document, in place of printing them")  # fmt: skip
    document.add_argument("--check", type=Path, metavar="README.md",
        help="only see whether a document has these very tables")  # fmt: skip
    results.set_defaults(run=_results)


def _results(args: argparse.Namespace) -> int:
    from bam_kernels.benchmarking import results

    document = args.update or args.check
    try:
        files = [results.load(path) for path in args.files]
        told = [(results.provenance(each), results.table(each)) for each in files]
        old, new = ("", "") if document is None else results.filled(document, files)
    except results.ResultsError as problem:
        return error("results", str(problem))
    try:
        if args.plot is not None:
            status = _plot(files, args.plot)
            if status:
                return status
        if args.update is not None and new != old:
            results.replace(args.update, new)
    except OSError as problem:
        name = "--plot" if args.update is None else "--plot, --update"
        return error("results", f"{name}: expected a place to write to, got {problem}")
    if document is None:
        for path, (line, table) in zip(args.files, told, strict=True):
            print(f"{path.name}: {line}\n\n{table}\n")
        return 0
    if args.check is not None and new != old:
        print(
            f"bam_kernels results: {document} is out of date; run with --update {document}",
            file=sys.stderr,
        )
        return FAILED
    print(f"{document}: {'up to date' if new == old else 'updated'}")
    return 0


def _plot(files: list, folder: Path) -> int:
    from bam_kernels.benchmarking import results_figure

    stems = [each.path.stem for each in files]
    twice = next((stem for stem in stems if stems.count(stem) > 1), None)
    if twice is not None:
        return error("results", f"--plot: expected files of different names, got {twice} twice")
    if importlib.util.find_spec("matplotlib") is None:
        return error("results", "--plot: expected matplotlib, got none; pip install matplotlib")
    folder.mkdir(parents=True, exist_ok=True)
    for each in files:
        for path in results_figure.draw(each, folder):
            print(f"... {path}", file=sys.stderr)
    return 0
