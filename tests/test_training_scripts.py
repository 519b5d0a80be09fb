"""What training scripts do around a module: the fused one does it as plain PyTorch does.

Each script runs on the fused module and on the reference with the same weights; in float64 all that
it leaves behind must agree to rounding.
"""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from cases import PRESETS, make_map
from test_module import randomize, step, twin
from tolerances import PEER_ELEMENTS, by_layer, relative_error
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from bam_kernels import BAM, explain
from bam_kernels.testing.traffic import measure

pytestmark = pytest.mark.usefixtures("large_tiles")

F64 = torch.float64
SHAPE = (3, 24, 5, 7)


@pytest.fixture(autouse=True)
def one_thread(device):
    """The interpreter makes many small tensors, over which threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pair(device, dtype=F64, **options):
    """A fused module of random weights and statistics, and the reference with the same."""
    ours = randomize(BAM(24, 4, dilation=2, **options, device=device, dtype=dtype))
    return ours, twin(ours, dtype)


def assert_same(found: dict, want: dict, tolerance: float = 1e-10) -> None:
    """The same keys and values, to rounding; what is zero but for rounding is so in both.

    A gradient's key starts with "d": that of a bias in front of batch statistics is zero. A layer's
    parameters of few numbers are compared as one vector, and so are their gradients.
    """
    assert list(found) == list(want)
    floating = {}
    scales = [t.norm().item() for k, t in want.items() if k.startswith("d") and t is not None]
    least = 1e-9 * max(scales, default=0.0)
    for key, b in want.items():
        a = found[key]
        assert (a is None) == (b is None), key
        if b is None:
            continue
        assert a.dtype == b.dtype and a.shape == b.shape, key
        if not b.is_floating_point() or b.numel() == 0:
            assert torch.equal(a, b), key
        else:
            floating[key] = a, b
    few = {key for key, (_, b) in floating.items() if b.numel() < PEER_ELEMENTS}
    found, want = (
        by_layer({key: pair[i] for key, pair in floating.items()}, few.__contains__) for i in (0, 1)
    )
    for key, b in want.items():
        a = found[key]
        if key.startswith("d") and b.norm() <= least:
            assert a.norm() <= least, f"{key}: {a.norm():.1e}, expected zero but for rounding"
        else:
            error = relative_error(a, b)
            assert error <= tolerance, f"{key}: relative error {error:.1e}"


def left_behind(module: nn.Module) -> dict[str, torch.Tensor | None]:
    """Copies of the parameters' gradients and of the buffers."""
    left = {
        f"d{k}": None if p.grad is None else p.grad.clone() for k, p in module.named_parameters()
    }
    return left | {k: b.clone() for k, b in module.named_buffers()}


# --- scripts: everything that autograd is asked for -------------------------------------------


def accumulate(module, x):
    """Three micro-batches, one after the other."""
    for part in (x, x.roll(1, 0) * 0.5, x.flip(3)):
        module(part).square().mean().backward()
    return {}


def retain_graph(module, x):
    out = module(x)
    out.square().sum().backward(retain_graph=True)
    once = x.grad.clone()
    out.sin().sum().backward()
    return {"once": once, "dx": x.grad}


def used_twice(module, x):
    out = x * 2 + module(x).sin() * x
    out.square().sum().backward()
    return {"out": out, "dx": x.grad}


def shared_weights(module, x):
    out = module(F.relu(module(x)))
    out.square().sum().backward()
    return {"out": out, "dx": x.grad}


def in_place_after(module, x):
    out = F.relu_(module(x))
    out.square().sum().backward()
    return {"out": out, "dx": x.grad}


def expanded_gradient(module, x):
    out = module(x)
    out.sum().backward()
    return {"out": out, "dx": x.grad}


def transposed_gradient(module, x):
    torch.manual_seed(3)
    weight = torch.randn(x.transpose(2, 3).shape, dtype=x.dtype).to(x.device)
    (module(x).transpose(2, 3) * weight).sum().backward()
    return {"dx": x.grad}


