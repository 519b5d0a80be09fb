"""Which photograph is a patch from? Real, small, offline, and not solved by a small network.

The photographs are those that scikit-image and scikit-learn ship in their packages. Each is cut
into tiles of 64x64 pixels in a checkerboard: patches of the dark squares are for training, those of
the light ones for testing, so that no pixel is in both. A patch is 24x24, grey, and brought to mean
0 and standard deviation 1: neither colour nor brightness nor contrast tells, only structure.
Nearly flat patches (`LEAST_DEVIATION`), about a fifth of the test set, stay below 1.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

TILE, PATCH, LARGEST = 64, 24, 512
TRAIN_PATCHES, TEST_PATCHES = 96, 48
"""A photograph's in an epoch, drawn anew each time; and in the test set, the same always."""

LEAST_DEVIATION = 0.01
"""A patch of empty sky has hardly any contrast: its noise is not blown up without bound. Pixels
are in 0 .. 1, where one of the 255 steps is 0.0039."""

SKIMAGE = (
    "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "coffee.png",
    "coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png",
    "motorcycle_left.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip
SKLEARN = ("china.jpg", "flower.jpg")
CLASSES = tuple(Path(name).stem for name in SKIMAGE + SKLEARN)


class TexturePatches(Dataset):
    """Items are (patch [1, 24, 24] float32, class); training ones are drawn by torch's generator.

    Args:
        train: random patches of the training tiles, or the fixed ones of the test tiles.
    """

    def __init__(self, train: bool) -> None:
        self.train = train
        self.tiles = [_tiles(photo, 0 if train else 1) for photo in _photographs()]
        per_class = TRAIN_PATCHES if train else TEST_PATCHES
        self.targets = [k for k in range(len(CLASSES)) for _ in range(per_class)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        target = self.targets[index]
        tiles = self.tiles[target]
        if self.train:
            tile = tiles[int(torch.randint(len(tiles), ()))]
            y, x = torch.randint(TILE - PATCH + 1, (2,)).tolist()
            patch = tile[:, y : y + PATCH, x : x + PATCH]
            patch = patch.flip(2) if torch.rand(()) < 0.5 else patch
        else:
            quarter, number = divmod(index % TEST_PATCHES, len(tiles))  # tiles in turn
            y, x = (PATCH * side for side in divmod(quarter, TILE // PATCH))
            patch = tiles[number][:, y : y + PATCH, x : x + PATCH]
        return (patch - patch.mean()) / patch.std().clamp(min=LEAST_DEVIATION), target


def _photographs() -> list[Tensor]:
    """[1, H, W] in 0 .. 1 each, H and W at most `LARGEST`: larger ones are cut to their centre."""
    from PIL import Image
    from skimage import data
    from sklearn import datasets
    from torchvision.transforms.functional import to_tensor

    folders = [Path(data.__file__).parent] * len(SKIMAGE)
    folders += [Path(datasets.__file__).parent / "images"] * len(SKLEARN)
    found = []
    for folder, name in zip(folders, SKIMAGE + SKLEARN, strict=True):
        with warnings.catch_warnings(), Image.open(folder / name) as image:
            grey = to_tensor(image.convert("L"))
        h, w = grey.shape[1:]
        top, left = max(0, h - LARGEST) // 2, max(0, w - LARGEST) // 2
        found.append(grey[:, top : top + LARGEST, left : left + LARGEST])
    return found


def _tiles(photo: Tensor, colour: int) -> Tensor:
    """The squares of one colour of the checkerboard: [N, 1, TILE, TILE]."""
    rows, columns = (side // TILE for side in photo.shape[1:])
    unfolded = F.unfold(photo[None, :, : rows * TILE, : columns * TILE], TILE, stride=TILE)
    tiles = unfolded[0].T.reshape(rows, columns, 1, TILE, TILE)
    square = (torch.arange(rows)[:, None] + torch.arange(columns)) % 2
    return tiles[square == colour]
