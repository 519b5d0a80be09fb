"""What a network of the paper is, as data: how it is built, on what it runs, where its BAMs go."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

Places = tuple[Mapping[str, Any], ...]
"""What `bam_kernels.insert_bam` is called with, ``at`` or ``after``, a call an entry."""

BOTTLENECKS: Places = ({"at": "bottlenecks"},)
"""The end of each stage, right before the next one's downsampling (Sec. 3, Fig. 1)."""

BLOCKS: Places = ({"after": ["*.refine"]},)
"""Inside of every block (Table 2, BAM-C): what its convolutions put out, before the shortcut joins.

There SENet has its module (Hu et al., 2018, Fig. 3). Behind the addition, where
``insert_bam(at="blocks")`` has it, the shortcut's values would be scaled once more by each block:
by 1.5 in a fresh BAM, 0.5 in a fresh SqueezeExcite. CIFAR's ResNet-101 + BAM-C then begins with
values of 5e5, which fp16 has not, and + SE with a stem's gradient 500 times the plain network's.
"""


@dataclasses.dataclass(frozen=True)
class Description:
    """A network of the paper.

    Attributes:
        name: as `bam_kernels.models.create` takes it.
        title: as the paper's tables name its row.
        dataset: what the paper trains it on: "cifar100", "imagenet", "coco", "voc2007", "ade20k".
        input_size: (H, W) in pixels, of the images that it is trained on and counted with.
        num_classes: of its last layer there; None for a network that puts out an image.
        build: ``build(num_classes, in_channels)``, the network without attention.
        block: ``block(channels)``, Table 1c's extra block of the network's own kind, from and to so
            many channels; None where the paper has none.
        bottlenecks: where "bam", and Table 1c's block, goes.
        blocks: where "bam-c" and "se" go; None where the paper has no such network.
        encoder: the submodule in which the places are sought; "" is the whole network.
        requires: packages beside torch that it is built with.
    """

    name: str
    title: str
    dataset: str
    input_size: tuple[int, int]
    num_classes: int | None
    build: Callable[[int | None, int], nn.Module] = dataclasses.field(repr=False)
    block: Callable[[int], nn.Module] | None = dataclasses.field(default=None, repr=False)
    bottlenecks: Places = BOTTLENECKS
    blocks: Places | None = BLOCKS
    encoder: str = ""
    requires: tuple[str, ...] = ()
