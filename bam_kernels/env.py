"""Every environment variable that the library reads, in one place.

setup.py loads this file by its path: it imports neither torch nor bam_kernels.
"""

from __future__ import annotations

import os
from pathlib import Path

BUILDS = ("auto", "cpu", "cuda", "none")
CONVOLUTIONS = ("auto", "fused", "library")


def backend() -> str:
    """``BAM_KERNELS_BACKEND``: the backend of the process, "auto" unless set."""
    return os.environ.get("BAM_KERNELS_BACKEND", "auto")


def build() -> str:
    """``BAM_KERNELS_BUILD``: what is compiled from C++, at install and on first use.

    "auto": the CPU's library where a compiler is found. "cpu": the same, or an error at install.
    "cuda": CUDA's too. "none": nothing.

    Raises:
        ValueError: it is none of these.
    """
    value = os.environ.get("BAM_KERNELS_BUILD", "auto")
    if value not in BUILDS:
        raise ValueError(f"BAM_KERNELS_BUILD: expected one of {', '.join(BUILDS)}, got {value!r}")
    return value


def cache() -> Path | None:
    """``BAM_KERNELS_CACHE``: the folder of what is compiled on first use.

    By default bam_kernels in ``XDG_CACHE_HOME`` or ~/.cache; None where there is no home.
    """
    named = os.environ.get("BAM_KERNELS_CACHE")
    if named:
        return Path(named).absolute()
    caches = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(caches):
        return Path(caches, "bam_kernels")
    try:
        return Path.home() / ".cache" / "bam_kernels"
    except RuntimeError:
        return None


def convolutions() -> str:
    """``BAM_KERNELS_CONVOLUTIONS``: whose dilated convolutions GPUs run, "auto" unless set.

    Read when bam_kernels is imported.

    Raises:
        ValueError: it is none of "auto", "fused" and "library".
    """
    value = os.environ.get("BAM_KERNELS_CONVOLUTIONS", "auto")
    if value not in CONVOLUTIONS:
        known = ", ".join(CONVOLUTIONS)
        raise ValueError(f"BAM_KERNELS_CONVOLUTIONS: expected one of {known}, got {value!r}")
    return value


def cpp_library() -> Path | None:
    """``BAM_KERNELS_CPP_LIBRARY``: a library of the C++ backend to load in place of any other, as
    the tests do with one that is built with sanitizers."""
    named = os.environ.get("BAM_KERNELS_CPP_LIBRARY")
    return Path(named).absolute() if named else None


def replay() -> bool:
    """``BAM_KERNELS_REPLAY``: whether launches are kept and replayed, as they are unless it is 0.

    Read when the Triton backend is imported.
    """
    return os.environ.get("BAM_KERNELS_REPLAY", "1") != "0"


def triton_interpret() -> bool:
    """``TRITON_INTERPRET``, Triton's own: whether its kernels are interpreted on the CPU.

    Triton reads it when it is imported, so it must be set before.
    """
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
