"""Backends: each offers the same raw functions on tensors, without autograd and without checks."""

import torch

ABSENT = torch.empty(0)
"""Stands for None where a raw C++ operator takes a tensor; made before any fake mode may be on."""
