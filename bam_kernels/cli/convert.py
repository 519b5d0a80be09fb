"""``python -m bam_kernels convert``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bam_kernels.cli.output import error, print_table


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command and its options."""
    convert = commands.add_parser(
        "convert",
        help="rename the keys of every BAM in a checkpoint, from one code's to another's",
        description="Read a checkpoint, rename the keys of its BAMs, and write it anew. NAME is "
        "bam_kernels, official (the authors' code), pytorchcv, fightingcv or changzy00. A state "
        "dict within a checkpoint ('state_dict', 'model', ...) is converted, the rest kept. "
        "A pickle is read without running it.",
        epilog="Exit status: 0: done; 2: bad arguments or files, and then nothing is written.",
    )
    add = convert.add_argument
    add("input", type=Path, help=".pth, .pt, .ckpt, .bin, .tar or .safetensors")
    add("output", type=Path, help="the same, each format into each")
    add("--from", dest="source", required=True, metavar="NAME", help="whose keys there are")
    add("--to", dest="target", default="bam_kernels", metavar="NAME",
        help="whose keys there shall be (default: %(default)s)")  # fmt: skip
    add("--force", action="store_true", help="write over OUTPUT where there is one")
    convert.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> int:
    from bam_kernels.integrate import checkpoint
    from bam_kernels.integrate.convert import NAMES

    for option, name in (("--from", args.source), ("--to", args.target)):
        if name not in NAMES:
            return error("convert", f"{option}: expected one of {', '.join(NAMES)}, got {name!r}")
    try:
        checkpoint.check_suffix(args.output)
        if args.output.is_dir() or (args.output.exists() and not args.force):
            return error("convert", f"{args.output} exists; --force writes over a file")
        content, notes = checkpoint.load(args.input)
        content, found = _converted(content, args.source, args.target)
        left_out: list[str] = []
        if args.output.suffix == checkpoint.SAFETENSORS_SUFFIX:
            content, left_out = _tensors(content, list(found))
        checkpoint.save(content, args.output, notes)
    except checkpoint.CheckpointError as problem:
        return error("convert", str(problem))
    except ValueError as problem:
        return error("convert", f"{args.input}: {problem}")
    _report(args, found, left_out, content)
    return 0


def _converted(
    content: Mapping[str, Any], source: str, target: str
) -> tuple[Mapping[str, Any], dict[str | None, tuple]]:
    """The checkpoint, and by the key of a state dict within it (None: it is one itself) the BAMs.

    Raises:
        ValueError: no BAM of `source`, or one that cannot be converted.
    """
    from bam_kernels.integrate import checkpoint
    from bam_kernels.integrate.clients import CLIENTS, OWN
    from bam_kernels.integrate.convert import convert, prefixes

    client = CLIENTS.get(source, OWN)
    inner = [key for key, value in content.items() if checkpoint.is_state_dict(value)]
    held = [key for key in inner if prefixes(content[key], client)]
    if not held or prefixes(content, client):
        # With no BAM anywhere this says so, of the first state dict within, if there is one.
        one = content if prefixes(content, client) or not inner else content[inner[0]]
        made, found = convert(one, source, target)
        return made, {None: found}
    made = type(content)(content)
    bams: dict[str | None, tuple] = {}
    for key in held:
        made[key], bams[key] = convert(content[key], source, target)
    return made, bams


def _tensors(
    content: Mapping[str, Any], converted: list[str | None]
) -> tuple[dict[str, Any], list[str]]:
    """What safetensors can hold of a checkpoint: the state dict; and what that leaves out.

    Raises:
        ValueError: it has more than one.
    """
    from torch import Tensor

    if len(converted) > 1:
        names = ", ".join(map(repr, converted))
        raise ValueError(f"expected one state dict for .safetensors, got {names}; write a .pth")
    (key,) = converted
    states = content if key is None else content[key]
    kept = {name: value for name, value in states.items() if isinstance(value, Tensor)}
    left_out = [] if key is None else [name for name in content if name != key]
    return kept, [str(name) for name in (*left_out, *(n for n in states if n not in kept))]


def _report(
    args: argparse.Namespace,
    found: dict[str | None, tuple],
    left_out: list[str],
    content: Mapping[str, Any],
) -> None:
    rows = [
        [
            ("" if key is None else f"{key}: ") + (bam.prefix.removesuffix(".") or "(the whole)"),
            str(bam.channels), str(bam.hidden), str(bam.mlp_layers), str(bam.num_dilated),
        ]
        for key, bams in found.items()
        for bam in bams
    ]  # fmt: skip
    print(f"{args.input} -> {args.output}")
    print_table(
        f"{args.source} to {args.target}",
        ("where", "channels", "inside", "hidden fc", "3x3"),
        [rows],
    )
    if args.target == "bam_kernels":
        print(f"loads into the same network with bam_kernels.BAM(C, preset={args.source!r})")
        if args.source == "fightingcv":
            print("and padding=1, where its dia_val was 2, or dilation=1, where it was 1")
    if left_out:
        print(f"left out, which .safetensors cannot hold: {', '.join(left_out)}")
    for name, value in content.items():
        if isinstance(value, Mapping) and {"state", "param_groups"} <= value.keys():
            print(
                f"{name!r} stays as it was: an optimizer's state goes by the order of parameters, "
                "which differs between the two"
            )