def subsets_of_inputs(module, x):
    """torch.autograd.grad of the input alone, and of a parameter of either branch alone."""
    leaves = (x, module.spatial.reduce.weight, module.channel.fc[0].weight)
    found = {
        f"d{i}": torch.autograd.grad(module(x).square().sum(), leaf)[0]
        for i, leaf in enumerate(leaves)
    }
    assert all(p.grad is None for p in (x, *module.parameters()))
    return found


def gradient_with_a_graph(module, x):
    """create_graph=True gives the same first derivative, of the input and of the parameters."""
    leaves = [x, *module.parameters()]
    grads = torch.autograd.grad(module(x).square().sum(), leaves, create_graph=True)
    return {f"d{i}": g for i, g in enumerate(grads)}


def gradient_penalty(module, x):
    out = module(x)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    (grad.norm() + out.sum()).backward()
    return {"out": out, "grad": grad, "dx": x.grad}


def batched_gradients(module, x):
    out = module(x)
    douts = torch.stack([torch.ones_like(out), out.detach()])
    return {"dx": torch.autograd.grad(out, x, douts, is_grads_batched=True)[0]}


def anomaly_detection(module, x):
    with torch.autograd.detect_anomaly(check_nan=True):
        module(x).square().sum().backward()
    return {"dx": x.grad}


def saved_on_the_cpu(module, x):
    with torch.autograd.graph.save_on_cpu():
        out = module(x)
    out.square().sum().backward()
    return {"dx": x.grad}


def empty_batch(module, x):
    x = x.detach()[:0].requires_grad_()
    out = module(x)
    out.sum().backward()
    return {"out": out, "dx": x.grad}


def tensor_hooks(module, x):
    """On the input, the output and, after accumulation, on every parameter."""
    seen = {}
    x.register_hook(lambda grad: seen.__setitem__("dx", grad.clone()))
    for key, p in module.named_parameters():
        p.register_post_accumulate_grad_hook(
            lambda p, key=key: seen.__setitem__(f"d.{key}", p.grad.clone())
        )
    out = module(x)
    out.register_hook(lambda grad: grad * 2)  # what it returns takes the gradient's place
    out.square().sum().backward()
    return dict(sorted(seen.items())) | {"dx.grad": x.grad}


SCRIPTS = (
    accumulate, retain_graph, used_twice, shared_weights, in_place_after, expanded_gradient,
    transposed_gradient, subsets_of_inputs, gradient_with_a_graph, gradient_penalty,
    batched_gradients, saved_on_the_cpu, empty_batch, tensor_hooks,
    pytest.param(
        anomaly_detection, marks=pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
    ),
)  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda f: f.__name__)
def test_scripts(script, preset, device, seed):
    """Outputs, gradients and statistics are the reference's, whatever autograd is asked for."""
    ours, plain = pair(device, preset=preset)
    x = make_map(SHAPE, F64, device)
    assert explain(ours, x).backend == "triton"
    found, want = (
        script(module, x.clone().requires_grad_()) | left_behind(module) for module in (ours, plain)
    )
    assert_same(found, want)


