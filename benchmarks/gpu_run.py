"""One run from its environment to its table: the sections, in order, within the budget."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import signal
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu_table
import torch
from gpu_kernels import run_kernels
from gpu_parity import run_parity
from gpu_workers import Task, Workers, task_name

from bam_kernels.benchmarking.gpu.bandwidth import run_bandwidth
from bam_kernels.benchmarking.gpu.environment import ROOT, clocks, device_name, environment, slug
from bam_kernels.benchmarking.gpu.peers import (
    CaseTable,
    Settings,
    fair_autotuning,
    fill_compile_cache,
)
from bam_kernels.benchmarking.gpu.report import Budget, OutOfTime, Report
from bam_kernels.benchmarking.sites import QUICK, SMOKE, Selection
from bam_kernels.benchmarking.timing import describe

# Past the budget by this much, in seconds, whatever is running is broken off.
GRACE = 20.0
# The parts of the budget that the tests, and the filling of caches beside them, may use.
PARITY_PART, CACHE_PART = 0.45, 0.3
# Sweeps look at the largest batch, and at one of the two half types: they share their tiles.
SWEEP_DTYPES = ("float16", "float32")


def has_gpu() -> bool:
    """Whether torch sees a CUDA device, without a word on stderr."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.cuda.is_available()


def select(args: argparse.Namespace) -> Selection:
    """What the command line asks for.

    Raises:
        ValueError: a name that is not in the table.
    """
    base = SMOKE if args.smoke else QUICK if args.quick else Selection()
    whole = SMOKE if args.smoke else Selection()
    changes: dict[str, tuple[Any, ...]] = {}
    for field in ("dtypes", "layouts", "modes", "presets"):
        asked = getattr(args, field)
        if asked:
            changes[field] = _among(field, asked, {name: name for name in getattr(whole, field)})
    if args.sites:
        changes["sites"] = _among("sites", args.sites, {site.name: site for site in whole.sites})
    if args.batches:
        if not all(text.isdigit() and int(text) > 1 for text in args.batches):
            raise ValueError(f"--batches: expected integers of at least 2, got {args.batches}")
        changes["batches"] = tuple(int(text) for text in args.batches)
    return dataclasses.replace(base, **changes)


def _among(option: str, asked: list[str], known: dict[str, Any]) -> tuple[Any, ...]:
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise ValueError(f"--{option}: expected names among {', '.join(known)}, got {unknown}")
    return tuple(known[name] for name in asked)


