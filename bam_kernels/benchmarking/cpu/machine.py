"""The machine that was measured: what it is, what is installed on it, what it can do at most."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bam_kernels.benchmarking.gpu.environment import commit

PACKAGES = ("numpy", "onnx", "onnxscript", "onnxruntime", "openvino", "triton")
_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "avx512_fp16", "amx_tile",
          "amx_bf16")  # fmt: skip

LARGE_BYTES = 512 << 20
"""A copy of this many bytes is one from memory to memory on most machines; the caches' sizes, as
the system tells them, stand in the JSON."""

MATMUL_SIZES = (1024, 2048)


def machine(threads: int) -> dict[str, Any]:
    """CPU, instruction sets, cores, memory, how busy it is, and the kernel's caches."""
    info = _cpuinfo()
    flags = info.get("flags", info.get("Features", "")).split()
    return {
        "cpu": model(),
        "family_model": [info.get("cpu family"), info.get("model")],
        "flags": [flag for flag in _FLAGS if flag in flags],
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": threads,
        "caches": _caches(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": os.getloadavg(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def model() -> str:
    """The processor's name."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def _cpuinfo() -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo; nothing where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _caches() -> dict[str, str]:
    """Level and type of the first processor's caches, and their size as the system writes it."""
    found = {}
    for entry in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = (
                (entry / name).read_text().strip() for name in ("level", "type", "size")
            )
        except OSError:
            continue
        found[f"L{level} {kind}"] = size
    return found


def versions() -> dict[str, Any]:
    """Python, torch, the peers' packages (None: not installed) and the compiler."""
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["compiler"] = _compiler()
    return found


def _compiler() -> str | None:
    """The first line that the C++ compiler says of itself; None where there is none."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if not name or shutil.which(name) is None:
            continue
        done = subprocess.run([name, "--version"], capture_output=True, text=True)
        return done.stdout.splitlines()[0] if done.stdout else name
    return None


def environment(threads: int) -> dict[str, Any]:
    """When, what commit, on what machine, with which versions."""
    return {
        "date_utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **commit(),
        "machine": machine(threads),
        "versions": versions(),
    }


# --- limits -----------------------------------------------------------------------------------


def best_seconds(run: Callable[[], object], rounds: int, least: float = 0.02) -> float:
    """The fastest of some rounds, each of enough runs to last `least` seconds, a run's time."""
    run()
    begin = time.perf_counter()
    run()
    repeats = max(1, min(10_000, round(least / max(time.perf_counter() - begin, 1e-7))))
    best = float("inf")
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in range(repeats):
            run()
        best = min(best, (time.perf_counter() - begin) / repeats)
    return best


@torch.inference_mode()
def matmul_gflops(dtype: torch.dtype, rounds: int) -> float:
    """The best rate, in 10^9 FLOP/s, of square matrix products: 2 n^3 FLOPs each."""
    best = 0.0
    for n in MATMUL_SIZES:
        a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
        out = torch.empty(n, n, dtype=dtype)
        seconds = best_seconds(lambda: torch.mm(a, b, out=out), rounds)  # noqa: B023
        best = max(best, 2 * n**3 / seconds / 1e9)
    return best


@torch.inference_mode()
def copy_gigabytes(nbytes: int, rounds: int) -> float:
    """The best rate, in 10^9 bytes/s read and written, of copying `nbytes` to another place."""
    source = torch.ones(nbytes // 4)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_seconds(lambda: target.copy_(source), rounds) / 1e9
