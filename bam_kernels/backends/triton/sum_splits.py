"""The second half of every split sum: partials added in a fixed order, then scaled and rounded.

This takes the place of atomics: the same input gives the same bits, for the price of one launch
over a few kilobytes. Two sums share one launch.
"""

from __future__ import annotations

import dataclasses
import math

import triton
import triton.language as tl
from torch import Tensor

from bam_kernels.backends.triton.device_math import narrow
from bam_kernels.backends.triton.launch import cdiv, launch

_BLOCK = 256  # a few kilobytes in all: small blocks spread them over the multiprocessors
_TALL_BLOCK = 32
# One behind the other, loads of so many partials take longer than a block's narrow rows do.
_TALL, _TALL_ELEMENTS = 24, 1 << 17
# Beyond so many, partials are added in two steps: a program that walks over thousands takes longer
# than another launch.
_ONE_STEP = 512


@dataclasses.dataclass(frozen=True)
class Job:
    """out[row, i] = sum over splits of partials[row, split, i] / divisor (+ bias[channel of i]).

    Args:
        partials: [rows, splits, length] or, where `rows` is 1 or `available` is given, one behind
            the other, [1, all, length]; dense.
        out: rows * length elements, dense, any floating dtype.
        splits: the number of partials of each element.
        divisor: H * W for a mean, else 1.
        bias: added after the division; i belongs to channel (i // bias_run) % len(bias).
        bias_run: consecutive elements of one channel: H * W for a NCHW map, 1 for channels_last.
        available: partials there are in all, where the last row has fewer than `splits`.
    """

    partials: Tensor
    out: Tensor
    splits: int
    divisor: int = 1
    bias: Tensor | None = None
    bias_run: int = 1
    available: int = 0

    @property
    def tall(self) -> bool:
        """Many partials of few elements: a program adds 32 of them at a time."""
        return self.available > 0 or (self.splits >= _TALL and self.out.numel() <= _TALL_ELEMENTS)


@triton.jit
def _sum_job(
    block,
    partials,
    out,
    bias,
    splits,
    length,
    total,
    divisor,
    bias_run,
    bias_length,
    available,
    TALL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ACC: tl.constexpr = partials.dtype.element_ty
    # 64 bits: rows * splits * length is a workspace's size, and may pass 2^31 with a large batch.
    i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < total
    row = i // length
    at = row * splits * length + (i - row * length)
    acc = tl.zeros((BLOCK,), ACC)
    if TALL:
        for start in range(0, splits, 32):
            split = start + tl.arange(0, 32)
            there = mask[None, :] & (split < splits)[:, None]
            there = there & ((row * splits)[None, :] + split[:, None] < available)
            some = tl.load(
                partials + at[None, :] + split.to(tl.int64)[:, None] * length, there, other=0.0
            )
            acc += tl.sum(some, axis=0)
    else:
        for _ in range(splits):
            acc += tl.load(partials + at, mask=mask, other=0.0)
            at += length
    acc = acc / divisor.to(ACC)
    if bias is not None:
        channel = (i // bias_run) % bias_length
        acc += tl.load(bias + channel, mask=mask, other=0.0).to(ACC)
    tl.store(out + i, narrow(acc, out.dtype.element_ty), mask=mask)


_RUNTIME = ["splits", "length", "total", "divisor", "bias_run", "bias_length", "available"]


@triton.jit(do_not_specialize=["blocks0", *(f"{name}{job}" for name in _RUNTIME for job in "01")])
def _sum_splits_kernel(
    partials0,
    out0,
    bias0,
    splits0,
    length0,
    total0,
    divisor0,
    bias_run0,
    bias_length0,
    available0,
    partials1,
    out1,
    bias1,
    splits1,
    length1,
    total1,
    divisor1,
    bias_run1,
    bias_length1,
    available1,
    blocks0,
    TWO: tl.constexpr,
    TALL0: tl.constexpr,
    TALL1: tl.constexpr,
    BLOCK: tl.constexpr,
    TALL_BLOCK: tl.constexpr,
):
    """One program: BLOCK elements of one job; the first `blocks0` programs belong to job 0."""
    pid = tl.program_id(0)
    if pid < blocks0:
        _sum_job(
            pid, partials0, out0, bias0, splits0, length0, total0, divisor0, bias_run0,
            bias_length0, available0, TALL0, TALL_BLOCK if TALL0 else BLOCK,
        )  # fmt: skip
    elif TWO:
        _sum_job(
            pid - blocks0, partials1, out1, bias1, splits1, length1, total1, divisor1, bias_run1,
            bias_length1, available1, TALL1, TALL_BLOCK if TALL1 else BLOCK,
        )  # fmt: skip


def _arguments(job: Job) -> tuple:
    total = job.out.numel()
    length = job.partials.shape[-1]
    bias_length = 1 if job.bias is None else job.bias.numel()
    bias = None if job.bias is None else job.bias.contiguous()
    available = job.available or job.partials.shape[0] * job.splits
    sizes = (job.splits, length, total, job.divisor, job.bias_run, bias_length, available)
    return job.partials, job.out, bias, *sizes


def tall_job(partials: Tensor, out: Tensor) -> Job:
    """The sum of partials [count, length], a partial a tile, into out [length].

    Of very many, sums of a few hundred each are made here, in a launch.
    """
    count, length = partials.shape
    if count <= _ONE_STEP:
        return Job(partials[None], out, count)
    splits = math.isqrt(count)
    rows = cdiv(count, splits)
    some = partials.new_empty((rows, length))
    sum_splits([Job(partials[None], some, splits, available=count)])
    return Job(some[None], out, rows)


def sum_splits(jobs: list[Job]) -> None:
    """Run up to two jobs in one launch; none is no launch. The caller holds the device guard."""
    if not jobs:
        return
    blocks = [cdiv(job.out.numel(), _TALL_BLOCK if job.tall else _BLOCK) for job in jobs]
    first = _arguments(jobs[0])
    second = _arguments(jobs[-1])
    launch(
        _sum_splits_kernel,
        (sum(blocks),),
        *first,
        *second,
        blocks[0],
        TWO=len(jobs) == 2,
        TALL0=jobs[0].tall,
        TALL1=jobs[-1].tall,
        BLOCK=_BLOCK,
        TALL_BLOCK=_TALL_BLOCK,
        num_warps=4,
    )
