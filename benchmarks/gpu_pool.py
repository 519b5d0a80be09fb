"""What a run does while the device need not be quiet: jobs of several sections on one list."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from gpu_workers import TASK_SECONDS, Outcome, Task, Workers


@dataclasses.dataclass(frozen=True)
class Job:
    """A task of a section.

    Args:
        group: the section that wants its outcome.
        key: what the section knows it by.
        task: to run.
        seconds: that it may take.
    """

    group: str
    key: Hashable
    task: Task
    seconds: float = TASK_SECONDS


def in_turn(*queues: tuple[Sequence[Job], int]) -> list[Job]:
    """Several lists as one: so many of the first, so many of the second, and again from the first.

    Args:
        queues: each a list and how many of it come at a time.
    """
    chunks = [
        [jobs[i : i + size] for i in range(0, len(jobs), size)] for jobs, size in queues if jobs
    ]
    rounds = itertools.zip_longest(*chunks, fillvalue=())
    return [job for chunk in itertools.chain.from_iterable(rounds) for job in chunk]


class Pool:
    """Jobs and the processes that run them, the first first.

    Args:
        jobs: to run.
        count: processes; with 0 what is waited for runs in the caller.
        setup: run first in every process.
    """

    def __init__(self, jobs: Sequence[Job], count: int, setup: Task | None = None) -> None:
        self.jobs = list(jobs)
        seconds = {number: job.seconds for number, job in enumerate(self.jobs)}
        self._workers = Workers([job.task for job in self.jobs], count, seconds, setup)

    def wait(
        self, seconds: float, group: str | None = None, keys: Iterable[Any] | None = None
    ) -> None:
        """Until the jobs (of a group, or of these keys of it) are done or the time is up."""
        wanted = None if keys is None else set(keys)
        numbers = [
            number
            for number, job in enumerate(self.jobs)
            if group in (None, job.group) and (wanted is None or job.key in wanted)
        ]
        self._workers.wait(seconds, numbers)

    def outcomes(self, group: str) -> dict[Any, Outcome]:
        """By key, what became of the jobs of a group that are done."""
        done = dict(self._workers.done)
        return {self.jobs[n].key: done[n] for n in sorted(done) if self.jobs[n].group == group}

    def stop(self) -> None:
        """End the processes; what is done stays known."""
        self._workers.stop()
