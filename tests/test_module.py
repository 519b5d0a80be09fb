"""Whole modules against the reference in float64, beside eager; and what a module must do."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial

import pytest
import torch
from cases import COMBINES, LAYOUTS, PRESETS, make_map, memory_format, name
from kinks import module_and_input, without_kinks
from tolerances import Errors, Sway, means_with_variances, rounded_anew, with_rounded_parameters
from torch import nn

import bam_kernels
from bam_kernels import BAM, SqueezeExcite, explain, reference

pytestmark = pytest.mark.usefixtures("large_tiles")


def randomize(module: nn.Module) -> nn.Module:
    """Non-trivial affine parameters and running statistics."""
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.weight.uniform_(0.5, 1.5)
                part.bias.normal_(std=0.5)
                part.running_mean.normal_(std=0.2)
                part.running_var.uniform_(0.5, 2.0)
            elif isinstance(part, nn.Conv2d | nn.Linear):
                part.weight.mul_(2)
    return module


def twin(ours: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The plain PyTorch module with the same weights."""
    kind = getattr(reference, type(ours).__name__)
    plain = kind.__new__(kind)
    plain.__dict__ = copy.deepcopy(ours).__dict__
    return plain.to(dtype)


def step(module: nn.Module, x: torch.Tensor, dout: torch.Tensor) -> dict[str, torch.Tensor]:
    """Everything a training step leaves behind: output, gradients, buffers."""
    x = x.detach().requires_grad_()
    out = module(x)
    out.backward(dout.to(out.dtype))
    found = {"out": out.detach(), "dx": x.grad}
    found |= {f"d{key}": p.grad for key, p in module.named_parameters()}
    return found | {key: b.clone() for key, b in module.named_buffers()}


LONE = "dspatial.norm.weight"  # that of a norm of one channel, with its shift's


def gathered(found: dict[str, torch.Tensor], scales: dict[str, float]) -> dict[str, torch.Tensor]:
    """What is compared: without the counters, and without the gradients of biases in front of batch
    statistics, which are zero but for rounding. The scale and the shift of a norm of one channel,
    sums over the map that may cancel, have their gradients as one vector."""
    largest = max(scales.values())
    kept = {
        key: value
        for key, value in means_with_variances(found).items()
        if not key.endswith("num_batches_tracked") and scales.get(key, largest) > 1e-9 * largest
    }
    shift = LONE.replace("weight", "bias")
    if LONE in kept and shift in kept:
        kept[LONE] = torch.cat([kept[LONE], kept.pop(shift)])
    return kept


def rounded_step(
    truth: nn.Module,
    x: torch.Tensor,
    dout: torch.Tensor,
    dtype: torch.dtype,
    call: Callable[..., dict[str, torch.Tensor]],
) -> dict[str, torch.Tensor]:
    """What the float64 module leaves behind once it and x are rounded, as compared."""
    module = with_rounded_parameters(truth, dtype)
    return call(module, rounded_anew(x.double(), dtype), dout.double())


