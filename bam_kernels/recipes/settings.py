"""What is asked of a run: what decides its numbers, and what does not."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from bam_kernels.recipes.engine import Precision
from bam_kernels.recipes.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides a run's numbers; a run that is resumed must have the same.

    Attributes:
        recipe: the hyper-parameters.
        model: one of `bam_kernels.recipes.networks.names`.
        attention: None, "bam", "bam-c", "se" or "block".
        options: of the attention's module.
        seed: of the weights, the order of the images and their augmentation.
        precision: see `Precision`.
        sync_bn: whether batch statistics are those of all processes' images together.
    """

    recipe: Recipe
    model: str
    attention: str | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    seed: int = 0
    precision: Precision = dataclasses.field(default_factory=Precision)
    sync_bn: bool = False

    def record(self) -> dict[str, Any]:
        """As JSON and checkpoints hold it."""
        return {
            "recipe": self.recipe.record(),
            "model": self.model,
            "attention": self.attention,
            "options": dict(self.options),
            "seed": self.seed,
            "precision": dataclasses.asdict(self.precision),
            "sync_bn": self.sync_bn,
        }


@dataclasses.dataclass(frozen=True)
class Place:
    """What decides where and how fast a run is, and not its numbers.

    Attributes:
        out: the run's folder.
        data: the data set's folder; None where it comes with a package.
        resume: go on with the run in `out`.
        force: write over the run in `out`.
        workers: processes that load images.
        download: let torchvision fetch the data set.
        tensorboard: log there as well.
        benchmark: let cuDNN choose its fastest algorithms, which need not be deterministic.
        log_every: steps between lines of progress where stderr is no terminal; 0: none.
    """

    out: Path
    data: Path | None = None
    resume: bool = False
    force: bool = False
    workers: int = 0
    download: bool = False
    tensorboard: bool = False
    benchmark: bool = False
    log_every: int = 0
