"""The one table of tolerances, and how an error is measured: norm(a - b) / norm(b) in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

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


def peer_bound(elements: int) -> float:
    """What one draw's error may be of eager's: `PEER`, and three standard deviations of the ratio
    of two root mean squares over so many elements."""
    return PEER * (1 + 3 / math.sqrt(elements))


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


def exact(dtype: torch.dtype) -> float:
    """The relative error up to which a result is as good as its dtype lets it be, whatever eager's.

    One correct rounding; in float32 three: of products, of their sum in parts, of the sum of the
    parts. There sums are taken in the result's own precision, and whether eager is off by half a
    rounding or by two goes by its library's order of summation. Half types' sums are taken in
    float32: one rounding, the last, is all that shows.
    """
    return (3 if dtype == torch.float32 else 1) * rounding(dtype)


def assert_parity(name: str, ours: Tensor, truth: Tensor, eager: Tensor | None = None) -> None:
    """Ours is within the table's tolerance of the truth, and near the eager error where given.

    Args:
        name: what is compared, for the message.
        ours: the result under test; its dtype picks the tolerance.
        truth: the float64 result.
        eager: the plain PyTorch result in ours' dtype; in float64 it is the truth itself. What
            is `exact` is always allowed: eager may hit the truth by luck.
    """
    error = relative_error(ours, truth)
    bound = PARITY[ours.dtype]
    assert error <= bound, (
        f"{name}: relative error {error:.2e} against float64, at most {bound:.0e}"
    )
    comparable = ours.dtype != torch.float64 and ours.numel() >= PEER_ELEMENTS
    if eager is not None and comparable:
        own = peer_bound(ours.numel()) * relative_error(eager, truth)
        own = max(own, exact(ours.dtype))
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


def by_layer(found: Mapping[str, Tensor], lone: Callable[[str], bool]) -> dict[str, Tensor]:
    """The tensors of a layer whose keys are `lone` as one vector, under the layer's key.

    Alone, a bias in front of batch statistics has a gradient of rounding only, and an update that
    an optimizer makes of it; and a single number may come as close to zero as it likes.
    """
    parts: dict[str, list[Tensor]] = {}
    for key, value in found.items():
        parts.setdefault((lone(key) and key.rpartition(".")[0]) or key, []).append(value.flatten())
    return {key: torch.cat(values) for key, values in parts.items()}


class Sway:
    """How far the truth itself moves when every input and parameter is rounded once to `dtype`.

    What a computation without a fault may be off by as well, within the growth that its own
    roundings add: the condition of a sum that cancels, of a gate that saturates.
    """

    DRAWS = 4
    GROWTH = 8.0

    def __init__(self, again: Callable[[], dict[str, Tensor]], want: dict[str, Tensor]) -> None:
        self._again, self._want = again, want
        self._largest: dict[str, float] | None = None

    def bound(self, name: str) -> float:
        """Of one tensor's relative error; the first call runs the truth a few times more."""
        if self._largest is None:
            draws = [self._again() for _ in range(self.DRAWS)]
            self._largest = {
                key: max(relative_error(each[key], b) for each in draws)
                for key, b in self._want.items()
                if b.is_floating_point() and b.norm() > 0
            }
        return self.GROWTH * self._largest[name]


def rounded_anew(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A float64 tensor whose values are off by up to one rounding to dtype."""
    return value * (1 + rounding(dtype) * (2 * torch.rand_like(value) - 1))


def with_rounded_parameters(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a float64 module, without gradients, its parameters off by up to one rounding."""
    module = copy.deepcopy(module)
    module.zero_grad()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(rounded_anew(parameter, dtype))
    return module


class Errors:
    """Errors of several draws, against the table and beside eager's.

    Outputs, input gradients and statistics: each draw within the table, and their root mean square
    beside eager's. Parameters' gradients (`together`): the geometric mean over all of them and all
    draws within the table and beside eager's, and each within `LONE` times the table or what
    rounding alone moves the truth by (`Sway`). One bias is a sum over the whole map, behind batch
    norms that amplify rounding; the relative error of a single one has a tail of a decade and more,
    in eager as well.
    """

    LONE = 20.0

    def __init__(self) -> None:
        self._single: dict[str, list[tuple[float, float, torch.dtype]]] = {}
        self._together: list[tuple[float, float, torch.dtype, float]] = []

    def add(
        self,
        name: str,
        ours: Tensor,
        truth: Tensor,
        eager: Tensor,
        sway: Sway,
        together: bool = False,
    ) -> None:
        """One tensor of one draw; the table holds where eager itself meets it."""
        error, own = relative_error(ours, truth), relative_error(eager, truth)
        table = PARITY[ours.dtype]
        bound = max(self.LONE * table, 4 * own) if together else max(table, 2 * PEER * own)
        # Half types leave a lone gradient no digits to compare; its mean with the others has some.
        if not (together and ours.dtype.itemsize == 2):
            if error > bound and name.startswith("d"):
                bound = max(bound, sway.bound(name))
            assert error <= bound, f"{name}: relative error {error:.2e}, at most {bound:.1e}"
        if together:
            weight = min(ours.numel(), PEER_ELEMENTS) / PEER_ELEMENTS
            self._together.append((error, own, ours.dtype, weight))
        else:
            self._single.setdefault(name, []).append((error, own, ours.dtype))

    def draws(self, count: int, peers: bool = True) -> Iterator[int]:
        """`count` draws to `add`, and what their means must be. Beside eager, which takes several,
        a miss of so few may be luck: then it is the means of five times as many that count."""
        yield from range(count)
        if peers and self._misses(peers):
            yield from range(count, 5 * count)
        self.check(peers)

    def check(self, peers: bool = True) -> None:
        """The means over the draws; with `peers` also beside eager."""
        misses = self._misses(peers)
        assert not misses, "; ".join(misses)

    def _misses(self, peers: bool) -> list[str]:
        found = []
        for name, entries in self._single.items():
            dtype = entries[0][2]
            ours, eager = ((sum(e[i] ** 2 for e in entries) / len(entries)) ** 0.5 for i in (0, 1))
            bound = max(PEER * eager, exact(dtype))
            if peers and dtype != torch.float64 and not ours <= bound:
                found.append(f"{name}: RMS relative error {ours:.2e}, at most {bound:.2e}")
        if not self._together:
            return found
        dtype = self._together[0][2]
        # A tensor of few numbers says little of how exact a computation is: it counts for less.
        total = sum(e[3] for e in self._together)
        ours, eager = (
            math.exp(sum(e[3] * math.log(max(e[i], 1e-18)) for e in self._together) / total)
            for i in (0, 1)
        )
        bound = max(PEER * eager, exact(dtype))
        if not peers or dtype == torch.float64:  # eager is the truth there
            bound = PARITY[dtype]
        bound = min(bound, max(PARITY[dtype], PEER * eager))
        if not ours <= bound:
            found.append(
                f"parameters' gradients: mean relative error {ours:.2e}, at most {bound:.2e}"
            )
        return found
