"""``python -m bam_kernels train``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from bam_kernels.cli import arguments
from bam_kernels.cli.output import FAILED, error, print_table

ATTENTION = ("none", "bam", "bam-c", "se", "block")


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command and its options."""
    train = commands.add_parser(
        "train",
        help="train a network with or without BAM: CIFAR-100, ImageNet, or small data at hand",
        description="Train by a recipe: cifar100 and imagenet are the paper's, digits and textures "
        "run anywhere in minutes. --show prints a recipe's hyper-parameters and where each comes "
        "from. A stopped run goes on with --resume and ends with the same numbers as one that was "
        "not. Several processes: torchrun --nproc-per-node N -m bam_kernels train ...",
        epilog="Exit status: 0 done; 1 the loss is no longer a number; 2 bad arguments, data, or a "
        "folder that holds another run, and then nothing is overwritten.",
    )
    add = train.add_argument
    add("--recipe", required=True, metavar="NAME", help="cifar100, imagenet, digits or textures")
    add("--show", action="store_true", help="print the recipe with its sources, and stop")
    add("--model", metavar="NAME", help="the network (default: the recipe's)")
    add("--attention", choices=ATTENTION, default="none",
        help="none; bam, at the bottlenecks; bam-c or se, in every block; block, Table 1c's extra "
        "block in each BAM's place (default: %(default)s)")  # fmt: skip
    add_module_options(train)
    add("--data", type=Path, metavar="DIR",
        help="the folder with cifar-100-python, or with ImageNet's train and val")  # fmt: skip
    add("--download", action="store_true", help="let torchvision fetch CIFAR-100 into --data")
    add("--out", type=Path, metavar="DIR", default=Path("runs/train"),
        help="the run's folder: settings.json, checkpoint.pth, metrics.csv, timing.csv "
        "(default: %(default)s)")  # fmt: skip
    either = train.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true",
        help="go on with the run in --out, after its last whole epoch")  # fmt: skip
    either.add_argument("--force", action="store_true", help="write over the run in --out")
    add("--epochs", type=arguments.positive, metavar="N",
        help="in place of the recipe's; its milestones keep their share")  # fmt: skip
    add("--milestones", type=arguments.positive, nargs="+", metavar="EPOCH",
        help="before which the learning rate is divided, counted from 0")  # fmt: skip
    add("--batch", type=arguments.positive, metavar="N",
        help="images a step, over all processes together")  # fmt: skip
    add("--lr", type=arguments.above_zero, metavar="X", help="the learning rate at first")
    add("--weight-decay", type=arguments.not_below_zero, metavar="X", help="of every parameter")
    add("--seed", type=arguments.whole, default=0,
        help="of weights, order and augmentation (default: %(default)s)")  # fmt: skip
    add("--amp", choices=("bf16", "fp16"),
        help="automatic mixed precision; fp16 with a gradient scaler")  # fmt: skip
    add("--channels-last", action="store_true", help="the memory format of images and weights")
    add("--sync-bn", action="store_true",
        help="batch statistics over all processes' images; on GPUs")  # fmt: skip
    add("--device", default="auto",
        help="auto, cpu, cuda, cuda:1, ...; auto, the default, takes a GPU where there is "
        "one")  # fmt: skip
    add("--workers", type=arguments.whole, default=0, metavar="N",
        help="processes that load images (default: 0, none beside this one)")  # fmt: skip
    add("--benchmark", action="store_true",
        help="let cuDNN choose its fastest algorithms: the numbers of two runs may then "
        "differ")  # fmt: skip
    add("--tensorboard", action="store_true", help="log to DIR/tensorboard as well")
    add("--log-every", type=arguments.whole, default=0, metavar="STEPS",
        help="a line every so many steps where stderr is no terminal (default: none)")  # fmt: skip
    train.set_defaults(run=_train)


def add_module_options(parser: argparse.ArgumentParser) -> None:
    """BAM's options of the paper's Table 1; only those that are given are passed on."""
    group = parser.add_argument_group("options of the attention's module (Table 1)")
    add, unset = group.add_argument, {"default": argparse.SUPPRESS}
    add("--reduction", type=arguments.positive, help="r of BAM and SE", **unset)
    add("--dilation", type=arguments.positive, help="d of BAM", **unset)
    add("--combine", choices=("sum", "product", "max", "sigmoid_sum"), **unset)
    add("--preset", help="whose BAM: paper, official, ...", **unset)
    add("--no-channel", dest="channel", action="store_false", help="the spatial branch alone",
        **unset)  # fmt: skip
    add("--no-spatial", dest="spatial", action="store_false", help="the channel branch alone",
        **unset)  # fmt: skip
    add("--no-residual", dest="residual", action="store_false", help="F * M, without the identity",
        **unset)  # fmt: skip


def module_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_module_options` found on the command line."""
    names = ("reduction", "dilation", "combine", "preset", "channel", "spatial", "residual")
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def _train(args: argparse.Namespace) -> int:
    from bam_kernels.recipes import DivergedError, RecipeError
    from bam_kernels.recipes.distributed import group
    from bam_kernels.recipes.engine import Precision
    from bam_kernels.recipes.run import run
    from bam_kernels.recipes.settings import Place, Settings

    try:
        recipe = _recipe(args)
        if args.show:
            rows = recipe.rows()
            print_table(f"recipe {recipe.name}", ("", "value", "source"), [rows], width=160)
            return 0
        settings = Settings(
            recipe,
            args.model or recipe.model,
            None if args.attention == "none" else args.attention,
            module_options(args),
            args.seed,
            Precision(args.amp, args.channels_last),
            args.sync_bn,
        )
        place = Place(
            args.out, args.data, args.resume, args.force, args.workers, args.download,
            args.tensorboard, args.benchmark, args.log_every,
        )  # fmt: skip
        with group(args.device) as processes:
            rows = run(settings, place, processes)
            if processes.first:
                last = rows[-1]
                print(f"test error: {last['test_top1_error']:.2f} % after {len(rows)} epochs")
                print(f"checkpoint: {args.out / 'checkpoint.pth'}")
    except RecipeError as problem:
        return error("train", str(problem))
    except DivergedError as problem:
        print(f"bam_kernels train: {problem}", file=sys.stderr)
        return FAILED
    return 0


def _recipe(args: argparse.Namespace) -> Any:
    from bam_kernels.recipes import RECIPES, RecipeError

    if args.recipe not in RECIPES:
        raise RecipeError(f"--recipe: expected one of {', '.join(RECIPES)}, got {args.recipe!r}")
    return RECIPES[args.recipe].changed(
        epochs=args.epochs,
        milestones=args.milestones,
        batch=args.batch,
        lr=args.lr,
        weight_decay=args.weight_decay,
    )
