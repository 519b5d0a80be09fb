"""Printed and counted, side by side."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable, Iterable, Sequence
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

from bam_kernels import models
from bam_kernels.paper.counting import Count, count, parameters
from bam_kernels.paper.printed import Row, rows
from bam_kernels.paper.reasons import GFLOPS, PARAMS, REASONS

EQUAL, OFF, NOT_REPRODUCIBLE = "equal", "off", "not reproducible"

NEAR = 0.03
"""GFLOPs of a relative difference up to this are counted as near."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A figure of a table.

    Attributes:
        printed: as in the paper.
        exact: ours, a whole number of parameters or multiply-accumulates.
        unit: how many of these are 1 in the table.
        reason: why it cannot be had from the paper, or None.
    """

    printed: str
    exact: int
    unit: int
    reason: str | None = None

    @property
    def ours(self) -> str:
        """Rounded as the printed one is."""
        digit = Decimal(self.printed)
        return str((Decimal(self.exact) / self.unit).quantize(digit, ROUND_HALF_UP))

    @property
    def relative(self) -> float:
        """(ours - printed) / printed, ours not rounded."""
        return self.exact / self.unit / float(self.printed) - 1

    @property
    def verdict(self) -> str:
        """`EQUAL` to the printed digit, `OFF`, or `NOT_REPRODUCIBLE`."""
        if self.ours == self.printed:
            return EQUAL
        return OFF if self.reason is None else NOT_REPRODUCIBLE

    @property
    def difference(self) -> str:
        """Ours less the printed one, both rounded, with its sign."""
        return f"{Decimal(self.ours) - Decimal(self.printed):+}"

    def __str__(self) -> str:
        if self.verdict == EQUAL:
            return EQUAL
        off = f"off by {self.difference}"
        return off if self.verdict == OFF else f"{NOT_REPRODUCIBLE}, {off}"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A row of a table with ours beside it; `gflops` is None where the table prints none."""

    row: Row
    params: Entry
    gflops: Entry | None

    @property
    def entries(self) -> list[Entry]:
        """Those that there are."""
        return [self.params] if self.gflops is None else [self.params, self.gflops]


def compare(
    tables: Iterable[str], tell: Callable[[str], None] = lambda text: None
) -> list[Comparison]:
    """Build and count every network of some tables, on PyTorch's meta device.

    Args:
        tables: of `bam_kernels.paper.TABLES`.
        tell: called with the name of each row before it is counted.

    Raises:
        ValueError: no such table.
        ImportError: a package is missing that one of the networks is built with.
    """
    wanted = [row for table in tables for row in rows(table)]
    needed = {package for row in wanted for package in models.get(row.model).requires}
    for package in sorted(needed):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"{package} is not installed; pip install 'bam_kernels[models]'")
    known: dict[str, Count] = {}
    found = []
    for row in wanted:
        tell(f"Table {row.table}: {row.name}")
        key = json.dumps([row.model, row.attention, row.options, row.gflops is None])
        if key not in known:
            known[key] = _count(row)
        found.append(_beside(row, known[key]))
    return found


def _count(row: Row) -> Count:
    model = models.create(row.model, attention=row.attention, device="meta", **row.options)
    if row.gflops is None:  # detectors, which take no single tensor, among them
        return Count(parameters(model), 0)
    return count(model, (1, 3, *models.get(row.model).input_size))


def _beside(row: Row, ours: Count) -> Comparison:
    def entry(column: str, printed: str, exact: int, unit: int) -> Entry:
        return Entry(printed, exact, unit, REASONS.get((row.table, row.name, column)))

    gflops = None if row.gflops is None else entry(GFLOPS, row.gflops, ours.macs, 10**9)
    return Comparison(row, entry(PARAMS, row.params, ours.parameters, 10**6), gflops)


def summary(found: Sequence[Comparison]) -> dict[str, Any]:
    """How many entries are equal to the printed digit, and how many GFLOPs near."""
    params = [each.params for each in found]
    gflops = [each.gflops for each in found if each.gflops is not None]

    def counts(entries: Sequence[Entry]) -> dict[str, int]:
        verdicts = [entry.verdict for entry in entries]
        return {
            "entries": len(entries),
            **{each: verdicts.count(each) for each in (EQUAL, OFF, NOT_REPRODUCIBLE)},
        }

    near = sum(abs(entry.relative) <= NEAR for entry in gflops)
    return {"params": counts(params), "gflops": {**counts(gflops), "within 3 %": near}}
