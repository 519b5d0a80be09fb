"""A study: the same network with and without attention, by the same recipe, over several seeds.

Each run is a ``train`` command of its own, on one thread unless told otherwise, several at a time:
small networks gain less from a second thread than from a second run. What is stopped goes on where
it was, as ``train --resume`` does. Hyper-parameters are the recipe's for every variant, tuned for
none; the error is that after the last epoch, not the least of all epochs, which would be chosen by
the test set. A seed decides the weights that all variants share, the order of the images and their
augmentation: variants can be compared seed by seed.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bam_kernels.files import replacing
from bam_kernels.recipes import checkpoint
from bam_kernels.recipes.errors import RecipeError
from bam_kernels.recipes.recipe import Recipe

PROGRAM = (sys.executable, "-m", "bam_kernels")
"""What runs ``train``."""

VARIANTS: dict[str, str | None] = {"baseline": None, "+SE": "se", "+BAM-C": "bam-c", "+BAM": "bam"}
"""By name, the attention (Tables 2, 3 and 10)."""


@dataclasses.dataclass(frozen=True)
class Study:
    """What is compared.

    Attributes:
        recipe: of every run.
        model: the network.
        reduction: r of SE, BAM-C and BAM.
        seeds: how many; they are 0, 1, ...
        out: the study's folder; a run's is ``runs/NAME-SEED`` in it.
        data: the data set's folder; None where it comes with a package.
        processes: runs at a time.
        threads: of a run.
        device: as ``train --device`` takes it.
    """

    recipe: Recipe
    model: str
    reduction: int
    seeds: int
    out: Path
    data: Path | None = None
    processes: int = 1
    threads: int = 1
    device: str = "cpu"

    def record(self) -> dict[str, Any]:
        """What must be the same for a study to go on; more seeds may be added."""
        return {
            "recipe": self.recipe.record(),
            "model": self.model,
            "reduction": self.reduction,
            "threads": self.threads,
            "device": self.device,
        }

    def runs(self) -> list[tuple[str, int]]:
        """(variant, seed), seed by seed: what is stopped early has as many of each variant."""
        return [(name, seed) for seed in range(self.seeds) for name in VARIANTS]

    def folder(self, name: str, seed: int) -> Path:
        """Of a run."""
        return self.out / "runs" / f"{name.removeprefix('+').lower()}-{seed}"

    def log(self, name: str, seed: int) -> Path:
        """What a run printed."""
        return self.folder(name, seed).with_suffix(".log")

    def options(self, name: str) -> dict[str, int]:
        """Of a variant's attention."""
        return {} if VARIANTS[name] is None else {"reduction": self.reduction}

    def command(self, name: str, seed: int) -> list[str]:
        """The ``train`` command of a run, which goes on where there is something to go on with."""
        recipe, folder = self.recipe, self.folder(name, seed)
        words = [*PROGRAM, "train", f"--recipe={recipe.name}"]
        words += [f"--model={self.model}", f"--attention={VARIANTS[name] or 'none'}"]
        words += [f"--{key}={value}" for key, value in self.options(name).items()]
        words += [f"--epochs={recipe.epochs}", f"--batch={recipe.batch}", f"--lr={recipe.lr!r}"]
        words += [f"--weight-decay={recipe.weight_decay!r}"]
        words += ["--milestones", *map(str, recipe.milestones)] if recipe.milestones else []
        words += [f"--seed={seed}", f"--out={folder}", f"--device={self.device}"]
        words += ["--channels-last"]
        words += [] if self.data is None else [f"--data={self.data}"]
        words += ["--resume"] if (folder / "settings.json").exists() else []
        return words

    def rows(self, name: str, seed: int) -> list[dict[str, float]]:
        """A run's metrics.csv as far as it is."""
        try:
            text = (self.folder(name, seed) / "metrics.csv").read_text(encoding="utf-8")
        except OSError:
            return []
        found = csv.DictReader(text.splitlines())
        return [{key: float(value) for key, value in row.items()} for row in found]

    def done(self, name: str, seed: int) -> bool:
        """Whether a run has all its epochs."""
        return len(self.rows(name, seed)) == self.recipe.epochs

    def errors(self, name: str) -> list[float]:
        """A variant's test errors after the last epoch, in %, by seed.

        Raises:
            RecipeError: a run is missing.
        """
        found = []
        for seed in range(self.seeds):
            if not self.done(name, seed):
                raise RecipeError(f"{self.folder(name, seed)}: expected a whole run, got a part")
            found.append(self.rows(name, seed)[-1]["test_top1_error"])
        return found


