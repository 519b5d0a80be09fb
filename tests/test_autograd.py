"""The operators as torch sees them: opcheck, and two derivatives by finite differences."""

from __future__ import annotations

import pytest
import torch
from cases import COMBINES, make_map
from torch.autograd import gradcheck, gradgradcheck

import bam_kernels
from bam_kernels import functional

OPS = torch.ops.bam_kernels
SHAPE = (2, 5, 3, 2)


def inputs(device, dtype=torch.float64, grad=True):
    n, c, h, w = SHAPE
    made = {
        "x": make_map(SHAPE, dtype, device),
        "channel": torch.randn(n, c, device=device).to(dtype),
        "spatial": torch.randn(n, 1, h, w, device=device).to(dtype),
        "weight": torch.randn(2, c, device=device).to(dtype),
        "bias": torch.randn(2, device=device).to(dtype),
        "dpooled": torch.randn(n, c, device=device).to(dtype),
        "dreduced": torch.randn(n, 2, h, w, device=device).to(dtype),
        "dout": make_map(SHAPE, dtype, device),
    }
    if grad:
        for name in ("x", "channel", "spatial", "weight", "bias"):
            made[name].requires_grad_()
    return made


def mlp_arguments(device, hidden_stats=True, stats=True):
    def vector(n, positive=False):
        t = torch.randn(n, dtype=torch.float64, device=device)
        return (t.abs() + 0.5 if positive else t).requires_grad_()

    def matrix(n, m):
        return torch.randn(n, m, dtype=torch.float64, device=device, requires_grad=True)

    return (
        matrix(6, 7), matrix(3, 7), vector(3), matrix(7, 3), vector(7),
        vector(3), vector(3),
        *((None, None) if hidden_stats else (vector(3).detach(), vector(3, True).detach())),
        vector(7), vector(7),
        *((None, None) if stats else (vector(7).detach(), vector(7, True).detach())),
        True, hidden_stats, 1e-5, True, stats, 1e-5,
    )  # fmt: skip


def spatial_arguments(device, preset="official", train=True):
    """reduced, the lists of tensors, and the options of `spatial_branch`, all in float64."""
    made = {"dtype": torch.float64, "device": device}
    hidden, convolutions = 3, 2
    widths = [hidden] * (convolutions + 1) if preset == "official" else [1]

    def leaf(*shape):
        return torch.randn(*shape, **made).requires_grad_()

    statistics = [[torch.randn(w, **made), torch.rand(w, **made) + 0.5] for w in widths]
    means, variances = ([], []) if train else map(list, zip(*statistics, strict=True))
    return (
        leaf(2, hidden, 4, 5),
        [leaf(hidden, hidden, 3, 3) for _ in range(convolutions)],
        [leaf(hidden) for _ in range(convolutions)],
        leaf(hidden), leaf(1),
        [leaf(w) for w in widths], [leaf(w) for w in widths], means, variances,
        preset == "official", preset != "official", [train] * len(widths), [1e-5] * len(widths), 2,
    )  # fmt: skip


def opcheck(op, args):
    torch.library.opcheck(op.default, args)


@pytest.mark.parametrize("layout", ("nchw", "channels_last", "sliced", "strided"))
def test_opcheck_gate(layout, device, seed):
    t = inputs(device)
    x = make_map(SHAPE, torch.float64, device, layout).requires_grad_()
    opcheck(OPS.gate, (x, t["channel"], t["spatial"], "sum", True))
    opcheck(OPS.gate, (x, None, t["spatial"], "max", False))


@pytest.mark.parametrize("layout", ("nchw", "channels_last", "sliced", "strided"))
def test_opcheck_pool_reduce(layout, device, seed):
    t = inputs(device)
    x = make_map(SHAPE, torch.float64, device, layout).requires_grad_()
    opcheck(OPS.pool_reduce, (x, t["weight"], t["bias"], True))
    opcheck(OPS.pool_reduce, (x, t["weight"], None, False))
    opcheck(OPS.pool_reduce, (x, None, None, True))


def test_opcheck_backward_operators(device, seed):
    t = inputs(device, grad=False)
    maps = (t["dout"], t["x"], t["channel"], t["spatial"])
    opcheck(OPS.gate_backward_reduce, (*maps, "product"))
    rest = (t["dpooled"], t["dreduced"], t["weight"], "product", True)
    opcheck(OPS.input_gradient, (*maps, *rest, True, True, True))
    opcheck(OPS.input_gradient, (*maps, *rest, False, True, False))


