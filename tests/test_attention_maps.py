"""attention_maps: what it collects, from which path, and that it leaves no trace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bam_kernels import BAM, SqueezeExcite, reference, use_backend
from bam_kernels.analysis import AttentionMap, attention_maps
from bam_kernels.config import COMBINE_MODES
from bam_kernels.integrate import insert_bam


@pytest.fixture(autouse=True)
def seeded(seed: int) -> None:
    """Every test here draws its inputs from a fresh seed."""


def trained(module: nn.Module) -> nn.Module:
    """In eval mode, with statistics and weights that are not those of a fresh module."""
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.weight.uniform_(0.5, 2.0)
                part.bias.normal_()
                part.running_mean.normal_(std=0.1)
                part.running_var.uniform_(0.5, 2.0)
    return module.eval()


def map_by_hand(module: nn.Module, x: Tensor) -> Tensor:
    """M [N, C, H, W], recovered from nothing but the module's output: F' = F + F * M."""
    y = module(x.double())
    return y / x.double() - (1.0 if module.config.residual else 0.0)


@pytest.mark.parametrize("combine", COMBINE_MODES)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_map_is_the_one_that_the_module_applied(combine, backend):
    bam = trained(BAM(32, combine=combine, residual=combine != "max").double())
    x = torch.randn(2, 32, 6, 5) + 3.0
    expected = map_by_hand(bam, x)
    with attention_maps(bam) as maps, use_backend(backend):
        bam(x.double())
    found = maps[""]
    assert found.channel_logits.shape == (2, 32) and found.spatial_logits.shape == (2, 1, 6, 5)
    torch.testing.assert_close(found.map, expected)
    torch.testing.assert_close(found.spatial_map, expected.mean(dim=1))
    torch.testing.assert_close(found.channel_profile, expected.mean(dim=(2, 3)))


@pytest.mark.parametrize("make", [BAM, reference.BAM])
def test_channel_branch_alone_has_a_map_without_positions(make):
    bam = trained(make(32, spatial=False).double())
    x = torch.randn(2, 32, 6, 5) + 3.0
    with attention_maps(bam) as maps:
        expected = map_by_hand(bam, x)
    found = maps[""]
    assert found.spatial_logits is None and found.map.shape == (2, 32, 1, 1)
    torch.testing.assert_close(found.map.expand_as(x), expected)
    assert found.spatial_map.shape == (2, 1, 1)
    torch.testing.assert_close(found.channel_profile, expected[:, :, 0, 0])


@pytest.mark.parametrize("make", [BAM, reference.BAM])
def test_spatial_branch_alone_has_a_map_for_each_channel(make):
    bam = trained(make(32, channel=False).double())
    x = torch.randn(2, 32, 6, 5) + 3.0
    with attention_maps(bam) as maps:
        expected = map_by_hand(bam, x)
    found = maps[""]
    assert found.channel_logits is None
    torch.testing.assert_close(found.map, expected)
    torch.testing.assert_close(found.spatial_map, expected[:, 0])
    torch.testing.assert_close(found.channel_profile, expected.mean(dim=(2, 3)))


@pytest.mark.parametrize("make", [SqueezeExcite, reference.SqueezeExcite])
def test_squeeze_excite(make):
    module = trained(make(32).double())
    x = torch.randn(2, 32, 6, 5) + 3.0
    with attention_maps(module) as maps:
        y = module(x.double())
    torch.testing.assert_close(maps[""].map.expand_as(y), y / x.double())


def test_map_of_half_precision_logits_is_computed_in_float32():
    c, s = torch.randn(2, 8).bfloat16(), torch.randn(2, 1, 3, 4).bfloat16()
    found = AttentionMap(c, s, 8).map
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.sigmoid(c.float()[:, :, None, None] + s.float()))


def network() -> nn.Module:
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 16, 3, padding=1)), nn.MaxPool2d(2), nn.Conv2d(16, 32, 1)
    )
    insert_bam(model, ["0"])
    insert_bam(model, ["2"], module=reference.SqueezeExcite)
    return trained(model)


def test_each_pass_fills_it_anew_by_module_name():
    model = network()
    with attention_maps(model) as maps:
        assert maps == {}
        model(torch.randn(2, 3, 8, 8))
        assert list(maps) == ["0.bam", "2.bam"]
        first = maps["0.bam"].map
        assert first.shape == (2, 16, 8, 8) and maps["2.bam"].channel_logits.shape == (2, 32)
        model(torch.randn(3, 3, 10, 8))
        assert maps["0.bam"].map.shape == (3, 16, 10, 8)
    model(torch.randn(1, 3, 8, 8))
    assert maps["0.bam"].map.shape == (3, 16, 10, 8)


def test_what_is_kept_holds_no_graph_and_training_goes_on():
    model = network().train()
    with attention_maps(model) as maps:
        loss = model(torch.randn(2, 3, 8, 8)).square().mean()
    assert not maps["0.bam"].channel_logits.requires_grad
    assert not maps["0.bam"].spatial_logits.requires_grad
    loss.backward()
    assert model[0].bam.channel.norm.bias.grad.abs().max() > 0


def test_the_output_is_the_same_inside_and_outside():
    model, x = network(), torch.randn(2, 3, 8, 8)
    outside = model(x)
    with attention_maps(model):
        assert torch.equal(model(x), outside)


def test_no_observer_is_left_behind_an_exception():
    model = network()
    with pytest.raises(ZeroDivisionError), attention_maps(model) as maps:
        model(torch.randn(2, 3, 8, 8))
        raise ZeroDivisionError
    assert set(maps) == {"0.bam", "2.bam"}
    assert not [name for name, part in model.named_modules() if "observer" in vars(part)]


def test_an_observer_that_was_there_is_called_and_comes_back():
    model, calls = network(), []

    def mine(c: Tensor | None, s: Tensor | None) -> None:
        calls.append(c)

    model[0].bam.observer = mine
    with attention_maps(model) as outer, attention_maps(model) as inner:
        model(torch.randn(2, 3, 8, 8))
        assert len(calls) == 1
    assert torch.equal(outer["0.bam"].map, inner["0.bam"].map)
    assert model[0].bam.observer is mine
    assert "observer" not in vars(model[2].bam)


def test_under_torch_compile():
    model = network()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 8, 8)
    before = compiled(x)
    with attention_maps(model) as expected:
        model(x)
    with attention_maps(compiled) as maps:
        torch.testing.assert_close(compiled(x), before)
    assert len(maps) == 2
    for name, found in maps.items():
        torch.testing.assert_close(found.map, expected[name.removeprefix("_orig_mod.")].map)


def test_insert_bam_inside_does_not_write_into_it():
    model = network()
    with attention_maps(model) as maps:
        insert_bam(model, ["1"])
        assert maps == {}


def test_errors():
    with pytest.raises(ValueError, match=r"expected one with a BAM.*got Sequential without any"):
        attention_maps(nn.Sequential(nn.ReLU())).__enter__()
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got list"):
        attention_maps([BAM(16)]).__enter__()
