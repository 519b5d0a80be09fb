"""BAMs that come as source only, written here anew from what is known of them: their layers' names
and sizes, and what they compute. Forks of them, and modules that only look like a BAM."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def named(*layers: tuple[str, nn.Module]) -> nn.Sequential:
    made = nn.Sequential()
    for name, layer in layers:
        made.add_module(name, layer)
    return made


class Flat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1)


def square_windows(x: Tensor) -> Tensor:
    """The authors' pooling: windows as wide as the map is high."""
    return F.avg_pool2d(x, x.shape[2], stride=x.shape[2])


class OfficialChannel(nn.Module):
    def __init__(self, channels: int, hidden: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.gate_activation = None  # a global there, kept and not used
        self.pooling = square_windows
        self.gate_c = named(
            ("flatten", Flat()),
            ("gate_c_fc_0", nn.Linear(channels, hidden)),
            ("gate_c_bn_1", nn.BatchNorm1d(hidden)),
            ("gate_c_relu_1", activation()),
            ("gate_c_fc_final", nn.Linear(hidden, channels)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.gate_c(self.pooling(x))[:, :, None, None].expand_as(x)


class OfficialSpatial(nn.Module):
    def __init__(self, channels: int, hidden: int, dilation: int) -> None:
        super().__init__()
        layers: list[tuple[str, nn.Module]] = [
            ("conv_reduce0", nn.Conv2d(channels, hidden, 1)),
            ("bn_reduce0", nn.BatchNorm2d(hidden)),
            ("relu_reduce0", nn.ReLU()),
        ]
        for i in range(2):
            conv = nn.Conv2d(hidden, hidden, 3, padding=dilation, dilation=dilation)
            layers += [(f"conv_di_{i}", conv), (f"bn_di_{i}", nn.BatchNorm2d(hidden))]
            layers += [(f"relu_di_{i}", nn.ReLU())]
        layers += [("conv_final", nn.Conv2d(hidden, 1, 1))]
        self.gate_s = named(*((f"gate_s_{name}", layer) for name, layer in layers))

    def forward(self, x: Tensor) -> Tensor:
        return self.gate_s(x).expand_as(x)


class OfficialBAM(nn.Module):
    """The authors': F * (1 + sigmoid(c * s)), norms inside of both branches."""

    def __init__(
        self,
        channels: int,
        reduction: int = 16,
        dilation: int = 4,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        hidden = channels // reduction
        self.channel_att = OfficialChannel(channels, hidden, activation)
        self.spatial_att = OfficialSpatial(channels, hidden, dilation)

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.sigmoid(self.channel_att(x) * self.spatial_att(x)) + 1)


class Changzy00Channel(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        layers = [nn.Linear(channels, hidden), nn.ReLU(inplace=True)]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden, channels))
        self.bn = nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.bn(self.mlp(self.avgpool(x).flatten(1)))
        return logits[:, :, None, None].expand_as(x)


class Changzy00Spatial(nn.Module):
    def __init__(self, channels: int, hidden: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, hidden, 1)
        self.conv2 = nn.Sequential()
        for _ in range(2):
            conv = nn.Conv2d(hidden, hidden, 3, padding=dilation, dilation=dilation)
            self.conv2.extend([conv, nn.BatchNorm2d(hidden), nn.ReLU(inplace=True)])
        self.conv3 = nn.Conv2d(hidden, 1, 1)
        self.bn = nn.BatchNorm2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv3(self.conv2(self.conv1(x)))).expand_as(x)


class Changzy00BAM(nn.Module):
    """F + F * sigmoid(c + s): a plain MLP and a norm; a bare reduction, two normed convolutions, a
    projection and a norm."""

    def __init__(self, channels: int, reduction: int = 16, dilation: int = 4) -> None:
        super().__init__()
        self.channel_attn = Changzy00Channel(channels, channels // reduction)
        self.spatial_attn = Changzy00Spatial(channels, channels // reduction, dilation)

    def forward(self, x: Tensor) -> Tensor:
        return x + x * torch.sigmoid(self.channel_attn(x) + self.spatial_attn(x))


# Both are called BAM where they come from.
OfficialBAM.__name__ = Changzy00BAM.__name__ = "BAM"


class SummingFork(nn.Module):
    """The authors' layers under the same names, and another sum: the keys do not tell."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channel_att = OfficialChannel(channels, channels // 16, nn.ReLU)
        self.spatial_att = OfficialSpatial(channels, channels // 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.sigmoid(self.channel_att(x) + self.spatial_att(x)) + 1)


class DetachedFork(nn.Module):
    """The authors' numbers, without a gradient through the map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channel_att = OfficialChannel(channels, channels // 16, nn.ReLU)
        self.spatial_att = OfficialSpatial(channels, channels // 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.sigmoid((self.channel_att(x) * self.spatial_att(x)).detach()) + 1)


class PyramidBAM(nn.Module):
    """What another field calls a BAM: self-attention over pixels, by queries, keys and values."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query_conv = nn.Conv2d(channels, channels // 8, 1)
        self.key_conv = nn.Conv2d(channels, channels // 8, 1)
        self.value_conv = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.randn(1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (conv(x).flatten(2) for conv in (self.query_conv, self.key_conv, self.value_conv))
        weights = torch.softmax(q.transpose(1, 2) @ k, dim=-1)
        return x + self.gamma * (v @ weights.transpose(1, 2)).view_as(x)


PyramidBAM.__name__ = "BAM"


def pytorchcv_bam(channels: int) -> nn.Module:
    from pytorchcv.models.bamresnet import BamBlock

    return BamBlock(channels)


def fightingcv_bam(channels: int, reduction: int = 16, dia_val: int = 2) -> nn.Module:
    from fightingcv_attention.attention.BAM import BAMBlock

    return BAMBlock(channels, reduction, dia_val)
