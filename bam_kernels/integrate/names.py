"""Which layers of a model a list of names and globs stands for."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Sequence

from torch import nn

from bam_kernels import reference


def match(model: nn.Module, after: Sequence[str], argument: str = "after") -> dict[str, nn.Module]:
    """The layers that `after` names, each once, in its order; errors call it `argument`."""
    if isinstance(after, str) or not isinstance(after, Iterable):
        hint = f"; write {argument}=[{after!r}]" if isinstance(after, str) else ""
        raise TypeError(f"{argument}: expected a list of names, got {type(after).__name__}{hint}")
    patterns = list(after)
    if not patterns:
        raise ValueError(f"{argument}: expected at least one name, got an empty list")
    # A layer that is used in two places has two names; both are good.
    modules = dict(model.named_modules(remove_duplicate=False))
    del modules[""]
    open_to_globs = _outside_attention(modules)
    targets: dict[str, nn.Module] = {}
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument}: expected names (str), got {type(pattern).__name__}")
        found = [pattern] if pattern in modules else fnmatch.filter(open_to_globs, pattern)
        if not found:
            close = difflib.get_close_matches(pattern, modules, n=3)
            hint = f"; did you mean {', '.join(map(repr, close))}?" if close else ""
            raise ValueError(
                f"{argument}: {pattern!r} matches no layer of {type(model).__name__}{hint}"
            )
        for name in found:
            if not any(modules[name] is target for target in targets.values()):
                targets[name] = modules[name]
    return targets


def _outside_attention(modules: dict[str, nn.Module]) -> list[str]:
    """The names that are neither an attention module nor inside of one."""
    attention = tuple(
        name
        for name, module in modules.items()
        if isinstance(module, reference.BAM | reference.SqueezeExcite)
    )
    inside = tuple(f"{name}." for name in attention)
    return [name for name in modules if name not in attention and not name.startswith(inside)]
