"""Mixed precision, optimizers and copies: what surrounds a module in a training script.

The same steps on the fused module and on the reference with the same weights.
"""

from __future__ import annotations

import copy
import io

import pytest
import torch
from cases import PRESETS, make_map, name
from kinks import without_kinks
from test_module import step
from test_training_scripts import F64, SHAPE, assert_same, one_thread, pair  # noqa: F401
from tolerances import relative_error
from torch import nn

from bam_kernels import BAM, explain

pytestmark = pytest.mark.usefixtures("large_tiles")

HALF_TYPES = (torch.float16, torch.bfloat16)


# --- automatic mixed precision ----------------------------------------------------------------


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors])


def amp_step(module, x, dout, dtype, inside=False):
    """(output, gradients of x and of all parameters); `inside`: backward under autocast too."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    with torch.autocast(x.device.type, dtype, enabled=dtype != F64):
        out = module(x)
        if inside:
            out.backward(dout)
    if not inside:
        out.backward(dout)
    return out, x.grad, [p.grad for p in module.parameters()]


@pytest.mark.parametrize(
    "preset,x_half,inside",
    (
        ("paper", False, False),
        ("paper", True, True),
        ("official", False, True),
        ("official", True, False),
    ),
)
@pytest.mark.parametrize("dtype", HALF_TYPES, ids=name)
def test_autocast_gradients(dtype, preset, x_half, inside, device, seed):
    """No further from float64 than the reference under the same autocast: by half as much again, or
    by one rounding of the half type; wherever backward is called."""
    ours, plain = (without_kinks(module) for module in pair(device, torch.float32, preset=preset))
    ours.eval(), plain.eval()  # batch statistics of small batches amplify rounding at will
    truth = copy.deepcopy(plain).double()
    x = make_map((4, 24, 9, 11), dtype if x_half else torch.float32, device)
    dout = x * (1 + 0.5 * torch.randn_like(x))
    with torch.autocast(device.type, dtype):
        assert explain(ours, x).backend == "triton"
    found = amp_step(ours, x, dout, dtype, inside)
    eager = amp_step(plain, x, dout, dtype, inside)
    want = amp_step(truth, x.double(), dout.double(), F64)
    assert found[0].dtype == found[1].dtype == x.dtype
    assert {g.dtype for g in found[2]} == {torch.float32}
    for what, a, b, t in zip(("out", "dx", "parameters"), found, eager, want, strict=True):
        a, b, t = (flat(v if isinstance(v, list) else [v]) for v in (a, b, t))
        bound = max(1.5 * relative_error(b, t), torch.finfo(dtype).eps)
        assert relative_error(a, t) <= bound, f"{what}: {relative_error(a, t):.1e} > {bound:.1e}"


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of the infinite step
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", HALF_TYPES, ids=name)
def test_grad_scaler(dtype, preset, device, seed):
    """Three steps under a GradScaler, the second of which overflows and is skipped: the parameters
    and the optimizer's state stay, the scale is halved. The parameters then agree with the
    reference's under the same autocast within 4 roundings of the half type."""
    modules = [without_kinks(m).eval() for m in pair(device, torch.float32, preset=preset)]
    start = flat(modules[0].parameters())
    batches = [make_map((3, 24, 9, 11), torch.float32, device) for _ in range(3)]
    moved = []
    for module in modules:
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-2, momentum=0.9)
        scaler = torch.amp.GradScaler(device.type, init_scale=256.0)
        for i, x in enumerate(batches):
            with torch.autocast(device.type, dtype):
                loss = (module(x) * x).mean() * (float("inf") if i == 1 else 1.0)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            assert {p.grad.dtype for p in module.parameters()} == {torch.float32}
            before = copy.deepcopy((flat(module.parameters()), optimizer.state_dict()["state"]))
            scaler.step(optimizer)
            scaler.update()
            after = flat(module.parameters()), optimizer.state_dict()["state"]
            assert torch.equal(after[0], before[0]) == (i == 1)
            if i == 1:
                for key, state in before[1].items():
                    assert torch.equal(state["momentum_buffer"], after[1][key]["momentum_buffer"])
            assert scaler.get_scale() == (256.0 if i == 0 else 128.0)
        moved.append(flat(module.parameters()) - start)
    assert relative_error(*moved) <= 4 * torch.finfo(dtype).eps


