"""A training run from its first epoch, or the one that it was stopped in, to its last."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bam_kernels.recipes import checkpoint, data, order
from bam_kernels.recipes.distributed import Group
from bam_kernels.recipes.engine import Precision, evaluate, train_epoch
from bam_kernels.recipes.errors import DivergedError, RecipeError
from bam_kernels.recipes.folder import Row, RunFolder
from bam_kernels.recipes.networks import Network
from bam_kernels.recipes.progress import progress, say
from bam_kernels.recipes.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides a run's numbers.

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


def run(settings: Settings, place: Place, group: Group) -> list[Row]:
    """Train, evaluate after every epoch, and write a checkpoint and the logs of each.

    The numbers are those of an uninterrupted run wherever it was stopped: weights, optimizer,
    schedule and scaler come from the checkpoint, the order of the images and their augmentation
    from (seed, epoch, image), and torch's generators are seeded by (seed, epoch, process) at the
    start of each epoch, so that there is no state of theirs to keep.

    Returns:
        An epoch a row: epoch (from 1), lr, train_loss, train_top1_error (%, in training mode, of
        augmented images), test_loss, test_top1_error, test_top5_error (%).

    Raises:
        RecipeError: see its message; nothing was overwritten.
        DivergedError: the loss is no longer a number.
    """
    recipe = settings.recipe
    folder = RunFolder(place.out)
    problem = None
    if group.first:
        record = settings.record()
        problem = folder.problem(record, resume=place.resume, force=place.force)
    group.agree(problem)
    if settings.sync_bn and (group.world == 1 or group.device.type == "cpu"):
        raise RecipeError("--sync-bn: expected several processes, on GPUs, got one, or CPUs")
    writer = _writer(folder, place, group)
    loaded = _data(settings, place, group)
    network = Network(
        settings.model,
        settings.attention,
        loaded.num_classes,
        loaded.in_channels,
        settings.options,
    )
    torch.manual_seed(order.seed_of("weights", settings.seed))
    model = network.build()
    if settings.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    form = torch.channels_last if settings.precision.channels_last else torch.contiguous_format
    model = model.to(group.device, memory_format=form)
    pin = group.device.type == "cuda"
    share = {"rank": group.rank, "world": group.world, "workers": place.workers, "pin": pin}
    loader, batches = order.train_loader(loaded.train, recipe.batch, settings.seed, **share)
    test = order.evaluation_loader(loaded.test, max(1, recipe.batch // group.world), **share)

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
    scaler = torch.amp.GradScaler(group.device.type, enabled=settings.precision.amp == "fp16")
    rows: list[Row] = []
    if place.resume and folder.checkpoint.exists():
        rows = _restore(folder, model, optimizer, scheduler, scaler)
    if group.first:
        folder.begin(settings.record(), resume=place.resume)
        if rows:
            folder.write_metrics(rows)
    group.wait()

    parallel = model
    if group.world > 1:
        ids = [group.device.index] if group.device.type == "cuda" else None
        parallel = DistributedDataParallel(model, device_ids=ids)
    with _deterministic(place.benchmark), writer(len(rows)) as write:
        for epoch in range(len(rows), recipe.epochs):
            begin = time.perf_counter()
            torch.manual_seed(order.seed_of("epoch", settings.seed, epoch, group.rank))
            batches.epoch = epoch
            lr = optimizer.param_groups[0]["lr"]
            with progress(
                f"epoch {epoch + 1}/{recipe.epochs}",
                len(batches),
                every=place.log_every,
                shown=group.first,
            ) as tell:
                trained = train_epoch(
                    parallel, loader, optimizer, scaler, settings.precision, group, tell
                )
            if not math.isfinite(trained.loss):
                raise DivergedError(
                    f"the loss is {trained.loss} in epoch {epoch + 1}; a smaller --lr may help"
                )
            seconds = time.perf_counter() - begin
            scheduler.step()
            group.same_buffers(model)
            tested = evaluate(model, test, settings.precision, group)
            row: Row = {
                "epoch": epoch + 1,
                "lr": lr,
                "train_loss": trained.loss,
                "train_top1_error": trained.top1_error,
                "test_loss": tested.loss,
                "test_top1_error": tested.top1_error,
                "test_top5_error": tested.top5_error,
            }
            rows.append(row)
            if group.first:
                checkpoint.save(
                    folder.checkpoint,
                    settings=settings.record(),
                    network=network.record(),
                    model=model.state_dict(),
                    optimizer=optimizer.state_dict(),
                    scheduler=scheduler.state_dict(),
                    scaler=scaler.state_dict(),
                    epoch=epoch + 1,
                    rows=rows,
                )
                folder.write_metrics(rows)
                images = len(batches) * recipe.batch
                folder.add_timing(
                    {"epoch": epoch + 1, "seconds": seconds, "images_per_second": images / seconds}
                )
                write(row)
    return rows


def _data(settings: Settings, place: Place, group: Group) -> data.Data:
    """The data set; of several processes the first one downloads it."""
    if place.download and not group.first:
        group.wait()
    try:
        return data.load(
            settings.recipe.dataset, place.data, download=place.download and group.first
        )
    finally:
        if place.download and group.first:
            group.wait()


def _restore(
    folder: RunFolder,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler,
) -> list[Row]:
    found = checkpoint.load(folder.checkpoint)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    for name, part in parts.items():
        try:
            part.load_state_dict(found[name])
        except (RuntimeError, ValueError, KeyError) as error:
            told = str(error).splitlines()[0]
            raise RecipeError(f"{folder.checkpoint}: its {name} does not fit: {told}") from error
    return found["rows"]


@contextlib.contextmanager
def _deterministic(benchmark: bool) -> Iterator[None]:
    """The same numbers in every run on the same machine, unless cuDNN is to choose by its clock."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.backends.cudnn.benchmark = benchmark
    torch.use_deterministic_algorithms(not benchmark, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=warn)
        torch.backends.cudnn.benchmark = before[1]


def _writer(folder: RunFolder, place: Place, group: Group) -> Callable:
    """Makes the context in which a row goes to stderr, and to TensorBoard where it is asked for.

    Raises:
        RecipeError: TensorBoard is not installed.
    """
    if place.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise RecipeError("--tensorboard needs tensorboard: pip install tensorboard") from error

    @contextlib.contextmanager
    def writer(done: int) -> Iterator[Callable[[Row], None]]:
        if not (place.tensorboard and group.first):
            yield _say
            return
        # What an interrupted run logged of the epoch that is repeated is dropped.
        with SummaryWriter(str(folder.tensorboard), purge_step=done + 1) as board:

            def write(row: Row) -> None:
                _say(row)
                for name, value in row.items():
                    if name != "epoch":
                        board.add_scalar(name, value, int(row["epoch"]))
                board.flush()

            yield write

    return writer


def _say(row: Row) -> None:
    say(
        f"epoch {row['epoch']:.0f}: lr {row['lr']:g}, train loss {row['train_loss']:.4f} error "
        f"{row['train_top1_error']:.2f} %, test loss {row['test_loss']:.4f} error "
        f"{row['test_top1_error']:.2f} % (top 5: {row['test_top5_error']:.2f} %)"
    )
