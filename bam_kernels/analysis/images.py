"""Folders of images as loaders of batches. Needs torchvision and Pillow."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bam_kernels.recipes.data import IMAGENET_STATISTICS
from bam_kernels.recipes.errors import RecipeError


class ImagesError(RecipeError):
    """A folder or an image that cannot be used; one line, also from a worker process."""


@dataclasses.dataclass(frozen=True)
class Preparation:
    """How an image becomes a network's input.

    Attributes:
        size: the shorter side is resized to it, and the middle cut out: [3, size, size].
        mean, std: of the channels, subtracted and divided by.
    """

    size: int
    mean: tuple[float, ...] = IMAGENET_STATISTICS[0]
    std: tuple[float, ...] = IMAGENET_STATISTICS[1]

    def __call__(self, image: Any) -> Tensor:
        from torchvision.transforms.v2 import functional as transform

        image = transform.center_crop(transform.resize(image, self.size), self.size)
        return transform.normalize(
            transform.to_dtype(transform.to_image(image), torch.float32, scale=True),
            list(self.mean), list(self.std),
        )  # fmt: skip

    def photo(self, prepared: Tensor) -> Any:
        """The image back again: uint8 [size, size, 3]."""
        mean, std = (torch.tensor(v)[:, None, None] for v in (self.mean, self.std))
        shown = (prepared.cpu() * std + mean).clamp(0, 1)
        return (255 * shown).round().byte().permute(1, 2, 0).numpy()


class Images(Dataset):
    """Images below a folder with their class: the folder in it that holds them, sorted by name, as
    torchvision's ImageFolder has it; or, where images lie in the folder itself, 0 for all.

    Attributes:
        classes: the names of the classes; [] for a flat folder.
        samples: (path, class) of each image.

    Raises:
        ImagesError: no such folder, or no image in it, or none in one of its classes.
    """

    def __init__(self, folder: Path, prepare: Preparation) -> None:
        from torchvision.datasets import ImageFolder
        from torchvision.datasets.folder import IMG_EXTENSIONS

        self.folder, self.prepare = folder, prepare
        if not folder.is_dir():
            raise ImagesError(f"no such folder: {folder}")
        flat = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMG_EXTENSIONS)
        self.classes: list[str] = []
        self.samples = [(path, 0) for path in flat]
        if not flat:
            try:
                found = ImageFolder(folder)
            except (FileNotFoundError, OSError) as error:
                told = " ".join(str(error).split())
                raise ImagesError(f"{folder}: no images ({told})") from error
            self.classes = found.classes
            self.samples = [(Path(path), label) for path, label in found.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        return self.prepare(read(path)), label

    def loader(self, batch: int, workers: int = 0) -> DataLoader:
        """In order, each image once; read by so many processes, or by this one."""
        return DataLoader(self, batch_size=batch, num_workers=workers)


def read(path: Path) -> Any:
    """A PIL image in RGB, turned as its camera says.

    Raises:
        ImagesError: it cannot be read.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        why = " ".join(str(error).split())
        raise ImagesError(f"cannot read the image {path}: {why}") from error
