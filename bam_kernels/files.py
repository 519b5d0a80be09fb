"""Writing files: whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which takes its place at the end, and its mode if there was
    one; nothing is left of it where the body raises. A link stays one.

    Raises:
        OSError: the file cannot be written or replaced.
    """
    real = path.resolve()
    part = real.with_name(f".{real.name}.{os.getpid()}.part")
    try:
        yield part
        if real.exists():
            os.chmod(part, real.stat().st_mode & 0o7777)
        os.replace(part, real)
    finally:
        part.unlink(missing_ok=True)
