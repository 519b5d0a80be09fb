"""insert_bam on the ResNets of torchvision and timm: keys, channels, and the forward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bam_kernels import insert_bam, reference

PAPER = ("layer1", "layer2", "layer3")


def randomise_norms(module: nn.Module) -> None:
    """Fresh batch norms hide a wrong order or a lost statistic: give them values."""
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.weight.uniform_(0.5, 2.0)
                part.bias.normal_()
                part.running_mean.normal_()
                part.running_var.uniform_(0.5, 2.0)


@pytest.fixture(autouse=True)
def seeded(seed: int) -> None:
    """Every test here draws its inputs from a fresh seed."""


@pytest.mark.parametrize(
    ("name", "widths"), [("resnet18", (64, 128, 256)), ("resnet50", (256, 512, 1024))]
)
def test_torchvision_resnet_keeps_every_key(name, widths):
    models = pytest.importorskip("torchvision.models")
    plain = getattr(models, name)(weights=None)
    before = plain.state_dict()
    model = copy.deepcopy(plain)
    inserted = insert_bam(model, PAPER, reduction=8)

    assert list(inserted) == [f"{place}.bam" for place in PAPER]
    assert [bam.config.channels for bam in inserted.values()] == list(widths)
    assert all(model.get_submodule(path) is bam for path, bam in inserted.items())
    assert all(list(getattr(model, place))[-1] is inserted[f"{place}.bam"] for place in PAPER)
    after = model.state_dict()
    new = set(after) - set(before)
    assert set(before) <= set(after)
    assert new and all(key.startswith(tuple(f"{place}.bam." for place in PAPER)) for key in new)
    missing, unexpected = model.load_state_dict(before, strict=False)
    # The counter of a batch norm may be absent: it starts at 0.
    assert {key for key in new if not key.endswith("num_batches_tracked")} == set(missing)
    assert not unexpected


def test_torchvision_resnet18_forward_is_layer_then_bam():
    models = pytest.importorskip("torchvision.models")
    plain = models.resnet18(weights=None)
    randomise_norms(plain)
    model = copy.deepcopy(plain)
    inserted = insert_bam(model, PAPER, module=reference.BAM)
    for bam in inserted.values():
        randomise_norms(bam)
    model.eval(), plain.eval()
    x = torch.randn(2, 3, 48, 64)
    y = plain.maxpool(plain.relu(plain.bn1(plain.conv1(x))))
    for place in PAPER:
        y = inserted[f"{place}.bam"](getattr(plain, place)(y))
    y = plain.fc(torch.flatten(plain.avgpool(plain.layer4(y)), 1))
    torch.testing.assert_close(model(x), y)
    assert not torch.allclose(model(x), plain(x))


def test_timm_resnet_and_its_features_only():
    timm = pytest.importorskip("timm")
    plain = timm.create_model("resnet18", features_only=True)
    model = copy.deepcopy(plain)
    inserted = insert_bam(model, ["layer[12]"], module=reference.BAM)
    assert {path: bam.config.channels for path, bam in inserted.items()} == {
        "layer1.bam": 64,
        "layer2.bam": 128,
    }
    x = torch.randn(1, 3, 64, 64)
    before, after = plain.eval()(x), model.eval()(x)
    first = inserted["layer1.bam"](before[1])
    torch.testing.assert_close(after[1], first)
    torch.testing.assert_close(after[2], inserted["layer2.bam"](plain.layer2(first)))
    assert set(plain.state_dict()) <= set(model.state_dict())


def test_timm_blocks_that_are_no_sequential():
    timm = pytest.importorskip("timm")
    model = timm.create_model("convnext_atto")
    before = set(model.state_dict())
    inserted = insert_bam(model, ["stages.1", "stages.2"])
    assert [bam.config.channels for bam in inserted.values()] == [80, 160]
    assert not isinstance(model.stages[1], nn.Sequential)
    assert before <= set(model.state_dict())
