"""The gate, forward and backward, against float64 and beside eager in the same dtype."""

from __future__ import annotations

import pytest
import torch
from cases import COMBINES, DTYPES, LAYOUTS, SHAPES, make_map, memory_format, name
from tolerances import assert_parity

import bam_kernels
from bam_kernels import functional, reference

BRANCHES = ("both", "channel", "spatial")


def gradients(function, x, c, s, dout, combine, residual):
    """out, and the gradients of the inputs that are there."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, c, s)]
    out = function(*leaves, combine, residual)
    out.backward(dout.to(out.dtype))
    return out, *(None if t is None else t.grad for t in leaves)


def check(shape, dtype, layout, combine, residual, branches, device):
    n, channels, h, w = shape
    x = make_map(shape, dtype, device, layout)
    dout = make_map(shape, dtype, device, "nchw")
    c = torch.randn(n, channels, device=device).to(dtype) if branches != "spatial" else None
    s = torch.randn(n, 1, h, w, device=device).to(dtype) if branches != "channel" else None

    def double(t):
        return None if t is None else t.double()

    with bam_kernels.use_backend("triton"):
        ours = gradients(functional.gate, x, c, s, dout, combine, residual)
    truth = gradients(
        reference.gate, double(x), double(c), double(s), dout.double(), combine, residual
    )
    eager = gradients(reference.gate, x, c, s, dout, combine, residual)
    for what, a, b, e in zip(("out", "dx", "dc", "ds"), ours, truth, eager, strict=True):
        if b is not None:
            assert a.dtype == dtype
            assert_parity(what, a, b, e)
    assert ours[0].is_contiguous(memory_format=memory_format(layout))
    assert ours[0].stride() == eager[0].stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_shapes(shape, dtype, device, seed):
    check(shape, dtype, "nchw", "sum", True, "both", device)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layouts(layout, dtype, device, seed):
    check((2, 37, 9, 11), dtype, layout, "sum", True, "both", device)


@pytest.mark.parametrize("layout", ("nchw", "channels_last"))
@pytest.mark.parametrize("residual", (True, False))
@pytest.mark.parametrize("branches", BRANCHES)
@pytest.mark.parametrize("combine", COMBINES)
def test_options(combine, branches, residual, layout, device, seed):
    for dtype in (torch.float64, torch.float16):
        check((2, 20, 7, 5), dtype, layout, combine, residual, branches, device)


def test_max_shares_the_gradient_of_equal_logits(device, seed):
    """torch.maximum gives each of two equal arguments half of the gradient."""
    x = make_map((2, 5, 3, 4), torch.float64, device)
    c = torch.tensor([0.5, -1.0, 2.0, 0.5, 0.0], dtype=torch.float64, device=device).repeat(2, 1)
    s = torch.full((2, 1, 3, 4), 0.5, dtype=torch.float64, device=device)
    dout = torch.randn_like(x)
    ours = gradients(functional.gate, x, c, s, dout, "max", True)
    truth = gradients(reference.gate, x, c, s, dout, "max", True)
    for what, a, b in zip(("out", "dx", "dc", "ds"), ours, truth, strict=True):
        assert_parity(what, a, b)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=name)
def test_logits_of_another_dtype(dtype, device, seed):
    """Under autocast half logits meet an fp32 x, and fp32 logits a half x; x's dtype stays."""
    x = make_map((2, 20, 7, 5), torch.float32, device)
    c = torch.randn(2, 20, device=device).to(dtype)
    s = torch.randn(2, 1, 7, 5, device=device).to(dtype)
    dout = torch.randn_like(x)
    ours = gradients(functional.gate, x, c, s, dout, "sum", True)
    truth = gradients(
        reference.gate, x.double(), c.double(), s.double(), dout.double(), "sum", True
    )
    assert ours[0].dtype == torch.float32 and ours[2].dtype == dtype
    for what, a, b in zip(("out", "dx", "dc", "ds"), ours, truth, strict=True):
        assert_parity(what, a, b)
    half = gradients(functional.gate, x.to(dtype), c.float(), s.float(), dout, "sum", True)
    assert half[0].dtype == half[1].dtype == dtype and half[2].dtype == torch.float32


def test_an_expanded_gradient(device, seed):
    """The gradient of a sum has stride 0 everywhere; kernels cannot walk it as it lies."""
    x = make_map((2, 20, 7, 5), torch.float64, device).requires_grad_()
    c = torch.randn(2, 20, dtype=torch.float64, device=device)
    s = torch.randn(2, 1, 7, 5, dtype=torch.float64, device=device)
    functional.gate(x, c, s).sum().backward()
    want = 1 + reference.attention_map(c[:, :, None, None], s, "sum")
    assert_parity("dx", x.grad, want)


def test_only_the_gradients_that_are_needed(device, seed):
    x = make_map((2, 20, 7, 5), torch.float32, device)
    c = torch.randn(2, 20, device=device, requires_grad=True)
    s = torch.randn(2, 1, 7, 5, device=device)
    functional.gate(x, c, s).square().sum().backward()
    assert c.grad is not None and x.grad is None and s.grad is None
