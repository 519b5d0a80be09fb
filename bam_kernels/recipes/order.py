"""Which images make a batch, and how each is augmented: by (seed, epoch, image) and nothing else.

Neither an interruption nor the number of processes or of workers changes either, so that a resumed
run goes on exactly as one that was not interrupted, and two processes train as one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from bam_kernels.recipes.errors import RecipeError

Key = tuple[int, int]
"""(epoch, index of the image)."""


def seed_of(*parts: int | str) -> int:
    """A seed for torch's generators from numbers and words: another for each other combination."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Seeded(Dataset):
    """A data set whose item (epoch, index) is drawn by a generator that these two seed."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: Key) -> Any:
        epoch, index = key
        # Transforms draw from the global generator: it is seeded for the item, then put back.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of("item", self.seed, epoch, index))
            return self.dataset[index]


class EpochBatches(Sampler[list[Key]]):
    """One process's share of each step's batch; set `epoch` before iterating.

    A step takes the next `batch` images of the epoch's order, of which process `rank` of `world`
    gets every `world`-th. What is left at the end, fewer than a batch, is left out of this epoch: a
    batch of one image has no batch statistics, and uneven shares no mean gradient.

    Raises:
        RecipeError: `batch` does not divide by `world`, leaves a process a single image, or
            there are fewer images.
    """

    def __init__(self, length: int, batch: int, seed: int, rank: int = 0, world: int = 1) -> None:
        if batch % world:
            raise RecipeError(f"--batch: expected a multiple of the {world} processes, got {batch}")
        if batch // world < 2:
            raise RecipeError(
                f"--batch: expected at least 2 images a process, got {batch // world}"
            )
        if length < batch:
            raise RecipeError(
                f"--batch: expected at most the {length} images of the training set, got {batch}"
            )
        self.length, self.batch, self.seed = length, batch, seed
        self.rank, self.world = rank, world
        self.epoch = 0

    def __len__(self) -> int:
        return self.length // self.batch

    def __iter__(self) -> Iterator[list[Key]]:
        generator = torch.Generator().manual_seed(seed_of("order", self.seed, self.epoch))
        order = torch.randperm(self.length, generator=generator).tolist()
        for step in range(len(self)):
            whole = order[step * self.batch : (step + 1) * self.batch]
            yield [(self.epoch, index) for index in whole[self.rank :: self.world]]


def train_loader(
    dataset: Dataset, batch: int, seed: int, *, rank: int, world: int, workers: int, pin: bool
) -> tuple[DataLoader, EpochBatches]:
    """Batches of (images, targets), and the sampler whose `epoch` is to be set before each epoch.

    Raises:
        RecipeError: see `EpochBatches`.
    """
    batches = EpochBatches(len(dataset), batch, seed, rank, world)
    loader = DataLoader(
        Seeded(dataset, seed),
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=pin,
        persistent_workers=workers > 0,
    )
    return loader, batches


def evaluation_loader(
    dataset: Dataset, batch: int, *, rank: int, world: int, workers: int, pin: bool
) -> DataLoader:
    """One process's share of the test set, each image once in one of them."""
    share = torch.utils.data.Subset(dataset, range(rank, len(dataset), world))
    return DataLoader(share, batch_size=batch, num_workers=workers, pin_memory=pin)
