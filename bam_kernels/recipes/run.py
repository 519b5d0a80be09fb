"""A training run from its first epoch, or the one that it was stopped in, to its last."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import deterministic
from torch.utils.data import DataLoader

from bam_kernels.recipes import data, order
from bam_kernels.recipes.distributed import Group
from bam_kernels.recipes.engine import Scores, evaluate, train_epoch
from bam_kernels.recipes.errors import DivergedError, RecipeError, need
from bam_kernels.recipes.folder import Row, RunFolder
from bam_kernels.recipes.networks import Network
from bam_kernels.recipes.progress import progress, say
from bam_kernels.recipes.settings import Place, Settings
from bam_kernels.recipes.state import State


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
    recipe, precision = settings.recipe, settings.precision
    need("training", "tqdm")
    folder = RunFolder(place.out)
    with contextlib.ExitStack() as stack:
        problem = None
        if group.first:
            stack.callback(folder.close)
            record = settings.record()
            problem = folder.problem(record, resume=place.resume, force=place.force)
        group.agree(problem)
        if settings.sync_bn and (group.world == 1 or group.device.type == "cpu"):
            raise RecipeError("--sync-bn: expected several processes, on GPUs, got one, or CPUs")
        board = _board(folder, place, group)
        loaded = _data(settings, place, group)
        loader, batches, test = _loaders(loaded, settings, place, group)
        network = Network(
            settings.model,
            settings.attention,
            loaded.num_classes,
            loaded.in_channels,
            settings.options,
        )
        state = State.fresh(settings, network, group.device)
        if place.resume and folder.checkpoint.exists():
            state.restore(folder.checkpoint)
        if group.first:
            folder.begin(settings.record(), resume=place.resume)
            if state.rows:
                folder.write_metrics(state.rows)
        group.wait()
        model = _parallel(state.model, group)
        stack.enter_context(_deterministic(place.benchmark))
        log = stack.enter_context(board(len(state.rows)))
        for epoch in range(len(state.rows), recipe.epochs):
            begin = time.perf_counter()
            torch.manual_seed(order.seed_of("epoch", settings.seed, epoch, group.rank))
            batches.epoch = epoch
            lr = state.optimizer.param_groups[0]["lr"]
            title = f"epoch {epoch + 1}/{recipe.epochs}"
            shown = {"every": place.log_every, "shown": group.first}
            with progress(title, len(batches), **shown) as tell:
                trained = train_epoch(
                    model, loader, state.optimizer, state.scaler, precision, group, tell
                )
            seconds = time.perf_counter() - begin
            if not math.isfinite(trained.loss):
                raise DivergedError(
                    f"the loss is {trained.loss} in epoch {epoch + 1}; a smaller --lr may help"
                )
            state.scheduler.step()
            group.same_buffers(state.model)
            with progress(f"{title}, test", len(test), shown=group.first) as tell:
                tested = evaluate(state.model, test, precision, group, tell)
            state.rows.append(_row(epoch, lr, trained, tested))
            if group.first:
                state.save(folder.checkpoint, settings, network)
                folder.write_metrics(state.rows)
                folder.add_timing(epoch + 1, seconds, len(batches) * recipe.batch)
                log(state.rows[-1])
    return state.rows


def _row(epoch: int, lr: float, trained: Scores, tested: Scores) -> Row:
    return {
        "epoch": epoch + 1,
        "lr": lr,
        "train_loss": trained.loss,
        "train_top1_error": trained.top1_error,
        "test_loss": tested.loss,
        "test_top1_error": tested.top1_error,
        "test_top5_error": tested.top5_error,
    }


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


def _loaders(
    loaded: data.Data, settings: Settings, place: Place, group: Group
) -> tuple[DataLoader, order.EpochBatches, DataLoader]:
    """Of training, with what decides its order, and of testing."""
    batch = settings.recipe.batch
    share = {
        "rank": group.rank,
        "world": group.world,
        "workers": place.workers,
        "pin": group.device.type == "cuda",
    }
    loader, batches = order.train_loader(loaded.train, batch, settings.seed, **share)
    test = order.evaluation_loader(loaded.test, max(1, batch // group.world), **share)
    return loader, batches, test


def _parallel(model: nn.Module, group: Group) -> nn.Module:
    """The model, or DDP around it."""
    if group.world == 1:
        return model
    ids = [group.device.index] if group.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids)


@contextlib.contextmanager
def _deterministic(benchmark: bool) -> Iterator[None]:
    """The same numbers in every run on the same machine, unless cuDNN is to choose by its clock."""
    was = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    chose, filled = torch.backends.cudnn.benchmark, deterministic.fill_uninitialized_memory
    # cuBLAS asks for it, before its first product.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = benchmark
    torch.use_deterministic_algorithms(not benchmark, warn_only=True)
    # Torch would write each output once more, lest somebody reads what nobody wrote.
    deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warned)
        torch.backends.cudnn.benchmark = chose
        deterministic.fill_uninitialized_memory = filled


def _board(
    folder: RunFolder, place: Place, group: Group
) -> Callable[[int], contextlib.AbstractContextManager[Callable[[Row], None]]]:
    """Makes, of the number of epochs that are done, the context in which a row goes to stderr, and
    to TensorBoard where it is asked for.

    Raises:
        RecipeError: TensorBoard is not installed.
    """
    if place.tensorboard:
        need("--tensorboard", "tensorboard")

    @contextlib.contextmanager
    def board(done: int) -> Iterator[Callable[[Row], None]]:
        if not (place.tensorboard and group.first):
            yield _say
            return
        from torch.utils.tensorboard import SummaryWriter

        # What an interrupted run logged of the epoch that is repeated is dropped.
        with SummaryWriter(str(folder.tensorboard), purge_step=done + 1) as writer:

            def log(row: Row) -> None:
                _say(row)
                for name, value in row.items():
                    if name != "epoch":
                        writer.add_scalar(name, value, int(row["epoch"]))
                writer.flush()

            yield log

    return board


def _say(row: Row) -> None:
    say(
        f"epoch {row['epoch']:.0f}: lr {row['lr']:g}, train loss {row['train_loss']:.4f} error "
        f"{row['train_top1_error']:.2f} %, test loss {row['test_loss']:.4f} error "
        f"{row['test_top1_error']:.2f} % (top 5: {row['test_top5_error']:.2f} %)"
    )