# --- optimizers -------------------------------------------------------------------------------

# Adam divides by a gradient's own size, and so amplifies the rounding of one that is zero but for
# rounding (a bias in front of batch statistics) by 1 / eps.
OPTIMIZERS = {
    "sgd_foreach": lambda p: torch.optim.SGD(p, 0.05, 0.9, weight_decay=1e-2, foreach=True),
    "sgd_fused": lambda p: torch.optim.SGD(p, 0.05, 0.9, nesterov=True, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, eps=1e-4, weight_decay=0.1),
    "adamw_fused": lambda p: torch.optim.AdamW(p, 1e-2, eps=1e-4, fused=True),
}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers(optimizer, preset, device, seed):
    """Three steps with clipping, the spatial branch frozen in the second: the same parameters."""
    ours, plain = pair(device, preset=preset)
    batches = [make_map(SHAPE, F64, device) for _ in range(3)]
    found = []
    for module in (ours, plain):
        start = flat(module.parameters())
        steps = OPTIMIZERS[optimizer](module.parameters())
        norms = []
        for i, x in enumerate(batches):
            module.spatial.requires_grad_(i != 1)
            steps.zero_grad()
            (module(x) - x.flip(0)).square().sum().backward()
            assert (module.spatial.reduce.weight.grad is None) == (i == 1)
            norms.append(nn.utils.clip_grad_norm_(module.parameters(), 0.1))
            assert norms[-1] > 0.1
            steps.step()
        left = {"moved": flat(module.parameters()) - start, "norms": torch.stack(norms)}
        found.append(left | dict(module.state_dict()))
    assert explain(ours, batches[0]).backend == "triton"
    assert_same(*found)


# --- copies -----------------------------------------------------------------------------------


def saved_whole(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def assigned(module):
    clone = BAM(24, 4, dilation=2, device="meta", dtype=F64)
    state = {k: t.clone() for k, t in module.state_dict().items()}
    clone.load_state_dict(state, assign=True)
    assert clone.channel.fc[0].weight.data_ptr() == state["channel.fc.0.weight"].data_ptr()
    return clone


@pytest.mark.parametrize("clone", (copy.deepcopy, saved_whole, assigned), ids=lambda f: f.__name__)
def test_copies_in_the_middle_of_training(clone, device, seed):
    """A copy made after a step trains on as the original does, and apart from it."""
    ours, _ = pair(device)
    x, dout = (make_map(SHAPE, F64, device) for _ in "xd")
    step(ours, x, dout)
    ours.zero_grad()
    other = clone(ours)
    other.zero_grad()
    assert explain(other, x).backend == "triton"
    state = copy.deepcopy(ours.state_dict())
    found = step(other, x, dout)
    assert all(torch.equal(t, state[k]) for k, t in ours.state_dict().items())
    assert_same(found, step(ours, x, dout))


def test_averaged_model(device, seed):
    """An exponential average of parameters and buffers, as scripts keep it beside the network."""
    x = make_map(SHAPE, F64, device)
    found = []
    for module in pair(device):
        average = torch.optim.swa_utils.AveragedModel(
            module, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=True
        )
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        for i in range(3):
            optimizer.zero_grad()
            module(x * (i + 1)).square().mean().backward()
            optimizer.step()
            average.update_parameters(module)
        out = average.eval()(x)
        assert not torch.equal(out, module.eval()(x))
        found.append({"out": out} | dict(average.state_dict()))
    assert_same(*found)


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=name)
def test_conversion(dtype, device, seed):
    """.to(dtype) of a trained module, and memory shared with other processes."""
    ours, plain = pair(device)
    x = make_map(SHAPE, F64, device)
    step(ours, x, x), step(plain, x, x)
    for module in (ours, plain):
        module.to(dtype).eval()
        if device.type == "cpu":
            assert module.share_memory().channel.fc[0].weight.is_shared()
    out = ours(x.to(dtype))
    assert out.dtype == dtype and explain(ours, x.to(dtype)).backend == "triton"
    want = copy.deepcopy(plain).double()(x.to(dtype).double())
    error, own = relative_error(out, want), relative_error(plain(x.to(dtype)), want)
    assert error <= max(1.5 * own, torch.finfo(dtype).eps)
