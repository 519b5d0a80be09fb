"""The prediction of where our dilated convolutions pay, against sums written out here."""

from __future__ import annotations

import math

import pytest

from bam_kernels.benchmarking import convolutions, cost
from bam_kernels.benchmarking.sites import INFERENCE, TRAINING

SIZE = (32, 512, 14, 28)


def test_operations():
    """Two convolutions of 9 taps, h inputs and h outputs; thrice as many in a training step."""
    case = cost.case_of(SIZE, "float16", "nchw", INFERENCE)
    assert convolutions.operations(case) == 2 * 2 * 9 * 32**2 * 32 * 14 * 28
    step = cost.case_of(SIZE, "float16", "nchw", TRAINING)
    assert convolutions.operations(step, reduction=8, convs=3) == 3 * 3 * 2 * 9 * 64**2 * 12544


def test_the_library_branch_is_pytorchs():
    """Its convolutions and norms are operators; pooling, MLP and gate stay kernels."""
    case = cost.case_of(SIZE, "float16", "channels_last", INFERENCE)
    (library,) = cost.traffic(case, cost.LIBRARY).values()
    names = [getattr(event, "name", None) or event.kernel for event in library.events]
    assert sum("convolution" in name for name in names) == 3  # the two and the projection
    assert any("pool_reduce" in name for name in names) and any("gate" in name for name in names)
    ours = cost.cost(case)
    found = cost.summarize(case.shape, {INFERENCE: library})
    assert found.launches > ours.launches and found.moved_bytes > ours.moved_bytes


def test_break_even():
    """At the break-even share both ways take the same time."""
    case = cost.case_of(SIZE, "float32", "channels_last", INFERENCE)
    for machine in cost.MACHINES:
        for precision, peak in convolutions.PEAKS[machine.name].items():
            share = convolutions.break_even(case, machine, precision)
            assert 0 < share <= 1
            arithmetic = convolutions.operations(case) / peak / 1e6
            ours = cost.cost(case).predicted_us(machine) + arithmetic / share
            library = cost.cost(case, cost.LIBRARY).predicted_us(machine) + arithmetic
            assert share == 1 or math.isclose(ours, library, rel_tol=1e-9)


def test_bad_input():
    case = cost.case_of(SIZE, "float32", "nchw", INFERENCE)
    with pytest.raises(ValueError, match="precision: expected one of float16, tf32, ieee, got 'x'"):
        convolutions.break_even(case, cost.MACHINES[0], "x")
