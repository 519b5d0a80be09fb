"""MobileNet v1 (Howard et al., 2017) with SSD's further layers: the maps of Table 7's MobileNet."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from bam_kernels.models.layers import conv, initialise

# (C of the output, stride) of the depthwise separable layers.
_LAYERS = (
    (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2),
    (512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1),
)  # fmt: skip
_FINE = 11  # layers up to the first map, of stride 16
# (C of the 1x1 convolution, C of the 3x3 of stride 2 behind it), a further map each.
_EXTRA = ((256, 512), (128, 256), (128, 256), (64, 128))


class _Features(nn.Module):
    def __init__(self, in_channels: int) -> None:
        super().__init__()
        layers = [_convolution(in_channels, 32, 3, 2)]
        c = 32
        for c_out, stride in _LAYERS:
            layers.append(_separable(c, c_out, stride))
            c = c_out
        self.fine = nn.Sequential(*layers[: _FINE + 1])
        self.extra = nn.ModuleList([nn.Sequential(*layers[_FINE + 1 :])])
        for inner, c_out in _EXTRA:
            pair = (_convolution(c, inner, 1, 1), _convolution(inner, c_out, 3, 2))
            self.extra.append(nn.Sequential(*pair))
            c = c_out

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        found = [self.fine(x)]
        for layer in self.extra:
            found.append(layer(found[-1]))
        return OrderedDict((str(i), y) for i, y in enumerate(found))


def mobilenet_v1_features(in_channels: int) -> tuple[nn.Module, list[int]]:
    """What puts out the six maps of SSD, from stride 16 on, by name; and their channels.

    Layers and widths are those of the MobileNet-SSD that is known in Caffe. Convolutions begin as
    He et al. (2015) have it.
    """
    features = _Features(in_channels)
    initialise(features)
    return features, [512, 1024, *(c for _, c in _EXTRA)]


def _convolution(c_in: int, c_out: int, size: int, stride: int, groups: int = 1) -> nn.Sequential:
    convolution = conv(c_in, c_out, size, stride, groups)
    return nn.Sequential(convolution, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))


def _separable(c_in: int, c_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        *_convolution(c_in, c_in, 3, stride, groups=c_in), *_convolution(c_in, c_out, 1, 1)
    )
