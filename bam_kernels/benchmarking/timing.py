"""How times are taken: clocks, quantiles, peers interleaved round by round.

A time is that of one call. A peer's run makes one call on every input set, so that the sets,
together larger than the cache, take turns; runs repeat until the clock has something to measure.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

WARMUPS = 5
ROUNDS = 20
FEWEST_ROUNDS = 5
LEAST_MS = 2.0
MOST_REPEATS = 50


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile (0 to 1) of the values, linear between neighbours.

    Raises:
        ValueError: no values, or q outside of [0, 1].
    """
    if not values:
        raise ValueError("values: expected at least one, got none")
    if not 0 <= q <= 1:
        raise ValueError(f"q: expected 0 to 1, got {q}")
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def summarize(values: Sequence[float]) -> dict[str, float | int]:
    """Median, 20th and 80th percentile of times in ms, and how many there were."""
    return {
        "median_ms": statistics.median(values),
        "p20_ms": quantile(values, 0.2),
        "p80_ms": quantile(values, 0.8),
        "rounds": len(values),
    }


def describe(error: BaseException) -> dict[str, str]:
    """An exception as a JSON object: {"error": type and the head of the message}."""
    text = " ".join(str(error).split())
    return {"error": f"{type(error).__name__}: {text[:400]}"}


class Clock(Protocol):
    """Times a run: (its time in ms, the ms for which it kept the calling thread busy)."""

    def measure(self, run: Callable[[], object]) -> tuple[float, float]: ...


class CudaClock:
    """CUDA events on the current stream, from an idle device."""

    def __init__(self) -> None:
        self.start = torch.cuda.Event(enable_timing=True)
        self.stop = torch.cuda.Event(enable_timing=True)

    def measure(self, run: Callable[[], object]) -> tuple[float, float]:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        self.start.record()
        run()
        self.stop.record()
        host = time.perf_counter() - begin
        self.stop.synchronize()
        return self.start.elapsed_time(self.stop), host * 1e3


class HostClock:
    """The process's own clock, for code that runs where it is called."""

    def measure(self, run: Callable[[], object]) -> tuple[float, float]:
        begin = time.perf_counter()
        run()
        elapsed = (time.perf_counter() - begin) * 1e3
        return elapsed, elapsed


def clock(device: torch.device) -> Clock:
    """The clock of a device."""
    return CudaClock() if device.type == "cuda" else HostClock()


@dataclasses.dataclass(frozen=True)
class Peer:
    """Something to time against others.

    Args:
        run: makes `calls` calls.
        calls: how many; a time is divided by it.
    """

    run: Callable[[], object]
    calls: int = 1


def repeats_for(run_ms: float, least_ms: float) -> int:
    """How often a run of `run_ms` is repeated to last `least_ms`, within `MOST_REPEATS`."""
    if run_ms <= 0:
        return MOST_REPEATS
    return max(1, min(MOST_REPEATS, math.ceil(least_ms / run_ms)))


def interleave(
    peers: Mapping[str, Peer],
    clock: Clock,
    *,
    rounds: int = ROUNDS,
    warmups: int = WARMUPS,
    least_ms: float = LEAST_MS,
    expired: Callable[[], bool] = lambda: False,
) -> dict[str, dict[str, Any]]:
    """Time the peers side by side: every round times each, in an order that turns by one a round.

    A drift of the machine's clocks thus falls on all alike. A peer that raises is recorded as
    ``{"error": ...}`` and left behind; the others go on.

    Args:
        peers: by name.
        clock: measures a run.
        rounds: times taken of each peer.
        warmups: untimed runs of each peer before.
        least_ms: runs are repeated until a measurement lasts about this long.
        expired: asked before each round; once true, no round past `FEWEST_ROUNDS` begins.

    Returns:
        By name, `summarize` of the time of a call, with ``host_ms`` (median, for which the caller
        was busy), ``calls`` and ``repeats`` of a measurement.
    """
    results: dict[str, dict[str, Any]] = {}
    live: dict[str, tuple[Callable[[], None], int, int]] = {}
    for name, peer in peers.items():
        try:
            for _ in range(warmups):
                peer.run()
            repeats = repeats_for(clock.measure(peer.run)[0], least_ms)
        except Exception as error:
            results[name] = describe(error)
            continue
        live[name] = (_repeated(peer.run, repeats), peer.calls * repeats, repeats)

    times: dict[str, list[float]] = {name: [] for name in live}
    host_times: dict[str, list[float]] = {name: [] for name in live}
    for number in range(rounds):
        if number >= min(FEWEST_ROUNDS, rounds) and expired():
            break
        names = list(live)
        turn = number % max(len(names), 1)
        for name in names[turn:] + names[:turn]:
            run, calls, _ = live[name]
            try:
                elapsed, host = clock.measure(run)
            except Exception as error:
                results[name] = describe(error)
                del live[name]
                continue
            times[name].append(elapsed / calls)
            host_times[name].append(host / calls)
    for name, (_, calls, repeats) in live.items():
        results[name] = {
            **summarize(times[name]),
            "host_ms": statistics.median(host_times[name]),
            "calls": calls,
            "repeats": repeats,
        }
    return {name: results[name] for name in peers if name in results}


def _repeated(run: Callable[[], object], repeats: int) -> Callable[[], None]:
    def repeated() -> None:
        for _ in range(repeats):
            run()

    return repeated


def graphed(run: Callable[[], object]) -> Callable[[], None]:
    """The device work of a run as one CUDA graph; calling the result replays it.

    The run must free what it makes (gradients set to None), so that the graph's memory is what one
    call needs. Three runs on a side stream come first, as capture asks for.

    Raises:
        RuntimeError: no CUDA device, or the run does something that cannot be captured.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA graphs need a CUDA device")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """The most memory, in bytes, that a run holds beyond what was held before; None off CUDA."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def gigabytes_per_second(moved_bytes: float, ms: float) -> float:
    """10^9 bytes a second."""
    return moved_bytes / (ms * 1e-3) / 1e9


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of found - expected over that of expected, in float64; NaN if anything is NaN."""
    wide = expected.detach().double()
    scale = wide.norm().item()
    error = (found.detach().double() - wide).norm().item()
    return error / scale if scale else error
