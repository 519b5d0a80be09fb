"""StairNet's top-down path (Woo et al., "StairNet: Top-Down Semantic Aggregation", WACV 2018)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from bam_kernels.models.layers import conv


class TopDown(nn.Module):
    """Each map gets the semantics of all coarser ones: maps of one width, sizes unchanged.

    A 3x3 convolution brings each map to `WIDTH` channels; from the coarsest on, what has been
    summed so far is enlarged to the next finer map and added, and a 3x3 convolution smooths it.
    Neither the BAM paper nor its Table 7 says how wide these are, or how large the kernels: the
    numbers here are ours, and so is the count of parameters.

    Args:
        widths: C of the maps that come in, from fine to coarse.
        separable: depthwise separable 3x3 convolutions, as a MobileNet has them.
    """

    WIDTH = 256

    def __init__(self, widths: Sequence[int], separable: bool = False) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(_layer(width, self.WIDTH, separable) for width in widths)
        self.smooth = nn.ModuleList(_layer(self.WIDTH, self.WIDTH, separable) for _ in widths[1:])

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        found = [layer(y) for layer, y in zip(self.lateral, maps, strict=True)]
        for i in reversed(range(len(found) - 1)):
            coarse = F.interpolate(found[i + 1], size=found[i].shape[2:], mode="nearest")
            found[i] = self.smooth[i](found[i] + coarse)
        return found


def _layer(c_in: int, c_out: int, separable: bool) -> nn.Sequential:
    if separable:
        convolutions = [conv(c_in, c_in, 3, groups=c_in), conv(c_in, c_out, 1)]
    else:
        convolutions = [conv(c_in, c_out, 3)]
    for each in convolutions:
        nn.init.xavier_uniform_(each.weight)
    return nn.Sequential(*convolutions, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))
