"""Hooks, parametrizations and replaced layers: seen by the fused path, or plain PyTorch runs.

Whatever is done to a part of a module, its numbers and gradients are the reference's with the same
done to it, and `explain` and the log tell where the kernels had to be left.
"""

from __future__ import annotations

import copy
import logging
import types

import pytest
import torch
from cases import PRESETS, make_map
from test_module import step
from test_training_scripts import F64, SHAPE, assert_same, one_thread, pair  # noqa: F401
from torch import nn
from torch.nn.modules import module as global_hooks
from torch.nn.utils import parametrizations, parametrize, prune

from bam_kernels import BAM, dispatch, explain
from bam_kernels.reference import ChannelBranch, SpatialBranch

pytestmark = pytest.mark.usefixtures("large_tiles")

PARTS = (
    "", "channel", "channel.fc.0", "channel.fc.1", "channel.hidden_norm.0", "channel.norm",
    "spatial", "spatial.reduce", "spatial.dilated.0", "spatial.project", "spatial.hidden_norm.0",
    "spatial.hidden_norm.1", "spatial.norm",
)  # fmt: skip
FALL_BACK = {"channel", "spatial", "spatial.reduce"}  # hooks there leave the fused path
KINDS = ("forward", "forward_pre", "full_backward", "full_backward_pre")


def recorder(seen: list, label: object = None):
    """A hook of any kind that keeps what it is called with."""

    def hook(module, *args):
        tensors = [t for arg in args for t in (arg if isinstance(arg, tuple) else (arg,))]
        seen.append((label, [None if t is None else t.detach().clone() for t in tensors]))

    return hook


def assert_same_calls(found: list, want: list) -> None:
    assert [label for label, _ in found] == [label for label, _ in want]
    for (label, a), (_, b) in zip(found, want, strict=True):
        for i, pair_of in enumerate(zip(a, b, strict=True)):
            u, v = pair_of
            assert (u is None) == (v is None), label
            if u is not None:
                # A gradient that is zero but for rounding (behind a norm's bias) has no digits.
                torch.testing.assert_close(u, v, rtol=1e-9, atol=1e-11, msg=f"{label} {i}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", PARTS, ids=lambda part: part or "module")
def test_hooks(part, kind, device, seed):
    """Each hook fires as often as on the reference, with the same tensors; removed, it leaves the
    fused path as it was."""
    ours, plain = pair(device, norm_hidden=True)
    x, dout = (make_map(SHAPE, F64, device) for _ in "xd")
    calls = []
    for module in (ours, plain):
        seen = []
        handle = getattr(module.get_submodule(part), f"register_{kind}_hook")(recorder(seen))
        told = explain(ours, x)
        found = step(module, x, dout)
        handle.remove()
        if module is ours:
            assert told.backend == ("reference" if part in FALL_BACK else "triton")
            ours_found = found
        calls.append(seen)
    assert len(calls[0]) == 1
    assert_same_calls(*calls)
    assert_same(ours_found, found)
    told = explain(ours, x)
    assert told.backend == "triton" and not any("hooks" in note for note in told.notes)


@pytest.mark.parametrize("kind", KINDS)
def test_global_hooks(kind, device, seed):
    """A hook on all modules of the process sees every part, as on the reference."""
    ours, plain = pair(device, norm_hidden=True)
    x, dout = (make_map(SHAPE, F64, device) for _ in "xd")
    calls = []
    for module in (ours, plain):
        names, seen = {m: key for key, m in module.named_modules()}, []
        handle = getattr(global_hooks, f"register_module_{kind}_hook")(
            lambda m, *args, names=names, seen=seen: recorder(seen, names[m])(m, *args)
        )
        try:
            told = explain(ours, x)
            step(module, x, dout)
        finally:
            handle.remove()
        assert told.backend == "reference" and "hooks" in told.reasons["triton"]
        calls.append(sorted(seen, key=lambda call: call[0]))
    assert {label for label, _ in calls[0]} == set(PARTS) | {
        "spatial.dilated.1", "spatial.hidden_norm.2"
    }  # fmt: skip
    assert_same_calls(*calls)
    assert explain(ours, x).backend == "triton"


class Scaled(nn.Module):
    def forward(self, weight):
        return weight * 1.5


MAKERS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "custom": lambda layer: parametrize.register_parametrization(layer, "weight", Scaled()),
    "pruned": lambda layer: prune.random_unstructured(layer, "weight", 0.4),
}


