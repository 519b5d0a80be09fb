"""What a BAM can be: every option in one frozen record, and the presets that name sets of them."""

from __future__ import annotations

import dataclasses
from typing import Any

POOL_MODES = ("global", "square")
"""What the channel branch pools over: ``global`` all of H x W (Eq. 3); ``square`` what the authors'
code does, ``avg_pool2d`` with a window and a stride of H, which for H < W < 2 H leaves out the
columns from H on, and for every other H != W raises an error."""

COMBINE_MODES = ("sum", "product", "max", "sigmoid_sum")
"""How the two branches' logits c and s become the map M (paper, Table 1b):
``sum`` sigmoid(c + s), ``product`` sigmoid(c * s), ``max`` sigmoid(max(c, s)),
``sigmoid_sum`` sigmoid(c) + sigmoid(s)."""


@dataclasses.dataclass(frozen=True)
class BAMConfig:
    """Every option of a BAM, resolved.

    Attributes:
        channels: C, the channels of the feature map F [N, C, H, W].
        reduction: r; both branches are ``C // r`` wide inside.
        dilation: of the 3x3 convolutions; their padding is the same, so H and W stay.
        num_dilated: how many 3x3 dilated convolutions stand in the spatial branch.
        mlp_layers: how many hidden layers the channel branch's MLP has.
        combine: one of `COMBINE_MODES`.
        channel: whether the channel branch exists.
        spatial: whether the spatial branch exists.
        residual: whether the identity is added (Eq. 1), F + F * M, or not, F * M (Table 1b).
        norm_hidden: a batch norm after every hidden layer of both branches.
        norm_final: a batch norm at the end of both branches (Eq. 3 and 4).
        norm_dilated: a batch norm after every 3x3 convolution; None is as `norm_hidden`.
        bare_reduction: neither norm nor ReLU follows the spatial branch's first 1x1 convolution.
        padding: of the 3x3 convolutions; None is `dilation`. Less makes the map smaller, by
            ``shrinkage`` in all: of an input of ``shrinkage + 1`` squared one number is left, which
            stands for every pixel. Inputs of other sizes are refused.
        pool: one of `POOL_MODES`.
    """

    channels: int
    reduction: int = 16
    dilation: int = 4
    num_dilated: int = 2
    mlp_layers: int = 1
    combine: str = "sum"
    channel: bool = True
    spatial: bool = True
    residual: bool = True
    norm_hidden: bool = False
    norm_final: bool = True
    norm_dilated: bool | None = None
    bare_reduction: bool = False
    padding: int | None = None
    pool: str = "global"

    def __post_init__(self) -> None:
        if self.norm_dilated is None:
            object.__setattr__(self, "norm_dilated", self.norm_hidden)
        if self.padding is None:
            object.__setattr__(self, "padding", self.dilation)
        for name, least in _INTEGERS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: expected an int, got {type(value).__name__} {value!r}")
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        for name in _FLAGS:
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise TypeError(f"{name}: expected a bool, got {type(value).__name__} {value!r}")
        check_combine(self.combine)
        if self.pool not in POOL_MODES:
            raise ValueError(f"pool: expected one of {', '.join(POOL_MODES)}, got {self.pool!r}")
        if self.padding > self.dilation:
            raise ValueError(
                f"padding: expected at most dilation={self.dilation}, which keeps the map's size, "
                f"got {self.padding}"
            )
        if not (self.channel or self.spatial):
            raise ValueError("channel, spatial: expected at least one branch, got both False")
        if self.channels < self.reduction:
            raise ValueError(
                f"channels: expected at least reduction={self.reduction} so that the hidden width "
                f"channels // reduction is 1 or more, got {self.channels}"
            )

    @property
    def hidden(self) -> int:
        """The hidden width of both branches, floor(C / r)."""
        return self.channels // self.reduction

    @property
    def shrinkage(self) -> int:
        """By how much the 3x3 convolutions make the map smaller, in H and in W."""
        return 2 * self.num_dilated * (self.dilation - self.padding)


_FLAGS = (
    "channel",
    "spatial",
    "residual",
    "norm_hidden",
    "norm_final",
    "norm_dilated",
    "bare_reduction",
)

_INTEGERS = {
    "channels": 1,
    "reduction": 1,
    "dilation": 1,
    "num_dilated": 0,
    "mlp_layers": 0,
    "padding": 0,
}

_MULTIPLIED = {"combine": "product", "norm_hidden": True, "norm_final": False}

PRESETS: dict[str, dict[str, Any]] = {
    # Eq. 1-4 as printed: a batch norm at each branch's end, the logits summed.
    "paper": {},
    # The authors' released code (Jongchan/attention-module, MODELS/bam.py): batch norm after
    # every hidden layer and none at the end, the logits multiplied. Its pooling is pool="square";
    # "global" is the same where H = W.
    "official": _MULTIPLIED,
    # pytorchcv's BamBlock: the authors' layers, with a pooling over all of H x W.
    "pytorchcv": _MULTIPLIED,
    # fightingcv-attention's BAMBlock: batch norm after every hidden layer and none at the end; an
    # MLP of three hidden layers, three 3x3 convolutions of dilation 2. Those are padded by 1 there,
    # so that its default takes inputs of 7x7 alone, of which one spatial logit is left: padding=1
    # does the same. The preset pads by 2, takes every size, and differs at 7x7.
    "fightingcv": {
        "norm_hidden": True,
        "norm_final": False,
        "mlp_layers": 3,
        "num_dilated": 3,
        "dilation": 2,
    },
    # changzy00/pytorch-attention: the paper's norms at the ends, and one after each 3x3 convolution
    # besides; the MLP has none inside, and nothing follows the reduction.
    "changzy00": {"norm_dilated": True, "bare_reduction": True},
}


def check_combine(combine: str) -> None:
    """Raise ValueError unless `combine` is one of `COMBINE_MODES`."""
    if combine not in COMBINE_MODES:
        raise ValueError(f"combine: expected one of {', '.join(COMBINE_MODES)}, got {combine!r}")


def resolve(channels: int, reduction: int = 16, preset: str = "paper", **options: Any) -> BAMConfig:
    """The config of a preset with some options set by hand; an option of None leaves the preset's.

    Raises:
        ValueError: unknown preset, combine mode or pooling, a size out of range, no branch left.
        TypeError: an option of the wrong type, or one that does not exist.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
    given = {name: value for name, value in options.items() if value is not None}
    return BAMConfig(channels, reduction, **{**PRESETS[preset], **given})