def test_opcheck_linked(device, seed):
    t = inputs(device)
    args = (t["x"], t["weight"], t["bias"], True, "sum", True)
    # AOTAutograd hands every output an independent gradient; the links' are factors of one, so
    # that the pair has a meaning, and test_module compiles it, only as a whole.
    torch.library.opcheck(
        OPS.pool_reduce_linked.default,
        args,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    links = OPS.pool_reduce_linked(*args)[2:]
    torch.library.opcheck(
        OPS.gate_linked.default,
        (t["x"], t["channel"], t["spatial"], *(link.detach() for link in links), "sum", True),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize("hidden_stats,stats", ((True, True), (False, True), (False, False)))
def test_opcheck_channel_mlp(hidden_stats, stats, device, seed):
    opcheck(OPS.channel_mlp, mlp_arguments(device, hidden_stats, stats))


@pytest.mark.parametrize("train", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize("preset", ("paper", "official"))
def test_opcheck_spatial_branch(preset, train, device, seed):
    arguments = spatial_arguments(device, preset, train)
    opcheck(OPS.spatial_branch, arguments)
    detached = [
        [t.detach() for t in a] if isinstance(a, list) and a and isinstance(a[0], torch.Tensor)
        else a.detach() if isinstance(a, torch.Tensor) else a
        for a in arguments
    ]  # fmt: skip
    logits, statistics = OPS.spatial_branch(*detached)
    dlogits = torch.randn_like(logits)
    opcheck(OPS.spatial_branch_backward, (dlogits, statistics, *detached, True, True))
    opcheck(OPS.spatial_branch_backward, (dlogits, statistics, *detached, False, False))


def test_opcheck_update_running(device, seed):
    def vectors(dtype=torch.float32):
        return [torch.rand(n, device=device).to(dtype) for n in (3, 7)]

    counters = [torch.tensor(n, device=device) for n in (0, 4)]
    opcheck(
        OPS.update_running,
        (vectors(), vectors(), counters, vectors(), vectors(), [3, 11], [0.1, -1.0]),
    )


def check_derivatives(function, *arguments):
    # Fast mode: one random projection in place of every element, since each takes a launch.
    assert gradcheck(function, arguments, fast_mode=True)
    # The second derivatives are PyTorch's own operators; on a GPU those of convolutions may sum in
    # another order each time. Ours are the first, above: the same bits.
    on_cpu = arguments[0].device.type == "cpu"
    assert gradgradcheck(function, arguments, fast_mode=True, nondet_tol=0.0 if on_cpu else 1e-9)


@pytest.mark.parametrize("residual", (True, False))
@pytest.mark.parametrize("combine", COMBINES)
def test_gate_derivatives(combine, residual, device, seed):
    t = inputs(device)
    check_derivatives(
        lambda x, c, s: functional.gate(x, c, s, combine, residual),
        t["x"],
        t["channel"],
        t["spatial"],
    )


def test_gate_derivatives_of_one_branch(device, seed):
    t = inputs(device)
    check_derivatives(lambda x, c: functional.gate(x, c, None), t["x"], t["channel"])
    check_derivatives(lambda x, s: functional.gate(x, None, s), t["x"], t["spatial"])


def test_pool_reduce_derivatives(device, seed):
    t = inputs(device)
    check_derivatives(functional.pool_reduce, t["x"], t["weight"], t["bias"])


@pytest.mark.parametrize("hidden_stats,stats", ((True, True), (False, False)))
def test_channel_mlp_derivatives(hidden_stats, stats, device, seed):
    arguments = mlp_arguments(device, hidden_stats, stats)
    check_derivatives(
        lambda *tensors: OPS.channel_mlp(*tensors, *arguments[13:])[0], *arguments[:13]
    )


@pytest.mark.parametrize("train", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize("preset", ("paper", "official"))
def test_spatial_branch_derivatives(preset, train, device, seed):
    arguments = spatial_arguments(device, preset, train)
    groups = [[arguments[0]], *arguments[1:3], [arguments[3]], [arguments[4]], *arguments[5:7]]
    shapes = [[t.shape for t in group] for group in groups]
    # One vector: finite differences are taken once for all inputs, not once for each.
    flat = torch.cat([t.detach().flatten() for group in groups for t in group]).requires_grad_()

    def function(flat):
        parts = iter(flat.split([shape.numel() for group in shapes for shape in group]))
        lists = [[next(parts).view(shape) for shape in group] for group in shapes]
        (reduced,), weights, biases, (project,), (bias,), gammas, betas = lists
        return OPS.spatial_branch(
            reduced, weights, biases, project, bias, gammas, betas, *arguments[7:]
        )[0]

    check_derivatives(function, flat)


@pytest.mark.parametrize(
    "branches,preset,train",
    (
        ("both", "paper", True),
        ("both", "paper", False),
        ("both", "official", True),
        ("channel", "official", False),
        ("spatial", "official", True),
        ("spatial", "paper", False),
    ),
)
def test_module_derivatives(branches, preset, train, device, seed):
    """The linked pair as a whole: of the input and of every parameter."""
    module = bam_kernels.BAM(
        4, 2, dilation=1, preset=preset, combine="product" if branches == "both" else "sum",
        channel=branches != "spatial", spatial=branches != "channel",
        device=device, dtype=torch.float64,
    ).train(train)  # fmt: skip
    names = [name for name, _ in module.named_parameters()]
    shapes = [p.shape for p in module.parameters()]
    x = torch.randn(3, 4, 2, 3, dtype=torch.float64, device=device, requires_grad=True)
    # One vector: finite differences are taken once for all parameters, not once for each.
    flat = torch.cat([p.detach().flatten() for p in module.parameters()]).requires_grad_()

    def function(x, flat):
        parts = flat.split([shape.numel() for shape in shapes])
        named = {n: t.view(shape) for n, t, shape in zip(names, parts, shapes, strict=True)}
        return torch.func.functional_call(module, named, (x,))

    check_derivatives(function, x, flat)
