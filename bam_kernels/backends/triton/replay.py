"""What a launcher decides, once for each kind of call: later calls allocate and launch, no more.

On a small map the Python of a launcher, and Triton's that binds and specialises sixty arguments,
take several times as long as the kernels. All that they decide follows from the arguments that are
no tensors, and of each tensor from its shape, strides, dtype, device and alignment. So the first
call of a kind is watched: which tensors it makes, which compiled kernels it launches, and what each
is handed: a number, or an address inside of an argument or of a tensor made before. A later call of
the same kind does just that with its own tensors. No address and no value is kept.

A call that does anything else to tensors (copies a strided weight, casts a parameter) is not kept,
and its kind runs its launcher every time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bam_kernels import env
from bam_kernels.backends.triton import configs
from bam_kernels.backends.triton.launch import conv_precision, device_guard, watch

_INTERPRETED = env.triton_interpret()  # Triton, too, asks once: when it is imported

_ALLOWED = env.replay() and torch.version.hip is None

_MOST = 2048
"""Kinds of calls kept for a launcher: beyond, all are forgotten and learnt anew."""

_F = TypeVar("_F", bound=Callable[..., Any])

_ALLOCATIONS = frozenset(
    getattr(getattr(torch.ops.aten, name), overload)
    for name, overload in (
        ("empty", "memory_format"),
        ("empty_like", "default"),
        ("empty_strided", "default"),
        ("new_empty", "default"),
        ("new_empty_strided", "default"),
    )
)


def applies(x: Tensor | None) -> bool:
    """Whether calls on x are kept: where Triton compiles for NVIDIA GPUs, but for
    ``BAM_KERNELS_REPLAY=0``.

    On others a kernel is specialised to more than is looked at here.
    """
    return _ALLOWED and x is not None and x.is_cuda


def replayed(launcher: _F) -> _F:
    """Keep what a launcher does, for each kind of call.

    The launcher takes tensors, None, plain values and lists of these; returns tensors that it made
    itself, or views of them, in a tuple or alone, or None; and launches by
    `bam_kernels.backends.triton.launch.launch`.
    """
    kept: dict[Any, _Replay | None] = {}

    @functools.wraps(launcher)
    def call(*args: Any, **kwargs: Any) -> Any:
        if watch.active is not None or not applies(_first(args)):
            return launcher(*args, **kwargs)
        inputs: list[Tensor] = []
        pointers: list[int] = []
        key: list[Any] = []
        _look(args, inputs, pointers, key)
        if kwargs:
            key += kwargs
            _look(kwargs.values(), inputs, pointers, key)
        kind = (*key, conv_precision(torch.float32), configs.overridden())
        found = kept.get(kind, _UNKNOWN)
        if found is _UNKNOWN:
            result, found = _watched(launcher, args, kwargs, inputs)
            if found is not _UNKNOWN:
                if len(kept) >= _MOST:
                    kept.clear()
                kept[kind] = found
            return result
        if found is None:
            return launcher(*args, **kwargs)
        return found(inputs, pointers)

    call.kept = kept
    return call


def _first(values: Iterable[Any]) -> Tensor | None:
    """The first tensor among the arguments: some launchers take None before it, some a list."""
    for value in values:
        if isinstance(value, Tensor):
            return value
        if isinstance(value, list | tuple):
            found = _first(value)
            if found is not None:
                return found
    return None


def _look(values: Iterable[Any], inputs: list[Tensor], pointers: list[int], key: list[Any]) -> None:
    """Collect the tensors among the arguments, their addresses, and what is decided by."""
    for value in values:
        if isinstance(value, Tensor):
            pointer = value.data_ptr()
            inputs.append(value)
            pointers.append(pointer)
            key += (
                value.shape, value.stride(), value.dtype, value.get_device(), pointer & 15,
            )  # fmt: skip
        elif isinstance(value, list | tuple):
            key.append(len(value))
            _look(value, inputs, pointers, key)
        else:
            key.append(value)


_UNKNOWN = object()


# --- the first call of a kind -----------------------------------------------------------------


class _UnlikeError(Exception):
    """The call did something that a replay would not do."""


@dataclasses.dataclass(slots=True, frozen=True)
class _View:
    """A tensor inside of another: the slot of the other, and bytes from its start."""

    slot: int
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class _Watch(TorchDispatchMode):
    """Sees the tensors that a launcher makes, by the mode, and its launches, by `launch`."""

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()
        self.known = list(inputs)  # all of them alive: no address is given out twice
        self.steps: list[Any] = []  # ("make", slot) or ("launch", runner, arguments)
        self.unlike = _overlapping(inputs)

    def __torch_dispatch__(
        self, op: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = op(*args, **(kwargs or {}))
        if op in _ALLOCATIONS and result.device == self.known[0].device:
            self.steps.append(("make", len(self.known)))
            self.known.append(result)
        elif not op.is_view:
            self.unlike = True
        return result

    def launched(self, runner: Callable[..., object], arguments: list[Any]) -> None:
        """A kernel was launched, with these values for all of its parameters."""
        self.steps.append(("launch", runner, arguments))

    def view(self, t: Tensor) -> _View:
        """Where among what is known t lies."""
        begin, size = t.data_ptr(), _extent(t)
        for slot, other in enumerate(self.known):
            offset = begin - other.data_ptr()
            if offset >= 0 and offset + size <= _extent(other) and other.numel():
                return _View(slot, offset, t.shape, t.stride(), t.dtype)
        raise _UnlikeError


def _extent(t: Tensor) -> int:
    """Bytes from a tensor's first element to behind its last."""
    if not t.numel():
        return 0
    last = sum((n - 1) * st for n, st in zip(t.shape, t.stride(), strict=True))
    return (last + 1) * t.itemsize


