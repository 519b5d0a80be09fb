"""``python -m bam_kernels analyze``: the paper's analysis of a network on a folder of images."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bam_kernels.cli import arguments, networks
from bam_kernels.cli.output import error, print_table, tracked

if TYPE_CHECKING:
    pass

_PACKAGES = {"torchvision": "torchvision", "matplotlib": "matplotlib", "PIL": "pillow"}


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command, and a subcommand an analysis."""
    analyze = commands.add_parser(
        "analyze",
        help="class selectivity, attention maps and channel profiles of a network (Sec. 6)",
        description="Draw the paper's analysis of a network (Sec. 6, Fig. 4 to 6) on a folder of "
        "images, and beside it the same network without BAM.",
        epilog="Exit status: 0: done; 2: bad arguments, files or images, or a missing package; "
        "then nothing is written.",
    )
    kinds = analyze.add_subparsers(title="analyses", required=True, metavar="ANALYSIS")
    selectivity = _subcommand(
        kinds, "selectivity", _selectivity,
        "the class-selectivity index of each channel, by stage (Fig. 4)",
        "--images: a folder with a folder of images a class.",
    )  # fmt: skip
    selectivity.add_argument("--stages", nargs="+", metavar="LAYER",
        help="layers by name, or globs (default: the last of each stage)")  # fmt: skip
    maps = _subcommand(
        kinds, "maps", _maps,
        "features before and after each BAM and its attention map, over images (Fig. 5, 6)",
        "Maps are normalised by the mean and standard deviation of all maps of the same kind at "
        "the same stage over the folder, or over that of an earlier run (--statistics).",
    )  # fmt: skip
    _modules(maps)
    maps.add_argument("--baseline-stages", nargs="+", metavar="LAYER",
        help="the baseline's layers beside the BAMs (default: its stages)")  # fmt: skip
    maps.add_argument("--draw", type=arguments.positive, default=3, metavar="N",
        help="images in the picture (default: %(default)s)")  # fmt: skip
    maps.add_argument("--pick", choices=("first", "corrected"), default="first",
        help="which: the first of the folder, or, as in the paper, the first that the network "
        "classifies as its folder says and the baseline does not (default: first)")  # fmt: skip
    maps.add_argument("--statistics", type=Path, metavar="FILE",
        help="normalise by these, of an earlier run's --save-statistics")  # fmt: skip
    maps.add_argument("--save-statistics", type=Path, metavar="FILE",
        help="write the folder's statistics there, JSON")  # fmt: skip
    profiles = _subcommand(
        kinds, "profiles", _profiles,
        "channel profiles and spatial maps of the attention, as means over classes (Sec. 6.2)",
        "--images: a folder with a folder of images a class; of one without, all are one class.",
    )  # fmt: skip
    _modules(profiles)


def _subcommand(
    kinds: argparse._SubParsersAction,
    name: str,
    run: Callable[[argparse.Namespace], int],
    what: str,
    details: str,
) -> argparse.ArgumentParser:
    parser = kinds.add_parser(name, help=what, description=f"Draw {what}. {details}")
    add = parser.add_argument
    add("--model", metavar="NAME",
        help="one of bam_kernels.models, torchvision:NAME or timm:NAME; a checkpoint of train "
        "says it by itself")  # fmt: skip
    add("--attention", choices=networks.ATTENTION, default="bam",
        help="what a network by NAME has, where the paper puts it (default: bam)")  # fmt: skip
    add("--checkpoint", type=Path, metavar="FILE",
        help="the network's weights (default: random ones: the mechanism alone)")  # fmt: skip
    if name != "profiles":
        add("--baseline", type=Path, metavar="FILE",
            help="weights of the same network without attention, to stand beside it")  # fmt: skip
    add("--images", type=Path, required=True, metavar="FOLDER", help="what it is run on")
    add("--out", type=Path, required=True, metavar="FILE.png", help="the picture")
    add("--json", type=Path, metavar="FILE", help="write the numbers there")
    add("--force", action="store_true", help="write over files that exist")
    add("--classes", type=arguments.positive, metavar="N",
        help="of the network by NAME (default: its data set's)")  # fmt: skip
    add("--size", type=arguments.positive, metavar="PIXELS",
        help="images are resized to it and cropped (default: the network's, or 224)")  # fmt: skip
    add("--mean", type=float, nargs=3, metavar=("R", "G", "B"),
        help="subtracted from images in 0 to 1 (default: of the network's data set)")  # fmt: skip
    add("--std", type=arguments.above_zero, nargs=3, metavar=("R", "G", "B"),
        help="divided by (default: of the network's data set)")  # fmt: skip
    add("--batch", type=arguments.positive, default=32, metavar="N",
        help="images at once (default: %(default)s)")  # fmt: skip
    add("--workers", type=arguments.whole, default=0, metavar="N",
        help="processes that read images (default: 0, this one)")  # fmt: skip
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: %(default)s)")
    parser.set_defaults(run=lambda args: _checked(name, run, args))
    return parser


