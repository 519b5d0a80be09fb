"""What a number depends on and does not show: machine, versions, commit, clocks, precision."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[3]

_SMI_FIELDS = (
    "driver_version",
    "pstate",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
    "utilization.gpu",
    "memory.used",
    "persistence_mode",
    "compute_mode",
    "mig.mode.current",
)


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _in_own_repository() -> bool:
    """Whether git speaks of this project: an installed package may lie in another's repository."""
    if not all((ROOT / name).is_dir() for name in ("csrc", "bam_kernels")):
        return False
    top = _output("git", "rev-parse", "--show-toplevel")
    return top is not None and Path(top).resolve() == ROOT


def commit(given: str | None = None) -> dict[str, Any]:
    """The commit that is measured: as `given`, or as git tells it where there is a repository of
    this project around the package."""
    if given:
        return {"commit": given, "dirty": None, "told_by": "option"}
    found = _output("git", "rev-parse", "HEAD") if _in_own_repository() else None
    if found is None:
        return {"commit": "unknown", "dirty": None, "told_by": None}
    changes = _output("git", "status", "--porcelain", "--untracked-files=no")
    return {"commit": found, "dirty": bool(changes), "told_by": "git"}


def clocks() -> dict[str, str] | None:
    """What nvidia-smi reads off the current device, settings untouched; None where it cannot."""
    query = _output(
        "nvidia-smi",
        f"--id=GPU-{getattr(torch.cuda.get_device_properties(0), 'uuid', '')}",
        f"--query-gpu={','.join(_SMI_FIELDS)}",
        "--format=csv,noheader",
    ) or _output("nvidia-smi", f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader")
    if not query:
        return None
    values = [value.strip() for value in query.splitlines()[0].split(",")]
    return dict(zip(_SMI_FIELDS, values, strict=False))


def precision() -> dict[str, Any]:
    """torch's settings for float32 convolutions and products, as found."""
    found: dict[str, Any] = {}
    readers = {
        "cudnn.conv.fp32_precision": lambda: torch.backends.cudnn.conv.fp32_precision,
        "cuda.matmul.fp32_precision": lambda: torch.backends.cuda.matmul.fp32_precision,
        "fp32_precision": lambda: torch.backends.fp32_precision,
        "cudnn.allow_tf32": lambda: torch.backends.cudnn.allow_tf32,
        "cudnn.benchmark": lambda: torch.backends.cudnn.benchmark,
        "cudnn.deterministic": lambda: torch.backends.cudnn.deterministic,
    }
    for name, read in readers.items():
        try:
            found[name] = read()
        except Exception as error:
            found[name] = f"unreadable: {type(error).__name__}"
    return found


def device_name(device: torch.device) -> str:
    """The device's name, as torch and the system know it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def slug(text: str) -> str:
    """text in lower case letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unknown"


def l2_bytes(device: torch.device) -> int:
    """The size of the device's L2; 0 where torch does not know it."""
    if device.type != "cuda":
        return 0
    return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)


def environment(device: torch.device, given_commit: str | None = None) -> dict[str, Any]:
    """Everything of this module, as a JSON object."""
    import triton

    found: dict[str, Any] = {
        "date_utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **commit(given_commit),
        "device": device_name(device),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "l2_bytes": l2_bytes(device),
        "fp32": precision(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["multiprocessors"] = properties.multi_processor_count
        found["memory_bytes"] = properties.total_memory
        found["clocks_before"] = clocks()
        found["driver"] = (found["clocks_before"] or {}).get("driver_version")
    return found
