"""The shipped launch tables, compiled for real GPUs without one: no spills, wide access to x.

Whole modules run dry on meta tensors, in processes where nothing is interpreted, and every launch
is compiled; the compiler's own figures come back. What needs a GPU to be known, the speed, is not
here.
"""

from __future__ import annotations

import pytest

from bam_kernels.benchmarking.kernel_report import problems
from bam_kernels.testing import aot

pytestmark = pytest.mark.skipif(
    aot.is_available(in_subprocess=True) is not None,
    reason=str(aot.is_available(in_subprocess=True)),
)

# ResNet-50's sites, with hidden widths of 16, 32 and 64, and one whose hidden width is 4.
SITES = ((32, 256, 56, 56), (32, 512, 28, 28), (32, 1024, 14, 14))
NARROW = (32, 64, 56, 56)

CODE = """
import torch
import bam_kernels
from bam_kernels.benchmarking.kernel_report import compile_module

reports = []
for name, tf32, size, layout, preset, mode in {variants}:
    torch.backends.cudnn.allow_tf32 = tf32
    dtype = getattr(torch, name)
    module = bam_kernels.BAM(size[1], preset=preset, device="meta", dtype=dtype)
    module.train(mode == "training")
    x = torch.empty(size, device="meta", dtype=dtype)
    x = x.contiguous(memory_format=getattr(torch, layout)).requires_grad_(mode != "inference")
    reports += [report for _, report, _ in compile_module("{target}", module, x)]
"""

NCHW, LAST = "contiguous_format", "channels_last"
VARIANTS = [
    # The official preset's kernels do all that the paper's do, and hold more.
    *(
        (name, True, size, layout, preset, "training")
        for name in ("float16", "float32")
        for size in (NARROW, *SITES)
        for layout, preset in ((NCHW, "official"), (LAST, "official"), (NCHW, "paper"))
    ),
    *(
        (name, True, size, layout, preset, "inference")
        for name in ("float16", "float32")
        for size in (NARROW, *SITES)
        for layout, preset in ((NCHW, "official"), (LAST, "paper"))
    ),
    *(("float32", False, size, layout, "official", "training")
      for size in SITES[1:] for layout in (NCHW, LAST)),
    ("bfloat16", True, SITES[0], LAST, "official", "training"),
    ("float16", True, SITES[2], LAST, "paper", "training"),
    # Frozen norms, whose statistics are known; small batches, whose sums are left in parts.
    ("float16", True, SITES[0], NCHW, "official", "frozen"),
    ("float32", True, SITES[2], LAST, "paper", "frozen"),
    *(("float16", True, (2, *size[1:]), layout, "paper", "inference")
      for size in (SITES[0], SITES[2]) for layout in (NCHW, LAST)),
]  # fmt: skip
"""(dtype, whether with TF32, [N, C, H, W], layout, preset, mode), of every process: starting one
takes as long as a dozen kernels. The command ``report`` compiles every combination."""

FEWER = [
    (name, tf32, size, layout, preset, mode)
    for name, tf32, size, layout, preset, mode in VARIANTS
    if mode == "inference"
    or (tf32 and (preset, mode) == ("official", "training") and size in (NARROW, SITES[2]))
    or (name, size, preset, mode) == ("float16", SITES[2], "paper", "training")
]
"""Inference, and at the narrowest and the widest site training with all that the kernels hold; and
what the paper's preset alone has."""


def variants_of(target: str) -> list:
    """What is compiled for a target; the command ``report`` compiles everything for each."""
    return VARIANTS if target == "sm_90" else FEWER


def compiled(target: str, variants: list) -> list[aot.KernelReport]:
    code = CODE.format(target=target, variants=list(variants))
    return aot.reports_in_subprocess(code, timeout=1800)


@pytest.mark.slow
@pytest.mark.parametrize("target", aot.TARGETS)
def test_shipped_tables(target):
    reports = compiled(target, variants_of(target))
    assert {report.name for report in reports} == {
        "_activate_kernel", "_channel_mlp_backward_first_kernel",
        "_channel_mlp_backward_norm_kernel", "_channel_mlp_backward_second_kernel",
        "_channel_mlp_hidden_kernel", "_channel_mlp_logits_kernel", "_pack_kernel",
        "_channel_mlp_backward_in_kernel", "_channel_mlp_backward_out_kernel",
        "_channel_mlp_kernel", "_conv_mlp_kernel", "_dilated_conv_backward_kernel",
        "_dilated_conv_kernel", "_gate_backward_reduce_kernel", "_gate_forward_kernel",
        "_input_gradient_kernel", "_merge_kernel", "_norm_backward_kernel",
        "_normalize_logits_kernel", "_pool_reduce_kernel", "_project_backward_kernel",
        "_project_kernel", "_sum_splits_kernel", "_update_running_kernel",
    }  # fmt: skip
    wrong = {(r.name, str(r.constants), *problems(r)): r for r in reports if problems(r)}
    told = [f"{problems(report)}\n{aot.format_table([report])}" for report in wrong.values()]
    assert not told, "\n".join(told)
    # Widths are of accesses to x that are there at all.
    for name, maps in (
        ("_gate_forward_kernel", {"x", "out"}),
        ("_gate_backward_reduce_kernel", {"x", "dout"}),
        ("_input_gradient_kernel", {"x", "dout", "dx"}),
        ("_pool_reduce_kernel", {"x"}),
    ):
        for report in reports:
            if report.name == name:
                assert maps <= set(report.accesses)
                assert all(a.load_bits or a.store_bits for a in map(report.accesses.get, maps))


def test_squeeze_excite():
    """Its gate, which computes the MLP for itself."""
    code = CODE.replace(
        "bam_kernels.BAM(size[1], preset=preset,", "bam_kernels.SqueezeExcite(size[1],"
    )
    variants = [
        (name, True, size, layout, "paper", "inference")
        for name in ("float16", "float32")
        for size in (SITES[0], (2, *SITES[2][1:]))
        for layout in (NCHW, LAST)
    ]
    reports = aot.reports_in_subprocess(code.format(target="sm_90", variants=variants))
    assert "_mlp_gate_kernel" in {report.name for report in reports}
    assert [aot.format_table([report]) for report in reports if problems(report)] == []


def test_double_precision_compiles_without_spills():
    variants = [("float64", True, SITES[0], NCHW, "paper", mode)
                for mode in ("training", "inference")]  # fmt: skip
    reports = compiled("sm_90", variants)
    assert len(reports) >= 20
    assert [report for report in reports if report.spill_bytes] == []
