"""The spatial branch behind the reduction, fused, against the reference branch in float64."""

from __future__ import annotations

import collections
import copy

import pytest
import torch
from cases import name
from kinks import clear_of_kinks, without_kinks
from test_module import randomize
from tolerances import (
    Errors,
    Sway,
    assert_parity,
    means_with_variances,
    rounded_anew,
    with_rounded_parameters,
)
from torch import nn

from bam_kernels import functional, fusable, reference, training
from bam_kernels.backends.triton import configs, spatial_layout, sum_splits
from bam_kernels.config import resolve
from bam_kernels.testing import traffic

X = torch.empty(0)  # of which only the device and the dtype are looked at

pytestmark = pytest.mark.usefixtures("large_tiles")


def make_branch(channels, dtype, device, **options):
    config = resolve(channels, options.pop("reduction", 4), **options)
    return randomize(reference.SpatialBranch(config, device=device, dtype=dtype))


def fused(reduced, branch):
    """What a module does with its reduction."""
    taken = []
    logits = functional._spatial_logits(reduced, branch, taken)
    training.update_running(taken, torch.ops.bam_kernels)
    return logits


def plain(reduced, branch):
    return branch.from_reduced(reduced)


def run(function, branch, reduced, dlogits):
    reduced = reduced.detach().requires_grad_()
    logits = function(reduced, branch)
    logits.backward(dlogits.to(logits.dtype))
    found = {"logits": logits.detach(), "dreduced": reduced.grad}
    found |= {f"d{key}": p.grad for key, p in branch.named_parameters() if p.grad is not None}
    return found | {key: b.clone() for key, b in branch.named_buffers()}


def check(branch, shape, device, channels_last=False, draws=1):
    """Everything that a step leaves behind, and the layout of the reduction's gradient."""
    dtype = branch.project.weight.dtype
    train = branch.training
    n, h, w = shape
    fmt = torch.channels_last if channels_last else torch.contiguous_format

    def make():
        reduced = torch.randn(n, branch.reduce.out_channels, h, w, device=device).to(dtype)
        # The reduction itself goes through a ReLU where no norm stands between.
        if branch.hidden_norm is None:
            reduced = torch.where(reduced.abs() < 0.01, 0.5, reduced)
        return reduced.contiguous(memory_format=fmt)

    errors = Errors()
    for _ in errors.draws(draws, peers=draws >= 5):
        ours, eager, truth = (copy.deepcopy(branch) for _ in range(3))
        truth.double()
        reduced = clear_of_kinks(make, truth, truth.from_reduced)
        assert fusable.unfusable_spatial(ours, X) is None
        # In eval mode positive, so that sums over the map are not of noise alone.
        dlogits = torch.randn(n, 1, h, w, device=device).to(dtype)
        dlogits = dlogits if train else dlogits.abs()
        found = run(fused, ours, reduced, dlogits)
        want = run(plain, truth, reduced.double(), dlogits.double())
        peer = run(plain, eager, reduced, dlogits)
        assert list(found) == list(want)
        assert found["dreduced"].stride() == reduced.stride()
        found, want, peer = map(means_with_variances, (found, want, peer))

        def again(truth=truth, reduced=reduced, dlogits=dlogits):
            rounded = rounded_anew(reduced.double(), dtype)
            return run(plain, with_rounded_parameters(truth, dtype), rounded, dlogits.double())

        sway = Sway(again, {key: b for key, b in want.items() if key.startswith("d")})
        scale = max(t.norm().item() for key, t in want.items() if key.startswith("d"))
        for key, b in want.items():
            if key.endswith("num_batches_tracked"):
                assert found[key] == b, key
            elif key.startswith("d") and b.norm() <= 1e-9 * scale:
                continue  # a bias in front of batch statistics has no gradient
            elif b.numel() == 1 and key.startswith("d") and train and dtype != torch.float64:
                continue  # a lone sum of noise over the whole map; float64 checks it
            elif key == "logits" and train and dtype == torch.float32:
                assert_parity(key, found[key].to(dtype), b)
            else:
                together = key.startswith("d") and key != "dreduced"
                errors.add(key, found[key].to(dtype), b, peer[key], sway, together)


OPTIONS = {
    "paper": {},
    "official": {"preset": "official"},
    "both norms": {"norm_hidden": True},
    "no norm": {"norm_final": False},
    "no convolution": {"num_dilated": 0, "norm_hidden": True},
    "no convolution, no norm": {"num_dilated": 0, "norm_final": False},
    "three, dilated by 2": {"num_dilated": 3, "dilation": 2},
    "one, official": {"num_dilated": 1, "preset": "official"},
}


