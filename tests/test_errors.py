"""Bad input: its own message, naming the argument, before any kernel starts; and empty batches."""

from __future__ import annotations

import pytest
import torch

from bam_kernels import BAM, SqueezeExcite, functional, reference
from bam_kernels.testing.traffic import measure

F64 = torch.float64


@pytest.fixture(autouse=True)
def no_launch(device, request):
    """Every test in this file fails if anything is launched."""
    if device.type != "cpu" or "launches" in request.keywords:
        yield
        return
    with measure() as traffic:
        yield
    assert traffic.launches == []


def x_of(*shape, dtype=torch.float32, device="cpu"):
    return torch.randn(shape, device=device).to(dtype)


@pytest.mark.parametrize("preset", ("paper", "official"))
@pytest.mark.parametrize(
    "x,error,message",
    [
        ([[1.0]], TypeError, "x: expected a torch.Tensor, got list"),
        (torch.randn(2, 32, 5), ValueError, r"x: expected 4 dimensions .* got \[2, 32, 5\]"),
        (torch.randn(2, 16, 5, 5), ValueError, "x: expected 32 channels, got 16"),
        (torch.ones(2, 32, 5, 5, dtype=torch.int64), TypeError, "x: expected one of float64"),
        (torch.ones(2, 32, 5, 5, dtype=torch.complex64), TypeError, "got torch.complex64"),
        (torch.ones(2, 32, 5, 5, dtype=torch.bool), TypeError, "got torch.bool"),
        (torch.randn(2, 32, 0, 5), ValueError, r"H and W of at least 1, got shape \[2, 32, 0, 5\]"),
        (torch.randn(2, 32, 5, 5, dtype=F64), TypeError, "the parameters' dtype torch.float32"),
        (torch.randn(2, 32, 5, 5, device="meta"), ValueError, "parameters' device .*, got meta"),
    ],
)
def test_modules(x, error, message, preset, device):
    x = x.to(device) if isinstance(x, torch.Tensor) and x.device.type == "cpu" else x
    with pytest.raises(error, match=message):
        BAM(32, preset=preset, device=device)(x)
    with pytest.raises(error, match=message):
        SqueezeExcite(32, device=device)(x)


def test_one_value_per_channel(device):
    """As torch's batch norm refuses it, but before anything ran, and saying which norm."""
    x = x_of(1, 32, 5, 5, device=device)
    message = "batch norm channel.norm .* got batch 1"
    with pytest.raises(ValueError, match=message):
        BAM(32, device=device)(x)
    with pytest.raises(ValueError, match=r"channel.hidden_norm.0 .* got batch 1"):
        BAM(32, preset="official", device=device)(x)
    with pytest.raises(ValueError, match=r"spatial.norm .* got one pixel"):
        BAM(32, channel=False, device=device)(x[:, :, :1, :1])
    with pytest.raises(ValueError):
        reference.BAM(32, device=device)(x)


@pytest.mark.launches
def test_batch_one_where_nothing_forbids_it(device):
    x = x_of(1, 32, 5, 5, device=device)
    for module in (
        BAM(32, device=device).eval(),
        BAM(32, channel=False, device=device),
        BAM(32, norm_final=False, device=device),
        SqueezeExcite(32, device=device),
    ):
        torch.testing.assert_close(module(x), type(module).__mro__[1].forward(module, x))


@pytest.mark.parametrize("train", (True, False), ids=("train", "eval"))
def test_an_empty_batch_comes_back_empty(train, device):
    for shape in ((0, 32, 5, 7),):
        for module in (
            BAM(32, device=device).eval(),
            SqueezeExcite(32, device=device).train(train),
        ):
            x = x_of(*shape, device=device).requires_grad_()
            out = module(x)
            assert out.shape == shape and out.dtype == x.dtype
            out.sum().backward()
            assert x.grad.shape == shape
        x = x_of(*shape, device=device)
        c, s = x_of(0, 32, device=device), x_of(0, 1, 5, 7, device=device)
        assert functional.gate(x, c, s).shape == shape
        pooled, reduced = functional.pool_reduce(x, x_of(2, 32, device=device))
        assert pooled.shape == (0, 32) and reduced.shape == (0, 2, 5, 7)


