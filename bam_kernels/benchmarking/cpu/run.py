"""Time BAM on a CPU: ours against every peer that runs here, side by side in one process.

    python bam_kernels.benchmarking.cpu.run --threads 2 --dtype float32 bfloat16 --json FILE --check

Peers are the plain PyTorch module, eager and under torch.compile, in NCHW and channels_last, ONNX
Runtime, and OpenVINO in both layouts. All hold the same weights and are compared with float64
before they are timed. A round times each once, in an order that turns by one a round; every time
is that of enough calls to last --least-ms, behind an untimed call, and what is reported is the
median over the rounds. Inference is under torch.inference_mode(); a training step clears the
gradients, runs forward and out.backward(dout), with batch statistics, x requiring a gradient.

Ratios are the best peer's median, over all peers and layouts, divided by ours in NCHW and in
channels_last. Rates reached count only what the fused module needs: FLOPs of the 1x1 reduction,
the dilated convolutions, the projection, the pooling and the gate (`report.flops`), and 3
passes over x-sized memory in inference, 8 in training. They stand beside the machine's own: its
best matrix product, and its best copy of a map of the site's size and of a much larger one.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

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
WIDTH = 210  # of the tables where no terminal sets it


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _site(text: str) -> tuple[int, int, int, int]:
    try:
        size = tuple(int(part) for part in text.split("x"))
    except ValueError:
        size = ()
    if len(size) != 4 or min(size) < 1 or size[1] < 16:
        raise argparse.ArgumentTypeError(
            f"expected NxCxHxW with C of at least 16, such as 8x256x56x56, got {text!r}"
        )
    return size


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = _Parser(
        prog="cpu.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit status: 0 done, 1 a bar missed under --check, 2 a bad argument or no backend",
    )
    add = made.add_argument
    add("--sites", nargs="+", type=_site, metavar="NxCxHxW", help="shapes of x (default: --list)")
    add("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32"],
        help="of x and the parameters (default: float32)")  # fmt: skip
    add("--mode", choices=(sites.INFERENCE, sites.TRAINING, "both"), default="both",
        help="what to time (default: both)")  # fmt: skip
    add("--presets", nargs="+", choices=tuple(bam_kernels.config.PRESETS),
        help="of the module (default: all; paper with --quick)")  # fmt: skip
    add("--peers", nargs="+", choices=peers.PEERS,
        help="whom to time beside ours (default: all; eager with --quick)")  # fmt: skip
    add("--threads", type=_positive, default=2, help="threads of every side (default: 2)")
    add("--rounds", type=_positive, help="times taken of each side (default: 8; 3 with --quick)")
    add("--least-ms", type=_positive, help="a time's least duration (default: 20; 2 with --quick)")
    add("--backend", choices=("cpp", "reference"), default="cpp",
        help="what ours runs on; reference tries the benchmark itself (default: cpp)")  # fmt: skip
    add("--quick", action="store_true", help="a tiny site, few rounds: does everything run?")
    add("--no-memory", action="store_true", help="leave out peak memory, measured in processes")
    add("--json", type=Path, metavar="FILE", help="write every figure there")
    add("--check", action="store_true", help="judge the bars; exit status 1 if one is missed")
    add("--table", type=Path, metavar="FILE",
        help="run nothing: print what --json wrote as a Markdown table, the README's")  # fmt: skip
    add("--list", action="store_true", help="say what would run, and which peers are there")
    return made


def settle(args: argparse.Namespace) -> argparse.Namespace:
    """The defaults that depend on --quick."""
    quick = args.quick
    args.sites = args.sites or list(TINY if quick else SITES)
    args.presets = args.presets or (["paper"] if quick else list(bam_kernels.config.PRESETS))
    args.peers = tuple(args.peers or ([peers.EAGER] if quick else peers.PEERS))
    args.rounds = args.rounds or (3 if quick else 8)
    args.least_ms = args.least_ms or (2 if quick else 20)
    return args


def problems(
    args: argparse.Namespace,
) -> tuple[list[peers.Problem], list[peers.Problem]]:
    """What is timed, in order; and what cannot be: batch statistics take more than one sample."""
    modes = (sites.INFERENCE, sites.TRAINING) if args.mode == "both" else (args.mode,)
    wanted = [
        peers.Problem(size, dtype, mode, preset)
        for mode in modes
        for preset in args.presets
        for dtype in args.dtype
        for size in args.sites
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
    problem: peers.Problem, args: argparse.Namespace, limits: dict[str, Any]
) -> dict[str, Any]:
    """One row: every side built, checked and timed."""
    setting = peers.Setting.make(problem, args.threads)
    sides, errors, reasons = peers.sides(setting, args.peers)
    times, failed = interleave(sides, args.rounds, args.least_ms)
    torch.compiler.reset()
    gc.collect()
    return report.row(problem, times, errors, reasons | failed, limits)


def overhead(args: argparse.Namespace) -> dict[str, Any]:
    """A call on a map so small that its time is that of everything but arithmetic."""
    problem = peers.Problem(OVERHEAD, "float32", sites.INFERENCE, "paper")
    setting = peers.Setting.make(problem, args.threads)
    sides, _, reasons = peers.sides(setting, (peers.EAGER,))
    nchw = [side for side in sides if side.layout == sites.NCHW]
    times, failed = interleave(nchw, args.rounds, args.least_ms)
    found: dict[str, Any] = {"site": "x".join(map(str, OVERHEAD)), "sides": times}
    ours, eager = (times.get(f"{name} {sites.NCHW}") for name in (peers.OURS, peers.EAGER))
    if ours is None or eager is None:
        return {**found, "error": "; ".join((reasons | failed).values())}
    found["ours_us"], found["eager_us"] = ours["median_ms"] * 1e3, eager["median_ms"] * 1e3
    return {**found, "ratio": ours["median_ms"] / eager["median_ms"]}


def limits(args: argparse.Namespace) -> dict[str, Any]:
    """The machine's best matrix product by dtype, and its best copies by size of the map."""
    rounds = args.rounds
    dtypes = dict.fromkeys(["float32", *args.dtype])
    copies = {}
    for size in args.sites:
        nbytes = 4 * math.prod(size)
        copies["x".join(map(str, size))] = machine.copy_gigabytes(nbytes, rounds)
    if not args.quick:
        copies["large"] = machine.copy_gigabytes(machine.LARGE_BYTES, min(rounds, 3))
    return {
        "matmul_gflops": {
            name: machine.matmul_gflops(getattr(torch, name), rounds) for name in dtypes
        },
        "copy_gigabytes_per_second": copies,
        "large_bytes": machine.LARGE_BYTES,
    }


