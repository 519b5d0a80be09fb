"""Where the time of a call goes: every kernel on the device, in order, with what it must move.

Times are CUPTI's, of kernels launched one by one by Python. They are held against the bytes that
the cost model counts for the same launch (`bam_kernels.benchmarking.cost`).
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.autograd import DeviceType

from bam_kernels.benchmarking import cost
from bam_kernels.benchmarking.gpu.peers import Settings, build, inputs, release, steps
from bam_kernels.benchmarking.gpu.report import Estimate, Report, Section
from bam_kernels.benchmarking.sites import Case
from bam_kernels.benchmarking.timing import describe, gigabytes_per_second
from bam_kernels.testing.traffic import Launch

_CALLS = 6


def profile_case(case: Case, settings: Settings) -> dict[str, Any]:
    """The kernels of one call of the fused module, each with its median time over several calls.

    Returns:
        ``kernels``, a list of ``name``, ``us`` and, where the cost model tells the same launches,
        ``bytes``, ``grid`` and ``share_of_copy``; ``kernels_us``, their sum; ``call_us``, from the
        start of a call's first kernel to that of the next call's.
    """
    _, fused = build(case, settings.device)
    sets = inputs(case, settings.device)[:_CALLS]
    run = steps(fused, fused, sets, "triton")
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(-(-_CALLS // len(sets))):
            run()
        torch.cuda.synchronize()
    calls = -(-_CALLS // len(sets)) * len(sets)
    seen = [
        (event.time_range.start, event.name, event.time_range.elapsed_us())
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA
    ]
    try:
        expected, failure = _expected(case), {}
    except Exception as error:  # the times are worth having nonetheless
        expected, failure = [], {"cost_model": describe(error)["error"]}
    return by_call(sorted(seen), calls, expected, settings.copy_gbs) | failure


def _expected(case: Case) -> list[tuple[str, str, int]]:
    """(name, grid, bytes) of every launch that the cost model counts."""
    found = []
    for phase in cost.traffic(case).values():
        for event in phase.events:
            ours = isinstance(event, Launch)
            name = event.kernel if ours else event.name
            grid = "x".join(map(str, event.grid)) if ours else ""
            found.append((name, grid, event.read_bytes + event.written_bytes))
    return found


def by_call(
    seen: Sequence[tuple[float, str, float]],
    calls: int,
    expected: Sequence[tuple[str, str, int]],
    copy_gbs: float | None,
) -> dict[str, Any]:
    """What was seen of several equal calls, as one call's.

    Args:
        seen: (start in us, name, us) of every kernel, in order.
        calls: how many calls these are.
        expected: (name, grid, bytes) of a call's launches; ours are found by name, in order.
        copy_gbs: the bandwidth that rates are held against.

    Raises:
        ValueError: the calls did not launch the same kernels.
    """
    length, rest = divmod(len(seen), calls)
    rows = [seen[i * length : (i + 1) * length] for i in range(calls)]
    if rest or not length or any([e[1] for e in row] != [e[1] for e in rows[0]] for row in rows):
        raise ValueError(f"{len(seen)} kernels in {calls} calls: they are not alike")
    waiting: dict[str, list[tuple[str, int]]] = {}
    for name, grid, nbytes in expected:
        waiting.setdefault(name, []).append((grid, nbytes))
    kernels = []
    for i, (_, name, _) in enumerate(rows[0]):
        us = statistics.median(row[i][2] for row in rows)
        entry: dict[str, Any] = {"name": name, "us": us}
        if waiting.get(name):
            entry["grid"], entry["bytes"] = waiting[name].pop(0)
            if copy_gbs and us:
                gbs = gigabytes_per_second(entry["bytes"], us / 1e3)
                entry["share_of_copy"] = gbs / copy_gbs
        kernels.append(entry)
    starts = [row[0][0] for row in rows]
    gaps = [b - a for a, b in itertools.pairwise(starts)]
    return {
        "kernels": kernels,
        "kernels_us": sum(entry["us"] for entry in kernels),
        "call_us": statistics.median(gaps) if gaps else None,
    }


def run_profile(
    cases: Sequence[Case], settings: Settings, section: Section, report: Report
) -> None:
    """Fill the report's "profile"."""
    table: list[dict[str, Any]] = []
    report.data["profile"] = table
    estimate = Estimate(3.0)
    for case in cases:
        if not section.allows(estimate.next(), str(case)):
            continue
        begin = time.monotonic()
        try:
            table.append({"case": str(case), **case.record(), **profile_case(case, settings)})
        except Exception as error:
            table.append({"case": str(case), **case.record(), **describe(error)})
        finally:
            release(settings.device)
        estimate.add(time.monotonic() - begin)
    report.save()


def lines(data: Mapping[str, Any]) -> Iterator[str]:
    """Every kernel, a line each."""
    for entry in data.get("profile", ()):
        if "error" in entry:
            yield f"{entry['case']}: {entry['error']}"
            continue
        yield (
            f"{entry['case']}: kernels {entry['kernels_us']:.1f} us, "
            f"a call every {entry['call_us'] or 0:.1f} us"
        )
        for kernel in entry["kernels"]:
            share = kernel.get("share_of_copy")
            rate = "" if share is None else f"{kernel['bytes'] / 1e6:9.2f} MB {share:6.2f}"
            name = f"{kernel['name'][:60]} {kernel.get('grid', '')}"
            yield f"  {kernel['us']:9.2f} us {rate:<20} {name}"
