"""Running statistics of up to four batch norms in one launch, and without reading a counter back.

torch's batch norm brings its counter to the host where `momentum` is None; here it stays on the
device, so that this too can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bam_kernels.backends import reference
from bam_kernels.backends.triton.device_math import narrow
from bam_kernels.backends.triton.launch import device_guard, launch
from bam_kernels.backends.triton.replay import replayed

_BLOCK = 512


@triton.jit
def _update(
    pid, mean, variance, counter, batch_mean, batch_variance, length, n, momentum,
    BLOCK: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = batch_mean.dtype.element_ty
    count = tl.load(counter) + 1
    # Vectors: the interpreter hands scalars over as plain numbers.
    given = tl.zeros((BLOCK,), ACC) + momentum
    values = tl.zeros((BLOCK,), ACC) + n
    unbiased = values / (values - 1)
    weight = tl.where(given < 0, 1 / (tl.zeros((BLOCK,), ACC) + count.to(ACC)), given)
    rest = 1 - weight
    for start in range(0, length, BLOCK):
        i = start + tl.arange(0, BLOCK)
        mask = i < length
        old = tl.load(mean + i, mask=mask, other=0.0).to(ACC)
        new = tl.load(batch_mean + i, mask=mask, other=0.0)
        # Not old + weight * (new - old), which leaves nothing of a new value far below the old one.
        moved = rest * old + weight * new
        tl.store(mean + i, narrow(moved, mean.dtype.element_ty), mask=mask)
        old = tl.load(variance + i, mask=mask, other=0.0).to(ACC)
        new = tl.load(batch_variance + i, mask=mask, other=0.0) * unbiased
        moved = rest * old + weight * new
        tl.store(variance + i, narrow(moved, variance.dtype.element_ty), mask=mask)
    tl.store(counter, count)


_RUNTIME = [f"{name}{i}" for i in range(4) for name in ("length", "n", "momentum")]


@triton.jit(do_not_specialize=_RUNTIME)
def _update_running_kernel(
    mean0, variance0, counter0, batch_mean0, batch_variance0, length0, n0, momentum0,
    mean1, variance1, counter1, batch_mean1, batch_variance1, length1, n1, momentum1,
    mean2, variance2, counter2, batch_mean2, batch_variance2, length2, n2, momentum2,
    mean3, variance3, counter3, batch_mean3, batch_variance3, length3, n3, momentum3,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one norm."""
    pid = tl.program_id(0)
    if pid == 0:
        _update(
            pid, mean0, variance0, counter0, batch_mean0, batch_variance0, length0, n0,
            momentum0, BLOCK,
        )  # fmt: skip
    elif pid == 1:
        _update(
            pid, mean1, variance1, counter1, batch_mean1, batch_variance1, length1, n1,
            momentum1, BLOCK,
        )  # fmt: skip
    elif pid == 2:
        _update(
            pid, mean2, variance2, counter2, batch_mean2, batch_variance2, length2, n2,
            momentum2, BLOCK,
        )  # fmt: skip
    else:
        _update(
            pid, mean3, variance3, counter3, batch_mean3, batch_variance3, length3, n3,
            momentum3, BLOCK,
        )  # fmt: skip


@replayed
def update_running(
    means: list[Tensor],
    variances: list[Tensor],
    counters: list[Tensor],
    batch_means: list[Tensor],
    batch_variances: list[Tensor],
    counts: list[int],
    momenta: list[float],
) -> None:
    """In place, for each norm: counter + 1, and its statistics moved towards the batch's.

    means and variances, running and of the batch, [h] each and dense; counters int64 scalars;
    counts the values of a channel in the batch; a negative momentum asks for a cumulative average.
    """
    if batch_means[0].dtype == torch.float64:  # the kernel's momentum is an fp32
        reference.update_running(
            means, variances, counters, batch_means, batch_variances, counts, momenta
        )
        return
    rows = list(
        zip(means, variances, counters, batch_means, batch_variances, counts, momenta,
            strict=True)
    )  # fmt: skip
    with device_guard(means[0]):
        for first in range(0, len(rows), 4):
            some = rows[first : first + 4]
            arguments = []
            for mean, variance, counter, batch_mean, batch_variance, n, momentum in some + [
                some[0]
            ] * (4 - len(some)):
                arguments += [mean, variance, counter, batch_mean, batch_variance]
                arguments += [mean.numel(), n, momentum]
            # One warp: of several, one could write the counter before another has read it.
            launch(_update_running_kernel, (len(some),), *arguments, BLOCK=_BLOCK, num_warps=1)
