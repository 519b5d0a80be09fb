"""What all commands share: progress and errors on stderr, tables on stdout."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

FAILED = 1
"""Exit status where what a command checks does not hold."""

USAGE_ERROR = 2
"""Exit status of bad arguments, and where something is missing."""


def say(text: str) -> None:
    """A line of progress."""
    print(f"... {text}", file=sys.stderr, flush=True)


def error(command: str, message: str) -> int:
    """One line on stderr; returns `USAGE_ERROR`."""
    print(f"bam_kernels {command}: error: {' '.join(message.split())}", file=sys.stderr)
    return USAGE_ERROR


@contextlib.contextmanager
def progress(steps: int) -> Iterator[Callable[[str], None]]:
    """Tells on stderr what is being done: a bar on a terminal with rich, else a line a step."""
    if importlib.util.find_spec("rich") is None or not sys.stderr.isatty():
        yield say
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=steps, completed=-1)
        yield lambda text: bar.update(task, advance=1, description=text)


def tracked(items: Collection[T], description: str) -> Iterator[T]:
    """The items one by one, with a bar on stderr where that is a terminal and rich is there."""
    if importlib.util.find_spec("rich") is None or not sys.stderr.isatty():
        say(description)
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(items, description, console=Console(stderr=True), transient=True)


def print_table(
    title: str, header: Sequence[str], groups: Sequence[list[list[str]]], width: int = 120
) -> None:
    """A table with a rule between the groups; with rich, drawn, else aligned text.

    `width` is that of a file or a pipe, which have none to fold cells to.
    """
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
        console = Console(width=width)
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
