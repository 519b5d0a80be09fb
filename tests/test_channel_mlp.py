"""The channel branch behind the pooling, fused, against the reference branch in float64."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from cases import DTYPES, name
from kinks import clear_of_kinks, without_kinks
from tolerances import Errors, Sway, assert_parity, rounded_anew, with_rounded_parameters
from torch import nn

from bam_kernels import functional, fusable, reference, training
from bam_kernels.backends.triton import configs
from bam_kernels.config import resolve


def make_branch(
    channels, dtype, device, *, reduction=8, norm_hidden=False, norm_final=True, **norm_options
):
    """A branch with non-trivial weights, affine parameters and running statistics."""
    config = resolve(channels, reduction, norm_hidden=norm_hidden, norm_final=norm_final)
    branch = reference.ChannelBranch(config, device=device, dtype=dtype)
    for module in branch.modules():
        if isinstance(module, nn.BatchNorm1d):
            for option, value in norm_options.items():
                setattr(module, option, value)
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
                if module.running_mean is not None:
                    module.running_mean.normal_(std=0.2)
                    module.running_var.uniform_(0.5, 2.0)
    return branch


def run(function, branch, pooled, dlogits):
    pooled = pooled.detach().requires_grad_()
    logits = function(pooled, branch)
    logits.backward(dlogits.to(logits.dtype))
    found = {"logits": logits.detach(), "dpooled": pooled.grad}
    found |= {f"d{key}": p.grad for key, p in branch.named_parameters()}
    return found | {key: b.clone() for key, b in branch.named_buffers()}


def draw(samples, channels, dtype, device):
    return torch.randn(samples, channels, device=device).to(dtype)


def check(channels, samples, dtype, device, train, options, draws=1):
    errors = Errors()
    for _ in errors.draws(draws):
        branch = make_branch(channels, dtype, device, **options).train(train)
        if dtype.itemsize == 2:
            without_kinks(branch)
        truth_branch = copy.deepcopy(branch).double()
        eager_branch = copy.deepcopy(branch)
        pooled = clear_of_kinks(
            functools.partial(draw, samples, channels, dtype, device),
            truth_branch,
            truth_branch.from_pooled,
        )
        dlogits = torch.randn(samples, channels, device=device).to(dtype)
        assert fusable.unfusable_mlp(branch, samples) is None
        ours = run(fused, branch, pooled, dlogits)
        truth = run(plain, truth_branch, pooled.double(), dlogits.double())
        eager = run(plain, eager_branch, pooled, dlogits)

        def again(branch=truth_branch, pooled=pooled, dlogits=dlogits):
            rounded = rounded_anew(pooled.double(), dtype)
            return run(plain, with_rounded_parameters(branch, dtype), rounded, dlogits.double())

        sway = Sway(again, {key: b for key, b in truth.items() if key.startswith("d")})
        scale = max(t.norm().item() for key, t in truth.items() if key.startswith("dfc"))
        for key, want in truth.items():
            if key.endswith("num_batches_tracked"):
                assert ours[key] == want, key
            elif want.norm() > 1e-9 * scale:  # a bias before a batch statistic has no gradient
                # Half types keep their logits in fp32; the table for the input's dtype holds.
                # Eager's statistics are fp64 on a CPU, a lead that is gone one rounding later: in
                # training the logits have the table, and what follows from them has both.
                if key == "logits" and train:
                    assert_parity(key, ours[key].to(dtype), want)
                else:
                    together = key.startswith("d")
                    errors.add(key, ours[key].to(dtype), want, eager[key], sway, together)


def plain(pooled, branch):
    return branch.from_pooled(pooled)


def fused(pooled, branch):
    """What a module does with its pooled vector."""
    taken = []
    logits = functional._channel_logits(pooled, branch, taken)
    training.update_running(taken, torch.ops.bam_kernels)
    return logits


OPTIONS = {
    "plain": {"norm_final": False},
    "final": {},
    "hidden": {"norm_hidden": True, "norm_final": False},
    "both": {"norm_hidden": True},
}


@pytest.mark.parametrize("train", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=name)
@pytest.mark.parametrize("options", OPTIONS)
# Batches of two dozen: two batch norms in a row over fewer amplify any rounding past the table.
@pytest.mark.parametrize("channels,samples", ((37, 24), (100, 41)))
def test_parity(channels, samples, options, dtype, train, device, seed):
    draws = 1 if dtype == torch.float64 else 6
    check(channels, samples, dtype, device, train, OPTIONS[options], draws)


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=name)
def test_half_types(dtype, device, seed):
    """Without batch statistics, which amplify the rounding of the inputs at will."""
    check(100, 19, dtype, device, False, {}, draws=3)


@pytest.fixture
def in_steps(monkeypatch):
    """Small batches take a launch a step as large ones do."""
    monkeypatch.setattr(configs, "channel_mlp_in_steps", lambda *_, **__: True)


@pytest.mark.parametrize("train", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=name)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("samples,channels,reduction", ((24, 37, 9), (41, 100, 5)))
def test_parity_in_steps(
    samples, channels, reduction, options, dtype, train, device, seed, in_steps
):
    """The last with two blocks of hidden units, and of channels."""
    draws = 1 if dtype == torch.float64 else 6
    options = OPTIONS[options] | {"reduction": reduction}
    check(channels, samples, dtype, device, train, options, draws)


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=name)
def test_half_types_in_steps(dtype, device, seed, in_steps):
    """The dots that tensor cores take: neither samples, channels nor units fill their blocks."""
    check(100, 19, dtype, device, False, {"reduction": 5}, draws=3)


@pytest.mark.parametrize("momentum", (0.1, 0.7, None))
def test_running_statistics(momentum, device, seed):
    """Three batches, with a cumulative average for None, as torch's batch norm keeps them."""
    ours = make_branch(37, torch.float64, device, norm_hidden=True, momentum=momentum).train()
    truth = copy.deepcopy(ours)
    for _ in range(3):
        pooled = torch.randn(6, 37, dtype=torch.float64, device=device)
        fused(pooled, ours)
        truth.from_pooled(pooled)
    for (key, a), b in zip(ours.named_buffers(), truth.buffers(), strict=True):
        assert_parity(key, a.double(), b.double())


