"""What the training and evaluation programs say when they cannot go on."""

from __future__ import annotations

import importlib.util


class RecipeError(ValueError):
    """A bad argument, a folder, file or checkpoint that does not serve: one line says which.

    A data loader's worker process sends an exception on with the words of its traceback before its
    own; those are left out.
    """

    def __init__(self, message: str) -> None:
        own = message.rpartition(f"{type(self).__name__}: ")[2]
        super().__init__(" ".join(own.split()))


class DivergedError(RuntimeError):
    """The loss is no longer a number."""


def need(what: str, *packages: str) -> None:
    """Raise RecipeError, which says what to install, where a package is missing."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise RecipeError(f"{what} needs {name}: pip install 'bam_kernels[train]'")
