"""What the libraries share that build layers by name from a configuration."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import nn


def package(name: str, why: str) -> ModuleType:
    """The module `name`, or an ImportError that says what to install.

    Raises:
        ImportError: its package is not there.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        root = name.partition(".")[0]
        raise ImportError(f"{why} needs {root}: pip install {root} ({error})") from error


def constructor(name: str, make: Callable[..., nn.Module], **attributes: Any) -> type[nn.Module]:
    """A class for a registry that takes classes alone: constructing it gives what `make` makes.

    What is built is then of its own class, which pickles and loads where nothing was registered.
    """

    def build(cls: type, *args: Any, **kwargs: Any) -> nn.Module:
        return make(*args, **kwargs)

    return type(name, (nn.Module,), {"__new__": build, "__module__": __name__, **attributes})


def is_constructor(value: Any) -> bool:
    """Whether `value` is a class that `constructor` made."""
    return isinstance(value, type) and value.__module__ == __name__


def check_name(name: Any, taken: Any) -> None:
    """Raise TypeError or ValueError unless `name` can stand for a layer; `taken` has it now."""
    if not isinstance(name, str):
        raise TypeError(f"name: expected a str, got {type(name).__name__}")
    if not name.isidentifier():
        raise ValueError(f"name: expected an identifier, got {name!r}")
    if taken is not None and not is_constructor(taken):
        raise ValueError(f"name: expected one that is free, but {name!r} is {taken!r}")
