"""The C++ kernels' insides, one instruction set at a time, through the module of csrc/testing.

What is written lies between values that must stay, and what is read between NaN, which would show
in every sum; without that room, sanitizers watch the arrays' ends.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from cpp_testing import cpp_testing  # noqa: F401 - a fixture
from test_cpp_parity import ISAS, need_cpp, threads
from tolerances import PARITY, relative_error
from torch import Tensor

pytestmark = pytest.mark.once

WIDE = (torch.float32, torch.float64)
HALVES = (torch.float16, torch.bfloat16)
GUARD = 77
NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=ISAS)
def kernels(request: pytest.FixtureRequest, cpp_testing: ModuleType) -> Any:  # noqa: F811
    """The insides of one instruction set; skipped where the processor lacks it."""
    if request.param not in cpp_testing.instruction_sets:
        pytest.skip(f"this processor has no {request.param}")
    return cpp_testing.instruction_sets[request.param]


@pytest.fixture(params=WIDE, ids=("float32", "float64"))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def lanes(kernels: Any, dtype: torch.dtype) -> int:
    return kernels.float32_lanes if dtype == torch.float32 else kernels.float64_lanes


class Within:
    """A tensor with room around it along every axis, filled with one value."""

    def __init__(self, t: Tensor, fill: float, room: int = 3) -> None:
        self.fill = fill
        self.big = torch.full([n + 2 * room for n in t.shape], fill, dtype=t.dtype)
        self.where = tuple(slice(room, room + n) for n in t.shape)
        self.big[self.where] = t

    @property
    def tensor(self) -> Tensor:
        return self.big[self.where]

    def check(self) -> None:
        """Nothing beside the tensor was written."""
        rest = torch.ones_like(self.big, dtype=torch.bool)
        rest[self.where] = False
        assert (self.big[rest] == self.fill).all(), "memory beside the result was written"


def lines(kernel: Callable[..., None], *args: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """What a kernel on dense lines writes: all of its result, and nothing beside."""
    out = Within(torch.full_like(args[0], GUARD, dtype=dtype or args[0].dtype), GUARD)
    kernel(*(t.numpy() for t in args), out.tensor.numpy())
    out.check()
    return out.tensor.clone()


def test_the_instruction_sets_are_those_of_the_library(cpp_testing):  # noqa: F811
    need_cpp()
    try:
        found = {name for name in ISAS if torch.ops.bam_kernels_cpp.set_isa(name)}
    finally:
        torch.ops.bam_kernels_cpp.set_isa("auto")
    assert set(cpp_testing.instruction_sets) == found and "baseline" in found
    for name, kernels in cpp_testing.instruction_sets.items():
        assert kernels.name == name


@pytest.mark.parametrize("name", ("exp", "product", "narrow_float16"))
def test_arrays_of_another_type_or_size_are_refused(kernels, name):
    """Not converted into a copy, which would be written to in their place."""
    f32, f64 = np.ones(4, np.float32), np.ones(4, np.float64)
    bad = {
        "exp": [(f32, f64), (f32, f32[:3]), (f32[::2], f32[:2]), ([1.0], f32)],
        "narrow_float16": [(f32, f32), (f64, np.ones(4, np.uint16)), (f32, np.ones(3, np.uint16))],
        "product": [
            (np.ones((1, 2, 3)), np.ones((1, 4, 8)), np.ones((2, 8)), False),
            (np.ones((1, 2, 3)), np.ones((1, 3, 7)), np.ones((2, 7)), False),
            (np.ones((2, 2, 3)), np.ones((1, 3, 8)), np.ones((2, 8)), False),
        ],
    }
    for arguments in bad[name]:
        with pytest.raises((TypeError, ValueError)):
            getattr(kernels, name)(*arguments)


# --- functions --------------------------------------------------------------------------------


def units(ours: Tensor, truth: np.ndarray) -> np.ndarray:
    """Errors in units of the last place of the truth, which is in the longest float there is."""
    a = ours.numpy()
    unit = np.spacing(np.abs(truth).astype(a.dtype)).astype(np.longdouble)
    return np.abs(a.astype(np.longdouble) - truth) / unit


def long(x: Tensor) -> np.ndarray:
    return x.numpy().astype(np.longdouble)


def assert_units(ours: Tensor, truth: np.ndarray, x: Tensor, bound: float) -> None:
    error = units(ours, truth)
    worst = int(np.argmax(np.where(np.isnan(error), np.inf, error)))
    assert error[worst] <= bound, f"{error[worst]:.2f} units at {x[worst].item()!r}"


def spread(low: float, high: float, dtype: torch.dtype, n: int = 100_003) -> Tensor:
    """Random values of [low, high), and its ends."""
    x = torch.rand(n, dtype=torch.float64) * (high - low) + low
    return torch.cat((x, torch.tensor([low, high], dtype=torch.float64))).to(dtype)


# Where e^x is: the smallest number, just below the smallest normal one, the largest one.
ENDS = {torch.float32: (-103.27, -87.3366, 88.722), torch.float64: (-744.44, -708.3965, 709.78)}


def test_exp(kernels, dtype, seed):
    least, normal, most = ENDS[dtype]
    near_one = spread(-1, 1, dtype) ** 9
    for x in (spread(normal, most, dtype), spread(-1, 1, dtype), near_one):
        assert_units(lines(kernels.exp, x), np.exp(long(x)), x, 1.5)
    x = spread(least, normal, dtype)
    got = lines(kernels.exp, x)
    assert (got > 0).all() and (got < torch.finfo(dtype).tiny).all()
    assert_units(got, np.exp(long(x)), x, 1.0)


def test_exp_where_the_type_ends(kernels, dtype):
    least, _, most = ENDS[dtype]
    x = torch.tensor([0.0, -0.0, NAN, -NAN, INF, -INF, most + 0.01, 1e30, least - 1, -1e30])
    want = torch.tensor([1, 1, NAN, NAN, INF, 0, INF, INF, 0, 0], dtype=dtype)
    for name, sign in (("exp", 1), ("exp_negative", -1)):
        got = lines(getattr(kernels, name), sign * x.to(dtype))
        assert torch.equal(got.isnan(), want.isnan()), got
        assert torch.equal(got.nan_to_num(-1, posinf=INF), want.nan_to_num(-1, posinf=INF)), got
        assert not got.signbit()[want == 0].any()


def test_exp_negative(kernels, dtype, seed):
    least, _, most = ENDS[dtype]
    x = spread(-most, -least, dtype)
    assert torch.equal(lines(kernels.exp_negative, x), lines(kernels.exp, -x))


def test_reciprocal(kernels, dtype, seed):
    """Of 1 + e, where e is a product of exponentials that the launchers let pass."""
    e = spread(-80, 80, dtype).exp() if dtype == torch.float32 else spread(-700, 700, dtype).exp()
    for x in (1 + e, spread(1, 4, dtype)):
        assert_units(lines(kernels.reciprocal, x), 1 / long(x), x, 2)


def test_sigmoid(kernels, dtype, seed):
    _, normal, _ = ENDS[dtype]
    for x in (spread(normal, 100, dtype), spread(-4, 4, dtype)):
        truth = 1 / (1 + np.exp(-long(x)))
        assert_units(lines(kernels.sigmoid, x), truth, x, 3)
        slope = long(lines(kernels.sigmoid_slope, x))
        assert np.abs(slope - truth * (1 - truth)).max() <= torch.finfo(dtype).eps
    x = torch.tensor([0.0, NAN, INF, -INF, 1e30, -1e30, 2 * normal], dtype=dtype)
    want = torch.tensor([0.5, NAN, 1, 0, 1, 0, 0], dtype=dtype)
    torch.testing.assert_close(lines(kernels.sigmoid, x), want, rtol=0, atol=0, equal_nan=True)
    slope = torch.tensor([0.25, NAN, 0, 0, 0, 0, 0], dtype=dtype)
    torch.testing.assert_close(
        lines(kernels.sigmoid_slope, x), slope, rtol=0, atol=0, equal_nan=True
    )


def test_not_a_number_passes_relu_and_maximum(kernels, dtype):
    values = torch.tensor([NAN, -NAN, 0.0, -1.0, 2.0, INF, -INF], dtype=dtype)
    same = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(lines(kernels.relu, values), values.relu(), **same)
    a, b = torch.meshgrid(values, values, indexing="ij")
    a, b = a.flatten(), b.flatten()
    torch.testing.assert_close(lines(kernels.maximum, a, b), torch.maximum(a, b), **same)


@pytest.mark.parametrize(
    "name", ("exp", "exp_negative", "reciprocal", "sigmoid", "sigmoid_slope", "relu", "maximum")
)
def test_lines_of_any_length(kernels, dtype, name, seed):
    """The last lanes are computed as all others are."""
    kernel = getattr(kernels, name)
    x = [torch.rand(67, dtype=dtype) + 1 for _ in range(2 if name == "maximum" else 1)]
    whole = lines(kernel, *x)
    for n in range(67):
        assert torch.equal(lines(kernel, *(t[:n] for t in x)), whole[:n]), n


# --- conversions ------------------------------------------------------------------------------


def bits(t: Tensor) -> Tensor:
    return t.view({2: torch.int16, 4: torch.int32}[t.itemsize])


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Bit by bit, but for the payload of NaN."""
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(bits(a)[~nan], bits(b)[~nan])