def _overlapping(tensors: list[Tensor]) -> bool:
    """Whether an address belongs to two of them: a later call's may be two."""
    spans = sorted((t.data_ptr(), t.data_ptr() + _extent(t)) for t in tensors if t.numel())
    return any(spans[i][1] > spans[i + 1][0] for i in range(len(spans) - 1))


def _watched(
    launcher: Callable[..., Any], args: Any, kwargs: Any, inputs: list[Tensor]
) -> tuple[Any, Any]:
    """The launcher's result, and its replay: None if it has none, _UNKNOWN if this call has none.

    Arguments that overlap are this call's matter, anything else the kind's.
    """
    seen = _Watch(inputs)
    if seen.unlike:
        return launcher(*args, **kwargs), _UNKNOWN
    watch.active = seen
    try:
        with seen:
            result = launcher(*args, **kwargs)
    finally:
        watch.active = None
    if seen.unlike:
        return result, None
    try:
        return result, _Replay.of(seen, len(inputs), result)
    except _UnlikeError:
        return result, None


# --- the later ones ---------------------------------------------------------------------------


@dataclasses.dataclass(slots=True)
class _Launch:
    """A kernel, and the tensors to make for it first.

    Args:
        made: (slot, shape, stride, dtype) of each.
        runner: launches the compiled kernel on its grid.
        arguments: in the kernel's order, None where a tensor goes.
        tensors: (position among the arguments, where it lies) of each.
        dead: slots of made tensors that nothing needs from here on.
    """

    made: list[tuple[int, torch.Size, tuple[int, ...], torch.dtype]]
    runner: Callable[..., object]
    arguments: list[Any]
    tensors: list[tuple[int, _View]]
    dead: list[int]


