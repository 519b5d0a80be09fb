"""Which backend runs: the rules, the choice, and the words that explain it.

``auto`` takes Triton for CUDA, ROCm and XPU tensors, and for CPU tensors where Triton's
interpreter is on; C++ for the other CPU tensors; plain PyTorch where neither can run. A backend
asked for by name runs or raises.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
from contextlib import AbstractContextManager
from types import TracebackType

import torch
from torch import Tensor

from bam_kernels import env

log = logging.getLogger("bam_kernels")

BACKENDS = ("auto", "triton", "cpp", "cuda", "reference")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
TRITON_DEVICES = ("cuda", "xpu")  # ROCm's devices call themselves "cuda"


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run; the message says why and what to do."""


_requested: str | None = None  # what use_backend() asked for; None: BAM_KERNELS_BACKEND decides
_logged: set[str] = set()


def check_backend(name: str, argument: str = "backend") -> None:
    """Raise ValueError unless `name` is one of `BACKENDS`."""
    if name not in BACKENDS:
        raise ValueError(f"{argument}: expected one of {', '.join(BACKENDS)}, got {name!r}")


class use_backend:  # noqa: N801 - a context manager, spelt as torch spells its own
    """Context manager: every call inside runs on this backend, in all threads of the process.

    Args:
        name: "triton", "cpp", "cuda", "reference" or "auto".

    Raises:
        ValueError: an unknown name. That a known backend cannot run is raised by the call itself,
            as `BackendUnavailableError`, since it depends on the input.
    """

    def __init__(self, name: str) -> None:
        check_backend(name)
        self.name = name

    def __enter__(self) -> None:
        global _requested
        self.previous, _requested = _requested, self.name

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _requested
        _requested = self.previous


def requested_backend() -> str:
    """What the caller asked for: `use_backend`, else ``BAM_KERNELS_BACKEND``, else "auto"."""
    if _requested is not None:
        return _requested
    check_backend(_process_backend, "BAM_KERNELS_BACKEND")
    return _process_backend


_process_backend = env.backend()


def why_not(backend: str, device_type: str) -> str | None:
    """Why `backend` cannot run on tensors of this device type; None if it can.

    For "cpp" on the CPU the first call compiles and loads its library, where that can be.
    """
    if backend == "reference":
        return None
    if backend == "cuda":
        return "this version of bam_kernels has no cuda backend; use 'triton'"
    if backend == "cpp":
        if device_type != "cpu":
            return f"the C++ backend runs on the CPU, not on {device_type!r} devices"
        from bam_kernels.backends import cpp_library

        return cpp_library.why_not()
    if not _installed("triton"):
        return "Triton is not installed; pip install triton"
    if device_type in TRITON_DEVICES:
        return None
    if device_type == "cpu":
        if not env.triton_interpret():
            return (
                "Triton runs CPU tensors only in its interpreter; "
                "set TRITON_INTERPRET=1 before Triton is imported"
            )
        from bam_kernels.backends.triton import INTERPRETED

        if not INTERPRETED:
            return (
                "TRITON_INTERPRET was set after Triton's kernels were loaded; "
                "set it before the process starts"
            )
        return None
    return f"Triton does not run on {device_type!r} devices; use 'reference'"


def _damaged(backend: str, device_type: str) -> bool:
    """Whether what keeps `backend` from running is a damaged installation."""
    if backend != "cpp" or device_type != "cpu":
        return False
    from bam_kernels.backends import cpp_library

    return cpp_library.is_damaged()


# What torch.compiler.assume_constant_result does; calling that here would import Dynamo and, with
# it, Triton, which reads TRITON_INTERPRET once and for all when it is imported.
why_not._dynamo_marked_constant = True
_damaged._dynamo_marked_constant = True


@functools.cache
def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def choose_backend(x: Tensor) -> str:
    """The backend that runs for this input: "triton", "cpp" or "reference".

    What is traced for ONNX or TorchScript is plain PyTorch, whatever was asked for.

    Raises:
        BackendUnavailableError: a backend was asked for by name and cannot run.
        ImportError: it is the C++ backend's turn, and its installed library is damaged.
        ValueError: ``BAM_KERNELS_BACKEND`` names no backend.
    """
    # ONNX, by either exporter, and TorchScript run where this package is not: they take PyTorch's
    # own operators. torch.compile, torch.export and AOTInductor keep ours. is_in_onnx_export()
    # takes 3 us, so it is asked only where something traces at all.
    if torch._C._get_tracing_state() is not None or (
        torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export()
    ):
        return "reference"
    name = requested_backend()
    device_type = x.device.type
    if name != "auto":
        reason = why_not(name, device_type)
        if reason is not None:
            _raise_if_damaged(name, device_type, reason)
            raise BackendUnavailableError(f"backend {name!r} cannot run: {reason}")
        return name
    # Where Triton runs CPU tensors at all, somebody has switched its interpreter on for that.
    reason = why_not("triton", device_type)
    if reason is None:
        return "triton"
    if device_type == "cpu":
        reason = why_not("cpp", device_type)
        if reason is None:
            return "cpp"
        _raise_if_damaged("cpp", device_type, reason)
    log_once(f"running plain PyTorch on {device_type}: {reason}")
    return "reference"


def under_autocast(x: Tensor) -> bool:
    """Whether torch.autocast is on where x lies. It knows no "meta", where only shapes are."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Operators compute in the types of their arguments, also where backward is called inside
    torch.autocast."""
    if x.device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def _raise_if_damaged(backend: str, device_type: str, reason: str) -> None:
    if _damaged(backend, device_type):
        raise ImportError(reason)


def log_once(message: str) -> None:
    """Log `message` at INFO, once a process; silent while torch.compile traces."""
    if torch.compiler.is_compiling() or message in _logged:
        return
    _logged.add(message)
    log.info(message)
