"""The shipped launch tables, compiled for real GPUs without one: no spills, wide access to x.

Each launcher runs on meta tensors in a process where nothing is interpreted; the compiler's own
figures come back. What needs a GPU to be known, the speed, is not here.
"""

from __future__ import annotations

import pytest

from bam_kernels.testing import aot

pytestmark = pytest.mark.skipif(
    aot.is_available(in_subprocess=True) is not None,
    reason=str(aot.is_available(in_subprocess=True)),
)

# ResNet-50's sites: [C, H = W, C // 16].
SITES = ((256, 56, 16), (512, 28, 32), (1024, 14, 64))

CODE = """
import torch
from bam_kernels.backends import triton as backend
from bam_kernels.testing.aot import compile_only

def empty(*shape):
    return torch.empty(shape, dtype=dtype, device="meta")

with compile_only("{target}") as reports:
    for name, tf32, (c, side, h) in {variants}:
        dtype = getattr(torch, name)
        torch.backends.cudnn.allow_tf32 = tf32
        for fmt in (torch.contiguous_format, torch.channels_last):
            x = empty(32, c, side, side).contiguous(memory_format=fmt)
            dreduced = empty(32, h, side, side).contiguous(memory_format=fmt)
            channel, spatial, pooled = empty(32, c), empty(32, 1, side, side), empty(32, c)
            weight, weight1, bias, bias1 = empty(h, c), empty(c, h), empty(h), empty(c)
            backend.gate_forward(x, channel, spatial, "sum", True)
            backend.pool_reduce_forward(x, weight, bias, True)
            backend.gate_backward_reduce(x, x, channel, spatial, "sum")
            backend.input_gradient(
                x, x, channel, spatial, pooled, dreduced, weight, "sum", True, True, True, True
            )
        for train in (False, True):
            hidden, final = [empty(h) for _ in range(4)], [empty(c) for _ in range(4)]
            absent = [None] * 4
            layers = (pooled, weight, bias, weight1, bias1)
            none, batch = (False, False, 1e-5), (True, train, 1e-5)
            backend.channel_mlp_forward(*layers, *absent, *final, *none, *batch)
            backend.channel_mlp_forward(*layers, *hidden, *absent, *batch, *none)
"""


BRANCHES = """
import torch
from bam_kernels.backends import triton as backend
from bam_kernels.testing.aot import compile_only

def empty(*shape):
    return torch.empty(shape, dtype=dtype, device="meta")


with compile_only("{target}") as reports:
    for name, tf32, (c, side, h) in {variants}:
        dtype = getattr(torch, name)
        torch.backends.cudnn.allow_tf32 = tf32
        pooled, kept = empty(32, c), empty(32, h).float()
        layers = (kept, pooled, empty(h, c), empty(h), empty(c, h), empty(c))
        none, batch = (False, False, 1e-5), (True, True, 1e-5)
        final, hidden, absent = [empty(c)] * 4, [empty(h)] * 4, [None] * 4
        backward = (pooled, *layers)
        backend.channel_mlp_backward(*backward, *absent, final[0], *final[2:], *none, *batch, True)
        backend.channel_mlp_backward(*backward, *hidden, None, None, None, *batch, *none, True)
        nchw, last = torch.contiguous_format, torch.channels_last
        for preset, fmt, train in (
            ("paper", nchw, True), ("official", last, True), ("official", nchw, False),
        ):
            reduced = empty(32, h, side, side).contiguous(memory_format=fmt)
            widths = [1] if preset == "paper" else [h, h, h]
            vectors = [[empty(width).float() for width in widths] for _ in range(4)]
            known = [[], []] if train else vectors[2:]
            arguments = (
                reduced, [empty(h, h, 3, 3)] * 2, [empty(h)] * 2, empty(h), empty(1),
                *vectors[:2], *known, preset != "paper", preset == "paper",
                [train] * len(widths), [1e-5] * len(widths), 4,
            )
            logits, statistics = backend.spatial_branch_forward(*arguments)
            backend.spatial_branch_backward(logits, statistics, *arguments, True, True)
        counters = [torch.empty((), dtype=torch.int64, device="meta")]
        running = [torch.empty(c, device="meta")]
        backend.update_running(running, running, counters, running, running, [11], [0.1])
"""