@dataclasses.dataclass(slots=True)
class _Replay:
    """Launches one after the other, on a call's own tensors; `result` is what the call returns."""

    launches: list[_Launch]
    slots: int
    result: Any

    @classmethod
    def of(cls, seen: _Watch, inputs: int, result: Any) -> _Replay:
        """From what was seen of a call with so many tensors among its arguments."""
        launches: list[_Launch] = []
        made: list[tuple[int, torch.Size, tuple[int, ...], torch.dtype]] = []
        for kind, *what in seen.steps:
            if kind == "make":
                t = seen.known[what[0]]
                made.append((what[0], t.shape, t.stride(), t.dtype))
                continue
            runner, given = what
            tensors = [
                (i, seen.view(t))
                for i, t in enumerate(given)
                if isinstance(t, Tensor) and t.numel()
            ]
            at = {i for i, _ in tensors}
            arguments = [None if i in at else value for i, value in enumerate(given)]
            launches.append(_Launch(made, runner, arguments, tensors, []))
            made = []
        if made and not launches:
            raise _UnlikeError
        if made:  # a result that no kernel writes: it is made with the last launch's
            launches[-1].made = launches[-1].made + made
        described = _describe(result, seen)
        last: dict[int, _Launch] = {}
        for launch in launches:
            for slot, *_ in launch.made:
                last[slot] = launch
            for _, view in launch.tensors:
                if view.slot >= inputs:
                    last[view.slot] = launch
        kept = {view.slot for view in _views(described)}
        for slot, launch in last.items():
            if slot not in kept:
                launch.dead.append(slot)
        if any(slot < inputs for slot in kept):
            raise _UnlikeError
        return cls(launches, len(seen.known), described)

    def __call__(self, inputs: list[Tensor], pointers: list[int]) -> Any:
        """Launch all of it, on tensors of the kind that was watched and their addresses."""
        more = self.slots - len(inputs)
        slots: list[Any] = inputs + [None] * more
        pointers = pointers + [0] * more
        device, empty = inputs[0].device, torch.empty_strided
        with device_guard(inputs[0]):
            for launch in self.launches:
                for slot, shape, stride, dtype in launch.made:
                    slots[slot] = t = empty(shape, stride, dtype=dtype, device=device)
                    pointers[slot] = t.data_ptr()
                arguments = launch.arguments.copy()
                if _INTERPRETED:  # which takes no address for a tensor
                    for i, view in launch.tensors:
                        arguments[i] = _take(slots, view)
                else:
                    for i, view in launch.tensors:
                        arguments[i] = pointers[view.slot] + view.offset
                launch.runner(*arguments)
                for slot in launch.dead:
                    slots[slot] = None
        return _build(self.result, slots)


def _describe(result: Any, seen: _Watch) -> Any:
    """A result with each tensor's place instead of the tensor; an empty one is made anew."""
    if isinstance(result, Tensor):
        if not result.numel():
            return (result.shape, result.dtype)
        return seen.view(result)
    if isinstance(result, tuple):
        return [_describe(each, seen) for each in result]
    if result is None:
        return None
    raise _UnlikeError


def _views(described: Any) -> Iterator[_View]:
    if isinstance(described, _View):
        yield described
    elif isinstance(described, list):
        for each in described:
            yield from _views(each)


def _build(described: Any, slots: list[Any]) -> Any:
    if isinstance(described, _View):
        return _take(slots, described)
    if isinstance(described, list):
        return tuple(_build(each, slots) for each in described)
    if described is None:
        return None
    shape, dtype = described
    return torch.empty(shape, dtype=dtype, device=slots[0].device)


def _take(slots: list[Any], view: _View) -> Tensor:
    """The tensor of a view: what is in the slot itself, if that is what the view is."""
    t = slots[view.slot]
    if view.offset == 0 and view.dtype is t.dtype and view.stride == t.stride():
        if view.shape == t.shape:
            return t
    storage, start = t.untyped_storage(), t.storage_offset() * t.itemsize + view.offset
    made = torch.empty(0, dtype=view.dtype, device=t.device)
    return made.set_(storage, start // made.itemsize, view.shape, view.stride)
