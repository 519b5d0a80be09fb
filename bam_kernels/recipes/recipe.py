"""The recipes: what is trained on what, with which hyper-parameters, and where each comes from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from bam_kernels.recipes.errors import RecipeError

_PAPER_51 = "the paper, Sec. 5.1"
_PAPER_53 = "the paper, Sec. 5.3: the augmentation of He et al. (2016)"
_CODE = "the authors' released code (Jongchan/attention-module, train_imagenet.py)"
_SCRIPT = f"{_CODE}, as scripts/train_imagenet_resnet50_bam.sh calls it"
_COMMON = "not in the paper; common for these networks on CIFAR (WideResNet, ResNeXt)"
_OURS = "our choice: small enough for two CPU cores"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Every hyper-parameter of a training: SGD on the cross entropy, a learning rate in steps.

    Attributes:
        name: as ``--recipe`` takes it.
        dataset: one of `bam_kernels.recipes.data.DATASETS`.
        model: the network that is trained unless another is named.
        epochs: passes over the training set.
        batch: images a step, over all processes together.
        lr: the learning rate at first.
        milestones: epochs, counted from 0, at whose start the learning rate is times `gamma`.
        gamma: see `milestones`.
        momentum: of SGD.
        nesterov: whether the momentum is Nesterov's.
        weight_decay: of SGD, on every parameter.
        augmentation: what is done to a training image, in words; `data` does it.
        evaluation: what is done to a test image, in words.
        sources: by field, where its value comes from.
    """

    name: str
    dataset: str
    model: str
    epochs: int
    batch: int
    lr: float
    milestones: tuple[int, ...]
    gamma: float
    momentum: float
    nesterov: bool
    weight_decay: float
    augmentation: str
    evaluation: str
    sources: dict[str, str] = dataclasses.field(compare=False)

    def __post_init__(self) -> None:
        for name in ("epochs", "batch"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise RecipeError(f"{name}: expected a whole number of at least 1, got {value!r}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise RecipeError(f"lr: expected a number above 0, got {self.lr!r}")
        for name in ("momentum", "weight_decay"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise RecipeError(f"{name}: expected a number of at least 0, got {value!r}")
        marks = list(self.milestones)
        if marks != sorted(set(marks)) or any(not 1 <= m < self.epochs for m in marks):
            raise RecipeError(
                f"milestones: expected rising epochs from 1 to below epochs={self.epochs}, "
                f"got {marks}"
            )

    def changed(
        self,
        *,
        epochs: int | None = None,
        milestones: Sequence[int] | None = None,
        **values: Any,
    ) -> Recipe:
        """The recipe with other values; those that are None stay.

        Where `epochs` is given and `milestones` is not, these keep their share of the whole.

        Raises:
            RecipeError: a value out of range.
        """
        given = {name: value for name, value in values.items() if value is not None}
        if milestones is not None:
            given["milestones"] = tuple(milestones)
        elif epochs is not None:
            scaled = {round(m * epochs / self.epochs) for m in self.milestones}
            given["milestones"] = tuple(sorted(m for m in scaled if 1 <= m < epochs))
        if epochs is not None:
            given["epochs"] = epochs
        told = dict.fromkeys((n for n in given if getattr(self, n) != given[n]), "given")
        return dataclasses.replace(self, **given, sources={**self.sources, **told})

    def record(self) -> dict[str, Any]:
        """All but the sources, as JSON and checkpoints hold it."""
        values = dataclasses.asdict(self)
        del values["sources"]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def rows(self) -> list[list[str]]:
        """(name, value, source) of every value, for a table."""
        return [
            [name, ", ".join(map(str, v)) if isinstance(v, list) else str(v), self.sources[name]]
            for name, v in self.record().items()
            if name not in ("name", "dataset")
        ]


_FIELDS = tuple(f.name for f in dataclasses.fields(Recipe) if f.name not in ("name", "sources"))


def _recipe(name: str, source: str, others: dict[str, str], **values: Any) -> Recipe:
    """A recipe whose values come from one source, but for some."""
    return Recipe(name, **values, sources={**dict.fromkeys(_FIELDS, source), **others})


RECIPES: dict[str, Recipe] = {
    each.name: each
    for each in (
        _recipe(
            "cifar100",
            _COMMON,
            {
                "model": "the paper, Table 3's first row",
                "augmentation": _PAPER_51,
                "evaluation": f"{_PAPER_51}; the figures are those of CIFAR-100's training set",
            },
            dataset="cifar100",
            model="cifar_resnet50",
            epochs=300,
            batch=128,
            lr=0.1,
            milestones=(150, 225),
            gamma=0.1,
            momentum=0.9,
            nesterov=True,
            weight_decay=5e-4,
            augmentation="padding of 4 pixels, random 32x32 crop, random horizontal flip, then as "
            "for evaluation",
            evaluation="RGB minus (0.5071, 0.4865, 0.4409), over (0.2673, 0.2564, 0.2762)",
        ),
        _recipe(
            "imagenet",
            _CODE,
            {
                "model": "the paper, Table 4",
                "epochs": f"{_SCRIPT}; its own default is 90",
                "batch": _SCRIPT,
                "lr": _SCRIPT,
                "milestones": f"{_CODE}: times 0.1 every 30 epochs",
                "gamma": f"{_CODE}: times 0.1 every 30 epochs",
                "augmentation": f"{_PAPER_53}; {_CODE}",
                "evaluation": "the paper, Sec. 5.3: a single crop of 224x224; the rest from "
                + _CODE,
            },
            dataset="imagenet",
            model="resnet50",
            epochs=100,
            batch=256,
            lr=0.1,
            milestones=(30, 60, 90),
            gamma=0.1,
            momentum=0.9,
            nesterov=False,
            weight_decay=1e-4,
            augmentation="random crop of 8 to 100 % of the area, resized to 224x224, random "
            "horizontal flip, then normalised as for evaluation",
            evaluation="shorter side to 256, central 224x224, RGB minus (0.485, 0.456, 0.406), "
            "over (0.229, 0.224, 0.225)",
        ),
        _recipe(
            "digits",
            _OURS,
            {},
            dataset="digits",
            model="small_resnet",
            epochs=20,
            batch=64,
            lr=0.05,
            milestones=(10, 15),
            gamma=0.1,
            momentum=0.9,
            nesterov=True,
            weight_decay=5e-4,
            augmentation="scikit-learn's 8x8 digits enlarged to 16x16, padding of 2, random 16x16 "
            "crop",
            evaluation="enlarged to 16x16, from 0 .. 16 to -1 .. 1",
        ),
        _recipe(
            "textures",
            _OURS,
            {},
            dataset="textures",
            model="small_resnet",
            epochs=12,
            batch=64,
            lr=0.05,
            milestones=(6, 9),
            gamma=0.1,
            momentum=0.9,
            nesterov=True,
            weight_decay=5e-4,
            augmentation="a 24x24 patch from anywhere in a training tile, grey, random horizontal "
            "flip, then as for evaluation",
            evaluation="a 24x24 patch of a test tile, grey, of mean 0 and standard deviation 1",
        ),
    )
}
"""By name. ``python -m bam_kernels train --recipe NAME --show`` prints one."""
