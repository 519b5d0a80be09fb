"""How an operator is registered: schema, devices, fake and autograd formula."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bam_kernels import dispatch
from bam_kernels.backends import reference

_DEVICES = ("CPU", "CUDA", "XPU")

library = torch.library.Library("bam_kernels", "DEF")


def backend_of(x: Tensor) -> ModuleType:
    """The module whose functions compute the operators for x."""
    return backend_module(dispatch.choose_backend(x))


def backend_module(backend: str) -> ModuleType:
    """The module of functions behind a name that `dispatch.choose_backend` gives."""
    if backend == "triton":
        from bam_kernels.backends import triton

        return triton
    if backend == "cpp":
        from bam_kernels.backends import cpp

        return cpp
    return reference


def register(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define an operator and what computes it, for tensors and for fakes."""
    name = schema[: schema.index("(")]
    # The launchers walk any layout: inductor need not copy x into the one that it was traced in.
    library.define(schema, tags=(torch.Tag.flexible_layout,))
    for device in _DEVICES:
        library.impl(name, run, device)
    torch.library.register_fake(f"bam_kernels::{name}", fake, lib=library)


def register_autograd(
    name: str, setup: Callable[..., None], backward: Callable[..., tuple[Tensor | None, ...]]
) -> None:
    """Give an operator its first derivative."""
    torch.library.register_autograd(
        f"bam_kernels::{name}", backward, setup_context=setup, lib=library
    )


def differentiable_backward(
    forward: Callable[..., Any],
    inputs: Sequence[Any],
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradient of a plain composition as a graph; `grads` belong to its outputs, in order."""
    with torch.enable_grad(), dispatch.no_autocast(inputs[0]):
        # Partial derivatives, by aliases: one input may depend on another (the logits on x), and
        # autograd.grad would follow that path as well.
        inputs = [t.view_as(t) if isinstance(t, Tensor) else t for t in inputs]
        outputs = forward(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [
            (out, grad)
            for out, grad in zip(outputs, grads, strict=False)
            if grad is not None and out.requires_grad
        ]
        wanted = [t for t, need in zip(inputs, needs, strict=False) if need]
        if not pairs or not wanted:
            return [None] * len(inputs)
        found = iter(
            torch.autograd.grad(
                [out for out, _ in pairs],
                wanted,
                [grad for _, grad in pairs],
                create_graph=True,
                allow_unused=True,
            )
        )
    result: list[Tensor | None] = [next(found) if need else None for need in needs]
    return result + [None] * (len(inputs) - len(result))
