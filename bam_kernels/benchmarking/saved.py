"""What a forward keeps for its backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def saved_bytes(forward: Callable[[Tensor], Tensor], x: Tensor, module: nn.Module) -> int:
    """Bytes of storage that autograd saves in one forward, beyond x and the parameters.

    Args:
        forward: the module, or what stands for it (compiled, say).
        x: its input, requiring a gradient.
        module: whose parameters do not count: they exist anyway.
    """
    known = {p.untyped_storage().data_ptr() for p in module.parameters()}
    known.add(x.untyped_storage().data_ptr())
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward(x)
    return sum(kept.values())
