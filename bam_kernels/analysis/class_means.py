"""Means by class over a data set that streams by: sums in float64, and nothing else is kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


class ClassMeans:
    """Class-conditional means of some quantity [N, ...], taken batch by batch.

    Sums and counts are all that is held: [K, ...] in float64 for K classes, which grow with the
    labels. In float64 a sum of float32 values differs with the way the batches are cut by 1e-16 of
    itself at most for each addition, so that the means do not depend on it in float32.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self.counts = torch.zeros(0, dtype=torch.int64)

    def add(self, values: Tensor, labels: Tensor) -> None:
        """A batch: values [N, ...], and labels [N] of int64 from 0.

        Raises:
            ValueError: the values' shape differs from those before; something is not finite.
        """
        values, labels = values.to("cpu", torch.float64), labels.to("cpu")
        if not values.isfinite().all():
            raise ValueError("values: expected finite numbers, got NaN or infinity")
        classes = max(int(labels.max()) + 1 if len(labels) else 0, len(self.counts))
        if self._sums is None:
            self._sums = values.new_zeros((0, *values.shape[1:]))
        if self._sums.shape[1:] != values.shape[1:]:
            raise ValueError(
                f"values: expected [N, {', '.join(map(str, self._sums.shape[1:]))}] as before, "
                f"got {list(values.shape)}"
            )
        self._sums = _grown(self._sums, classes)
        self.counts = _grown(self.counts, classes)
        self._sums.index_add_(0, labels, values)
        self.counts += torch.bincount(labels, minlength=classes)

    @property
    def means(self) -> Tensor:
        """[K, ...] float64; NaN for a class of which there was no sample."""
        if self._sums is None:
            return torch.zeros(0, dtype=torch.float64)
        counts = self.counts.double().reshape(-1, *[1] * (self._sums.dim() - 1))
        return self._sums / counts  # 0 / 0 is NaN


def _grown(rows: Tensor, count: int) -> Tensor:
    return torch.cat([rows, rows.new_zeros((count - len(rows), *rows.shape[1:]))])


def labelled(loader: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a loader, each checked to be images [N, ...] and labels [N] from 0.

    Raises:
        TypeError: a batch is something else.
        ValueError: labels of another length, or below 0; no batch at all.
    """
    empty = True
    for batch in loader:
        if not isinstance(batch, tuple | list) or len(batch) < 2:
            raise TypeError(
                "loader: expected batches (images, labels), got "
                f"{type(batch).__name__}{f' of {len(batch)}' if hasattr(batch, '__len__') else ''}"
            )
        images, labels = batch[0], batch[1]
        if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
            got = f"{type(images).__name__} and {type(labels).__name__}"
            raise TypeError(f"loader: expected images and labels as tensors, got {got}")
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"loader: expected labels of an integer type, got {labels.dtype}")
        if labels.shape != images.shape[:1]:
            raise ValueError(
                f"loader: expected labels [{len(images)}], one an image, got {list(labels.shape)}"
            )
        if len(labels) and int(labels.min()) < 0:
            raise ValueError(f"loader: expected labels from 0, got {int(labels.min())}")
        empty = empty and not len(labels)
        yield images, labels.long()
    if empty:
        raise ValueError("loader: expected at least one image, got none")


def images_of(loader: Iterable[Any]) -> Iterator[Tensor]:
    """The images [N, ...] of a loader's batches, which are those, or tuples that begin with them.

    Raises:
        TypeError: a batch is something else.
        ValueError: no image in any.
    """
    empty = True
    for batch in loader:
        images = batch[0] if isinstance(batch, tuple | list) and len(batch) else batch
        if not isinstance(images, Tensor):
            raise TypeError(f"loader: expected batches of images, got {type(batch).__name__}")
        empty = empty and not len(images)
        yield images
    if empty:
        raise ValueError("loader: expected at least one image, got none")
