"""A BAM that begins as the identity, nearly: for networks that are trained already.

F' = F + F * M, and M is a sigmoid: never 0, and about 0.5 in a fresh module, so that each one
inserted scales its features by about 1.5. What can be chosen is how small M begins. The last layer
of each branch is made a constant (a weight of 0, which has the right gradient from the first step,
and everything before it from the second), and the constants make M sigmoid(-`START_LOGIT`).

The trade: the features jump by M, and the gradients that reach a branch have the factor M * (1 - M)
of the sigmoid, 0.25 in a fresh module. They shrink together: at a logit of -20 float32 features
stay equal bit for bit, and nothing trains; at -5 the outputs of a small residual network jumped by
a hundredth, and its maps came to vary under AdamW where the BAMs had 40 times the learning rate of
the rest, hardly where they had 4 times.

The larger of two constants would leave the other branch without a gradient for good: with
combine="max" the last layers keep a tenth of their weights, and M is nearly constant.

No such trade has F * M with M = sigmoid(c) + sigmoid(s), which is 1 where both logits are 0.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from bam_kernels import reference
from bam_kernels.config import BAMConfig

START_LOGIT = 5.0
"""M begins at sigmoid(-5) = 0.0067, and the branches' gradients at a fortieth of a fresh BAM's."""

_KEPT_FOR_MAX = 0.1  # enough for each branch to be the larger one somewhere


def start_as_identity(module: nn.Module) -> None:
    """Set the last layer of each branch so that `module` begins as F' = (1 + M) F, M = 0.0067.

    Without the identity in it (residual=False, SqueezeExcite) it begins as F' = M F, M = 0.9933,
    and with combine="sigmoid_sum" as F' = F exactly.
    With combine="max" M is within some percent of that where the norms' statistics fit.

    Raises:
        TypeError: `module` is no BAM or SqueezeExcite.
        ValueError: a branch's last layer has no weight or no bias. Nothing is changed.
    """
    if not isinstance(module, reference.BAM | reference.SqueezeExcite):
        raise TypeError(
            "identity_start: expected a BAM or SqueezeExcite of bam_kernels, "
            f"got {type(module).__name__}"
        )
    layers = {}
    channel, spatial = module.channel, getattr(module, "spatial", None)
    if channel is not None:
        layers["channel"] = channel.fc[-1] if channel.norm is None else channel.norm
    if spatial is not None:
        layers["spatial"] = spatial.project if spatial.norm is None else spatial.norm
    for branch, layer in layers.items():
        if layer.weight is None or layer.bias is None:
            raise ValueError(
                f"identity_start: expected a weight and a bias in the {branch} branch's last "
                f"layer, got {layer}"
            )
    both = len(layers) == 2
    logits = _logits(module.config, both)
    kept = _KEPT_FOR_MAX if both and module.config.combine == "max" else 0.0
    with torch.no_grad():
        for branch, layer in layers.items():
            layer.weight.mul_(kept)
            layer.bias.fill_(logits[branch])


def _logits(config: BAMConfig, both: bool) -> dict[str, float]:
    """The constants of the branches."""
    end = -START_LOGIT if config.residual else START_LOGIT
    if not both or config.combine == "max":
        return {"channel": end, "spatial": end}
    if config.combine == "product":
        root = math.sqrt(START_LOGIT)
        return {"channel": root, "spatial": math.copysign(root, end)}
    if config.combine == "sigmoid_sum":
        # Half of M from each; without the identity M is 1 as it stands, at the sigmoids' middle.
        end = -math.log(2 * math.exp(START_LOGIT) + 1) if config.residual else 0.0
        return {"channel": end, "spatial": end}
    return {"channel": end / 2, "spatial": end / 2}
