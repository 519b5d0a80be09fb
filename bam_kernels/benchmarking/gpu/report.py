"""The run's bookkeeping: the time it may take, what it left out, and the JSON it writes."""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# How the time that is left is shared between a section and those after it.
WEIGHTS = {
    "bandwidth": 2, "times": 30, "kernels": 8, "profile": 10, "sweep": 25, "compile": 45,
    "tuned": 10,
}  # fmt: skip

FORMAT = 1


class OutOfTime(BaseException):
    """The hard limit has passed. Not an Exception: whatever catches those must not catch this."""


class Report:
    """The JSON of a run, rewritten whole and at once, so that there is always a readable one.

    Args:
        path: of the JSON.
        header: what stands at its top.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self.data: dict[str, Any] = {"format": FORMAT, **header, "left_out": []}

    def leave_out(self, section: str, what: str, why: str) -> None:
        """Say that something was not done."""
        self.data["left_out"].append({"section": section, "what": what, "why": why})

    def save(self) -> None:
        """Write the JSON to a neighbour and put it in place of the old one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        part.write_text(json.dumps(finite(self.data), indent=1, allow_nan=False) + "\n")
        os.replace(part, self.path)


def finite(value: Any) -> Any:
    """value with every float that JSON cannot hold (NaN, infinities) spelt as a string."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


class Budget:
    """The wall time of the whole run.

    Args:
        seconds: that it may take.
        sections: that will run, in order; weights of `WEIGHTS` share the time among them.
        report: hears of what is left out.
        started: on `now`'s clock.
        now: a clock in seconds.
    """

    def __init__(
        self,
        seconds: float,
        sections: Sequence[str],
        report: Report,
        started: float | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.seconds = seconds
        self.sections = list(sections)
        self.report = report
        self.now = now
        self.started = now() if started is None else started

    def elapsed(self) -> float:
        """Seconds since the start."""
        return self.now() - self.started

    def left(self) -> float:
        """Seconds until the end; negative past it."""
        return self.seconds - self.elapsed()

    def section(self, name: str, at_most: float = math.inf) -> Section:
        """Begin a section: it may take its share of the time left, and `at_most` seconds."""
        later = self.sections[self.sections.index(name) :] if name in self.sections else [name]
        weight = WEIGHTS.get(name, 0)
        total = sum(WEIGHTS.get(other, 0) for other in later)
        share = self.left() * weight / total if weight else self.left()
        return Section(self, name, min(share, at_most))


class Section:
    """A section's share: asked before each piece of work whether that still fits.

    Args:
        budget: of the run.
        name: of the section.
        seconds: its share.
    """

    def __init__(self, budget: Budget, name: str, seconds: float) -> None:
        self.budget = budget
        self.name = name
        self.seconds = seconds
        self.started = budget.now()

    def left(self) -> float:
        """Seconds of the share that are left; negative past it."""
        return self.seconds - (self.budget.now() - self.started)

    def expired(self) -> bool:
        """Whether the share is used up."""
        return self.left() <= 0

    def allows(self, seconds: float, what: str) -> bool:
        """Whether `what`, expected to take `seconds`, still fits; if not, it is left out."""
        left = self.left()
        if seconds <= left:
            return True
        self.budget.report.leave_out(
            self.name, what, f"needs about {seconds:.1f} s, {max(left, 0.0):.1f} s were left"
        )
        return False


class Estimate:
    """What the next piece of work will take, from the last ones.

    The first of a process imports and compiles what the others find done: it counts only as long as
    there is no other.

    Args:
        first: seconds, before anything is known.
    """

    def __init__(self, first: float) -> None:
        self.first = first
        self.seen: list[float] = []

    def add(self, seconds: float) -> None:
        """A piece took this long."""
        self.seen.append(seconds)

    def next(self) -> float:
        """Seconds: half as much again as the median of the last four; after the first piece, no
        longer than that one took."""
        last = self.seen[1:][-4:]
        return 1.5 * statistics.median(last) if last else (self.seen or [self.first])[0]
