"""Pre-activation residual networks for CIFAR: PreResNet-110 and the wide ResNets.

He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016; Zagoruyko and Komodakis, "Wide
Residual Networks", BMVC 2016. Three stages; batch norm and ReLU stand in front of each convolution,
and what comes out of a stage is the bare sum.

The paper's PreResNet110 has *bottleneck* blocks, 18 a stage, by its 1.73 million parameters.
"""

from __future__ import annotations

import dataclasses
import functools

from torch import Tensor, nn

from bam_kernels.models.description import Description
from bam_kernels.models.layers import conv, initialise


class PreActivation(nn.Module):
    """Batch norm, ReLU, convolution, two or three times, and a shortcut.

    [N, C_in, H, W] to [N, C_out, H / stride, W / stride]. Where these differ, the shortcut is a
    1x1 convolution of the first activation (He et al., 2016); else it is the input itself.

    Args:
        c_in: channels of the input.
        width: of the inner maps.
        c_out: channels of the output.
        stride: of the first convolution.
        bottleneck: 1x1, 3x3, 1x1 in place of 3x3, 3x3.
    """

    def __init__(self, c_in: int, width: int, c_out: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.bn1, self.bn2 = nn.BatchNorm2d(c_in), nn.BatchNorm2d(width)
        if bottleneck:
            self.conv1, self.conv2 = conv(c_in, width, 1, stride), conv(width, width, 3)
            self.bn3, self.conv3 = nn.BatchNorm2d(width), conv(width, c_out, 1)
        else:
            self.conv1, self.conv2 = conv(c_in, width, 3, stride), conv(width, c_out, 3)
            self.bn3 = self.conv3 = None
        same = c_in == c_out and stride == 1
        self.shortcut = None if same else conv(c_in, c_out, 1, stride)
        self.refine = nn.Sequential()  # where "bam-c" and "se" go

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        y = self.conv2(self.relu(self.bn2(self.conv1(y))))
        if self.conv3 is not None:
            y = self.conv3(self.relu(self.bn3(y)))
        return shortcut + self.refine(y)


@dataclasses.dataclass(frozen=True)
class Shape:
    """The numbers of a network.

    Attributes:
        depth: blocks a stage.
        outputs: C of the first stage's output; twice that in each that follows.
        bottleneck: whether the blocks are bottlenecks, with inner maps a quarter as wide.
    """

    depth: int
    outputs: int
    bottleneck: bool = False

    def block(self, stage: int, c_in: int, stride: int) -> PreActivation:
        """A block of a stage, counted from 0."""
        c = self.outputs << stage
        return PreActivation(c_in, c // 4 if self.bottleneck else c, c, stride, self.bottleneck)


class PreActivationNet(nn.Module):
    """Images [N, in_channels, H, W] to logits [N, num_classes].

    Convolutions begin as He et al. (2015) have it, normal with a variance of 2 / fan_out; batch
    norms as 1 and 0; the last layer as nn.Linear's.
    """

    def __init__(self, shape: Shape, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        c = 16
        self.conv1 = conv(in_channels, c, 3)
        for i in range(3):
            stage = nn.Sequential()
            for j in range(shape.depth):
                stage.append(shape.block(i, c, 2 if i and not j else 1))
                c = shape.outputs << i
            self.add_module(f"layer{i + 1}", stage)
        self.bn = nn.BatchNorm2d(c)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(c, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(self.avgpool(self.relu(self.bn(x))).flatten(1))


def _extra(shape: Shape, channels: int) -> nn.Module:
    """Table 1c: one more block of the stage that puts out so many channels."""
    block = shape.block((channels // shape.outputs).bit_length() - 1, channels, 1)
    initialise(block)
    return block


def _describe(name: str, title: str, shape: Shape) -> Description:
    return Description(
        name,
        title,
        "cifar100",
        (32, 32),
        100,
        functools.partial(PreActivationNet, shape),
        functools.partial(_extra, shape),
    )


# WideResNet-d-k has 2 convolutions a block, (d - 4) / 6 blocks a stage, the first of 16 k channels.
DESCRIPTIONS = (
    _describe("cifar_preresnet110", "PreResNet110", Shape(18, 64, bottleneck=True)),
    _describe("cifar_wideresnet28_8", "WideResNet28 (w=8)", Shape(4, 128)),
    _describe("cifar_wideresnet28_10", "WideResNet28 (w=10)", Shape(4, 160)),
    _describe("cifar_wideresnet40_10", "WideResNet40 (w=10)", Shape(6, 160)),
)
