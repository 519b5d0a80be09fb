"""One epoch of training, and one evaluation."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bam_kernels.recipes.distributed import Group

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""By the name that ``--amp`` takes."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """Means over the images of all processes.

    Attributes:
        loss: cross entropy.
        top1_error: in %.
        top5_error: in %; with five classes or fewer it is 0.
    """

    loss: float
    top1_error: float
    top5_error: float


class _Sums:
    """Sums of loss and of hits, on the device: reading them there would wait at every step."""

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(4, dtype=torch.float64, device=device)

    def add(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        n = len(targets)
        best = logits.detach().topk(min(5, logits.shape[1]), dim=1).indices
        hits = best == targets[:, None]
        self.values[0] += loss.detach().double() * n
        self.values[1] += hits[:, 0].sum()
        self.values[2] += hits.sum()
        self.values[3] += n

    def scores(self, group: Group) -> Scores:
        loss, top1, top5, n = group.total(self.values.clone()).tolist()
        return Scores(loss / n, 100 * (1 - top1 / n), 100 * (1 - top5 / n))


@dataclasses.dataclass(frozen=True)
class Precision:
    """How images and activations lie in memory and what they are rounded to.

    Attributes:
        amp: None for float32, "bf16" or "fp16".
        channels_last: the memory format of images and weights.
    """

    amp: str | None = None
    channels_last: bool = False

    @property
    def memory_format(self) -> torch.memory_format:
        """Of images and weights."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager:
        """The context of a forward."""
        if self.amp is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, AMP_DTYPES[self.amp])

    def place(self, images: Tensor, targets: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Both on the device."""
        images = images.to(device, non_blocking=True, memory_format=self.memory_format)
        return images, targets.to(device, non_blocking=True)


def train_epoch(
    model: nn.Module,
    loader: Iterable,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    precision: Precision,
    group: Group,
    tell: Callable[[int, Tensor], None],
) -> Scores:
    """Train on every batch of the loader.

    Args:
        model: images [N, C, H, W] to logits [N, classes]; DDP's where there are several processes.
        loader: batches of (images, targets).
        optimizer: of its parameters.
        scaler: enabled for "fp16".
        precision: see `Precision`.
        group: the processes.
        tell: called after each step with its number, from 1, and the batch's loss.

    Returns:
        The means over the epoch's batches, in training mode.
    """
    model.train()
    sums = _Sums(group.device)
    for step, batch in enumerate(loader, 1):
        images, targets = precision.place(*batch, group.device)
        optimizer.zero_grad(set_to_none=True)
        with precision.autocast(group.device):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), targets)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        sums.add(loss, logits, targets)
        tell(step, loss.detach())
    return sums.scores(group)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable,
    precision: Precision,
    group: Group,
    tell: Callable[[int, Tensor], None],
) -> Scores:
    """The scores on every batch of all processes' loaders, in eval mode; arguments as above.

    `model` is not DDP's: shares of different lengths would leave it waiting.
    """
    model.eval()
    sums = _Sums(group.device)
    for step, batch in enumerate(loader, 1):
        images, targets = precision.place(*batch, group.device)
        with precision.autocast(group.device):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), targets)
        sums.add(loss, logits, targets)
        tell(step, loss)
    return sums.scores(group)
