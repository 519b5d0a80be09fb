"""With and without BAMs, from the same seeds: the options of that, and the comparison."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from _common import Parser


def add_options(parser: Parser) -> None:
    """``--attention`` for one training, ``--compare`` for several."""
    add = parser.add_argument
    add("--attention", choices=("bam", "none"), default="bam", help="(default: %(default)s)")
    add(
        "--compare",
        type=int,
        default=0,
        metavar="SEEDS",
        help="train with and without BAMs from each of so many seeds, and compare",
    )


def compare(args: argparse.Namespace, name: str, run: Callable[[bool], float]) -> None:
    """Call ``run(with BAMs)``, which trains and gives the figure on held-out data.

    Once, or, under ``--compare``, both ways from each seed, from the same draws of weights and
    data; then the means over the seeds, and of the differences seed by seed.
    """
    if args.compare < 1:
        torch.manual_seed(args.seed)
        run(args.attention == "bam")
        return
    found: dict[bool, list[float]] = {False: [], True: []}
    for seed in range(args.seed, args.seed + args.compare):
        for bam, figures in found.items():
            torch.manual_seed(seed)
            figures.append(run(bam))
    without, with_bam = (torch.tensor(figures, dtype=torch.float64) for figures in found.values())
    for title, values in (
        ("without BAMs", without),
        ("with BAMs", with_bam),
        ("difference", with_bam - without),
    ):
        spread = f", standard deviation {values.std():.3f}" if len(values) > 1 else ""
        print(f"{name}, {title}, seeds: {len(values)}, mean: {values.mean():.3f}{spread}")
