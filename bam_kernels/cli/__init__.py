"""The command line: ``python -m bam_kernels`` or ``bam-kernels``, a command a file.

torch and Triton are imported inside of the commands only: what Triton is to do must be set in the
environment before it is imported.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from bam_kernels._version import __version__
from bam_kernels.cli import (
    analyze,
    bench,
    compare,
    convert,
    demo,
    doctor,
    evaluate,
    paper,
    report,
    results,
    study,
    train,
)
from bam_kernels.cli.output import FAILED, USAGE_ERROR

__all__ = ["FAILED", "USAGE_ERROR", "main"]

COMMANDS = (
    demo, train, evaluate, study, analyze, paper, compare, bench, report, doctor, results, convert,
)  # fmt: skip
"""Modules with ``add_parser(commands)``, which sets ``run(args) -> exit status``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status.

    0: done. 1: what the command checks does not hold. 2: bad arguments, or something is missing;
    then one line on stderr says so. 130: interrupted.
    """
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        return 130


class _Parser(argparse.ArgumentParser):
    """Bad arguments are one line, without the usage: --help has that."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"{self.prog.removeprefix('python -m ')}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m bam_kernels",
        description="Fused kernels for the Bottleneck Attention Module (BAM).",
    )
    parser.add_argument("--version", action="version", version=f"bam_kernels {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser
