"""bam_kernels.models: names, keys, places, initialisation, and what is refused."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from tolerances import relative_error
from torch import nn

from bam_kernels import BAM, SqueezeExcite, models, reference

torchvision = pytest.importorskip("torchvision", reason="pip install '.[models]'")
pytestmark = pytest.mark.usefixtures("seed")

EVERY_BLOCK = [n for n in models.names() if models.get(n).blocks is not None]
EXTRA_BLOCK = [n for n in models.names() if models.get(n).block is not None]

BOTTLENECKS = {
    "cifar_resnet50": (256, 512, 1024),
    "cifar_resnet101": (256, 512, 1024),
    "cifar_resnext29_8x64d": (256, 512),
    "cifar_resnext29_16x64d": (256, 512),
    "cifar_preresnet110": (64, 128),
    "cifar_wideresnet28_8": (128, 256),
    "cifar_wideresnet28_10": (160, 320),
    "cifar_wideresnet40_10": (160, 320),
    "cifar_densenet100_bc": (216, 108, 300, 150),  # before and after each transition
    "resnet18": (64, 128, 256),
    "resnet50": (256, 512, 1024),
    "resnet101": (256, 512, 1024),
    "wideresnet18_1.5": (96, 192, 384),
    "wideresnet18_2.0": (128, 256, 512),
    "resnext50_32x4d": (256, 512, 1024),
    "mobilenet_v2": (24, 32, 96),
    "squeezenet1_1": (128, 256),
    "upernet_resnet50": (256, 512, 1024),
    "srresnet": (64, 64, 64, 64),
    "fasterrcnn_resnet50_fpn": (256, 512, 1024),
    "fasterrcnn_resnet101_fpn": (256, 512, 1024),
    "ssd300_vgg16": (512, 1024, 512, 256, 256, 256),
    "ssd300_mobilenet": (512, 1024, 512, 256, 256, 128),
    "stairnet300_vgg16": (256,) * 6,
    "stairnet300_mobilenet": (256,) * 6,
}
BLOCKS = {
    "cifar_resnet50": 16,
    "cifar_resnet101": 33,
    "cifar_resnext29_8x64d": 9,
    "cifar_resnext29_16x64d": 9,
    "cifar_preresnet110": 54,
    "cifar_wideresnet28_8": 12,
    "cifar_wideresnet28_10": 12,
    "cifar_wideresnet40_10": 18,
    "cifar_densenet100_bc": 48,
    "resnet18": 8,
    "resnet50": 16,
    "resnet101": 33,
    "wideresnet18_1.5": 8,
    "wideresnet18_2.0": 8,
    "resnext50_32x4d": 16,
    "mobilenet_v2": 17,
    "squeezenet1_1": 8,
    "srresnet": 16,
    "fasterrcnn_resnet50_fpn": 16,
    "fasterrcnn_resnet101_fpn": 33,
}


def attentions(model: nn.Module) -> dict[str, nn.Module]:
    kinds = reference.BAM | reference.SqueezeExcite
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds)}


def test_every_network_is_listed():
    assert models.names() == list(dict.fromkeys(models.names()))
    assert set(models.names()) == set(BOTTLENECKS)
    assert set(EVERY_BLOCK) == set(BLOCKS)
    for name in models.names():
        assert models.get(name).name == name


@pytest.mark.parametrize("name", models.names())
def test_bams_stand_where_the_paper_has_them(name):
    plain = models.create(name, device="meta").state_dict()
    model = models.create(name, attention="bam", device="meta", reduction=8, combine="max")
    bams = attentions(model)
    assert all(type(bam) is BAM for bam in bams.values())
    # In the order of the forward, but for DenseNet's, which were inserted in two turns.
    widths = [bam.config.channels for bam in bams.values()]
    assert sorted(widths) == sorted(BOTTLENECKS[name])
    assert "densenet" in name or tuple(widths) == BOTTLENECKS[name]
    assert {(bam.config.reduction, bam.config.combine) for bam in bams.values()} == {(8, "max")}
    # A plain network's checkpoint loads: no key of it is renamed.
    keys = model.state_dict()
    new = set(keys) - set(plain)
    assert set(plain) < set(keys) and all(".bam." in key for key in new)
    assert {k: v.shape for k, v in plain.items()} == {k: keys[k].shape for k in plain}


@pytest.mark.parametrize("name", EVERY_BLOCK)
def test_every_block_has_one(name):
    kinds = {"bam-c": BAM, "se": SqueezeExcite}
    if name != "resnet18":  # they stand in the same places
        kinds.pop("se")
    for attention, kind in kinds.items():
        found = attentions(models.create(name, attention=attention, device="meta"))
        assert len(found) == BLOCKS[name] and {type(m) for m in found.values()} == {kind}
    if name in EXTRA_BLOCK:  # in a residual block, before the shortcut joins
        assert all(path.endswith(".refine.bam") for path in found)


def test_refinement_inside_of_a_block_leaves_the_shortcut_alone():
    model = models.create("cifar_resnet50", attention="se").eval()
    block = model.layer2[1]
    x = torch.rand(2, 512, 6, 5)
    inner = block.bn3(block.conv3(block.bn2(block.conv2(block.bn1(block.conv1(x)).relu())).relu()))
    want = torch.relu(x + block.refine.bam(inner))
    assert relative_error(block(x), want) < 1e-6
    assert relative_error(block(x), torch.relu(x + inner)) > 1e-3


@pytest.mark.parametrize("name", EXTRA_BLOCK)
def test_extra_block_is_one_more_of_the_stage(name):
    """Table 1c: as many parameters as the stage's last block, on top of the plain network's."""
    plain = models.create(name, device="meta")
    model = models.create(name, attention="block", device="meta")
    added = [m for path, m in model.named_modules() if path.endswith(".bam")]
    assert len(added) == len(BOTTLENECKS[name])
    for i, block in enumerate(added):
        like = getattr(plain, f"layer{i + 1}")[-1]
        assert type(block) is type(like)
        assert {k: v.shape for k, v in block.state_dict().items()} == {
            k: v.shape for k, v in like.state_dict().items()
        }


def test_extra_block_runs():
    for name in ("cifar_preresnet110", "cifar_resnext29_8x64d"):
        model = models.create(name, attention="block", num_classes=7, in_channels=1)
        y = model(torch.randn(2, 1, 16, 24))
        assert y.shape == (2, 7)
        y.sum().backward()
        assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", ("resnet18", "resnet50", "resnext50_32x4d"))
def test_resnets_are_torchvisions_but_for_the_stride(name):
    """Its keys and weights; and its output too, once its stride is moved."""
    ours = models.create(name, num_classes=10).eval()
    theirs = getattr(torchvision.models, name)(num_classes=10).eval()
    for part in theirs.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean, std=0.1)
            nn.init.uniform_(part.running_var, 2.0, 4.0)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for part in theirs.modules():
        if isinstance(part, torchvision.models.resnet.Bottleneck):
            part.conv1.stride, part.conv2.stride = part.conv2.stride, part.conv1.stride
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert relative_error(ours(x), theirs(x)) < 1e-5


def test_initialisation_is_the_families():
    for name in ("cifar_resnext29_8x64d", "cifar_preresnet110", "resnet18"):
        model = models.create(name, attention="block")
        for path, part in model.named_modules():
            if isinstance(part, nn.Conv2d) and part.weight.numel() > 4000:
                fan_out = part.out_channels * part.kernel_size[0] ** 2
                std = part.weight.std().item()
                bound = 6 / math.sqrt(2 * part.weight.numel())
                assert std == pytest.approx(math.sqrt(2 / fan_out), rel=bound), path


def test_arguments_reach_the_network():
    model = models.create(
        "cifar_wideresnet28_8", attention="bam", num_classes=7, in_channels=1, dtype=torch.float64
    )
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model.training and model(torch.randn(2, 1, 8, 12).double()).shape == (2, 7)
    # One of each family; the others have the same code.
    for name in ("resnet18", "cifar_preresnet110", "cifar_densenet100_bc", "mobilenet_v2",
                 "squeezenet1_1", "upernet_resnet50", "srresnet", "fasterrcnn_resnet50_fpn",
                 "ssd300_vgg16", "stairnet300_mobilenet"):  # fmt: skip
        model = models.create(name, attention="bam", in_channels=4, device="meta")
        assert {t.device.type for t in model.state_dict().values()} == {"meta"}
        first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
        assert first.in_channels == 4


def test_ssd_is_torchvisions():
    """The detector that torchvision puts together, from the same weights, but for the places."""
    ours = models.create("ssd300_vgg16", num_classes=4).eval()
    theirs = torchvision.models.detection.ssd300_vgg16(
        weights=None, weights_backbone=None, num_classes=4
    ).eval()
    state = {k.replace(".features.", ".", 1): v for k, v in ours.state_dict().items()}
    theirs.load_state_dict(state, strict=True, assign=True)
    pictures = [torch.rand(3, 50, 70)]
    with torch.no_grad():
        (found,), (want,) = ours(pictures), theirs(pictures)
    assert len(want["boxes"]) > 0
    torch.testing.assert_close(found, want)


def test_detectors_made_on_another_device_have_their_anchors_at_hand():
    """torchvision computes SSD's boxes on the CPU in each forward, from no buffers."""
    model = models.create("ssd300_mobilenet", device="meta")
    assert {pair.device.type for pair in model.anchor_generator._wh_pairs} == {"cpu"}


