"""Toy kernels for test_aot_tool.py, in a file of their own: Triton reads kernels' source files."""

import torch
import triton
import triton.language as tl


@triton.jit
def copy_kernel(x, out, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    tl.store(out + offsets, tl.load(x + offsets, mask=mask), mask=mask)


def copy(x, block=1024):
    out = torch.empty_like(x)
    n = x.numel()
    copy_kernel[(triton.cdiv(n, block),)](x, out, n, BLOCK=block, num_warps=4)
    return out


@triton.jit
def scale_rows_kernel(x, scale, out, stride, COLUMNS: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, COLUMNS)
    value = tl.load(x + row * stride + columns) * tl.load(scale + row)
    tl.store(out + row * COLUMNS + columns, value)


def scale_rows(x, columns=1024):
    out = torch.empty((x.shape[0], columns), device=x.device, dtype=x.dtype)
    scale = torch.empty(x.shape[0], device=x.device, dtype=torch.float32)
    scale_rows_kernel[(x.shape[0],)](
        x, scale, out, x.stride(0), COLUMNS=columns, num_warps=4, num_stages=2
    )
    return out


@triton.jit
def sum_blocks_kernel(x, out, count, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(count):
        total += tl.load(x + i * BLOCK + columns).to(tl.float32)
    tl.atomic_add(out + columns, total)


def sum_blocks(x, block=1024):
    out = torch.zeros(block, device=x.device, dtype=torch.float32)
    sum_blocks_kernel[(1,)](x, out, x.numel() // block, BLOCK=block, num_warps=4)
    return out


@triton.jit
def spill_kernel(x, out, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    # The maximum needs every element before the first store, so all of them stay live.
    value = tl.load(x + offsets)
    tl.store(out + offsets, value * tl.max(value))


def spill(x):
    out = torch.empty_like(x)
    spill_kernel[(1,)](x, out, SIZE=x.numel(), num_warps=1)
    return out


@triton.jit
def dot_kernel(a, b, out, K, SIZE: tl.constexpr):
    rows = tl.arange(0, SIZE)[:, None]
    columns = tl.arange(0, SIZE)[None, :]
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for k in range(0, K, SIZE):
        total = tl.dot(
            tl.load(a + rows * K + k + columns), tl.load(b + (k + rows) * SIZE + columns), total
        )
    tl.store(out + rows * SIZE + columns, total)


def dot(a, b, num_stages=3):
    size = b.shape[1]
    out = torch.empty((size, size), device=a.device, dtype=torch.float32)
    dot_kernel[(1,)](a, b, out, a.shape[1], SIZE=size, num_warps=4, num_stages=num_stages)
    return out


@triton.jit
def gather_kernel(a, b, out, pair, optional, n, USE: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    source = a
    if n > 7:  # a pointer that depends on control flow
        source = b
    value = tl.load(source + offsets) + tl.load(pair[0] + offsets).to(tl.float32)
    if optional is not None:
        value += tl.load(optional + offsets)
    if USE:
        tl.store(out + offsets, value)
        tl.store(pair[1] + offsets, value.to(tl.float16))


def gather(x, half, n):
    out = torch.empty_like(x)
    gather_kernel[(1,)](x, x, out, (half, half), None, n, USE=True, BLOCK=1024, num_warps=8)
    return out
