"""What every launcher needs: the walk over x, accumulator types, dot precision, the device."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime import driver

from bam_kernels import env, layout
from bam_kernels.convolution_choice import tf32_convolutions

_TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}
_ACCUMULATORS = {torch.float64: tl.float64}
_ACCUMULATOR_DTYPES = {torch.float64: torch.float64}


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """fp32 for half types and fp32, fp64 for fp64, as Triton's type."""
    return _ACCUMULATORS.get(dtype, tl.float32)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The same as torch's type, for workspaces."""
    return _ACCUMULATOR_DTYPES.get(dtype, torch.float32)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. On the host Triton's own takes microseconds."""
    return -(-a // b)


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """A floating dtype as Triton's type."""
    return _TYPES[dtype]


@dataclasses.dataclass(frozen=True)
class Walk:
    """x as N x C x P, and the greatest power of two (at most 16) that divides its extents.

    Triton sees that an int argument is a multiple of 16 or nothing at all; H * W = 196 would lose
    wide accesses. So the launchers pass lengths in units of `align`, a compile-time constant, and
    the kernels multiply back.
    """

    n: int
    c: int
    p: int
    channels_last: bool
    align: int

    @property
    def inner(self) -> int:
        """The length of the dense axis."""
        return self.c if self.channels_last else self.p


def walk(x: Tensor, *others: Tensor) -> Walk:
    """The walk over x and over the maps that go with it, all in one layout (`layout.like`)."""
    return _walk(x.shape, x.stride(), *(t.stride() for t in others))


class _Strided:
    """Shape and strides, without the tensor, for `layout`."""

    def __init__(self, shape: torch.Size, strides: tuple[int, ...]) -> None:
        self.shape, self._strides = shape, strides

    def stride(self, axis: int | None = None) -> int | tuple[int, ...]:
        return self._strides if axis is None else self._strides[axis]


@functools.lru_cache(maxsize=4096)
def _walk(shape: torch.Size, *strides: tuple[int, ...]) -> Walk:
    maps = [_Strided(shape, each) for each in strides]
    n, c, h, w = shape
    channels_last = layout.is_channels_last(maps[0])
    lengths = [16, c if channels_last else h * w]
    for t in maps:
        st = layout.strides(t, channels_last)
        lengths += [st.n, st.outer]
    return Walk(n, c, h * w, channels_last, math.gcd(*lengths))


def units(t: Tensor, w: Walk) -> tuple[int, int]:
    """t's (sample, outer) strides in units of the walk's alignment."""
    return _units(t.shape, t.stride(), w.channels_last, w.align)


@functools.lru_cache(maxsize=4096)
def _units(
    shape: torch.Size, strides: tuple[int, ...], channels_last: bool, align: int
) -> tuple[int, int]:
    st = layout.strides(_Strided(shape, strides), channels_last)
    return st.n // align, st.outer // align


def conv_precision(dtype: torch.dtype) -> str:
    """How fp32 dots of the 1x1 reduction multiply, following torch's setting for convolutions."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if tf32_convolutions() else "ieee"


def registers(most: int, num_warps: int) -> dict[str, int]:
    """The launch option that allows a thread `most` registers, and a block no more than there are.

    Left to itself, NVIDIA's assembler keeps to fewer than it needs so that more blocks fit on a
    multiprocessor, and spills a value or two for it. Other compilers have no such option.
    """
    if env.triton_interpret() or _target(driver.active)[0] != "cuda":
        return {}
    return {"maxnreg": min(most, 65536 // (32 * num_warps))}


def compute_capability() -> int:
    """Of the NVIDIA GPU that is compiled for, 90 for 9.0; 0 elsewhere."""
    if env.triton_interpret():
        return 0
    backend, arch = _target(driver.active)
    return int(arch) if backend == "cuda" else 0


def stages(count: int) -> int:
    """`count` pipeline stages of a loop around a dot; on AMD's GPUs one, as Triton 3.6 cannot
    compile more where a dot takes no matrix units."""
    if env.triton_interpret() or _target(driver.active)[0] != "hip":
        return count
    return 1


def warps(count: int) -> int:
    """`count` warps of 32 threads as the GPU's own: on AMD's a warp is 64 threads, and a block of
    more than 512 threads has so few registers a thread that kernels which hold much spill."""
    if env.triton_interpret() or _target(driver.active)[0] != "hip":
        return count
    return max(1, count // 2)


@functools.lru_cache(maxsize=8)
def _target(active: object) -> tuple[str, int | str]:
    """("cuda", 90) or ("hip", "gfx942"), say."""
    target = active.get_current_target()
    return target.backend, target.arch


def device_guard(x: Tensor) -> AbstractContextManager:
    """Make x's device the current one, since that is where Triton launches."""
    if x.device.type in ("cpu", "meta"):
        return contextlib.nullcontext()
    module = torch.get_device_module(x.device)
    if x.device.index == module.current_device():
        return contextlib.nullcontext()
    return module.device(x.device)


class _Watchers(threading.local):
    """What is to hear of this thread's launches (`bam_kernels.backends.triton.replay`)."""

    active: Any = None


watch = _Watchers()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """``kernel[grid](*args, **options)``: how every kernel here is launched."""
    if watch.active is None:
        kernel[grid](*args, **options)
        return
    with _disable_current_modes():  # what the launch does to tensors is no part of what is watched
        compiled = kernel[grid](*args, **options)
    watch.active.launched(*_bound(kernel, compiled, grid, args, options))


def _bound(
    kernel: Any, compiled: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: Any
) -> tuple[Callable[..., object], list[Any]]:
    """What launches the compiled kernel again, given a value for each parameter; and the values."""
    names = kernel.arg_names
    named = dict(zip(names, args, strict=False)) | options
    values = [named[name] for name in names]
    if env.triton_interpret():
        return kernel[grid], values
    if hasattr(compiled, "result"):  # of a compilation that went on in another thread
        compiled = compiled.result()
    return compiled[(*grid, 1, 1)[:3]], values
