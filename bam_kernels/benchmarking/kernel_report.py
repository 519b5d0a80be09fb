"""Every Triton kernel of a module, compiled ahead of time for a GPU that is not there.

A case (`sites.Case`) is run dry on meta tensors while Triton compiles what the launchers launch,
with the launch tables that ship. The compiler's figures and the bytes of each launch come back.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

from bam_kernels.benchmarking.cost import case_of
from bam_kernels.benchmarking.occupancy import occupancy
from bam_kernels.benchmarking.sites import INFERENCE, TRAINING, Case
from bam_kernels.testing.aot import KernelReport

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bam_kernels.testing.traffic import Launch

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")

_ITEMSIZE = {"*fp16": 2, "*bf16": 2, "*fp32": 4, "*fp64": 8}
_LOADED, _STORED = ("x", "dout"), ("out", "dx")
"""The maps of x's size, by the names that every kernel of x has for them."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One launch of a case: the compiler's report of it, and what it moves.

    Args:
        case: which module on which map.
        phase: "inference", "forward" or "backward".
        report: of the compiler.
        read_bytes, written_bytes: through DRAM, each address once.
    """

    case: Case
    phase: str
    report: KernelReport
    read_bytes: int
    written_bytes: int

    @property
    def moved_bytes(self) -> int:
        return self.read_bytes + self.written_bytes

    def record(self) -> dict[str, Any]:
        """As a JSON object."""
        report = self.report
        return {
            **self.case.record(),
            "phase": self.phase,
            "kernel": report.name,
            "target": report.target,
            "num_warps": report.num_warps,
            "num_stages": report.num_stages,
            "registers": report.registers,
            "spill_bytes": report.spill_bytes,
            "stack_bytes": report.stack_bytes,
            "shared_bytes": report.shared_bytes,
            "occupancy": occupancy(report),
            "access_bits": {
                name: {"load": sorted(each.load_bits), "store": sorted(each.store_bits)}
                for name, each in report.accesses.items()
            },
            "read_bytes": self.read_bytes,
            "written_bytes": self.written_bytes,
            "problems": problems(report),
        }


def problems(report: KernelReport) -> list[str]:
    """What is wrong with a compiled kernel, in words: spills, too much shared memory, an access to
    a map of x's size that is narrower than its alignment allows. Empty where nothing is.

    A thread moves 128 bits at a time where the dense axis is a multiple of so many elements, and
    as many as it is a multiple of elsewhere: 64 bits of a half type at 14 x 14 in NCHW.
    """
    found = []
    if report.spill_bytes:
        found.append(f"{report.spill_bytes} bytes spilled")
    if report.fits_shared is False:
        found.append(f"{report.shared_bytes} bytes of shared memory, more than a block can have")
    align = report.constants.get("ALIGN")
    for name, access in report.accesses.items():
        if align is None or name not in (*_LOADED, *_STORED):
            continue
        widest = min(128, 8 * align * _ITEMSIZE[report.signature[name]])
        for word, bits in (("loads", access.load_bits), ("stores", access.store_bits)):
            if bits and min(bits) < widest:
                found.append(f"{name}: {word} of {min(bits)} bits, expected {widest}")
    return found


def compile_module(target: str, module: nn.Module, x: Tensor) -> list[tuple[str, Any, Launch]]:
    """Compile every launch of a module: a training step where x requires a gradient, else an
    inference.

    Args:
        target: "sm_90", "gfx942", ...
        module: on the "meta" device.
        x: its input, there too.

    Returns:
        (phase, the compiler's report, what it moves) of each launch, in order.

    Raises:
        RuntimeError: Triton interprets kernels in this process, or cannot compile.
        ValueError: an unknown target.
    """
    import torch

    from bam_kernels.convolution_choice import convolutions
    from bam_kernels.testing.aot import compile_only
    from bam_kernels.testing.dry_run import dry_run

    found: list[tuple[str, Any, Launch]] = []

    def launched(phase: str, call: Callable[[], Any]) -> Any:
        ours = convolutions("fused")  # at every width: a choice is no reason not to look at them
        with ours, compile_only(target) as reports, dry_run(compiled=True) as traffic:
            result = call()
        pairs = zip(reports, traffic.launches, strict=True)
        found.extend((phase, report, launch) for report, launch in pairs)
        return result

    if not x.requires_grad:
        with torch.no_grad():
            launched(INFERENCE, lambda: module(x))
        return found
    out = launched("forward", lambda: module(x))
    launched("backward", lambda: out.backward(torch.empty_like(out)))
    return found


def compile_case(target: str, case: Case) -> list[Compiled]:
    """Compile every launch of a case, in order; errors as of `compile_module`."""
    import torch

    import bam_kernels

    shape, training = case.shape, case.mode == TRAINING
    module = bam_kernels.BAM(
        shape.site.channels, preset=case.preset, device="meta", dtype=shape.torch_dtype
    ).train(training)
    x = torch.empty(shape.size, dtype=shape.torch_dtype, device="meta")
    x = x.to(memory_format=shape.memory_format).requires_grad_(training)
    return [
        Compiled(case, phase, report, launch.read_bytes, launch.written_bytes)
        for phase, report, launch in compile_module(target, module, x)
    ]


def compile_all(
    targets: Sequence[str], cases: Sequence[Case], processes: int
) -> Iterator[list[Compiled]]:
    """Every case for every target, in processes of their own, where nothing is interpreted.

    Yields what `compile_case` returns as it comes, target by target and case by case.
    """
    jobs = [(target, case) for target in targets for case in cases]
    pool = ProcessPoolExecutor(
        min(processes, len(jobs)), mp_context=get_context("spawn"), initializer=_prepare
    )
    try:
        yield from pool.map(_compile, jobs)
    finally:
        pool.shutdown(cancel_futures=True)


def _prepare() -> None:
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    os.environ.pop("TRITON_INTERPRET", None)  # Triton reads it when it is imported: not yet
    import torch

    torch.set_num_threads(1)


def _end_with(parent: int) -> None:
    """A process that is killed tells its workers nothing, and they would go on compiling."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _compile(job: tuple[str, Case]) -> list[Compiled]:
    return compile_case(*job)


def cases(
    sizes: Iterable[tuple[int, int, int, int]],
    dtypes: Iterable[str],
    layouts: Iterable[str],
    presets: Iterable[str],
) -> list[Case]:
    """Training and inference of every combination; one sample cannot be trained on."""
    return [
        case_of(size, dtype, layout, mode, preset)
        for dtype, size, layout, preset, mode in itertools.product(
            dtypes, sizes, layouts, presets, (TRAINING, INFERENCE)
        )
        if mode == INFERENCE or size[0] > 1
    ]