def test_nothing_is_imported_before_it_is_needed():
    code = (
        "import sys, bam_kernels, bam_kernels.models\n"
        "bam_kernels.models.create('resnet18', device='meta')\n"
        "print([m for m in ('torchvision', 'timm', 'segmentation_models_pytorch') "
        "if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    (
        ({"name": "resnet51"}, ValueError, "name: expected one of cifar_resnet50, .*'resnet51'"),
        ({"name": 50}, TypeError, "name: expected a str, got int 50"),
        ({"attention": "cbam"}, ValueError, "attention: expected None or one of bam, .*'cbam'"),
        ({"attention": True}, TypeError, "attention: expected None or a str, got bool True"),
        ({"num_classes": 0}, ValueError, "num_classes: expected at least 1, got 0"),
        ({"num_classes": 2.0}, TypeError, "num_classes: expected an int, got float 2.0"),
        ({"device": "gpu"}, ValueError, "device: expected a torch.device or its name, got 'gpu'"),
        ({"dtype": torch.int8}, TypeError, "dtype: expected a floating-point .* got torch.int8"),
        ({"dtype": "float32"}, TypeError, "dtype: expected a floating-point .* got 'float32'"),
        ({"in_channels": True}, TypeError, "in_channels: expected an int, got bool True"),
        ({"reduction": 8}, TypeError, "reduction: without attention takes no such option"),
        ({"attention": "block", "dilation": 2}, TypeError, "dilation: attention='block' takes no"),
        ({"attention": "se", "dilation": 2}, TypeError, "dilation: attention='se' takes no such"),
        ({"attention": "bam", "width": 2}, TypeError, "layer1.*width"),
        ({"attention": "bam", "combine": "min"}, ValueError, "combine: expected one of sum, .*min"),
        ({"attention": "bam", "reduction": 128}, ValueError, "64 channels.*reduction=128"),
        ({"attention_module": BAM}, TypeError, "attention_module: expected None with attention=No"),
        ({"attention": "bam", "attention_module": 3}, TypeError, "attention_module: .* got 3"),
        ({"name": "srresnet", "num_classes": 3}, ValueError, "num_classes: srresnet puts out an i"),
        ({"name": "mobilenet_v2", "attention": "block"}, ValueError, "mobilenet_v2 has no 'block'"),
        ({"name": "ssd300_vgg16", "attention": "se"}, ValueError, "ssd300_vgg16 has no 'se'"),
    ),
)
def test_refused(arguments, error, words):
    arguments = {"name": "resnet18", "device": "meta", **arguments}
    with pytest.raises(error, match=words):
        models.create(arguments.pop("name"), **arguments)


def test_a_missing_package_is_named(monkeypatch):
    from bam_kernels.models import registry

    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"mobilenet_v2 is built with torchvision; pip install"):
        models.create("mobilenet_v2")