@pytest.mark.parametrize("part", ("spatial.reduce", "spatial.dilated.0", "channel.fc.0"))
@pytest.mark.parametrize("maker", MAKERS)
def test_parametrized_weights(maker, part, device, seed):
    """Two training steps, after `explain` has looked: spectral_norm changes its buffers each time
    that its weight is computed, so that a glance at it would show."""
    ours, plain = pair(device)
    x, dout = (make_map(SHAPE, F64, device) for _ in "xd")
    for module in (ours, plain):
        torch.manual_seed(seed)
        MAKERS[maker](module.get_submodule(part))
    told = explain(ours, x)
    assert told.backend == ("reference" if part == "spatial.reduce" else "triton")
    if part == "channel.fc.0":
        assert any("channel MLP" in note for note in told.notes)
    for _ in range(2):
        assert_same(step(ours, x, dout), step(plain, x, dout))
        ours.zero_grad(), plain.zero_grad()


# --- replaced parts ---------------------------------------------------------------------------


class OtherSpatial(SpatialBranch):
    def forward(self, x):
        return super().forward(x) * 2


class OtherChannel(ChannelBranch):
    def forward(self, x):
        return super().forward(x.square())


class OtherPooled(ChannelBranch):
    def from_pooled(self, pooled):
        return super().from_pooled(pooled) * 2


class OtherConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


def put(part: str, make):
    """In the part's place, what `make` makes of it."""

    def change(module):
        parent, _, leaf = part.rpartition(".")
        old = module.get_submodule(part)
        setattr(module.get_submodule(parent), leaf, make(old).to(module.channel.fc[1].weight))

    return change


def as_class(part: str, kind: type):
    return lambda module: setattr(module.get_submodule(part), "__class__", kind)


def own_forward(part: str):
    """What accelerate and the like do: an instance with a forward of its own."""

    def change(module):
        layer = module.get_submodule(part)
        plain = type(layer).forward
        layer.forward = types.MethodType(lambda self, x: plain(self, x) * 2, layer)

    return change


def both(*changes):
    return lambda module: [change(module) for change in changes]


# How it is told: None for a part that PyTorch runs in any case, "note" where only the channel MLP
# leaves its kernel, "log" where it shows only as the call is made, else a word of the reason.
REPLACED = {
    "reduce_groups": (put("spatial.reduce", lambda _: nn.Conv2d(24, 6, 1, groups=2)), "1x1"),
    "reduce_3x3": (put("spatial.reduce", lambda _: nn.Conv2d(24, 6, 3, padding=1)), "1x1"),
    "reduce_sequence": (put("spatial.reduce", lambda c: nn.Sequential(c)), "Sequential"),
    "reduce_own_class": (as_class("spatial.reduce", OtherConv), "OtherConv"),
    "reduce_own_forward": (own_forward("spatial.reduce"), "forward of its own"),
    "reduce_no_bias": (put("spatial.reduce", lambda _: nn.Conv2d(24, 6, 1, bias=False)), None),
    "spatial_own_class": (as_class("spatial", OtherSpatial), "OtherSpatial"),
    "spatial_own_forward": (own_forward("spatial"), "forward of its own"),
    "spatial_one_layer": (put("spatial", lambda _: nn.Conv2d(24, 1, 3, padding=1)), "Conv2d"),
    "channel_own_class": (as_class("channel", OtherChannel), "OtherChannel"),
    "channel_own_pooled": (as_class("channel", OtherPooled), "OtherPooled"),
    "channel_own_forward": (own_forward("channel"), "forward of its own"),
    "fc_own_forward": (own_forward("channel.fc.0"), "note"),
    "fc_sequence": (put("channel.fc.0", lambda c: nn.Sequential(c, nn.Tanh())), "note"),
    "fc_no_bias": (put("channel.fc.1", lambda _: nn.Linear(6, 24, bias=False)), None),
    "fc_wider": (
        both(
            put("channel.fc.0", lambda _: nn.Linear(24, 17)),
            put("channel.fc.1", lambda _: nn.Linear(17, 24)),
        ),
        None,
    ),
    "fc_one_logit": (
        both(
            put("channel.fc.1", lambda _: nn.Linear(6, 1)),
            put("channel.norm", lambda _: nn.BatchNorm1d(1)),
        ),
        "note, log",
    ),
    "norm_own_forward": (own_forward("channel.norm"), "note"),
    "norm_none": (put("channel.norm", lambda _: nn.Identity()), "note"),
    "norm_of_layers": (put("channel.norm", lambda _: nn.LayerNorm(24)), "note"),
    "spatial_norm_of_groups": (put("spatial.norm", lambda _: nn.GroupNorm(1, 1)), None),
    "dilated_circular": (
        put("spatial.dilated.0", lambda _: nn.Conv2d(6, 6, 3, padding=1, padding_mode="circular")),
        None,
    ),
    "dilated_groups": (
        put("spatial.dilated.0", lambda _: nn.Conv2d(6, 6, 3, padding=1, groups=3)),
        None,
    ),
    "dilated_own_class": (as_class("spatial.dilated.0", OtherConv), None),
    "dilated_down_and_up": (
        put(
            "spatial.dilated.0",
            lambda _: nn.Sequential(
                nn.Conv2d(6, 6, 3, stride=2, padding=1), nn.Upsample(size=(5, 7))
            ),
        ),
        None,
    ),
    "project_sequence": (put("spatial.project", lambda c: nn.Sequential(c, nn.Tanh())), None),
    "project_to_all_channels": (
        both(
            put("spatial.project", lambda _: nn.Conv2d(6, 24, 1)),
            put("spatial.norm", lambda _: nn.BatchNorm2d(24)),
        ),
        "log",
    ),
    "logits_of_a_whole_map": (
        put("spatial.dilated.1", lambda _: nn.AdaptiveAvgPool2d(1)),
        "log",
    ),
    "logits_of_a_row": (
        put("spatial.dilated.1", lambda _: nn.AdaptiveAvgPool2d((1, 7))),
        "log",
    ),
}


