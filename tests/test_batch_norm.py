"""Batch norms in the whole fused module: statistics, modes and counters exactly as torch's.

Outputs, all gradients and all buffers against the reference with the same weights, in float64.
"""

from __future__ import annotations

import copy

import pytest
import torch
from cases import PRESETS, make_map
from test_amp_and_optimizers import without_kinks
from test_module import step, twin
from test_training_scripts import F64, SHAPE, assert_same, left_behind, one_thread, pair  # noqa: F401
from tolerances import PARITY, PEER, relative_error
from torch import nn

from bam_kernels import explain

pytestmark = pytest.mark.usefixtures("large_tiles")


def norms(module: nn.Module) -> dict[str, nn.Module]:
    return {
        k: m for k, m in module.named_modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)
    }


def assert_steps_agree(ours, plain, device, steps=1, left=None):
    """Steps of both leave the same behind, all fused but for what is `left` to PyTorch."""
    for _ in range(steps):
        x, dout = (make_map(SHAPE, F64, device) for _ in "xd")
        told = explain(ours, x)
        assert told.backend == "triton"
        assert left in " ".join(told.notes) if left else not told.notes
        assert_same(step(ours, x, dout), step(plain, x, dout))
        ours.zero_grad(), plain.zero_grad()


@pytest.mark.parametrize("momentum", (0.1, 0.7, None))
@pytest.mark.parametrize("preset", PRESETS)
def test_three_steps(preset, momentum, device, seed):
    """Running statistics and counters of every norm, a cumulative average for None."""
    ours, plain = pair(device, preset=preset)
    for module in (ours, plain):
        for norm in norms(module).values():
            norm.momentum = momentum
    before = copy.deepcopy(dict(ours.named_buffers()))
    assert_steps_agree(ours, plain, device, steps=3)
    for key, b in ours.named_buffers():
        assert not torch.equal(b, before[key])
        assert not key.endswith("num_batches_tracked") or b == 3


@pytest.mark.parametrize("train", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize("preset", PRESETS)
def test_without_running_statistics(preset, train, device, seed):
    """track_running_stats=False: the batch's statistics in both modes, and no buffers."""
    ours, plain = (module.train(train) for module in pair(device, preset=preset))
    for module in (ours, plain):
        for norm in norms(module).values():
            norm.track_running_stats = False
            norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    assert not list(ours.buffers())
    assert_steps_agree(ours, plain, device, steps=2)


# What code sets on the norms of a network, one by one.
CHANGES = {
    "statistics_kept_but_not_tracked": lambda norm: setattr(norm, "track_running_stats", False),
    "no_counter": lambda norm: setattr(norm, "num_batches_tracked", None),
    "no_counter_and_no_momentum": lambda norm: (
        setattr(norm, "num_batches_tracked", None), setattr(norm, "momentum", None)
    ),
    "eps": lambda norm: setattr(norm, "eps", 0.3),
    "not_affine": lambda norm: (setattr(norm, "weight", None), setattr(norm, "bias", None)),
    "no_shift": lambda norm: setattr(norm, "bias", None),
    "frozen_affine": lambda norm: norm.requires_grad_(False),
    "momentum_zero": lambda norm: setattr(norm, "momentum", 0.0),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_attributes_of_a_norm(change, device, seed):
    """All norms that a module can have, changed as scripts change them, in both modes."""
    ours, plain = pair(device, norm_hidden=True)
    for module in (ours, plain):
        for norm in norms(module).values():
            CHANGES[change](norm)
    left = {"no_counter": "lacks", "no_counter_and_no_momentum": "lacks", "no_shift": "lack one"}
    assert_steps_agree(ours, plain, device, 2, left.get(change))
    ours.eval(), plain.eval()
    assert_steps_agree(ours, plain, device, 1, left.get(change))


@pytest.mark.parametrize("train", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize(
    "flipped", ("channel.hidden_norm", "channel.norm", "spatial", "every_other")
)
def test_each_norm_has_its_own_mode(flipped, train, device, seed):
    """Norms frozen in a training network, or trained in an eval network: each goes by its own
    `training`, and only a training one changes its statistics."""
    ours, plain = (module.train(train) for module in pair(device, norm_hidden=True))
    names = list(norms(ours))
    chosen = names[::2] if flipped == "every_other" else [k for k in names if k.startswith(flipped)]
    assert chosen and len(chosen) < len(names)
    for module in (ours, plain):
        for key in chosen:
            norms(module)[key].train(not train)
    before = copy.deepcopy(norms(ours))
    assert_steps_agree(ours, plain, device, steps=2)
    for key, norm in norms(ours).items():
        changed = train != (key in chosen)
        assert norm.training == changed
        for kind in ("running_mean", "running_var", "num_batches_tracked"):
            assert torch.equal(getattr(norm, kind), getattr(before[key], kind)) == (not changed)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_batch_of_one_changes_nothing(preset, device, seed):
    """The error names the first norm that cannot train on it; statistics and counters stay."""
    ours, plain = pair(device, preset=preset)
    x = make_map((1, 24, 5, 7), F64, device)
    before = copy.deepcopy(ours.state_dict())
    name = "channel.norm" if preset == "paper" else r"channel.hidden_norm.0"
    for call in (ours, lambda x: explain(ours, x)):
        with pytest.raises(ValueError, match=f"batch norm {name} .* got batch 1"):
            call(x)
    assert all(torch.equal(t, before[key]) for key, t in ours.state_dict().items())
    for module in (ours, plain):  # the spatial norms see many values, and may train
        module.channel.eval()
    assert_same(step(ours, x, x.flip(3)), step(plain, x, x.flip(3)))


@pytest.mark.parametrize("preset", PRESETS)
def test_recalibration(preset, device, seed):
    """torch.optim.swa_utils.update_bn: statistics of a data set, by forwards without gradients."""
    ours, plain = (module.eval() for module in pair(device, preset=preset))
    batches = [make_map(SHAPE, F64, device) * (i + 1) for i in range(3)]
    for module in (ours, plain):
        torch.optim.swa_utils.update_bn(batches, module)
        assert not module.training and all(n.momentum == 0.1 for n in norms(module).values())
    assert_same(left_behind(ours), left_behind(plain))
    assert {n.num_batches_tracked.item() for n in norms(ours).values()} == {3}


@pytest.mark.parametrize("preset", PRESETS)
def test_float32_norms_in_a_half_network(preset, device, seed):
    """Norms kept in float32, as half networks often do: output and gradient of the input beside
    eager's own error, and statistics that stay float32."""
    ours = without_kinks(pair(device, torch.float32, preset=preset)[0])
    ours.to(torch.bfloat16).eval()
    for norm in norms(ours).values():
        norm.float()
    plain, truth = twin(ours, torch.bfloat16), twin(ours, F64)
    for norm in norms(plain).values():
        norm.float()
    x = make_map((4, 24, 9, 11), torch.bfloat16, device)
    dout = x * (1 + 0.5 * torch.randn_like(x))
    assert explain(ours, x).backend == "triton"
    found, eager = step(ours, x, dout), step(plain, x, dout)
    want = step(truth, x.double(), dout.double())
    for key in ("out", "dx"):
        assert found[key].dtype == torch.bfloat16
        own = relative_error(eager[key], want[key])
        assert relative_error(found[key], want[key]) <= max(PEER * own, PARITY[torch.bfloat16])
    assert {b.dtype for b in ours.buffers()} == {torch.float32, torch.int64}
