"""insert_bam(at=...): the paper's places, found in the networks of torchvision and timm."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tolerances import relative_error
from torch import Tensor, nn

from bam_kernels import SqueezeExcite, insert_bam, reference

pytestmark = pytest.mark.usefixtures("seed")

# Where at="bottlenecks" puts BAMs: by network the layers and their channels. ResNets, ResNeXts and
# WideResNets have the paper's three. Its SqueezeNet gained 0.02 M parameters and 0.014 GFLOPs
# (Table 4), as these two places cost. Its DenseNets have a BAM before each transition, as here, and
# one behind, which is no place before a downsampling. Nothing else is said of other networks: their
# stages are those of the ResNets.
BOTTLENECKS = {
    "torchvision": {
        "resnet18": {"layer1": 64, "layer2": 128, "layer3": 256},
        "resnet50": {"layer1": 256, "layer2": 512, "layer3": 1024},
        "resnext50_32x4d": {"layer1": 256, "layer2": 512, "layer3": 1024},
        "wide_resnet50_2": {"layer1": 256, "layer2": 512, "layer3": 1024},
        "mobilenet_v2": {"features.3": 24, "features.6": 32, "features.13": 96},
        "mobilenet_v3_small": {"features.3": 24, "features.8": 48},
        "squeezenet1_1": {"features.4": 128, "features.7": 256},
        "vgg16_bn": {
            "features.5": 64,
            "features.12": 128,
            "features.22": 256,
            "features.32": 512,
            "features.42": 512,
        },
        "alexnet": {"features.4": 192, "features.11": 256},
        "densenet121": {  # in front of these
            "features.transition1": 256,
            "features.transition2": 512,
            "features.transition3": 1024,
        },
        "googlenet": {"inception3b": 480, "inception4e": 832},
        "efficientnet_b0": {"features.2": 24, "features.3": 40, "features.5": 112},
        "regnet_y_400mf": {
            "trunk_output.block1": 48,
            "trunk_output.block2": 104,
            "trunk_output.block3": 208,
        },
        "convnext_tiny": {"features.1": 96, "features.3": 192, "features.5": 384},
        "shufflenet_v2_x0_5": {"stage2": 48, "stage3": 96},
    },
    "timm": {
        "resnet50": {"layer1": 256, "layer2": 512, "layer3": 1024},
        "resnet50d": {"layer1": 256, "layer2": 512, "layer3": 1024},  # a stem of 3 convolutions
        "resnet14t": {"layer1": 256, "layer2": 512, "layer3": 1024},  # one block a stage
        "res2net50_26w_4s": {"layer1": 256, "layer2": 512, "layer3": 1024},
        "resnetv2_50": {"stages.0": 256, "stages.1": 512, "stages.2": 1024},  # PreResNet
        "convnext_atto": {"stages.0": 40, "stages.1": 80, "stages.2": 160},
        "efficientnet_b0": {"blocks.1": 24, "blocks.2": 40, "blocks.4": 112},
        "mobilenetv3_small_100": {"blocks.1": 24, "blocks.3": 48},
        "poolformerv2_s12": {"stages.0": 64, "stages.1": 128, "stages.2": 320},
        "pvt_v2_b0": {"stages.0": 32, "stages.1": 64, "stages.2": 160},  # attention pools inside
        "dla34": {"level2": 64, "level3": 128, "level4": 256},
        "hrnet_w18_small": {"layer1": 128},  # no single way on from there
        "vgg11": {
            "features.1": 64,
            "features.4": 128,
            "features.9": 256,
            "features.14": 512,
            "features.19": 512,
        },
    },
}

# at="blocks": how many, the first and the last.
BLOCKS = {
    "torchvision": {
        "resnet18": (8, ("layer1.0", 64), ("layer4.1", 512)),
        "resnet50": (16, ("layer1.0", 256), ("layer4.2", 2048)),
        "mobilenet_v2": (17, ("features.1", 16), ("features.17", 320)),
        "squeezenet1_1": (8, ("features.3", 128), ("features.12", 512)),
        "googlenet": (9, ("inception3a", 256), ("inception5b", 1024)),
        "convnext_tiny": (18, ("features.1.0", 96), ("features.7.2", 768)),
    },
    "timm": {
        "resnet50": (16, ("layer1.0", 256), ("layer4.2", 2048)),
        "resnetv2_50": (16, ("stages.0.blocks.0", 256), ("stages.3.blocks.2", 2048)),
        "res2net50_26w_4s": (16, ("layer1.0", 256), ("layer4.2", 2048)),
        "tf_mixnet_s": (16, ("blocks.0.0", 16), ("blocks.5.2", 200)),
        "ghostnet_100": (16, ("blocks.0.0", 16), ("blocks.8.3", 160)),
        "vovnet39a": (6, ("stages.0.blocks.0", 256), ("stages.3.blocks.1", 1024)),
    },
}


def build(source: str, name: str, device: str = "cpu") -> nn.Module:
    options = {"init_weights": False} if name == "googlenet" else {"weights": None}
    if name.startswith("regnet"):  # computes its widths with tensors
        device = "cpu"
    with torch.device(device):
        if source == "timm":
            return pytest.importorskip("timm").create_model(name)
        return getattr(pytest.importorskip("torchvision.models"), name)(**options)


def cases(table: dict) -> list:
    return [pytest.param(s, n, id=f"{s}-{n}") for s, networks in table.items() for n in networks]


@pytest.mark.parametrize(("source", "name"), cases(BOTTLENECKS))
def test_bottlenecks_of(source, name):
    model = build(source, name, "meta")
    before = list(model.state_dict())
    inserted = insert_bam(model, at="bottlenecks", reduction=8)
    places = BOTTLENECKS[source][name]
    found = {path.removesuffix(".bam"): bam.config.channels for path, bam in inserted.items()}
    assert found == places and list(found) == list(places)
    after = model.state_dict()
    new = [key for key in after if key not in set(before)]
    assert [key for key in after if key in set(before)] == before
    assert new and all(key.startswith(tuple(f"{place}.bam." for place in places)) for key in new)


@pytest.mark.parametrize(("source", "name"), cases(BLOCKS))
def test_blocks_of(source, name):
    model = build(source, name, "meta")
    inserted = insert_bam(model, at="blocks")
    found = [(path.removesuffix(".bam"), bam.config.channels) for path, bam in inserted.items()]
    count, first, last = BLOCKS[source][name]
    assert (len(found), found[0], found[-1]) == (count, first, last)


def test_parameters_added_to_resnet50_are_table_2s():
    """24.07 M and 28.98 M, from 23.71 M (Table 2): to the printed digit for BAM."""
    added = {}
    for at in ("bottlenecks", "blocks"):
        inserted = insert_bam(build("torchvision", "resnet50", "meta"), at=at)
        added[at] = sum(p.numel() for bam in inserted.values() for p in bam.parameters()) / 1e6
    assert added["bottlenecks"] == pytest.approx(24.07 - 23.71, abs=0.01)
    assert added["blocks"] == pytest.approx(28.98 - 23.71, rel=0.02)


# --- where it runs ----------------------------------------------------------------------------


def randomise(model: nn.Module) -> nn.Module:
    """Weights, scales, shifts and statistics that tell every layer from every other."""
    for part in model.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, std=0.3)
            part.running_mean.normal_(std=0.3)
            part.running_var.uniform_(0.5, 1.5)
    return model.double().eval()


def test_densenet_forward_is_block_then_bam_then_transition():
    plain = randomise(
        pytest.importorskip("torchvision.models").DenseNet(8, (2, 3, 2), 16, num_classes=5)
    )
    model = copy.deepcopy(plain)
    inserted = insert_bam(model, at="bottlenecks", reduction=3, module=reference.BAM)
    assert list(inserted) == ["features.transition1.bam", "features.transition2.bam"]
    bams = [randomise(bam) for bam in inserted.values()]
    assert model.features.transition1[0] is bams[0]
    x = torch.randn(2, 3, 40, 56, dtype=torch.float64)
    f = plain.features
    y = f.denseblock1(f.pool0(f.relu0(f.norm0(f.conv0(x)))))
    y = f.transition2(bams[1](f.denseblock2(f.transition1(bams[0](y)))))
    y = torch.relu(f.norm5(f.denseblock3(y)))
    assert relative_error(model(x), plain.classifier(y.mean((2, 3)))) < 1e-12


def test_blocks_forward_is_block_then_bam():
    plain = randomise(build("torchvision", "resnet18"))
    model = copy.deepcopy(plain)
    bams = [randomise(bam) for bam in insert_bam(model, at="blocks").values()]
    x = torch.randn(2, 3, 48, 40, dtype=torch.float64)
    y = plain.maxpool(plain.relu(plain.bn1(plain.conv1(x))))
    stages = (plain.layer1, plain.layer2, plain.layer3, plain.layer4)
    for block, bam in zip((b for s in stages for b in s), bams, strict=True):
        y = bam(block(y))
    assert relative_error(model(x), plain.fc(y.mean((2, 3)))) < 1e-12


# --- networks of their own kind ---------------------------------------------------------------


class Residual(nn.Module):
    """A block written as most are, with functional activations."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1, shortcut: bool = True) -> None:
        super().__init__()
        self.a = nn.Conv2d(c_in, c_out, 3, stride, 1)
        self.b = nn.Conv2d(c_out, c_out, 1)
        self.short = nn.Conv2d(c_in, c_out, 1, stride) if shortcut else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(F.relu(self.a(x), inplace=True))
        return F.relu(y if self.short is None else y + self.short(x))