def with_their_weights(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A bias of one number, a sum over the whole map that may cancel, as one vector with the
    gradient of its layer's weight."""
    found = dict(found)
    for key in [k for k, v in found.items() if k.endswith(".bias") and v.numel() == 1]:
        weight = key.removesuffix("bias") + "weight"
        if weight in found:
            found[weight] = torch.cat([found[weight].flatten(), found.pop(key)])
    return found


def compare(make, shape, dtype, device, layout="nchw", train=True, draws=1):
    def pair():
        ours = randomize(make()).train(train)
        if dtype.itemsize == 2:
            without_kinks(ours)
        return ours, twin(ours, torch.float64)

    errors = Errors()
    for _ in errors.draws(draws, peers=draws >= 5):
        ours, truth, x = module_and_input(pair, lambda: make_map(shape, dtype, device, layout))
        eager = twin(ours, dtype)
        # In eval mode along x, so that the logits' gradients are sums of one sign rather than of
        # noise; in training noise, since batch statistics take such a common part away again.
        dout = torch.randn_like(x) if train else x * (1 + 0.5 * torch.randn_like(x))
        assert explain(ours, x).backend == "triton"
        found = step(ours, x, dout)
        assert found["out"].is_contiguous(memory_format=memory_format(layout))
        want, peer = step(truth, x.double(), dout.double()), step(eager, x, dout)
        assert list(found) == list(want)
        for key in want:
            if key.endswith("num_batches_tracked"):
                assert found[key] == want[key], key
        scales = {key: value.norm().item() for key, value in want.items() if key.startswith("d")}

        def compared(each, scales=scales):
            each = gathered(each, scales)
            return with_their_weights(each) if dtype != torch.float64 and not train else each

        found, want, peer = map(compared, (found, want, peer))
        again = partial(rounded_step, truth, x, dout, dtype, step)
        sway = Sway(lambda again=again, compared=compared: compared(again()), want)
        for key, b in want.items():
            # A single number that sums noise over the whole map: any error relative to it is
            # luck. Eval mode has sums of one sign, float64 has digits to spare; both check them.
            if (b.numel() == 1 or key == LONE) and train and dtype != torch.float64:
                continue
            errors.add(key, found[key], b, peer[key], sway, key in scales and key != "dx")


@pytest.mark.parametrize("train", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("layout", ("nchw", "channels_last"))
def test_parity_in_float64(layout, preset, train, device, seed):
    make = lambda: BAM(100, preset=preset, device=device, dtype=torch.float64)  # noqa: E731
    compare(make, (8, 100, 9, 11), torch.float64, device, layout, train)


# Each dtype in both presets, both modes and both layouts, which do not depend on one another.
@pytest.mark.parametrize(
    "dtype,preset,train,layout",
    (
        (torch.float32, "paper", True, "nchw"),
        (torch.float32, "paper", False, "channels_last"),
        (torch.float32, "official", True, "channels_last"),
        (torch.float32, "official", False, "nchw"),
        (torch.float16, "paper", True, "channels_last"),
        (torch.float16, "official", False, "nchw"),
        (torch.bfloat16, "paper", False, "channels_last"),
        (torch.bfloat16, "official", True, "nchw"),
    ),
    ids=name,
)
def test_parity_beside_eager(dtype, preset, train, layout, device, seed):
    make = lambda: BAM(100, preset=preset, device=device, dtype=dtype)  # noqa: E731
    compare(make, (8, 100, 9, 11), dtype, device, layout, train, 5)


@pytest.mark.parametrize(
    "shape", ((64, 64, 1, 1), (6, 37, 7, 7), (4, 256, 14, 14), (2, 64, 28, 28)), ids=name
)
@pytest.mark.parametrize("preset", PRESETS)
def test_shapes(preset, shape, device, seed):
    for dtype in (torch.float64, torch.float32):
        make = lambda: BAM(shape[1], preset=preset, device=device, dtype=dtype)  # noqa: B023, E731
        compare(make, shape, dtype, device, train=False)
    make = lambda: BAM(shape[1], preset=preset, device=device, dtype=torch.float64)  # noqa: E731
    compare(make, shape, torch.float64, device, train=True)


@pytest.mark.parametrize("layout", LAYOUTS[2:])
def test_sliced_inputs(layout, device, seed):
    make = lambda: BAM(37, device=device, dtype=torch.float64)  # noqa: E731
    compare(make, (3, 37, 9, 11), torch.float64, device, layout)


OPTIONS = [
    *({"combine": combine} for combine in COMBINES),
    {"channel": False},
    {"spatial": False},
    {"residual": False},
    {"num_dilated": 0},
    {"num_dilated": 3, "dilation": 2},
    {"mlp_layers": 0},
    {"mlp_layers": 3},
    {"norm_hidden": True},
    {"norm_final": False},
    {"preset": "official", "combine": "max", "norm_final": True},
    {"reduction": 8, "dilation": 1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(options, device, seed):
    options = {"reduction": 4} | options
    make = lambda: BAM(40, **options, device=device, dtype=torch.float64)  # noqa: E731
    for train in (True, False):
        compare(make, (5, 40, 6, 7), torch.float64, device, "channels_last", train)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=name)
def test_squeeze_excite(dtype, device, seed):
    make = lambda: SqueezeExcite(40, 8, device=device, dtype=dtype)  # noqa: E731
    compare(make, (5, 40, 6, 7), dtype, device, draws=1 if dtype == torch.float64 else 5)


def test_the_reference_is_the_equations(seed):
    """Eq. 1-4 written out once more, on the weights of a module with two dilated convolutions."""
    module = randomize(reference.BAM(32, dilation=4)).double().eval()
    x = torch.randn(2, 32, 9, 7, dtype=torch.float64)
    w = module.state_dict()

    def norm(y, key, shape):
        mean, var = w[f"{key}.running_mean"].view(shape), w[f"{key}.running_var"].view(shape)
        y = (y - mean) / (var + 1e-5).sqrt()
        return y * w[f"{key}.weight"].view(shape) + w[f"{key}.bias"].view(shape)

    def conv(y, key, **options):
        return torch.conv2d(y, w[f"{key}.weight"], w[f"{key}.bias"], **options)

    pooled = x.flatten(2).sum(2) / 63
    hidden = (pooled @ w["channel.fc.0.weight"].T + w["channel.fc.0.bias"]).clamp_min(0)
    mc = norm(hidden @ w["channel.fc.1.weight"].T + w["channel.fc.1.bias"], "channel.norm", (1, -1))
    ms = conv(x, "spatial.reduce").clamp_min(0)
    for i in range(2):
        ms = conv(ms, f"spatial.dilated.{i}", padding=4, dilation=4).clamp_min(0)
    ms = norm(conv(ms, "spatial.project"), "spatial.norm", (1, -1, 1, 1))
    m = 1 / (1 + torch.exp(-(mc[:, :, None, None] + ms)))
    torch.testing.assert_close(module(x), x + x * m, rtol=1e-12, atol=1e-12)
    assert (module(x) - x).norm() > 0.1 * x.norm()


@pytest.mark.parametrize("preset", PRESETS)
def test_state_dicts_are_the_references(preset):
    ours, plain = BAM(64, preset=preset), reference.BAM(64, preset=preset)
    assert list(ours.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(ours.state_dict())
    ours.load_state_dict(plain.state_dict())


def test_copies(device, seed):
    """deepcopy, pickle, torch.save: the copy computes the same bits, apart from the original."""
    module = randomize(BAM(32, device=device)).eval()
    x = make_map((2, 32, 5, 7), torch.float32, device)
    want = module(x)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    loaded = BAM(32, device=device).eval()
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for clone in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert torch.equal(clone(x), want)
        with torch.no_grad():
            clone.channel.fc[0].weight.add_(1)
        assert not torch.equal(clone(x), want)
        assert torch.equal(module(x), want)


def test_device_and_dtype(device):
    module = BAM(32, device="meta", dtype=torch.float16)
    assert {p.device.type for p in module.parameters()} == {"meta"}
    assert {p.dtype for p in module.parameters()} == {torch.float16}
    assert SqueezeExcite(32, dtype=torch.float64).channel.fc[0].weight.dtype == torch.float64
    moved = BAM(32).to(device, torch.bfloat16)
    x = make_map((2, 32, 5, 7), torch.bfloat16, device)
    assert moved(x).dtype == torch.bfloat16


def test_repr():
    assert repr(BAM(64, combine="max", residual=False)).startswith(
        "BAM(\n  64, reduction=16, combine='max', residual=False"
    )
    assert "64, reduction=8" in repr(SqueezeExcite(64, 8))


def test_no_state_is_kept_without_gradients(device, seed):
    module = BAM(32, device=device).eval()
    x = make_map((2, 32, 5, 7), torch.float32, device).requires_grad_()
    with torch.no_grad():
        assert module(x).grad_fn is None
    with torch.inference_mode():
        assert module(x.detach()).is_inference()


@pytest.mark.parametrize("frozen", ("parameters", "input"))
def test_partly_frozen(frozen, device, seed):
    """Gradients of the rest are the same whatever is frozen."""
    ours = randomize(BAM(24, 4, device=device, dtype=torch.float64))
    truth = twin(ours, torch.float64)
    x = make_map((3, 24, 5, 7), torch.float64, device)
    found = []
    for module in (ours, truth):
        leaf = x.detach().requires_grad_(frozen != "input")
        if frozen == "parameters":
            module.requires_grad_(False)
        module(leaf).square().sum().backward()
        found.append([leaf.grad, *(p.grad for p in module.parameters())])
    assert any(g is not None for g in found[0])
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=name)
def test_autocast(dtype, device, seed):
    """A float32 map stays float32 and a half map half, with float32 parameters and gradients."""
    module = randomize(BAM(32, device=device))
    for x_dtype in (torch.float32, dtype):
        x = make_map((4, 32, 5, 7), x_dtype, device).requires_grad_()
        with torch.autocast(device.type, dtype):
            out = module(x)
        out.float().square().sum().backward()
        assert out.dtype == x.grad.dtype == x_dtype
        assert module.channel.fc[0].weight.grad.dtype == torch.float32
        want = twin(module, torch.float64)(x.double())
        assert (out.double() - want).norm() / want.norm() < 5 * torch.finfo(dtype).eps


@pytest.mark.parametrize("where", ("spatial.reduce", "spatial", "channel"))
def test_hooks_are_called(where, device, seed):
    """A hook that the fused path would pass by: plain PyTorch runs, and `explain` says why."""
    module = BAM(32, device=device).eval()
    x = make_map((2, 32, 5, 7), torch.float32, device)
    want, calls = module(x), []
    module.get_submodule(where).register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(module(x), want)
    assert calls == [1]
    told = explain(module, x)
    assert told.backend == "reference" and "hooks" in told.reasons["triton"]


@pytest.mark.parametrize("train", (True, False), ids=("train", "eval"))
def test_compile_fullgraph(train, device, seed):
    """One graph, forward and backward; the same numbers as without."""
    module = randomize(BAM(24, 4, device=device)).train(train)
    twins = [copy.deepcopy(module), module]
    twins[1] = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = make_map((3, 24, 5, 7), torch.float32, device, "channels_last")
    dout = torch.randn_like(x)
    a, b = step(twins[0], x, dout), step(twins[1], x, dout)
    b = {key.replace("_orig_mod.", ""): value for key, value in b.items()}
    for key, value in a.items():
        torch.testing.assert_close(b[key], value, rtol=1e-4, atol=1e-5, msg=key)


def test_backends_agree(device, seed):
    """The same module under use_backend, and both observers see the same logits."""
    module = randomize(BAM(24, 4, device=device, dtype=torch.float64)).eval()
    x = make_map((3, 24, 5, 7), torch.float64, device)
    seen = []
    module.observer = lambda c, s: seen.append((c, s))
    with bam_kernels.use_backend("reference"):
        plain = module(x)
    with bam_kernels.use_backend("triton"):
        fused = module(x)
    torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-12)
    for a, b in zip(*seen, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
