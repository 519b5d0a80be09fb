"""The device's own copy, in this run: the ceiling that the kernels are held against."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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


WAYS: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
    "copy_": lambda source, target: target.copy_(source),
    "neg": lambda source, target: torch.neg(source, out=target),
}
"""To read a tensor once and write another once: the runtime's memcpy, and a plain kernel.

No one way is the ceiling: on an H200, a memcpy of 1 GiB in a CUDA graph had 2/3 of the rate of
smaller ones.
"""


def measure_copy(size_bytes: int, sets: int, settings: Settings) -> dict[str, Any]:
    """Copy `size_bytes` within the device, taking turns among `sets` pairs of buffers.

    Every one of `WAYS`, and each as a CUDA graph as well where there are such, so that small copies
    do not measure their launches.

    Returns:
        Of the fastest, its name as ``method``, times of one copy and ``gbs``, 10^9 bytes read and
        written a second; the same of all by name in ``methods``.
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
    peers: dict[str, Peer] = {}
    methods: dict[str, dict[str, Any]] = {}
    for name, way in WAYS.items():

        def run(way: Callable[..., object] = way) -> None:
            for source, target in pairs:
                way(source, target)

        peers[name] = Peer(run, sets)
        if settings.device.type == "cuda":
            try:
                peers[f"{name}, graphed"] = Peer(graphed(run), sets)
            except Exception as error:
                methods[f"{name}, graphed"] = describe(error)
    methods |= interleave(
        peers,
        clock(settings.device),
        rounds=settings.rounds,
        warmups=settings.warmups,
        least_ms=settings.least_ms,
    )
    for found in methods.values():
        if "median_ms" in found:
            found["gbs"] = gigabytes_per_second(2 * size_bytes, found["median_ms"])
    method = max(methods, key=lambda name: methods[name].get("gbs", 0.0))
    return {
        "bytes": size_bytes,
        "buffer_pairs": sets,
        "method": method,
        **methods[method],
        "methods": methods,
    }


def fastest(copies: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """``bytes``, ``method`` and ``gbs`` of the fastest of several `measure_copy`; None of none."""
    rated = [copy for copy in copies if "gbs" in copy]
    if not rated:
        return None
    best = max(rated, key=lambda copy: copy["gbs"])
    return {key: best[key] for key in ("bytes", "method", "gbs")}


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
    """Fill the report's "bandwidth"; the fastest copy's 10^9 bytes a second, or None."""
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
    best = fastest([table.get("large", {}), *table["sizes"]])
    if best is None:
        return None
    table["best"] = best
    return best["gbs"]


def _guarded(size_bytes: int, sets: int, settings: Settings) -> dict[str, Any]:
    try:
        return measure_copy(size_bytes, sets, settings)
    except Exception as error:
        return {"bytes": size_bytes, **describe(error)}
    finally:
        release(settings.device)