def begin(study: Study, *, resume: bool, force: bool) -> None:
    """Make the study's folder ready.

    Raises:
        RecipeError: it holds a study and neither is said, or another study; or it cannot be
            written.
    """
    settings = study.out / "study_settings.json"
    record = json.loads(json.dumps(study.record()))
    try:
        if settings.exists() and not force:
            if not resume:
                raise RecipeError(
                    f"--out: {study.out} holds a study; --resume goes on, --force begins anew"
                )
            found = json.loads(settings.read_text(encoding="utf-8"))
            told = checkpoint.difference(found, record)
            if told is not None:
                raise RecipeError(f"--resume: {study.out} holds another study: {told}")
        elif resume:
            raise RecipeError(f"--resume: no study in {study.out}")
        elif (study.out / "runs").exists() and not force:
            raise RecipeError(f"--out: {study.out} holds runs that are no study's")
        (study.out / "runs").mkdir(parents=True, exist_ok=True)
        if force:
            for folder in (study.out / "runs").glob("*-*"):
                for name in ("settings.json", "checkpoint.pth", "metrics.csv", "timing.csv"):
                    (folder / name).unlink(missing_ok=True)
        with replacing(settings) as part:
            part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    except (OSError, json.JSONDecodeError) as error:
        raise RecipeError(f"--out: expected a folder to write to, got {error}") from error


def train_all(study: Study, tell: Callable[[int, str | None], None]) -> None:
    """Make every run that is not whole yet.

    Args:
        study: what is compared.
        tell: called often with the number of epochs that are done, and with a line when a run is.

    Raises:
        RecipeError: a run failed; the others are stopped, and go on where they were next time.
    """
    waiting = [each for each in study.runs() if not study.done(*each)]
    running: dict[tuple[str, int], subprocess.Popen] = {}
    environment = {**os.environ, "OMP_NUM_THREADS": str(study.threads)}
    # A terminated study takes its runs along, as an interrupted one does.
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while waiting or running:
            while waiting and len(running) < study.processes:
                each = waiting.pop(0)
                with study.log(*each).open("w", encoding="utf-8") as log:
                    running[each] = subprocess.Popen(
                        study.command(*each), env=environment, stdout=log, stderr=log
                    )
            time.sleep(0.2)
            for each, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[each]
                if process.returncode != 0:
                    told = study.log(*each).read_text(encoding="utf-8").strip().splitlines()
                    last = told[-1] if told else f"exit status {process.returncode}"
                    raise RecipeError(f"the run {each[0]}, seed {each[1]}: {last}")
                error = study.rows(*each)[-1]["test_top1_error"]
                tell(_epochs_done(study), f"{each[0]}, seed {each[1]}: test error {error:.2f} %")
            tell(_epochs_done(study), None)
    finally:
        signal.signal(signal.SIGTERM, handler)
        for process in running.values():
            process.terminate()
            process.wait()


def _epochs_done(study: Study) -> int:
    return sum(len(study.rows(*each)) for each in study.runs())


def step_seconds(study: Study, rounds: int = 15) -> dict[str, list[float]]:
    """Seconds of a training step of each variant on one batch of noise, in turns.

    On the CPU, with the study's threads; the first round warms up and is left out.
    """
    import torch
    import torch.nn.functional as F

    from bam_kernels.recipes import data
    from bam_kernels.recipes.distributed import device_of
    from bam_kernels.recipes.networks import Network

    loaded = data.load(study.recipe.dataset, study.data)
    device = device_of(study.device)
    image, _ = loaded.train[0]
    images = torch.randn(study.recipe.batch, *image.shape, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    targets = torch.randint(loaded.num_classes, (study.recipe.batch,), device=device)
    steps = {}
    for name, attention in VARIANTS.items():
        network = Network(
            study.model,
            attention,
            loaded.num_classes,
            loaded.in_channels,
            study.options(name),
        )
        model = network.build().to(device, memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=study.recipe.momentum)
        steps[name] = (model, optimizer)
    found: dict[str, list[float]] = {name: [] for name in VARIANTS}
    threads = torch.get_num_threads()
    torch.set_num_threads(study.threads)
    try:
        for number in range(rounds + 1):
            for name, (model, optimizer) in steps.items():
                before = time.perf_counter()
                optimizer.zero_grad()
                F.cross_entropy(model(images), targets).backward()
                optimizer.step()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if number:
                    found[name].append(time.perf_counter() - before)
    finally:
        torch.set_num_threads(threads)
    return found


def parameters(study: Study, classes: int, channels: int) -> dict[str, int]:
    """The number of a variant's parameters."""
    from bam_kernels.recipes.networks import Network

    return {
        name: sum(
            p.numel()
            for p in Network(study.model, attention, classes, channels, study.options(name))
            .build()
            .parameters()
        )
        for name, attention in VARIANTS.items()
    }


def names() -> Sequence[str]:
    """The variants, in the order of tables and plots."""
    return tuple(VARIANTS)
