"""The device's own copy, in this run: the ceiling that the kernels are held against."""

from __future__ import annotations

from typing import Any

import torch

from bam_kernels.benchmarking.gpu.environment import l2_bytes
from bam_kernels.benchmarking.gpu.peers import Settings, copy_shapes, release
from bam_kernels.benchmarking.gpu.report import Report, Section
from bam_kernels.benchmarking.sites import Shape, normal
from bam_kernels.benchmarking.timing import (
    Peer,
    clock,
    describe,
    gigabytes_per_second,
    graphed,
    interleave,
)

LARGE_BYTES = 1 << 30
SMALL_BYTES = 1 << 20  # where nothing is measured


def measure_copy(size_bytes: int, sets: int, settings: Settings) -> dict[str, Any]:
    """Copy `size_bytes` within the device, taking turns among `sets` pairs of buffers.

    Returns:
        Times of one copy and ``gbs``, 10^9 bytes read and written a second. As a CUDA graph where
        there are such, so that small copies do not measure their launches.
    """
    count = size_bytes // 2
    # Random bits: constant data may move faster than real data does.
    pairs = [
        (
            normal((count,), torch.float16, settings.device),
            torch.empty(count, dtype=torch.float16, device=settings.device),
        )
        for _ in range(sets)
    ]

    def run() -> None:
        for source, target in pairs:
            target.copy_(source)

    timed = graphed(run) if settings.device.type == "cuda" else run
    found = interleave(
        {"copy": Peer(timed, sets)},
        clock(settings.device),
        rounds=settings.rounds,
        warmups=settings.warmups,
        least_ms=settings.least_ms,
    )["copy"]
    if "median_ms" in found:
        found["gbs"] = gigabytes_per_second(2 * size_bytes, found["median_ms"])
    return {"bytes": size_bytes, "buffer_pairs": sets, **found}


def matmul_gflops(dtype: str, settings: Settings) -> float:
    """The rate of a large square matrix product, in 10^9 FLOP/s: 2 n^3 FLOPs; float32 as torch's
    settings have it, with TF32 or without."""
    n = 64 if settings.dry else 8192
    a, b = (normal((n, n), getattr(torch, dtype), settings.device) for _ in range(2))
    out = torch.empty_like(a)
    found = interleave(
        {"matmul": Peer(lambda: torch.mm(a, b, out=out))},
        clock(settings.device),
        rounds=settings.rounds,
        warmups=settings.warmups,
        least_ms=settings.least_ms,
    )["matmul"]
    return 2 * n**3 / found["median_ms"] / 1e6


def run_bandwidth(
    shapes: list[Shape], settings: Settings, section: Section, report: Report
) -> float | None:
    """Fill the report's "bandwidth"; the large copy's 10^9 bytes a second, or None."""
    large_bytes = SMALL_BYTES if settings.dry else LARGE_BYTES
    table: dict[str, Any] = {"counted": "bytes read + bytes written", "sizes": []}
    report.data["bandwidth"] = table
    if section.allows(0.5 if settings.dry else 4.0, "the large copy"):
        table["large"] = _guarded(large_bytes, 2, settings)
    for shape in copy_shapes(shapes):
        what = f"a copy of {shape.x_bytes} bytes"
        if section.allows(0.1 if settings.dry else 1.0, what):
            sets = shape.sets(l2_bytes(settings.device))
            table["sizes"].append(_guarded(shape.x_bytes, sets, settings))
    return table.get("large", {}).get("gbs")


def _guarded(size_bytes: int, sets: int, settings: Settings) -> dict[str, Any]:
    try:
        return measure_copy(size_bytes, sets, settings)
    except Exception as error:
        return {"bytes": size_bytes, **describe(error)}
    finally:
        release(settings.device)
