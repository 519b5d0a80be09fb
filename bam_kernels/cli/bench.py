"""``python -m bam_kernels bench``."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bam_kernels.cli.output import FAILED, error, shape_of

if TYPE_CHECKING:
    from bam_kernels.benchmarking.cpu.run import Options

_WIDTH = 210  # of the tables where no terminal sets it


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command and its options."""
    bench = commands.add_parser(
        "bench",
        help="time BAM beside eager PyTorch, torch.compile, ONNX Runtime and OpenVINO",
        description="Time the C++ backend on this CPU beside the plain PyTorch module, eager and "
        "under torch.compile, ONNX Runtime and OpenVINO: the same weights, compared with float64 "
        "first, in turns in one process. Ratios are the fastest peer's median, in any layout, over "
        "ours; rates stand beside the machine's own matrix product and copy, of the same run. On "
        "GPUs benchmarks/gpu.sh measures.",
        epilog="Exit status: 0 done, 1 a bar missed under --check, 2 a bad argument, or nothing "
        "that could be timed.",
    )
    add = bench.add_argument
    add("--sites", nargs="+", type=_site, metavar="NxCxHxW", help="shapes of x (default: --list)")
    add("--dtype", nargs="+", choices=("float32", "bfloat16"),
        help="of x and the parameters (default: float32)")  # fmt: skip
    add("--mode", nargs="+", choices=("inference", "training"), help="what to time (default: both)")
    add("--presets", nargs="+", choices=("paper", "official"), help="of the module (default: all)")
    add("--peers", nargs="+", choices=("eager", "compile", "onnxruntime", "openvino"),
        help="whom to time beside ours (default: all that are installed)")  # fmt: skip
    add("--threads", type=_positive, help="threads of every side (default: 2)")
    add("--rounds", type=_positive, help="times taken of each side (default: 8)")
    add("--least-ms", type=_positive, help="a time's least duration (default: 20)")
    add("--backend", choices=("cpp", "reference"),
        help="what ours runs on; reference tries the benchmark itself (default: cpp)")  # fmt: skip
    size = bench.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true",
        help="two sites, inference, eager and torch.compile: less than a minute")  # fmt: skip
    size.add_argument("--smoke", action="store_true", help="a toy: does everything run?")
    add("--no-memory", action="store_true", help="leave out peak memory, measured in processes")
    add("--json", type=Path, metavar="FILE", help="write every figure there")
    add("--plot", type=Path, metavar="FILE.png", help="draw times and the machine's limits there")
    add("--check", action="store_true", help="judge the bars; exit status 1 if one is missed")
    add("--list", action="store_true", help="say what would run, and which peers are there")
    bench.set_defaults(run=_bench)


def _site(text: str) -> tuple[int, int, int, int]:
    size = shape_of(text)
    if size is None or size[1] < 16:
        raise argparse.ArgumentTypeError(
            f"expected NxCxHxW with C of at least 16, such as 8x256x56x56, got {text!r}"
        )
    return size


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _options(args: argparse.Namespace) -> Options:
    from bam_kernels.benchmarking.cpu import run

    options = run.QUICK if args.quick else run.SMOKE if args.smoke else run.Options()
    given = {
        "sites": args.sites, "dtypes": args.dtype, "modes": args.mode, "presets": args.presets,
        "peers": args.peers, "threads": args.threads, "rounds": args.rounds,
        "least_ms": args.least_ms, "backend": args.backend,
    }  # fmt: skip
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if v is not None}
    if args.no_memory:
        given["memory"] = False
    return dataclasses.replace(options, **given)


def _bench(args: argparse.Namespace) -> int:
    for package in ("rich", *(("matplotlib",) if args.plot is not None else ())):
        if importlib.util.find_spec(package) is None:
            return error("bench", f"{package} is not installed; pip install 'bam_kernels[bench]'")
    for name in ("json", "plot"):
        path = getattr(args, name)
        if path is not None and not path.resolve().parent.is_dir():
            return error("bench", f"--{name}: no such folder: {path.resolve().parent}")
        if path is not None and path.is_dir():
            return error("bench", f"--{name}: expected a file, got the folder {path}")
        if path is not None and not os.access(path.resolve().parent, os.W_OK):
            return error("bench", f"--{name}: the folder {path.resolve().parent} is not writable")

    if args.plot is not None and args.plot.suffix.lower() != ".png":
        return error("bench", f"--plot: expected a name that ends in .png, got {args.plot}")

    from rich.console import Console

    from bam_kernels.benchmarking.cpu import peers, report, run
    from bam_kernels.files import replacing

    options, out = _options(args), Console(width=None if sys.stdout.isatty() else _WIDTH)
    if args.list:
        out.print("sites: " + " ".join("x".join(map(str, size)) for size in options.sites))
        for peer in peers.PEERS:
            out.print(f"{peer}: {peers.missing(peer) or 'ready'}", markup=False)
        return 0
    try:
        result = run.run(options, Console(stderr=True))
    except peers.NO_BACKEND as problem:
        return error("bench", str(problem))
    if args.json is not None:
        with replacing(args.json) as part:
            part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    report.show(result, out)
    if args.plot is not None:
        from bam_kernels.benchmarking import plot

        plot.draw(result, args.plot)
        out.print(f"picture: {args.plot}", markup=False)
    if args.check:
        report.show_bars(result["bars"], out)
        return 0 if all(each["pass"] for each in result["bars"]) else FAILED
    return 0
