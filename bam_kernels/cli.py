"""The command line: ``python -m bam_kernels`` or ``bam-kernels``.

torch and Triton are imported inside of the commands only: what Triton is to do must be set in the
environment before it is imported.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bam_kernels._version import __version__

if TYPE_CHECKING:
    from bam_kernels.demo import Part, Report

PARITY_FAILED = 1
USAGE_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status.

    0: done. 1: the fused kernels and PyTorch disagree. 2: bad arguments, or something is missing.
    """
    args = _parser().parse_args(argv)
    return args.run(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bam_kernels",
        description="Fused kernels for the Bottleneck Attention Module (BAM).",
    )
    parser.add_argument("--version", action="version", version=f"bam_kernels {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="compare fused BAMs with plain PyTorch in a ResNet-50, and draw their attention",
        description="Run a training step and an inference of a ResNet-50 with BAM, on the fused "
        "kernels and in plain PyTorch; compare both with float64; draw the attention maps. Without "
        "a GPU the C++ kernels run, which a C++ compiler builds the first time; where there is "
        "none, Triton's in its interpreter (a minute or two).",
        epilog="Exit status: 0 where the two agree, 1 where they do not, 2 for bad arguments or "
        "missing packages.",
    )
    add = demo.add_argument
    add(
        "image",
        nargs="?",
        type=Path,
        metavar="IMAGE",
        help="a photograph (default: one that comes with scikit-image or matplotlib)",
    )
    add(
        "--output",
        type=Path,
        metavar="DIR",
        default=Path("demo_output"),
        help="the folder for attention.png and results.json (default: %(default)s)",
    )
    add(
        "--pretrained",
        action="store_true",
        help="ImageNet weights from torchvision, which downloads them, in place of random ones",
    )
    add(
        "--device",
        default="auto",
        help="auto, cpu, cuda, cuda:1, xpu, ...; auto, the default, takes a GPU where there is one",
    )
    add(
        "--backend",
        choices=("auto", "triton", "cpp"),
        default="auto",
        help="the kernels: triton, on a CPU in its interpreter; cpp, on a CPU; auto, the default, "
        "takes triton on a GPU and cpp on a CPU",
    )
    add(
        "--preset",
        choices=("paper", "official"),
        default="paper",
        help="BAM as the paper prints it (Eq. 1-4), or as the authors' code has it "
        "(default: %(default)s)",
    )
    add(
        "--size",
        type=int,
        default=224,
        metavar="PIXELS",
        help="the views' sides (default: %(default)s)",
    )
    add("--batch", type=int, default=4, metavar="N", help="how many views (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the weights and the views (default: %(default)s)")
    demo.set_defaults(run=_demo)
    return parser


# --- demo -------------------------------------------------------------------------------------


def _demo(args: argparse.Namespace) -> int:
    from bam_kernels import demo

    options = demo.Options(**{k: v for k, v in vars(args).items() if k != "run"})
    try:
        device, backend = demo.resolve(options, _say)
        if backend == "triton" and device.type == "cpu" and "TRITON_INTERPRET" not in os.environ:
            os.environ["TRITON_INTERPRET"] = "1"
            if "triton" in sys.modules:  # Triton read the variable when it was imported
                return _again(args)
        with _progress(demo.STEPS) as step:
            report = demo.run(options, step)
    except demo.DemoError as error:
        return _error(str(error))
    except KeyboardInterrupt:
        return 130
    _print_report(report)
    if report.failures:
        for part, found in report.failures:
            print(
                f"bam_kernels demo: parity failed: {part.name}, {found.what}: error "
                f"{found.fused:.1e}, bar {found.bar:.1e}",
                file=sys.stderr,
            )
        return PARITY_FAILED
    return 0


def _say(text: str) -> None:
    print(f"... {text}", file=sys.stderr, flush=True)


def _error(message: str) -> int:
    print(f"bam_kernels demo: error: {' '.join(message.split())}", file=sys.stderr)
    return USAGE_ERROR


