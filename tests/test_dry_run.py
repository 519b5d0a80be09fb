"""What a dry run says of launches and bytes, against the meter, which runs the kernels."""

from __future__ import annotations

import pytest
import torch

import bam_kernels
from bam_kernels import reference
from bam_kernels.testing.dry_run import dry_run
from bam_kernels.testing.traffic import Traffic, measure

NCHW, LAST = torch.contiguous_format, torch.channels_last

# [N, C, H, W], dtype, layout, options: wide and narrow hidden layers, maps of one tile and of many,
# half types, both presets, and each kind of module.
CASES = (
    ((4, 256, 14, 28), torch.float32, NCHW, {}),
    ((4, 256, 14, 28), torch.float16, LAST, {"preset": "official"}),
    ((2, 512, 14, 10), torch.float16, NCHW, {"preset": "official"}),
    ((2, 512, 7, 7), torch.float32, LAST, {}),
    ((1, 1024, 14, 14), torch.float32, NCHW, {}),
    ((2, 1024, 7, 9), torch.bfloat16, LAST, {"preset": "official"}),
    ((3, 100, 9, 11), torch.float32, NCHW, {"preset": "official"}),
    ((3, 100, 9, 11), torch.float32, LAST, {"num_dilated": 0}),
    ((2, 128, 20, 24), torch.float32, NCHW, {"reduction": 4, "num_dilated": 3}),
    ((8, 64, 9, 9), torch.float64, NCHW, {"num_dilated": 1, "combine": "max"}),
    ((4, 256, 14, 14), torch.float32, LAST, {"channel": False}),
    ((4, 256, 14, 14), torch.float16, NCHW, {"spatial": False}),
)


def traffic_of(context, package, shape, dtype, layout, options, device, frozen=False):
    """By phase, what runs inside `context`."""
    reduction = options.get("reduction", 16)
    rest = {name: value for name, value in options.items() if name != "reduction"}
    module = package.BAM(shape[1], reduction, dtype=dtype, device=device, **rest)
    module.requires_grad_(not frozen)
    x = torch.randn(shape, dtype=dtype, device=device).contiguous(memory_format=layout)
    x.requires_grad_()
    module.train(shape[0] > 1 and not frozen)
    found: dict[str, Traffic] = {}
    with context() as found["forward"]:
        out = module(x)
    dout = torch.randn_like(out)
    with context() as found["backward"]:
        out.backward(dout)
    module.eval()
    with torch.no_grad(), context() as found["inference"]:
        module(x)
    return found


def metered():
    return measure(strict=True)


def names_of(traffic):
    return [getattr(event, "kernel", getattr(event, "name", "")) for event in traffic.events]


def moved(traffic, side):
    """Bytes of each event that went this way, each address once a launch."""
    return [sum(getattr(t, side) for t in e.tensors.values()) for e in traffic.events]


def without_copies(traffic):
    return Traffic([e for e in traffic.events if getattr(e, "name", "") != "aten.copy_.default"])


SIDES = ("distinct_read_bytes", "distinct_written_bytes")


@pytest.mark.parametrize("frozen", (False, True), ids=("trained", "frozen"))
@pytest.mark.parametrize(("shape", "dtype", "layout", "options"), CASES)
def test_fused(shape, dtype, layout, options, frozen):
    """Every launch the meter's: its kernel, its grid, and its bytes to 2 %."""
    case = (shape, dtype, layout, options)
    dry = traffic_of(dry_run, bam_kernels, *case, "meta", frozen)
    with bam_kernels.use_backend("triton"):
        real = traffic_of(metered, bam_kernels, *case, "cpu", frozen)
    for phase, expected in real.items():
        told = dry[phase]
        assert names_of(told) == names_of(expected), phase
        grids, others = ([launch.grid for launch in t.launches] for t in (told, expected))
        assert grids == others, phase
        for side in SIDES:
            assert sum(moved(told, side)) == pytest.approx(sum(moved(expected, side)), rel=0.02)
            pairs = zip(moved(told, side), moved(expected, side), strict=True)
            for name, (a, b) in zip(names_of(told), pairs, strict=True):
                assert a == pytest.approx(b, rel=0.02, abs=64), (phase, side, name)


@pytest.mark.parametrize(("shape", "dtype", "layout", "options"), CASES)
def test_eager(shape, dtype, layout, options):
    """As many operators as the meter's, and their bytes in all to 2 %."""
    case = (shape, dtype, layout, options)
    dry = traffic_of(dry_run, reference, *case, "meta")
    real = traffic_of(metered, reference, *case, "cpu")
    for phase, expected in real.items():
        # The CPU's convolution backward makes a gradient dense first, by a copy of its own.
        told, expected = map(without_copies, (dry[phase], expected))
        assert len(told.events) == len(expected.events), phase
        for side in SIDES:
            assert sum(moved(told, side)) == pytest.approx(sum(moved(expected, side)), rel=0.02)


def test_unknown_kernel_is_refused(monkeypatch):
    """A kernel whose pointers are not in the table would be counted wrongly."""
    from bam_kernels.testing import dry_run as module

    monkeypatch.delitem(module._WRITTEN, "_gate_forward_kernel")
    x = torch.empty(2, 16, 4, 4, device="meta")
    with dry_run(), pytest.raises(RuntimeError, match="_gate_forward_kernel"):
        bam_kernels.functional.gate(x, torch.empty(2, 16, device="meta"), None)


def test_nothing_stays_patched():
    x = torch.empty(2, 16, 4, 4, device="meta")
    with dry_run() as traffic:
        bam_kernels.BAM(16, device="meta").eval().requires_grad_(False)(x)
    count = len(traffic.events)
    assert count > 0
    bam_kernels.BAM(16, device="meta").eval()(x)
    assert len(traffic.events) == count
    assert bam_kernels.explain(bam_kernels.BAM(16, device="meta"), x).backend == "reference"
