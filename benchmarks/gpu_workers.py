"""Processes that run what needs no quiet device, or what may hang or crash, a task at a time.

A task that outlives its time is ended with its process; so is a process whose CUDA context an error
has spoilt. Another takes its place, and the other tasks do not notice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Task = tuple[str, tuple[Any, ...]]
"""("module:function", arguments). Arguments and result are pickled."""

TASK_SECONDS = 120.0
START_SECONDS = 120.0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a task: its result, or in a few words what went wrong."""

    error: str | None
    result: Any = None


def task_name(function: Callable[..., object]) -> str:
    """How a task names a module's function, which a process imports anew."""
    return f"{function.__module__}:{function.__qualname__}"


def run_task(task: Task) -> Outcome:
    """Run a task here and now."""
    target, arguments = task
    module, name = target.split(":")
    try:
        return Outcome(None, getattr(importlib.import_module(module), name)(*arguments))
    except Exception as error:
        where = " < ".join(
            f"{Path(frame.filename).name}:{frame.lineno}"
            for frame in reversed(traceback.extract_tb(error.__traceback__)[-4:])
        )
        text = " ".join(str(error).split())
        return Outcome(f"{type(error).__name__}: {text[:400]} (at {where})")


def device_is_usable() -> bool:
    """Whether work on the CUDA device can go on: an illegal access spoils a process for good."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except Exception:
        return False
    return True


def use_part_of_memory(part: float) -> None:
    """Allow this process its part of the device's memory, which others need too: a setup task."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(part)


def _work(pipe: Any, setup: Task | None) -> None:
    """A process's life: tasks from the pipe, outcomes into it, until it is closed."""
    os.setsid()  # what it starts, compilers and sanitizers, ends with it
    # Compilers must not fork pools of their own: the processes are parallel enough.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    if setup is not None:
        run_task(setup)
    with contextlib.suppress(EOFError, OSError):
        pipe.send(None)
        while True:
            outcome = run_task(pipe.recv())
            usable = outcome.error is None or device_is_usable()
            try:
                pipe.send((outcome, usable))
            except (pickle.PicklingError, TypeError, AttributeError) as error:
                pipe.send((Outcome(f"{type(error).__name__}: {error}"[:300]), usable))


class Child:
    """One process that runs tasks, and another in its place where one hangs or dies.

    Args:
        setup: run first in every process.
        here: no process: tasks run in the caller, who cannot be rid of one that hangs.
    """

    def __init__(self, setup: Task | None = None, here: bool = False) -> None:
        self._setup = setup
        self._here = here
        self._process: Any = None
        self._pipe: Any = None
        self._closed = False
        self._lock = threading.Lock()

    def call(self, task: Task, seconds: float = TASK_SECONDS) -> Outcome:
        """Run a task, for `seconds` at most once the process has started."""
        if self._here:
            return run_task(task)
        try:
            if not self._start():
                return Outcome("the process did not start")
            self._pipe.send(task)
            if not self._pipe.poll(seconds):
                self.kill()
                return Outcome(f"killed: it took more than {seconds:.0f} s")
            outcome, usable = self._pipe.recv()
            if not usable:
                self.kill()
            return outcome
        except (EOFError, OSError):
            process = self._process
            if process is not None:
                process.join(5.0)
            status = None if process is None else process.exitcode
            self.kill()
            return Outcome(f"the process ended in the middle of it, with exit status {status}")

    def _start(self) -> bool:
        if self._process is not None and self._process.is_alive():
            return True
        self.kill()
        with self._lock:
            if self._closed:
                return False
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_work, args=(theirs, self._setup), daemon=True)
            self._process.start()
            theirs.close()  # so that the end of the process is the end of the pipe
        if not self._pipe.poll(START_SECONDS):
            self.kill()
            return False
        self._pipe.recv()
        return True

    def kill(self) -> None:
        """End the process and what it started, busy or not; the next call starts another."""
        with self._lock:
            process, self._process = self._process, None
            if process is None or process.pid is None:
                return
            process.kill()
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()

    def close(self) -> None:
        """The same, and no other is started."""
        self._closed = True
        self.kill()


class Workers:
    """`count` processes that take tasks off one list, the first first.

    Args:
        tasks: to run.
        count: processes; with 0 the tasks that are waited for run in the caller.
        seconds: by a task's number, what it may take; `TASK_SECONDS` where it is not there.
        setup: run first in every process.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        count: int,
        seconds: Mapping[int, float] | None = None,
        setup: Task | None = None,
    ) -> None:
        self.tasks = list(tasks)
        self.done: dict[int, Outcome] = {}
        """By a finished task's number."""
        self._seconds = dict(seconds or {})
        self._next = 0
        self._stopped = False
        self._changed = threading.Condition()
        self._children = [Child(setup) for _ in range(min(count, len(self.tasks)))]
        self._threads = [
            threading.Thread(target=self._serve, args=(child,), daemon=True)
            for child in self._children
        ]
        for thread in self._threads:
            thread.start()

    def _serve(self, child: Child) -> None:
        while True:
            with self._changed:
                if self._stopped or self._next >= len(self.tasks):
                    break
                number = self._next
                self._next += 1
            seconds = self._seconds.get(number, TASK_SECONDS)
            outcome = child.call(self.tasks[number], seconds)
            with self._changed:
                if self._stopped:  # it was ended for that: nothing is known of the task
                    break
                self.done[number] = outcome
                self._changed.notify_all()
        child.close()

    def wait(self, seconds: float, numbers: Iterable[int] | None = None) -> None:
        """Until these tasks (all, unless some are named) are done or the time is up."""
        end = time.monotonic() + seconds
        wanted = set(range(len(self.tasks)) if numbers is None else numbers)
        if not self._children:
            for number in sorted(wanted - set(self.done)):
                if time.monotonic() > end:
                    return
                self.done[number] = run_task(self.tasks[number])
            return
        with self._changed:
            self._changed.wait_for(
                lambda: self._stopped or wanted <= set(self.done), max(0.0, seconds)
            )

    def stop(self) -> None:
        """End the processes, busy or not; what was done stays in `done`."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for child in self._children:
            child.close()
        for thread in self._threads:
            thread.join()
        self._children, self._threads = [], []
