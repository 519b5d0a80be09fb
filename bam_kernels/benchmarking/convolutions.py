"""Our dilated convolutions or the library's: what the cost model says, a prediction.

Ours save launches and bytes: the norms, ReLUs, the projection and the channel MLP go along. The
library's (cuDNN's) may come closer to the arithmetic peak. So the question is put as a bar: which
share of the peak must ours reach for the module to be no slower than with convolutions of the
library at all of it? A bar far below what any tiled matrix product reaches is no risk; one close to
1 is.
"""

from __future__ import annotations

from bam_kernels.benchmarking import cost
from bam_kernels.benchmarking.cost import Machine
from bam_kernels.benchmarking.sites import TRAINING, Case

# Dense 10^12 operations a second with fp32 accumulation. NVIDIA's data sheets of the H200 and H100
# SXM, A100 and L4, whose figures for sparse matrices are halved, and its Ada whitepaper's of the
# GeForce RTX 4090.
PEAKS = {
    "H200": {"float16": 989.5, "tf32": 494.7, "ieee": 67.0},
    "H100": {"float16": 989.5, "tf32": 494.7, "ieee": 67.0},
    "A100": {"float16": 312.0, "tf32": 156.0, "ieee": 19.5},
    "RTX 4090": {"float16": 165.2, "tf32": 82.6, "ieee": 82.6},
    "L4": {"float16": 121.0, "tf32": 60.0, "ieee": 30.3},
}


def operations(case: Case, reduction: int = 16, convs: int = 2) -> int:
    """Of the 3x3 convolutions, a multiplication and an addition each: 2 * 9 * h^2 a position, and
    three times that in a training step, whose backward makes two products of as many."""
    n, c, h, w = case.shape.size
    hidden = c // reduction
    forward = convs * 2 * 9 * hidden * hidden * n * h * w
    return 3 * forward if case.mode == TRAINING else forward


def break_even(case: Case, machine: Machine, precision: str, reduction: int = 16) -> float:
    """The share of the peak from which on our convolutions are the better choice, 0 to 1.

    Args:
        case: a map, and whether it is inference or training.
        machine: one of `bam_kernels.benchmarking.cost.MACHINES`.
        precision: of the products: "float16", "tf32" or "ieee".
        reduction: of the module.

    Raises:
        ValueError: a precision that has no peak.
    """
    peaks = PEAKS[machine.name]
    if precision not in peaks:
        raise ValueError(f"precision: expected one of {', '.join(peaks)}, got {precision!r}")
    ours, library = (cost.cost(case, kind, reduction) for kind in (cost.OURS, cost.LIBRARY))
    saved = library.predicted_us(machine) - ours.predicted_us(machine)
    at_peak = operations(case, reduction) / peaks[precision] / 1e6
    return min(1.0, at_peak / (at_peak + saved)) if saved > 0 else 1.0
