"""``python -m bam_kernels study``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bam_kernels.cli import arguments
from bam_kernels.cli.output import error, print_table

if TYPE_CHECKING:
    from bam_kernels.recipes.study import Study


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command and its options."""
    study = commands.add_parser(
        "study",
        help="a network with SE, BAM-C, BAM and nothing, over several seeds: errors and intervals",
        description="Train the same network without attention, with SE, BAM-C and BAM, by the same "
        "recipe, over several seeds, and report the test errors with their 95 % intervals, "
        "parameters and step times, as they come out: a table, study.json and study.png. At its "
        "defaults it takes less than half an hour on two cores. A stopped study goes on with "
        "--resume; more --seeds may be added to a whole one.",
        epilog="Exit status: 0 done, whatever the outcome; 2 bad arguments, data, or a folder that "
        "holds another study, and then nothing is overwritten.",
    )
    add = study.add_argument
    add("--recipe", default="textures", metavar="NAME",
        help="textures (the default): from which of 17 photographs is a patch; digits, cifar100, "
        "imagenet")  # fmt: skip
    add("--model", metavar="NAME", help="the network (default: the recipe's)")
    add("--reduction", type=arguments.positive, default=4,
        help="r of SE and BAM: 4, the default, since the small network's stages are 16 to 64 wide; "
        "16 in the paper, where they are 256 and more")  # fmt: skip
    add("--seeds", type=arguments.positive, default=5, metavar="N",
        help="runs of each (default: %(default)s)")  # fmt: skip
    add("--epochs", type=arguments.positive, metavar="N", help="(default: the recipe's)")
    add("--batch", type=arguments.positive, metavar="N", help="(default: the recipe's)")
    add("--lr", type=arguments.above_zero, metavar="X", help="(default: the recipe's)")
    add("--data", type=Path, metavar="DIR", help="as for train")
    add("--device", default="cpu", help="as for train (default: %(default)s)")
    add("--processes", type=arguments.positive, metavar="N",
        help="runs at a time (default: one a core)")  # fmt: skip
    add("--threads", type=arguments.positive, default=1, help="of a run (default: %(default)s)")
    add("--out", type=Path, metavar="DIR", default=Path("runs/study"),
        help="the study's folder (default: %(default)s)")  # fmt: skip
    either = study.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true", help="go on with the study in --out")
    either.add_argument("--force", action="store_true", help="write over the study in --out")
    study.set_defaults(run=_study)


def _study(args: argparse.Namespace) -> int:
    from bam_kernels.recipes import RECIPES, RecipeError, data, study, study_report
    from bam_kernels.recipes.distributed import device_of
    from bam_kernels.recipes.errors import need
    from bam_kernels.recipes.networks import names

    try:
        if args.recipe not in RECIPES:
            raise RecipeError(
                f"--recipe: expected one of {', '.join(RECIPES)}, got {args.recipe!r}"
            )
        recipe = RECIPES[args.recipe].changed(epochs=args.epochs, batch=args.batch, lr=args.lr)
        model = args.model or recipe.model
        if model not in names():
            raise RecipeError(f"--model: expected one of {', '.join(names())}, got {model!r}")
        device_of(args.device)
        need("the study", "matplotlib", "scipy", "tqdm")
        plan = study.Study(
            recipe, model, args.reduction, args.seeds, args.out, args.data,
            args.processes or len(os.sched_getaffinity(0)), args.threads, args.device,
        )  # fmt: skip
        loaded = data.load(recipe.dataset, args.data)
        counted = study.parameters(plan, loaded.num_classes, loaded.in_channels)
        study.begin(plan, resume=args.resume, force=args.force)
        _train_all(plan)
        errors = {name: plan.errors(name) for name in study.names()}
        seconds = study.step_seconds(plan)
    except RecipeError as problem:
        return error("study", str(problem))

    from bam_kernels.benchmarking.cpu.machine import environment

    found = study_report.summary(errors, counted, seconds)
    outcome = {
        "what": "test errors in % after the last epoch, by seed; step_ms is the median training "
        "step on a batch of noise, the variants in turns",
        **environment(args.threads),
        "settings": {**plan.record(), "seeds": args.seeds},
        "test_images": len(loaded.test),
        "variants": found,
    }
    study_report.write(args.out / "study.json", outcome)
    study_report.draw(args.out / "study.png", outcome)
    title = f"{model} on {recipe.dataset}, {args.seeds} seeds, {recipe.epochs} epochs"
    print_table(title, study_report.COLUMNS, [study_report.rows(found)], width=130)
    print(f"numbers: {args.out / 'study.json'}")
    print(f"plot: {args.out / 'study.png'}")
    return 0


def _train_all(plan: Study) -> None:
    from tqdm import tqdm

    from bam_kernels.recipes import study
    from bam_kernels.recipes.progress import say

    total = len(plan.runs()) * plan.recipe.epochs
    # disable=None: no bar where stderr is no terminal.
    with tqdm(total=total, unit="epoch", disable=None, file=sys.stderr) as bar:

        def tell(done: int, line: str | None) -> None:
            bar.update(done - bar.n)
            if line is not None:
                say(line)

        study.train_all(plan, tell)
