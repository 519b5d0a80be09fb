"""Every environment variable that the library reads, in one place."""

from __future__ import annotations

import os


def backend() -> str:
    """``BAM_KERNELS_BACKEND``: the backend of the process, "auto" unless set."""
    return os.environ.get("BAM_KERNELS_BACKEND", "auto")


def triton_interpret() -> bool:
    """``TRITON_INTERPRET``, Triton's own: whether its kernels are interpreted on the CPU.

    Triton reads it when it is imported, so it must be set before.
    """
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
