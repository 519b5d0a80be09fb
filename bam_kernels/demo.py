"""What ``python -m bam_kernels demo`` does: a ResNet-50 with BAM, fused against plain PyTorch.

Three copies of one network with the same weights make a training step and an inference on views of
a photograph: on the fused kernels, on the reference in float32, and on the reference in float64,
which is taken for the truth. Each BAM is then compared alone, on the feature map and the gradient
that reached it in the network.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import importlib.util
import json
import platform
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bam_kernels
from bam_kernels import dispatch, env, reference
from bam_kernels.analysis.attention import AttentionMap, attention_maps
from bam_kernels.analysis.figure import Stage, draw_attention
from bam_kernels.analysis.parity import Comparison, Cost, Run, compare, measure
from bam_kernels.backends import cpp_library
from bam_kernels.integrate import insert_bam

PLACES = ("layer1", "layer2", "layer3")  # the bottlenecks of a ResNet (Fig. 1)
STEPS = 6 + len(PLACES)
"""How many times `run` calls its `step`."""

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # as torchvision's weights expect
# How often a step is timed: on a GPU, on a CPU, and in the interpreter, whose time means nothing.
_GPU_REPEATS, _CPU_REPEATS, _INTERPRETER_REPEATS = 20, 3, 1
# Triton's interpreter takes its time for a tile, not for an element: few and large ones.
_INTERPRETER_TILE = {"block_c": 512, "block_p": 2048, "num_warps": 4, "num_stages": 1}

Step = Callable[[str], None]
"""Called with what is about to be done."""


class DemoError(Exception):
    """Something that the user can mend; its message is one line."""


@dataclasses.dataclass(frozen=True)
class Options:
    """The arguments of the command; `image` None takes a photograph of an installed package."""

    image: Path | None = None
    output: Path = Path("demo_output")
    pretrained: bool = False
    device: str = "auto"
    backend: str = "auto"
    preset: str = "paper"
    size: int = 224
    batch: int = 4
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Part:
    """One BAM, or the whole network: its input's shape, parity and cost."""

    name: str
    shape: tuple[int, ...]
    backend: str
    comparisons: list[Comparison]
    fused: Cost
    pytorch: Cost


@dataclasses.dataclass(frozen=True)
class Report:
    """What the demo found; `interpreted`: the fused times are those of Triton's interpreter."""

    source: str
    device: str
    interpreted: bool
    parts: list[Part]
    picture: Path
    results: Path

    @property
    def failures(self) -> list[tuple[Part, Comparison]]:
        return [(p, c) for p in self.parts for c in p.comparisons if not c.passed]


def run(options: Options, step: Step = lambda text: None) -> Report:
    """Run the demo; writes ``attention.png`` and ``results.json`` into ``options.output``.

    Raises:
        DemoError: an unreadable image, an option out of range, a device, a package or weights that
            cannot be had (all before anything is written), a folder that cannot be written.
    """
    device, backend = resolve(options)
    reason = dispatch.why_not(backend, device.type)
    if reason is not None:
        raise DemoError(f"the fused kernels cannot run on {device}: {reason}")
    step("reading the photograph")
    image, source = _load_image(options.image)
    images, photo = _views(image, options)
    images = images.to(device)
    interpreted = backend == "triton" and env.triton_interpret()

    with _settings(device, backend, interpreted):
        step("building ResNet-50 with BAM")
        pytorch, fused = _build(options, device)
        truth = copy.deepcopy(pytorch).double()
        labels = torch.arange(options.batch, device=device)
        alone = {
            name: [copy.deepcopy(net.get_submodule(f"{name}.bam")) for net in (fused, pytorch)]
            for name in PLACES
        }

        def backward(logits: Tensor) -> None:
            F.cross_entropy(logits, labels).backward()

        repeats = _CPU_REPEATS if device.type == "cpu" else _GPU_REPEATS
        repeats = _INTERPRETER_REPEATS if interpreted else repeats
        step("network on plain PyTorch")
        with _flows(pytorch) as flows:
            plain_run = measure(pytorch, images, backward, repeats)
        step("network on plain PyTorch in float64")
        truth_run = measure(truth, images.double(), backward)
        step("network on the fused kernels")
        with attention_maps(fused) as maps, _features(fused) as features:
            fused_run = measure(fused, images, backward, repeats)

        parts = []
        for name in PLACES:
            step(f"{name}.bam alone")
            parts.append(_part_alone(f"{name}.bam", *alone[name], *flows[name], repeats))
        parts.append(_part("network", images, backend, fused_run, plain_run, truth_run, deep=True))

    step("drawing the picture")
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        picture, results = options.output / "attention.png", options.output / "results.json"
        report = Report(source, _device_name(device), interpreted, parts, picture, results)
        _draw(report, options, photo, maps, features)
        results.write_text(json.dumps(_as_json(report, options), indent=1) + "\n")
    except OSError as error:
        raise DemoError(f"--output: cannot write into {options.output}: {error}") from error
    return report