def _modules(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--modules", nargs="+", metavar="BAM",
        help="names of BAMs, such as layer1.bam, or globs (default: all)")  # fmt: skip


def _checked(name: str, run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """An analysis behind the checks that need no computing; its errors as a line."""
    command = f"analyze {name}"
    for package, install in _PACKAGES.items():
        if importlib.util.find_spec(package) is None:
            return error(command, f"{install} is not installed; pip install 'bam_kernels[demo]'")
    if args.out.suffix.lower() != ".png":
        return error(command, f"--out: expected a name that ends in .png, got {args.out}")
    written = {"--out": args.out, "--json": args.json}
    written["--save-statistics"] = getattr(args, "save_statistics", None)
    for option, path in written.items():
        problem = arguments.taken(option, path, args.force)
        if problem is not None:
            return error(command, problem)
    from bam_kernels.analysis import images

    try:
        return run(args)
    except (networks.NetworkError, images.ImagesError, ValueError, TypeError) as problem:
        return error(command, str(problem))
    except OSError as problem:
        return error(command, f"cannot write: {problem}")


# --- what is run ------------------------------------------------------------------------------


class _Setting:
    """The networks and the images of a command line.

    Raises:
        NetworkError, ImagesError.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        from bam_kernels.analysis import images

        self.device = networks.device_of(args.device)
        given = {"num_classes": args.classes, "size": args.size}
        network = networks.load(
            args.model, args.attention, args.checkpoint, "--checkpoint", **given
        )
        self.model, self.baseline, self.size = network.module.to(self.device), None, network.size
        if getattr(args, "baseline", None) is not None:
            beside = networks.load(args.model, "none", args.baseline, "--baseline", **given)
            self.baseline = beside.module.to(self.device)
        mean, std = network.statistics
        prepare = images.Preparation(self.size, tuple(args.mean or mean), tuple(args.std or std))
        self.images = images.Images(args.images, prepare)
        self.loader = self.images.loader(args.batch, args.workers)
        self.example = (1, 3, self.size, self.size)
        plain = network.attention == "none"
        self.name = "no attention" if plain else network.attention.upper()
        weights = "random weights" if args.checkpoint is None else args.checkpoint.name
        title = f"{network.name}{', ' if plain else ' + '}{self.name} ({weights})"
        self.subtitle = f"{title}, {len(self.images)} images of {args.images.resolve().name}"

    def batches(self, description: str):
        return tracked(self.loader, description)


def _selectivity(args: argparse.Namespace) -> int:
    from bam_kernels.analysis.selectivity import class_selectivity
    from bam_kernels.analysis.selectivity_figure import draw_selectivity

    setting = _Setting(args)
    if len(setting.images.classes) < 2:
        raise ValueError(
            f"{args.images}: expected a folder of images in it for each of 2 classes or more"
        )
    nets = {"baseline": setting.baseline} if setting.baseline is not None else {}
    nets[setting.name] = setting.model
    found = {
        name: class_selectivity(
            net, setting.batches(name), stages=args.stages, example_input=setting.example
        )
        for name, net in nets.items()
    }
    draw_selectivity(found, args.out, subtitle=setting.subtitle)
    _write(args.json, {
        "what": setting.subtitle, "classes": setting.images.classes,
        "networks": {name: each.record() for name, each in found.items()},
    })  # fmt: skip
    rows = []
    for name, each in found.items():
        for stage, told in each.record()["stages"].items():
            figures = ["-" if told[k] is None else f"{told[k]:.3f}" for k in ("mean", "median")]
            rows.append([name, stage, str(told["channels"]), str(told["dead"]), *figures])
    print_table(
        f"Class selectivity: {setting.subtitle}",
        ("network", "stage", "channels", "dead", "mean", "median"), [rows],
    )  # fmt: skip
    print(f"picture: {args.out}")
    return 0


def _maps(args: argparse.Namespace) -> int:
    from bam_kernels.analysis.map_statistics import GlobalStatistics
    from bam_kernels.analysis.process import global_statistics, running
    from bam_kernels.analysis.process_figure import draw_process

    given = None if args.statistics is None else GlobalStatistics.load(args.statistics)
    setting = _Setting(args)
    if args.pick == "corrected" and (setting.baseline is None or not setting.images.classes):
        raise ValueError("--pick corrected: expected --baseline, and a folder of images a class")
    options: dict[str, Any] = {
        "modules": args.modules, "baseline": setting.baseline, "example_input": setting.example,
        "baseline_stages": args.baseline_stages,
    }  # fmt: skip
    statistics = given
    if statistics is None:
        batches = setting.batches("statistics of the maps")
        statistics = global_statistics(setting.model, batches, **options)
    chosen = _picked(args, setting)
    photos, stages, titles = [], [], []
    with running(setting.model, **options) as run:
        for index, title in chosen:
            image, _ = setting.images[index]
            process = run(image[None])
            photos.append(setting.images.prepare.photo(image))
            stages.append([each.stage(name, 0) for name, each in process.items()])
            titles.append(title)
    draw_process(photos, stages, statistics, args.out, titles=titles, subtitle=setting.subtitle)
    if args.save_statistics is not None:
        statistics.save(args.save_statistics)
    _write(args.json, {
        "what": setting.subtitle,
        "images": [str(setting.images.samples[index][0]) for index, _ in chosen],
        "stages": [
            {stage.name: {"profile": stage.profile.tolist(), "attention": stage.attention.tolist()}
             for stage in each} for each in stages
        ],
    })  # fmt: skip
    print(f"statistics of {statistics.images} images")
    print(f"picture: {args.out}")
    return 0


def _picked(args: argparse.Namespace, setting: _Setting) -> list[tuple[int, str]]:
    """The images to draw, by index, and a title for each.

    Raises:
        ValueError: no image that the network corrects.
    """
    import torch

    from bam_kernels.analysis.stages import evaluating

    samples, classes = setting.images.samples, setting.images.classes
    if args.pick == "first":
        return [(i, samples[i][0].name) for i in range(min(args.draw, len(samples)))]
    found: list[tuple[int, str]] = []
    with evaluating(setting.model), evaluating(setting.baseline):
        start = 0
        for batch, labels in setting.batches("what the network corrects"):
            right, wrong = (
                net(batch.to(setting.device)).argmax(1).cpu()
                for net in (setting.model, setting.baseline)
            )
            for i in torch.nonzero((right == labels) & (wrong != labels)).flatten().tolist():
                took = int(wrong[i])
                took_name = classes[took] if took < len(classes) else str(took)
                title = f"{classes[int(labels[i])]}; baseline: {took_name}"
                found.append((start + i, title))
            start += len(batch)
            if len(found) >= args.draw:
                return found[: args.draw]
    if not found:
        raise ValueError(
            f"--pick corrected: {args.images} has no image that the network classifies as its "
            "folder says and the baseline does not"
        )
    return found


def _profiles(args: argparse.Namespace) -> int:
    from bam_kernels.analysis.process import class_attention
    from bam_kernels.analysis.process_figure import draw_class_attention

    setting = _Setting(args)
    batches = setting.batches("attention by class")
    found = class_attention(setting.model, batches, modules=args.modules)
    classes = setting.images.classes or ["all images"]
    draw_class_attention(found, args.out, classes=classes, subtitle=setting.subtitle)
    _write(args.json, {
        "what": setting.subtitle, "classes": classes,
        "modules": {
            name: {"images_of_class": each.counts.tolist(), "profiles": each.profiles.tolist(),
                   "spatial": each.spatial.tolist()}
            for name, each in found.items()
        },
    })  # fmt: skip
    rows = []
    for name, each in found.items():
        across, within = each.profiles.std(dim=1).nanmean(), each.profiles.nanmean(dim=0).mean()
        rows.append([name, str(each.profiles.shape[1]), f"{within:.3f}", f"{across:.3f}"])
    print_table(
        f"Attention: {setting.subtitle}",
        ("module", "channels", "mean of M", "deviation over channels"), [rows],
    )  # fmt: skip
    print(f"picture: {args.out}")
    return 0


def _write(path: Path | None, content: dict[str, Any]) -> None:
    from bam_kernels.files import replacing

    if path is not None:
        with replacing(path) as part:
            part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
