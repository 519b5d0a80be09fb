"""torch.fx: our modules are leaves of every trace, and the traced network runs them fused."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from portable import MODULES, OTHERS, TRACED, assert_equal_on, calm_norms, network, resnet50
from test_module import randomize
from torch import nn

from bam_kernels import BAM, SqueezeExcite, functional, insert_bam

pytestmark = pytest.mark.usefixtures("seed", "large_tiles")


@pytest.mark.parametrize("kind", MODULES)
def test_symbolic_trace_keeps_the_module_whole(kind):
    model = network(kind)
    traced = torch.fx.symbolic_trace(model)
    targets = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert targets == ["0", "1", "2"]
    assert type(traced.get_submodule("1")) in (BAM, SqueezeExcite)
    with mock.patch.object(functional, "bam", side_effect=functional.bam) as fused:
        assert_equal_on(traced, model, (TRACED, *OTHERS))
    assert fused.call_count == 2 * (1 + len(OTHERS))


def test_a_module_in_two_places_and_called_twice():
    shared = randomize(BAM(24, 4)).eval()

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Sequential(shared, nn.ReLU())
            self.b = shared

        def forward(self, x):
            return self.b(self.a(x)) + self.b(x)

    model = Twice()
    traced = torch.fx.symbolic_trace(model)
    assert_equal_on(traced, model, ((2, 24, 5, 7),))
    assert sum(type(m) is BAM for m in traced.modules()) <= 2


@pytest.mark.parametrize("kind", MODULES)
def test_a_module_as_the_root_is_traced_through(kind):
    """It cannot be a leaf of itself: the trace is of plain operators."""
    model = randomize(MODULES[kind]()).eval()
    traced = torch.fx.symbolic_trace(model)
    assert not any(node.target == "" for node in traced.graph.nodes)
    assert_equal_on(traced, model, ((3, 24, 9, 12), (1, 24, 5, 7)))


def test_hooks_are_traced_once():
    model = network("paper")
    model[1].register_forward_hook(lambda module, args, output: 2 * output)
    assert_equal_on(torch.fx.symbolic_trace(model), model, (TRACED,))


def test_torchvision_feature_extraction():
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = resnet50()
    names = extraction.get_graph_node_names(model)[1]
    assert [n for n in names if "bam" in n] == ["layer1.bam", "layer2.bam", "layer3.bam"]
    extractor = extraction.create_feature_extractor(
        model, {"layer1.bam": "a", "layer3": "b", "fc": "out"}
    )
    seen = {}
    for name in ("layer1", "layer3"):
        getattr(model, name).register_forward_hook(
            lambda _, args, output, name=name: seen.update({name: output})
        )
    x = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        found, want = extractor(x), model(x)
    for key, value in (("a", seen["layer1"]), ("b", seen["layer3"]), ("out", want)):
        assert (found[key] - value).norm() <= 1e-5 * value.norm(), key


def test_timm_feature_extraction():
    features = pytest.importorskip("timm.models._features_fx")
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet18", num_classes=10)
    insert_bam(model, after=["layer1", "layer2"])
    calm_norms(model).eval()
    extractor = features.create_feature_extractor(model, ["layer1.bam", "layer2.bam"])
    want = []
    for name in ("layer1", "layer2"):
        getattr(model, name).register_forward_hook(lambda _, args, output: want.append(output))
    x = torch.randn(2, 3, 40, 56)
    with torch.no_grad():
        model(x)
        found = list(extractor(x).values())
    assert len(found) == len(want) == 2
    for a, b in zip(found, want, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()
