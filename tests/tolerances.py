"""The one table of tolerances, and how an error is measured: norm(a - b) / norm(b) in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

PARITY = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
}
"""Largest relative error against float64, of outputs and gradients."""

PEER = 1.5
"""An error may be at most this many times the eager module's own in the same dtype."""

PEER_ELEMENTS = 32
"""With fewer elements the ratio of two rounding errors is a lottery; `Errors` gathers draws."""


def relative_error(a: Tensor, b: Tensor) -> float:
    """norm(a - b) / norm(b); b is the reference. NaN or a wrong shape never passes."""
    assert a.shape == b.shape, f"shape {tuple(a.shape)}, expected {tuple(b.shape)}"
    a, b = a.detach().double(), b.detach().double()
    norm = b.norm().item()
    assert norm > 0, "the reference is zero: nothing is compared"
    return ((a - b).norm() / norm).item()


def rounding(dtype: torch.dtype) -> float:
    """The largest relative error of one correct rounding to dtype."""
    return torch.finfo(dtype).eps / 2


def assert_parity(name: str, ours: Tensor, truth: Tensor, eager: Tensor | None = None) -> None:
    """Ours is within the table's tolerance of the truth, and near the eager error where given.

    Args:
        name: what is compared, for the message.
        ours: the result under test; its dtype picks the tolerance.
        truth: the float64 result.
        eager: the plain PyTorch result in ours' dtype; in float64 it is the truth itself. One
            correct rounding is always allowed: eager may hit the truth by luck.
    """
    error = relative_error(ours, truth)
    bound = PARITY[ours.dtype]
    assert error <= bound, (
        f"{name}: relative error {error:.2e} against float64, at most {bound:.0e}"
    )
    comparable = ours.dtype != torch.float64 and ours.numel() >= PEER_ELEMENTS
    if eager is not None and comparable:
        own = max(PEER * relative_error(eager, truth), rounding(ours.dtype))
        assert error <= own, f"{name}: relative error {error:.2e}, at most {own:.2e} beside eager's"


def means_with_variances(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is compared of batch norms' buffers: a running mean of few numbers, which may cancel, as
    one vector with its variance. Rounding is relative to the values whose mean it is, and the ratio
    of the errors of so few is luck."""
    found = dict(found)
    means = [key for key in found if key.endswith("running_mean")]
    for key in [k for k in means if found[k].numel() < PEER_ELEMENTS]:
        spread = key.removesuffix("mean") + "var"
        found[spread] = torch.cat([found[spread], found.pop(key)])
    return found


class Errors:
    """Errors of several draws, against the table and beside eager's.

    Outputs, input gradients and statistics: each draw within the table, and their root mean square
    beside eager's. Parameters' gradients (`together`): the geometric mean over all of them and all
    draws within the table and beside eager's, and each within `LONE` times the table. One bias is
    a sum over the whole map, behind batch norms that amplify rounding; the relative error of a
    single one has a tail of a decade and more, in eager as well, and what a kernel does wrong shows
    at 1e-3.
    """

    LONE = 20.0

    def __init__(self) -> None:
        self._single: dict[str, list[tuple[float, float, torch.dtype]]] = {}
        self._together: list[tuple[float, float, torch.dtype]] = []

    def add(
        self, name: str, ours: Tensor, truth: Tensor, eager: Tensor, together: bool = False
    ) -> None:
        """One tensor of one draw; the table holds where eager itself meets it."""
        error, own = relative_error(ours, truth), relative_error(eager, truth)
        table = PARITY[ours.dtype]
        bound = max(self.LONE * table, 4 * own) if together else max(table, 2 * PEER * own)
        # Half types leave a lone gradient no digits to compare; its mean with the others has some.
        if not (together and ours.dtype.itemsize == 2):
            assert error <= bound, f"{name}: relative error {error:.2e}, at most {bound:.1e}"
        entries = self._together if together else self._single.setdefault(name, [])
        entries.append((error, own, ours.dtype))

    def check(self, peers: bool = True) -> None:
        """The means over the draws; with `peers` also beside eager, which takes several draws."""
        for name, entries in self._single.items():
            dtype = entries[0][2]
            ours, eager = ((sum(e[i] ** 2 for e in entries) / len(entries)) ** 0.5 for i in (0, 1))
            bound = max(PEER * eager, rounding(dtype))
            if peers and dtype != torch.float64:
                assert ours <= bound, f"{name}: RMS relative error {ours:.2e}, at most {bound:.2e}"
        if not self._together:
            return
        dtype = self._together[0][2]
        ours, eager = (
            math.exp(sum(math.log(max(e[i], 1e-18)) for e in self._together) / len(self._together))
            for i in (0, 1)
        )
        bound = max(PEER * eager, rounding(dtype))
        if not peers or dtype == torch.float64:  # eager is the truth there
            bound = PARITY[dtype]
        text = f"parameters' gradients: mean relative error {ours:.2e}, at most {bound:.2e}"
        assert ours <= bound, text
        assert ours <= max(PARITY[dtype], PEER * eager), text
