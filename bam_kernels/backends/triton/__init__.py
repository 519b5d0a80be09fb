"""The Triton backend: one kernel and its launcher a file. Importing it imports Triton."""

from bam_kernels import env

INTERPRETED = env.triton_interpret()
"""Whether these kernels were loaded for Triton's interpreter (CPU tensors) or for a device."""

from bam_kernels.backends.triton.channel_mlp import channel_mlp_forward  # noqa: E402
from bam_kernels.backends.triton.gate import gate_backward_reduce, gate_forward  # noqa: E402
from bam_kernels.backends.triton.input_gradient import input_gradient  # noqa: E402
from bam_kernels.backends.triton.pool_reduce import pool_reduce_forward  # noqa: E402

__all__ = [
    "INTERPRETED",
    "channel_mlp_forward",
    "gate_backward_reduce",
    "gate_forward",
    "input_gradient",
    "pool_reduce_forward",
]
