"""A residual network for small images that two CPU cores train in a minute or two."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., 2016): [N, C, H, W] to [N, C', H/s, W/s]."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def small_resnet(
    num_classes: int,
    in_channels: int = 1,
    widths: Sequence[int] = (16, 32, 64),
    blocks: int = 2,
) -> nn.Module:
    """A CIFAR-style ResNet of three stages; He et al.'s initialisation for convolutions.

    Args:
        num_classes: outputs.
        in_channels: of the images [N, in_channels, H, W]; H and W of 8 or more.
        widths: channels of a stage; each but the first halves H and W.
        blocks: basic blocks a stage.
    """
    parts: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(in_channels, widths[0], 3, 1, 1, bias=False),
        bn1=nn.BatchNorm2d(widths[0]),
        relu=nn.ReLU(),
    )
    channels = widths[0]
    for number, width in enumerate(widths, 1):
        stage = []
        for block in range(blocks):
            stage.append(BasicBlock(channels, width, 2 if number > 1 and block == 0 else 1))
            channels = width
        parts[f"layer{number}"] = nn.Sequential(*stage)
    parts.update(avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten())
    parts["fc"] = nn.Linear(channels, num_classes)
    network = nn.Sequential(parts)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network
