"""Every Triton kernel on small maps under NVIDIA's compute-sanitizer, where it is and works.

    python benchmarks/gpu_sanitizer.py    # launches the kernels: what the sanitizer runs

memcheck finds accesses outside of allocations, racecheck hazards in shared memory. A machine may
lack the tool, or refuse it: that is recorded, and is no error. What it finds is one.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    import torch

TOOLS = ("memcheck", "racecheck")
_FOLDERS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/cuda/bin")
_FOUND_STATUS = 99  # what the sanitizer exits with when it found something
_RAN = "all kernels ran"
_SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard")
_TAIL = 30
# Of its time: the launches by themselves, which also fill Triton's cache.
_PLAIN_PART = 0.4


def find() -> str | None:
    """The sanitizer's path, on the PATH or where CUDA usually lies; None if there is none."""
    home = os.environ.get("CUDA_HOME")
    folders = [os.environ.get("PATH", ""), *([f"{home}/bin"] if home else []), *_FOLDERS]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def check(tool: str, seconds: float) -> dict[str, Any]:
    """Run the kernels under one of `TOOLS`, for `seconds` at most: a task for a worker.

    Returns:
        ``outcome``: "clean"; "found", with how many ``errors`` and what was said of them; "absent",
        "refused" (the kernels did not run under it), "timeout" or "broken" (they do not run without
        it either), with the end of the output.
    """
    path = find()
    if path is None:
        return {"outcome": "absent"}
    begin = time.monotonic()
    target = [sys.executable, str(Path(__file__).resolve())]
    status, text = _run(target, seconds * _PLAIN_PART)
    if status is None:
        return {
            "outcome": "timeout",
            "of": "the kernels without the sanitizer",
            "tail": _tail(text),
        }
    if status or _RAN not in text:
        return {"outcome": "broken", "exit_status": status, "tail": _tail(text)}
    # CUDA calls that fail are torch's way of asking; they are not what is looked for.
    options = ["--tool", tool, "--error-exitcode", str(_FOUND_STATUS), "--report-api-errors", "no"]
    left = seconds - (time.monotonic() - begin)
    status, text = _run([path, *options, *target], left)
    found = {
        "path": path,
        "exit_status": status,
        "seconds": round(time.monotonic() - begin, 1),
        **verdict(status, text),
    }
    if found["outcome"] != "clean":
        found["tail"] = _tail(text)
    return found


def verdict(status: int | None, text: str) -> dict[str, Any]:
    """What a run under the sanitizer means.

    Args:
        status: its exit status; None where its time was up.
        text: what it and the kernels printed.
    """
    summaries = [int(a or b) for a, b in _SUMMARY.findall(text)]
    errors = sum(summaries)
    if status is None:
        return {"outcome": "timeout", "errors": None}
    # One that cannot attach reports errors of its own, before any kernel of ours has run.
    attached = "Device not supported" not in text and "LibraryNotLoaded" not in text
    reported = "Invalid __" in text or "hazard" in text.replace("RACECHECK SUMMARY: 0 hazard", "")
    if attached and errors and (_RAN in text or reported):
        return {"outcome": "found", "errors": errors}
    if status == 0 and summaries and not errors and _RAN in text:
        return {"outcome": "clean", "errors": 0}
    return {"outcome": "refused", "errors": None}


def _tail(text: str) -> list[str]:
    return text.splitlines()[-_TAIL:]


def _run(command: list[str], seconds: float) -> tuple[int | None, str]:
    """(exit status, output); None for a status where the time was up, and with it the command.

    It stays in the caller's group of processes: whoever ends that ends this too.
    """
    # Each tensor an allocation of its own, so that an access past its end is one.
    environment = dict(os.environ, PYTORCH_NO_CUDA_MEMORY_CACHING="1", PYTHONUNBUFFERED="1")
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    try:
        text, _ = process.communicate(timeout=max(1.0, seconds))
        return process.returncode, text
    except subprocess.TimeoutExpired:
        _end(process.pid)
        process.kill()
        text, _ = process.communicate()
        return None, text


def _end(pid: int) -> None:
    """End the processes that a process has started: the sanitizer runs the program as a child."""
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                _end(int(child))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(child), signal.SIGKILL)


def launch_all(device_name: str = "cuda") -> None:
    """Every kernel, forward and backward, on maps of few tiles with ragged ends: as small maps go,
    and once more as large ones do."""
    import torch

    from bam_kernels.backends.triton import configs, spatial_layout, sum_splits

    device = torch.device(device_name)
    _launch(device)
    with (
        mock.patch.object(spatial_layout, "_FEW_TILES", 0),
        mock.patch.object(spatial_layout, "_MOST_PARTIALS", 3),
        mock.patch.object(spatial_layout, "_GROUPS", 2),
        mock.patch.object(sum_splits, "_ONE_STEP", 3),
        mock.patch.object(configs, "channel_mlp_in_steps", lambda *_, **__: True),
        configs.override(spatial_branch=configs.Tile(1, 16, 4, 1)),
    ):
        _launch(device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(_RAN, flush=True)


def _launch(device: torch.device) -> None:
    import torch

    import bam_kernels

    cases = (
        (torch.float16, torch.contiguous_format, "sum", "paper"),
        (torch.float32, torch.channels_last, "max", "official"),
    )
    for dtype, memory_format, combine, preset in cases:
        module = bam_kernels.BAM(48, combine=combine, preset=preset, device=device, dtype=dtype)
        squeeze = bam_kernels.SqueezeExcite(48, device=device, dtype=dtype).eval()
        x = torch.randn(3, 48, 7, 9, device=device).to(dtype, memory_format=memory_format)
        with bam_kernels.use_backend("triton"):
            module(x.requires_grad_()).sum().backward()
            with torch.no_grad():
                module.eval()(x)
                squeeze(x)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    launch_all()
