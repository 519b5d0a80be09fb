"""``python -m bam_kernels paper``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bam_kernels._version import __version__
from bam_kernels.cli import arguments
from bam_kernels.cli.output import error, print_table, progress

_TABLES = ("1a", "1c", "2", "3", "4", "7", "10")  # bam_kernels.paper.TABLES, which needs torch
_WIDTH = 150  # of the widest table where no terminal sets it


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command and its options."""
    paper = commands.add_parser(
        "paper",
        help="the paper's tables of parameters and GFLOPs beside those of the networks here",
        description="Build the networks of the paper's tables, count their parameters and their "
        "multiply-accumulates (convolutions and linear layers, not doubled), and print both beside "
        "what the paper prints. A figure is equal to the printed digit, off by so much, or not "
        "reproducible from the paper, with the reason below the table. Nothing is trained or "
        "computed: the networks have no memory of their own.",
        epilog="Exit status: 0: done; 2: bad arguments, or a package is missing.",
    )
    add = paper.add_argument
    which = paper.add_mutually_exclusive_group(required=True)
    which.add_argument("--table", nargs="+", choices=_TABLES, metavar="TABLE",
        help=f"of {', '.join(_TABLES)}")  # fmt: skip
    which.add_argument("--all", action="store_true", help="every one of them")
    add("--markdown", action="store_true", help="print Markdown")
    add("--json", type=Path, metavar="FILE", help="write every figure there, exactly")
    paper.set_defaults(run=_paper)


def _paper(args: argparse.Namespace) -> int:
    problem = arguments.unwritable("--json", args.json)
    if problem is not None:
        return error("paper", problem)

    from bam_kernels.paper import compare, formatting, rows

    tables = _TABLES if args.all else dict.fromkeys(args.table)
    try:
        with progress(sum(len(rows(table)) for table in tables)) as step:
            found = compare(tables, step)
    except ImportError as missing:
        return error("paper", str(missing))
    if args.markdown:
        print(formatting.document(found))
    else:
        for table, group in formatting.by_table(found):
            cells = [formatting.cells(each) for each in group]
            print_table(f"Table {table}", formatting.header(group), [cells], _WIDTH)
        for reason, names in formatting.reasons(found):
            print(f"not reproducible: {'; '.join(names)}: {reason}")
        print(*formatting.summary_lines(found), sep="\n")
    return 0 if args.json is None else _write(args.json, formatting.as_json(found))


def _write(path: Path, content: dict[str, object]) -> int:
    import torch

    from bam_kernels.files import replacing

    versions = {"bam_kernels": __version__, "torch": torch.__version__}
    try:
        with replacing(path) as part:
            part.write_text(json.dumps({**content, "versions": versions}, indent=1) + "\n")
    except OSError as problem:
        return error("paper", f"--json: {problem}")
    return 0
