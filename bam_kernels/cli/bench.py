"""``python -m bam_kernels bench``."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bam_kernels.cli import arguments
from bam_kernels.cli.output import FAILED, error, print_table

if TYPE_CHECKING:
    from rich.console import Console

    from bam_kernels.benchmarking.cpu import run as cpu_run
    from bam_kernels.benchmarking.gpu import bench as gpu_bench

_WIDTH = 210  # of the tables where no terminal sets it


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command and its options."""
    bench = commands.add_parser(
        "bench",
        help="time BAM beside eager PyTorch, torch.compile, ONNX Runtime and OpenVINO",
        description="Time BAM on the GPU, if there is one, and on the CPU, beside the plain "
        "PyTorch module, eager and under torch.compile; on the GPU each also as a CUDA graph, on "
        "the CPU beside ONNX Runtime and OpenVINO as well: the same weights, compared with float64 "
        "first, in turns in one process. Ratios are the fastest peer's median over ours; rates "
        "stand beside those of a copy and a matrix product of the same run.",
        epilog="Exit status: 0 done; 1 a bar missed under --check, or wrong numbers on a GPU; 2 a "
        "bad argument, or nothing that could be timed. All that a GPU can tell, with its tests "
        "and a search for better launch tables: benchmarks/gpu.sh.",
    )
    add = bench.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto",
        help="where to time (default: the GPU, if there is one, then the CPU)")  # fmt: skip
    add("--sites", nargs="+", type=arguments.site, metavar="NxCxHxW",
        help="shapes of x (default: --list)")  # fmt: skip
    add("--dtype", nargs="+", choices=("float32", "bfloat16", "float16"),
        help="of x and parameters (default: float32; on a GPU float16 and float32)")  # fmt: skip
    add("--mode", nargs="+", choices=("inference", "training"), help="what to time (default: both)")
    add("--presets", nargs="+", choices=("paper", "official"), help="of the module (default: all)")
    add("--peers", nargs="+", choices=("eager", "compile", "onnxruntime", "openvino"),
        help="whom to time beside ours (default: all that are installed)")  # fmt: skip
    add("--threads", type=arguments.positive, help="threads of every side (default: 2)")
    add("--rounds", type=arguments.positive,
        help="times taken of each side (default: 8, on a GPU 20)")  # fmt: skip
    add("--least-ms", type=arguments.positive,
        help="a time's least duration (default: 20, on a GPU 2)")  # fmt: skip
    add("--backend", choices=("cpp", "reference"),
        help="what ours runs on, on the CPU; reference tries the benchmark")  # fmt: skip
    size = bench.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true",
        help="two sites, inference, eager and torch.compile: less than a minute")  # fmt: skip
    size.add_argument("--smoke", action="store_true", help="a toy: does everything run?")
    add("--no-memory", action="store_true",
        help="leave out the CPU's peak memory, measured in processes")  # fmt: skip
    add("--json", type=Path, metavar="FILE",
        help="write every figure there; of two devices, the GPU's to FILE-gpu")  # fmt: skip
    add("--plot", type=Path, metavar="FILE.png",
        help="draw times and limits there; of two devices, the GPU's to FILE-gpu.png")  # fmt: skip
    add("--check", action="store_true",
        help="judge the CPU's bars; exit status 1 if one is missed")  # fmt: skip
    add("--list", action="store_true", help="say what would run, and which peers are there")
    bench.set_defaults(run=_bench)


def _given(args: argparse.Namespace, names: dict[str, str]) -> dict[str, Any]:
    """What the command line says, by the options' names."""
    found = {name: getattr(args, argument) for name, argument in names.items()}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in found.items() if v is not None}


_SHARED = {
    "sites": "sites", "dtypes": "dtype", "modes": "mode", "presets": "presets", "peers": "peers",
    "rounds": "rounds", "least_ms": "least_ms",
}  # fmt: skip


def _cpu_options(args: argparse.Namespace) -> cpu_run.Options:
    from bam_kernels.benchmarking.cpu import run

    options = run.QUICK if args.quick else run.SMOKE if args.smoke else run.Options()
    given = _given(args, {**_SHARED, "threads": "threads", "backend": "backend"})
    if args.no_memory:
        given["memory"] = False
    return dataclasses.replace(options, **given)


def _gpu_options(args: argparse.Namespace) -> gpu_bench.Options:
    from bam_kernels.benchmarking.gpu import bench

    options = bench.QUICK if args.quick else bench.SMOKE if args.smoke else bench.Options()
    return dataclasses.replace(options, **_given(args, _SHARED))


