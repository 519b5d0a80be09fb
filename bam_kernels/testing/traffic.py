"""Exact memory-traffic accounting for Triton kernels run under Triton's interpreter.

``measure()`` counts what the Triton launches inside it load and store, tensor argument by tensor
argument, and lists the eager PyTorch operators that run beside them::

    with measure(strict=True) as traffic:
        y = module(x)
    print(traffic.table(), traffic.passes(x))

All sizes are bytes. A kernel's bytes are counted lane by lane: masked-off lanes count nothing,
lanes that repeat an address count again. An operator's are those of the tensors that it takes and
returns, each once: a lower bound, as an operator may be several kernels on a device. An address
belongs to the first argument that holds it, so an access that runs off one argument and lands on
an element of another argument of the same launch does not count as outside.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators that overwrite their destination without reading it.
_OVERWRITE = frozenset("copy_ fill_ zero_ uniform_ normal_ random_ exponential_ bernoulli_".split())
# Operators that read memory though no tensor comes out of them.
_ANSWER = frozenset(["_local_scalar_dense", "equal"])


@dataclass(frozen=True)
class TensorTraffic:
    """Bytes that one launch or operator moved through one tensor.

    ``distinct_*`` count every address once, so read_bytes - distinct_read_bytes was read again.
    ``size_bytes`` is numel * itemsize; ``storage_bytes`` counts expanded dimensions once.
    """

    read_bytes: int
    written_bytes: int
    distinct_read_bytes: int
    distinct_written_bytes: int
    size_bytes: int
    storage_bytes: int


class _Event:
    tensors: dict[str, TensorTraffic]

    def _sum(self, name: str) -> int:
        return sum(getattr(tensor, name) for tensor in self.tensors.values())

    @property
    def read_bytes(self) -> int:
        """Bytes read from all tensors together."""
        return self._sum("read_bytes")

    @property
    def written_bytes(self) -> int:
        """Bytes written to all tensors together."""
        return self._sum("written_bytes")


@dataclass(frozen=True)
class Launch(_Event):
    """One kernel launch. ``grid`` has three numbers; ``tensors`` is keyed by parameter name.

    ``outside_bytes`` were accessed by active lanes at addresses that are no element of any tensor
    argument; ``first_outside`` describes the first such access (relative to the nearest argument).
    """

    kernel: str
    grid: tuple[int, ...]
    tensors: dict[str, TensorTraffic]
    outside_bytes: int
    atomics: bool
    first_outside: str | None


@dataclass(frozen=True)
class Operator(_Event):
    """One eager operator; ``tensors`` holds those it reads or writes, numbered "0", "1", ..."""

    name: str
    tensors: dict[str, TensorTraffic]


@dataclass
class Traffic:
    """What ran inside one ``measure()``; ``events`` keeps launches and operators in order."""

    events: list[Launch | Operator] = field(default_factory=list)

    @property
    def launches(self) -> list[Launch]:
        """The Triton launches, in order."""
        return [event for event in self.events if isinstance(event, Launch)]

    @property
    def operators(self) -> list[Operator]:
        """The eager PyTorch operators that move data, in order."""
        return [event for event in self.events if isinstance(event, Operator)]

    @property
    def outside_bytes(self) -> int:
        """Bytes accessed outside the tensor arguments, over all launches."""
        return sum(launch.outside_bytes for launch in self.launches)

    @property
    def device_launches(self) -> int:
        """Triton launches (an empty grid never reaches a device) plus eager operators."""
        return len(self.operators) + sum(0 not in launch.grid for launch in self.launches)

    def passes(self, reference: torch.Tensor) -> float:
        """Bytes moved through tensors of at least half of ``reference``'s bytes, over its bytes."""
        moved = sum(event.read_bytes + event.written_bytes for event in self.events)
        return (moved - self.small_bytes(reference)) / storage_bytes(reference)

    def small_bytes(self, reference: torch.Tensor) -> int:
        """Bytes moved through tensors of less than half of ``reference``'s bytes."""
        tensors = [tensor for event in self.events for tensor in event.tensors.values()]
        small = [t for t in tensors if 2 * t.storage_bytes < storage_bytes(reference)]
        return sum(t.read_bytes + t.written_bytes for t in small)

    def table(self) -> str:
        """Plain-text table, one row a launch or operator; "distinct" counts an address once."""
        rows = [("name", "grid", "read", "distinct", "written", "distinct", "outside")]
        sides = "read_bytes", "distinct_read_bytes", "written_bytes", "distinct_written_bytes"
        for event in self.events:
            name, grid, outside = getattr(event, "name", ""), "operator", ""
            if isinstance(event, Launch):
                name = event.kernel + (" (atomics)" if event.atomics else "")
                grid, outside = "x".join(map(str, event.grid)), _readable(event.outside_bytes)
            rows.append((name, grid, *(_readable(event._sum(side)) for side in sides), outside))
        totals = (_readable(sum(event._sum(side) for event in self.events)) for side in sides)
        rows.append(("total", "", *totals, _readable(self.outside_bytes)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        form = "  ".join(f"{{:{'>' if i else '<'}{width}}}" for i, width in enumerate(widths))
        return "\n".join(form.format(*row) for row in rows)


def _readable(count: int) -> str:
    return f"{count / 1024:.2f} KiB" if count < 1 << 20 else f"{count / (1 << 20):.2f} MiB"


def _extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last one addressed."""
    steps = sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    return 0 if 0 in shape else 1 + steps


def storage_bytes(tensor: torch.Tensor) -> int:
    """Bytes that the tensor's elements occupy, expanded dimensions counted once."""
    shape, strides = tensor.shape, tensor.stride()
    elements = math.prod(n for n, step in zip(shape, strides, strict=True) if step or not n)
    return min(elements, _extent(shape, strides)) * tensor.element_size()


@functools.lru_cache(maxsize=16)
def _members(shape: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray | None:
    """Which elements of its extent a view holds; None if it holds all of them."""
    members = np.zeros(_extent(shape, strides), dtype=bool)
    sizes = [n if step else 1 for n, step in zip(shape, strides, strict=True)]
    np.lib.stride_tricks.as_strided(members, sizes, strides)[...] = True
    return None if members.all() else members


class _Region:
    """The memory of one tensor argument and what a launch does to it."""

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self.name, self.base, self.unit = name, tensor.data_ptr(), tensor.element_size()
        layout = tuple(tensor.shape), tuple(tensor.stride())
        self.extent = _extent(*layout) * self.unit
        self.sizes = tensor.nbytes, storage_bytes(tensor)
        self.members = _members(*layout)
        self.counts = {"read": 0, "write": 0}
        self.seen = {kind: np.zeros(self.extent // self.unit, bool) for kind in self.counts}

    def claim(self, addresses: np.ndarray, width: int, kinds: Sequence[str]) -> np.ndarray:
        """Count the accesses that are elements of this tensor; return which ones are."""
        offsets = addresses - self.base
        inside = (offsets >= 0) & (offsets <= self.extent - width)
        if not inside.any():
            return inside
        offsets = offsets[inside]
        if width % self.unit or (self.unit > 1 and (offsets % self.unit).any()):
            # A reinterpreted pointer reaches parts of elements: go on byte by byte.
            self.members = None if self.members is None else np.repeat(self.members, self.unit)
            self.seen = {kind: np.repeat(seen, self.unit) for kind, seen in self.seen.items()}
            self.unit = 1
        cells, span = offsets // self.unit, range(width // self.unit)
        if self.members is not None:
            held = np.logical_and.reduce([self.members[cells + step] for step in span])
            inside[inside] = held
            cells = cells[held]
        for kind in kinds:
            self.counts[kind] += cells.size * width
            for step in span:
                self.seen[kind][cells + step] = True
        return inside

    def result(self) -> TensorTraffic:
        distinct = [int(np.count_nonzero(seen)) * self.unit for seen in self.seen.values()]
        return TensorTraffic(*self.counts.values(), *distinct, *self.sizes)


@dataclass
class _Recording:
    """One launch while its programs run."""

    grid: tuple[int, ...] = ()
    regions: list[_Region] = field(default_factory=list)
    outside_bytes: int = 0
    atomics: bool = False
    first_outside: str | None = None

    def add_argument(self, name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            self.regions.append(_Region(name, value))
        elif isinstance(value, tuple):
            for index, item in enumerate(value):
                self.add_argument(f"{name}[{index}]", item)
        elif isinstance(getattr(value, "base", None), torch.Tensor):
            # Tensor descriptors and reinterpreted tensors wrap the tensor that they go through.
            self.add_argument(name, value.base)

    def access(self, pointers: np.ndarray, mask: Any, width: int, kinds: Sequence[str]) -> None:
        # Signed, so that an address below a tensor has a negative offset.
        addresses = pointers.reshape(-1).astype(np.int64)
        if mask is not None:
            addresses = addresses[np.broadcast_to(mask.data, pointers.shape).reshape(-1)]
        self.atomics |= addresses.size > 0 and len(kinds) > 1
        for region in self.regions:
            if addresses.size:
                addresses = addresses[~region.claim(addresses, width, kinds)]
        if addresses.size:
            self.outside_bytes += addresses.size * width * len(kinds)
            first = f"{' and '.join(kinds)} of {width} bytes {self._place(int(addresses[0]))}"
            self.first_outside = self.first_outside or first

    def _place(self, address: int) -> str:
        if not self.regions:
            return "in a launch without tensor arguments"
        # The tensor nearest to the address was most likely meant.
        near = min(self.regions, key=lambda r: max(r.base - address, address - r.base - r.extent))
        return f"at {address - near.base:+d} bytes of argument '{near.name}' ({near.extent} bytes)"


def _operator(func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> list[Operator]:
    """The record of an aten call; empty if it moves no data (views, allocations, queries)."""
    name = func._schema.name.removeprefix("aten::")
    if name.startswith(("empty", "new_empty")) or torch.Tag.inplace_view in func.tags:
        return []
    shape_only = name.startswith("new_") or name.endswith("_like")
    # Both are keyed by memory: a tensor that is passed twice, or in place, counts once each way.
    reads, writes, storages, parameters = {}, {}, set(), func._schema.arguments
    bound = {p.name: value for p, value in zip(parameters, args, strict=False)} | kwargs
    for argument in parameters:
        mutated = argument.alias_info is not None and argument.alias_info.is_write
        overwritten = mutated and (argument.kwarg_only or name in _OVERWRITE)
        tensors = _tensors(bound.get(argument.name))
        storages.update(key[0] for key in tensors)
        writes.update(tensors if mutated else {})
        reads.update({} if overwritten or shape_only else tensors)
    # What shares memory with an argument is a view, or the argument that was mutated.
    writes.update((k, tensor) for k, tensor in _tensors(result).items() if k[0] not in storages)
    if name not in _ANSWER and not any(tensor.numel() for tensor in writes.values()):
        return []
    moved = {}
    for key, tensor in (reads | writes).items():
        size = storage_bytes(tensor)
        both = size * (key in reads), size * (key in writes)
        moved[str(len(moved))] = TensorTraffic(*both, *both, tensor.nbytes, size)
    return [Operator(str(func), moved)]


def _tensors(value: Any) -> dict[tuple[Any, ...], torch.Tensor]:
    found = [leaf for leaf in tree_leaves(value) if getattr(leaf, "layout", 0) is torch.strided]
    return {(t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride()): t for t in found}


class Recorder(TorchDispatchMode):
    """Collects the operators, and the launches that a patched runtime reports."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.traffic = Traffic()
        self.launch: _Recording | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.launch is not None:
            return func(*args, **kwargs)  # the interpreter's own copies
        if isinstance(func, torch._ops.HigherOrderOperator):  # of a compiled graph
            with self:
                run = func.py_kernels[torch._C.DispatchKey.CompositeExplicitAutograd]
                return run(*args, **kwargs)
        c, name = torch._C, func.name()
        if c._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd"):
            with self:  # without autograd keys (inference mode) these arrive whole
                return func.decompose(*args, **kwargs)
        if func.namespace == "aten":
            result = func(*args, **kwargs)
            self.traffic.events += _operator(func, args, kwargs, result)
            return result
        # Of meta tensors too, so that the launchers run and not the fakes (`testing.dry_run`).
        here = all(t.is_cpu or t.is_meta for t in _tensors((args, kwargs)).values())
        if not here or not c._dispatch_has_computed_kernel_for_dispatch_key(name, "CPU"):
            return func(*args, **kwargs)
        # The mode is off in here. Calling func with it on again would come straight back, so go to
        # the kernel below the mode's own dispatch key.
        with self:
            return func.redispatch(c.DispatchKeySet(c.DispatchKey.CPU), *args, **kwargs)


def _patches(recorder: Recorder) -> list[tuple[type, str, Callable[..., Any]]]:
    """(class, attribute, replacement) for the interpreter's launch and its memory operations."""
    from triton.runtime import interpreter

    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    execute, init_args, set_grid = executor.__call__, executor._init_args_hst, builder.set_grid_dim

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        recorder.launch = now = _Recording()
        try:
            execute(self, *args, **kwargs)
        finally:
            recorder.launch = None
        tensors = {region.name: region.result() for region in now.regions}
        last = now.outside_bytes, now.atomics, now.first_outside
        recorder.traffic.events.append(Launch(self.fn.__name__, now.grid, tensors, *last))

    def bind(self: Any, args: Any, kwargs: Any) -> Any:
        # These are the tensors whose addresses the kernel sees, copies of the caller's or not.
        args, kwargs = init_args(self, args, kwargs)
        for name, value in inspect.getcallargs(self.fn, *args, **kwargs).items():
            recorder.launch.add_argument(name, value)
        return args, kwargs

    def grid(self: Any, *dims: Any) -> None:
        recorder.launch.grid = tuple(map(operator.index, dims))
        set_grid(self, *dims)

    def counted(name: str, find: Callable[..., tuple], *kinds: str) -> tuple[type, str, Any]:
        original = getattr(builder, name)

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            pointers, mask = find(*args)
            width = interpreter._get_np_dtype(pointers.get_element_ty()).itemsize
            recorder.launch.access(pointers.data, mask, width, kinds)
            return original(self, *args, **kwargs)

        return builder, name, method

    # Unmasked, block-pointer and descriptor accesses all end in these four builder methods.
    return [
        (executor, "__call__", run),
        (executor, "_init_args_hst", bind),
        (builder, "set_grid_dim", grid),
        counted("create_masked_load", lambda ptr, mask, *_: (ptr, mask), "read"),
        counted("create_masked_store", lambda ptr, value, mask, *_: (ptr, mask), "write"),
        counted("create_atomic_rmw", lambda op, ptr, val, mask, *_: (ptr, mask), "read", "write"),
        counted("create_atomic_cas", lambda ptr, *_: (ptr, None), "read", "write"),
    ]


@contextlib.contextmanager
def measure(strict: bool = False) -> Iterator[Traffic]:
    """Count the memory traffic of the Triton launches and eager operators in the ``with`` block.

    The traffic stays readable after the block. With ``strict``, a block that ends normally raises
    AssertionError if a kernel accessed an address outside its tensor arguments. Raises
    RuntimeError if Triton does not interpret kernels.
    """
    interpreted = False
    with contextlib.suppress(ImportError):
        from triton import JITFunction, knobs, language

        # Triton's own tl.sum shows what its decorator made when triton was imported.
        interpreted = knobs.runtime.interpret and not isinstance(language.sum, JITFunction)
    if not interpreted:
        raise RuntimeError(
            "measure() needs Triton's interpreter: set the environment variable TRITON_INTERPRET=1 "
            "before triton is first imported, and use CPU tensors"
        )
    recorder = Recorder()
    with contextlib.ExitStack() as undo:
        for patch in _patches(recorder):
            undo.enter_context(mock.patch.object(*patch))
        undo.enter_context(recorder)
        yield recorder.traffic
    bad = [launch for launch in recorder.traffic.launches if launch.first_outside]
    if strict and bad:
        where = f"outside its tensor arguments, first by a {bad[0].first_outside}"
        raise AssertionError(f"kernel '{bad[0].kernel}': {bad[0].outside_bytes} bytes {where}")
