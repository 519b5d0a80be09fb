"""Checkpoints: files with a state dict, of torch or of safetensors, read without running them."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bam_kernels.files import replacing

TORCH_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".tar")
SAFETENSORS_SUFFIX = ".safetensors"


class CheckpointError(Exception):
    """A file that cannot be read or written; one line."""


def check_suffix(path: Path) -> None:
    """
    Raises:
        CheckpointError: the name tells no format, or one whose package is not installed.
    """
    if path.suffix not in (*TORCH_SUFFIXES, SAFETENSORS_SUFFIX):
        raise CheckpointError(
            f"expected a name that ends in one of {', '.join(TORCH_SUFFIXES)}, "
            f"{SAFETENSORS_SUFFIX}, got {path}"
        )
    if path.suffix == SAFETENSORS_SUFFIX and importlib.util.find_spec("safetensors") is None:
        raise CheckpointError(f"{path}: safetensors is not installed; pip install safetensors")


def load(path: Path) -> tuple[Mapping[str, Any], dict[str, str] | None]:
    """What is in a file, on the CPU, and safetensors' notes beside it.

    A pickle is read as `torch.load` does under ``weights_only=True``: no code of its runs.

    Raises:
        CheckpointError: no such file, or not what its name says; no dict; other things than tensors
            and plain values.
    """
    check_suffix(path)
    if not path.is_file():
        raise CheckpointError(f"no such file: {path}")
    notes = None
    try:
        if path.suffix == SAFETENSORS_SUFFIX:
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                content = {key: file.get_tensor(key) for key in file.keys()}
                notes = file.metadata()
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # what a broken file makes of its readers
        raise CheckpointError(f"{path}: {_why(problem)}") from problem
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: expected a dict, got {type(content).__name__}")
    return content, notes


def _why(problem: Exception) -> str:
    """In a line. torch's own is a page, with the advice to run the file."""
    text = " ".join(str(problem).split())
    refused = re.search(
        r"Unsupported (?:global|class|operand)[^.]*?[\w.]+ was not|GLOBAL \S+", text
    )
    if refused is not None:
        name = refused.group().removesuffix(" was not").split()[-1]
        return f"expected tensors and plain values, got a pickle that asks for {name}"
    return f"cannot be read: {type(problem).__name__}: {text[:160]}"


def save(content: Mapping[str, Any], path: Path, notes: dict[str, str] | None = None) -> None:
    """Write a file, whole or not at all.

    For safetensors, content is tensors alone. Those that share memory are written apart.

    Raises:
        CheckpointError: it cannot be written, or not in this format.
    """
    try:
        with replacing(path) as part:
            if path.suffix == SAFETENSORS_SUFFIX:
                from safetensors.torch import save_file

                save_file(_apart(content), part, notes or {"format": "pt"})
            else:
                torch.save(content, part)
    except Exception as problem:  # a full disk, a folder that is not there, an odd tensor
        text = " ".join(str(problem).split())
        raise CheckpointError(f"{path}: cannot be written: {text[:200]}") from problem


def _apart(content: Mapping[str, Any]) -> dict[str, Tensor]:
    seen: set[int] = set()
    found: dict[str, Tensor] = {}
    for key, value in content.items():
        storage = value.untyped_storage().data_ptr()
        found[key] = value.clone() if storage in seen else value.contiguous()
        seen.add(storage)
    return found


def is_state_dict(value: Any) -> bool:
    """Whether it is a dict with tensors in it."""
    return (
        isinstance(value, Mapping)
        and all(isinstance(key, str) for key in value)
        and any(isinstance(each, Tensor) for each in value.values())
    )
