"""Processes that fill the compilers' caches on disk, so that what is timed later compiles fast.

They run on the device while nothing is timed, and are ended before anything is.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import queue
import time
from collections.abc import Callable, Sequence
from typing import Any

Task = tuple[str, tuple[Any, ...]]
"""("module:function", arguments): called for its effect on the caches."""


def task_name(function: Callable[..., object]) -> str:
    """How a task names a module's function, which a process imports anew."""
    return f"{function.__module__}:{function.__qualname__}"


def run_task(task: Task) -> str | None:
    """Run a task; None, or what went wrong."""
    target, arguments = task
    module, name = target.split(":")
    try:
        getattr(importlib.import_module(module), name)(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def _work(tasks: Any, results: Any) -> None:
    while (entry := tasks.get()) is not None:
        number, task = entry
        results.put((number, run_task(task)))


class Workers:
    """`count` processes that take tasks off one list, the first first.

    Args:
        tasks: to run.
        count: processes; 0 runs every task here and now.
    """

    def __init__(self, tasks: Sequence[Task], count: int) -> None:
        self.tasks = list(tasks)
        self.done: dict[int, str | None] = {}
        """By a finished task's number: None, or what went wrong."""
        self._processes: list[Any] = []
        if count <= 0:
            self.done = {number: run_task(task) for number, task in enumerate(self.tasks)}
            return
        # Their compilers must not fork pools of their own: the processes are parallel enough.
        previous = os.environ.get("TORCHINDUCTOR_COMPILE_THREADS")
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
        try:
            context = multiprocessing.get_context("spawn")
            # Kept: a queue that is collected takes its lock from children that are still starting.
            self._waiting = waiting = context.Queue()
            self._results = context.Queue()
            count = min(count, len(self.tasks))
            for entry in [*enumerate(self.tasks), *[None] * count]:
                waiting.put(entry)
            waiting.cancel_join_thread()  # tasks that nobody took must not hold up the exit
            for _ in range(count):
                process = context.Process(target=_work, args=(waiting, self._results), daemon=True)
                process.start()
                self._processes.append(process)
        finally:
            if previous is None:
                del os.environ["TORCHINDUCTOR_COMPILE_THREADS"]
            else:
                os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = previous

    def wait(self, seconds: float) -> None:
        """Until every task is done, every process has ended, or the time is up."""
        end = time.monotonic() + seconds
        while len(self.done) < len(self.tasks):
            alive = any(process.is_alive() for process in self._processes)
            try:
                number, outcome = self._results.get(timeout=0.2 if alive else 0.01)
            except queue.Empty:
                if not alive:
                    return
            else:
                self.done[number] = outcome
            if time.monotonic() > end:
                return

    def stop(self) -> None:
        """Collect what is there and end the processes, busy or not."""
        with contextlib.suppress(queue.Empty):
            while self._processes:
                number, outcome = self._results.get(timeout=0.05)
                self.done[number] = outcome
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._processes = []
