"""timm: BAM as its attention layer, and what its networks do with inserted BAMs."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from test_by_name import randomised
from tolerances import relative_error
from torch import nn

from bam_kernels import BAM, SqueezeExcite, insert_bam, reference
from bam_kernels.integrate.timm import attn_layer, register

timm = pytest.importorskip("timm")
layers = pytest.importorskip("timm.layers")
pytestmark = pytest.mark.usefixtures("seed", "large_tiles")


def image(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (2, 3, 64, 48)), dtype=torch.float64)


def resnet(**options) -> nn.Module:
    return timm.create_model("resnet14t", num_classes=5, stem_width=8, **options)


# --- attn_layer -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "kind", "reduction"),
    [
        (BAM, BAM, 16),
        (reference.BAM, reference.BAM, 16),
        (functools.partial(BAM, reduction=8), BAM, 8),
        (attn_layer(), BAM, 16),
        (attn_layer(reduction=4, preset="official"), BAM, 4),
        (attn_layer(SqueezeExcite), SqueezeExcite, 16),
    ],
)
def test_attn_layer_of_a_resnet(layer, kind, reduction):
    model = resnet(block_args={"attn_layer": layer})
    found = [model.get_submodule(f"layer{i}.0.se") for i in (1, 2, 3, 4)]
    assert all(type(bam) is kind and bam.config.reduction == reduction for bam in found)
    assert [bam.config.channels for bam in found] == [256, 512, 1024, 2048]


def test_attn_layer_runs_behind_the_last_norm_and_before_the_shortcut():
    model = randomised(resnet(block_args={"attn_layer": attn_layer(reference.BAM)})).eval()
    block, x = model.layer2[0], torch.randn(2, 256, 9, 7, dtype=torch.float64)
    y = block.act1(block.bn1(block.conv1(x)))
    y = block.bn3(block.conv3(block.act2(block.bn2(block.conv2(y)))))
    expected = block.act3(block.se(y) + block.downsample(x))
    assert relative_error(block(x), expected) < 1e-13


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attn_layer_takes_device_and_dtype(device):
    options = {"device": device, "dtype": torch.float64}
    model = resnet(block_args={"attn_layer": BAM}, **options)
    parameters = list(model.layer1[0].se.parameters())
    assert {(p.device.type, p.dtype) for p in parameters} == {(device, torch.float64)}


def test_attn_layer_takes_what_networks_pass_on():
    """An activation and a norm, of no use to a BAM; and a ratio, where no reduction is given."""
    passed = {"act_layer": nn.SiLU, "norm_layer": nn.BatchNorm2d, "rd_ratio": 0.125}
    assert attn_layer()(64, **passed).config.reduction == 8
    assert attn_layer(reduction=4)(64, **passed).config.reduction == 4


def test_attn_layer_of_a_csp_network():
    cspnet = pytest.importorskip("timm.models.cspnet")
    block = cspnet.BottleneckBlock(
        64, 64, attn_layer=functools.partial(attn_layer(reduction=4)), attn_last=True
    )
    assert type(block.attn3) is BAM and block.attn3.config.channels == 64
    assert block.eval()(torch.randn(2, 64, 9, 7)).shape == (2, 64, 9, 7)


def test_attn_layer_of_an_efficientnet_block():
    blocks = pytest.importorskip("timm.models._efficientnet_blocks")
    block = blocks.InvertedResidual(32, 32, se_layer=functools.partial(attn_layer(), rd_ratio=0.25))
    assert block.se.config.channels == 32 and block.se.config.reduction == 4


def test_attn_layer_errors():
    with pytest.raises(TypeError, match=r"attn_layer: .*ratio"):
        attn_layer(ratio=4)
    with pytest.raises(TypeError, match="rd_channels"):
        attn_layer()(64, rd_channels=8)
    with pytest.raises(AssertionError, match="Invalid attn module"):  # why there is no name for it
        layers.get_attn("bam")


# --- feature extraction -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [BAM, reference.BAM, SqueezeExcite, reference.SqueezeExcite])
def test_registered_modules_are_leaves_of_timms_tracer(kind, monkeypatch):
    fx = pytest.importorskip("timm.layers._fx")
    monkeypatch.setattr(fx, "_leaf_modules", set(fx._leaf_modules))
    register()
    register()
    assert layers.is_notrace_module(kind) and kind in layers.get_notrace_modules()
    pytest.importorskip("torchvision")
    model = resnet()
    bam = insert_bam(model, ["layer1"], module=kind)["layer1.bam"]
    bam.register_forward_hook(lambda module, args, output: output)  # ours are no leaf by themselves
    names, _ = layers.get_graph_node_names(model.eval())
    assert "layer1.bam" in names and not any(name.startswith("layer1.bam.") for name in names)
    extract = layers.create_feature_extractor(model, ["layer1.bam", "layer3"])
    x = torch.randn(2, 3, 64, 48)
    found = extract(x)
    expected = model.layer1(model.maxpool(model.act1(model.bn1(model.conv1(x)))))
    torch.testing.assert_close(found["layer1.bam"], expected)
    torch.testing.assert_close(found["layer3"], model.layer3(model.layer2(expected)))


# --- inserted BAMs ----------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["bottlenecks", "blocks"])
def test_resnet_features_only_and_intermediates(at):
    plain = randomised(resnet(features_only=True)).eval()
    model = copy.deepcopy(plain)
    inserted = insert_bam(model, at=at, module=reference.BAM)
    bams = {path: randomised(bam) for path, bam in inserted.items()}
    assert len(bams) == (3 if at == "bottlenecks" else 4)
    assert set(plain.state_dict()) <= set(model.state_dict())
    x = image()
    features, y = model(x), plain.act1(plain.bn1(plain.conv1(x)))
    assert relative_error(features[0], y) < 1e-13
    y = plain.maxpool(y)
    for i, feature in enumerate(features[1:], start=1):
        y = getattr(plain, f"layer{i}")(y)
        bam = bams.get(f"layer{i}.bam" if at == "bottlenecks" else f"layer{i}.0.bam")
        y = y if bam is None else bam(y)
        assert relative_error(feature, y) < 1e-12


def test_forward_intermediates_sees_refined_maps():
    model = randomised(resnet()).eval()
    insert_bam(model, at="bottlenecks", module=reference.BAM)
    x = image()
    _, maps = model.forward_intermediates(x)
    expected = model.layer1(model.maxpool(maps[0]))
    assert relative_error(maps[1], expected) < 1e-13


@pytest.mark.parametrize("name", ["resnet14t", "convnext_atto"])
@pytest.mark.parametrize("at", ["bottlenecks", "blocks"])
def test_gradient_checkpointing_gives_the_same_gradients(name, at):
    model = timm.create_model(name, num_classes=3, drop_path_rate=0.0).double()
    inserted = insert_bam(model, at=at, reduction=8, module=reference.BAM)
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing(True)
    x = image()
    saved: list[int] = []
    for net in (model.train(), twin.train()):
        kept = 0

        def keep(t: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = net(x)
        saved.append(kept)
        y.square().mean().backward()
    assert saved[1] < saved[0] / 2  # and it did checkpoint
    for (key, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        if p.grad.norm() > 1e-9:  # no bias in front of batch statistics, which has none
            assert relative_error(q.grad, p.grad) < 1e-8, key
    trained = [bam.spatial.project.weight.grad for bam in inserted.values()]
    assert all(gradient.abs().max() > 0 for gradient in trained)


@pytest.mark.parametrize("at", ["bottlenecks", "blocks"])
def test_state_dict_round_trip(at, tmp_path):
    model = randomised(resnet())
    insert_bam(model, at=at)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    fresh = resnet().double()
    insert_bam(fresh, at=at)
    fresh.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True), strict=True)
    x = image()
    assert torch.equal(fresh.eval()(x), model.eval()(x))
    # A plain checkpoint goes in as well: what is missing are the BAMs alone.
    plain = resnet().double()
    missing, unexpected = fresh.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and missing and all(".bam." in key for key in missing)
