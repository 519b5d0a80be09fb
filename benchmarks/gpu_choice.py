"""What the sweep found, as a launch table: which tile for which entry, and the lines to paste.

The tables of bam_kernels/backends/triton/configs.py know an element's size, the hidden width, the
layout and the precision of fp32 dots, and not the site: where several sites share an entry, the
tile that is chosen is the best of those that were timed at all of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from gpu_kernels import REDUCTION
from gpu_sweep import Cell, cut_down, hidden_width, shipped, tile_of

from bam_kernels.backends.triton import configs
from bam_kernels.backends.triton.configs import Tile
from bam_kernels.backends.triton.launch import conv_precision
from bam_kernels.benchmarking.sites import CHANNELS_LAST, Shape, Site

# A tile takes the place of the table's if it is faster by this much, and at no site slower than
# that: two measurements of one tile differ by a percent or so.
LEAST_GAIN, MOST_LOSS = 0.03, 0.02

_SIGNATURE = "itemsize: int, hidden: int, channels_last: bool, precision: str"


@dataclasses.dataclass(frozen=True)
class Key:
    """An entry of the launch tables; `hidden` is 0 where the kernel has no 1x1 reduction."""

    kernel: str
    itemsize: int
    hidden: int
    channels_last: bool
    precision: str

    @property
    def table_tile(self) -> Tile:
        """The shipped entry, before a map cuts it down."""
        return configs._TABLES[self.kernel](
            self.itemsize, self.hidden, self.channels_last, self.precision
        )

    @property
    def condition(self) -> str:
        """The entry as a condition in its table's function."""
        parts = [f"itemsize == {self.itemsize}"]
        if self.hidden:
            parts.append(f"hidden == {self.hidden}")
        parts.append("channels_last" if self.channels_last else "not channels_last")
        if self.hidden and self.itemsize == 4:
            parts.append(f'precision == "{self.precision}"')
        return " and ".join(parts)


def cell_of(entry: Mapping[str, Any]) -> Cell:
    """The cell that an entry of the report's "sweep" is about."""
    site = Site(entry["site"], entry["channels"], entry["height"], entry["width"])
    return Cell(entry["kernel"], Shape(site, entry["batch"], entry["dtype"], entry["layout"]))


def key_of(cell: Cell, precision: str) -> Key:
    """The launch tables' entry for a cell."""
    layout = cell.shape.layout == CHANNELS_LAST
    itemsize = cell.shape.torch_dtype.itemsize
    return Key(cell.kernel, itemsize, hidden_width(cell), layout, precision)


def _measured(entry: Mapping[str, Any]) -> dict[Tile, float]:
    """By tile, as the map cuts it down, its median in ms; the longer measurement of two."""
    cell = cell_of(entry)
    found = {}
    for part in (*entry["tried"], *entry["best"]):
        if "median_ms" in part and part.get("ok", True):
            found[cut_down(cell, tile_of(part))] = part["median_ms"]
    found[shipped(cell)] = entry["shipped"]["median_ms"]
    return found


