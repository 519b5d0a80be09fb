"""The data sets of the recipes, as torchvision and the packages that ship them load them."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, TensorDataset

from bam_kernels.recipes.errors import RecipeError, need


@dataclasses.dataclass(frozen=True)
class Data:
    """Two sets of (image [C, H, W] float32, class).

    Attributes:
        train: augmented, by torch's generator.
        test: the same always.
        num_classes: of both.
        in_channels: C.
    """

    train: Dataset
    test: Dataset
    num_classes: int
    in_channels: int


CIFAR_STATISTICS = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
"""CIFAR-100's training set: mean and standard deviation of R, G and B in 0 .. 1 (Sec. 5.1)."""

IMAGENET_STATISTICS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, as the authors' released code has them."""

DIGITS_TRAIN = 1297
"""Of scikit-learn's 1797 digits; the others, 500, are the test set."""


def load(dataset: str, folder: Path | None, *, download: bool = False) -> Data:
    """A data set by its name.

    Args:
        dataset: one of `DATASETS`.
        folder: where CIFAR-100 (``cifar-100-python``) or ImageNet (``train``, ``val``) lies; None
            for those that come with packages.
        download: whether torchvision may fetch CIFAR-100 into `folder`.

    Raises:
        RecipeError: the folder is missing, broken or not asked for; a package is missing.
    """
    if dataset not in DATASETS:
        raise RecipeError(f"dataset: expected one of {', '.join(DATASETS)}, got {dataset!r}")
    loader, packages, needs_folder = DATASETS[dataset]
    need(dataset, *packages)
    if not needs_folder:
        if folder is not None:
            raise RecipeError(f"--data: {dataset} comes with a package; expected none, got one")
        return loader()
    if folder is None:
        raise RecipeError(f"--data: expected the folder of {dataset}, got none")
    if download and dataset != "cifar100":
        raise RecipeError(f"--download: nothing downloads {dataset}; see its licence for how to")
    if not folder.is_dir() and not download:
        raise RecipeError(f"--data: there is no folder {folder}")
    return loader(folder, download)


def _normalised(statistics: tuple, *steps: Callable) -> Callable:
    from torchvision import transforms

    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(*statistics)])


def _cifar100(folder: Path, download: bool) -> Data:
    from torchvision import datasets, transforms

    augmented = _normalised(
        CIFAR_STATISTICS, transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()
    )
    plain = _normalised(CIFAR_STATISTICS)
    try:
        train = datasets.CIFAR100(folder, True, augmented, download=download)
        test = datasets.CIFAR100(folder, False, plain)
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RecipeError(
            f"--data: expected CIFAR-100 in {folder}/cifar-100-python, whole: {told}"
        ) from error
    return Data(train, test, 100, 3)


def _imagenet(folder: Path, download: bool) -> Data:
    from torchvision import transforms

    augmented = _normalised(
        IMAGENET_STATISTICS, transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()
    )
    plain = _normalised(IMAGENET_STATISTICS, transforms.Resize(256), transforms.CenterCrop(224))
    train, test = _folder(folder / "train", augmented), _folder(folder / "val", plain)
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise RecipeError(
            f"--data: expected the same classes in train and val of {folder}, but "
            f"{len(odd)} are in one only, such as {odd[0]!r}"
        )
    return Data(train, test, len(train.classes), 3)


def _folder(path: Path, transform: Callable) -> Any:
    """A folder of images, one folder a class.

    Raises:
        RecipeError: there is none, or no image in it; and by each item that cannot be read.
    """
    from torchvision import datasets

    if not path.is_dir():
        raise RecipeError(f"--data: there is no folder {path}")
    try:
        return datasets.ImageFolder(path, transform, loader=_read_image)
    except (OSError, RuntimeError) as error:
        raise RecipeError(f"--data: {path}: {str(error).splitlines()[0]}") from error


def _read_image(path: str) -> Any:
    from torchvision.datasets.folder import pil_loader

    try:
        return pil_loader(path)
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's, of what it cannot decode
        raise RecipeError(f"--data: cannot read the image {path}: {error}") from error


class _Shifted(Dataset):
    """Images padded by 2 pixels and cropped anywhere, as the recipe "digits" augments."""

    def __init__(self, images: torch.Tensor, targets: torch.Tensor) -> None:
        self.images, self.targets = F.pad(images, (2,) * 4, value=-1.0), targets
        self.sides = images.shape[2:]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        (h, w), (y, x) = self.sides, torch.randint(5, (2,)).tolist()
        return self.images[index, :, y : y + h, x : x + w], self.targets[index]


def _digits() -> Data:
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, (16, 16), mode="bilinear")
    targets = torch.tensor(data.target)
    # The file goes by writer: shuffled, once and for all, so that both sets have all of them.
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    train, test = order[:DIGITS_TRAIN], order[DIGITS_TRAIN:]
    return Data(
        _Shifted(images[train], targets[train]), TensorDataset(images[test], targets[test]), 10, 1
    )


def _textures() -> Data:
    from bam_kernels.recipes.textures import CLASSES, TexturePatches

    return Data(TexturePatches(True), TexturePatches(False), len(CLASSES), 1)


DATASETS: dict[str, tuple[Callable[..., Data], tuple[str, ...], bool]] = {
    "cifar100": (_cifar100, ("torchvision",), True),
    "imagenet": (_imagenet, ("torchvision",), True),
    "digits": (_digits, ("sklearn",), False),
    "textures": (_textures, ("sklearn", "skimage", "torchvision", "PIL"), False),
}
"""By name: the loader, the packages that it needs, whether it needs a folder."""
