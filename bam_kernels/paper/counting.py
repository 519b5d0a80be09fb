"""Parameters, and multiply-accumulates as the paper counts them."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bam_kernels import modules, reference


@dataclasses.dataclass(frozen=True)
class Count:
    """Of a network: its parameters, and the multiply-accumulates of one forward."""

    parameters: int
    macs: int


def parameters(model: nn.Module) -> int:
    """How many numbers a model learns; shared ones count once, running statistics do not."""
    return sum(p.numel() for p in model.parameters())


def count(model: nn.Module, shape: Sequence[int]) -> Count:
    """Count a model on one input, in eval mode; nothing is computed and the model stays as it is.

    What counts are the multiply-accumulates of convolutions and matrix products, not doubled: the
    paper's GFLOPs. Norms, poolings and elementwise work count nothing.

    Args:
        model: takes one tensor; BAMs and SqueezeExcites in it count as their plain peers do.
        shape: of the input, [N, C, H, W]; the count is that of the whole batch.

    Raises:
        TypeError: `model` is no nn.Module.
        ValueError: the model cannot run on an input of that shape.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    twin = copy.deepcopy(model).to("meta").eval()
    dtype = next((p.dtype for p in twin.parameters() if p.is_floating_point()), None)
    x = torch.empty(tuple(shape), device="meta", dtype=dtype)
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), _plain(twin), counter:
            twin(x)
    except Exception as error:  # the model's own code: it may raise anything
        raise ValueError(
            f"shape: a run on {list(shape)} failed: {type(error).__name__}: {error}"
        ) from error
    return Count(parameters(model), counter.get_total_flops() // 2)


@contextlib.contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    """The forward of the reference in fused modules: their operators are closed to the counter."""
    peers = {modules.BAM: reference.BAM, modules.SqueezeExcite: reference.SqueezeExcite}
    with contextlib.ExitStack() as stack:
        for part in model.modules():
            if type(part) in peers:
                part.forward = peers[type(part)].forward.__get__(part)
                stack.callback(part.__dict__.pop, "forward")
        yield