# Inference behind the heads, which have tables of their own: as one tile leaves them, and in parts.
INFERENCE = """
import torch
from bam_kernels.backends.triton import inference
from bam_kernels.backends.triton.launch import walk
from bam_kernels.backends.triton.pool_reduce import Parts
from bam_kernels.testing.aot import compile_only

def empty(*shape, dtype=None):
    return torch.empty(shape, dtype=dtype or kind, device="meta")

def norm(width):
    return [empty(width, dtype=wide) for _ in range(4)]

def parts(x, weight, bias, pool):
    n, c, h, w = x.shape
    last = walk(x).channels_last
    fmt = torch.channels_last if last else torch.contiguous_format
    reduced = empty(n, hidden, h, w).contiguous(memory_format=fmt)
    if split == 1:
        return Parts(empty(n, c), reduced, 1, 1, last)
    some = empty(n, split, hidden * h * w, dtype=wide)
    return Parts(empty(n, split, c, dtype=wide), some, split, split, last)

inference.pool_reduce_parts = parts
inference.gate_forward = lambda x, *rest: x
with compile_only("{target}") as reports:
    for name, tf32, (c, side, hidden) in {variants}:
        kind = getattr(torch, name)
        wide = torch.float64 if kind == torch.float64 else torch.float32
        torch.backends.cudnn.allow_tf32 = tf32
        for fmt, official, split in (
            (torch.contiguous_format, False, 4), (torch.channels_last, True, 1),
        ):
            x = empty(2, c, side, side).contiguous(memory_format=fmt)
            inner, outer = (norm, lambda _: []) if official else (lambda _: [], norm)
            linear = [empty(hidden, c), empty(hidden), *inner(hidden), empty(c, hidden), empty(c)]
            linear += outer(c)
            conv = [*inner(hidden), empty(hidden, hidden, 3, 3), empty(hidden)]
            last = [*inner(hidden), empty(1, hidden, 1, 1), empty(1), *outer(1)]
            spatial = [empty(hidden, c), empty(hidden), *conv, *conv, *last]
            eps, norms = [1e-5] * 4, [int(official), int(not official)]
            head = [0, 1, 2, *norms]
            inference.bam_forward(x, linear + spatial, [*head, 1, 2, 4, *norms, hidden], eps)
            inference.bam_forward(x, linear, [*head, 0, 0, 1, 0, 0, 0], eps)
"""


# What a process compiles for one target, since starting it takes as long as a dozen kernels:
# (dtype, whether with TF32, site).
TABLES = (
    *(("float16", True, site) for site in SITES),
    ("bfloat16", True, SITES[0]),
    *(("float32", tf32, site) for tf32 in (True, False) for site in SITES),
)
BRANCH_TABLES = (
    *(("float16", True, site) for site in SITES),
    *(("float32", True, site) for site in SITES),
    ("float32", False, SITES[2]),
)


INFERENCE_TABLES = (
    *(("float16", True, site) for site in ((64, 56, 4), *SITES)),
    *(("float32", True, site) for site in ((64, 56, 4), *SITES)),
    ("float32", False, SITES[2]),
)


def compiled(code: str, target: str, variants: tuple, kernels: set[str]) -> list[aot.KernelReport]:
    """The reports of all variants, which between them launched all of `kernels`."""
    code = code.format(target=target, variants=list(variants))
    reports = aot.reports_in_subprocess(code, timeout=1200)
    assert {r.name for r in reports} == kernels
    assert len(reports) >= len(variants) * len(kernels)
    return reports


@pytest.mark.parametrize("target", aot.TARGETS)
def test_shipped_tables(target):
    kernels = {
        "_channel_mlp_kernel",
        "_gate_backward_reduce_kernel",
        "_gate_forward_kernel",
        "_input_gradient_kernel",
        "_pool_reduce_kernel",
        "_sum_splits_kernel",
    }
    for report in compiled(CODE, target, TABLES, kernels):
        text = aot.format_table([report])
        assert report.spill_bytes == 0, text
        assert report.fits_shared, text
        if "x" not in report.accesses or report.name == "_sum_splits_kernel":
            continue
        # 196 = 14 * 14 positions are a multiple of 4 only: 64 bits in half precision there.
        nchw = not report.constants["CHANNELS_LAST"]
        narrow = nchw and report.constants["ALIGN"] == 4 and report.signature["x"] != "*fp32"
        for name in ("x", "dout"):
            if name in report.accesses:
                assert report.accesses[name].load_bits == {64 if narrow else 128}, text
        for name in ("out", "dx"):
            if name in report.accesses:
                assert report.accesses[name].store_bits == {64 if narrow else 128}, text


def test_double_precision_compiles_without_spills():
    code = CODE.format(target="sm_90", variants=[("float64", True, SITES[0])])
    reports = aot.reports_in_subprocess(code, timeout=600)
    assert len(reports) >= 12
    assert [r for r in reports if r.spill_bytes] == []


@pytest.mark.parametrize("target", aot.TARGETS)
def test_branches(target):
    """The kernels behind the heads, forward and backward, as the table has them: no spills."""
    kernels = {
        "_channel_mlp_backward_in_kernel",
        "_channel_mlp_backward_out_kernel",
        "_dilated_conv_backward_kernel",
        "_dilated_conv_kernel",
        "_merge_kernel",
        "_norm_backward_kernel",
        "_normalize_logits_kernel",
        "_project_backward_kernel",
        "_project_kernel",
        "_statistics_kernel",
        "_sum_splits_kernel",
        "_update_running_kernel",
    }
    for report in compiled(BRANCHES, target, BRANCH_TABLES, kernels):
        text = aot.format_table([report])
        assert report.spill_bytes == 0, text
        assert report.fits_shared, text


@pytest.mark.parametrize("target", aot.TARGETS)
def test_inference(target):
    """Hidden widths of 4, 16, 32 and 64."""
    kernels = {"_conv_mlp_kernel", "_mlp_gate_kernel"}
    for report in compiled(INFERENCE, target, INFERENCE_TABLES, kernels):
        text = aot.format_table([report])
        assert report.spill_bytes == 0, text
        assert report.fits_shared, text
        if report.name != "_mlp_gate_kernel":
            continue
        nchw = not report.constants["CHANNELS_LAST"]
        narrow = nchw and report.constants["ALIGN"] == 4 and report.signature["x"] != "*fp32"
        assert report.accesses["x"].load_bits == {64 if narrow else 128}, text
        assert report.accesses["out"].store_bits == {64 if narrow else 128}, text
