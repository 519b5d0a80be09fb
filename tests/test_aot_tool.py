"""The ahead-of-time compiler against toy kernels whose machine code is known in outline."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bam_kernels.testing import aot

_REASON = aot.is_available(in_subprocess=True)
needs_compiler = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))

_PREAMBLE = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
import aot_toys as toys
from bam_kernels.testing.aot import compile_only

def meta(*shape, dtype=torch.float16):
    return torch.empty(shape, device="meta", dtype=dtype)

f32 = torch.float32
"""

# In the order of the launches, one per name.
_LAUNCHES = {
    "copy_fp16": "toys.copy(meta(4096))",
    "copy_fp32": "toys.copy(meta(4096, dtype=f32))",
    "copy_odd_length": "toys.copy(meta(4097))",
    "copy_unaligned_view": "toys.copy(meta(4097)[1:])",
    "rows": "toys.scale_rows(meta(8, 1024, dtype=f32))",
    "rows_odd_stride": "toys.scale_rows(meta(8, 1025, dtype=f32))",
    "loop": "toys.sum_blocks(meta(8192))",
    "spill": "toys.spill(meta(16384, dtype=f32))",
    "dot": "toys.dot(meta(64, 256), meta(256, 64))",
    "dot_deep": "toys.dot(meta(128, 512), meta(512, 128), num_stages=4)",
    "gather": "toys.gather(meta(1024, dtype=f32), meta(1024), 8)",
    "gather_one": "toys.gather(meta(1024, dtype=f32), meta(1024), 1)",
    "copy_again": "toys.copy(meta(4096))",
}


@pytest.fixture(scope="module")
def compiled():
    """{(target, name): report} of all launches."""
    launches = "\n        ".join(_LAUNCHES.values())
    code = f"""{_PREAMBLE}
reports = []
for target in ("sm_80", "sm_90"):
    with compile_only(target) as found:
        {launches}
    reports += found
"""
    reports = aot.reports_in_subprocess(code)
    names = [(target, name) for target in ("sm_80", "sm_90") for name in _LAUNCHES]
    return dict(zip(names, reports, strict=True))


@pytest.fixture(params=["sm_80", "sm_90"])
def on(request, compiled):
    """{name: report} of all launches on one target."""
    return {name: report for (target, name), report in compiled.items() if target == request.param}


@needs_compiler
@pytest.mark.parametrize("name, dtype", [("copy_fp16", "fp16"), ("copy_fp32", "fp32")])
def test_a_vector_copy_is_128_bits_wide(on, name, dtype):
    report = on[name]
    assert report.name == "copy_kernel"
    assert report.signature == {"x": f"*{dtype}", "out": f"*{dtype}", "n": "i32"}
    assert report.constants == {"BLOCK": 1024}
    assert report.divisible_by_16 == ("x", "out", "n")
    assert (report.num_warps, report.num_stages) == (4, 3)
    assert report.accesses == {
        "x": aot.Access(load_bits=frozenset({128})),
        "out": aot.Access(store_bits=frozenset({128})),
    }
    assert 8 <= report.registers <= 64
    assert (report.spill_bytes, report.stack_bytes, report.shared_bytes) == (0, 0, 0)


@needs_compiler
def test_a_misaligned_size_loses_the_width(on):
    # The mask changes within any group of elements.
    assert on["copy_odd_length"].accesses["x"].load_bits == {16}
    assert on["copy_odd_length"].accesses["out"].store_bits == {16}


@needs_compiler
def test_a_misaligned_view_loses_only_its_own_width(on):
    assert on["copy_unaligned_view"].divisible_by_16 == ("out", "n")
    assert on["copy_unaligned_view"].accesses["x"].load_bits == {16}
    assert on["copy_unaligned_view"].accesses["out"].store_bits == {128}


@needs_compiler
def test_a_misaligned_row_stride_loses_only_its_own_pointers_width(on):
    assert on["rows"].accesses["x"].load_bits == {128}
    assert on["rows"].accesses["scale"].load_bits == {32}
    assert on["rows_odd_stride"].divisible_by_16 == ("x", "scale", "out")
    assert on["rows_odd_stride"].accesses["x"].load_bits == {32}
    assert on["rows_odd_stride"].accesses["out"].store_bits == {128}