class Run:
    """A run and what it shares between its sections.

    Args:
        args: the command line.
        selection: the shapes and cases to measure.
        started: when the process began, on `time.monotonic`'s clock.
    """

    def __init__(self, args: argparse.Namespace, selection: Selection, started: float) -> None:
        self.args = args
        self.selection = selection
        self.device = torch.device(args.device)
        self.environment = environment(self.device, args.commit)
        self.path = (args.output or self._default_path()).absolute()
        header: dict[str, Any] = {"budget_s": args.budget, "sections": args.sections}
        if args.smoke:
            header |= {"smoke": True, "not_a_measurement": True}
        self.report = Report(self.path, header)
        self.report.data["environment"] = self.environment
        self.budget = Budget(args.budget, args.sections, self.report, started)
        self.settings = Settings(
            device=self.device,
            copy_gbs=None,
            rounds=min(2, args.rounds) if args.smoke else args.rounds,
            warmups=1 if args.smoke else 5,
            least_ms=0.1 if args.smoke else 2.0,
            compile_backend="eager" if args.smoke else "inductor",
            dry=args.smoke,
        )
        self.table: CaseTable | None = None

    def _default_path(self) -> Path:
        folder = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
        kind = "smoke" if self.args.smoke else "gpu"
        name = slug(device_name(self.device))
        return folder / f"{kind}-{name}-{str(self.environment['commit'])[:10]}.json"

    def run(self) -> int:
        """Every section, then the table; the exit status."""
        name = "environment"
        self.report.save()
        try:
            with self._hard_limit():
                for name in self.args.sections:
                    self._section(name)
        except OutOfTime:
            self.report.leave_out(name, "the rest", "the hard limit of the run had passed")
        return self._finish()

    def _section(self, name: str) -> None:
        work = getattr(self, f"_{name}", None)
        if work is None:
            return
        print(f"[{self.budget.elapsed():5.0f} s] {name}", flush=True)
        try:
            work()
        except Exception as error:  # the other sections are still worth having
            trace = traceback.format_exc().splitlines()[-12:]
            failure = {**describe(error), "traceback": trace}
            self.report.data.setdefault("errors", {})[name] = failure
        finally:
            self.report.data["seconds"] = round(self.budget.elapsed(), 1)
            self.report.save()

    @contextlib.contextmanager
    def _hard_limit(self) -> Iterator[None]:
        def stop(*_: object) -> None:
            raise OutOfTime

        previous = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, max(1.0, self.budget.left() + GRACE))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)

    def _parity(self) -> None:
        with self._filled_caches():
            at_most = min(self.args.parity_seconds, PARITY_PART * self.budget.left())
            section = self.budget.section("parity", at_most)
            if not section.allows(5.0, "the test suite"):
                return
            self.report.data["parity"] = run_parity(
                self.args.tests,
                self.path.with_suffix(""),
                section.left(),
                self.args.test_workers,
                on_gpu=self.device.type == "cuda",
            )
            if not self.report.data["parity"]["complete"]:
                self.report.leave_out("parity", "the tests not reported", "their time was up")

    @contextlib.contextmanager
    def _filled_caches(self) -> Iterator[None]:
        """Fill the compilers' caches beside the body and, if there is time for it, after."""
        if "compile" not in self.args.sections or not self.args.workers or self.args.smoke:
            yield
            return
        tasks: list[Task] = [
            (task_name(fill_compile_cache), (case, str(self.device)))
            for case in self.selection.cases()
        ]
        workers = Workers(tasks, self.args.workers)
        try:
            yield
            workers.wait(max(0.0, CACHE_PART * self.budget.seconds - self.budget.elapsed()))
        finally:
            workers.stop()
            failures = {str(tasks[n][1][0]): why for n, why in workers.done.items() if why}
            self.report.data["compile_cache"] = {
                "cases": len(tasks),
                "filled": len(workers.done) - len(failures),
                "failures": failures,
            }

    def _bandwidth(self) -> None:
        section = self.budget.section("bandwidth")
        copy_gbs = run_bandwidth(self.selection.shapes(), self.settings, section, self.report)
        self.settings = dataclasses.replace(self.settings, copy_gbs=copy_gbs)

    def _cases(self) -> CaseTable:
        if self.table is None:
            self.table = CaseTable(self.report, self.settings)
        return self.table

    def _times(self) -> None:
        self._cases().run(self.selection.cases(), self.budget.section("times"))

    def _kernels(self) -> None:
        section = self.budget.section("kernels")
        shapes = self.selection.shapes()
        run_kernels(shapes, self.args.kernels, self.settings, section, self.report)

    def _compile(self) -> None:
        fair_autotuning()
        section = self.budget.section("compile")
        cases = self.selection.cases()
        self._cases().run(cases, section, ("compile",))
        self._cases().run(cases[:2], section, ("compile", "compile_autotune"))

    def _sweep(self) -> None:
        from gpu_sweep import Cell, run_sweep

        dtypes = tuple(name for name in self.selection.dtypes if name in SWEEP_DTYPES)
        chosen = dataclasses.replace(
            self.selection,
            dtypes=dtypes or self.selection.dtypes[:1],
            batches=self.selection.batches[:1],
        )
        cells = [Cell(kernel, shape) for shape in chosen.shapes() for kernel in self.args.kernels]
        run_sweep(
            cells,
            self.settings,
            self.budget.section("sweep"),
            self.report,
            0 if self.args.smoke else 2 * self.args.workers,
            self.args.candidates or (2 if self.args.smoke else None),
        )

    def _finish(self) -> int:
        data = self.report.data
        if self.table is not None:
            data["failed_spot_checks"] = self.table.failed_checks()
        if self.device.type == "cuda":
            self.environment["clocks_after"] = clocks()
        wrong = [
            "parity" in data and not data["parity"].get("ok"),
            bool(data.get("failed_spot_checks")),
            bool(data.get("errors")),
        ]
        data["exit_status"] = int(any(wrong))
        data["seconds"] = round(self.budget.elapsed(), 1)
        self.report.save()
        for lines in (gpu_table.sweep_lines(data), gpu_table.kernel_lines(data)):
            for line in lines:
                print(line)
        for name, failure in data.get("errors", {}).items():
            print(f"section {name} broke off: {failure['error']}")
        print("\n".join(gpu_table.summary_lines(data)))
        print(f"wrote {self.path}", flush=True)
        return data["exit_status"]
