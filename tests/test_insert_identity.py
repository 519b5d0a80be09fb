"""insert_bam(identity_start=True): how large the jump is, and that what was inserted trains."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from cases import COMBINES
from tolerances import relative_error
from torch import Tensor, nn

from bam_kernels import BAM, SqueezeExcite, attention_maps, insert_bam, reference
from bam_kernels.integrate.identity import start_as_identity

pytestmark = pytest.mark.usefixtures("seed", "large_tiles")

M = 1 / (1 + math.exp(5))
BRANCHES = ({}, {"spatial": False}, {"channel": False})


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("branches", BRANCHES)
@pytest.mark.parametrize("preset", ["paper", "official"])
@pytest.mark.parametrize("residual", [True, False])
def test_f_becomes_a_constant_times_f(combine, branches, preset, residual):
    """In both modes, whatever the statistics: the last layers put out constants."""
    both = not branches
    expected = 1 + M if residual else 1 - M
    if combine == "sigmoid_sum" and both and not residual:
        expected = 1.0
    for kind in (reference.BAM, BAM):
        bam = kind(24, 4, combine=combine, preset=preset, residual=residual, **branches).double()
        start_as_identity(bam)
        x = torch.randn(3, 24, 7, 9, dtype=torch.float64)
        for mode in (True, False):
            bar = M if combine == "max" and both else 1e-14
            assert relative_error(bam.train(mode)(x), expected * x) < bar


def test_squeeze_excite_and_the_exact_identity():
    x = torch.randn(2, 16, 5, 6)
    module = SqueezeExcite(16)
    start_as_identity(module)
    torch.testing.assert_close(module(x), (1 - M) * x)
    exact = BAM(16, 4, residual=False, combine="sigmoid_sum")
    start_as_identity(exact)
    assert torch.equal(exact.eval()(x), x)


def pretrained() -> nn.Module:
    """torchvision's ResNet-18 with statistics and scales that a trained one might have."""
    model = pytest.importorskip("torchvision.models").resnet18(num_classes=10)
    model.train()
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.weight.uniform_(0.5, 1.5)
                part.bias.normal_(std=0.2)
                part.momentum = None
        for _ in range(2):
            model(torch.randn(4, 3, 48, 64))
    return model.eval()


def test_jump_of_a_networks_output():
    """The logits change by about as much as the features at three places together; a fresh BAM's
    change is of another order."""
    plain = pretrained()
    x = torch.randn(2, 3, 48, 64)
    jumps = {}
    for start in (True, False):
        model = copy.deepcopy(plain)
        insert_bam(model, at="bottlenecks", identity_start=start)
        with torch.no_grad():
            jumps[start] = relative_error(model.eval()(x), plain(x))
    assert 1e-4 < jumps[True] < 3 * 3 * M
    assert jumps[False] > 10 * jumps[True]


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("preset", ["paper", "official"])
@pytest.mark.parametrize("residual", [True, False])
def test_every_parameter_trains(combine, preset, residual):
    """In the first step the last layers alone have a gradient, from the second on every layer."""
    model = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.ReLU())
    options = {"combine": combine, "preset": preset, "residual": residual, "reduction": 1}
    # 24 hidden units: of a few, all may be dead.
    options["module"] = reference.BAM  # the kernels' gradients have their tests
    bam = insert_bam(
        model, ["1"], identity_start=True, example_input=(1, 3, 9, 7), **options
    )["1.bam"]  # fmt: skip
    optimizer = torch.optim.AdamW(bam.parameters(), lr=0.02)
    x = torch.randn(4, 3, 9, 7)
    with torch.no_grad():  # M shall leave its start: up from 0, or down from 1
        wanted = 0.5 * torch.rand(4, 24, 9, 7)
        features = model[0](x).relu()
        target = features * (1 + wanted if residual else 1 - wanted)
    maps: list[Tensor] = []
    trained: set[str] = set()
    for _ in range(8):
        optimizer.zero_grad()
        with attention_maps(model) as seen:
            (model(x) - target).square().mean().backward()
        maps.append(seen["1.bam"].map.detach().clone())
        for name, p in bam.named_parameters():
            assert p.grad.isfinite().all(), name
            if p.grad.abs().max() > 0:
                trained.add(name)
        optimizer.step()
    spread = [m.std() for m in maps]
    assert max(spread) > 1e-4
    if combine == "max":  # not constant, lest one branch be the smaller everywhere
        assert 0 < spread[0] < 0.3 * M
    else:
        assert spread[0] < 1e-6
    assert trained == {name for name, _ in bam.named_parameters()}


class Unscaled(reference.BAM):
    """One whose last batch norm has neither scale nor shift."""

    def __init__(self, channels: int, **options: object) -> None:
        super().__init__(channels, **options)
        self.spatial.norm = nn.BatchNorm2d(1, affine=False)


def test_a_last_layer_without_parameters_is_refused():
    bam = Unscaled(16, reduction=4)
    before = copy.deepcopy(bam.state_dict())
    with pytest.raises(ValueError, match=r"identity_start: .* spatial branch's last layer"):
        start_as_identity(bam)
    assert all(torch.equal(value, before[key]) for key, value in bam.state_dict().items())
    model = nn.Sequential(nn.Conv2d(3, 16, 3))
    with pytest.raises(ValueError, match="identity_start"):
        insert_bam(model, ["0"], module=Unscaled, identity_start=True)
    assert list(model.state_dict()) == ["0.weight", "0.bias"] and not model[0]._forward_hooks
