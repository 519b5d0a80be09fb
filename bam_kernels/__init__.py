"""Fused kernels for the Bottleneck Attention Module (BAM): a drop-in replacement for PyTorch.

    from bam_kernels import BAM
    refine = BAM(256)          # F' = F + F * sigmoid(Mc(F) + Ms(F)), [N, 256, H, W]

Importing this package needs torch alone: no Triton, no compiler, no GPU.
"""

from bam_kernels import functional, reference
from bam_kernels._version import __version__
from bam_kernels.analysis import attention_maps
from bam_kernels.config import BAMConfig
from bam_kernels.dispatch import BackendUnavailableError, use_backend
from bam_kernels.explain import Explanation, explain
from bam_kernels.integrate import convert_state_dict, insert_bam, replace_bam, strip
from bam_kernels.modules import BAM, SqueezeExcite

__all__ = [
    "BAM",
    "BAMConfig",
    "BackendUnavailableError",
    "Explanation",
    "SqueezeExcite",
    "__version__",
    "attention_maps",
    "convert_state_dict",
    "explain",
    "functional",
    "insert_bam",
    "reference",
    "replace_bam",
    "strip",
    "use_backend",
]
