"""A run's folder: its settings, its checkpoint, and its logs."""

from __future__ import annotations

import csv
import errno
import fcntl
import io
import json
import os
from pathlib import Path
from typing import Any

from bam_kernels.files import replacing
from bam_kernels.recipes import checkpoint
from bam_kernels.recipes.errors import RecipeError

Row = dict[str, float]
"""An epoch's figures, by the names of metrics.csv's columns."""


class RunFolder:
    """The files of one run.

    - ``settings.json``: what was asked for. A run that is resumed must have the same.
    - ``checkpoint.pth``: after the last whole epoch.
    - ``metrics.csv``: an epoch a row; made anew from the checkpoint, so that both tell the same.
    - ``timing.csv``: an epoch's seconds and images per second; not the same in any two runs.
    - ``tensorboard/``: the same figures, where TensorBoard is asked for.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings = path / "settings.json"
        self.checkpoint = path / "checkpoint.pth"
        self.metrics = path / "metrics.csv"
        self.timing = path / "timing.csv"
        self.tensorboard = path / "tensorboard"
        self._handle: int | None = None

    def _lock(self) -> str | None:
        """Keep other processes from the folder, until `close` or this one's end, however it comes;
        why that cannot be, in words, where another one is here."""
        if self._handle is not None or not self.path.is_dir():
            return None
        handle = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno == errno.EWOULDBLOCK:
                os.close(handle)
                return f"--out: another process trains in {self.path}"
            # A file system without locks: two runs in one folder are the user's to avoid.
        self._handle = handle
        return None

    def close(self) -> None:
        """Let other processes write here."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def problem(self, settings: dict[str, Any], *, resume: bool, force: bool) -> str | None:
        """Why a run with these settings cannot write here, in words; None where it can."""
        if self.path.exists() and not self.path.is_dir():
            return f"--out: expected a folder, got the file {self.path}"
        busy = self._lock()
        if busy is not None:
            return busy
        if resume and force:
            return "--resume, --force: expected at most one of the two, got both"
        here = self.settings.exists() or self.checkpoint.exists()
        if resume:
            return self._not_resumable(settings) if here else f"--resume: no run in {self.path}"
        if here and not force:
            return f"--out: {self.path} holds a run; --resume goes on, --force begins anew"
        others = [each.name for each in (self.metrics, self.timing) if each.exists()]
        if others and not here:
            return f"--out: {self.path} holds a {others[0]} that is no run's"
        return None

    def _not_resumable(self, settings: dict[str, Any]) -> str | None:
        try:
            if self.checkpoint.exists():
                found = checkpoint.load(self.checkpoint)["settings"]
            else:
                found = json.loads(self.settings.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:  # a RecipeError is a ValueError
            return f"--resume: {error}"
        # Through JSON, as what is compared with: tuples are lists there.
        told = checkpoint.difference(found, json.loads(json.dumps(settings)))
        return None if told is None else f"--resume: {self.path} holds another run: {told}"

    def begin(self, settings: dict[str, Any], *, resume: bool) -> None:
        """Make the folder ready: of a run before, nothing is left unless it is resumed.

        Raises:
            RecipeError: it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            busy = self._lock()
            if busy is not None:
                raise RecipeError(busy)
            if not resume:
                for file in (self.checkpoint, self.metrics, self.timing):
                    file.unlink(missing_ok=True)
                for file in self.tensorboard.glob("events.out.tfevents.*"):
                    file.unlink()
            with replacing(self.settings) as part:
                part.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise RecipeError(f"--out: expected a place to write to, got {error}") from error

    def write_metrics(self, rows: list[Row]) -> None:
        """metrics.csv, whole."""
        with replacing(self.metrics) as part:
            part.write_text(csv_text(rows), encoding="utf-8")

    def add_timing(self, epoch: int, seconds: float, images: int) -> None:
        """A row at the end of timing.csv: an epoch's training, without its evaluation."""
        row = {"epoch": epoch, "seconds": seconds, "images_per_second": images / seconds}
        new = not self.timing.exists()
        with self.timing.open("a", encoding="utf-8", newline="") as file:
            file.write(csv_text([row], header=new))


def csv_text(rows: list[Row], header: bool = True) -> str:
    """Rows as CSV, every digit of each number."""
    if not rows:
        return ""
    out = io.StringIO()
    writer = csv.DictWriter(out, rows[0], lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
