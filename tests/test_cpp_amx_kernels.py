"""The matrix units' kernels (csrc/cpu/amx_avx512.cpp), each alone, through the module of
csrc/testing; skipped where the processor has none.

Packing is compared element by element with torch's own reordering; sums with float64 of the same
bfloat16 values. Memory beside a result holds a value that must stay, and what must not be read is
NaN.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cpp_testing import cpp_testing  # noqa: F401 - a fixture
from torch import Tensor

pytestmark = pytest.mark.once

BF16 = torch.bfloat16
TILE, DEPTH = 16, 32
GUARD = 77.0
NAN = float("nan")

# Real hidden channels in how many of a map: fewer than a tile, a tile, all of a depth, and more.
WIDTHS = ((3, 32), (16, 32), (32, 32), (33, 64), (64, 64), (90, 96))


@pytest.fixture
def amx(cpp_testing: ModuleType) -> Any:  # noqa: F811
    if cpp_testing.amx is None:
        pytest.skip("this processor has no matrix units")
    return cpp_testing.amx


def bits(t: Tensor) -> np.ndarray:
    """A dense bfloat16 tensor's bits, in the same memory."""
    return t.view(torch.int16).numpy().view(np.uint16)


def halves(*shape: int) -> Tensor:
    return torch.randn(shape).to(BF16)