@pytest.mark.parametrize(
    "changes,error,message",
    [
        ({"x": "photo"}, TypeError, "x: expected a torch.Tensor, got str"),
        ({"x": torch.randn(2, 8, 3)}, ValueError, "x: expected 4 dimensions"),
        ({"x": torch.ones(2, 8, 3, 4).int()}, TypeError, "x: expected one of float64"),
        ({"c": None, "s": None}, ValueError, "channel_logits, spatial_logits: expected at least"),
        ({"c": torch.randn(2, 9)}, ValueError, r"channel_logits: expected shape \[2, 8\]"),
        ({"c": torch.randn(2, 8, 1, 1)}, ValueError, r"channel_logits: expected shape \[2, 8\]"),
        ({"c": [1.0]}, TypeError, "channel_logits: expected a torch.Tensor, got list"),
        ({"c": torch.ones(2, 8).long()}, TypeError, "channel_logits: expected one of float64"),
        ({"s": torch.randn(2, 3, 4)}, ValueError, r"spatial_logits: expected shape \[2, 1, 3, 4\]"),
        ({"s": torch.randn(2, 8, 3, 4)}, ValueError, r"spatial_logits: .* got \[2, 8, 3, 4\]"),
        (
            {"s": torch.randn(2, 1, 3, 4, device="meta")},
            ValueError,
            "spatial_logits: .* x's device",
        ),
        ({"combine": "add"}, ValueError, "combine: expected one of sum, product, max.*'add'"),
    ],
)
def test_gate(changes, error, message, device):
    arguments = {"x": torch.randn(2, 8, 3, 4), "c": torch.randn(2, 8), "s": torch.randn(2, 1, 3, 4)}
    arguments |= {"combine": "sum"} | changes
    moved = {
        key: t.to(device) if isinstance(t, torch.Tensor) and t.device.type == "cpu" else t
        for key, t in arguments.items()
    }
    with pytest.raises(error, match=message):
        functional.gate(*moved.values())


@pytest.mark.parametrize(
    "weight,bias,error,message",
    [
        ("w", None, TypeError, "weight: expected a torch.Tensor, got str"),
        (torch.randn(2, 9), None, ValueError, r"weight: expected \[h, 8\].* got \[2, 9\]"),
        (torch.randn(2, 8, 3, 3), None, ValueError, r"weight: .* got \[2, 8, 3, 3\]"),
        (torch.randn(2, 8).double(), None, TypeError, "weight: expected x's dtype torch.float32"),
        (torch.randn(2, 8, device="meta"), None, ValueError, "weight: .*x's device"),
        (torch.randn(2, 8), torch.randn(3), ValueError, r"bias: expected shape \[2\]"),
        (torch.randn(2, 8), torch.randn(2).half(), TypeError, "bias: expected x's dtype"),
        (torch.randn(2, 8), torch.randn(2, device="meta"), ValueError, "bias: .*x's device"),
    ],
)
def test_pool_reduce(weight, bias, error, message, device):
    x = torch.randn(2, 8, 3, 4, device=device)

    def moved(t):
        return t.to(device) if isinstance(t, torch.Tensor) and t.device.type == "cpu" else t

    with pytest.raises(error, match=message):
        functional.pool_reduce(x, moved(weight), moved(bias))


@pytest.mark.parametrize(
    "arguments,options,error,message",
    [
        ((8,), {}, ValueError, "channels: expected at least reduction=16 .* got 8"),
        ((0,), {}, ValueError, "channels: expected at least 1, got 0"),
        ((64.0,), {}, TypeError, "channels: expected an int, got float 64.0"),
        ((True,), {}, TypeError, "channels: expected an int, got bool"),
        ((64, 0), {}, ValueError, "reduction: expected at least 1, got 0"),
        ((64,), {"dilation": 0}, ValueError, "dilation: expected at least 1"),
        ((64,), {"num_dilated": -1}, ValueError, "num_dilated: expected at least 0"),
        ((64,), {"mlp_layers": "2"}, TypeError, "mlp_layers: expected an int, got str '2'"),
        ((64,), {"combine": "add"}, ValueError, "combine: expected one of sum"),
        ((64,), {"preset": "cbam"}, ValueError, "preset: expected one of paper, official"),
        ((64,), {"residual": 1}, TypeError, "residual: expected a bool, got int 1"),
        ((64,), {"channel": False, "spatial": False}, ValueError, "at least one branch"),
        ((64,), {"dilatation": 4}, TypeError, "dilatation"),
    ],
)
def test_construction(arguments, options, error, message):
    for kind in (BAM, reference.BAM):
        with pytest.raises(error, match=message):
            kind(*arguments, **options)


def test_squeeze_excite_construction():
    with pytest.raises(ValueError, match="channels: expected at least reduction=16"):
        SqueezeExcite(8)
