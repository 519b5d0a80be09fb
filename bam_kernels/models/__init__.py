"""The paper's networks, by name, with and without attention.

from bam_kernels import models
network = models.create("cifar_resnet50", attention="bam", dilation=4)
"""

from bam_kernels.models.attention import ATTENTION
from bam_kernels.models.description import Description
from bam_kernels.models.registry import create, get, names

__all__ = ["ATTENTION", "Description", "create", "get", "names"]