# --- what is asked for ------------------------------------------------------------------------


def resolve(options: Options, say: Step = lambda text: None) -> tuple[torch.device, str]:
    """The device and the backend that the options come to, after a check of all of them.

    `say` is called before the C++ kernels are loaded, which may compile them. Where they cannot run
    "auto" on a CPU comes to "triton", whose interpreter the caller is to switch on.

    Raises:
        DemoError: as `run`.
    """
    for package in ("torchvision", "matplotlib", "PIL"):
        if importlib.util.find_spec(package) is None:
            raise DemoError(f"{package} is not installed; pip install 'bam_kernels[demo]'")
    for name, least in (("size", 32), ("batch", 2)):
        if getattr(options, name) < least:
            raise DemoError(f"--{name}: expected at least {least}, got {getattr(options, name)}")
    if options.output.exists() and not options.output.is_dir():
        raise DemoError(f"--output: {options.output} is not a folder")
    device, backend = find_device(options.device), options.backend
    if backend == "auto":
        backend = "triton" if device.type != "cpu" or env.triton_interpret() else "cpp"
    if backend == "triton" or device.type != "cpu":
        return device, backend
    say("loading the C++ kernels; the first time, compiling them")
    reason = dispatch.why_not("cpp", "cpu")
    if reason is not None:
        if options.backend == "cpp" or cpp_library.is_damaged():
            raise DemoError(f"the C++ kernels cannot run: {reason}")
        if importlib.util.find_spec("triton") is None:
            raise DemoError(f"no kernels can run: {reason}; nor is Triton installed")
        say(f"Triton's interpreter in place of the C++ kernels: {reason}")
        backend = "triton"
    return device, backend


def find_device(name: str) -> torch.device:
    """The device of ``--device``: "auto" is a GPU where there is one that Triton runs on.

    Raises:
        DemoError: no device has this name, or there is none of its kind.
    """
    found = [kind for kind in dispatch.TRITON_DEVICES if _is_available(kind)]
    if name == "auto":
        return torch.device(found[0] if found else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DemoError(f"--device: expected auto, cpu, cuda or xpu, got {name!r}") from None
    if device.type in dispatch.TRITON_DEVICES:
        count = getattr(torch, device.type).device_count() if device.type in found else 0
        if (device.index or 0) >= count:
            raise DemoError(f"--device: PyTorch finds {count} {device.type} devices here")
    return device


def _is_available(kind: str) -> bool:
    module = getattr(torch, kind, None)
    return module is not None and module.is_available()


@contextlib.contextmanager
def _settings(device: torch.device, backend: str, interpreted: bool) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(dispatch.use_backend(backend))
        if device.type == "cuda":
            # TF32 convolutions would drown the difference that is looked for.
            stack.enter_context(
                torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
            )
        if interpreted:
            from bam_kernels.backends.triton import configs
            from bam_kernels.testing.interpreter import accelerate

            accelerate()
            tile = configs.Tile(**_INTERPRETER_TILE)
            stack.enter_context(configs.override(**dict.fromkeys(configs.KERNELS, tile)))
        yield


# --- the photograph ---------------------------------------------------------------------------


def _load_image(path: Path | None) -> tuple[Any, str]:
    """A PIL image in RGB, and where it is from."""
    from PIL import Image, ImageOps

    if path is None:
        path = _sample_image()
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB"), str(path)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise DemoError(f"cannot read the image {path}: {' '.join(reason.split())}") from error


def _sample_image() -> Path:
    """A photograph that comes with an installed package, without a download."""
    for package, inside in (
        ("skimage", "data/chelsea.png"),
        ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
    ):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            path = Path(spec.origin).parent / inside
            if path.is_file():
                return path
    raise DemoError("no sample photograph is installed: give one, or pip install scikit-image")


def _views(image: Any, options: Options) -> tuple[Tensor, Any]:
    """Views of the photograph [N, 3, S, S], normalised, and the first as a uint8 [S, S, 3].

    The photograph, its mirror image and crops of it, every second one mirrored. The pooled features
    of a photograph and of its mirror image hardly differ: it is the crops that make a batch for the
    batch norm of the channel branch.
    """
    import numpy as np
    from PIL import Image, ImageOps

    size, generator = options.size, random.Random(options.seed)
    square = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    views = []
    for i in range(options.batch):
        view = square
        if i >= 2:
            side = min(image.size) * generator.uniform(0.35, 0.7)
            left = generator.uniform(0, image.width - side)
            top = generator.uniform(0, image.height - side)
            box = (left, top, left + side, top + side)
            view = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
        views.append(np.asarray(ImageOps.mirror(view) if i % 2 else view))
    x = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (_MEAN, _STD))
    return ((x - mean) / std).contiguous(), views[0]


# --- the networks -----------------------------------------------------------------------------


