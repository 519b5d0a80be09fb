"""replace_bam: what only looks like a known BAM is left alone, with the reason."""

from __future__ import annotations

import re

import client_doubles as clients
import pytest
import torch
from torch import Tensor, nn

from bam_kernels import reference, replace_bam

pytestmark = pytest.mark.usefixtures("seed")


class Louder(clients.OfficialBAM):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Renamed(clients.OfficialBAM):
    """A subclass that adds nothing to the forward."""


def with_own_forward() -> nn.Module:
    made = clients.Changzy00BAM(32)
    made.forward = lambda x: x
    return made


def with_activation() -> nn.Module:
    made = clients.OfficialBAM(32)
    made.channel_att.gate_activation = torch.tanh
    made.channel_att.pooling = lambda x: torch.tanh(clients.square_windows(x))
    return made


def with_inner_hook() -> nn.Module:
    made = clients.OfficialBAM(32)
    made.channel_att.register_forward_hook(lambda *_: None)
    return made


def with_more() -> nn.Module:
    made = clients.OfficialBAM(32)
    made.scale = nn.Parameter(torch.ones(1))
    return made


def without_a_norm() -> nn.Module:
    made = clients.OfficialBAM(32)
    made.spatial_att.gate_s.gate_s_bn_di_1 = nn.InstanceNorm2d(2)
    return made


def with_clash() -> nn.Module:
    made = clients.Changzy00BAM(32)
    made.channel = 32
    return made


def observed() -> nn.Module:
    made = reference.BAM(32)
    made.observer = lambda c, s: None
    return made


def dropping() -> nn.Module:
    made = clients.OfficialBAM(32)
    made.channel_att.gate_c.gate_c_relu_1 = nn.Sequential(nn.ReLU(), nn.Dropout(0.5))
    return made


def with_two_widths() -> nn.Module:
    made = clients.OfficialBAM(32)
    made.channel_att = clients.OfficialChannel(32, 4, nn.ReLU)
    return made


def compiled() -> nn.Module:
    made = clients.Changzy00BAM(32)
    made.compile()
    return made


def with_one_norm_twice() -> nn.Module:
    made = clients.Changzy00BAM(32)
    made.spatial_attn.conv2[4] = made.spatial_attn.conv2[1]
    return made


LEFT = {
    "another field's": (lambda: clients.PyramidBAM(32), "no known BAM.*query_conv"),
    "an overridden forward": (lambda: Louder(32), "Louder, whose forward overrides"),
    "a forward of the instance": (with_own_forward, "it has a forward of its own instance"),
    "a sum": (lambda: clients.SummingFork(32), "in inference it gives other numbers"),
    "a detached map": (lambda: clients.DetachedFork(32), "in inference it gives other gradients"),
    "another activation": (
        lambda: clients.OfficialBAM(32, activation=nn.LeakyReLU),
        "other numbers than ours .*gate_c_relu_1' is a LeakyReLU",
    ),
    "gate_activation": (with_activation, "other numbers .*gate_activation is tanh"),
    "a dropout": (dropping, "in training it gives other .*Dropout"),
    "an inner hook": (with_inner_hook, "its 'channel_att' has hooks"),
    "a parameter more": (with_more, "has no 'scale'"),
    "another norm": (without_a_norm, "gate_s_bn_di_1' is InstanceNorm2d; expected a batch norm"),
    "an attribute": (with_clash, "its attribute 'channel' would stand in the place of ours"),
    "an observer": (observed, "observed by attention_maps"),
    "two widths": (with_two_widths, "expected .* with 32 channels, 2 inside"),
    "compiled": (compiled, "'_compiled_call_impl' of its own instance"),
    "a layer twice": (with_one_norm_twice, "it has a layer in two places"),
}


@pytest.mark.parametrize("kind", LEFT)
def test_left_alone_with_the_reason(kind):
    make, reason = LEFT[kind]
    model = nn.Sequential(make(), clients.Changzy00BAM(48))
    modules = dict(model[0].named_modules())
    report = replace_bam(model)
    assert [r.names for r in report.replaced] == [("1",)]
    (left,) = report.left_alone
    assert left.names[0].startswith("0")
    assert dict(model[0].named_modules()) == modules  # the very same ones
    assert re.search(reason, left.reason), left.reason
    assert left.reason in str(report)


def test_a_subclass_that_adds_nothing_is_swapped():
    (replaced,) = replace_bam(nn.Sequential(Renamed(32))).replaced
    assert (replaced.was, replaced.client) == ("Renamed", "official")