@pytest.mark.parametrize("train", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize("channels_last", (False, True), ids=("nchw", "channels_last"))
@pytest.mark.parametrize("options", OPTIONS)
def test_parity_in_float64(options, channels_last, train, device, seed):
    branch = make_branch(37, torch.float64, device, **OPTIONS[options]).train(train)
    check(branch, (4, 9, 11), device, channels_last)


@pytest.mark.parametrize(
    "dtype,options,train",
    (
        *((torch.float32, options, t) for options in ("paper", "official") for t in (True, False)),
        (torch.float16, "paper", True),
        (torch.float16, "official", False),
        (torch.bfloat16, "paper", False),
        (torch.bfloat16, "official", True),
    ),
    ids=name,
)
def test_parity(dtype, options, train, device, seed):
    branch = make_branch(64, dtype, device, **OPTIONS[options]).train(train)
    if dtype.itemsize == 2:
        without_kinks(branch)
    check(branch, (4, 7, 9), device, draws=5)


@pytest.mark.parametrize("hidden", (1, 3, 16, 33, 128))
def test_widths(hidden, device, seed):
    """One channel to the widest that the kernels take, which they walk over in blocks."""
    branch = make_branch(hidden, torch.float64, device, reduction=1, preset="official").train()
    check(branch, (3, 5, 7), device)


@pytest.mark.parametrize("shape", ((3, 1, 1), (5, 1, 9), (2, 17, 3)), ids=name)
@pytest.mark.parametrize("options", ("paper", "official"))
def test_maps_smaller_than_the_dilation(options, shape, device, seed):
    branch = make_branch(32, torch.float64, device, **OPTIONS[options]).train()
    check(branch, shape, device)


@pytest.mark.parametrize("options", ("paper", "official"))
def test_many_partials(options, device, seed):
    """So many tiles that their partials are merged by a launch of their own."""
    branch = make_branch(12, torch.float64, device, **OPTIONS[options]).train()
    with configs.override(spatial_branch=configs.Tile(0, 16, 4, 1)):
        check(branch, (5, 21, 20), device)


@pytest.mark.parametrize("channels_last", (False, True), ids=("nchw", "channels_last"))
@pytest.mark.parametrize("options", ("both norms", "official", "no convolution"))
def test_as_large_maps_go(options, channels_last, device, seed, monkeypatch):
    """Norms in passes of their own, statistics merged and weight gradients added in two steps."""
    monkeypatch.setattr(spatial_layout, "_FEW_TILES", 0)
    monkeypatch.setattr(spatial_layout, "_MOST_PARTIALS", 3)
    monkeypatch.setattr(spatial_layout, "_GROUPS", 2)
    monkeypatch.setattr(sum_splits, "_ONE_STEP", 3)
    branch = make_branch(32, torch.float64, device, **OPTIONS[options]).train()
    tiles = configs.override(spatial_branch=configs.Tile(0, 16, 4, 1))
    monkeypatch.setattr(configs, "split_weight_gradient", lambda count, _: min(count, 5))
    with tiles, traffic.measure() as meter:
        check(branch, (3, 9, 11), device, channels_last)
    # 19 tiles: of every statistic and sum 10 parts, then one.
    launched = collections.Counter(launch.kernel for launch in meter.launches)
    assert launched["_merge_kernel"] >= 4
    assert (launched["_activate_kernel"] > 0) == bool(branch.dilated)
    assert launched["_sum_splits_kernel"] == 2  # the projection's weight first, then all


def test_weights_in_channels_last(device, seed):
    """Networks in channels_last keep their 3x3 weights so; the kernels read them as they lie."""
    branch = make_branch(32, torch.float64, device, preset="official").train()
    branch = branch.to(memory_format=torch.channels_last)
    assert branch.dilated[0].weight.is_contiguous(memory_format=torch.channels_last)
    check(branch, (3, 9, 11), device, channels_last=True)


@pytest.mark.parametrize("frozen", ("hidden_norm.0", "hidden_norm.1", "hidden_norm.2", "norm"))
def test_single_norms_in_the_other_mode(frozen, device, seed):
    """Each batch norm heeds its own `training`, in a training and in an evaluating branch."""
    for train in (True, False):
        branch = make_branch(32, torch.float64, device, norm_hidden=True).train(train)
        branch.get_submodule(frozen).train(not train)
        check(branch, (3, 9, 11), device)


def test_parts_that_need_no_gradient(device, seed):
    """Frozen parts have none, and those of the rest are the same."""
    for names in (("dilated",), ("hidden_norm",), ("project", "dilated.0"), ("dilated", "project")):
        branch = make_branch(32, torch.float64, device, preset="official").train()
        for part in names:
            branch.get_submodule(part).requires_grad_(False)
        check(branch, (3, 9, 11), device)


def test_without_bias_or_affine(device, seed):
    branch = make_branch(32, torch.float64, device, preset="official").train()
    for conv in (*branch.dilated, branch.project):
        conv.bias = None
    check(branch, (3, 9, 11), device)
    branch.hidden_norm = nn.ModuleList(
        nn.BatchNorm2d(8, affine=False, dtype=torch.float64, device=device) for _ in range(3)
    )
    check(branch, (3, 9, 11), device)


def test_what_is_left_to_torch():
    """Each reason names its cause, and a plain branch has none."""
    branch = reference.SpatialBranch(resolve(64, 4, preset="official"))
    assert fusable.unfusable_spatial(branch, X) is None
    cases = {
        "SyncBatchNorm": lambda b: nn.SyncBatchNorm.convert_sync_batchnorm(b),
        "hooks": lambda b: b.project.register_forward_hook(lambda *_: None),
        "dilated.1 is not": lambda b: setattr(b.dilated[1], "padding_mode", "circular"),
        "dilated.0 is not": lambda b: setattr(b.dilated[0], "stride", (2, 2)),
        "some have none": lambda b: setattr(b.dilated[1], "bias", None),
        "padded": lambda b: setattr(b.project, "padding", (1, 1)),
        "Sequential": lambda b: setattr(b, "project", nn.Sequential(b.project)),
    }
    for expected, change in cases.items():
        changed = copy.deepcopy(branch)
        change(changed)
        assert expected in fusable.unfusable_spatial(changed, X), expected
    wide = reference.SpatialBranch(resolve(2064))
    assert "129 channels wide" in fusable.unfusable_spatial(wide, X)