def _build(options: Options, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """ResNet-50 with BAMs in plain PyTorch, and its fused twin with the same weights."""
    from torchvision.models import ResNet50_Weights, resnet50

    torch.manual_seed(options.seed)
    try:
        base = resnet50(weights=ResNet50_Weights.IMAGENET1K_V2 if options.pretrained else None)
    except (OSError, RuntimeError) as error:  # no network, no space; a damaged download
        raise DemoError(f"--pretrained: cannot get the weights: {error}") from error
    twin = copy.deepcopy(base)
    insert_bam(base, PLACES, module=reference.BAM, preset=options.preset)
    insert_bam(twin, PLACES, module=bam_kernels.BAM, preset=options.preset)
    twin.load_state_dict(base.state_dict())
    for name, module in (*base.named_modules(), *twin.named_modules()):
        fresh = not options.pretrained or ".bam." in name
        if fresh and isinstance(module, nn.modules.batchnorm._BatchNorm):
            # A cumulative average: after one training step inference has the batch's statistics.
            module.momentum = None
    return base.to(device).train(), twin.to(device).train()


@contextlib.contextmanager
def _flows(model: nn.Module) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """By place, what a training step sends through its BAM: input, and gradient of the output."""
    inputs: dict[str, Tensor] = {}
    flows: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str, args: tuple[Any, ...], output: Tensor) -> None:
        if output.requires_grad:
            inputs[name] = args[0].detach()
            output.register_hook(lambda g: flows.__setitem__(name, (inputs.pop(name), g.detach())))

    with _hooks(model, watch):
        yield flows


@contextlib.contextmanager
def _features(model: nn.Module) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """By place, the features of the first image before and behind its BAM, mean |F| over C."""
    features: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str, args: tuple[Any, ...], output: Tensor) -> None:
        before, after = (t[0].detach().abs().mean(dim=0).cpu() for t in (args[0], output))
        features[name] = (before, after)

    with _hooks(model, watch):
        yield features


@contextlib.contextmanager
def _hooks(
    model: nn.Module, watch: Callable[[str, tuple[Any, ...], Tensor], None]
) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name in PLACES:

            def hook(_: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
                watch(name, args, output)

            handle = model.get_submodule(f"{name}.bam").register_forward_hook(hook)
            stack.callback(handle.remove)
        yield


# --- the comparison ---------------------------------------------------------------------------


def _part_alone(
    name: str, fused: nn.Module, pytorch: nn.Module, x: Tensor, gradient: Tensor, repeats: int
) -> Part:
    """A BAM by itself, on a feature map and an output's gradient of the network."""
    backend = bam_kernels.explain(fused, x).backend
    truth = copy.deepcopy(pytorch).double()
    runs = [
        measure(fused, x, lambda y: y.backward(gradient), repeats),
        measure(pytorch, x, lambda y: y.backward(gradient), repeats),
        measure(truth, x.double(), lambda y: y.backward(gradient.double())),
    ]
    return _part(name, x, backend, *runs)


def _part(
    name: str, x: Tensor, backend: str, fused: Run, pytorch: Run, truth: Run, deep: bool = False
) -> Part:
    comparisons = compare(fused, pytorch, truth, deep=deep)
    return Part(name, tuple(x.shape), backend, comparisons, fused.cost, pytorch.cost)


# --- what is written --------------------------------------------------------------------------


def _draw(
    report: Report,
    options: Options,
    photo: Any,
    maps: dict[str, AttentionMap],
    features: dict[str, tuple[Tensor, Tensor]],
) -> None:
    stages = []
    for name in PLACES:
        attention = maps[f"{name}.bam"]
        before, after = features[name]
        stages.append(
            Stage(
                f"{name}.bam",
                before,
                attention.spatial_map[0].cpu(),
                after,
                attention.channel_profile[0].cpu(),
            )
        )
    weights = (
        "ImageNet weights, untrained BAMs"
        if options.pretrained
        else f"random weights (seed {options.seed})"
    )
    subtitle = (
        f"ResNet-50, {weights}, after one training step: "
        "this shows the mechanism, not what a trained BAM attends to"
    )
    draw_attention(photo, stages, report.picture, subtitle=subtitle)


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return (
            f"CPU ({platform.processor() or platform.machine()}), {torch.get_num_threads()} threads"
        )
    return getattr(torch, device.type).get_device_name(device)


def _as_json(report: Report, options: Options) -> dict[str, Any]:
    given = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    parts = []
    for part in report.parts:
        found = dataclasses.asdict(part)
        for entry, comparison in zip(found["comparisons"], part.comparisons, strict=True):
            entry |= {"bar": comparison.bar, "passed": comparison.passed}
        parts.append(found)
    return {
        "machine": {"device": report.device, "system": platform.platform()},
        "versions": {
            "bam_kernels": bam_kernels.__version__,
            "python": platform.python_version(),
            **{
                name: importlib.import_module(name).__version__
                for name in ("torch", "torchvision", "triton")
                if importlib.util.find_spec(name) is not None
            },
        },
        "options": given,
        "image": report.source,
        "interpreted": report.interpreted,
        "units": {"forward": "s", "backward": "s", "kept": "bytes", "errors": "relative"},
        "parts": parts,
    }
