"""What a BAM can be: every option in one frozen record, and the presets that name sets of them."""

from __future__ import annotations

import dataclasses
from typing import Any

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

    def __post_init__(self) -> None:
        for name, least in _INTEGERS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: expected an int, got {type(value).__name__} {value!r}")
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        for name in ("channel", "spatial", "residual", "norm_hidden", "norm_final"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise TypeError(f"{name}: expected a bool, got {type(value).__name__} {value!r}")
        check_combine(self.combine)
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


_INTEGERS = {
    "channels": 1,
    "reduction": 1,
    "dilation": 1,
    "num_dilated": 0,
    "mlp_layers": 0,
}

PRESETS: dict[str, dict[str, Any]] = {
    # Eq. 1-4 as printed: a batch norm at each branch's end, the logits summed.
    "paper": {},
    # The authors' released code (Jongchan/attention-module, MODELS/bam.py): batch norm after
    # every hidden layer and none at the end, the logits multiplied.
    "official": {"combine": "product", "norm_hidden": True, "norm_final": False},
}


def check_combine(combine: str) -> None:
    """Raise ValueError unless `combine` is one of `COMBINE_MODES`."""
    if combine not in COMBINE_MODES:
        raise ValueError(f"combine: expected one of {', '.join(COMBINE_MODES)}, got {combine!r}")


def resolve(channels: int, reduction: int = 16, preset: str = "paper", **options: Any) -> BAMConfig:
    """The config of a preset with some options set by hand; an option of None leaves the preset's.

    Raises:
        ValueError: unknown preset or combine mode, a size out of range, no branch left.
        TypeError: an option of the wrong type, or one that does not exist.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
    given = {name: value for name, value in options.items() if value is not None}
    return BAMConfig(channels, reduction, **{**PRESETS[preset], **given})
