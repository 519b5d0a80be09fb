"""What the launchers would launch, and on how many bytes, without a GPU and without the work.

Inside `dry_run` whole modules run on tensors of the "meta" device, which hold no data: every
launcher decides what it decides on a GPU, each kernel's launch is recorded in place of being run,
and so is each of torch's own operators. A map of any size takes milliseconds::

    with dry_run() as traffic:
        module(torch.empty(256, 256, 56, 56, device="meta"))
    print(traffic.table())

A tensor counts with all of its bytes, once a launch and direction: what must come from and go to
DRAM if a cache serves everything that a launch reads again. `bam_kernels.testing.traffic` counts
the same by running the kernels; its columns "distinct" are what these figures are held against.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import torch

import bam_kernels
from bam_kernels import dispatch
from bam_kernels.testing import aot
from bam_kernels.testing.traffic import Launch, Recorder, TensorTraffic, Traffic, storage_bytes

# Which pointers a kernel stores to; it loads from the others.
_WRITTEN: dict[str, frozenset[str]] = {
    kernel: frozenset(names.split())
    for kernel, names in {
        "_channel_mlp_backward_first_kernel": "dbias0 dhidden_beta dhidden_gamma dpooled dweight0",
        "_activate_kernel": "out statistics",
        "_channel_mlp_backward_in_kernel": ("dbias0 dhidden_beta dhidden_gamma dpooled dweight0"),
        "_channel_mlp_backward_norm_kernel": "dbeta dgamma dout",
        "_channel_mlp_backward_out_kernel": "dactive dbeta dbias1 dgamma dweight1",
        "_channel_mlp_backward_second_kernel": "dactive dbias1 dweight1",
        "_channel_mlp_hidden_kernel": "hidden_out",
        "_channel_mlp_kernel": (
            "batch_mean batch_var hidden_batch_mean hidden_batch_var hidden_out logits"
        ),
        "_channel_mlp_logits_kernel": (
            "batch_mean batch_var hidden_batch_mean hidden_batch_var logits"
        ),
        "_conv_mlp_kernel": "logits mlp_logits out",
        "_dilated_conv_backward_kernel": "dnorm dsource dweight source_sums",
        "_dilated_conv_kernel": "final_sums logits logits_partials out out_partials statistics",
        "_gate_backward_reduce_kernel": "dchannel dspatial",
        "_gate_forward_kernel": "out",
        "_input_gradient_kernel": "dbias dweight dx",
        "_merge_kernel": "merged",
        "_mlp_gate_kernel": "out",
        "_norm_backward_kernel": "dnorm dz",
        "_normalize_logits_kernel": "out statistics",
        "_pack_kernel": "laid packed partials",
        "_pool_reduce_kernel": "packed pooled reduced",
        "_project_backward_kernel": "dfinal dproject du sums",
        "_project_kernel": "final_sums logits logits_partials statistics",
        "_sum_splits_kernel": "out0 out1",
        "_update_running_kernel": "counter* mean* variance*",
    }.items()
}
_IN_PLACE = frozenset({"_update_running_kernel"})  # these load what they store to as well


@contextlib.contextmanager
def dry_run(target: str = "sm_90", *, compiled: bool = False) -> Iterator[Traffic]:
    """Record the launches of the Triton backend and torch's operators on meta tensors.

    Args:
        target: the GPU that the launchers are told of, as in `bam_kernels.testing.aot`.
        compiled: inside `aot.compile_only`, whose target then counts; each launch is compiled, so
            that its reports and this traffic's launches come in one order.

    Yields:
        the traffic so far; it stays readable after the block.

    Raises:
        RuntimeError: a kernel that this module knows nothing of was launched, or Triton is not
            installed.
    """
    recorder = Recorder()
    with contextlib.ExitStack() as undo:
        for patch in _patches(recorder, compiled):
            undo.enter_context(mock.patch.object(*patch))
        if not compiled:
            undo.enter_context(aot.active_target(target))
        # Meta tensors count as a GPU's.
        undo.enter_context(mock.patch.object(dispatch, "why_not", lambda backend, device: None))
        undo.enter_context(bam_kernels.use_backend("triton"))
        undo.enter_context(recorder)
        yield recorder.traffic


def _patches(recorder: Recorder, compiled: bool) -> list[tuple[Any, str, Any]]:
    """(class, attribute, replacement) for the launch of compiled and of interpreted kernels."""
    from triton.runtime.interpreter import GridExecutor
    from triton.runtime.jit import JITFunction

    compiling = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        recorder.traffic.events.append(_launch(self.fn, grid, args, kwargs))
        if compiled:
            compiling(self, *args, grid=grid, warmup=warmup, **kwargs)

    def execute(self: Any, *args: Any, **kwargs: Any) -> None:
        recorder.traffic.events.append(_launch(self.fn, self.grid, args, kwargs))

    return [(JITFunction, "run", run), (GridExecutor, "__call__", execute)]


def _launch(fn: Any, grid: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Launch:
    known = inspect.signature(fn).parameters
    bound = inspect.getcallargs(fn, *args, **{k: v for k, v in kwargs.items() if k in known})
    grid = tuple(grid(bound) if callable(grid) else grid)
    return Launch(
        fn.__name__,
        (*grid, *(1,) * (3 - len(grid))),
        _tensors(fn.__name__, bound),
        outside_bytes=0,
        atomics=False,
        first_outside=None,
    )


def _tensors(kernel: str, bound: Mapping[str, Any]) -> dict[str, TensorTraffic]:
    written = _WRITTEN.get(kernel)
    if written is None:
        raise RuntimeError(f"dry_run: expected one of {', '.join(_WRITTEN)}, got {kernel}")
    found: dict[str, TensorTraffic] = {}
    seen = set()
    for name, value in bound.items():
        if not isinstance(value, torch.Tensor):
            continue
        # A tensor that is passed twice moves once: kernels take one in place of what is absent.
        place = (value.untyped_storage()._cdata, value.storage_offset())
        if place in seen:
            continue
        seen.add(place)
        size = storage_bytes(value)
        stores = name in written or f"{name.rstrip('0123456789')}*" in written
        both = (size * (not stores or kernel in _IN_PLACE), size * stores)
        found[name] = TensorTraffic(*both, *both, value.nbytes, size)
    return found
