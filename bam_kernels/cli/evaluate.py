"""``python -m bam_kernels evaluate``."""

from __future__ import annotations

import argparse
from pathlib import Path

from bam_kernels.cli import arguments
from bam_kernels.cli.output import error


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command and its options."""
    evaluate = commands.add_parser(
        "evaluate",
        help="the test error of a network that train has trained",
        description="Build the network that a checkpoint of train names, load its weights, and "
        "evaluate it on the test set of its recipe. Nothing in the checkpoint is run as code.",
        epilog="Exit status: 0 done; 2 bad arguments, checkpoint or data.",
    )
    add = evaluate.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint.pth, or its folder")
    add("--data", type=Path, metavar="DIR",
        help="the folder with cifar-100-python, or with ImageNet's train and val")  # fmt: skip
    add("--batch", type=arguments.positive, metavar="N", help="images (default: the recipe's)")
    add("--amp", choices=("bf16", "fp16"), help="automatic mixed precision")
    add("--device", default="auto", help="auto (the default), cpu, cuda, ...")
    add("--workers", type=arguments.whole, default=0, metavar="N",
        help="processes that load images (default: 0)")  # fmt: skip
    evaluate.set_defaults(run=_evaluate)


def _evaluate(args: argparse.Namespace) -> int:
    from bam_kernels.recipes import RecipeError
    from bam_kernels.recipes.distributed import group
    from bam_kernels.recipes.engine import Precision
    from bam_kernels.recipes.evaluation import evaluate_checkpoint

    path = args.checkpoint / "checkpoint.pth" if args.checkpoint.is_dir() else args.checkpoint
    try:
        with group(args.device) as processes:
            found = evaluate_checkpoint(
                path,
                args.data,
                processes,
                precision=Precision(args.amp),
                batch=args.batch,
                workers=args.workers,
            )
            if processes.first:
                scores, network = found.scores, found.network
                print(f"{network['name']}, attention {network['attention']}, epoch {found.epoch}, "
                      f"{found.images} test images of {found.dataset}")  # fmt: skip
                print(f"loss: {scores.loss:.4f}")
                print(f"top-1 error: {scores.top1_error:.2f} %")
                print(f"top-5 error: {scores.top5_error:.2f} %")
    except RecipeError as problem:
        return error("evaluate", str(problem))
    return 0
