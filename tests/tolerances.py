"""The one table of tolerances, and how an error is measured: norm(a - b) / norm(b) in float64."""

from __future__ import annotations

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


def assert_parity(
    name: str, ours: Tensor, truth: Tensor, eager: Tensor | None = None, factor: float = 1.0
) -> None:
    """Ours is within the table's tolerance of the truth, and near the eager error where given.

    Args:
        name: what is compared, for the message.
        ours: the result under test; its dtype picks the tolerance.
        truth: the float64 result.
        eager: the plain PyTorch result in ours' dtype; in float64 it is the truth itself. One
            correct rounding is always allowed: eager may hit the truth by luck.
        factor: of the table's tolerance.
    """
    error = relative_error(ours, truth)
    bound = PARITY[ours.dtype] * factor
    assert error <= bound, (
        f"{name}: relative error {error:.2e} against float64, at most {bound:.0e}"
    )
    comparable = ours.dtype != torch.float64 and ours.numel() >= PEER_ELEMENTS
    if eager is not None and comparable:
        own = max(PEER * relative_error(eager, truth), rounding(ours.dtype))
        assert error <= own, f"{name}: relative error {error:.2e}, at most {own:.2e} beside eager's"


class Errors:
    """Errors of several draws: each within the table, their root mean square beside eager's.

    For small tensors and long chains (batch statistics of five samples), where the ratio of two
    rounding errors of one draw says little.
    """

    def __init__(self) -> None:
        self._squares: dict[str, list[tuple[float, float, torch.dtype]]] = {}

    def add(
        self, name: str, ours: Tensor, truth: Tensor, eager: Tensor, together: bool = False
    ) -> None:
        """One draw. The table holds where eager meets it: past that the inputs' own rounding,
        amplified by batch statistics and by sums that cancel, is what either one shows.

        With `together` the ratio to eager is taken over all tensors that say so: a single bias is
        a sum over the whole map, and the ratio of two such rounding errors has a long tail.
        """
        error, own = relative_error(ours, truth), relative_error(eager, truth)
        bound = max(PARITY[ours.dtype], 2 * PEER * own)
        assert error <= bound, f"{name}: relative error {error:.2e}, at most {bound:.1e}"
        entries = self._squares.setdefault("all of them" if together else name, [])
        entries.append((error, own, ours.dtype))

    def check(self) -> None:
        """The root mean square error is at most PEER times eager's, or one correct rounding."""
        for name, entries in self._squares.items():
            dtype = entries[0][2]
            if dtype == torch.float64:
                continue
            ours, eager = ((sum(e[i] ** 2 for e in entries) / len(entries)) ** 0.5 for i in (0, 1))
            bound = max(PEER * eager, rounding(dtype))
            assert ours <= bound, f"{name}: RMS relative error {ours:.2e}, at most {bound:.2e}"