@needs_compiler
def test_a_loop_carried_pointer_and_atomics_are_followed(on):
    assert on["loop"].accesses["x"] == aot.Access(load_bits=frozenset({128}))
    out = on["loop"].accesses["out"]
    assert out.atomic_bits and not out.load_bits and not out.store_bits


@needs_compiler
def test_spills_are_counted(on):
    report = on["spill"]
    assert report.num_warps == 1
    assert report.local_store_bytes > 0 and report.local_load_bytes > 0
    assert report.spill_bytes == report.local_store_bytes + report.local_load_bytes
    assert report.stack_bytes > 0


@needs_compiler
def test_a_pipelined_dot_uses_shared_memory_and_asynchronous_copies(on):
    report = on["dot"]
    assert report.shared_bytes >= 2 * 64 * 64 * 2  # a tile of a and of b, fp16
    assert report.fits_shared
    assert report.accesses["a"].load_bits == report.accesses["b"].load_bits == {128}
    assert on["dot_deep"].num_stages == 4
    assert on["dot_deep"].shared_bytes > report.shared_bytes


@needs_compiler
def test_arguments_that_are_no_parameters_of_the_machine_code(on):
    report = on["gather"]
    assert list(report.signature) == ["a", "b", "out", "pair.0", "pair.1", "n"]
    assert report.constants == {"optional": None, "USE": True, "BLOCK": 1024}
    widths = {name: (set(a.load_bits), set(a.store_bits)) for name, a in report.accesses.items()}
    wide = ({128}, set())  # the chosen pointer may be either
    assert widths["a"] == widths["b"] == wide
    assert widths["out"] == (set(), {128})
    assert widths["pair.0"][0] and not widths["pair.0"][1]
    assert widths["pair.1"][1] and not widths["pair.1"][0]
    one = on["gather_one"]
    assert one.constants["n"] == 1 and "n" not in one.signature
    assert one.accesses["b"] == aot.Access()


@needs_compiler
def test_a_repeated_launch_is_reported_again(on):
    assert on["copy_again"] == on["copy_fp16"]


@needs_compiler
def test_targets_compile_separately(compiled):
    assert all(report.target == target for (target, _), report in compiled.items())
    dot_80, dot_90 = compiled["sm_80", "dot"], compiled["sm_90", "dot"]
    assert (dot_80.registers, dot_80.shared_bytes) != (dot_90.registers, dot_90.shared_bytes)


@needs_compiler
def test_reports_survive_json_and_make_a_table(compiled):
    reports = list(compiled.values())
    assert [aot.KernelReport.from_json(r.to_json()) for r in reports] == reports
    lines = aot.format_table(reports).splitlines()
    assert len(lines) == 1 + len(reports)
    assert "x:128/- out:-/128" in lines[1] and "sm_80" in lines[1]


@needs_compiler
def test_an_amd_target_compiles():
    code = f"""{_PREAMBLE}
with compile_only("gfx942") as reports:
    toys.copy(meta(4096))
    toys.dot(meta(64, 256), meta(256, 64))
"""
    copy, dot = aot.reports_in_subprocess(code)
    assert copy.target == "gfx942" and copy.registers > 0 and copy.spill_bytes == 0
    assert dot.shared_bytes > 0
    assert copy.accesses == {}


@needs_compiler
def test_the_driver_and_the_jit_are_restored_and_contexts_do_not_nest():
    code = f"""{_PREAMBLE}
import triton
from triton.runtime import driver
from triton.runtime.jit import JITFunction
before = driver._active, JITFunction.run
reports = []
try:
    with compile_only("sm_80"):
        try:
            with compile_only("sm_90"):
                pass
        except RuntimeError as error:
            assert "nest" in str(error)
        else:
            raise AssertionError("contexts nested")
        raise KeyError
except KeyError:
    pass
assert (driver._active, JITFunction.run) == before
try:
    with compile_only("sm_80") as found:
        toys.copy_kernel[(1,)](meta(8), meta(8), 8, BLOCK=7)  # not a power of two
except triton.compiler.errors.CompilationError:
    pass
else:
    raise AssertionError("the compiler's error was lost")
assert (driver._active, JITFunction.run) == before and found == []
"""
    assert aot.reports_in_subprocess(code) == []


