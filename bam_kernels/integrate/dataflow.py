"""What depends on what in a forward: every operator on the way from the input, and who called it.

Recorded on fake tensors, below the modules, so that it sees functional calls as well: a shortcut
that is added in a forward, or a pooling that is no module.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bam_kernels import reference
from bam_kernels.integrate import fake_run

Size = tuple[int, int]

_ATTENTION = (reference.BAM, reference.SqueezeExcite)


@dataclasses.dataclass(frozen=True)
class Value:
    """A tensor that depends on the input; values are numbered in the order of their making.

    Attributes:
        index: its number.
        shape: its shape.
        size: H and W of a map [N, C, H, W]; of another tensor, those of the map it comes from.
        sources: the values that it is made of.
        dominators: a bit for each value that lies on every way from the input to this one, which is
            among them.
        calls: the calls that were running when it was made, the outermost first.
        joins: "add" or "cat" where it joins maps of one size, else "".
        keeps: a convolution wider than 1x1 that is no downsampling.
        convolves: any convolution.
    """

    index: int
    shape: tuple[int, ...]
    size: Size
    sources: tuple[int, ...]
    dominators: int
    calls: tuple[Call, ...]
    joins: str
    keeps: bool
    convolves: bool

    @property
    def is_map(self) -> bool:
        """Whether it is [N, C, H, W] with more than one pixel."""
        return len(self.shape) == 4 and self.size[0] * self.size[1] > 1

    def dominates(self, other: Value) -> bool:
        """Whether every way from the input to `other` leads through this value."""
        return bool(other.dominators >> self.index & 1)


@dataclasses.dataclass(eq=False)
class Call:
    """One call of a module: the values that it took, what it returned, and which value that was.

    `name` is the module's first one in `named_modules`, "" for the model itself; `entering` is the
    first of its arguments; `output` is None where it returned anything but one tensor that depends
    on the input.
    """

    name: str
    module: nn.Module
    inputs: tuple[int, ...]
    parent: Call | None
    entering: Any = None
    result: Any = None
    output: int | None = None


@dataclasses.dataclass(frozen=True)
class Flow:
    """A forward: its values and its calls, both in the order of their beginning."""

    values: list[Value]
    calls: list[Call]


def record(model: nn.Module, like: fake_run.Example) -> Flow:
    """The flow of a forward of `model`, in eval mode and with nothing computed or changed.

    Whatever the forward raises comes through.
    """
    with fake_run.fake_twin(model, like) as (twin, x):
        recorder = _Recorder(x)
        for name, module in twin.named_modules():
            # The names are the model's: what the twin calls is found there by its name.
            original = model.get_submodule(name)

            def enter(_: nn.Module, args: Any, kwargs: Any, key=(name, original)) -> None:
                recorder.enter(*key, args, kwargs)

            module.register_forward_pre_hook(enter, with_kwargs=True)
            module.register_forward_hook(lambda _, args, output: recorder.leave(output))
        with recorder:
            twin(x)
    return recorder.flow


def shrinks(before: Size, after: Size) -> bool:
    """Whether a map was downsampled: by 2 or more both ways, and not to a single pixel."""
    halved = all(b <= (a + 1) // 2 < a for a, b in zip(before, after, strict=True))
    return halved and after != (1, 1)


class _Recorder(TorchDispatchMode):
    def __init__(self, x: Tensor) -> None:
        super().__init__()
        shape = tuple(x.shape)
        size = shape[2:] if len(shape) == 4 else (0, 0)
        first = Value(0, shape, size, (), 1, (), joins="", keeps=False, convolves=False)
        self.flow = Flow([first], [])
        self._index = {id(x): 0}
        self._alive: list[Tensor] = [x]  # an id stays a tensor's own while the tensor lives
        self._stack: list[Call] = []

    def enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        parent = self._stack[-1] if self._stack else None
        call = Call(name, module, self._indices((args, kwargs)), parent, *args[:1])
        self.flow.calls.append(call)
        self._stack.append(call)

    def leave(self, output: Any) -> None:
        call = self._stack.pop()
        call.result = output
        if isinstance(output, Tensor):
            call.output = self._index.get(id(output))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        sources = self._indices((args, kwargs))
        if sources:
            for tensor in tree_leaves(output):
                if isinstance(tensor, Tensor):
                    # An operator in place gives the same tensor anew: another value.
                    self._add(func, args, sources, tensor)
        return output

    def _indices(self, arguments: Any) -> tuple[int, ...]:
        """The values among arguments, each once."""
        found = (self._index.get(id(leaf)) for leaf in tree_leaves(arguments))
        return tuple(dict.fromkeys(index for index in found if index is not None))

    def _add(self, func: Any, args: Any, sources: tuple[int, ...], tensor: Tensor) -> None:
        values = [self.flow.values[source] for source in sources]
        index, shape = len(self.flow.values), tuple(tensor.shape)
        size = shape[2:] if len(shape) == 4 else _largest(value.size for value in values)
        dominators = values[0].dominators
        for value in values[1:]:
            dominators &= value.dominators
        convolves = func._schema.name == "aten::convolution"
        self.flow.values.append(
            Value(
                index=index,
                shape=shape,
                size=size,
                sources=sources,
                dominators=dominators | 1 << index,
                calls=tuple(self._stack),
                joins=self._joins(func, values, shape),
                keeps=convolves and _keeps(args, values[0].size, size),
                convolves=convolves,
            )
        )
        self._index[id(tensor)] = index
        self._alive.append(tensor)

    def _joins(self, func: Any, values: list[Value], shape: tuple[int, ...]) -> str:
        if len(values) < 2 or len(shape) != 4 or shape[2:] == (1, 1):
            return ""
        if any(value.shape[2:] != shape[2:] or len(value.shape) != 4 for value in values):
            return ""
        if any(isinstance(call.module, _ATTENTION) for call in self._stack):
            return ""  # an attention that is there already is no part of the network's own plan
        name = func._schema.name
        if name in ("aten::add", "aten::add_"):
            return "add" if all(value.shape == shape for value in values) else ""
        return "cat" if name == "aten::cat" else ""


def _keeps(args: Any, before: Size, after: Size) -> bool:
    kernel = args[1].shape[2:]
    return max(kernel, default=1) > 1 and not shrinks(before, after) and after != (1, 1)


def _largest(sizes: Iterable[Size]) -> Size:
    return max(sizes, key=lambda size: size[0] * size[1])
