"""What the examination of an installation says is wrong, and what to do: `doctor`'s advice."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from bam_kernels import env

PROBLEM, NOTE = "problem", "note"

_BUILD = "mend what the compiler says, or set CXX to another: g++ (10 or newer) or clang++"

EFFECTS = {
    "BAM_KERNELS_BACKEND": "every call of the process runs on this backend, or raises",
    "BAM_KERNELS_BUILD": "what is compiled from C++: auto, cpu, cuda or none",
    "BAM_KERNELS_CACHE": "the folder of what is compiled on first use",
    "BAM_KERNELS_CONVOLUTIONS": "whose dilated convolutions GPUs run: fused (ours) or library",
    "BAM_KERNELS_CPP_LIBRARY": "this C++ library is loaded in place of any other",
    "BAM_KERNELS_REPLAY": "0: the launchers decide everything anew at every call",
    "TRITON_INTERPRET": "Triton's kernels are interpreted on the CPU: right, and slow",
    "XDG_CACHE_HOME": "what is compiled on first use is kept in bam_kernels in it",
    "CXX": "the C++ compiler",
}
"""The variables that change what the library does, and how."""


def findings(
    report: dict[str, Any], stages: dict[str, dict[str, Any]] | None = None
) -> list[dict[str, str]]:
    """What is wrong or worth knowing, and a line of advice for each.

    Args:
        report: of `examine`, without findings.
        stages: of the child; those of the report where not given.
    """
    found: list[dict[str, str]] = []

    def add(level: str, what: str, advice: str) -> None:
        found.append({"level": level, "what": what, "advice": advice})

    first = (stages or {}).get("torch", {})
    if "error" in first:
        add(PROBLEM, f"torch cannot be examined: {first['error']}", "install torch again")
    gpus = report["devices"].get("gpus", [])
    if isinstance(gpus, dict):
        todo = "see that the driver works (nvidia-smi, rocminfo) and fits torch's CUDA or ROCm"
        add(PROBLEM, f"the GPUs cannot be examined: {gpus['error']}", todo)
        gpus = []
    variables = {each["name"]: each["value"] for each in report["environment"]}
    _check_variables(variables, add)
    _check_triton(report["versions"].get("triton"), gpus, variables, add)
    _check_library(report, add)
    _check_backend(report, variables, add)
    smoke = report["smoke"]
    if "error" in smoke and "error" not in report["backend"]:
        add(PROBLEM, f"the smoke check broke off: {smoke['error']}",
            "set BAM_KERNELS_BACKEND=reference to go on meanwhile, and report it")  # fmt: skip
    elif not smoke.get("pass", True):
        wrong = [f"{k} {v['error']}" for k, v in smoke["errors"].items() if not v["pass"]]
        add(PROBLEM, f"the smoke check fails on {smoke['backend']!r}: {', '.join(wrong)}",
            "set BAM_KERNELS_BACKEND=reference to go on meanwhile, and report it")  # fmt: skip
    return found


_Add = Callable[[str, str, str], None]


def _check_variables(variables: dict[str, str], add: _Add) -> None:
    for name in variables:
        if name.startswith("BAM_KERNELS_TEST"):
            continue
        if name.startswith("BAM_KERNELS_") and name not in EFFECTS:
            known = ", ".join(key for key in EFFECTS if key.startswith("BAM_"))
            add(NOTE, f"{name} is set, which nothing reads", f"unset it; there are {known}")
    from bam_kernels.dispatch import BACKENDS

    for name, known in (("BAM_KERNELS_BACKEND", BACKENDS), ("BAM_KERNELS_BUILD", env.BUILDS)):
        if variables.get(name, known[0]) not in known:
            add(PROBLEM, f"{name}={variables[name]} is not known",
                f"set it to one of {', '.join(known)}, or unset it")  # fmt: skip


def _check_triton(triton: Any, gpus: list[Any], variables: dict[str, str], add: _Add) -> None:
    if isinstance(triton, dict):
        add(PROBLEM, f"Triton is installed and does not import: {triton['error']}",
            "pip install --force-reinstall triton, or uninstall it")  # fmt: skip
    elif triton is None and gpus:
        add(PROBLEM, "there is a GPU and no Triton", "pip install triton")
    if env.triton_interpret() and "TRITON_INTERPRET" in variables:
        level = PROBLEM if gpus else NOTE
        add(level, "TRITON_INTERPRET is set: Triton's kernels are interpreted, which is slow",
            "unset it, for the compiled kernels")  # fmt: skip


def _check_library(report: dict[str, Any], add: _Add) -> None:
    library, tools = report["library"], report["toolchain"]
    named = env.cpp_library() is not None
    cut = "unset BAM_KERNELS_CPP_LIBRARY" if named else "delete it and install bam_kernels again"
    cut += ", or set BAM_KERNELS_BACKEND=reference"
    if "error" in library:
        add(PROBLEM, f"the C++ library cannot be examined: {library['error']}", cut)
    elif library.get("damaged"):
        add(PROBLEM, f"the C++ library is damaged: {library['reason']}", cut)
    elif not library["loaded"]:
        todo = "; ".join(tools["missing"]) or _BUILD
        if env.backend() == "reference" or os.environ.get("BAM_KERNELS_BUILD") == "none":
            todo = "unset BAM_KERNELS_BACKEND and BAM_KERNELS_BUILD for it to be built"
        add(NOTE, f"the C++ library is not loaded: {library['reason']}", todo)
    elif tools["missing"]:
        add(NOTE, f"nothing could be compiled here: {'; '.join(tools['missing'])}",
            "nothing: the C++ library is there already")  # fmt: skip


def _check_backend(report: dict[str, Any], variables: dict[str, str], add: _Add) -> None:
    backend = report["backend"]
    asked = variables.get("BAM_KERNELS_BACKEND", "auto")
    if "error" in backend:
        advice = "see the findings above"
        if asked != "auto":
            advice = f"unset BAM_KERNELS_BACKEND={asked}, or mend what it needs"
        add(PROBLEM, f"no backend runs: {backend['error']}", advice)
        return
    for note in backend["notes"]:
        add(NOTE, note, "nothing: it is right, and slower")
    if backend["chosen"] != "reference" or backend["requested"] == "reference":
        return
    kind = str(backend["device"]).split(":")[0]
    fused = "cpp" if kind == "cpu" else "triton"
    reason = backend["reasons"].get(fused, "")
    if variables.get("BAM_KERNELS_BUILD") == "none" and kind == "cpu":
        add(NOTE, "plain PyTorch runs, as BAM_KERNELS_BUILD=none asks", "unset it for the kernels")
        return
    todo = {
        "cpp": "; ".join(report["toolchain"]["missing"]) or _BUILD,
        "triton": "pip install triton",
    }
    kernels = kind in ("cuda", "xpu") or (kind == "cpu" and sys.platform.startswith("linux"))
    level = PROBLEM if kernels else NOTE
    add(level, f"plain PyTorch runs, no fused kernels: {reason}", todo[fused])
