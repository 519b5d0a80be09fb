"""mmengine and the libraries on it: BAM by name in a config.

    custom_imports = dict(imports=["bam_kernels.integrate.mmengine"])
    plugins = [dict(cfg=dict(type="BAM", reduction=16), stages=(True, True, True, False),
                    position="after_conv3")]

Importing this module registers "BAM" and "BAMSqueezeExcite" in ``mmengine.registry.MODELS``, the
root that the registries of mmdet, mmseg and mmpretrain fall back to. Both are built as plugins are,
with ``in_channels=``; the layer's name in the block is "bam" or "se", with the config's postfix.

The tests run on mmengine where it is installed, else on a double of its documented protocol.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from bam_kernels.integrate.by_name import check_name, constructor, package
from bam_kernels.modules import BAM, SqueezeExcite


def register(
    name: str = "BAM",
    module: Callable[..., nn.Module] = BAM,
    *,
    abbreviation: str = "bam",
    **options: Any,
) -> None:
    """Register `name` in MODELS: ``module(in_channels, **options)``, and the config's own options.

    Args:
        name: the config's `type`.
        module: what is made.
        abbreviation: what a plugin is called in its block.
        **options: those that a config need not repeat.

    Raises:
        ImportError: mmengine is not there.
        TypeError, ValueError: `name` is no identifier, or is registered as something else.
    """
    registry = package("mmengine.registry", "bam_kernels.integrate.mmengine").MODELS
    check_name(name, registry.module_dict.get(name))

    def make(in_channels: int, **given: Any) -> nn.Module:
        return module(in_channels, **{**options, **given})

    made = constructor(name, make, _abbr_=abbreviation)
    registry.register_module(name=name, force=True, module=made)


register()
register("BAMSqueezeExcite", SqueezeExcite, abbreviation="se")