def widen(kernels: Any, t: Tensor) -> Tensor:
    kernel = getattr(kernels, f"widen_{str(t.dtype).removeprefix('torch.')}")
    return lines(kernel, t.view(torch.uint16), dtype=torch.float32)


def narrow(kernels: Any, t: Tensor, dtype: torch.dtype) -> Tensor:
    kernel = getattr(kernels, f"narrow_{str(dtype).removeprefix('torch.')}")
    return lines(kernel, t, dtype=torch.uint16).view(dtype)


def all_halves(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def ties(dtype: torch.dtype) -> Tensor:
    """Every float32 half way between two neighbours, infinity among them; and its own two."""
    positive = all_halves(dtype)
    positive = positive[positive.isfinite() & ~positive.signbit()].double().sort().values
    beyond = torch.tensor([65536.0 if dtype == torch.float16 else 2.0**128], dtype=torch.float64)
    middle = ((positive + torch.cat((positive[1:], beyond))) / 2).float()
    near = torch.cat(
        [middle, middle.nextafter(torch.tensor(0.0)), middle.nextafter(beyond.float())]
    )
    return torch.cat((near, -near))


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_widen_every_number(kernels, half):
    x = all_halves(half)
    got = widen(kernels, x)
    assert same_numbers(got, x.float())
    assert torch.equal(got.signbit(), x.signbit())  # of NaN too
    assert same_numbers(narrow(kernels, got, half), x)


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_narrow(kernels, half, seed):
    any_bits = torch.randint(-(2**31), 2**31, (300_007,)).to(torch.int32).view(torch.float32)
    nans = (torch.randint(1, 2**23, (1001,)) | 0x7F800000).to(torch.int32).view(torch.float32)
    special = torch.tensor([0.0, -0.0, INF, -INF, NAN, 1e-45, -1e-45, 3.4e38, -3.4e38])
    around_one = torch.randn(100_003)
    tiny = 2.0**-14 * torch.randn(100_003)  # of float16 the smallest, and below
    for x in (any_bits, nans, -nans, special, around_one, tiny, ties(half)):
        got = narrow(kernels, x, half)
        assert same_numbers(got, x.to(half))
        assert torch.equal(got.signbit(), x.signbit())


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_conversions_of_any_length(kernels, half, seed):
    x = torch.randn(67)
    for n in range(67):
        assert torch.equal(narrow(kernels, x[:n], half), x[:n].to(half)), n
        assert torch.equal(widen(kernels, x[:n].to(half)), x[:n].to(half).float()), n


def test_nothing_to_convert(kernels, dtype, seed):
    """Vectors, and the masked lanes behind them, of the accumulator's own type."""
    x = torch.randn(67, dtype=dtype)
    for n in range(67):
        assert torch.equal(lines(kernels.widen, x[:n]), x[:n]), n
        assert torch.equal(lines(kernels.narrow, x[:n]), x[:n]), n


# --- products of matrices ---------------------------------------------------------------------


def positive(*shape: int, dtype: torch.dtype) -> Tensor:
    """Values whose sums cancel nowhere: of a sum of few, rounding would be all that is left."""
    return torch.rand(shape, dtype=dtype) + 0.5


def scalars(a: Tensor, layout: str, room: int) -> Tensor:
    """a [terms, rows, k] in a layout: rows one behind the other, side by side, or neither."""
    if layout == "rows":
        return Within(a, NAN, room).tensor
    if layout == "columns":
        return Within(a.transpose(1, 2), NAN, room).tensor.transpose(1, 2)
    apart = torch.full((*a.shape, 2), NAN, dtype=a.dtype)
    apart[..., 0] = a
    return Within(apart, NAN, room).tensor[..., 0]


def check_product(
    kernels: Any, dtype: torch.dtype, sizes: tuple[int, ...], layout: str, accumulate: bool,
    room: int,
) -> None:  # fmt: skip
    count, rows, k, n = sizes
    a, b = positive(count, rows, k, dtype=dtype), positive(count, k, n, dtype=dtype)
    before = positive(rows, n, dtype=dtype)
    out = Within(before if accumulate else torch.full_like(before, NAN), GUARD, room)
    wide = Within(b, NAN, room).tensor
    kernels.product(scalars(a, layout, room).numpy(), wide.numpy(), out.tensor.numpy(), accumulate)
    want = (a.double() @ b.double()).sum(0) + (before.double() if accumulate else 0)
    where = f"terms, rows, k, n {sizes}, {layout}, accumulate {accumulate}, room {room}"
    error = relative_error(out.tensor, want)
    assert error <= PARITY[dtype], f"{where}: relative error {error:.2e}"
    each = ((out.tensor.double() - want).abs() / want).max().item()
    assert each <= 4 * PARITY[dtype], f"{where}: one element's relative error {each:.2e}"
    out.check()


@pytest.mark.parametrize("layout", ("rows", "columns", "apart"))
def test_product_tiles(kernels, dtype, layout, seed):
    """All numbers of rows and vectors up to beyond two of the largest tiles."""
    width = lanes(kernels, dtype)
    for rows in range(1, 27):
        for vecs in range(1, 10):
            accumulate, room = bool((rows + vecs) % 2), 3 * (rows % 2)
            for k in (3, 5, 8):
                check_product(kernels, dtype, (1, rows, k, vecs * width), layout, accumulate, room)


@pytest.mark.parametrize("layout", ("rows", "columns", "apart"))
@pytest.mark.parametrize("accumulate", (False, True), ids=("set", "accumulate"))
def test_product_terms(kernels, dtype, layout, accumulate, seed):
    """Sums of any length, over several pairs of factors."""
    n = 3 * lanes(kernels, dtype)
    for count in (1, 2, 3, 9):
        for k in (1, 2, 3, 64, 259):
            for room in (0, 3):
                check_product(kernels, dtype, (count, 7, k, n), layout, accumulate, room)


def test_product_of_nothing(kernels, dtype):
    """No terms, or terms without elements: zero, or what was there."""
    n = lanes(kernels, dtype)
    for count, k in ((0, 3), (2, 0)):
        for accumulate in (False, True):
            out = torch.full((5, n), 2.0, dtype=dtype)
            a, b = torch.ones(count, 5, k, dtype=dtype), torch.ones(count, k, n, dtype=dtype)
            kernels.product(a.numpy(), b.numpy(), out.numpy(), accumulate)
            assert (out == (2 if accumulate else 0)).all()


def test_linear(kernels, dtype, seed):
    """Dot products of any length, with and without what is applied to them."""
    for ins in [*range(1, 4 * lanes(kernels, dtype) + 2), 259]:
        w, x = positive(3, ins, dtype=dtype), positive(ins, dtype=dtype)
        scale, shift = positive(3, dtype=dtype), positive(3, dtype=dtype)
        scale[1] = -scale[1] - 4  # so that there the sum is negative
        for s in (None, scale):
            for t in (None, shift):
                for relu in (False, True):
                    out = Within(torch.full((3,), NAN, dtype=dtype), GUARD)
                    s_, t_ = (None if v is None else v.numpy() for v in (s, t))
                    kernels.linear(w.numpy(), x.numpy(), s_, t_, relu, out.tensor.numpy())
                    out.check()
                    want = w.double() @ x.double()
                    want = want if s is None else want * s.double()
                    want = want if t is None else want + t.double()
                    want = want.relu() if relu else want
                    assert relative_error(out.tensor, want) <= PARITY[dtype], ins


# --- weights as the products take them ----------------------------------------------------------


def numbered(*shape: int, dtype: torch.dtype) -> Tensor:
    """Every element another number."""
    return (torch.arange(torch.Size(shape).numel()) + 1).view(shape).to(dtype)


def test_transpose(kernels, dtype):
    """All ragged blocks, with and without zeros behind the rows."""
    width = lanes(kernels, dtype)
    sizes = (1, 2, width - 1, width, width + 1, 2 * width - 1, 2 * width + 3)
    for rows in sizes:
        for length in sizes:
            for stored in {rows, rows + 1, -(-rows // width) * width, rows + 2 * width}:
                for room in (0, 3):
                    block = numbered(rows, length, dtype=dtype)
                    out = Within(torch.full((length, stored), NAN, dtype=dtype), GUARD, room)
                    kernels.transpose(Within(block, NAN, room).tensor.numpy(), out.tensor.numpy())
                    where = f"[{rows}, {length}] to [{length}, {stored}], room {room}"
                    assert torch.equal(out.tensor[:, :rows], block.T), where
                    assert (out.tensor[:, rows:] == 0).all(), where
                    out.check()


def test_transpose_taps(kernels, dtype):
    """As `transpose`, the columns in periods."""
    width = lanes(kernels, dtype)
    for rows in (1, width - 1, width + 1, 2 * width + 3):
        for period in (1, 2, 9, 2 * width + 1):
            for periods in (1, 2, 5):
                for room in (0, 3):
                    stored = -(-rows // width) * width if room else rows
                    block = numbered(rows, periods * period, dtype=dtype)
                    out = torch.full((period, periods, stored), NAN, dtype=dtype)
                    out = Within(out, GUARD, room)
                    kernels.transpose_taps(
                        Within(block, NAN, room).tensor.numpy(), out.tensor.numpy()
                    )
                    want = block.view(rows, periods, period).permute(2, 1, 0)
                    where = f"{rows} rows, {periods} periods of {period}, room {room}"
                    assert torch.equal(out.tensor[..., :rows], want), where
                    assert (out.tensor[..., rows:] == 0).all(), where
                    out.check()


def packed(w: Tensor, ld: int, gradient: bool) -> Tensor:
    """What a weight is packed to: [rows, k] to [k, ld], and [out, in, tap] to [tap, in, ld], or
    for the gradient to [tap, out, ld] with the taps turned round."""
    turned = w.T if w.dim() == 2 else w.permute(2, 1, 0)
    if gradient and w.dim() == 3:
        turned = w.permute(2, 0, 1).flip(0)
    out = torch.zeros(*turned.shape[:-1], ld, dtype=w.dtype)
    out[..., : w.shape[0]] = turned
    return out


@pytest.mark.parametrize("way", ("by input", "by output", "gradient"))
@pytest.mark.parametrize("count", (1, 2), ids=("one thread", "two threads"))
def test_pack(kernels, dtype, way, count):
    """Ragged weights of every kind, each alone and all together."""
    width = lanes(kernels, dtype)
    shapes: list[tuple[int, ...]] = [
        (rows, k)
        for rows in (1, width - 1, width, width + 1, 3 * width + 2)
        for k in (1, 5, 127, 128, 129, 300)
    ]
    shapes += [(h, h, 9) for h in (1, 2, width - 1, width, width + 1, 15, 16, 17, 2 * width + 3)]
    weights = []
    for shape in shapes:
        w = numbered(*shape, dtype=dtype)
        for ld in {shape[0], -(-shape[0] // width) * width}:
            weights.append((w, torch.full_like(packed(w, ld, False), NAN)))
    with threads(count):
        for together in [*([each] for each in weights), weights]:
            for _, out in together:
                out.fill_(NAN)
            pairs = [(w.numpy(), out.numpy()) for w, out in together]
            kernels.pack(pairs, way == "gradient", way == "by output", count > 1)
            for w, out in together:
                want = packed(w, out.shape[-1], way == "gradient")
                assert torch.equal(out, want), (tuple(w.shape), tuple(out.shape))


# --- scratch memory -----------------------------------------------------------------------------

ROOM = 64
"""Bytes behind what an arena gives, for a last vector."""


def fill(taken: list[np.ndarray]) -> None:
    for number, block in enumerate(taken):
        block[:] = number % 251


def check_filled(taken: list[np.ndarray]) -> None:
    for number, block in enumerate(taken):
        assert (block == number % 251).all(), f"block {number} was written over"


def test_arenas_nest(cpp_testing, seed):  # noqa: F811
    """What an arena gives is aligned and its own, room included, until the arena ends."""

    def take(arena: Any, n: int) -> np.ndarray:
        block = np.frombuffer(arena.take(n), np.uint8)
        assert block.size == n + ROOM and block.ctypes.data % 64 == 0
        return block

    def sizes() -> list[int]:
        return [0, 1, 63, 64, 65, *torch.randint(0, 200_000, (20,)).tolist()]

    with cpp_testing.Arena() as outer:
        blocks = [take(outer, n) for n in sizes()]
        for _ in range(3):
            with cpp_testing.Arena() as inner:
                within = blocks + [take(inner, n) for n in sizes()]
                with cpp_testing.Arena() as innermost:
                    within += [take(innermost, n) for n in sizes()]
                    fill(within)
                    check_filled(within)
                within = within[: -len(sizes())]
                more = [take(inner, n) for n in sizes()]
                fill(within + more)
                check_filled(within + more)
            check_filled(blocks)
        blocks += [take(outer, n) for n in sizes()]
        fill(blocks)
        check_filled(blocks)


def test_an_arena_takes_the_same_memory_again(cpp_testing):  # noqa: F811
    """From the second time on: the first may need several blocks, and leaves one for all."""

    def addresses() -> list[int]:
        with cpp_testing.Arena() as arena:
            sizes = (1000, 300_000, 5, 70_000)
            return [np.frombuffer(arena.take(n), np.uint8).ctypes.data for n in sizes]

    addresses()
    assert addresses() == addresses()


def test_zeros_of_an_arena(cpp_testing):  # noqa: F811
    for _ in range(2):
        with cpp_testing.Arena() as arena:
            for n in (0, 1, 64, 5000):
                block = np.frombuffer(arena.take(n, zeros=True), np.uint8)
                assert block.size == n + ROOM and (block == 0).all()
                block[:] = 1


def test_an_arena_gives_nothing_when_it_has_ended(cpp_testing):  # noqa: F811
    with cpp_testing.Arena() as arena:
        arena.take(8)
    with pytest.raises(ValueError, match="inside of `with`"):
        arena.take(8)