def _again(args: argparse.Namespace) -> int:
    """The same command in a fresh process, which sees the environment as it is now."""
    words = []
    for name in ("output", "device", "backend", "preset", "size", "batch", "seed"):
        words += [f"--{name}={getattr(args, name)}"]
    words += ["--pretrained"] if args.pretrained else []
    words += [] if args.image is None else ["--", str(args.image)]
    command = [sys.executable, "-m", "bam_kernels", "demo", *words]
    try:
        return subprocess.call(command)
    except KeyboardInterrupt:
        return 130


# --- what is printed --------------------------------------------------------------------------


@contextlib.contextmanager
def _progress(steps: int) -> Iterator[Callable[[str], None]]:
    """Tells on stderr what is being done: a bar on a terminal with rich, else a line a step."""
    if importlib.util.find_spec("rich") is None or not sys.stderr.isatty():
        yield _say
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=steps, completed=-1)
        yield lambda text: progress.update(task, advance=1, description=text)


def _print_report(report: Report) -> None:
    clock = "interpreted, not a speed" if report.interpreted else "medians"
    print(f"photograph: {report.source}")
    print(f"device: {report.device}")
    print()
    _print_table(
        "Parity: relative error against float64",
        ("", "", "fused", "PyTorch", "bar", ""),
        [_parity_rows(part) for part in report.parts],
    )
    _print_table(
        f"Cost of one training step (fused times: {clock})",
        ("", "backend", "", "forward ms", "backward ms", "kept MiB", "of it the input"),
        [_cost_rows(part) for part in report.parts],
    )
    print("kept: bytes that autograd holds between forward and backward, without parameters")
    print(f"numbers: {report.results}")
    print(f"picture: {report.picture}")


def _parity_rows(part: Part) -> list[list[str]]:
    titles = [part.name, f"{list(part.shape)}"]
    titles += [""] * (len(part.comparisons) - len(titles))
    return [
        [
            title,
            found.what,
            f"{found.fused:.1e}",
            f"{found.pytorch:.1e}",
            f"{found.bar:.1e}",
            "ok" if found.passed else "FAILED",
        ]
        for title, found in zip(titles, part.comparisons, strict=True)
    ]


def _cost_rows(part: Part) -> list[list[str]]:
    mib = 2.0**20
    rows = [(part.name, part.backend, "fused", part.fused), ("", "", "PyTorch", part.pytorch)]
    return [
        [
            *words,
            f"{cost.forward * 1e3:.1f}",
            f"{cost.backward * 1e3:.1f}",
            f"{cost.kept / mib:.2f}",
            f"{cost.kept_input / mib:.2f}",
        ]
        for *words, cost in rows
    ]


def _print_table(title: str, header: Sequence[str], groups: Sequence[list[list[str]]]) -> None:
    """A table with a rule between the groups; with rich, drawn, else aligned text."""
    numeric = [
        all(_is_number(row[i]) for rows in groups for row in rows) for i in range(len(header))
    ]
    if importlib.util.find_spec("rich") is None:
        _print_plain_table(title, header, groups, numeric)
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a file or a pipe has no width to fold cells to
    table = Table(title=title, title_justify="left", title_style="bold")
    for name, right in zip(header, numeric, strict=True):
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for rows in groups:
        for row in rows:
            table.add_row(
                *(f"[red]{cell}[/red]" if cell == "FAILED" else _escape(cell) for cell in row)
            )
        table.add_section()
    console.print(table)
    print()


def _escape(cell: str) -> str:
    from rich.markup import escape

    return escape(cell)


def _print_plain_table(
    title: str,
    header: Sequence[str],
    groups: Sequence[list[list[str]]],
    numeric: Sequence[bool],
) -> None:
    everything = [list(header), *(row for rows in groups for row in rows)]
    widths = [max(len(row[i]) for row in everything) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = zip(row, widths, numeric, strict=True)
        return "  ".join(c.rjust(w) if right else c.ljust(w) for c, w, right in cells).rstrip()

    print(title)
    print(line(header))
    for rows in groups:
        print("  ".join("-" * width for width in widths))
        for row in rows:
            print(line(row))
    print()


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