def _bench(args: argparse.Namespace) -> int:
    for package in ("rich", *(("matplotlib",) if args.plot is not None else ())):
        if importlib.util.find_spec(package) is None:
            return error("bench", f"{package} is not installed; pip install 'bam_kernels[bench]'")
    for option, path in (("--json", args.json), ("--plot", args.plot)):
        problem = arguments.unwritable(option, path)
        if problem is not None:
            return error("bench", problem)
    if args.plot is not None and args.plot.suffix.lower() != ".png":
        return error("bench", f"--plot: expected a name that ends in .png, got {args.plot}")

    import torch

    has_gpu = torch.cuda.is_available()
    if args.device == "cuda" and not has_gpu:
        return error("bench", "--device cuda: expected an NVIDIA GPU, got none that torch sees")
    on_gpu, on_cpu = has_gpu and args.device != "cpu", args.device != "cuda"
    problem = _unsuited(args, on_gpu, on_cpu)
    if problem is not None:
        return error("bench", problem)

    from rich.console import Console

    out = Console(width=None if sys.stdout.isatty() else _WIDTH)
    if args.list:
        return _list(args, out, on_gpu, on_cpu)
    status = 0
    if on_gpu:
        suffix = "-gpu" if on_cpu else ""
        status = _on_gpu(args, out, *(_beside(path, suffix) for path in (args.json, args.plot)))
    return max(status, _on_cpu(args, out)) if on_cpu else status


def _unsuited(args: argparse.Namespace, on_gpu: bool, on_cpu: bool) -> str | None:
    """What is asked for and is not of the devices that are measured."""
    if on_cpu and "float16" in (args.dtype or ()):
        return "--dtype float16: expected a GPU's run (--device cuda), got one of the CPU"
    only_cpu = {"onnxruntime", "openvino"} & set(args.peers or ())
    if on_gpu and only_cpu:
        return f"--peers {min(only_cpu)}: expected eager or compile on a GPU; use --device cpu"
    if args.check and not on_cpu:
        return "--check: expected a run on the CPU, whose bars it judges, got --device cuda"
    return None


def _beside(path: Path | None, suffix: str) -> Path | None:
    return None if path is None else path.with_name(f"{path.stem}{suffix}{path.suffix}")


def _list(args: argparse.Namespace, out: Console, on_gpu: bool, on_cpu: bool) -> int:
    from bam_kernels.benchmarking.cpu import peers

    for options in (_gpu_options(args) if on_gpu else None, _cpu_options(args) if on_cpu else None):
        if options is not None:
            out.print("sites: " + " ".join("x".join(map(str, size)) for size in options.sites))
    for peer in peers.PEERS if on_cpu else ():
        out.print(f"{peer}: {peers.missing(peer) or 'ready'}", markup=False)
    return 0


def _write(path: Path | None, result: dict[str, Any]) -> None:
    from bam_kernels.files import replacing

    if path is not None:
        with replacing(path) as part:
            part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _on_gpu(args: argparse.Namespace, out: Console, file: Path | None, plot: Path | None) -> int:
    from rich.console import Console

    from bam_kernels.benchmarking import results
    from bam_kernels.benchmarking.gpu import bench

    result = bench.run(_gpu_options(args), Console(stderr=True))
    _write(file, result)
    found = results.Results(file or Path("gpu"), "gpu", result)
    header, rows = results.gpu_rows(result)
    groups: dict[tuple[str, ...], list[list[str]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[:3]), []).append(row)
    print_table(
        f"ms; ratios above 1: the fused module is faster. {results.provenance(found)}",
        header, list(groups.values()), _WIDTH,
    )  # fmt: skip
    if plot is not None:
        from bam_kernels.benchmarking.plot import draw

        draw(result, plot)
        out.print(f"picture: {plot}", markup=False)
    wrong = bench.wrong(result)
    for line in wrong:
        print(line, file=sys.stderr)
    return FAILED if wrong else 0


def _on_cpu(args: argparse.Namespace, out: Console) -> int:
    from rich.console import Console

    from bam_kernels.benchmarking.cpu import peers, report, run

    try:
        result = run.run(_cpu_options(args), Console(stderr=True))
    except peers.NO_BACKEND as problem:
        return error("bench", str(problem))
    _write(args.json, result)
    report.show(result, out)
    if args.plot is not None:
        from bam_kernels.benchmarking import plot

        plot.draw(result, args.plot)
        out.print(f"picture: {args.plot}", markup=False)
    if args.check:
        report.show_bars(result["bars"], out)
        return 0 if all(each["pass"] for each in result["bars"]) else FAILED
    return 0