@pytest.mark.parametrize("train", (True, False), ids=("train", "eval"))
def test_without_running_statistics(train, device, seed):
    check(
        37, 6, torch.float64, device, train,
        {"running_mean": None, "running_var": None, "track_running_stats": False},
    )  # fmt: skip


def test_a_frozen_norm_in_a_training_network(device, seed):
    """mmcv's norm_eval and the like put single norms in eval mode; their statistics stay."""
    branch = make_branch(37, torch.float64, device, norm_hidden=True).train()
    branch.norm.eval()
    before = branch.norm.running_mean.clone()
    truth = copy.deepcopy(branch)
    pooled = torch.randn(6, 37, dtype=torch.float64, device=device)
    assert_parity("logits", fused(pooled, branch), truth.from_pooled(pooled))
    assert torch.equal(branch.norm.running_mean, before)
    assert not torch.equal(branch.hidden_norm[0].running_mean, torch.zeros_like(before[:4]))
    for (key, a), b in zip(branch.named_buffers(), truth.buffers(), strict=True):
        assert_parity(key, a.double() + 1, b.double() + 1)


def test_what_is_left_to_torch():
    """Each reason names its cause, and a plain branch has none."""
    branch = make_branch(64, torch.float32, "cpu")
    assert fusable.unfusable_mlp(branch, 8) is None
    assert "over 512 samples" in fusable.unfusable_mlp(branch, 4096)
    assert fusable.unfusable_mlp(branch.eval(), 4096) is None
    handle = branch.fc[0].register_forward_hook(lambda *_: None)
    assert "hooks" in fusable.unfusable_mlp(branch, 8)
    handle.remove()
    deep = reference.ChannelBranch(resolve(64, 8, mlp_layers=3))
    assert "3 hidden layers" in fusable.unfusable_mlp(deep, 8)
    branch.norm = nn.SyncBatchNorm.convert_sync_batchnorm(branch.norm)
    assert "SyncBatchNorm" in fusable.unfusable_mlp(branch, 8)
