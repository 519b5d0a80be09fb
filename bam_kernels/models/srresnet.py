"""SRResNet (Ledig et al., CVPR 2017): images four times as high and wide (paper, Sec. 5.7)."""

from __future__ import annotations

from torch import Tensor, nn

from bam_kernels.models.description import Description
from bam_kernels.models.layers import conv


class ResidualBlock(nn.Module):
    """3x3, PReLU, 3x3, each with a batch norm, and the identity: [N, C, H, W] to the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(channels, channels, 3), nn.BatchNorm2d(channels)
        self.prelu = nn.PReLU()
        self.conv2, self.bn2 = conv(channels, channels, 3), nn.BatchNorm2d(channels)
        self.refine = nn.Sequential()  # where "bam-c" and "se" go

    def forward(self, x: Tensor) -> Tensor:
        return x + self.refine(self.bn2(self.conv2(self.prelu(self.bn1(self.conv1(x))))))


class SRResNet(nn.Module):
    """Images [N, in_channels, H, W] to [N, in_channels, 4 H, 4 W].

    16 residual blocks of 64 channels and two sub-pixel convolutions, begun as PyTorch begins
    convolutions: Ledig et al. do not say how theirs are.
    """

    def __init__(self, in_channels: int = 3, channels: int = 64, blocks: int = 16) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(in_channels, channels, 9, padding=4), nn.PReLU())
        self.body = nn.Sequential(*(ResidualBlock(channels) for _ in range(blocks)))
        self.neck = nn.Sequential(conv(channels, channels, 3), nn.BatchNorm2d(channels))
        self.upsample = nn.Sequential()
        for _ in range(2):
            wide = nn.Conv2d(channels, 4 * channels, 3, padding=1)
            self.upsample.extend([wide, nn.PixelShuffle(2), nn.PReLU()])
        self.tail = nn.Conv2d(channels, in_channels, 9, padding=4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        return self.tail(self.upsample(x + self.neck(self.body(x))))


def _build(num_classes: int | None, in_channels: int) -> nn.Module:
    return SRResNet(in_channels)


DESCRIPTIONS = (
    Description(
        "srresnet",
        "SRResNet",
        "coco",
        (24, 24),  # of 96 x 96 crops, in Ledig et al.
        None,
        _build,
        bottlenecks=({"after": ["body.3", "body.7", "body.11", "body.15"]},),  # every 4th block
    ),
)
