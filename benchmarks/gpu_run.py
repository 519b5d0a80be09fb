"""One run from its environment to its table: the sections, in order, within the budget.

On an H200 240 rows of the matrix and both sanitizers fit 110 s, beside 140 tests; 15 cases with
every peer take 130 s. Not seen there: processes that are ended while a kernel of theirs hangs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu_matrix
import gpu_profile
import gpu_sanitizer
import gpu_table
import torch
from gpu_kernels import run_kernels
from gpu_parity import run_parity
from gpu_pool import Job, Pool, in_turn
from gpu_workers import Child, Outcome, task_name, use_part_of_memory

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
# And by this much, the process ends itself: it waits for a device that does not answer.
ABANDON = 15.0
# The parts of the budget after which the matrix, and all that needs no quiet device, must be done.
MATRIX_PART, NOISY_PART = 0.2, 0.42
# Of the device's memory, what the processes of that phase may take together.
POOL_MEMORY = 0.7
# What the tests on the GPU are, the most telling first.
GPU_TESTS = (
    "test_gate", "test_pool_reduce", "test_spatial_branch", "test_channel_mlp",
    "test_triton_inference", "test_module", "test_determinism", "test_batch_norm", "test_autograd",
    "test_layout", "test_amp_and_optimizers", "test_compile",
)  # fmt: skip
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
        self.on_gpu = self.device.type == "cuda"
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
        seed = gpu_matrix.fresh_seed() if args.seed is None else args.seed
        self.rows = gpu_matrix.rows(seed, toy=args.smoke)
        self.pool: Pool | None = None
        self.table: CaseTable | None = None
        self.compiled: dict[Any, Outcome] = {}
        self.current = "environment"
        self.ended = False

    def _default_path(self) -> Path:
        folder = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
        kind = "smoke" if self.args.smoke else "gpu"
        name = slug(device_name(self.device))
        return folder / f"{kind}-{name}-{str(self.environment['commit'])[:10]}.json"

    # --- the frame ----------------------------------------------------------------------------

    def run(self) -> int:
        """Every section, then the table; the exit status."""
        self.report.save()
        try:
            with self._hard_limit():
                self._guarded("pool", self._start_pool)
                for name in self.args.sections:
                    self._section(name)
        except OutOfTime as end:
            self.report.leave_out(self.current, "the rest", str(end))
            self.ended = True
        self._guarded("pool", self._stop_pool)
        return self._finish()

    def _section(self, name: str) -> None:
        work = getattr(self, f"_{name}", None)
        if work is None:
            return
        self.current = name
        print(f"[{self.budget.elapsed():5.0f} s] {name}", flush=True)
        self._guarded(name, work)

    def _guarded(self, name: str, work: Callable[[], None]) -> None:
        """Do it, keep what went wrong, and save what is known."""
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
        def stop(number: int, *_: object) -> None:
            late = number == signal.SIGALRM
            raise OutOfTime(
                "the hard limit of the run had passed" if late else "it was asked to end"
            )

        left = max(1.0, self.budget.left() + GRACE)
        previous = {
            number: signal.signal(number, stop) for number in (signal.SIGALRM, signal.SIGTERM)
        }
        signal.setitimer(signal.ITIMER_REAL, left)
        # Python hears of a signal between two of its instructions, and never while it waits for a
        # device on which a kernel hangs.
        watchdog = threading.Timer(left + ABANDON, self._abandon)
        watchdog.daemon = True
        watchdog.start()
        try:
            yield
        finally:
            watchdog.cancel()
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _abandon(self) -> None:
        """Write and print what is known, and end the process whatever it waits for."""
        try:
            why = "the process waited for the device beyond the hard limit of the run"
            self.report.leave_out(self.current, "the rest", why)
            self.report.data.setdefault("errors", {})[self.current] = {"error": f"hung: {why}"}
            self._conclude()
        finally:
            os._exit(1)

    # --- while the device need not be quiet ---------------------------------------------------

    def _start_pool(self) -> None:
        """One list of everything that only needs processes, the most valuable first."""
        core, rest, tools, fill, tiles = [], [], [], [], []
        if "matrix" in self.args.sections:
            jobs = [
                Job("matrix", number, task)
                for number, task in enumerate(gpu_matrix.tasks(self.rows, self.device))
            ]
            core, rest = jobs[: gpu_matrix.CORE], jobs[gpu_matrix.CORE :]
        if "sanitizer" in self.args.sections and self.on_gpu:
            seconds = max(30.0, 0.8 * NOISY_PART * self.budget.seconds)
            check = task_name(gpu_sanitizer.check)
            tools = [
                Job("sanitizer", tool, (check, (tool, seconds)), seconds + 30)
                for tool in gpu_sanitizer.TOOLS
            ]
        count = self.args.workers
        if "compile" in self.args.sections and count and not self.args.smoke:
            fill = [
                Job("fill", str(case), (task_name(fill_compile_cache), (case, str(self.device))))
                for case in self.selection.cases()
            ]
        if "sweep" in self.args.sections:
            import gpu_sweep

            pairs = list(gpu_sweep.by_rank(self._cells(), self._candidates()))
            made = gpu_sweep.compile_tasks(self._cells(), self._candidates(), self.device)
            tiles = [Job("sweep", pair, task) for pair, task in zip(pairs, made, strict=True)]
        # A compiled module takes some 20 s, a tile or a row one: about as long for each.
        jobs = [*core, *tools, *in_turn((fill, 1), (tiles, 12), (rest, 4))]
        if jobs:
            setup = (task_name(use_part_of_memory), (POOL_MEMORY / max(count, 1),))
            self.pool = Pool(jobs, count, setup)

    def _noisy_seconds(self) -> float:
        """Until the device must be quiet."""
        return max(0.0, NOISY_PART * self.budget.seconds - self.budget.elapsed())

    def _stop_pool(self) -> None:
        """Give the jobs the rest of their time, then end them and report what they found."""
        pool, self.pool = self.pool, None
        if pool is None:
            return
        try:
            if not self.ended:
                pool.wait(self._noisy_seconds())
        finally:
            pool.stop()
            self._report_pool(pool)

    def _report_pool(self, pool: Pool) -> None:
        data = self.report.data
        self._report_matrix(pool)
        fill = pool.outcomes("fill")
        if fill:
            failures = {key: outcome.error for key, outcome in fill.items() if outcome.error}
            data["compile_cache"] = {
                "cases": sum(job.group == "fill" for job in pool.jobs),
                "filled": len(fill) - len(failures),
                "failures": failures,
            }
        tools = pool.outcomes("sanitizer")
        for tool in [job.key for job in pool.jobs if job.group == "sanitizer"]:
            outcome = tools.get(tool)
            found = data.setdefault("sanitizer", {})
            if outcome is None:
                found[tool] = {"outcome": "timeout", "of": "the time before the measurements"}
            else:
                found[tool] = outcome.result or {"outcome": "broken", "error": outcome.error}
        self.compiled = pool.outcomes("sweep")

    def _report_matrix(self, pool: Pool) -> None:
        done = pool.outcomes("matrix")
        if done:
            self.report.data["matrix"] = gpu_matrix.summarize(self.rows, done)
            self.report.save()

    def _matrix(self) -> None:
        at_most = MATRIX_PART * self.budget.seconds
        section = self.budget.section("matrix", at_most)
        if self.pool is None or not section.allows(2.0, "the matrix"):
            return
        core = range(min(gpu_matrix.CORE, len(self.rows)))
        self.pool.wait(section.left(), "matrix", core)
        self._report_matrix(self.pool)
        missing = len(core) - len(self.pool.outcomes("matrix"))
        if missing > 0:
            self.report.leave_out("matrix", f"{missing} rows", "not done in the section's time")

    def _parity(self) -> None:
        tests = self.args.tests or [f"tests/{name}.py" for name in GPU_TESTS]
        section = self.budget.section(
            "parity", min(self.args.parity_seconds, self._noisy_seconds())
        )
        if not section.allows(5.0, "the test suite"):
            return
        self.report.data["parity"] = run_parity(
            tests,
            self.path.with_suffix(""),
            section.left(),
            self.args.test_workers,
            on_gpu=self.on_gpu,
        )
        if not self.report.data["parity"]["complete"]:
            self.report.leave_out("parity", "the tests not reported", "their time was up")

    def _sanitizer(self) -> None:
        if not self.on_gpu:
            self.report.data["sanitizer"] = {
                tool: {"outcome": "no GPU"} for tool in gpu_sanitizer.TOOLS
            }
        elif self.pool is not None:
            self.pool.wait(self._noisy_seconds(), "sanitizer")

    # --- on a quiet device --------------------------------------------------------------------

    def _bandwidth(self) -> None:
        self._stop_pool()
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

    def _profile(self) -> None:
        if not self.on_gpu:
            return
        section = self.budget.section("profile")
        gpu_profile.run_profile(self.selection.cases(), self.settings, section, self.report)
        text = "\n".join(gpu_profile.lines(self.report.data))
        self.path.with_suffix(".profile.txt").write_text(text + "\n")

    def _candidates(self) -> int | None:
        return self.args.candidates or (2 if self.args.smoke else None)

    def _cells(self) -> list[Any]:
        from gpu_sweep import Cell

        dtypes = tuple(name for name in self.selection.dtypes if name in SWEEP_DTYPES)
        chosen = dataclasses.replace(
            self.selection,
            dtypes=dtypes or self.selection.dtypes[:1],
            batches=self.selection.batches[:1],
        )
        return [Cell(kernel, shape) for shape in chosen.shapes() for kernel in self.args.kernels]

    def _sweep(self) -> None:
        import gpu_choice
        from gpu_sweep import run_sweep

        data = self.report.data
        run_sweep(
            self._cells(),
            self.compiled,
            self.settings,
            self.budget.section("sweep"),
            self.report,
            Child(here=self.args.smoke and not self.args.workers),
            self._candidates(),
        )
        chosen = gpu_choice.choose(data["sweep"])
        text = gpu_choice.paste(chosen, self.environment)
        data["launch_table"] = {"entries": chosen, "paste": text.splitlines()}
        self._cases().tiles = lambda case: gpu_choice.tiles_for(case.shape, chosen)

    def _compile(self) -> None:
        fair_autotuning()
        section = self.budget.section("compile")
        cases = self.selection.cases()
        self._cases().run(cases, section, ("compile",))
        self._cases().run(cases[:2], section, ("compile", "compile_autotune"))

    def _tuned(self) -> None:
        table = self._cases()
        left = [case for case in self.selection.cases() if table.tiles(case)]
        left = [case for case in left if not table.has(case, "fused_tuned")]
        table.run(left, self.budget.section("tuned"))

    # --- the end ------------------------------------------------------------------------------

    def _finish(self) -> int:
        if self.on_gpu:
            with contextlib.suppress(Exception):  # of a device that an error has spoilt
                self.environment["clocks_after"] = clocks()
        return self._conclude()

    def _conclude(self) -> int:
        data = self.report.data
        if self.table is not None:
            data["failed_spot_checks"] = self.table.failed_checks()
        data["exit_status"] = int(any(failures(data)))
        data["seconds"] = round(self.budget.elapsed(), 1)
        self.report.save()
        for lines in (
            gpu_table.sweep_lines(data),
            gpu_table.launch_table_lines(data),
            gpu_table.kernel_lines(data),
            gpu_table.matrix_lines(data),
        ):
            for line in lines:
                print(line)
        for name, failure in data.get("errors", {}).items():
            print(f"section {name} broke off: {failure['error']}")
        print("\n".join(gpu_table.summary_lines(data)))
        print(f"wrote {self.path}", flush=True)
        return data["exit_status"]


def failures(data: dict[str, Any]) -> list[bool]:
    """What makes a run fail: tests, checks, sanitizers, sections; not what time did not allow."""
    parity = data.get("parity", {"ok": True})
    seen = parity.get("failed") or parity.get("errors") or parity.get("error")
    cut_short = not parity.get("complete", True) and parity.get("passed") and not seen
    return [
        bool(data.get("matrix", {}).get("failures")),
        not (parity.get("ok") or cut_short),
        any(tool["outcome"] == "found" for tool in data.get("sanitizer", {}).values()),
        bool(data.get("failed_spot_checks")),
        bool(data.get("errors")),
    ]
