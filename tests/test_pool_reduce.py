"""Pooling and reduction from one read, forward and backward, against float64 and beside eager."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, LAYOUTS, SHAPES, make_map, memory_format, name
from tolerances import assert_parity

from bam_kernels import functional
from bam_kernels.backends.triton import configs


def plain(x, weight, bias):
    return x.mean(dim=(2, 3)), F.conv2d(x, weight[:, :, None, None], bias)


def gradients(function, x, weight, bias, dpooled, dreduced):
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
    outputs = function(*leaves)
    torch.autograd.backward(outputs, [dpooled, dreduced])
    return *outputs, *(None if t is None else t.grad for t in leaves)


def named(results):
    """By name. The bias's gradient, sums of noise over the map of which a lone one may cancel, is
    compared as one vector with the weight's."""
    found = dict(zip(("pooled", "reduced", "dx", "dweight"), results, strict=False))
    if results[4] is not None:
        assert results[4].dtype == results[3].dtype
        found["dweight and dbias"] = torch.cat([found.pop("dweight").flatten(), results[4]])
    return found


def check(shape, hidden, dtype, layout, device, has_bias=True):
    n, channels, h, w = shape
    x = make_map(shape, dtype, device, layout)
    weight = (torch.randn(hidden, channels, device=device) / channels**0.5).to(dtype)
    bias = torch.randn(hidden, device=device).to(dtype) if has_bias else None
    # The mean's gradient is divided by H * W: scaled up, so that dx shows both terms.
    dpooled = (torch.randn(n, channels, device=device) * (h * w)).to(dtype)
    dreduced = torch.randn(n, hidden, h, w, device=device).to(dtype)

    def double(t):
        return None if t is None else t.double()

    arguments = (x, weight, bias, dpooled, dreduced)
    ours = named(gradients(functional.pool_reduce, *arguments))
    truth = named(gradients(plain, *map(double, arguments)))
    eager = named(gradients(plain, *arguments))
    for what, b in truth.items():
        assert ours[what].dtype == dtype
        # Convolutions of half types on a CPU may keep fp32 until the end or not, so eager's
        # error is a bound only where eager itself rounds once.
        assert_parity(what, ours[what], b, eager[what] if dtype.itemsize > 2 else None)
    assert ours["reduced"].is_contiguous(memory_format=memory_format(layout))


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_shapes(shape, dtype, device, seed):
    check(shape, max(1, shape[1] // 16), dtype, "nchw", device)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layouts(layout, dtype, device, seed):
    check((2, 37, 9, 11), 5, dtype, layout, device)


@pytest.mark.parametrize("layout", ("nchw", "channels_last"))
@pytest.mark.parametrize("hidden", (1, 17, 64, 130, 257))
def test_hidden_widths(hidden, layout, device, seed):
    """Below, across and above one hidden block of 128."""
    check((2, 40, 6, 7), hidden, torch.float32, layout, device, has_bias=hidden != 17)


@pytest.mark.parametrize("layout", ("nchw", "channels_last"))
def test_several_tiles_and_splits(layout, device, seed):
    """Small tiles: several position tiles, channel splits and gradient splits, each with a tail."""
    small = configs.Tile(16, 16, 4, 1)
    with configs.override(pool_reduce=small, input_gradient=small):
        check((3, 70, 9, 11), 20, torch.float32, layout, device)


def test_a_weight_as_a_convolution_keeps_it(device, seed):
    x = make_map((2, 24, 5, 6), torch.float64, device)
    conv = torch.nn.Conv2d(24, 3, 1, dtype=torch.float64, device=device)
    pooled, reduced = functional.pool_reduce(x, conv.weight, conv.bias)
    assert_parity("pooled", pooled, x.mean(dim=(2, 3)))
    assert_parity("reduced", reduced, conv(x))


@pytest.mark.parametrize("needed", ("x", "weight", "bias", "weight bias"))
def test_only_the_gradients_that_are_needed(needed, device, seed):
    x = make_map((2, 24, 5, 6), torch.float64, device)
    weight = torch.randn(3, 24, dtype=torch.float64, device=device)
    bias = torch.randn(3, dtype=torch.float64, device=device)
    leaves = {"x": x, "weight": weight, "bias": bias}
    for part in needed.split():
        leaves[part].requires_grad_()
    g = torch.randn(2, 3, 5, 6, dtype=torch.float64, device=device)
    found = []
    for function in (functional.pool_reduce, plain):
        pooled, reduced = function(x, weight, bias)
        loss = (reduced * g).sum() + pooled.square().sum()
        found.append(torch.autograd.grad(loss, [leaves[part] for part in needed.split()]))
    for part, a, b in zip(needed.split(), *found, strict=True):
        assert_parity(part, a, b)
    assert all(t.grad is None for t in leaves.values())


def test_one_output_used(device, seed):
    """Only the pooled vector, then only the reduced map, takes part in the loss."""
    x = make_map((2, 24, 5, 6), torch.float64, device).requires_grad_()
    weight = torch.randn(3, 24, dtype=torch.float64, device=device, requires_grad=True)
    for index in (0, 1):
        ours = torch.autograd.grad(
            functional.pool_reduce(x, weight)[index].square().sum(),
            [x, weight],
            allow_unused=True,
        )
        truth = torch.autograd.grad(
            plain(x, weight, None)[index].square().sum(), [x, weight], allow_unused=True
        )
        assert_parity("dx", ours[0], truth[0])
        if index == 0:
            assert ours[1] is None and truth[1] is None
        else:
            assert_parity("dweight", ours[1], truth[1])