@pytest.mark.parametrize("case", REPLACED)
def test_replaced_parts(case, device, seed, caplog):
    """Right numbers, gradients and buffers; and told by `explain`, or at the call, where the
    kernels cannot be used."""
    change, told_as = REPLACED[case]
    ours, plain = pair(device)
    for module in (ours, plain):
        torch.manual_seed(seed)
        change(module)
    x, dout = (make_map(SHAPE, F64, device) for _ in "xd")
    dispatch._logged.clear()
    told = explain(ours, x)
    with caplog.at_level(logging.INFO, logger="bam_kernels"):
        found = step(ours, x, dout)
    assert_same(found, step(plain, x, dout))
    mlp_notes = [note for note in told.notes if "channel MLP" in note]
    assert bool(mlp_notes) == ("note" in (told_as or ""))
    if told_as in (None, "note", "log", "note, log"):
        assert told.backend == "triton"
        assert ("running plain PyTorch" in caplog.text) == ("log" in (told_as or ""))
    else:
        assert told.backend == "reference" and told_as in told.reasons["triton"]
        assert f"running plain PyTorch: {told.reasons['triton']}" in caplog.text


MISFITS = {
    "reduce_stride": put("spatial.reduce", lambda _: nn.Conv2d(24, 6, 1, stride=2)),
    "reduce_padding": put("spatial.reduce", lambda _: nn.Conv2d(24, 6, 1, padding=1)),
    "reduce_channels": put("spatial.reduce", lambda _: nn.Conv2d(32, 6, 1)),
    "dilated_stride": put("spatial.dilated.0", lambda _: nn.Conv2d(6, 6, 3, padding=1, stride=2)),
    "fc_width": put("channel.fc.0", lambda _: nn.Linear(24, 5)),
    "norm_width": put("channel.norm", lambda _: nn.BatchNorm1d(12)),
}


@pytest.mark.parametrize("case", MISFITS)
def test_layers_that_do_not_fit(case, device, seed):
    """What plain PyTorch refuses is refused: no kernel reads past a tensor for it."""
    ours, plain = pair(device)
    x = make_map(SHAPE, F64, device)
    for module in (ours, plain):
        MISFITS[case](module)
        with pytest.raises((RuntimeError, ValueError)):
            module(x)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_replaced_part_stays_in_copies(preset, device, seed):
    """Parametrized, copied, and the parametrization taken off again: fused as before."""
    ours, plain = pair(device, preset=preset)
    x, dout = (make_map(SHAPE, F64, device) for _ in "xd")
    for module in (ours, plain):
        parametrize.register_parametrization(module.spatial.reduce, "weight", Scaled())
    ours, plain = copy.deepcopy(ours), copy.deepcopy(plain)
    assert isinstance(ours, BAM) and explain(ours, x).backend == "reference"
    assert_same(step(ours, x, dout), step(plain, x, dout))
    for module in (ours, plain):
        parametrize.remove_parametrizations(module.spatial.reduce, "weight")
        module.zero_grad()
    assert explain(ours, x).backend == "triton"
    assert_same(step(ours, x, dout), step(plain, x, dout))
