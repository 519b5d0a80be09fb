"""The most memory that an inference takes beyond its input and output, in a process of its own.

    python -m bam_kernels.benchmarking.cpu.memory '{"size": [8, 256, 56, 56], "side": "ours", ...}'

prints one JSON object. torch's profiler sees what torch allocates and nothing that C++ code takes
from the system by other ways; the process's peak of resident memory sees it all. Linux resets that
peak (VmHWM) when 5 is written to /proc/self/clear_refs, and counts it to within some hundreds of
kilobytes, so that it means something for maps of some megabytes. Blocks of 64 kB and more go back
to the system when they are freed (`CHILD_ENVIRONMENT`), so what is seen is what is held.

The first call at a shape may leave something behind (packed weights, buffers a thread): its own
peak is recorded beside that of the calls after it. The library's code is warm by then, from a call
on a small map.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import bam_kernels

CHILD_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
}
CALLS = 5
TIMEOUT_S = 300


def status_bytes(field: str) -> int:
    """A field of /proc/self/status, such as VmRSS, in bytes."""
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(found[1]) * 1024


def peak_growth(run: Callable[[], object]) -> int:
    """The peak of resident memory during a run over what was resident before, in bytes.

    Raises:
        OSError: not Linux, or the peak cannot be reset.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    kept = run()
    growth = status_bytes("VmHWM") - before
    del kept
    return growth


def torch_peak(run: Callable[[], object]) -> int:
    """The most bytes that torch's own allocator handed out at once during a run."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        kept = run()
    del kept
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """One side at one shape, here and now: each figure in units of |x|, without the output."""
    torch.set_num_threads(request["threads"])
    size, dtype = request["size"], getattr(torch, request["dtype"])
    fmt = torch.channels_last if request["layout"] == "channels_last" else torch.contiguous_format
    package = bam_kernels if request["side"] == "ours" else bam_kernels.reference
    module = package.BAM(size[1], preset=request["preset"]).to(dtype).eval()
    x = torch.randn(size).to(dtype).contiguous(memory_format=fmt)
    small = torch.randn(1, size[1], 5, 5).to(dtype).contiguous(memory_format=fmt)
    x_bytes = x.numel() * x.element_size()

    def units(growth: int) -> float:
        return (growth - x_bytes) / x_bytes

    with torch.inference_mode(), bam_kernels.use_backend(request["backend"]):
        module(small)
        first = peak_growth(lambda: module(x))
        later = [peak_growth(lambda: module(x)) for _ in range(CALLS)]
        seen = torch_peak(lambda: module(x))
    return {
        "first_call": units(first),
        "peak": units(int(statistics.median(later))),
        "torch_allocator": units(seen),
    }


def in_child(request: dict[str, Any], processes: int) -> dict[str, Any]:
    """`measure` in fresh processes: the median of each figure, and how many there were.

    A dictionary with "error" where it cannot be measured, never an exception.
    """
    found: list[dict[str, float]] = []
    for _ in range(processes):
        try:
            done = subprocess.run(
                [sys.executable, "-m", __spec__.name, json.dumps(request)],
                env={**os.environ, **CHILD_ENVIRONMENT, "PYTHONPATH": _path()},
                capture_output=True, text=True, timeout=TIMEOUT_S,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {**request, "error": f"not done within {TIMEOUT_S} s"}
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return {**request, "error": last[:300]}
        found.append(json.loads(done.stdout))
    medians = {key: statistics.median(each[key] for each in found) for key in found[0]}
    return {**request, **medians, "processes": processes}


def _path() -> str:
    """PYTHONPATH with which a process finds this very package, installed or not."""
    given = os.environ.get("PYTHONPATH")
    ours = str(Path(bam_kernels.__file__).resolve().parents[1])
    return os.pathsep.join([ours, *filter(None, [given])])


def main(arguments: Sequence[str]) -> None:
    print(json.dumps(measure(json.loads(arguments[0]))))


if __name__ == "__main__":
    main(sys.argv[1:])
