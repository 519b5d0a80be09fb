"""The four Triton launchers by themselves, called raw, without autograd or dispatch."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bam_kernels.benchmarking.gpu.environment import l2_bytes
from bam_kernels.benchmarking.gpu.peers import Settings, release
from bam_kernels.benchmarking.gpu.report import Estimate, Report, Section
from bam_kernels.benchmarking.sites import Shape, normal
from bam_kernels.benchmarking.timing import (
    Peer,
    clock,
    describe,
    gigabytes_per_second,
    graphed,
    interleave,
)

REDUCTION = 16
PASSES = {"pool_reduce": 1, "gate": 2, "gate_backward_reduce": 2, "input_gradient": 3}
"""By kernel (its name in the launch tables): how often it reads or writes x-sized memory."""


@dataclasses.dataclass(frozen=True)
class Operands:
    """What the four launchers take, as a training step of the paper's module hands it to them."""

    x: Tensor
    dout: Tensor
    channel: Tensor
    spatial: Tensor
    dpooled: Tensor
    dreduced: Tensor
    weight: Tensor
    bias: Tensor


def operands(shape: Shape, device: torch.device) -> Operands:
    """Random operands of a shape."""
    n, c, h, w = shape.size
    hidden = max(1, c // REDUCTION)
    dtype = shape.torch_dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def random(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return normal(size, dtype, device)

    return Operands(
        x=shape.random(device),
        dout=shape.random(device),
        channel=random(n, c, dtype=wide),
        spatial=random(n, 1, h, w, dtype=wide),
        dpooled=random(n, c),
        dreduced=random(n, hidden, h, w).contiguous(memory_format=shape.memory_format),
        weight=random(hidden, c) / c**0.5,
        bias=random(hidden),
    )


def launch(kernel: str, o: Operands) -> tuple[Tensor, ...]:
    """Call a kernel's launcher; its outputs."""
    from bam_kernels.backends import triton as kernels

    if kernel == "pool_reduce":
        return kernels.pool_reduce_forward(o.x, o.weight, o.bias, True)
    if kernel == "gate":
        return (kernels.gate_forward(o.x, o.channel, o.spatial, "sum", True),)
    if kernel == "gate_backward_reduce":
        return kernels.gate_backward_reduce(o.dout, o.x, o.channel, o.spatial, "sum")
    if kernel == "input_gradient":
        return kernels.input_gradient(
            o.dout, o.x, o.channel, o.spatial, o.dpooled, o.dreduced, o.weight,
            "sum", True, True, True, True,
        )  # fmt: skip
    raise ValueError(f"kernel: expected one of {', '.join(PASSES)}, got {kernel!r}")


def rest_bytes(kernel: str, o: Operands, outputs: tuple[Tensor, ...]) -> int:
    """The bytes of everything smaller than x that a kernel reads or writes, each counted once."""
    logits = (o.channel, o.spatial)
    small = {
        "pool_reduce": (o.weight, o.bias, *outputs),
        "gate": logits,
        "gate_backward_reduce": (*logits, *outputs),
        "input_gradient": (*logits, o.dpooled, o.dreduced, o.weight, *outputs[1:]),
    }[kernel]
    return sum(t.numel() * t.element_size() for t in small)


def runner(kernel: str, sets: list[Operands]) -> Callable[[], None]:
    """A run: one launch on every input set."""

    def run() -> None:
        for o in sets:
            launch(kernel, o)

    return run


def device_run(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """The run as a CUDA graph where there are such: the kernels' time without their launches'."""
    return graphed(run) if device.type == "cuda" else run


def rates(kernel: str, shape: Shape, ms: float, copy_gbs: float | None) -> dict[str, Any]:
    """10^9 bytes of x-sized memory a second, and that as a share of the copy's bandwidth."""
    gbs = gigabytes_per_second(PASSES[kernel] * shape.x_bytes, ms)
    return {"gbs": gbs, "share_of_copy": gbs / copy_gbs if copy_gbs else None}


def measure_kernels(
    shape: Shape, kernels: tuple[str, ...], settings: Settings, expired: Callable[[], bool]
) -> list[dict[str, Any]]:
    """One entry a kernel: times by graph and by call, bytes, rates."""
    device = settings.device
    sets = [operands(shape, device) for _ in range(shape.sets(l2_bytes(device)))]
    entries: dict[str, dict[str, Any]] = {}
    peers: dict[str, Peer] = {}
    for kernel in kernels:
        entry = {"kernel": kernel, **shape.record(), "input_sets": len(sets)}
        entries[kernel] = entry
        try:
            entry["x_passes"] = PASSES[kernel]
            entry["rest_bytes"] = rest_bytes(kernel, sets[0], launch(kernel, sets[0]))
            run = runner(kernel, sets)
            peers[kernel] = Peer(device_run(run, device), len(sets))
            peers[f"{kernel}, called"] = Peer(run, len(sets))
        except Exception as error:
            entry.update(describe(error))
    times = interleave(
        peers,
        clock(device),
        rounds=settings.rounds,
        warmups=settings.warmups,
        least_ms=settings.least_ms,
        expired=expired,
    )
    for kernel, entry in entries.items():
        entry.update(times.get(kernel, {}))
        entry["called"] = times.get(f"{kernel}, called", {})
        if "median_ms" in entry:
            entry.update(rates(kernel, shape, entry["median_ms"], settings.copy_gbs))
    return list(entries.values())


def run_kernels(
    shapes: list[Shape],
    kernels: tuple[str, ...],
    settings: Settings,
    section: Section,
    report: Report,
) -> None:
    """Fill the report's "kernels"."""
    table: list[dict[str, Any]] = []
    report.data["kernels"] = table
    estimate = Estimate(0.5 if settings.dry else 5.0)
    for shape in shapes:
        if not section.allows(estimate.next(), f"{shape}: {', '.join(kernels)}"):
            continue
        begin = time.monotonic()
        try:
            table += measure_kernels(shape, kernels, settings, section.expired)
        except Exception as error:
            table += [{"kernel": name, **shape.record(), **describe(error)} for name in kernels]
        finally:
            release(settings.device)
        estimate.add(time.monotonic() - begin)
    report.save()
