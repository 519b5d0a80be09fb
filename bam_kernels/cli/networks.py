"""Networks as commands name them: ``--model NAME``, with attention and with a checkpoint's weights.

NAME is one of `bam_kernels.models`, or ``torchvision:NAME`` or ``timm:NAME``.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

SOURCES = ("torchvision", "timm")
ATTENTION = ("none", "se", "bam-c", "bam")
_KEYS = ("model", "state_dict", "network", "model_state_dict")  # of a state dict in a checkpoint
_SHOWN = 3  # names in a message


class NetworkError(Exception):
    """A network that cannot be had; one line."""


@dataclasses.dataclass(frozen=True)
class Network:
    """A network, with what a command has to know of it.

    Attributes:
        module: itself.
        name: as ``--model`` takes it.
        attention: one of `ATTENTION`, or "block".
        size: the side, in pixels, of the images that it runs on.
        statistics: mean and standard deviation of those images' channels, in 0 to 1.
    """

    module: nn.Module
    name: str
    attention: str
    size: int
    statistics: tuple[tuple[float, ...], tuple[float, ...]]


def input_size(spec: str) -> int:
    """The side, in pixels, of the images that a network of `bam_kernels.models` is meant for; of
    others 224."""
    from bam_kernels import models

    return models.get(spec).input_size[0] if spec in models.names() else 224


def _statistics(dataset: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    from bam_kernels.recipes import data

    return data.CIFAR_STATISTICS if dataset == "cifar100" else data.IMAGENET_STATISTICS


def load(
    spec: str | None,
    attention: str,
    checkpoint: Path | None,
    option: str,
    *,
    num_classes: int | None = None,
    size: int | None = None,
) -> Network:
    """The network that a command line says, with the checkpoint's weights.

    Args:
        spec: the NAME; None where a checkpoint of ``train`` says it.
        attention: of a network by NAME.
        checkpoint: None for random weights.
        option: that gave the checkpoint, for messages.
        num_classes, size: as in `build`.

    Raises:
        NetworkError: no such network, no such checkpoint, or one of another network.
    """
    if spec is not None:
        from bam_kernels import models

        side = size or input_size(spec)
        made = build(spec, attention, num_classes=num_classes, size=side)
        if checkpoint is not None:
            load_weights(made, checkpoint, option)
        dataset = models.get(spec).dataset if spec in models.names() else "imagenet"
        return Network(made, spec, attention, side, _statistics(dataset))
    if checkpoint is None:
        raise NetworkError("expected --model NAME, or --checkpoint FILE of the command train")
    from bam_kernels.recipes import RecipeError, evaluation, networks

    try:
        made, content = evaluation.load_network(checkpoint)
    except RecipeError as error:
        raise NetworkError(f"{option}: {error} (of another's, --model says the network)") from error
    record, dataset = content["network"], content["settings"]["recipe"]["dataset"]
    if record["in_channels"] != 3:
        raise NetworkError(
            f"{option}: expected a network of colour images, got one of {record['in_channels']} "
            "channel; bam_kernels.analysis takes any"
        )
    described = networks.SMALL.get(record["name"])
    side = size or (described.input_size[0] if described else input_size(record["name"]))
    kind = record["attention"] or "none"
    return Network(made, record["name"], kind, side, _statistics(dataset))


def build(
    spec: str,
    attention: str = "none",
    *,
    fused: bool = True,
    num_classes: int | None = None,
    size: int = 224,
) -> nn.Module:
    """A network with random weights, its attention at the paper's places.

    Args:
        spec: the NAME.
        attention: one of `ATTENTION`: "bam" at the bottlenecks, "bam-c" and "se" in every block.
        fused: whether the attention is ours, or `bam_kernels.reference`'s.
        num_classes: the network's own number unless given.
        size: the side of the images for which the places are sought.

    Raises:
        NetworkError: no such network, a missing package, attention that it cannot have.
    """
    import bam_kernels
    from bam_kernels import insert_bam, models, reference

    package = bam_kernels if fused else reference
    module = package.SqueezeExcite if attention == "se" else package.BAM
    source, _, name = spec.rpartition(":")
    try:
        if not source:
            if name not in models.names():
                raise ValueError(
                    f"expected torchvision:NAME, timm:NAME or one of {', '.join(models.names())}, "
                    f"got {spec!r}"
                )
            given = {} if attention == "none" else {"attention_module": module}
            kind = None if attention == "none" else attention
            return models.create(name, attention=kind, num_classes=num_classes, **given)
        made = _from_package(source, name, num_classes)
        if attention != "none":
            at = "bottlenecks" if attention == "bam" else "blocks"
            insert_bam(made, at=at, module=module, example_input=(1, 3, size, size))
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise NetworkError(f"--model {spec}: {error}") from error
    return made


def _from_package(source: str, name: str, num_classes: int | None) -> nn.Module:
    if source not in SOURCES:
        raise ValueError(f"expected torchvision:NAME or timm:NAME, got the source {source!r}")
    if importlib.util.find_spec(source) is None:
        raise ImportError(f"{source} is not installed; pip install {source}")
    given = {} if num_classes is None else {"num_classes": num_classes}
    if source == "timm":
        import timm

        return timm.create_model(name, **given)
    from torchvision.models import get_model

    return get_model(name, weights=None, **given)


def load_weights(model: nn.Module, path: Path, option: str = "--checkpoint") -> None:
    """Put a checkpoint's weights into a network, all of them, or none and an error.

    Raises:
        NetworkError: no such file, not a checkpoint, or one of another network.
    """
    from bam_kernels.integrate import checkpoint

    try:
        content, _ = checkpoint.load(path)
    except checkpoint.CheckpointError as error:
        raise NetworkError(f"{option}: {error}") from error
    state = _state_dict(content, path, option)
    ours = model.state_dict()
    missing = [key for key in ours if key not in state]
    unknown = [key for key in state if key not in ours]
    shaped = [key for key in ours if key in state and ours[key].shape != state[key].shape]
    problems = []
    if missing:
        problems.append(f"it lacks {_some(missing)}")
    if unknown:
        problems.append(f"it has {_some(unknown)} besides")
    if shaped:
        key = shaped[0]
        problems.append(f"{key} is {list(state[key].shape)}, not {list(ours[key].shape)}")
    if problems:
        raise NetworkError(
            f"{option}: {path} is the checkpoint of another network: {'; '.join(problems)} "
            "(--model, --attention and --classes say which network it is)"
        )
    model.load_state_dict(state)


def _state_dict(content: Mapping[str, Any], path: Path, option: str) -> Mapping[str, Tensor]:
    """The network's state dict in a checkpoint, without DistributedDataParallel's prefix."""
    from bam_kernels.integrate import checkpoint

    inner = [content[key] for key in _KEYS if checkpoint.is_state_dict(content.get(key))]
    found = inner[0] if inner else content
    if not checkpoint.is_state_dict(found):
        raise NetworkError(f"{option}: {path} holds no state dict, neither itself nor as "
                           f"{', '.join(_KEYS)}")  # fmt: skip
    if all(key.startswith("module.") for key in found):
        found = {key.removeprefix("module."): value for key, value in found.items()}
    return found


def _some(keys: list[str]) -> str:
    more = len(keys) - _SHOWN
    return ", ".join(keys[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def device_of(name: str):
    """The torch device of ``--device``: "auto" is a CUDA GPU where torch sees one.

    Raises:
        NetworkError: there is no such device.
    """
    from bam_kernels.recipes import distributed
    from bam_kernels.recipes.errors import RecipeError

    try:
        return distributed.device_of(name)
    except RecipeError as problem:
        raise NetworkError(str(problem)) from problem
