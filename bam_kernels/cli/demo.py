"""``python -m bam_kernels demo``."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bam_kernels.cli.output import FAILED, error, print_table, progress, say

if TYPE_CHECKING:
    from bam_kernels.demo import Part, Report


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command and its options."""
    demo = commands.add_parser(
        "demo",
        help="compare fused BAMs with plain PyTorch in a ResNet-50, and draw their attention",
        description="Run a training step and an inference of a ResNet-50 with BAM, on the fused "
        "kernels and in plain PyTorch; compare both with float64; draw the attention maps. Without "
        "a GPU the C++ kernels run, which a C++ compiler builds the first time; where there is "
        "none, Triton's in its interpreter (a minute or two).",
        epilog="Exit status: 0 where the two agree, 1 where they do not, 2 for bad arguments or "
        "missing packages.",
    )
    add = demo.add_argument
    add(
        "image",
        nargs="?",
        type=Path,
        metavar="IMAGE",
        help="a photograph (default: one that comes with scikit-image or matplotlib)",
    )
    add(
        "--output",
        type=Path,
        metavar="DIR",
        default=Path("demo_output"),
        help="the folder for attention.png and results.json (default: %(default)s)",
    )
    add(
        "--pretrained",
        action="store_true",
        help="ImageNet weights from torchvision, which downloads them, in place of random ones",
    )
    add(
        "--device",
        default="auto",
        help="auto, cpu, cuda, cuda:1, xpu, ...; auto, the default, takes a GPU where there is one",
    )
    add(
        "--backend",
        choices=("auto", "triton", "cpp"),
        default="auto",
        help="the kernels: triton, on a CPU in its interpreter; cpp, on a CPU; auto, the default, "
        "takes triton on a GPU and cpp on a CPU",
    )
    add(
        "--preset",
        choices=("paper", "official"),
        default="paper",
        help="BAM as the paper prints it (Eq. 1-4), or as the authors' code has it "
        "(default: %(default)s)",
    )
    add(
        "--size",
        type=int,
        default=224,
        metavar="PIXELS",
        help="the views' sides (default: %(default)s)",
    )
    add("--batch", type=int, default=4, metavar="N", help="how many views (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the weights and the views (default: %(default)s)")
    demo.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> int:
    from bam_kernels import demo

    options = demo.Options(**{k: v for k, v in vars(args).items() if k != "run"})
    try:
        device, backend = demo.resolve(options, say)
        if backend == "triton" and device.type == "cpu" and "TRITON_INTERPRET" not in os.environ:
            os.environ["TRITON_INTERPRET"] = "1"
            if "triton" in sys.modules:  # Triton read the variable when it was imported
                return _again(args)
        with progress(demo.STEPS) as step:
            report = demo.run(options, step)
    except demo.DemoError as problem:
        return error("demo", str(problem))
    _print_report(report)
    if report.failures:
        for part, found in report.failures:
            print(
                f"bam_kernels demo: parity failed: {part.name}, {found.what}: error "
                f"{found.fused:.1e}, bar {found.bar:.1e}",
                file=sys.stderr,
            )
        return FAILED
    return 0


def _again(args: argparse.Namespace) -> int:
    """The same command in a fresh process, which sees the environment as it is now."""
    words = []
    for name in ("output", "device", "backend", "preset", "size", "batch", "seed"):
        words += [f"--{name}={getattr(args, name)}"]
    words += ["--pretrained"] if args.pretrained else []
    words += [] if args.image is None else ["--", str(args.image)]
    command = [sys.executable, "-m", "bam_kernels", "demo", *words]
    return subprocess.call(command)


def _print_report(report: Report) -> None:
    clock = "interpreted, not a speed" if report.interpreted else "medians"
    print(f"photograph: {report.source}")
    print(f"device: {report.device}")
    print()
    print_table(
        "Parity: relative error against float64",
        ("", "", "fused", "PyTorch", "bar", ""),
        [_parity_rows(part) for part in report.parts],
    )
    print_table(
        f"Cost of one training step (fused times: {clock})",
        ("", "backend", "", "forward ms", "backward ms", "kept MiB", "of it the input"),
        [_cost_rows(part) for part in report.parts],
    )
    print("kept: bytes that autograd holds between forward and backward, without parameters")
    print(f"numbers: {report.results}")
    print(f"picture: {report.picture}")


def _parity_rows(part: Part) -> list[list[str]]:
    titles = [part.name, f"{list(part.shape)}"]
    titles += [""] * (len(part.comparisons) - len(titles))
    return [
        [
            title,
            found.what,
            f"{found.fused:.1e}",
            f"{found.pytorch:.1e}",
            f"{found.bar:.1e}",
            "ok" if found.passed else "FAILED",
        ]
        for title, found in zip(titles, part.comparisons, strict=True)
    ]


def _cost_rows(part: Part) -> list[list[str]]:
    mib = 2.0**20
    rows = [(part.name, part.backend, "fused", part.fused), ("", "", "PyTorch", part.pytorch)]
    return [
        [
            *words,
            f"{cost.forward * 1e3:.1f}",
            f"{cost.backward * 1e3:.1f}",
            f"{cost.kept / mib:.2f}",
            f"{cost.kept_input / mib:.2f}",
        ]
        for *words, cost in rows
    ]
