"""What the families share: a convolution without bias, and He's initialisation."""

from __future__ import annotations

from torch import nn


def conv(c_in: int, c_out: int, size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution in front of a batch norm: no bias, padded so that stride 1 keeps H and W."""
    return nn.Conv2d(c_in, c_out, size, stride, size // 2, groups=groups, bias=False)


def initialise(model: nn.Module) -> None:
    """He et al., "Delving Deep into Rectifiers", ICCV 2015: normal with a variance of 2 / fan_out.

    fan_out is C_out * k * k whatever the groups, as in the ResNeXt authors' code and torchvision's.
    Convolutions alone; batch norms begin as 1 and 0, linear layers as nn.Linear's, already.
    """
    for part in model.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)
