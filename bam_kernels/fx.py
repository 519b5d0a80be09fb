"""torch.fx: a module of ours is a leaf of every symbolic trace, and so goes on running fused."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.fx import Proxy, Tracer

from bam_kernels.fusable import has_hooks


def leaf(module: nn.Module, x: Proxy, plain: Callable[[Proxy], Proxy]) -> Proxy:
    """What `module` returns for a proxy: the call of the module itself, as of one of torch's own.

    Every tracer is served, torchvision's and timm's too, without telling it of our classes. Where
    the module cannot be a leaf, `plain` is traced through: at the root of a trace, which would call
    itself; with hooks, which are being called and would be called again; and without a tracer that
    knows the module's name.
    """
    tracer = x.tracer
    if not isinstance(tracer, Tracer) or tracer.root is module or has_hooks(module):
        return plain(x)
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (x,), {})
