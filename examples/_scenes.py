"""Handwritten digits painted on photographs: small things to recognise in real surroundings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from _common import crops, more_photographs
from torch import Tensor

PHOTOGRAPHS = {"train": ("astronaut", "coffee"), "held out": ("chelsea", "rocket")}
"""Of scikit-image, by part."""


class Scenes:
    """scikit-learn's digits, each in some colour somewhere on a crop of a photograph.

    Args:
        part: "train", or "held out": other digits on other photographs.
        size: of the scenes, in pixels.
    """

    def __init__(self, part: str, size: int) -> None:
        from sklearn.datasets import load_digits

        self.size = size
        self.photos = more_photographs(*PHOTOGRAPHS[part])
        digits = load_digits()
        chosen = slice(0, 1297) if part == "train" else slice(1297, None)
        self.digits = torch.tensor(digits.images[chosen], dtype=torch.float32) / 16
        self.labels = torch.tensor(digits.target[chosen])

    def draw(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Scenes drawn by torch's generator.

        Returns:
            Images [count, 3, size, size] in 0 to 1; labels [count]; and the squares that the digits
            are in, bool [count, size, size].
        """
        chosen = torch.randint(len(self.labels), (count,))
        share = -(-count // len(self.photos))
        scenes = torch.cat([crops(photo, share, self.size) for photo in self.photos])
        scenes = scenes[torch.randperm(len(scenes))[:count]]
        squares = torch.zeros(count, self.size, self.size, dtype=torch.bool)
        for scene, square, digit in zip(scenes, squares, self.digits[chosen], strict=True):
            side = int(torch.randint(self.size * 5 // 12, self.size * 7 // 12, ()))
            y, x = (int(torch.randint(self.size - side + 1, ())) for _ in range(2))
            ink = F.interpolate(digit[None, None], (side, side), mode="bilinear")[0].clamp(0, 1)
            spot = scene[:, y : y + side, x : x + side]
            # Some colour, light on what is dark and dark on what is light.
            colour = 0.7 * (spot.mean((1, 2), keepdim=True) < 0.5) + 0.3 * torch.rand(3, 1, 1)
            spot += 0.95 * ink * (colour - spot)
            square[y : y + side, x : x + side] = True
        return scenes, self.labels[chosen], squares
