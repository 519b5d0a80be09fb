"""The oracle: BAM and SqueezeExcite in plain PyTorch, to be checked by eye against the paper.

Park, Woo, Lee, Kweon, "A Simple and Light-weight Attention Module for Convolutional Neural
Networks", IJCV 2020:

    Eq. 1   F' = F + F * M(F)
    Eq. 2   M(F) = sigmoid(Mc(F) + Ms(F))
    Eq. 3   Mc(F) = BN(MLP(AvgPool(F)))
    Eq. 4   Ms(F) = BN(f3_1x1(f2_3x3(f1_3x3(f0_1x1(F)))))

Eq. 3 and 4 print no nonlinearity between the layers; here, as in the authors' code and every known
copy of it, each hidden layer is followed by a ReLU. Any floating dtype works, float64 included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bam_kernels.config import BAMConfig, resolve

Observer = Callable[[Tensor | None, Tensor | None], None]
"""Called in a module's forward with its channel logits [N, C] and spatial logits [N, 1, H, W]."""


def attention_map(c: Tensor, s: Tensor, combine: str) -> Tensor:
    """M of Eq. 2, from broadcastable logits; the other modes are Table 1b's."""
    if combine == "sum":
        return torch.sigmoid(c + s)
    if combine == "product":
        return torch.sigmoid(c * s)
    if combine == "max":
        return torch.sigmoid(torch.maximum(c, s))
    return torch.sigmoid(c) + torch.sigmoid(s)


def gate(
    x: Tensor,
    channel_logits: Tensor | None,
    spatial_logits: Tensor | None,
    combine: str = "sum",
    residual: bool = True,
) -> Tensor:
    """Eq. 1 and 2: x + x * M, or x * M without the identity.

    Args:
        x: [N, C, H, W].
        channel_logits: Mc [N, C], or None; then M is the sigmoid of the other.
        spatial_logits: Ms [N, 1, H, W], or None.
        combine: one of `bam_kernels.config.COMBINE_MODES`.
        residual: whether the identity x is added.
    """
    c = None if channel_logits is None else channel_logits[:, :, None, None]
    if c is None or spatial_logits is None:
        m = torch.sigmoid(spatial_logits if c is None else c)
    else:
        m = attention_map(c, spatial_logits, combine)
    return x + x * m if residual else x * m


class ChannelBranch(nn.Module):
    """Mc, Eq. 3: global average pool, MLP, batch norm. [N, C, H, W] to logits [N, C].

    Keys: ``fc.{i}``, ``hidden_norm.{i}`` (with `norm_hidden`), ``norm`` (with `norm_final`).
    """

    pool = "global"

    def __init__(self, config: BAMConfig, **factory: Any) -> None:
        super().__init__()
        if config.pool != "global":
            self.pool = config.pool
        hidden, layers = config.hidden, config.mlp_layers
        widths = [config.channels, *[hidden] * layers, config.channels]
        self.fc = nn.ModuleList(
            nn.Linear(widths[i], widths[i + 1], **factory) for i in range(layers + 1)
        )
        self.hidden_norm = (
            nn.ModuleList(nn.BatchNorm1d(hidden, **factory) for _ in range(layers))
            if config.norm_hidden
            else None
        )
        self.norm = nn.BatchNorm1d(config.channels, **factory) if config.norm_final else None

    def from_pooled(self, pooled: Tensor) -> Tensor:
        """The branch behind the pooling: [N, C] to logits [N, C]."""
        y = pooled
        last = len(self.fc) - 1
        for i, fc in enumerate(self.fc):
            y = fc(y)
            if i < last:
                y = F.relu(y if self.hidden_norm is None else self.hidden_norm[i](y))
        return y if self.norm is None else self.norm(y)

    def forward(self, x: Tensor) -> Tensor:
        if self.pool == "global":
            return self.from_pooled(x.mean(dim=(2, 3)))
        height = x.shape[2]
        return self.from_pooled(F.avg_pool2d(x, height, stride=height).flatten(1))


class SpatialBranch(nn.Module):
    """Ms, Eq. 4: 1x1 to C / r, dilated 3x3s, 1x1 to 1, batch norm. To logits [N, 1, H, W].

    Keys: ``reduce``, ``dilated.{i}``, ``project``, ``hidden_norm.{i}`` (0 follows ``reduce``, with
    `norm_hidden` and without `bare_reduction`; i + 1 follows ``dilated.{i}``, with `norm_dilated`;
    an ``nn.Identity`` holds the place of one that there is not), ``norm`` (with `norm_final`).
    """

    bare_reduction = False
    shrinkage = 0

    def __init__(self, config: BAMConfig, **factory: Any) -> None:
        super().__init__()
        hidden, d = config.hidden, config.dilation
        if config.bare_reduction:
            self.bare_reduction = True
        if config.shrinkage:
            self.shrinkage = config.shrinkage
        self.reduce = nn.Conv2d(config.channels, hidden, 1, **factory)
        self.dilated = nn.ModuleList(
            nn.Conv2d(hidden, hidden, 3, padding=config.padding, dilation=d, **factory)
            for _ in range(config.num_dilated)
        )
        self.project = nn.Conv2d(hidden, 1, 1, **factory)
        normed = [config.norm_hidden and not config.bare_reduction]
        normed += [config.norm_dilated] * config.num_dilated
        self.hidden_norm = (
            nn.ModuleList(nn.BatchNorm2d(hidden, **factory) if n else nn.Identity() for n in normed)
            if any(normed)
            else None
        )
        self.norm = nn.BatchNorm2d(1, **factory) if config.norm_final else None

    def from_reduced(self, reduced: Tensor) -> Tensor:
        """The branch behind the reduction: [N, C // r, H, W] to logits [N, 1, H, W]."""
        y = reduced if self.hidden_norm is None else self.hidden_norm[0](reduced)
        if not self.bare_reduction:
            y = F.relu(y)
        for i, conv in enumerate(self.dilated):
            y = conv(y)
            y = F.relu(y if self.hidden_norm is None else self.hidden_norm[i + 1](y))
        y = self.project(y)
        if self.norm is not None:
            y = self.norm(y)
        if self.shrinkage:
            return y.expand(-1, -1, reduced.shape[2], reduced.shape[3])
        return y

    def forward(self, x: Tensor) -> Tensor:
        return self.from_reduced(self.reduce(x))


