"""The Triton backend: one kernel and its launcher a file. Importing it imports Triton."""

from bam_kernels import env

INTERPRETED = env.triton_interpret()
"""Whether these kernels were loaded for Triton's interpreter (CPU tensors) or for a device."""

from bam_kernels.backends.triton.channel_mlp import channel_mlp_forward  # noqa: E402
from bam_kernels.backends.triton.channel_mlp_backward import channel_mlp_backward  # noqa: E402
from bam_kernels.backends.triton.gate import gate_backward_reduce, gate_forward  # noqa: E402
from bam_kernels.backends.triton.inference import bam_forward  # noqa: E402
from bam_kernels.backends.triton.input_gradient import input_gradient  # noqa: E402
from bam_kernels.backends.triton.pool_reduce import pool_reduce_forward  # noqa: E402
from bam_kernels.backends.triton.running_statistics import update_running  # noqa: E402
from bam_kernels.backends.triton.spatial_branch import spatial_branch_forward  # noqa: E402
from bam_kernels.backends.triton.spatial_branch_backward import (  # noqa: E402
    spatial_branch_backward,
)

__all__ = [
    "INTERPRETED",
    "bam_forward",
    "channel_mlp_backward",
    "channel_mlp_forward",
    "gate_backward_reduce",
    "gate_forward",
    "input_gradient",
    "pool_reduce_forward",
    "spatial_branch_backward",
    "spatial_branch_forward",
    "update_running",
]
