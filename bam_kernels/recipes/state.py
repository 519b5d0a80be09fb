"""What changes in a run from epoch to epoch, and its way into a checkpoint and back."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import nn

from bam_kernels.recipes import checkpoint
from bam_kernels.recipes.errors import RecipeError
from bam_kernels.recipes.folder import Row
from bam_kernels.recipes.networks import Network
from bam_kernels.recipes.order import seed_of
from bam_kernels.recipes.settings import Settings


@dataclasses.dataclass
class State:
    """Of a run.

    Attributes:
        model: on its device.
        optimizer: SGD over its parameters.
        scheduler: of the learning rate, stepped after an epoch.
        scaler: of the gradients; does nothing unless the precision is "fp16".
        rows: the figures of the epochs that are done.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    rows: list[Row]

    @classmethod
    def fresh(cls, settings: Settings, network: Network, device: torch.device) -> State:
        """Before the first epoch; the weights go by the seed alone.

        Raises:
            RecipeError: no such network.
        """
        recipe = settings.recipe
        torch.manual_seed(seed_of("weights", settings.seed))
        model = network.build()
        if settings.sync_bn:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        model = model.to(device, memory_format=settings.precision.memory_format)
        optimizer = torch.optim.SGD(
            model.parameters(),
            recipe.lr,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
            weight_decay=recipe.weight_decay,
        )
        scheduler = torch.optim.lr_scheduler.MultiStepLR(
            optimizer, list(recipe.milestones), recipe.gamma
        )
        scaler = torch.amp.GradScaler(device.type, enabled=settings.precision.amp == "fp16")
        return cls(model, optimizer, scheduler, scaler, [])

    def save(self, path: Path, settings: Settings, network: Network) -> None:
        """Write a checkpoint.

        Raises:
            RecipeError: it cannot be written; the one before stays.
        """
        try:
            checkpoint.save(
                path,
                settings=settings.record(),
                network=network.record(),
                epoch=len(self.rows),
                rows=self.rows,
                **{name: part.state_dict() for name, part in self._parts().items()},
            )
        except (OSError, RuntimeError) as error:  # torch's, of a full disk
            raise RecipeError(f"{path}: cannot be written: {str(error).splitlines()[0]}") from error

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            RecipeError: it cannot be read, or does not fit.
        """
        found = checkpoint.load(path)
        for name, part in self._parts().items():
            try:
                part.load_state_dict(found[name])
            except (RuntimeError, ValueError, KeyError) as error:
                told = str(error).splitlines()[0]
                raise RecipeError(f"{path}: its {name} does not fit: {told}") from error
        self.rows = found["rows"]

    def _parts(self) -> dict:
        names = ("model", "optimizer", "scheduler", "scaler")
        return {name: getattr(self, name) for name in names}