class BAM(nn.Module):
    """The Bottleneck Attention Module, F' = F + F * sigmoid(Mc(F) + Ms(F)).

    An option left at None is the preset's; with the default preset ``paper`` these are
    dilation=4, num_dilated=2, combine="sum", mlp_layers=1, norm_hidden=False, norm_final=True.

    Args:
        channels: C of the input [N, C, H, W].
        reduction: r; the branches are C // r wide inside (Sec. 5.1: 16).
        dilation: of the 3x3 convolutions (Sec. 5.1: 4).
        num_dilated: the number of 3x3 convolutions (Eq. 4: 2).
        combine: "sum", "product", "max" or "sigmoid_sum" (Table 1b).
        channel: whether there is a channel branch.
        spatial: whether there is a spatial branch.
        residual: whether the identity is added (Eq. 1).
        preset: "paper" (Eq. 1-4), "official" (the authors' released code), "pytorchcv",
            "fightingcv" or "changzy00"; `bam_kernels.config.PRESETS` has what each differs in.
        mlp_layers: hidden layers of the channel MLP (Eq. 3: 1).
        norm_hidden: batch norm after every hidden layer of both branches.
        norm_final: batch norm at both branches' ends (Eq. 3, 4).
        norm_dilated: batch norm after every 3x3 convolution; as `norm_hidden` unless given.
        bare_reduction: neither norm nor ReLU after the spatial branch's first 1x1 convolution.
        padding: of the 3x3 convolutions: `dilation` unless given, and at most that. With less, one
            input size is left, of which one spatial logit stands for every pixel.
        pool: "global", over all of H x W, or "square", the authors' window of H x H; that takes
            H <= W < 2 H, leaves out the columns from H on, and runs as plain PyTorch.
        device: where the parameters are made.
        dtype: of the parameters.

    Shapes: [N, C, H, W] to [N, C, H, W], in the input's dtype and memory format.

    Raises:
        ValueError: C < reduction, an unknown preset or combine mode, no branch left.
        TypeError: an option of the wrong type.
    """

    observer: Observer | None = None  # set on an instance by whoever wants to see its logits
    check_square = False  # whether H != W is to be warned of: the authors' pooling differs there

    def __init__(
        self,
        channels: int,
        reduction: int = 16,
        *,
        dilation: int | None = None,
        num_dilated: int | None = None,
        combine: str | None = None,
        channel: bool = True,
        spatial: bool = True,
        residual: bool = True,
        preset: str = "paper",
        mlp_layers: int | None = None,
        norm_hidden: bool | None = None,
        norm_final: bool | None = None,
        norm_dilated: bool | None = None,
        bare_reduction: bool | None = None,
        padding: int | None = None,
        pool: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config = resolve(
            channels,
            reduction,
            preset,
            dilation=dilation,
            num_dilated=num_dilated,
            combine=combine,
            channel=channel,
            spatial=spatial,
            residual=residual,
            mlp_layers=mlp_layers,
            norm_hidden=norm_hidden,
            norm_final=norm_final,
            norm_dilated=norm_dilated,
            bare_reduction=bare_reduction,
            padding=padding,
            pool=pool,
        )
        if preset == "official" and pool is None:
            self.check_square = True
        factory = {"device": device, "dtype": dtype}
        self.channel = ChannelBranch(config, **factory) if config.channel else None
        self.spatial = SpatialBranch(config, **factory) if config.spatial else None

    def forward(self, x: Tensor) -> Tensor:
        c = None if self.channel is None else self.channel(x)
        s = None if self.spatial is None else self.spatial(x)
        if self.observer is not None:
            self.observer(c, s)
        return gate(x, c, s, self.config.combine, self.config.residual)

    def extra_repr(self) -> str:
        c = self.config
        text = f"{c.channels}, reduction={c.reduction}, combine={c.combine!r}"
        return text if c.residual else f"{text}, residual=False"


class SqueezeExcite(nn.Module):
    """Squeeze-and-Excitation (Hu et al., 2018), Table 10's peer of BAM: x * sigmoid(MLP(pool)).

    Args:
        channels: C of the input [N, C, H, W].
        reduction: r; the MLP's hidden width is C // r.
        device: where the parameters are made.
        dtype: of the parameters.

    Raises:
        ValueError: C < reduction.
    """

    observer: Observer | None = None

    def __init__(
        self,
        channels: int,
        reduction: int = 16,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = BAMConfig(
            channels, reduction, spatial=False, residual=False, norm_final=False
        )
        self.channel = ChannelBranch(self.config, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        c = self.channel(x)
        if self.observer is not None:
            self.observer(c, None)
        return gate(x, c, None, residual=False)

    def extra_repr(self) -> str:
        return f"{self.config.channels}, reduction={self.config.reduction}"
