"""The processes that torchrun starts, or the one that there is without it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator

import torch
from torch import Tensor, distributed, nn

from bam_kernels.recipes.errors import RecipeError


@dataclasses.dataclass(frozen=True)
class Group:
    """Which of how many processes this is, and where it computes.

    Attributes:
        rank: from 0.
        world: how many there are.
        device: of this process.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes files and progress."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.world > 1:
            distributed.all_reduce(values)
        return values

    def same_buffers(self, model: nn.Module) -> None:
        """The first process's running statistics in all of them."""
        if self.world > 1:
            for buffer in model.buffers():
                distributed.broadcast(buffer, 0)

    def agree(self, problem: str | None) -> None:
        """Raise RecipeError in every process where the first one has a problem."""
        if self.world > 1:
            told = [problem]
            distributed.broadcast_object_list(told, 0, device=self.device)
            problem = told[0]
        if problem is not None:
            raise RecipeError(problem)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            distributed.barrier()


@contextlib.contextmanager
def group(device: str) -> Iterator[Group]:
    """The group of torchrun's environment (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``), or of one.

    Args:
        device: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1", ...; of several
            processes each takes the GPU of its ``LOCAL_RANK``.

    Raises:
        RecipeError: no such device.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = device_of(device, local if world > 1 else None)
    if world == 1:
        yield Group(0, 1, chosen)
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    distributed.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Group(rank, world, chosen)
    finally:
        distributed.destroy_process_group()


def device_of(name: str, local: int | None = None) -> torch.device:
    """The device of a name.

    Args:
        name: "auto", "cpu", "cuda", ...
        local: the number of the GPU for a name without one.

    Raises:
        RecipeError: there is no such device, or it does not compute.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None and local is not None:
            device = torch.device("cuda", local)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as problem:
        told = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        raise RecipeError(f"--device: expected one that is here, got {name}: {told}") from problem
    if device.type == "meta":
        raise RecipeError("--device: expected one that computes, got meta")
    return device
