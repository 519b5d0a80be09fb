"""What the training and evaluation programs say when they cannot go on."""

from __future__ import annotations


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
