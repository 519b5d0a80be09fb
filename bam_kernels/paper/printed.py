"""What the paper prints, row by row, and which network of `bam_kernels.models` each row is."""

from __future__ import annotations

import csv
import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

from bam_kernels import models

TABLES = ("1a", "1c", "2", "3", "4", "7", "10")
"""The tables with a column of parameters; all but 1a, 1c and 7 have one of GFLOPs."""

_DATASETS = {"4": "imagenet", "7": "voc2007"}  # the others: cifar100
_TITLES = {"ResNeXt 8x64d": "ResNeXt29 8x64d"}  # Table 1c's name of it
_ABLATED = "cifar_resnext29_8x64d"  # Table 1a: by its parameters, though the text says ResNet50


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        table: one of `TABLES`.
        name: as printed.
        params: millions, as printed.
        gflops: as printed, or None where the table has no such column.
        model: what `bam_kernels.models.create` makes, with the two that follow.
        attention: its argument.
        options: of BAM.
    """

    table: str
    name: str
    params: str
    gflops: str | None
    model: str
    attention: str | None
    options: dict[str, Any]


def rows(table: str) -> list[Row]:
    """The rows of a table, in the paper's order.

    Raises:
        ValueError: it is none of `TABLES`.
    """
    if table not in TABLES:
        raise ValueError(f"table: expected one of {', '.join(TABLES)}, got {table!r}")
    return [row for row in _all() if row.table == table]


@functools.cache
def _all() -> tuple[Row, ...]:
    with (Path(__file__).parent / "printed.csv").open(newline="", encoding="utf-8") as file:
        return tuple(
            Row(
                each["table"],
                each["row"],
                each["params_M"],
                each["gflops"] or None,
                *_network(each["table"], each["row"]),
            )
            for each in csv.DictReader(file)
        )


def _network(table: str, name: str) -> tuple[str, str | None, dict[str, Any]]:
    if table == "1a":
        values = {key: int(value) for key, value in re.findall(r"\b([dr])=(\d+)", name)}
        if not values:
            return _ABLATED, None, {}
        return _ABLATED, "bam", {"dilation": values["d"], "reduction": values["r"]}
    base, _, added = name.partition(" + ")
    dataset = _DATASETS.get(table, "cifar100")
    title = _TITLES.get(base, base)
    (model,) = (
        each
        for each in models.names()
        if (models.get(each).title, models.get(each).dataset) == (title, dataset)
    )
    return model, "block" if added.endswith("Block") else added.lower() or None, {}
