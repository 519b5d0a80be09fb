"""The cost model: bytes and launches of a module at any size, and a time predicted from them.

No GPU is asked and nothing is timed. The launchers run on tensors without data
(`bam_kernels.testing.dry_run`), so that a count is what they would do, for any N, C, H, W,
reduction, dtype and layout; of the plain module, every operator of PyTorch is one launch over the
tensors that it takes and returns, which is the least that it can be.

A time is ``launches * launch_us + bytes / bandwidth``: what moving the bytes through DRAM once and
starting the kernels one behind the other takes. It knows nothing of arithmetic, of caches that hold
a whole map, or of how much of the bandwidth a kernel reaches. It is a prediction, to be replaced by
measurements wherever there are any.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import ModuleType

import torch

import bam_kernels
from bam_kernels import reference
from bam_kernels.benchmarking.sites import INFERENCE, TRAINING, Case, Shape, Site
from bam_kernels.convolution_choice import convolutions
from bam_kernels.testing.dry_run import dry_run
from bam_kernels.testing.traffic import Traffic

FUSED, EAGER = "fused", "eager"
KINDS = (FUSED, EAGER)
OURS, LIBRARY = "ours", "library"
"""The fused module with convolutions of ours, and with the library's: "fused" has those that
`bam_kernels.convolution_choice` takes."""

LAUNCH_US = 3.0
"""From the start of a small kernel to that of the next in a full queue, an assumption."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a time is predicted from.

    Args:
        name: of the GPU.
        target: as Triton's compiler names it, "sm_90".
        bandwidth: of its DRAM, 10^9 bytes a second, as its maker states it.
        launch_us: microseconds that a launch takes beside its bytes.
    """

    name: str
    target: str
    bandwidth: float
    launch_us: float = LAUNCH_US


# Bandwidths: NVIDIA's data sheets of the H200 SXM, H100 SXM5 80 GB, A100 SXM4 80 GB and L4, and its
# page of the GeForce RTX 4090 (21 Gbit/s on 384 bits).
MACHINES = (
    Machine("H200", "sm_90", 4800.0),
    Machine("H100", "sm_90", 3350.0),
    Machine("A100", "sm_80", 2039.0),
    Machine("RTX 4090", "sm_89", 1008.0),
    Machine("L4", "sm_89", 300.0),
)


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one call: an inference, or a training step forward and backward.

    Args:
        launches: kernels, and operators of PyTorch.
        read_bytes, written_bytes: through DRAM, each address once a launch.
        passes: how often tensors of x's size are read or written, in units of x.
    """

    launches: int
    read_bytes: int
    written_bytes: int
    passes: float

    @property
    def moved_bytes(self) -> int:
        """Read and written."""
        return self.read_bytes + self.written_bytes

    def predicted_us(self, machine: Machine) -> float:
        """Microseconds on a machine, predicted: see the module's documentation."""
        return self.launches * machine.launch_us + self.moved_bytes / machine.bandwidth / 1e3


def traffic(case: Case, kind: str = FUSED, reduction: int = 16) -> dict[str, Traffic]:
    """Every launch of a case, by phase: "inference", or "forward" and "backward".

    Args:
        case: the shape of x, whether it is inference or training, and the module's preset.
        kind: "fused", "eager" for the plain module, "ours" or "library" (`LIBRARY`).
        reduction: of the module.

    Raises:
        ValueError: an unknown kind, or a training step of one sample, which batch norm refuses.
        RuntimeError: Triton is not installed.
    """
    if kind not in (known := (*KINDS, OURS, LIBRARY)):
        raise ValueError(f"kind: expected one of {', '.join(known)}, got {kind!r}")
    package = reference if kind == EAGER else bam_kernels
    with convolutions({OURS: "fused", LIBRARY: "library"}.get(kind, "auto")):
        return _traffic(case, package, reduction)


def _traffic(case: Case, package: ModuleType, reduction: int) -> dict[str, Traffic]:
    shape, training = case.shape, case.mode == TRAINING
    module = package.BAM(
        shape.site.channels, reduction, preset=case.preset, device="meta", dtype=shape.torch_dtype
    ).train(training)
    x = torch.empty(shape.size, dtype=shape.torch_dtype, device="meta")
    x = x.to(memory_format=shape.memory_format)
    if not training:
        with torch.no_grad(), dry_run() as inference:
            module(x)
        return {INFERENCE: inference}
    x.requires_grad_()
    with dry_run() as forward:
        out = module(x)
    dout = torch.empty_like(out)
    with dry_run() as backward:
        out.backward(dout)
    return {"forward": forward, "backward": backward}


def cost(case: Case, kind: str = FUSED, reduction: int = 16) -> Cost:
    """What one call of a case takes; arguments and errors as of `traffic`."""
    return summarize(case.shape, traffic(case, kind, reduction))


def summarize(shape: Shape, phases: Mapping[str, Traffic]) -> Cost:
    """The cost of what `traffic` counted for a map of this shape."""
    x = torch.empty(shape.size, dtype=shape.torch_dtype, device="meta")
    events = [event for found in phases.values() for event in found.events]
    return Cost(
        launches=sum(found.device_launches for found in phases.values()),
        read_bytes=sum(event.read_bytes for event in events),
        written_bytes=sum(event.written_bytes for event in events),
        passes=sum(found.passes(x) for found in phases.values()),
    )


def case_of(
    size: tuple[int, int, int, int], dtype: str, layout: str, mode: str, preset: str = "paper"
) -> Case:
    """The case of a map [N, C, H, W] that stands in no table."""
    n, c, h, w = size
    return Case(Shape(Site(f"{c}x{h}x{w}", c, h, w), n, dtype, layout), mode, preset)
