"""BAM on a CPU: ours against every peer that runs here, side by side in one process.

Peers are the plain PyTorch module, eager and under torch.compile, in NCHW and channels_last, ONNX
Runtime, and OpenVINO in both layouts. All hold the same weights and are compared with float64
before they are timed. A round times each once, in an order that turns by one a round; every time
is that of enough calls to last `least_ms`, behind an untimed call, and what is reported is the
median over the rounds. Inference is under torch.inference_mode(); a training step clears the
gradients, runs forward and out.backward(dout), with batch statistics, x requiring a gradient.

Ratios are the best peer's median, over all peers and layouts, divided by ours in NCHW and in
channels_last. Rates reached count only what the fused module needs: FLOPs of the 1x1 reduction,
the dilated convolutions, the projection, the pooling and the gate (`report.flops`), and 3 passes
over x-sized memory in inference, 8 in training. They stand beside the machine's own: its best
matrix product, and its best copy of a map of the site's size and of a much larger one.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import bam_kernels
from bam_kernels.benchmarking import sites, timing
from bam_kernels.benchmarking.cpu import machine, memory, peers, report

SITES = (
    (8, 256, 56, 56), (8, 512, 28, 28), (8, 1024, 14, 14),
    (32, 64, 32, 32), (1, 256, 56, 56), (1, 1024, 14, 14),
)  # fmt: skip
TINY = ((2, 32, 8, 8),)
OVERHEAD = (1, 32, 4, 4)
ONE_SAMPLE = "no training on one sample: the channel branch's norms need a batch"
PAUSE_S = 0.005  # in which the threads of the side before go to sleep
WARMUPS = 3


@dataclasses.dataclass(frozen=True)
class Options:
    """What a run times.

    Attributes:
        sites: shapes of x, (N, C, H, W).
        dtypes: "float32" or "bfloat16", of x and of the parameters.
        modes: "inference" and "training".
        presets: "paper", "official".
        peers: of `peers.PEERS`, beside ours.
        threads: of every side.
        rounds: times taken of each side.
        least_ms: a time's least duration, in ms.
        backend: what ours runs on; "reference" tries the benchmark itself.
        quick: no copy of a large map, and one process for each peak of memory.
        memory: whether peak memory is measured, in processes of their own.
        smoke: a toy, which the result says of itself.
    """

    modes: tuple[str, ...] = (sites.INFERENCE, sites.TRAINING)
    sites: tuple[tuple[int, int, int, int], ...] = SITES
    dtypes: tuple[str, ...] = ("float32",)
    presets: tuple[str, ...] = ("paper", "official")
    peers: tuple[str, ...] = peers.PEERS
    threads: int = 2
    rounds: int = 8
    least_ms: int = 20
    backend: str = "cpp"
    quick: bool = False
    memory: bool = True
    smoke: bool = False


SMOKE = Options(
    sites=TINY,
    presets=("paper",),
    peers=(peers.EAGER,),
    rounds=3,
    least_ms=2,
    quick=True,
    smoke=True,
)
"""A toy, which shows that everything runs and whose times mean nothing."""

QUICK = Options(
    sites=((8, 256, 56, 56), (8, 1024, 14, 14)), presets=("paper",), modes=(sites.INFERENCE,),
    peers=(peers.EAGER, peers.COMPILE), rounds=5, least_ms=10, quick=True, memory=False,
)  # fmt: skip
"""Real sites in less than a minute."""


def problems(
    options: Options,
) -> tuple[list[peers.Problem], list[peers.Problem]]:
    """What is timed, in order; and what cannot be: batch statistics take more than one sample."""
    wanted = [
        peers.Problem(size, dtype, mode, preset)
        for mode in options.modes
        for preset in options.presets
        for dtype in options.dtypes
        for size in options.sites
    ]
    left = [each for each in wanted if each.mode == sites.TRAINING and each.size[0] == 1]
    return [each for each in wanted if each not in left], left


# --- times ------------------------------------------------------------------------------------


def interleave(
    sides: Sequence[peers.Side], rounds: int, least_ms: float
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Times of a call by side, and why a side that failed on the way has none."""
    repeats: dict[str, int] = {}
    taken: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    for number in range(-1, rounds):  # the round before the first finds the repeats
        turn = max(number, 0) % max(len(sides), 1)
        for side in (*sides[turn:], *sides[:turn]):
            if side.key in failed:
                continue
            try:
                time.sleep(PAUSE_S)
                if number < 0:
                    side.loop(WARMUPS)
                    repeats[side.key] = max(1, math.ceil(least_ms / _ms(side.loop, 1)))
                    continue
                side.loop(1)
                count = repeats[side.key]
                taken.setdefault(side.key, []).append(_ms(side.loop, count) / count)
            except Exception as error:
                failed[side.key] = timing.describe(error)["error"]
    times = {
        key: {**summary(values), "repeats": repeats[key]}
        for key, values in taken.items()
        if key not in failed
    }
    return {side.key: times[side.key] for side in sides if side.key in times}, failed


def _ms(loop: Callable[[int], None], calls: int) -> float:
    begin = time.perf_counter()
    loop(calls)
    return (time.perf_counter() - begin) * 1e3


