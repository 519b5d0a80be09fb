"""What runs here, what does not, why, and what to do: the examination behind the command `doctor`.

What may kill a process (a library that crashes, a driver that does not answer) runs in one of its
own, `child`, which prints a JSON line for each stage; whatever becomes of it, `examine` returns.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bam_kernels import build_cpp, env
from bam_kernels._version import __version__
from bam_kernels.doctor_findings import EFFECTS, PROBLEM, findings

FORMAT = 1
"""Of the JSON object."""

STAGES = {
    "torch": "looking at torch, Triton and the devices",
    "library": "loading the C++ library; where it is not built yet that takes a minute or two",
    "backend": "choosing a backend",
    "smoke": "running it, forward and backward, against float64",
}
"""What `child` does, in order, and the line of progress that says so."""

TIMEOUT = 900
"""Seconds that all stages may take: a build on one slow core is the longest of them."""

_MARK = "bam_kernels doctor: "  # in front of the child's own lines: libraries print, too


@dataclasses.dataclass(frozen=True)
class Options:
    """The module and input that are asked about.

    Attributes:
        shape: of the input, (N, C, H, W).
        reduction: r; the module is C // r wide inside.
        preset: of `bam_kernels.config.PRESETS`.
        dtype: of module and input: float64, float32, float16 or bfloat16.
        layout: "nchw" or "channels_last".
        device: "auto", or torch's name of one; auto takes a GPU where there is one.
        training: whether batch norms take the batch's statistics.
    """

    shape: tuple[int, int, int, int]
    reduction: int = 16
    preset: str = "paper"
    dtype: str = "float32"
    layout: str = "nchw"
    device: str = "auto"
    training: bool = False


def examine(options: Options, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Examine this installation; never raises for what is wrong with it.

    Args:
        options: what is asked about.
        say: hears of each stage.

    Returns:
        A JSON object: versions, devices, environment, toolchain, library, backend, smoke, findings
        (each with level "problem" or "note", what, and advice) and status, 1 where there is a
        problem and 0 where there is none.
    """
    stages = _stages(options, say)
    report: dict[str, Any] = {
        "tool": "bam_kernels doctor",
        "format": FORMAT,
        "versions": {
            "bam_kernels": __version__,
            "python": platform.python_version(),
            **stages["torch"].get("versions", {}),
            "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        },
        "devices": stages["torch"].get("devices", {}),
        "environment": environment(),
        "toolchain": toolchain(),
        "library": stages["library"],
        "backend": stages["backend"],
        "smoke": stages["smoke"],
    }
    report["module"] = dataclasses.asdict(options)
    report["findings"] = findings(report, stages)
    report["status"] = int(any(each["level"] == PROBLEM for each in report["findings"]))
    return report


# --- what needs no torch ----------------------------------------------------------------------


def environment() -> list[dict[str, str]]:
    """The variables that are set and change what the library does, and their effects."""
    names = sorted(name for name in os.environ if name.startswith("BAM_KERNELS_"))
    names += [name for name in EFFECTS if not name.startswith("BAM_") and name in os.environ]
    unknown = "unknown to this version"
    return [
        {"name": name, "value": os.environ[name], "effect": EFFECTS.get(name, unknown)}
        for name in names
    ]


def toolchain() -> dict[str, Any]:
    """What there is to compile the C++ library with: compiler, its version, ninja; what lacks."""
    found: dict[str, Any] = {"compiler": None, "compiler_version": None, "ninja": None}
    try:
        tools = build_cpp.find_toolchain()
        if isinstance(tools, list):
            return {**found, "missing": tools}
        found |= {"compiler": " ".join(tools.compiler), "ninja": tools.ninja, "missing": []}
        version = build_cpp.compiler_version(tools.compiler).splitlines()[0]
        found["compiler_version"] = version
        old = re.fullmatch(r"(?!.*clang).*\s(\d+)\.\d+\.\d+.*", version)
        if old and int(old[1]) < 10:
            found["missing"] = [f"{version} is too old; install g++ (10 or newer) or clang++"]
    except Exception as error:
        found["missing"] = [f"{_told(error)}; install g++ (10 or newer) or clang++, or set CXX"]
    return found


# --- the child --------------------------------------------------------------------------------


def _stages(options: Options, say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """By stage what the child found, or ``{"error": why it did not}``."""
    code = (
        "import json, sys\nspec = json.loads(sys.argv[1])\nsys.path[:] = spec['path']\n"
        "from bam_kernels import doctor\ndoctor.child(spec['options'])"
    )
    spec = json.dumps({"path": sys.path, "options": dataclasses.asdict(options)})
    found: dict[str, dict[str, Any]] = {}
    try:
        done = _run([sys.executable, "-c", code, spec], found, say)
    except OSError as error:
        done = _told(error)
    for name in STAGES:
        if name not in found:
            found[name] = {"error": done}
            done = f"not reached: the stage before it, {name!r}, did not end"
    return found


def _run(
    command: Sequence[str], found: dict[str, dict[str, Any]], say: Callable[[str], None]
) -> str:
    """Run the child, fill `found`; returns how it ended."""
    import tempfile
    import threading

    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace"
        )
        late = threading.Event()

        def stop() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(TIMEOUT, stop)
        timer.start()
        try:
            for line in process.stdout:
                if not line.startswith(_MARK):
                    continue
                stage, result = json.loads(line[len(_MARK) :])
                if result is None:
                    say(STAGES[stage])
                else:
                    found[stage] = result
            status = process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:
                process.kill()
                process.wait()
        errors.seek(0)
        last = (errors.read().strip().splitlines() or [""])[-1]
    if late.is_set():
        return f"it did not end within {TIMEOUT} s"
    if status < 0:
        return f"the process died of {signal.Signals(-status).name}"
    return f"the process ended with status {status}: {last}"


def child(given: dict[str, Any]) -> None:
    """Run every stage and print what it found, a line each."""
    options = Options(**{**given, "shape": tuple(given["shape"])})
    stages: dict[str, Callable[[], dict[str, Any]]] = {
        "torch": _torch,
        "library": _library,
        "backend": lambda: _backend(options),
        "smoke": lambda: _smoke(options),
    }
    for name, run in stages.items():
        print(_MARK + json.dumps([name, None]), flush=True)
        try:
            result = run()
        except Exception as error:
            result = {"error": _told(error)}
        print(_MARK + json.dumps([name, result]), flush=True)


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _guarded(run: Callable[[], Any]) -> Any:
    """What `run` returns, or ``{"error": ...}``: one broken probe leaves the others."""
    try:
        return run()
    except Exception as error:
        return {"error": _told(error)}


def _torch() -> dict[str, Any]:
    import torch

    from bam_kernels.benchmarking.cpu import machine

    versions = {
        "torch": torch.__version__,
        "triton": _guarded(_triton),
        "cuda": torch.version.cuda,
        "rocm": getattr(torch.version, "hip", None),
    }
    cpu = {
        "model": _guarded(machine.model),
        "torch_capability": _guarded(torch.backends.cpu.get_cpu_capability),
        "threads": torch.get_num_threads(),
    }
    return {"versions": versions, "devices": {"cpu": cpu, "gpus": _guarded(_gpus)}}


def _triton() -> str | dict[str, str] | None:
    """Triton's version; None where it is not installed, an error where it does not import."""
    from bam_kernels import dispatch

    if not dispatch._installed("triton"):
        return None
    import triton

    return triton.__version__


def _gpus() -> list[dict[str, Any]]:
    import torch

    found = []
    for kind in ("cuda", "xpu"):
        module = getattr(torch, kind, None)
        if module is None or not module.is_available():
            continue
        for index in range(module.device_count()):
            properties = module.get_device_properties(index)
            major, minor = getattr(properties, "major", None), getattr(properties, "minor", None)
            found.append(
                {
                    "device": f"{kind}:{index}",
                    "name": properties.name,
                    "capability": None if major is None else f"{major}.{minor}",
                    "architecture": getattr(properties, "gcnArchName", None),
                    "memory_bytes": properties.total_memory,
                }
            )
    return found


def _library() -> dict[str, Any]:
    """Whether the C++ library is loaded, from where, by which route; else why not."""
    import torch

    from bam_kernels.backends import cpp_library

    built = build_cpp.PACKAGE / build_cpp.LIBRARY_NAME
    if env.backend() == "reference" and env.cpp_library() is None and not built.is_file():
        return {
            "loaded": False,
            "damaged": False,
            "reason": "not looked for: BAM_KERNELS_BACKEND=reference does not need it",
        }
    reason = cpp_library.why_not()
    if reason is not None:
        return {"loaded": False, "damaged": cpp_library.is_damaged(), "reason": reason}
    paths = sorted(torch.ops.loaded_libraries)
    own = (build_cpp.LIBRARY_NAME, "bam_kernels_cpp")
    path = next((path for path in paths if Path(path).name.startswith(own)), None)
    csrc = build_cpp.source_folder()
    if env.cpp_library() is not None:
        route, path = "BAM_KERNELS_CPP_LIBRARY", str(env.cpp_library())
    elif path == str(built):
        in_checkout = csrc is not None and csrc.parent != build_cpp.PACKAGE
        route = "checkout" if in_checkout else "installed"
    else:
        route = "cache"
    return {
        "loaded": True,
        "damaged": False,
        "path": path,
        "route": route,
        "isa": torch.ops.bam_kernels_cpp.isa(),
        "abi_version": int(torch.ops.bam_kernels_cpp.abi_version()),
    }


def _device(options: Options) -> Any:
    import torch

    if options.device != "auto":
        return torch.device(options.device)
    for kind in ("cuda", "xpu"):
        if getattr(torch, kind, None) is not None and getattr(torch, kind).is_available():
            return torch.device(kind)
    return torch.device("cpu")


def _module(options: Options, shape: Sequence[int], package: Any, device: Any) -> tuple[Any, Any]:
    """(module, x): of the options' kind, on an input of this shape."""
    import torch

    dtype = getattr(torch, options.dtype)
    module = package.BAM(shape[1], options.reduction, preset=options.preset).to(device, dtype)
    last = options.layout == "channels_last"
    form = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(tuple(shape)).to(device, dtype).contiguous(memory_format=form)
    return module.train(options.training), x


def _backend(options: Options) -> dict[str, Any]:
    import bam_kernels

    device = _device(options)
    module, x = _module(options, options.shape, bam_kernels, device)
    found = bam_kernels.explain(module, x)
    return {
        "device": str(device),
        "requested": found.requested,
        "chosen": found.backend,
        "reasons": found.reasons,
        "notes": list(found.notes),
    }


# The largest relative errors that count as right, of outputs and of gradients; eager's own, times
# three, where that is larger. What a kernel does wrong shows at 1e-3 in float32, and in half types
# at some tenths.
_OUTPUT_BARS = {"float64": 1e-12, "float32": 2e-6, "float16": 4e-3, "bfloat16": 3e-2}
_GRADIENT_BARS = {"float64": 1e-9, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
_SMALL = (4, 4, 9, 10)  # N, C in multiples of r, H, W


def _smoke(options: Options) -> dict[str, Any]:
    """Errors of a small module of this kind against float64, norm(a - b) / norm(b)."""
    import torch

    import bam_kernels

    torch.manual_seed(0)  # the same check every time
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    device = _device(options)
    n, multiple, h, w = _SMALL
    shape = (n, min(options.shape[1], multiple * options.reduction), h, w)
    fused, x = _module(options, shape, bam_kernels, device)
    with torch.no_grad():
        for name, value in fused.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            elif value.is_floating_point():
                value += 0.05 * torch.randn_like(value)
    eager, _ = _module(options, shape, bam_kernels.reference, device)
    eager.load_state_dict(fused.state_dict())
    exact, _ = _module(options, shape, bam_kernels.reference, torch.device("cpu"))
    exact.load_state_dict(fused.state_dict())
    exact.double()
    dout = torch.randn(shape).to(x)
    chosen = bam_kernels.explain(fused, x).backend
    with bam_kernels.use_backend(chosen):
        ours = _step(fused, x, dout)
    theirs = _step(eager, x, dout)
    truth = _step(exact, x.cpu().double(), dout.cpu().double())
    errors = {}
    for name, right in truth.items():
        mine, eagers = (float((r[name] - right).norm() / right.norm()) for r in (ours, theirs))
        bar = (_OUTPUT_BARS if name.startswith("output") else _GRADIENT_BARS)[options.dtype]
        bar = max(bar, 3 * eagers)
        passed = mine <= bar  # False for NaN
        errors[name] = {"error": _number(mine), "eager": _number(eagers), "bar": _number(bar)}
        errors[name]["pass"] = passed
    return {
        "backend": chosen,
        "shape": list(shape),
        "errors": errors,
        "pass": all(each["pass"] for each in errors.values()),
    }


def _number(value: float) -> float | str:
    """JSON has no NaN and no infinities."""
    return value if abs(value) < float("inf") else str(value)


def _step(module: Any, x: Any, dout: Any) -> dict[str, Any]:
    """Outputs and gradients in float64 on the CPU; an output without autograd too, in inference."""
    import torch

    found = {}
    if not module.training:
        with torch.no_grad():
            found["output, no autograd"] = module(x)
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = module(leaf)
    out.backward(dout)
    found["output"] = out.detach()
    found["gradient of the input"] = leaf.grad
    grads = [p.grad.double().cpu().flatten() for p in module.parameters() if p.grad is not None]
    found["gradients of the parameters"] = torch.cat(grads)
    return {name: value.double().cpu() for name, value in found.items()}
