"""The search for tiles: every sensible launch of each kernel beside the one in the table.

Processes compile and launch candidates first, beside what else needs no quiet device; then, on a
quiet one, a process of its own checks each against the table's result and times it. A candidate
that does not compile, spills, hangs or crashes costs itself alone. Candidates near the table's tile
come first, so that a search cut short has looked around every kernel rather than far around one.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from gpu_kernels import REDUCTION, Operands, device_run, launch, operands, rates, runner
from gpu_workers import Child, Outcome, Task, task_name

from bam_kernels.backends.triton import configs
from bam_kernels.backends.triton.configs import Tile
from bam_kernels.backends.triton.launch import conv_precision
from bam_kernels.benchmarking.gpu.environment import l2_bytes
from bam_kernels.benchmarking.gpu.peers import Settings, release, synchronize
from bam_kernels.benchmarking.gpu.report import Report, Section
from bam_kernels.benchmarking.sites import CHANNELS_LAST, Shape
from bam_kernels.benchmarking.timing import Peer, clock, describe, interleave, relative_error

# By kernel: elements of a tile (least, most), the least edge, warps, pipeline stages. tl.dot wants
# edges of 16; the gate has no loop to pipeline.
GRIDS = {
    "gate": ((1024, 16384), 4, (2, 4, 8), (1,)),
    "gate_backward_reduce": ((512, 8192), 8, (2, 4, 8), (1, 2, 3)),
    "pool_reduce": ((1024, 16384), 16, (4, 8), (1, 2, 3, 4)),
    "input_gradient": ((512, 8192), 16, (4, 8), (1, 2, 3)),
}
_WIDEST = 512
_ELEMENTS_A_THREAD = (4, 128)

# A candidate takes a fraction of these, in seconds; one that takes more is given up.
_QUICK_SECONDS, _FINAL_SECONDS = 30.0, 60.0

# Another tile adds in another order; more than this is another function.
LIMITS = {"float16": 5e-3, "bfloat16": 3e-2, "float32": 2e-3, "float64": 1e-10}


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is searched at once: a kernel on a shape."""

    kernel: str
    shape: Shape

    def __str__(self) -> str:
        return f"{self.kernel} {self.shape}"


