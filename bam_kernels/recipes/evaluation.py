"""A checkpoint's network on its test set."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from bam_kernels.recipes import checkpoint, data, order
from bam_kernels.recipes.distributed import Group
from bam_kernels.recipes.engine import Precision, Scores, evaluate
from bam_kernels.recipes.errors import RecipeError, need
from bam_kernels.recipes.networks import Network
from bam_kernels.recipes.progress import progress


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What was evaluated, and its scores.

    Attributes:
        scores: see `Scores`.
        network: the record of the checkpoint's `Network`.
        dataset: whose test set.
        epoch: after which the checkpoint was written.
        images: how many.
    """

    scores: Scores
    network: dict[str, Any]
    dataset: str
    epoch: int
    images: int


def load_network(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a checkpoint of ``train``, in eval mode on the CPU, and the checkpoint.

    Raises:
        RecipeError: no such checkpoint, a damaged one, or one whose weights do not fit.
    """
    found = checkpoint.load(path)
    try:
        network = Network(**found["network"])
    except TypeError as error:
        raise RecipeError(f"{path}: expected the record of a network: {error}") from error
    model = network.build()
    try:
        model.load_state_dict(found["model"])
    except RuntimeError as error:
        raise RecipeError(
            f"{path}: its weights are not those of {network.name}: {str(error).splitlines()[0]}"
        ) from error
    return model.eval(), found


def evaluate_checkpoint(
    path: Path,
    folder: Path | None,
    group: Group,
    *,
    precision: Precision = Precision(),  # noqa: B008 - frozen
    batch: int | None = None,
    workers: int = 0,
) -> Evaluation:
    """Evaluate a checkpoint of ``train`` on the test set of its recipe.

    Args:
        path: the checkpoint.
        folder: the data set's folder; None where it comes with a package.
        group: the processes.
        precision: see `Precision`; float32 unless given.
        batch: images at once in all processes; the recipe's unless given.
        workers: processes that load images.

    Raises:
        RecipeError: the checkpoint or the data do not serve.
    """
    need("evaluation", "tqdm")
    model, found = load_network(path)
    recipe = found["settings"]["recipe"]
    loaded = data.load(recipe["dataset"], folder)
    if loaded.num_classes != found["network"]["num_classes"]:
        raise RecipeError(
            f"{path}: expected data of {found['network']['num_classes']} classes, "
            f"got {loaded.num_classes}"
        )
    model = model.to(group.device)
    loader = order.evaluation_loader(
        loaded.test,
        max(1, (batch or recipe["batch"]) // group.world),
        rank=group.rank,
        world=group.world,
        workers=workers,
        pin=group.device.type == "cuda",
    )
    with progress("test", len(loader), shown=group.first) as tell:
        scores = evaluate(model, loader, precision, group, tell)
    images = len(loaded.test)
    return Evaluation(scores, found["network"], recipe["dataset"], found["epoch"], images)
