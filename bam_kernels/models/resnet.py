"""ResNet, ResNeXt and the wide ResNet-18: one network, by the numbers that tell them apart.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016; Xie et al., "Aggregated
Residual Transformations for Deep Neural Networks", CVPR 2017; Zagoruyko and Komodakis, "Wide
Residual Networks", BMVC 2016 (its ImageNet networks).

The keys are those of torchvision's ResNet, so that its ImageNet weights load. Not its code: a
bottleneck strides in its first 1x1 convolution here, as in the original ResNet and as the paper
counts (ResNet-50 at 224: 3.86 10^9 multiply-accumulates; 4.09 with the stride in the 3x3), there
may be three stages, and the stem may be CIFAR's.
"""

from __future__ import annotations

import dataclasses
import functools

from torch import Tensor, nn

from bam_kernels.models.description import Description
from bam_kernels.models.layers import conv, initialise


class Basic(nn.Module):
    """Two 3x3 convolutions and a shortcut, [N, C_in, H, W] to [N, C, H / stride, W / stride]."""

    expansion = 1

    def __init__(self, c_in: int, width: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(c_in, width, 3, stride, groups), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, 1, groups), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.refine = nn.Sequential()  # where "bam-c" and "se" go; as torchvision, it has no keys
        self.downsample = _shortcut(c_in, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.refine(self.bn2(self.conv2(y)))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 and a shortcut, [N, C_in, H, W] to [N, C_out, H / stride, W / stride].

    Args:
        c_in: channels of the input.
        width: of the 3x3 convolution.
        stride: of the first 1x1 convolution, and of the shortcut.
        groups: of the 3x3 convolution (ResNeXt's cardinality).
        c_out: channels of the output; 4 * width unless given.
    """

    expansion = 4

    def __init__(
        self, c_in: int, width: int, stride: int = 1, groups: int = 1, c_out: int | None = None
    ) -> None:
        super().__init__()
        c_out = 4 * width if c_out is None else c_out
        self.conv1, self.bn1 = conv(c_in, width, 1, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, 1, groups), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, c_out, 1), nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.refine = nn.Sequential()  # where "bam-c" and "se" go; as torchvision, it has no keys
        self.downsample = _shortcut(c_in, c_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.refine(self.bn3(self.conv3(y)))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


def _shortcut(c_in: int, c_out: int, stride: int) -> nn.Sequential | None:
    if c_in == c_out and stride == 1:
        return None
    return nn.Sequential(conv(c_in, c_out, 1, stride), nn.BatchNorm2d(c_out))


@dataclasses.dataclass(frozen=True)
class Shape:
    """The numbers of a network.

    Attributes:
        depths: blocks a stage; each stage after the first halves H and W.
        bottleneck: whether the blocks are `Bottleneck` or `Basic`.
        groups: of the 3x3 convolutions of bottlenecks.
        group_width: their channels a group in the first stage; the 3x3 are ``groups *
            group_width`` wide there, and twice as wide in each stage that follows.
        outputs: C of the first stage's output, doubled likewise.
        cifar: a 3x3 stem of stride 1 in place of 7x7 of stride 2 and a max pooling.
    """

    depths: tuple[int, ...]
    bottleneck: bool = True
    groups: int = 1
    group_width: int = 64
    outputs: int = 256
    cifar: bool = False


class ResNet(nn.Module):
    """Images [N, in_channels, H, W] to logits [N, num_classes].

    Convolutions begin as He et al. (2015) have it, normal with a variance of 2 / fan_out; batch
    norms as 1 and 0; the last layer as nn.Linear's.
    """

    def __init__(self, shape: Shape, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        cifar, stem = shape.cifar, 64
        self.conv1 = conv(in_channels, stem, 3) if cifar else conv(in_channels, stem, 7, 2)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if cifar else nn.MaxPool2d(3, 2, 1)
        c = stem
        for i, depth in enumerate(shape.depths):
            stage = nn.Sequential()
            for j in range(depth):
                stage.append(_block(shape, i, c, 2 if i and not j else 1))
                c = shape.outputs << i
            self.add_module(f"layer{i + 1}", stage)
        self.stages = len(shape.depths)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(c, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for i in range(self.stages):
            x = getattr(self, f"layer{i + 1}")(x)
        return self.fc(self.avgpool(x).flatten(1))


def _block(shape: Shape, stage: int, c_in: int, stride: int) -> nn.Module:
    width, c_out = (shape.groups * shape.group_width) << stage, shape.outputs << stage
    if shape.bottleneck:
        return Bottleneck(c_in, width, stride, shape.groups, c_out)
    return Basic(c_in, c_out, stride)


def _extra(shape: Shape, channels: int) -> nn.Module:
    """Table 1c: one more block of the stage that puts out so many channels."""
    block = _block(shape, (channels // shape.outputs).bit_length() - 1, channels, 1)
    initialise(block)
    return block


def _describe(name: str, title: str, shape: Shape) -> Description:
    size, classes = ((32, 32), 100) if shape.cifar else ((224, 224), 1000)
    return Description(
        name,
        title,
        "cifar100" if shape.cifar else "imagenet",
        size,
        classes,
        functools.partial(ResNet, shape),
        functools.partial(_extra, shape),
    )


def _basic(outputs: int) -> Shape:
    return Shape((2, 2, 2, 2), bottleneck=False, outputs=outputs)


def _resnext29(groups: int) -> Shape:
    return Shape((3, 3, 3), groups=groups, outputs=256, cifar=True)


_R50, _R101 = (3, 4, 6, 3), (3, 4, 23, 3)
RESNET50, RESNET101 = Shape(_R50), Shape(_R101)

DESCRIPTIONS = (
    _describe("cifar_resnet50", "ResNet50", Shape(_R50, cifar=True)),
    _describe("cifar_resnet101", "ResNet101", Shape(_R101, cifar=True)),
    _describe("cifar_resnext29_8x64d", "ResNeXt29 8x64d", _resnext29(8)),
    _describe("cifar_resnext29_16x64d", "ResNeXt29 16x64d", _resnext29(16)),
    _describe("resnet18", "ResNet18", _basic(64)),
    _describe("resnet50", "ResNet50", RESNET50),
    _describe("resnet101", "ResNet101", RESNET101),
    _describe("wideresnet18_1.5", "WideResNet18 (widen=1.5)", _basic(96)),
    _describe("wideresnet18_2.0", "WideResNet18 (widen=2.0)", _basic(128)),
    _describe("resnext50_32x4d", "ResNeXt50 (32x4d)", Shape(_R50, groups=32, group_width=4)),
)
