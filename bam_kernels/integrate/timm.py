"""timm: BAM as the attention layer of its networks, and as a leaf of its feature extraction.

    from bam_kernels.integrate.timm import attn_layer
    timm.create_model("resnet50", block_args={"attn_layer": attn_layer(reduction=8)})

puts a BAM where timm's SE would be: at the end of each block's branch, in front of the addition of
the shortcut. The paper's BAM-C stands behind that: ``insert_bam(model, at="blocks")``.

timm looks attention layers up in a chain of comparisons, to which no name can be added: pass the
class or `attn_layer`'s result, and not a string.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bam_kernels import modules, reference
from bam_kernels.integrate.by_name import package


def attn_layer(
    module: Callable[..., nn.Module] = modules.BAM, **options: Any
) -> Callable[..., nn.Module]:
    """What timm takes as `attn_layer=`: makes ``module(channels, **options)``.

    `BAM` itself does for networks that pass channels, device and dtype alone (the ResNets). Others
    pass on their activation and norm layer, which a BAM has no use for: its layers are the paper's.
    A `rd_ratio` of the network sets the reduction, 1 / rd_ratio, unless `options` has one.

    Raises:
        TypeError: an option that `module` does not take.
    """
    try:
        inspect.signature(module).bind(1, **options)
    except TypeError as error:
        raise TypeError(f"attn_layer: {module} does not take these options: {error}") from error

    def make(
        channels: int,
        *,
        rd_ratio: float | None = None,
        act_layer: Any = None,
        norm_layer: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> nn.Module:
        given = {"reduction": round(1 / rd_ratio)} if rd_ratio else {}
        return module(channels, **{**given, **options}, device=device, dtype=dtype)

    return make


def register() -> None:
    """Tell timm's tracer that our modules are leaves, those of `bam_kernels.reference` as well.

    `bam_kernels.BAM` is one without it; not so where it has hooks, or is looked up in timm's list.

    Raises:
        ImportError: timm is not there.
    """
    layers = package("timm.layers", "bam_kernels.integrate.timm.register")
    for module in (
        modules.BAM,
        modules.SqueezeExcite,
        reference.BAM,
        reference.SqueezeExcite,
    ):
        layers.register_notrace_module(module)
