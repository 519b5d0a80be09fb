"""``python -m bam_kernels compare``: what SE, BAM-C and BAM cost a network (Table 10)."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

from bam_kernels.cli import arguments, networks
from bam_kernels.cli.output import FAILED, error, print_table, progress

_WIDTH = 150  # of the table where no terminal sets it


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command and its options."""
    compare = commands.add_parser(
        "compare",
        help="what SE, BAM-C and BAM cost a network: parameters, GMACs, time, memory (Table 10)",
        description="Measure a network without attention and with SE, BAM-C and BAM, each on the "
        "fused kernels and in plain PyTorch with the same weights: parameters and GMACs as the "
        "paper counts them, the times of an inference and of a training step (forward and "
        "backward, no optimizer) as medians over interleaved rounds, and the most memory allocated "
        "at once beyond the weights.",
        epilog="Exit status: 0: done; 1: a network failed, or fused and eager differ; 2: bad "
        "arguments.",
    )
    add = compare.add_argument
    add("--model", default="cifar_resnet50", metavar="NAME",
        help="one of bam_kernels.models, torchvision:NAME or timm:NAME "
        "(default: %(default)s)")  # fmt: skip
    add("--attention", nargs="+", choices=networks.ATTENTION[1:],
        default=list(networks.ATTENTION[1:]), help="what is compared (default: all)")  # fmt: skip
    add("--batch", type=arguments.positive, default=8, metavar="N",
        help="images (default: %(default)s)")  # fmt: skip
    add("--size", type=arguments.positive, metavar="PIXELS",
        help="their sides (default: the network's own, or 224)")  # fmt: skip
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: %(default)s)")
    add("--threads", type=arguments.positive, help="of the CPU (default: torch's own number)")
    add("--rounds", type=arguments.positive, default=10,
        help="times taken of each network (default: %(default)s)")  # fmt: skip
    add("--least-ms", type=arguments.above_zero, default=20.0,
        help="a time's least duration (default: %(default)s)")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write every figure there")
    add("--plot", type=Path, metavar="FILE.png", help="draw the ratios there")
    add("--force", action="store_true", help="write over files that exist")
    compare.set_defaults(run=_compare)


def _compare(args: argparse.Namespace) -> int:
    problem = _unsuited(args)
    if problem is not None:
        return error("compare", problem)

    import torch

    from bam_kernels.benchmarking import attention_cost, attention_cost_report

    try:
        size = args.size or networks.input_size(args.model)
        options = attention_cost.Options(
            args.model, (args.batch, 3, size, size), tuple(dict.fromkeys(args.attention)),
            networks.device_of(args.device), args.threads or torch.get_num_threads(),
            args.rounds, args.least_ms,
        )  # fmt: skip
        with progress(options.steps) as step:
            result = attention_cost.measure(
                options,
                lambda attention, fused: networks.build(
                    args.model, attention or "none", fused=fused, size=size
                ),
                step,
            )
    except (networks.NetworkError, ValueError) as problem:
        return error("compare", str(problem))
    if args.json is not None:
        from bam_kernels.files import replacing

        with replacing(args.json) as part:
            part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    header, groups = attention_cost_report.table(result)
    print_table(attention_cost_report.title(result), header, groups, _WIDTH)
    caution = attention_cost_report.caution(result)
    if caution is not None:
        print(caution)
    if args.plot is not None:
        attention_cost_report.draw(result, args.plot)
        print(f"picture: {args.plot}")
    wrong = attention_cost_report.problems(result)
    for line in wrong:
        print(f"bam_kernels compare: {line}", file=sys.stderr)
    return FAILED if wrong else 0


def _unsuited(args: argparse.Namespace) -> str | None:
    """What is wrong with the arguments, before anything is built."""
    if args.batch < 2:
        return "--batch: expected at least 2, for the norms of the training step, got 1"
    if args.plot is not None and args.plot.suffix.lower() != ".png":
        return f"--plot: expected a name that ends in .png, got {args.plot}"
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        return "--plot: matplotlib is not installed; pip install 'bam_kernels[demo]'"
    for option, path in (("--json", args.json), ("--plot", args.plot)):
        problem = arguments.taken(option, path, args.force)
        if problem is not None:
            return problem
    return None