def choose(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The best tile of every entry of the tables that the sweep looked at.

    Args:
        entries: the report's "sweep".

    Returns:
        A JSON object for each: the `Key`'s fields, ``old`` and ``new`` (the same where the table's
        is kept), ``gain`` (the geometric mean over the sites of old over new time) and ``sites``
        with both times in ms.
    """
    groups: dict[Key, list[Mapping[str, Any]]] = {}
    for entry in entries:
        if "median_ms" in entry.get("shipped", {}):
            groups.setdefault(key_of(cell_of(entry), entry["precision"]), []).append(entry)
    return [_choose(key, group) for key, group in groups.items()]


def _choose(key: Key, group: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    cells = [cell_of(entry) for entry in group]
    measured = [_measured(entry) for entry in group]
    old = [entry["shipped"]["median_ms"] for entry in group]

    def times(tile: Tile) -> list[float] | None:
        found = [each.get(cut_down(cell, tile)) for cell, each in zip(cells, measured, strict=True)]
        return None if None in found else [ms for ms in found if ms is not None]

    best, best_gain = key.table_tile, 1.0
    for tile in sorted({tile for each in measured for tile in each}, key=str):
        new = times(tile)
        if new is None:
            continue
        gains = [a / b for a, b in zip(old, new, strict=True)]
        gain = math.exp(math.fsum(map(math.log, gains)) / len(gains))
        if gain > max(best_gain, 1 + LEAST_GAIN) and min(gains) >= 1 - MOST_LOSS:
            best, best_gain = tile, gain
    new = old if best == key.table_tile else times(best)
    return {
        **dataclasses.asdict(key),
        "old": dataclasses.asdict(key.table_tile),
        "new": dataclasses.asdict(best),
        "gain": best_gain,
        "tried": sum(len(each) - 1 for each in measured),
        "sites": [
            {"site": str(cell.shape.site), "batch": cell.shape.batch, "old_ms": a, "new_ms": b}
            for cell, a, b in zip(cells, old, new, strict=True)
        ],
    }


def tiles_for(shape: Shape, table: Sequence[Mapping[str, Any]]) -> dict[str, Tile]:
    """By kernel, the chosen tiles for a shape where they are not the shipped ones.

    Args:
        shape: a feature map of a module with the default reduction.
        table: what `choose` returned.
    """
    hidden = max(1, shape.site.channels // REDUCTION)
    found = {}
    for entry in table:
        asked = (
            shape.torch_dtype.itemsize,
            hidden if entry["hidden"] else 0,
            shape.layout == CHANNELS_LAST,
            conv_precision(shape.torch_dtype) if entry["hidden"] else "ieee",
        )
        fields = ("itemsize", "hidden", "channels_last", "precision")
        if entry["new"] != entry["old"] and asked == tuple(entry[field] for field in fields):
            found[entry["kernel"]] = Tile(**entry["new"])
    return found


def paste(table: Sequence[Mapping[str, Any]], environment: Mapping[str, Any]) -> str:
    """The table as lines for bam_kernels/backends/triton/configs.py.

    Each function's lines belong at the top of the function of that name there. Where the shipped
    tile is kept, a comment says so.
    """
    versions = f"torch {environment.get('torch')}, Triton {environment.get('triton')}"
    lines = [
        f"# {environment.get('device')}, {versions}, commit {str(environment.get('commit'))[:12]}.",
        "# Times: ms of a launch by CUDA graph, old -> new. The lines of a function go to the top",
        "# of the function of its name in bam_kernels/backends/triton/configs.py; then",
        "# tests/test_aot.py tells whether they spill on another target.",
    ]
    for kernel in dict.fromkeys(entry["kernel"] for entry in table):
        changed, kept = [], []
        for entry in table:
            if entry["kernel"] != kernel:
                continue
            key = Key(**{field.name: entry[field.name] for field in dataclasses.fields(Key)})
            if entry["new"] == entry["old"]:
                kept.append(f"# _{kernel}: {key.condition}:")
                kept.append(f"#     {_tile(entry['old'])} stays, of {entry['tried'] + 1} timed")
                continue
            changed.append(f"    if {key.condition}:")
            changed += [
                f"        # {site['site']} N={site['batch']}: "
                f"{site['old_ms']:.4f} -> {site['new_ms']:.4f}"
                for site in entry["sites"]
            ]
            changed.append(f"        return {_tile(entry['new'])}  # was {_tile(entry['old'])}")
        if changed:
            lines += ["", "", f"def _{kernel}({_SIGNATURE}) -> Tile:", *changed]
        lines += kept
    return "\n".join(lines)


def _tile(entry: Mapping[str, Any]) -> str:
    tile = Tile(**entry)
    registers = "" if tile.registers is None else f", registers={tile.registers}"
    numbers = (tile.block_c, tile.block_p, tile.num_warps, tile.num_stages)
    return f"Tile({', '.join(map(str, numbers))}{registers})"
