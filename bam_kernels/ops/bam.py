"""A whole module in one operator: inference on the CPU, from known statistics."""

from __future__ import annotations

import torch

from bam_kernels import layout
from bam_kernels.ops.registry import backend_of, register

register(
    "bam(Tensor x, Tensor[] params, int[] options, float[] eps) -> Tensor",
    lambda x, *rest: backend_of(x).bam_forward(x, *rest),
    lambda x, *_: torch.empty_like(layout.walkable(x)),
)
