"""ultralytics: BAM as a layer in a model's YAML.

    from bam_kernels.integrate.ultralytics import register
    register()

    backbone:
      - [-1, 1, Conv, [64, 3, 2]]
      - [-1, 1, BAM, [c2]]        # or [c2, 8] for another reduction
      - [2, 1, BAM, [ch, f]]      # behind a layer that is not the one before

ultralytics hands a layer that it does not know its arguments as they stand, and takes its output to
have the channels of its input. It reads an argument that is the name of one of its own variables as
that variable: ``c2`` is the output channels of the row above, scaled by the model's width; ``ch``
all rows' channels, and ``f`` the row's `from`. So nothing need be counted.

The tests run on ultralytics where it is installed, else on a double of its documented protocol.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from bam_kernels.integrate.by_name import check_name, constructor, package
from bam_kernels.modules import BAM

_TASKS = "ultralytics.nn.tasks"  # its parser looks layers up among this module's globals


def register(name: str = "BAM", module: Callable[..., nn.Module] = BAM, **options: Any) -> None:
    """Make `name` a layer for YAML files: ``module(channels, *arguments, **options)``.

    Checkpoints hold a `module` and load without this; to build from a YAML it is called first, in
    each process. Options that a YAML's arguments cannot tell make another name:
    ``register("OfficialBAM", preset="official")``. A name of ours is replaced.

    Raises:
        ImportError: ultralytics is not there.
        TypeError, ValueError: `name` is no identifier, or one of ultralytics' own.
    """
    tasks = package(_TASKS, "bam_kernels.integrate.ultralytics.register")
    check_name(name, vars(tasks).get(name))

    def make(channels: int | list[int], *arguments: Any) -> nn.Module:
        if isinstance(channels, list):
            channels, arguments = _channels(name, channels, arguments)
        elif isinstance(channels, bool) or not isinstance(channels, int):
            raise TypeError(
                f"{name}: expected arguments [c2] or [ch, f], or channels, got {channels!r}"
            )
        return module(channels, *arguments, **options)

    setattr(tasks, name, constructor(name, make))


def _channels(
    name: str, every: list[int], arguments: tuple[Any, ...]
) -> tuple[int, tuple[Any, ...]]:
    """The channels of [ch, f, ...], and the arguments behind them."""
    if not arguments or not isinstance(arguments[0], int):
        raise TypeError(f"{name}: expected arguments [ch, f] with one `from`, got {arguments!r}")
    return every[arguments[0]], arguments[1:]
