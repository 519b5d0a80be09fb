"""The search for tiles: every sensible launch of each kernel beside the one in the table.

Processes compile all candidates first; then, on a quiet device, each is checked against the
table's result and timed. Candidates near the table's tile come first, so that a search cut short
has looked around every kernel rather than far around one.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from gpu_kernels import REDUCTION, Operands, device_run, launch, operands, rates, runner
from gpu_workers import Task, Workers, task_name

from bam_kernels.backends.triton import configs
from bam_kernels.backends.triton.configs import Tile
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

# Another tile adds in another order; more than this is another function.
LIMITS = {"float16": 5e-3, "bfloat16": 3e-2, "float32": 2e-3, "float64": 1e-10}


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is searched at once: a kernel on a shape."""

    kernel: str
    shape: Shape

    def __str__(self) -> str:
        return f"{self.kernel} {self.shape}"


def shipped(cell: Cell) -> Tile:
    """The table's tile, as it is cut down to the map."""
    shape, site = cell.shape, cell.shape.site
    needs_hidden = cell.kernel in ("pool_reduce", "input_gradient")
    return configs.tile(
        cell.kernel,
        shape.torch_dtype,
        site.channels,
        site.positions,
        max(1, site.channels // REDUCTION) if needs_hidden else 0,
        shape.layout == CHANNELS_LAST,
    )


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


def compile_candidate(cell: Cell, tile: Tile, device_name: str) -> None:
    """Launch a candidate once, so that its binary lies in Triton's cache: a `Workers` task."""
    device = torch.device(device_name)
    with configs.override(**{cell.kernel: tile}):
        launch(cell.kernel, operands(cell.shape, device))
    synchronize(device)


def by_rank(cells: list[Cell], most: int | None) -> Iterator[tuple[Cell, Tile]]:
    """Every cell's first candidate, then every cell's second, and so on to the `most`-th."""
    columns = [[(cell, tile) for tile in candidates(cell)[:most]] for cell in cells]
    for row in itertools.zip_longest(*columns):
        yield from (pair for pair in row if pair is not None)


def run_sweep(
    cells: list[Cell],
    settings: Settings,
    section: Section,
    report: Report,
    workers: int,
    most: int | None = None,
) -> None:
    """Fill the report's "sweep".

    Args:
        cells: to search, the most valuable first.
        settings: of the measurements.
        section: its time; 60 % of it may go into compilation.
        report: gets one entry a cell.
        workers: processes that compile; 0 compiles here.
        most: candidates of a cell.
    """
    entries: list[dict[str, Any]] = []
    report.data["sweep"] = entries
    pairs = list(by_rank(cells, most))
    if not section.allows(0.5 if settings.dry else 30.0, f"all {len(pairs)} candidates"):
        return
    tasks: list[Task] = [
        (task_name(compile_candidate), (cell, tile, str(settings.device))) for cell, tile in pairs
    ]
    pool = Workers(tasks, workers)
    try:
        pool.wait(0.6 * section.left())
    finally:
        pool.stop()
    compiled = {pairs[number]: outcome for number, outcome in pool.done.items()}
    report.data["sweep_compilation"] = {"candidates": len(pairs), "done": len(compiled)}

    for position, cell in enumerate(cells):
        share = section.left() / (len(cells) - position)
        if not section.allows(0.1 if settings.dry else 1.0, f"{cell}: every candidate"):
            continue
        try:
            entries.append(
                _search(cell, compiled, settings, time.monotonic() + share, report, most)
            )
        except Exception as error:
            entries.append({"kernel": cell.kernel, **cell.shape.record(), **describe(error)})
        finally:
            release(settings.device)
        report.save()


def _search(
    cell: Cell,
    compiled: dict[tuple[Cell, Tile], str | None],
    settings: Settings,
    deadline: float,
    report: Report,
    most: int | None,
) -> dict[str, Any]:
    """One cell: every compiled candidate quickly, then the best three and the table's at length."""
    sets = [
        operands(cell.shape, settings.device)
        for _ in range(cell.shape.sets(l2_bytes(settings.device)))
    ]
    expected = launch(cell.kernel, sets[0])
    ours = shipped(cell)
    tried: list[dict[str, Any]] = []
    untried = 0
    for tile in candidates(cell)[:most]:
        if (cell, tile) not in compiled or time.monotonic() > deadline:
            untried += 1
            continue
        entry: dict[str, Any] = dataclasses.asdict(tile)
        tried.append(entry)
        failure = compiled[cell, tile]
        if failure is not None:
            entry["error"] = failure
            continue
        try:
            entry.update(_quick(cell, tile, sets, expected, settings))
        except Exception as error:
            entry.update(describe(error))
    if untried:
        report.leave_out("sweep", f"{cell}: {untried} candidates", "the section's time was up")

    right = [entry for entry in tried if entry.get("ok") and "median_ms" in entry]
    best = sorted(right, key=lambda entry: entry["median_ms"])[:3]
    tiles = [ours, *(Tile(*(entry[field] for field in _FIELDS)) for entry in best)]
    # Peers by position: the table's first, then the three.
    peers = {str(i): Peer(_with_tile(cell, tile, sets, settings), len(sets))
             for i, tile in enumerate(tiles)}  # fmt: skip
    times = interleave(
        peers,
        clock(settings.device),
        rounds=settings.rounds,
        warmups=settings.warmups,
        least_ms=settings.least_ms,
    )
    finals = []
    for i, tile in enumerate(tiles):
        final = {**dataclasses.asdict(tile), **times[str(i)]}
        if "median_ms" in final:
            final.update(rates(cell.kernel, cell.shape, final["median_ms"], settings.copy_gbs))
        finals.append(final)
    return {
        "kernel": cell.kernel,
        **cell.shape.record(),
        "shipped": finals[0],
        "best": sorted(finals[1:], key=lambda final: final.get("median_ms", math.inf)),
        "tried": tried,
        "untried": untried,
    }


_FIELDS = tuple(field.name for field in dataclasses.fields(Tile))


def _with_tile(cell: Cell, tile: Tile, sets: list[Operands], settings: Settings) -> Any:
    plain = runner(cell.kernel, sets)

    def run() -> None:
        with configs.override(**{cell.kernel: tile}):
            plain()

    return device_run(run, settings.device)


def _quick(
    cell: Cell,
    tile: Tile,
    sets: list[Operands],
    expected: tuple[torch.Tensor, ...],
    settings: Settings,
) -> dict[str, Any]:
    with configs.override(**{cell.kernel: tile}):
        found = launch(cell.kernel, sets[0])
    error = max(relative_error(a, b) for a, b in zip(found, expected, strict=True))
    # NaN compares false: max() may drop it, this does not.
    right = all(bool(torch.isfinite(t).all()) for t in found)
    ok = right and error <= LIMITS[cell.shape.dtype]
    if not ok:
        return {"ok": False, "relative_error": error}
    times = interleave(
        {"tile": Peer(_with_tile(cell, tile, sets, settings), len(sets))},
        clock(settings.device),
        rounds=min(7, settings.rounds),
        warmups=1,
        least_ms=settings.least_ms / 4,
    )["tile"]
    return {"ok": True, "relative_error": error, **times}