@needs_compiler
def test_a_failing_process_is_an_error_with_its_output():
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        aot.reports_in_subprocess("reports = [1 / 0]")


@needs_compiler
def test_the_interpreter_makes_it_unavailable(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET" in aot.is_available()
    assert aot.is_available(in_subprocess=True) is None
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), aot.compile_only("sm_80"):
        pass


def test_importing_the_module_does_not_import_triton():
    # Loaded from its file, so that what the package itself imports does not matter.
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("aot", {aot.__file__!r})
sys.modules["aot"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert "triton" not in sys.modules and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ), timeout=60)


_PTX = """
.version 8.7
.target sm_90a
.address_size 64
.extern .func  (.param .b32 func_retval0) vprintf
(
	.param .b64 vprintf_param_0
)
;
.visible .entry toy(
	.param .u64 .ptr .global .align 1 toy_param_0,
	.param .u64 .ptr .global .align 1 toy_param_1,
	.param .u32 toy_param_2,
	.param .u64 .ptr .global .align 1 toy_param_3
)
.reqntid 128
{
	.reg .pred 	%p<4>;
	.loc	1 10 5
	ld.param.b64 	%rd1, [toy_param_0];
	ld.param.b64 	%rd2, [toy_param_1]; // a comment; with ld.global.b8 %r1, [%rd1];
$L__tmp0:
	ld.param.b64 	%rd3, [toy_param_3];
	cvta.to.global.u64 	%rd4, %rd1;
	mad.wide.s32 	%rd5, %r1, 2, %rd4;
	setp.eq.b64 	%p1, %rd1, 0;
	selp.b64 	%rd20, %rd2, 0, %p1;
	mov.b64 	%rd7, %rd6;
	{ .reg .b64 t; add.s64 t, %rd5, 16; mov.u64 %rd6, t; }
	// begin inline asm
	.reg .pred q; @!%p1 ld.global.L1::evict_last.L2::cache_hint.v4.b32
		{%r2, %r3, %r4, %r5}, [ %rd7 + 0 ], %rd9;
	// end inline asm
	@%p2 ld.global.nc.v2.b64 	{%rd30, %rd31}, [%rd7+16];
	ld.volatile.global.b16 	%rs1, [%rd6];
	cp.async.cg.shared.global [ %r7 + 0 ], [ %rd20 + 0 ], 0x10, %r8;
	cp.async.ca.shared.global.L2::cache_hint [%r7], [%rd20], 4, %rd9;
	ld.shared.v4.b32 {%r2, %r3, %r4, %r5}, [%r7];
	st.global.v8.b32 	[%rd2], {%r1, %r2, %r3, %r4, %r5, %r6, %r7, %r8};
	st.global.bf16x2 	[%rd2], %r1;
$L__BB0_1:	@%p1 red.global.gpu.relaxed.add.v2.f32 	[%rd2], {%f1, %f2};
	atom.global.gpu.acq_rel.add.noftz.f16x2 	%r1, [%rd2], %r2;
	st.global.b8 	[%rd3], %rs1;
	ld.b32 	%r1, [%rd1];
	st.global.b64 	[%rd99], %rd1;
	ret;
}
	.section	.debug_str
	{
$L__info_string0:
.b8 116
	}
"""


def test_widths_are_read_from_every_form_of_access():
    accesses = aot._accesses(_PTX, ["x", "y", "n"], ["x", "y"])
    assert accesses == {
        "x": aot.Access(load_bits=frozenset({128, 16, 32})),
        "y": aot.Access(frozenset({128, 32}), frozenset({256, 32}), frozenset({64, 32})),
        "<scratch0>": aot.Access(store_bits=frozenset({8})),
        aot.UNKNOWN: aot.Access(store_bits=frozenset({64})),
    }
