"""Parity, sanitizer, bandwidth, times, memory and launch tables of bam_kernels on this machine's
GPU, in one bounded run.

    python benchmarks/gpu.py --help

The exit status is 0 where all is right, 1 where a test or a check of a result failed (what could be
measured was), 2 where the run could not begin; then one line on stderr says why and nothing is
written.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = (
    "environment", "matrix", "parity", "sanitizer", "bandwidth", "times", "kernels", "profile",
    "sweep", "compile", "tuned",
)  # fmt: skip
MEASURED = {"times", "kernels", "profile", "sweep", "compile", "tuned"}
KERNELS = ("pool_reduce", "gate", "gate_backward_reduce", "input_gradient")


def _names(text: str) -> list[str]:
    return [name for name in (part.strip() for part in text.split(",")) if name]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="gpu.py",
        description="Check bam_kernels on this machine's GPU against float64, with its tests and "
        "under compute-sanitizer, measure it beside its peers, search for better launch tables and "
        "measure those too; JSON and a table come out.",
        epilog="Sections: environment; matrix, modules of all dtypes, layouts and options against "
        "float64; parity, the test suite; sanitizer, memcheck and racecheck where the tool works; "
        "bandwidth of a copy; times, fused beside eager; kernels, each alone; profile, where the "
        "time of a call goes; sweep, over tiles, warps and stages; compile, torch.compile and the "
        "sweep's tiles among the peers; tuned, the sweep's tiles in the cases that compile left "
        "out.",
    )
    p.add_argument(
        "--output",
        type=Path,
        help="the JSON; default gpu-DEVICE-COMMIT.json in $OUT, the folder for results, if set, "
        "and in benchmarks/results otherwise",
    )
    p.add_argument(
        "--budget",
        type=float,
        default=540.0,
        metavar="SECONDS",
        help="wall time of the whole run; what does not fit is left out, and said (default 540)",
    )
    p.add_argument(
        "--sections",
        type=_names,
        metavar="NAMES",
        help=f"comma-separated, of {', '.join(SECTIONS)}; default all; what is timed is held "
        "against the copy's bandwidth, which is then always measured; tuned needs sweep",
    )
    p.add_argument("--quick", action="store_true", help="batch 32 and float16 alone")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    p.add_argument(
        "--smoke",
        action="store_true",
        help="toy shapes, to see that every part runs; with --device cpu under Triton's "
        "interpreter; the JSON is marked as no measurement",
    )
    p.add_argument("--commit", help="the commit to name; default what git tells")
    p.add_argument(
        "--seed",
        type=int,
        help="of the parity matrix's first row, to repeat what failed; default a new one",
    )
    p.add_argument("--rounds", type=int, default=20, help="times taken of each peer (default 20)")
    p.add_argument(
        "--tests",
        type=_names,
        metavar="PATHS",
        help="what parity runs, from the repository's root; default the files that run kernels on "
        "the GPU",
    )
    p.add_argument(
        "--parity-seconds",
        type=float,
        default=150.0,
        help="the most that the tests may take (default 150)",
    )
    p.add_argument(
        "--test-workers", type=int, default=4, help="processes of pytest-xdist (default 4)"
    )
    p.add_argument(
        "--workers",
        type=int,
        help="processes that check and compile before the device must be quiet; with 0 checks run "
        "in the one process and nothing is compiled ahead (default as many as the machine has "
        "cores, less 4, from 2 to 12; 0 in a smoke run)",
    )
    narrow = p.add_argument_group("narrowing (comma-separated; default all)")
    narrow.add_argument("--sites", type=_names, metavar="NAMES", help="layer1, layer2, layer3")
    narrow.add_argument("--batches", type=_names, metavar="N", help="256, 32, or others")
    narrow.add_argument("--dtypes", type=_names, metavar="NAMES", help="float16, bfloat16, float32")
    narrow.add_argument("--layouts", type=_names, metavar="NAMES", help="channels_last, nchw")
    narrow.add_argument("--modes", type=_names, metavar="NAMES", help="training, inference")
    narrow.add_argument("--presets", type=_names, metavar="NAMES", help="paper, official")
    narrow.add_argument("--kernels", type=_names, metavar="NAMES", help=", ".join(KERNELS))
    narrow.add_argument(
        "--candidates", type=int, metavar="N", help="tiles that the sweep tries a kernel and shape"
    )
    return p


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked; exits with status 2 and a message where it is wrong."""
    p = parser()
    args = p.parse_args(argv)
    args.sections = args.sections or list(SECTIONS)
    for option, known in (("sections", SECTIONS), ("kernels", KERNELS)):
        unknown = set(getattr(args, option) or ()) - set(known)
        if unknown:
            p.error(f"--{option}: expected names among {', '.join(known)}, got {sorted(unknown)}")
    if set(args.sections) & MEASURED:
        args.sections.append("bandwidth")
    args.sections = [name for name in SECTIONS if name in args.sections]
    args.kernels = tuple(args.kernels or KERNELS)
    if args.budget <= 0 or args.rounds < 1:
        p.error("--budget, --rounds: expected more than 0")
    if args.workers is None:
        args.workers = 0 if args.smoke else max(2, min(12, (os.cpu_count() or 1) - 4))
    if args.workers < 0 or args.test_workers < 1:
        p.error("--workers: expected at least 0; --test-workers: expected at least 1")
    if args.device == "cpu" and not args.smoke:
        p.error("--device cpu measures nothing: it goes with --smoke")
    return args


def cannot_run(reason: str) -> int:
    """Say in one line why nothing was measured; the exit status."""
    print(f"gpu.py: {reason}", file=sys.stderr)
    return 2


def main(argv: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    args = parse(argv)
    for name in ("torch", "triton", "pytest"):
        if importlib.util.find_spec(name) is None:
            return cannot_run(f"{name} is not installed for {sys.executable}")
    if args.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    else:
        os.environ.pop("TRITON_INTERPRET", None)
    sys.path.insert(0, str(ROOT))

    import gpu_run

    if args.device == "cuda" and not gpu_run.has_gpu():
        return cannot_run("no NVIDIA GPU: torch.cuda.is_available() is False")
    try:
        selection = gpu_run.select(args)
    except ValueError as error:
        return cannot_run(str(error))
    return gpu_run.Run(args, selection, started).run()


if __name__ == "__main__":
    sys.exit(main())
