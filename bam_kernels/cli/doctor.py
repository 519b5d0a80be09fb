"""``python -m bam_kernels doctor``."""

from __future__ import annotations

import argparse
import json
import textwrap
from typing import Any

from bam_kernels.cli.arguments import shape_of
from bam_kernels.cli.output import error, print_table, say

_SHAPE = (2, 256, 14, 14)
_DTYPES = ("float32", "float64", "float16", "bfloat16")


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command and its options."""
    doctor = commands.add_parser(
        "doctor",
        help="what runs here and why, what does not, and what to do about it",
        description="Tell the versions, the devices, which backend would run for a module and why "
        "not the others, whether the C++ library is built and how; run a small module of that kind "
        "forward and backward against float64; say what to do about anything that is wrong. The "
        "C++ library is compiled where that has not been done yet (a minute or two).",
        epilog="Exit status: 0 where all is well, 1 where something should be mended (a smoke "
        "check that fails, a damaged library, plain PyTorch where kernels could run, a backend "
        "asked for that cannot run), 2 for bad arguments.",
    )
    add = doctor.add_argument
    add("--channels", type=int, metavar="C", help="of the module (default: the shape's, 256)")
    add("--reduction", type=int, default=16, metavar="R", help="of the module (default: 16)")
    add("--preset", default="paper", help="paper, the default, official, pytorchcv, fightingcv "
        "or changzy00")  # fmt: skip
    add("--dtype", default="float32", help=f"{', '.join(_DTYPES)} (default: %(default)s)")
    add("--layout", default="nchw", help="nchw, the default, or channels_last")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, xpu, ...; auto, the default, "
        "takes a GPU where there is one")  # fmt: skip
    add("--shape", metavar="NxCxHxW", help="of the input (default: 2xCx14x14)")
    add("--training", action="store_true", help="a module in training, not in inference")
    add("--json", action="store_true", help="print one JSON object instead")
    doctor.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    from bam_kernels import doctor

    try:
        options = _options(args)
    except (TypeError, ValueError) as problem:
        return error("doctor", str(problem))
    report = doctor.examine(options, say)
    if args.json:
        print(json.dumps(report, indent=1, allow_nan=False))
    else:
        _print(report)
    return report["status"]


def _options(args: argparse.Namespace) -> Any:
    """The options, checked.

    Raises:
        TypeError, ValueError: one line that names the argument.
    """
    import torch

    from bam_kernels import config, doctor

    shape = _SHAPE if args.channels is None else (_SHAPE[0], args.channels, *_SHAPE[2:])
    if args.shape is not None:
        shape = shape_of(args.shape)
        if shape is None:
            raise ValueError(f"--shape: expected NxCxHxW, each 1 or more, got {args.shape!r}")
        if args.channels not in (None, shape[1]):
            raise ValueError(
                f"--channels: expected the {shape[1]} of --shape {args.shape}, got {args.channels}"
            )
    for name, known in (("dtype", _DTYPES), ("layout", ("nchw", "channels_last"))):
        if getattr(args, name) not in known:
            raise ValueError(
                f"--{name}: expected one of {', '.join(known)}, got {getattr(args, name)!r}"
            )
    try:
        config.resolve(shape[1], args.reduction, args.preset)
    except (TypeError, ValueError) as problem:
        raise ValueError(f"--{problem}") from problem
    if args.training and shape[0] == 1:
        raise ValueError(
            "--training: expected at least 2 samples in --shape, for the channel branch's batch "
            f"norm, got {args.shape}"
        )
    if args.device != "auto":
        try:
            kind = torch.device(args.device)
        except RuntimeError as problem:
            raise ValueError(
                f"--device: expected auto or a device of torch, got {args.device!r}"
            ) from problem
        _check_present(kind)
    return doctor.Options(
        shape, args.reduction, args.preset, args.dtype, args.layout, args.device, args.training
    )


def _check_present(device: Any) -> None:
    import torch

    if device.type not in ("cpu", "cuda", "xpu", "mps"):
        raise ValueError(f"--device: expected cpu, cuda, xpu or mps, got {str(device)!r}")
    if device.type == "cpu":
        return
    module = getattr(torch, device.type, None)
    try:
        count = module.device_count() if module is not None and module.is_available() else 0
    except Exception:  # a broken driver: the examination tells
        return
    if (device.index or 0) >= count:
        raise ValueError(
            f"--device: expected one that is here, got {str(device)!r}; torch sees {count} "
            f"{device.type} devices"
        )


# --- for people -------------------------------------------------------------------------------


def _print(report: dict[str, Any]) -> None:
    rows = [[name, _text(value)] for name, value in report["versions"].items()]
    tools = report["toolchain"]
    rows.append(["compiler", _text(tools["compiler_version"] or tools["compiler"])])
    rows.append(["ninja", _text(tools["ninja"])])
    print_table("Versions", ("what", "version"), [rows])
    print_table("Devices", ("device", "name", "what it can do"), [_devices(report)])
    for each in report["environment"]:
        print(f"{each['name']}={each['value']}: {each['effect']}")
    library = report["library"]
    if library.get("loaded"):
        print(f"C++ library: loaded, {library['route']}, isa {library['isa']}: {library['path']}")
    else:
        print(f"C++ library: not loaded: {library.get('error') or library['reason']}")
    print()
    _print_backend(report)
    _print_smoke(report["smoke"])
    for each in report["findings"]:
        print(_wrapped(f"{each['level']}: ", each["what"]))
        print(_wrapped("  -> ", each["advice"]))
    problems = sum(each["level"] == "problem" for each in report["findings"])
    print("all well" if not problems else f"{problems} to mend")


def _devices(report: dict[str, Any]) -> list[list[str]]:
    cpu, gpus = report["devices"].get("cpu", {}), report["devices"].get("gpus", [])
    isa = report["library"].get("isa", "none")
    sets = f"torch sees {_text(cpu.get('torch_capability'))}, the C++ library takes {isa}"
    rows = [["cpu", _text(cpu.get("model")), f"{sets}, {_text(cpu.get('threads'))} threads"]]
    if isinstance(gpus, dict):
        return [*rows, ["gpu", _text(gpus), ""]]
    for gpu in gpus:
        kind = gpu["architecture"] or f"compute capability {_text(gpu['capability'])}"
        rows.append([gpu["device"], gpu["name"], f"{kind}, {gpu['memory_bytes'] / 2**30:.1f} GiB"])
    return rows if gpus else [*rows, ["gpu", "none that torch sees", ""]]


def _print_backend(report: dict[str, Any]) -> None:
    asked, backend = report["module"], report["backend"]
    shape = "x".join(map(str, asked["shape"]))
    mode = "training" if asked["training"] else "inference"
    device = backend.get("device", asked["device"])
    print(
        f"BAM({asked['shape'][1]}, reduction={asked['reduction']}, preset={asked['preset']!r}), "
        f"{mode}, {shape} {asked['dtype']} {asked['layout']} on {device}:"
    )
    if "error" in backend:
        print(_wrapped("  no backend runs: ", backend["error"]))
    else:
        print(f"  runs on {backend['chosen']!r} (asked for: {backend['requested']!r})")
        for name, reason in backend["reasons"].items():
            print(_wrapped(f"  not on {name!r}: ", reason))
        for note in backend["notes"]:
            print(_wrapped("  note: ", note))
    print()


def _print_smoke(smoke: dict[str, Any]) -> None:
    if "error" in smoke:
        print(_wrapped("Smoke check: ", smoke["error"]))
        print()
        return
    rows = [
        [what, _error(e["error"]), _error(e["eager"]), _error(e["bar"]),
         "ok" if e["pass"] else "FAILED"]
        for what, e in smoke["errors"].items()
    ]  # fmt: skip
    title = f"Smoke check on {smoke['backend']!r}, {'x'.join(map(str, smoke['shape']))}: "
    title += "relative error against float64"
    print_table(title, ("", smoke["backend"], "eager", "bar", ""), [rows])


def _error(value: Any) -> str:
    return f"{value:.1e}" if isinstance(value, float) else str(value)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return value["error"]
    return "none" if value is None else str(value)


def _wrapped(head: str, text: str) -> str:
    return textwrap.fill(
        text, 100, initial_indent=head, subsequent_indent="    ", break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
