"""A BAM that begins as the identity, nearly: for networks that are trained already.

F' = F + F * M, and M is a sigmoid: never 0, and 0.5 in a fresh module on average, so that each one
inserted scales its features by about 1.5. What can be chosen is how small M begins. The last layer
of each branch is made a constant (a weight of 0, which sends the right gradient to itself and, from
the second step on, to everything before it), and the constants make M sigmoid(-`START_LOGIT`).

The trade: the jump of the features is M, and what reaches a branch in the backward is scaled by
M * (1 - M), which is 0.25 in a fresh module. A START_LOGIT of 20 gives float32 features that are
equal bit for bit, and gradients of 2e-9 that train nothing.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from bam_kernels import reference
from bam_kernels.config import BAMConfig

START_LOGIT = 6.0
"""M begins at sigmoid(-6) = 0.0025, the gradients of the branches at a hundredth of their size."""


def start_as_identity(module: nn.Module) -> None:
    """Set the last layer of each branch so that `module` begins as F' = (1 + M) F, M = 0.0025.

    Without the identity in it (residual=False, SqueezeExcite) it begins as F' = M F, M = 0.9975,
    and with combine="sigmoid_sum" as F' = F.

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
    logits = _logits(module.config, len(layers) == 2)
    with torch.no_grad():
        for branch, layer in layers.items():
            layer.weight.zero_()
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
