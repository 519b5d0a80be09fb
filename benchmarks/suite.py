"""What ``pytest benchmarks`` measures: sides, sites, and how a side is built and checked."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

import bam_kernels
from bam_kernels.benchmarking import sites, timing
from bam_kernels.benchmarking.cpu import machine, memory
from bam_kernels.benchmarking.cpu.peers import LIMITS
from bam_kernels.benchmarking.gpu import bandwidth, peers
from bam_kernels.benchmarking.gpu.environment import l2_bytes
from bam_kernels.benchmarking.sites import CHANNELS_LAST, NCHW, RESNET50, TINY, Shape, Site

FUSED, EAGER, COMPILE, GRAPHED = "fused", "eager", "compile", "eager_graphed"

_HALF_LIMIT = 1e-1
_TINY_LIMIT = 5e-2  # a batch norm over a handful of values magnifies rounding


@dataclasses.dataclass(frozen=True)
class Suite:
    """A run of the suite.

    Args:
        device: where.
        sites, batch, dtypes, layouts: of the maps.
        rounds: times taken of each benchmark.
        least_seconds: that a round lasts.
        quick: without what takes minutes to compile.
        tiny: toys.
    """

    device: torch.device
    sites: Sequence[Site]
    batch: int
    dtypes: Sequence[str]
    layouts: Sequence[str]
    rounds: int
    least_seconds: float
    quick: bool = False
    tiny: bool = False

    @classmethod
    def of(cls, option: argparse.Namespace) -> Suite:
        """By the command line."""
        name = option.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        gpu = name == "cuda"
        found = cls(
            torch.device(name), RESNET50, 32 if gpu else 8,
            ("float16", "float32") if gpu else ("float32", "bfloat16"), (NCHW, CHANNELS_LAST),
            rounds=20 if gpu else 8, least_seconds=2e-3 if gpu else 2e-2,
        )  # fmt: skip
        if option.quick:
            found = dataclasses.replace(
                found, sites=(RESNET50[0], RESNET50[2]), dtypes=found.dtypes[:1], quick=True,
                rounds=5,
            )  # fmt: skip
        if option.tiny:
            found = dataclasses.replace(
                found,
                sites=TINY,
                batch=2,
                dtypes=("float32",),
                layouts=(CHANNELS_LAST,),
                rounds=1,
                tiny=True,
            )
        return found if option.batch is None else dataclasses.replace(found, batch=option.batch)

    def parameters(self) -> dict[str, Sequence[Any]]:
        """By a test's argument, its values."""
        shapes = [
            Shape(site, self.batch, dtype, layout)
            for dtype, site, layout in itertools.product(self.dtypes, self.sites, self.layouts)
        ]
        return {
            "shape": shapes,
            "preset": ("paper",) if self.quick or self.tiny else ("paper", "official"),
            "side": (FUSED, EAGER, COMPILE, *((GRAPHED,) if self.device.type == "cuda" else ())),
            # Of one operator a CUDA graph is no peer: it would be a part of a network's.
            "kernel_side": (FUSED, EAGER, COMPILE),
            # A ResNet-50 takes minutes to compile.
            "network_side": (FUSED, EAGER, *(() if self.quick or self.tiny else (COMPILE,))),
            "dtype": self.dtypes,
            "layout": self.layouts,
        }

    def describe(self) -> str:
        names = ", ".join(map(str, self.sites))
        return f"bam_kernels: {self.device}, N = {self.batch}, {names}, {', '.join(self.dtypes)}"

    # --- what a side is -----------------------------------------------------------------------

    @contextlib.contextmanager
    def backend(self, side: str) -> Iterator[None]:
        """Ours runs on the kernels of this device, or not at all."""
        name = "auto" if side != FUSED else "triton" if self.device.type == "cuda" else "cpp"
        with bam_kernels.use_backend(name):
            yield

    def compiled(self, call: Any) -> Any:
        """A module or function under torch.compile, for one shape."""
        torch._dynamo.reset()
        backend = "aot_eager" if self.tiny else "inductor"
        return torch.compile(call, dynamic=False, backend=backend)

    def sets(self, shape: Shape) -> int:
        """So many inputs take turns; a CPU's caches are part of what a user has."""
        return shape.sets(l2_bytes(self.device)) if self.device.type == "cuda" else 1

    def rotating(self, calls: Sequence[Callable[[], object]], side: str) -> Callable[[], object]:
        """One call after the other at each call, as CUDA graphs where the side is one."""
        if side == GRAPHED:
            calls = [timing.graphed(call) for call in calls]
        turns = itertools.cycle(calls)

        def call() -> object:
            return next(turns)()

        return call if len(calls) > 1 else calls[0]

    # --- what stands beside a time ------------------------------------------------------------

    def synchronize(self) -> None:
        peers.synchronize(self.device)

    def peak_bytes(self, call: Callable[[], object]) -> int:
        """The most that torch's allocator hands out at once during a call."""
        found = timing.peak_bytes(call, self.device)
        return memory.torch_peak(call) if found is None else found

    def copy_gigabytes(self, nbytes: int) -> float:
        """10^9 bytes a second, of a copy of a map of this run's size."""
        return _copy(self.device, nbytes, self.rounds)

    def limit(self, shape: Shape, mode: str) -> float:
        """The largest relative error against float64 with which a side is timed."""
        if self.tiny:
            return _TINY_LIMIT
        if self.device.type == "cuda":
            return peers.ERROR_LIMITS[shape.dtype]
        return LIMITS.get((shape.dtype, mode), _HALF_LIMIT)


@functools.cache
def _copy(device: torch.device, nbytes: int, rounds: int) -> float:
    if device.type == "cpu":
        return machine.copy_gigabytes(nbytes, rounds)
    settings = peers.Settings(device, None, rounds, 3, 2.0, "inductor", False)
    return bandwidth.measure_copy(nbytes, 2, settings)["gbs"]


def modules(
    shape: Shape, preset: str, device: torch.device, training: bool
) -> tuple[nn.Module, nn.Module]:
    """(plain, fused) with the same random weights and statistics."""
    case = sites.Case(shape, sites.TRAINING if training else sites.INFERENCE, preset)
    return peers.build(case, device)
