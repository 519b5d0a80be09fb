"""What several commands read from their command lines: shapes, counts, files to write."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def shape_of(text: str) -> tuple[int, int, int, int] | None:
    """``NxCxHxW`` as numbers, each 1 or more; None where it is no such text."""
    parts = text.split("x")
    if len(parts) != 4 or not all(p.isascii() and p.isdigit() and int(p) for p in parts):
        return None
    n, c, h, w = map(int, parts)
    return n, c, h, w


def site(text: str) -> tuple[int, int, int, int]:
    """``NxCxHxW`` of a map that a BAM of reduction 16 takes: a type for argparse."""
    size = shape_of(text)
    if size is None or size[1] < 16:
        raise argparse.ArgumentTypeError(
            f"expected NxCxHxW with C of at least 16, such as 8x256x56x56, got {text!r}"
        )
    return size


def positive(text: str) -> int:
    """A whole number of at least 1: a type for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def whole(text: str) -> int:
    """A whole number of at least 0: a type for argparse."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text!r}")
    return int(text)


def above_zero(text: str) -> float:
    """A finite number above 0: a type for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def not_below_zero(text: str) -> float:
    """A finite number of at least 0: a type for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return value


def unwritable(option: str, path: Path | None) -> str | None:
    """Why no file can be written there, in words; None where one can, or none is asked for."""
    if path is None:
        return None
    folder = path.resolve().parent
    if not folder.is_dir():
        return f"{option}: no such folder: {folder}"
    if path.is_dir():
        return f"{option}: expected a file, got the folder {path}"
    if not os.access(folder, os.W_OK):
        return f"{option}: the folder {folder} is not writable"
    return None


def taken(option: str, path: Path | None, force: bool) -> str | None:
    """Why nothing is to be written there: `unwritable`, or a file is there and not to be lost."""
    if path is not None and path.exists() and not path.is_dir() and not force:
        return f"{option}: {path} exists; --force writes over it"
    return unwritable(option, path)