def summary(values: Sequence[float]) -> dict[str, float | int]:
    """Median, least and quartiles of times in ms, and how many there were."""
    return {
        "median_ms": statistics.median(values),
        "min_ms": min(values),
        "q1_ms": timing.quantile(values, 0.25),
        "q3_ms": timing.quantile(values, 0.75),
        "rounds": len(values),
    }


def time_problem(
    problem: peers.Problem, options: Options, limits: dict[str, Any]
) -> dict[str, Any]:
    """One row: every side built, checked and timed."""
    setting = peers.Setting.make(problem, options.threads)
    sides, errors, reasons = peers.sides(setting, options.peers)
    times, failed = interleave(sides, options.rounds, options.least_ms)
    torch.compiler.reset()
    gc.collect()
    return report.row(problem, times, errors, reasons | failed, limits)


def overhead(options: Options) -> dict[str, Any]:
    """A call on a map so small that its time is that of everything but arithmetic."""
    problem = peers.Problem(OVERHEAD, "float32", sites.INFERENCE, "paper")
    setting = peers.Setting.make(problem, options.threads)
    sides, _, reasons = peers.sides(setting, (peers.EAGER,))
    nchw = [side for side in sides if side.layout == sites.NCHW]
    times, failed = interleave(nchw, options.rounds, options.least_ms)
    found: dict[str, Any] = {"site": "x".join(map(str, OVERHEAD)), "sides": times}
    ours, eager = (times.get(f"{name} {sites.NCHW}") for name in (peers.OURS, peers.EAGER))
    if ours is None or eager is None:
        return {**found, "error": "; ".join((reasons | failed).values())}
    found["ours_us"], found["eager_us"] = ours["median_ms"] * 1e3, eager["median_ms"] * 1e3
    return {**found, "ratio": ours["median_ms"] / eager["median_ms"]}


def limits(options: Options) -> dict[str, Any]:
    """The machine's best matrix product by dtype, and its best copies by size of the map."""
    rounds = options.rounds
    dtypes = dict.fromkeys(["float32", *options.dtypes])
    copies = {}
    for size in options.sites:
        nbytes = 4 * math.prod(size)
        copies["x".join(map(str, size))] = machine.copy_gigabytes(nbytes, rounds)
    if not options.quick:
        copies["large"] = machine.copy_gigabytes(machine.LARGE_BYTES, min(rounds, 3))
    return {
        "matmul_gflops": {
            name: machine.matmul_gflops(getattr(torch, name), rounds) for name in dtypes
        },
        "copy_gigabytes_per_second": copies,
        "large_bytes": machine.LARGE_BYTES,
    }


def memory_requests(options: Options) -> list[dict[str, Any]]:
    """What is asked of a process each: ours in both layouts, eager beside it in NCHW."""
    found = []
    for dtype in options.dtypes:
        for size in options.sites:
            problem = peers.Problem(size, dtype, sites.INFERENCE, options.presets[0])
            for side, layout in (
                *((peers.OURS, layout) for layout in peers.LAYOUTS),
                (peers.EAGER, sites.NCHW),
            ):
                found.append(
                    {
                        "site": "x".join(map(str, size)), "size": size, "dtype": dtype,
                        "side": side, "layout": layout, "preset": problem.preset,
                        "x_bytes": problem.x_bytes, "threads": options.threads,
                        "backend": options.backend,
                    }
                )  # fmt: skip
    return found


# --- the run ----------------------------------------------------------------------------------


def run(options: Options, console: Console) -> dict[str, Any]:
    """Everything, as the JSON object that --json writes.

    Raises:
        BackendUnavailableError, ImportError: ours does not run here.
    """
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {
        "what": "times of a call in ms, medians over interleaved rounds",
        **machine.environment(options.threads),
        "settings": {
            "backend": options.backend, "rounds": options.rounds, "least_ms": options.least_ms,
            "peers": options.peers, "quick": options.quick,
        },
    }  # fmt: skip
    if options.smoke:
        result["not_a_measurement"] = True
    todo, left = problems(options)
    result["not_timed"] = {str(each): ONE_SAMPLE for each in left}
    requests = memory_requests(options) if options.memory else []
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    with (
        bam_kernels.use_backend(options.backend),
        Progress(*columns, console=console, transient=True) as progress,
    ):
        task = progress.add_task("overhead", total=len(todo) + len(requests) + 2)
        result["overhead"] = overhead(options)
        progress.update(task, advance=1, description="the machine's limits")
        result["limits"] = limits(options)
        progress.advance(task)
        result["rows"] = []
        for problem in todo:
            progress.update(task, description=str(problem))
            result["rows"].append(time_problem(problem, options, result["limits"]))
            progress.advance(task)
        result["memory"] = []
        for request in requests:
            told = f"memory {request['site']} {request['dtype']} {request['side']}"
            progress.update(task, description=told)
            processes = 1 if options.quick or request["side"] == peers.EAGER else 3
            result["memory"].append(memory.in_child(request, processes))
            progress.advance(task)
    result["machine"]["load_average_after"] = machine.os.getloadavg()
    result["bars"] = report.bars(result)
    return result