def hidden_width(cell: Cell) -> int:
    """Of the 1x1 reduction; 0 where the kernel has none."""
    if cell.kernel not in ("pool_reduce", "input_gradient"):
        return 0
    return max(1, cell.shape.site.channels // REDUCTION)


def shipped(cell: Cell) -> Tile:
    """The table's tile, as it is cut down to the map."""
    shape, hidden = cell.shape, hidden_width(cell)
    return configs.tile(
        cell.kernel,
        shape.torch_dtype,
        shape.site.channels,
        shape.site.positions,
        hidden,
        shape.layout == CHANNELS_LAST,
        conv_precision(shape.torch_dtype) if hidden else "ieee",
    )


def cut_down(cell: Cell, tile: Tile) -> Tile:
    """The tile as the cell's map cuts it down."""
    with configs.override(**{cell.kernel: tile}):
        return shipped(cell)


def distance(a: Tile, b: Tile) -> float:
    """How many doublings and stages lie between two tiles."""
    doublings = (
        math.log2(a.block_c / b.block_c),
        math.log2(a.block_p / b.block_p),
        math.log2(a.num_warps / b.num_warps),
    )
    return sum(abs(d) for d in doublings) + abs(a.num_stages - b.num_stages)


def candidates(cell: Cell) -> list[Tile]:
    """Every tile of the kernel's grid but the table's own, the nearest first."""
    (least, most), edge, warps, stages = GRIDS[cell.kernel]
    site = cell.shape.site
    edges = [1 << k for k in range(edge.bit_length() - 1, _WIDEST.bit_length())]
    widest_c = max(configs.next_power_of_2(site.channels), 16)
    widest_p = max(configs.next_power_of_2(site.positions), 16)
    found = []
    for c, p, w, s in itertools.product(edges, edges, warps, stages):
        a_thread = c * p / (32 * w)
        if (
            least <= c * p <= most
            and c <= widest_c
            and p <= widest_p
            and _ELEMENTS_A_THREAD[0] <= a_thread <= _ELEMENTS_A_THREAD[1]
        ):
            found.append(Tile(c, p, w, s))
    ours = shipped(cell)
    found = [tile for tile in found if tile != ours]
    return sorted(found, key=lambda tile: (distance(tile, ours), dataclasses.astuple(tile)))


def by_rank(cells: list[Cell], most: int | None) -> Iterator[tuple[Cell, Tile]]:
    """Every cell's first candidate, then every cell's second, and so on to the `most`-th."""
    columns = [[(cell, tile) for tile in candidates(cell)[:most]] for cell in cells]
    for row in itertools.zip_longest(*columns):
        yield from (pair for pair in row if pair is not None)


# --- in the processes -------------------------------------------------------------------------


def compile_candidate(cell: Cell, tile: Tile, device_name: str) -> int | None:
    """Launch a candidate once, so that its binary lies in Triton's cache: a task for a worker.

    Returns:
        How many values a thread spills; None where Triton does not tell.
    """
    device = torch.device(device_name)
    function = jit_function(cell.kernel)
    forget_binaries(function)
    with configs.override(**{cell.kernel: tile}):
        launch(cell.kernel, operands(cell.shape, device))
    synchronize(device)
    release(device)
    return most_spills(function)


def jit_function(kernel: str) -> Any:
    """The @triton.jit function of a kernel."""
    module, name = {
        "gate": ("gate", "_gate_forward_kernel"),
        "gate_backward_reduce": ("gate", "_gate_backward_reduce_kernel"),
        "pool_reduce": ("pool_reduce", "_pool_reduce_kernel"),
        "input_gradient": ("input_gradient", "_input_gradient_kernel"),
    }[kernel]
    # The package's own names are the launchers, one of them called like its module.
    return getattr(importlib.import_module(f"bam_kernels.backends.triton.{module}"), name)


def forget_binaries(function: Any) -> None:
    """Have the process load the kernel's binaries anew, so that the next are one launch's."""
    caches = getattr(function, "device_caches", None)  # the interpreter has none
    if caches is not None:
        caches.clear()


def most_spills(function: Any) -> int | None:
    """The most values that a thread of the kernel's loaded binaries spills; None if not known."""
    found = []
    for cache in getattr(function, "device_caches", {}).values():
        for binary in cache[0].values():
            spills = getattr(binary, "n_spills", None)
            if isinstance(spills, int):
                found.append(spills)
    return max(found, default=None)


@functools.lru_cache(maxsize=1)
def _prepared(cell: Cell, settings: Settings) -> tuple[list[Operands], tuple[torch.Tensor, ...]]:
    """The input sets of a cell and what the table's tile makes of the first."""
    release(settings.device)
    count = cell.shape.sets(l2_bytes(settings.device))
    sets = [operands(cell.shape, settings.device) for _ in range(count)]
    return sets, launch(cell.kernel, sets[0])


def warm_up(settings: Settings) -> None:
    """Bring the device up in this process: that is no cell's time."""
    torch.zeros(1, device=settings.device)
    synchronize(settings.device)


def check_candidate(cell: Cell, tile: Tile, settings: Settings) -> dict[str, Any]:
    """Compare a candidate with the table's tile and, if it is right, time it in a few rounds."""
    sets, expected = _prepared(cell, settings)
    with configs.override(**{cell.kernel: tile}):
        found = launch(cell.kernel, sets[0])
    error = max(relative_error(a, b) for a, b in zip(found, expected, strict=True))
    # NaN compares false: max() may drop it, this does not.
    finite = all(bool(torch.isfinite(t).all()) for t in found)
    if not (finite and error <= LIMITS[cell.shape.dtype]):
        return {"ok": False, "relative_error": error}
    quick = dataclasses.replace(
        settings, rounds=min(7, settings.rounds), warmups=1, least_ms=settings.least_ms / 4
    )
    return {"ok": True, "relative_error": error, **_times(cell, [tile], quick)[0]}


def time_tiles(cell: Cell, tiles: list[Tile], settings: Settings) -> list[dict[str, Any]]:
    """Tiles at length, interleaved: times and rates of each."""
    found = [
        {**dataclasses.asdict(tile), **times}
        for tile, times in zip(tiles, _times(cell, tiles, settings), strict=True)
    ]
    for entry in found:
        if "median_ms" in entry:
            entry.update(rates(cell.kernel, cell.shape, entry["median_ms"], settings.copy_gbs))
    return found


def _times(cell: Cell, tiles: list[Tile], settings: Settings) -> list[dict[str, Any]]:
    sets, _ = _prepared(cell, settings)
    peers: dict[str, Peer] = {}
    errors: dict[str, dict[str, Any]] = {}
    for i, tile in enumerate(tiles):
        try:
            peers[str(i)] = Peer(_with_tile(cell, tile, sets, settings), len(sets))
        except Exception as error:
            errors[str(i)] = describe(error)
    times = interleave(
        peers,
        clock(settings.device),
        rounds=settings.rounds,
        warmups=settings.warmups,
        least_ms=settings.least_ms,
    )
    return [(times | errors)[str(i)] for i in range(len(tiles))]


def _with_tile(
    cell: Cell, tile: Tile, sets: list[Operands], settings: Settings
) -> Callable[[], None]:
    plain = runner(cell.kernel, sets)

    def run() -> None:
        with configs.override(**{cell.kernel: tile}):
            plain()

    return device_run(run, settings.device)


# --- in the run -------------------------------------------------------------------------------


def compile_tasks(cells: list[Cell], most: int | None, device: torch.device) -> list[Task]:
    """A task for each candidate, in `by_rank`'s order."""
    name = task_name(compile_candidate)
    return [(name, (cell, tile, str(device))) for cell, tile in by_rank(cells, most)]


def run_sweep(
    cells: list[Cell],
    compiled: Mapping[tuple[Cell, Tile], Outcome],
    settings: Settings,
    section: Section,
    report: Report,
    child: Child,
    most: int | None = None,
) -> None:
    """Fill the report's "sweep".

    Args:
        cells: to search, the most valuable first.
        compiled: what became of the candidates that were compiled; the others are not tried.
        settings: of the measurements.
        section: its time.
        report: gets one entry a cell.
        child: where candidates run; closed at the end.
        most: candidates of a cell.
    """
    entries: list[dict[str, Any]] = []
    report.data["sweep"] = entries
    report.data["sweep_compilation"] = {
        "candidates": sum(len(candidates(cell)[:most]) for cell in cells),
        "done": len(compiled),
    }
    try:
        child.call((task_name(warm_up), (settings,)), _FINAL_SECONDS)
        for position, cell in enumerate(cells):
            share = section.left() / (len(cells) - position)
            if not section.allows(0.1 if settings.dry else 1.0, f"{cell}: every candidate"):
                continue
            try:
                end = time.monotonic() + share
                entries.append(_search(cell, compiled, settings, end, report, child, most))
            except Exception as error:
                entries.append({"kernel": cell.kernel, **cell.shape.record(), **describe(error)})
            report.save()
    finally:
        child.close()


def _search(
    cell: Cell,
    compiled: Mapping[tuple[Cell, Tile], Outcome],
    settings: Settings,
    deadline: float,
    report: Report,
    child: Child,
    most: int | None,
) -> dict[str, Any]:
    """One cell: every compiled candidate quickly, then the best three and the table's at length."""
    tried: list[dict[str, Any]] = []
    untried = 0
    for tile in candidates(cell)[:most]:
        if (cell, tile) not in compiled or time.monotonic() > deadline:
            untried += 1
            continue
        entry: dict[str, Any] = dataclasses.asdict(tile)
        tried.append(entry)
        outcome = compiled[cell, tile]
        if outcome.error is None:
            entry["spills"] = outcome.result
            if outcome.result:  # no tile of the tables may
                entry["ok"] = False
                continue
            task = (task_name(check_candidate), (cell, tile, settings))
            outcome = child.call(task, _QUICK_SECONDS)
        entry.update({"error": outcome.error} if outcome.error else outcome.result)
    if untried:
        report.leave_out("sweep", f"{cell}: {untried} candidates", "the section's time was up")

    right = [entry for entry in tried if entry.get("ok") and "median_ms" in entry]
    best = sorted(right, key=lambda entry: entry["median_ms"])[:3]
    tiles = [shipped(cell), *(tile_of(entry) for entry in best)]
    outcome = child.call((task_name(time_tiles), (cell, tiles, settings)), _FINAL_SECONDS)
    found = {"kernel": cell.kernel, **cell.shape.record()}
    if outcome.error:
        return {**found, "error": outcome.error, "tried": tried, "untried": untried}
    ours, *others = outcome.result
    return {
        **found,
        "precision": conv_precision(cell.shape.torch_dtype) if hidden_width(cell) else "ieee",
        "shipped": ours,
        "best": sorted(others, key=lambda entry: entry.get("median_ms", math.inf)),
        "tried": tried,
        "untried": untried,
    }


_FIELDS = tuple(field.name for field in dataclasses.fields(Tile))


def tile_of(entry: Mapping[str, Any]) -> Tile:
    """The tile that an entry of the report is about."""
    return Tile(**{field: entry[field] for field in _FIELDS if field in entry})