def tiled(n: int, tile: int) -> int:
    return -(-n // tile)


# --- packing ------------------------------------------------------------------------------------


def packed_rows(w: Tensor, channels: int) -> Tensor:
    """[k / 32][channels][32], zeros behind w's rows and columns."""
    rows, k = w.shape
    padded = F.pad(w, (0, tiled(k, DEPTH) * DEPTH - k, 0, channels - rows))
    return padded.view(channels, -1, DEPTH).transpose(0, 1).contiguous()


def packed_columns(w: Tensor, channels: int) -> Tensor:
    """[k / 32][channels / 16][16 pairs of k][16 rows][2]."""
    by_depth = packed_rows(w, channels).view(-1, channels // TILE, TILE, DEPTH // 2, 2)
    return by_depth.transpose(2, 3).contiguous()


def packed_conv(w: Tensor, channels: int) -> Tensor:
    """[9][channels / 32 in][channels / 16 out][16 pairs of in][16 out][2]."""
    taps = [packed_columns(w[:, :, tap].contiguous(), channels) for tap in range(9)]
    return torch.stack(taps)


@pytest.mark.parametrize("hidden,channels", WIDTHS)
@pytest.mark.parametrize("kind", ("rows", "columns", "conv"))
def test_packing(kind, hidden, channels, amx, seed):
    """All at once, and in two parts, each of which leaves the other's tiles alone."""
    for k in (1, 31, 32, 33, 100) if kind != "conv" else (hidden,):
        if kind == "conv":
            w, want = halves(hidden, hidden, 9), None
            want, along = packed_conv(w, channels), channels // TILE
        else:
            w = halves(hidden, k)
            want = (packed_rows if kind == "rows" else packed_columns)(w, channels)
            along = tiled(k, DEPTH)
        pack = getattr(amx, f"pack_{kind}")
        axis = 2 if kind == "conv" else 0
        for cut in {0, along // 2, along}:
            out = torch.full_like(want, GUARD)
            pack(bits(w), channels, 0, cut, bits(out.view(-1)))
            assert torch.equal(out.narrow(axis, 0, cut), want.narrow(axis, 0, cut)), (k, cut)
            assert (out.narrow(axis, cut, along - cut) == GUARD).all(), (k, cut)
            pack(bits(w), channels, cut, along, bits(out.view(-1)))
            assert torch.equal(out, want), (k, cut)


def test_packing_reads_no_further_than_the_weights(amx, seed):
    """The last row of weights ends at the end of what may be read."""
    for kind, shape in (("rows", (5, 33)), ("columns", (5, 33)), ("conv", (5, 5, 9))):
        count = int(np.prod(shape))
        around = torch.full((count + 2 * DEPTH,), NAN, dtype=BF16)
        around[DEPTH : DEPTH + count] = halves(count)
        w = around[DEPTH : DEPTH + count].view(shape)
        size = 9 * 32 * 32 if kind == "conv" else tiled(shape[1], DEPTH) * 32 * DEPTH
        out = torch.full((size,), GUARD, dtype=BF16)
        along = 2
        getattr(amx, f"pack_{kind}")(bits(w), 32, 0, along, bits(out))
        assert out.isfinite().all(), kind


# --- maps ---------------------------------------------------------------------------------------


def layer_of(cpp_testing, height, width, dilation, hidden, channels, relu):  # noqa: F811
    """A layer, and its norm in float64: (layer, scale, shift)."""
    scale, shift = (F.pad(torch.randn(hidden), (0, channels - hidden)) for _ in "ab")
    layer = cpp_testing.AmxLayer(
        height, width, dilation, channels, hidden, scale.numpy(), shift.numpy(), relu
    )
    return layer, scale[:hidden].double(), shift[:hidden].double()


def map_of(values: Tensor, layer: Any, channels: int) -> Tensor:
    """[hidden, H, W] as a map lies in memory, zeros around."""
    hidden, height, _ = values.shape
    rows = F.pad(values.permute(1, 2, 0), (0, channels - hidden, layer.pad, layer.pad))
    out = torch.zeros(layer.size, dtype=BF16)
    out[: height * layer.row] = rows.reshape(-1)
    return out


def inside(flat: Tensor, layer: Any, height: int, width: int, channels: int) -> Tensor:
    """The real positions of a map: a view [H, W, channels]."""
    rows = flat[: height * layer.row].view(height, -1, channels)
    return rows[:, layer.pad : layer.pad + width]


def check_sums(found: Tensor, want: Tensor, terms: Tensor, rounding: float = 0.0) -> None:
    """Within rounding of the result, and of float32 sums of terms of these absolute sums."""
    bound = rounding * want.norm() + 1e-5 * terms.norm()
    assert (found.double() - want).norm() <= bound


def check_written(
    out: Tensor, layer: Any, want: Tensor, terms: Tensor, height: int, width: int
) -> None:
    """Right in the real channels, zero in the others, and nothing else touched."""
    hidden, channels = want.shape[0], layer.row // (width + 2 * layer.pad)
    found = inside(out, layer, height, width, channels)
    check_sums(found[..., :hidden].permute(2, 0, 1), want, terms, 2**-8)  # one to bfloat16
    assert (found[..., hidden:] == 0).all()
    rest = out.clone()
    inside(rest, layer, height, width, channels).fill_(GUARD)
    assert (rest == GUARD).all(), "memory beside the map was written"


SIZES = ((1, 1), (3, 5), (4, 16), (7, 37), (17, 33))  # some of more than 256 positions


@pytest.mark.parametrize("layout", ("nchw", "channels_last"))
@pytest.mark.parametrize("hidden,channels", WIDTHS[:5])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_reduce(size, hidden, channels, layout, amx, cpp_testing, seed):  # noqa: F811
    """Pool and reduction: of one part or of several of the channels; with a ReLU or without."""
    height, width = size
    last = layout == "channels_last"
    for c, parts, dilation in ((1, 1, 1), (40, 1, 2), (150, 2, 3), (300, 3, 40)):
        x, w = halves(c, height * width), halves(hidden, c)
        relu = c % 3 == 0
        layer, scale, shift = layer_of(cpp_testing, height, width, dilation, hidden, channels, relu)
        packed = (packed_columns if last else packed_rows)(w, channels)
        out = torch.full((layer.size,), GUARD, dtype=BF16)
        before = torch.randn(c)
        pool = before.clone()
        given = x.t().contiguous() if last else x
        amx.reduce(bits(given), bits(packed.view(-1)), layer, last, parts, pool.numpy(), bits(out))
        want = (w.double() @ x.double()) * scale[:, None] + shift[:, None]
        want = want.relu() if relu else want
        terms = (w.double().abs() @ x.double().abs()) * scale.abs()[:, None] + shift.abs()[:, None]
        want, terms = (t.view(hidden, height, width) for t in (want, terms))
        check_written(out, layer, want, terms, height, width)
        rounding = (x.abs().double().sum(1) + before.abs()) * 1e-6
        assert ((pool.double() - before - x.double().sum(1)).abs() <= rounding).all()


@pytest.mark.parametrize("hidden,channels", WIDTHS[:5])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_conv(size, hidden, channels, amx, cpp_testing, seed):  # noqa: F811
    """In two parts of the rows, into a map and into logits at once; taps beyond the map too."""
    height, width = size
    for dilation in (1, 2, 4, 40):
        values, w = halves(hidden, height, width), halves(hidden, hidden, 9)
        layer, scale, shift = layer_of(cpp_testing, height, width, dilation, hidden, channels, True)
        project = F.pad(torch.randn(hidden), (0, channels - hidden))
        out = torch.full((layer.size,), GUARD, dtype=BF16)
        logits = torch.full((height, width), GUARD)
        given, packed = map_of(values, layer, channels), packed_conv(w, channels).view(-1)
        cut = height // 2
        for y0, y1 in ((0, cut), (cut, height)):
            amx.conv(
                bits(given), bits(packed), layer, dilation, y0, y1,
                bits(out), project.numpy(), logits.numpy(),
            )  # fmt: skip
        want = convolved(values.double(), w.double(), scale, shift, dilation).relu()
        terms = convolved(*(t.double().abs() for t in (values, w, scale, shift)), dilation)
        check_written(out, layer, want, terms, height, width)
        p = project[:hidden].double()
        check_sums(logits, project_all(want, p), project_all(terms, p.abs()))


def convolved(x: Tensor, w: Tensor, scale: Tensor, shift: Tensor, dilation: int) -> Tensor:
    """A convolution [h, h, 9] of [h, H, W] and a norm."""
    kernel = w.view(*w.shape[:2], 3, 3)
    y = F.conv2d(x[None], kernel, padding=dilation, dilation=dilation)[0]
    return y * scale[:, None, None] + shift[:, None, None]


def project_all(x: Tensor, p: Tensor) -> Tensor:
    return torch.einsum("chw,c->hw", x, p)


@pytest.mark.parametrize("norm", (True, False))
def test_a_layer_refuses_what_does_not_fit(norm, amx, cpp_testing):  # noqa: F811
    scale = np.zeros(31 if norm else 32, np.float32)
    with pytest.raises(ValueError, match="expected"):
        cpp_testing.AmxLayer(3, 3, 1, 32 if norm else 31, 5, scale, None, True)
