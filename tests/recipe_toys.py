"""A recipe that trains in a second, beside the real ones; as a program, bam_kernels' commands.

    python tests/recipe_toys.py train --recipe toy ...

What a test runs in other processes goes through here: the commands are the real ones.
"""

from __future__ import annotations

import functools
import sys

import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from bam_kernels.models.description import Description
from bam_kernels.models.resnet import ResNet, Shape
from bam_kernels.recipes import RECIPES, Recipe, data, networks

CLASSES, TRAIN, TEST, SIZE = 6, 72, 30, (8, 12)
SHAPE = Shape((1, 1, 1), bottleneck=False, outputs=16, cifar=True)


class Noisy(Dataset):
    """Patterns of their class under noise that torch's generator draws anew at each reading."""

    def __init__(self, images: torch.Tensor, targets: torch.Tensor) -> None:
        self.images, self.targets = images, targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = self.images[index]
        return image + 0.5 * torch.randn_like(image), self.targets[index]


def toy_data() -> data.Data:
    """The same in every process and run."""
    generator = torch.Generator().manual_seed(7)
    patterns = torch.randn(CLASSES, 1, *SIZE, generator=generator)
    targets = torch.arange(TRAIN + TEST) % CLASSES
    images = patterns[targets] + torch.randn(len(targets), 1, *SIZE, generator=generator)
    return data.Data(
        Noisy(images[:TRAIN], targets[:TRAIN]),
        TensorDataset(images[TRAIN:], targets[TRAIN:]),
        CLASSES,
        1,
    )


def without_batch_norm(num_classes: int, in_channels: int) -> nn.Module:
    """Group norms in place of batch norms: nothing depends on who else is in the batch. And SiLUs
    in place of ReLUs, which a rounding can switch: two runs that agree to rounding stay together.
    """
    model = ResNet(SHAPE, num_classes, in_channels)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(4, child.num_features))
            elif isinstance(child, nn.ReLU):
                setattr(module, name, nn.SiLU())
    return model


def one_convolution(num_classes: int, in_channels: int) -> nn.Module:
    """As little as there is to train: fp16 convolutions are slow on a CPU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, num_classes),
    )


def _describe(name: str, build) -> Description:
    return Description(name, name, "toy", SIZE, CLASSES, build)


def register() -> None:
    """Make the toys known to this process."""
    data.DATASETS["toy"] = (toy_data, (), False)
    networks.SMALL["toy_resnet"] = _describe("toy_resnet", functools.partial(ResNet, SHAPE))
    networks.SMALL["toy_groups"] = _describe("toy_groups", without_batch_norm)
    networks.SMALL["toy_conv"] = _describe("toy_conv", one_convolution)
    sources = dict.fromkeys((*RECIPES["digits"].sources,), "a toy")
    RECIPES["toy"] = Recipe(
        "toy", "toy", "toy_resnet", epochs=4, batch=12, lr=0.05, milestones=(2,), gamma=0.1,
        momentum=0.9, nesterov=True, weight_decay=5e-4, augmentation="noise", evaluation="none",
        sources=sources,
    )  # fmt: skip


if __name__ == "__main__":
    from bam_kernels.cli import main

    register()
    torch.set_num_threads(1)
    sys.exit(main())
