"""Checkpoints: all that a run needs to go on, written whole or not at all.

The file holds tensors, numbers, text, lists and dicts only, and is read with ``weights_only=True``:
no code in it is run.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from bam_kernels.files import replacing
from bam_kernels.recipes.errors import RecipeError

FORMAT = "bam_kernels training 1"
"""What a checkpoint says it is."""

KEYS = ("settings", "network", "model", "optimizer", "scheduler", "scaler", "epoch", "rows")


def save(path: Path, **content: Any) -> None:
    """Write `KEYS` to `path`, and to the disk before the file takes its place.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    assert set(content) == set(KEYS)
    with replacing(path) as part:
        with part.open("wb") as file:
            torch.save({"format": FORMAT, **content}, file)
            file.flush()
            os.fsync(file.fileno())


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote, its tensors on the CPU.

    Raises:
        RecipeError: there is no such file, or it is no such checkpoint, or is damaged.
    """
    if not path.is_file():
        raise RecipeError(f"{path}: there is no such checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, KeyError, ValueError, pickle.UnpicklingError) as error:
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RecipeError(f"{path}: cannot be read as a checkpoint: {told[:200]}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise RecipeError(f"{path}: expected a checkpoint of bam_kernels train, got another file")
    missing = [key for key in KEYS if key not in content]
    if missing:
        raise RecipeError(f"{path}: expected {', '.join(missing)} in the checkpoint, got none")
    return content


def difference(found: Any, wanted: Any, name: str = "") -> str | None:
    """Where two records of a run differ first, in words; None where they are equal."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(found.keys() | wanted.keys()):
            inner = f"{name}.{key}" if name else str(key)
            told = difference(found.get(key), wanted.get(key), inner)
            if told is not None:
                return told
        return None
    return None if found == wanted else f"{name} is {found!r} there, {wanted!r} here"