def func_gradient(module, x):
    """torch.func.grad over functional_call, twice for the input."""
    parameters = {k: p.detach() for k, p in module.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(module, parameters, (x,)).square().sum()

    found = torch.func.grad(loss)(parameters, x)

    def penalty(x):
        return torch.func.grad(loss, argnums=1)(parameters, x).square().sum()

    return {f"d{k}": g for k, g in found.items()} | {"dx": torch.func.grad(penalty)(x)}


def per_sample_gradients(module, x):
    parameters = {k: p.detach() for k, p in module.named_parameters()}

    def loss(parameters, sample):
        return torch.func.functional_call(module, parameters, (sample[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    return {f"d{k}": g for k, g in found.items()}


def mapped(module, x):
    return {"out": torch.func.vmap(module)(torch.stack([x, x * 2]))}


def jacobians(module, x):
    def samples(x):
        return module(x).sum((1, 2, 3))

    vectorized = torch.autograd.functional.jacobian(samples, x, vectorize=True)
    return {"jacrev": torch.func.jacrev(samples)(x), "vectorized": vectorized}


def forward_mode(module, x):
    """Forward-mode derivatives, by torch.func.jvp and by dual numbers."""
    _, jvp = torch.func.jvp(module, (x,), (torch.cos(x),))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.cos(x))
        tangent = torch.autograd.forward_ad.unpack_dual(module(dual)).tangent
    return {"jvp": jvp, "dual": tangent.detach()}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    "script", (func_gradient, per_sample_gradients, mapped, jacobians, forward_mode),
    ids=lambda f: f.__name__,
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")  # torch's own, for jvp
def test_function_transforms(script, preset, device, seed):
    """torch.func and forward mode, in eval mode, as batch statistics are not functional."""
    ours, plain = (module.eval() for module in pair(device, preset=preset))
    x = make_map(SHAPE, F64, device)
    assert_same(script(ours, x), script(plain, x))


def test_functional_call(device, seed):
    """Other parameters and buffers in the module's place, with gradients; its own stay as were."""
    ours, plain = pair(device)
    x = make_map(SHAPE, F64, device)
    assert explain(ours, x).backend == "triton"
    before = copy.deepcopy(ours.state_dict())
    found = []
    for module in (ours, plain):
        leaves = {k: (p.detach() * 1.5).requires_grad_() for k, p in module.named_parameters()}
        buffers = {k: b.clone() for k, b in module.named_buffers()}
        out = torch.func.functional_call(module, leaves | buffers, (x,))
        out.square().sum().backward()
        found.append({"out": out} | {f"d{k}": p.grad for k, p in leaves.items()} | buffers)
    assert_same(*found)
    assert all(torch.equal(b, before[k]) for k, b in ours.state_dict().items())
    assert not torch.equal(found[0]["channel.norm.running_mean"], ours.channel.norm.running_mean)


# --- only the work that is asked for ----------------------------------------------------------


@pytest.mark.parametrize("train", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize("preset", PRESETS)
def test_nothing_is_saved_where_no_gradient_is_wanted(preset, train, device, seed):
    """Under no_grad, and where neither the input nor a parameter wants one."""
    module = pair(device, preset=preset)[0].train(train)
    x = make_map(SHAPE, F64, device).requires_grad_()
    assert explain(module, x).backend == "triton"
    saved = []

    def pack(t):
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        with torch.no_grad():
            module(x)
        module.requires_grad_(False)
        module(x.detach())
        assert saved == []
        module(x)
    assert saved


@pytest.mark.parametrize("input_grad", (True, False), ids=("dx", "no_dx"))
@pytest.mark.parametrize("frozen", ("spatial", "channel", "both"))
@pytest.mark.parametrize("preset", PRESETS)
def test_frozen_branches(preset, frozen, input_grad, device, seed):
    """The rest has the gradients that it has without freezing, in no more passes over x."""
    ours, plain = (randomize(BAM(64, 8, preset=preset, device=device, dtype=F64)) for _ in "ab")
    plain.load_state_dict(ours.state_dict())
    plain = twin(plain, F64)
    x = make_map((2, 64, 10, 14), F64, device)
    dout = torch.randn_like(x)
    want = step(plain, x, dout)
    for branch in ("spatial", "channel") if frozen == "both" else (frozen,):
        ours.get_submodule(branch).requires_grad_(False)
    leaf = x.clone().requires_grad_(input_grad)
    counted = measure(strict=True) if device.type == "cpu" else contextlib.nullcontext()
    out = ours(leaf)
    if frozen == "both" and not input_grad:
        assert not out.requires_grad
        return
    with counted as backward:
        out.backward(dout)
    found = {"out": out.detach(), "dx": leaf.grad} | left_behind(ours)
    for key in want:
        if key == "dx" and not input_grad:
            want[key] = None
        if key.startswith("d") and (
            (frozen == "both" and key != "dx") or key[1:].startswith(frozen)
        ):
            want[key] = None
    assert_same(found, want)
    if backward is not None:
        assert backward.passes(x) <= 5.01


@pytest.mark.parametrize("preset", PRESETS)
def test_accumulation_adds_nothing_the_size_of_the_input(preset, device, seed):
    """Each micro-batch's backward, gradients being there already, takes the five passes of one."""
    module = BAM(64, 8, preset=preset, device=device)
    for _ in range(3):
        x = make_map((2, 64, 10, 14), torch.float32, device).requires_grad_()
        out = module(x)
        dout = torch.randn_like(x)
        counted = measure(strict=True) if device.type == "cpu" else contextlib.nullcontext()
        with counted as backward:
            out.backward(dout)
        assert module.spatial.reduce.weight.grad is not None
        if backward is not None:
            assert backward.passes(x) == pytest.approx(5.0, abs=0.01)


# --- activation checkpointing -----------------------------------------------------------------


@pytest.mark.parametrize("reentrant", (False, True), ids=("saved_tensor_hooks", "reentrant"))
@pytest.mark.parametrize("preset", PRESETS)
def test_checkpoint(preset, reentrant, device, seed):
    """The gradients of a plain step; statistics and counters move twice, in the reference as well.

    Recomputation stops early, where autograd has all that it saved, behind the last batch norm.
    """
    ours, plain = pair(device, preset=preset)
    x, dout = (make_map(SHAPE, F64, device) for _ in "xd")
    unchecked = step(copy.deepcopy(plain), x, dout)
    assert explain(ours, x).backend == "triton"
    found, want = (
        step_under(module, x, dout, lambda m, x: checkpoint(m, x, use_reentrant=reentrant))
        for module in (ours, plain)
    )
    assert_same(found, want)
    gradients = [key for key in want if key.startswith(("d", "out"))]
    assert_same({k: found[k] for k in gradients}, {k: unchecked[k] for k in gradients})
    counters = [found[key].item() for key in found if key.endswith("num_batches_tracked")]
    assert counters and set(counters) == {2}


def step_under(module, x, dout, call):
    x = x.clone().requires_grad_()
    out = call(module, x)
    out.backward(dout)
    return {"out": out.detach(), "dx": x.grad} | left_behind(module)


@pytest.mark.parametrize("preset", PRESETS)
def test_selective_checkpoint(preset, device, seed):
    """A policy can keep the outputs of our operators, whose kernels then run once."""
    ours, plain = pair(device, preset=preset)
    x, dout = (make_map(SHAPE, F64, device) for _ in "xd")
    ops = torch.ops.bam_kernels
    calls = []

    def policy(ctx, op, *args, **kwargs):
        mine = op in (ops.pool_reduce_linked.default, ops.channel_mlp.default)
        if mine and not ctx.is_recompute:
            calls.append(op)
        return CheckpointPolicy.MUST_SAVE if mine else CheckpointPolicy.PREFER_RECOMPUTE

    def call(module, x):
        return checkpoint(
            module, x, use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(policy),
        )  # fmt: skip

    counted = measure() if device.type == "cpu" else contextlib.nullcontext()
    with counted as traffic:
        found = step_under(ours, x, dout, call)
    assert_same(
        found, step_under(plain, x, dout, lambda m, x: checkpoint(m, x, use_reentrant=False))
    )
    assert len(calls) == 2
    if traffic is not None:
        kernels = [launch.kernel for launch in traffic.launches]
        assert sum("pool_reduce" in kernel for kernel in kernels) == 1
        assert kernels.count("_channel_mlp_kernel") == 1
