"""bfloat16 inference on matrix units (Intel AMX), against float64 and beside eager; skipped where
the processor has none. Its hidden maps are bfloat16, as eager's are; the vectors' are float32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import PRESETS, make_map, name
from kinks import without_kinks
from test_cpp_parity import CPU, F64, compare, cpp, threads  # noqa: F401 - a fixture of all tests
from test_module import randomize, twin
from tolerances import PEER, relative_error

from bam_kernels import BAM

BF16 = torch.bfloat16
SHAPES = ((3, 64, 7, 9), (2, 64, 1, 1), (2, 64, 3, 40), (1, 64, 17, 33), (3, 64, 16, 16))
LAYOUTS = ("nchw", "channels_last", "sliced", "sliced_channels_last")


@pytest.fixture(autouse=True)
def units(cpp) -> Iterator[None]:  # noqa: F811
    if not torch.ops.bam_kernels_cpp.set_isa("amx"):
        pytest.skip("this processor has no matrix units")
    try:
        yield
    finally:
        torch.ops.bam_kernels_cpp.set_isa("auto")


# Rows below, at and above a tile's 16 positions; blocks of 256 positions with a tail; one pixel.
@pytest.mark.parametrize("shape", SHAPES, ids=name)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("preset", PRESETS)
def test_shapes(preset, layout, shape, seed):
    for count in (1, 2, 3):
        with threads(count):
            make = lambda: BAM(64, 2, preset=preset, dtype=BF16)  # noqa: E731
            compare(make, shape, BF16, layout, "inference", 2)


def check_map_alone(channels, reduction, shape, layout="nchw", **options):
    """Nothing beside the hidden maps in the output, which any fault in them then shows in."""
    options = {"channel": False, "residual": False, "norm_final": False} | options
    module = randomize(BAM(channels, reduction, dtype=BF16, **options)).eval()
    x = make_map(shape, BF16, CPU, layout)
    with torch.inference_mode():
        found, again = module(x), module(x)
        eager, want = twin(module, BF16)(x), twin(module, F64)(x.double())
        torch.ops.bam_kernels_cpp.set_isa("avx512")
        vectors = module(x)
        torch.ops.bam_kernels_cpp.set_isa("amx")
    assert torch.equal(found, again)
    assert not torch.equal(found, vectors), "the matrix units did not run"
    assert relative_error(found, want) <= PEER * relative_error(eager, want)


# Channels in whole tiles, not, odd, in several blocks of 128; hidden widths likewise.
@pytest.mark.parametrize(
    ("channels", "reduction"), ((160, 16), (100, 4), (131, 4), (300, 9), (130, 1), (512, 8))
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("hidden_norm", (True, False))
def test_widths(hidden_norm, layout, channels, reduction, seed):
    for count in (1, 2, 3):
        with threads(count):
            for shape in ((3, channels, 6, 7), (1, channels, 5, 21), (1, channels, 9, 33)):
                check_map_alone(channels, reduction, shape, layout, norm_hidden=hidden_norm)


@pytest.mark.parametrize("num_dilated", (1, 2, 3))
@pytest.mark.parametrize("dilation", (1, 2, 5, 8, 60))
def test_dilations(dilation, num_dilated, seed):
    """Taps that stay inside the map, and taps that all but one lie in the padding."""
    options = {"dilation": dilation, "num_dilated": num_dilated}
    for size in ((7, 9), (3, 20), (20, 3), (16, 33)):
        for samples in (3, 2):  # in threads of their own, and the last one shared by two
            with threads(2):
                check_map_alone(40, 2, (samples, 40, *size), **options)


def test_parameters_in_float32(seed):
    """Under autocast a network of float32 takes a bfloat16 x: the weights are rounded to it."""
    module = without_kinks(randomize(BAM(64, 2))).eval()
    x = make_map((3, 64, 7, 9), BF16, CPU)
    with torch.inference_mode(), torch.autocast("cpu", BF16):
        found = module(x)
    assert found.dtype == BF16
    assert relative_error(found, twin(module, F64)(x.double())) <= 1e-2


def test_what_is_not_a_number_stays_where_it_is(seed):
    """Padded channels and columns of a tile take nothing of an infinity into the others."""
    module = without_kinks(randomize(BAM(72, 4, channel=False, dtype=BF16))).eval()
    x = make_map((2, 72, 12, 19), BF16, CPU)
    x[0, 3, 5, 5] = float("inf")
    with torch.inference_mode():
        found, want = module(x), twin(module, F64)(x.double())
    where = want.isfinite()
    assert torch.equal(found.isfinite(), where) and not where.all()
    assert relative_error(found[where], want[where]) <= 1e-2