def memory_requests(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What is asked of a process each: ours in both layouts, eager beside it in NCHW."""
    found = []
    for dtype in args.dtype:
        for size in args.sites:
            problem = peers.Problem(size, dtype, sites.INFERENCE, args.presets[0])
            for side, layout in (
                *((peers.OURS, layout) for layout in peers.LAYOUTS),
                (peers.EAGER, sites.NCHW),
            ):
                found.append(
                    {
                        "site": "x".join(map(str, size)), "size": size, "dtype": dtype,
                        "side": side, "layout": layout, "preset": problem.preset,
                        "x_bytes": problem.x_bytes, "threads": args.threads,
                        "backend": args.backend,
                    }
                )  # fmt: skip
    return found


# --- the run ----------------------------------------------------------------------------------


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Everything, as the JSON object that --json writes.

    Raises:
        BackendUnavailableError, ImportError: ours does not run here.
    """
    torch.set_num_threads(args.threads)
    result: dict[str, Any] = {
        "what": "times of a call in ms, medians over interleaved rounds",
        **machine.environment(args.threads),
        "settings": {
            "backend": args.backend, "rounds": args.rounds, "least_ms": args.least_ms,
            "peers": args.peers, "quick": args.quick,
        },
    }  # fmt: skip
    todo, left = problems(args)
    result["not_timed"] = {str(each): ONE_SAMPLE for each in left}
    requests = [] if args.no_memory else memory_requests(args)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    with (
        bam_kernels.use_backend(args.backend),
        Progress(*columns, console=console, transient=True) as progress,
    ):
        task = progress.add_task("overhead", total=len(todo) + len(requests) + 2)
        result["overhead"] = overhead(args)
        progress.update(task, advance=1, description="the machine's limits")
        result["limits"] = limits(args)
        progress.advance(task)
        result["rows"] = []
        for problem in todo:
            progress.update(task, description=str(problem))
            result["rows"].append(time_problem(problem, args, result["limits"]))
            progress.advance(task)
        result["memory"] = []
        for request in requests:
            told = f"memory {request['site']} {request['dtype']} {request['side']}"
            progress.update(task, description=told)
            processes = 1 if args.quick or request["side"] == peers.EAGER else 3
            result["memory"].append(memory.in_child(request, processes))
            progress.advance(task)
    result["machine"]["load_average_after"] = machine.os.getloadavg()
    result["bars"] = report.bars(result)
    return result


def show_list(console: Console) -> None:
    """The default sites, and each peer with what it lacks."""
    console.print("sites: " + " ".join("x".join(map(str, size)) for size in SITES))
    for peer in peers.PEERS:
        console.print(f"{peer}: {peers.missing(peer) or 'ready'}", markup=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write; returns the exit status."""
    command = parser()
    args = settle(command.parse_args(arguments))
    out = Console(width=None if sys.stdout.isatty() else WIDTH)
    if args.list:
        show_list(out)
        return 0
    if args.table is not None:
        try:
            table = report.markdown(json.loads(args.table.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, KeyError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            expected = "expected a file of --json's"
            command.error(f"argument --table: {expected}, got {args.table}: {reason}")
        print(table)
        return 0
    if args.json is not None and not args.json.resolve().parent.is_dir():
        command.error(f"argument --json: no such folder: {args.json.resolve().parent}")
    if args.json is not None and args.json.is_dir():
        command.error(f"argument --json: expected a file, got the folder {args.json}")
    try:
        result = run(args, Console(stderr=True))
    except peers.NO_BACKEND as error:
        command.error(" ".join(str(error).split()))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    report.show(result, out)
    if args.check:
        report.show_bars(result["bars"], out)
        return 0 if all(each["pass"] for each in result["bars"]) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
