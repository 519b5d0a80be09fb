"""The networks that the recipes train: the paper's, and one that two CPU cores train in minutes."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from torch import nn

from bam_kernels import models
from bam_kernels.models import attention as attentions
from bam_kernels.models.description import Description
from bam_kernels.models.resnet import ResNet, Shape
from bam_kernels.recipes.errors import RecipeError

SMALL: dict[str, Description] = {
    "small_resnet": Description(
        "small_resnet",
        "He et al.'s CIFAR ResNet with two blocks a stage: 16, 32 and 64 wide behind a stem of 64",
        "digits",
        (32, 32),
        10,
        functools.partial(ResNet, Shape((2, 2, 2), bottleneck=False, outputs=16, cifar=True)),
    )
}
"""Not the paper's; BAMs go where the paper puts them in a ResNet of three stages."""


def names() -> list[str]:
    """Those of `bam_kernels.models` that put out classes, and the small ones."""
    paper = [n for n in models.names() if models.get(n).dataset in ("cifar100", "imagenet")]
    return [*SMALL, *paper]


@dataclasses.dataclass(frozen=True)
class Network:
    """What is needed to build a network again; a checkpoint holds it.

    Attributes:
        name: one of `names`.
        attention: None, "bam", "bam-c", "se" or "block".
        num_classes: outputs.
        in_channels: of the images.
        options: of BAM or SqueezeExcite (reduction, dilation, combine, ...).
    """

    name: str
    attention: str | None
    num_classes: int
    in_channels: int
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def build(self) -> nn.Module:
        """The network, on the CPU in float32, its weights drawn by torch's generator.

        Raises:
            RecipeError: no such network, attention or option.
        """
        if self.name not in names():
            raise RecipeError(f"model: expected one of {', '.join(names())}, got {self.name!r}")
        try:
            if self.name not in SMALL:
                return models.create(
                    self.name,
                    attention=self.attention,
                    num_classes=self.num_classes,
                    in_channels=self.in_channels,
                    **self.options,
                )
            description = SMALL[self.name]
            attentions.check(description, self.attention, None, self.options)
            network = description.build(self.num_classes, self.in_channels)
            if self.attention is not None:
                example = (1, self.in_channels, *description.input_size)
                attentions.refine(network, description, self.attention, None, example, self.options)
            return network
        except (TypeError, ValueError, ImportError) as problem:
            raise RecipeError(f"{self.name}: {problem}") from problem

    def record(self) -> dict[str, Any]:
        """As JSON and checkpoints hold it."""
        return dataclasses.asdict(self)
