"""Stateless layers for Hugging Face `kernels`, whose forward takes over that of a plain BAM.

Each finds everything in the module that it is put into, which has the parts and the config of the
class of the same name in `bam_kernels.reference`. `kernels` allows a layer no other members.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.fx import Proxy

from bam_kernels import functional, reference


class BAM(nn.Module):
    """Takes over a `bam_kernels.reference.BAM`. Shapes: [N, C, H, W] to [N, C, H, W]."""

    can_torch_compile = True
    has_backward = True

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return reference.BAM.forward(self, x)
        return functional.bam(
            x,
            self.channel,
            self.spatial,
            combine=self.config.combine,
            residual=self.config.residual,
            observer=self.observer,
        )


class SqueezeExcite(nn.Module):
    """Takes over a `bam_kernels.reference.SqueezeExcite`. [N, C, H, W] to [N, C, H, W]."""

    can_torch_compile = True
    has_backward = True

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return reference.SqueezeExcite.forward(self, x)
        return functional.bam(x, self.channel, None, residual=False, observer=self.observer)