class Plain(nn.Module):
    """No block and no module for the pooling: nothing but functions in between."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3)
        self.c = nn.Conv2d(24, 40, 5)
        self.head = nn.Linear(40, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.b(F.relu(self.a(x)))), 2)
        x = F.avg_pool2d(F.relu(self.c(x)), 2)
        return self.head(x.mean((2, 3)))


class UNet(nn.Module):
    """Two levels; the skip connections join behind the last downsampling."""

    def __init__(self) -> None:
        super().__init__()

        def double(c_in: int, c_out: int) -> nn.Sequential:
            layers = (nn.Conv2d(c_in, c_out, 3, padding=1), nn.ReLU(inplace=True))
            return nn.Sequential(*layers, nn.Conv2d(c_out, c_out, 3, padding=1), nn.ReLU(True))

        self.inc, self.down1, self.down2 = double(3, 16), double(16, 32), double(32, 64)
        self.up1, self.up2 = double(96, 32), double(48, 16)

    def forward(self, x: Tensor) -> Tensor:
        a = self.inc(x)
        b = self.down1(F.max_pool2d(a, 2))
        c = self.down2(F.max_pool2d(b, 2))
        y = self.up1(torch.cat([b, F.interpolate(c, b.shape[2:])], 1))
        return self.up2(torch.cat([a, F.interpolate(y, a.shape[2:])], 1))


class Unshuffles(nn.Module):
    """Downsampling by moving pixels to channels, once as an operator and once by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Residual(3, 16), Residual(64, 32)
        self.three = Residual(128, 20)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pixel_unshuffle(self.one(x), 2)
        x = self.two(x)
        n, c, h, w = x.shape
        x = x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4)
        return self.three(x.reshape(n, 4 * c, h // 2, w // 2))


def residual_network(*blocks: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.MaxPool2d(2), *blocks)


def channels(inserted: dict[str, nn.Module]) -> dict[str, int]:
    return {path.removesuffix(".bam"): bam.config.channels for path, bam in inserted.items()}


@pytest.mark.parametrize(
    ("model", "at", "expected"),
    [
        (Plain, "bottlenecks", {"b": 24, "c": 40}),
        (UNet, "bottlenecks", {"inc": 16, "down1": 32}),
        (Unshuffles, "bottlenecks", {"one": 16, "two": 32}),
        (Unshuffles, "blocks", {"one": 16, "two": 32, "three": 20}),
        (
            lambda: residual_network(Residual(16, 24), Residual(24, 24), Residual(24, 32, 2)),
            "bottlenecks",
            {"3": 24},
        ),
        (  # a sibling without a shortcut is a block too, and one in a stage of its own is no stage
            lambda: residual_network(Residual(16, 24), Residual(24, 32, 2, False)),
            "blocks",
            {"2": 24, "3": 32},
        ),
    ],
)
def test_places_of_networks_of_their_own_kind(model, at, expected):
    model = model()
    for shape in ((1, 3, 64, 64), (2, 3, 64, 96)):
        twin = copy.deepcopy(model)
        assert channels(insert_bam(twin, at=at, reduction=2, example_input=shape)) == expected
        twin.eval()(torch.randn(shape))


def test_segmentation_network_gets_its_encoders_places():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.segmentation.fcn_resnet50(
        weights=None, weights_backbone=None, num_classes=4
    )
    # layer3 and layer4 are dilated in place of strided: one downsampling is left.
    assert channels(insert_bam(model.backbone, at="bottlenecks")) == {"layer1": 256}


def test_a_second_time_is_refused_and_the_other_place_is_not():
    model = build("torchvision", "resnet18")
    insert_bam(model, at="bottlenecks", module=reference.BAM)
    with pytest.raises(ValueError, match=r"at: .*'layer1' has one already"):
        insert_bam(model, at="bottlenecks")
    inserted = insert_bam(model, at="blocks", module=SqueezeExcite)
    assert list(inserted)[:2] == ["layer1.0.bam", "layer1.1.bam"] and len(inserted) == 8
    assert type(model.layer1.bam) is reference.BAM
    model.eval()(torch.randn(1, 3, 64, 48))


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (Plain, {}, ValueError, "after, at: expected one of the two, got neither"),
        (Plain, {"at": "blocks", "after": ["a"]}, ValueError, "after, at: .* got both"),
        (Plain, {"at": "stages"}, ValueError, "at: expected one of bottlenecks, blocks, got 'st"),
        (Plain, {"at": ["blocks"]}, TypeError, "at: expected one of .*, got list"),
        (Plain, {"at": "blocks"}, ValueError, r"found none in Plain on an input of shape \[1, 3"),
        (lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 3)), {"at": "bottlenecks"},
         ValueError, "at: expected a network that downsamples.* no such place in Sequential"),
        (lambda: nn.Linear(3, 4), {"at": "bottlenecks", "example_input": (2, 3)}, ValueError,
         "no such place in Linear"),
        (Plain, {"at": "bottlenecks", "example_input": (1, 4, 64, 64)}, ValueError,
         r"model: at='bottlenecks' needs a run, and one on an input of shape \[1, 4, 64, "),
        (Plain, {"at": "bottlenecks", "reduction": 32}, ValueError, r"after 'b' \(24 channels\)"),
        (Plain, {"at": "bottlenecks", "identity_start": 1}, TypeError, "identity_start: .*got int"),
        (Plain, {"at": "bottlenecks", "identity_start": True, "module": nn.BatchNorm2d}, TypeError,
         "identity_start: expected a BAM or SqueezeExcite of bam_kernels, got BatchNorm2d"),
    ],
)  # fmt: skip
def test_errors_change_nothing(model, options, error, message):
    model = model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        insert_bam(model, **options)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_channels_last_networks_have_no_places():
    model = build("torchvision", "swin_t", "meta")
    with pytest.raises(ValueError, match=r"at: expected .* \[N, C, H, W\]"):
        insert_bam(model, at="bottlenecks")


class Doubled(nn.Module):
    """Draws no random numbers, and shows what it took."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return 2 * x


def test_the_model_is_left_alone_and_travels(tmp_path):
    model = residual_network(Residual(16, 24), nn.BatchNorm2d(24), Residual(24, 32, 2))
    model[3].momentum = None
    state = copy.deepcopy(model.state_dict())
    generator = torch.get_rng_state()
    inserted = insert_bam(model, at="bottlenecks", module=Doubled)
    assert torch.equal(torch.get_rng_state(), generator) and list(inserted) == ["3.bam"]
    assert model.training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    torch.save(model, tmp_path / "model.pt")
    twin = torch.load(tmp_path / "model.pt", weights_only=False)
    x = torch.randn(2, 3, 32, 40)
    y = model.eval()(x)
    assert torch.equal(twin.eval()(x), y)
    assert torch.equal(model[4](2 * model[3].bam.seen), y)
