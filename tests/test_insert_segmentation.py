"""segmentation_models_pytorch: BAMs in the encoders of its networks."""

from __future__ import annotations

import copy

import pytest
import torch
from test_by_name import randomised
from tolerances import relative_error

from bam_kernels import insert_bam, reference

smp = pytest.importorskip("segmentation_models_pytorch", reason="pip install '.[examples]'")
pytestmark = pytest.mark.usefixtures("seed")

PLACES = {
    "resnet18": {"layer1": 64, "layer2": 128, "layer3": 256},
    "mobilenet_v2": {"features.3": 24, "features.6": 32, "features.13": 96},
    "vgg11_bn": {
        "features.2": 64,
        "features.6": 128,
        "features.13": 256,
        "features.20": 512,
        "features.27": 512,
    },
    "tu-convnext_atto": {"model.stages_0": 40, "model.stages_1": 80, "model.stages_2": 160},
}


@pytest.mark.parametrize("name", PLACES)
def test_places_are_the_encoders_alone_or_in_the_network(name):
    """The decoder has none, and its skip connections take what was refined."""
    model = smp.Unet(name, encoder_weights=None, classes=2)
    keys = set(model.state_dict())
    twin = copy.deepcopy(model)
    alone = insert_bam(model.encoder, at="bottlenecks", reduction=8)
    whole = insert_bam(twin, at="bottlenecks", reduction=8)
    assert list(whole) == [f"encoder.{path}" for path in alone]
    assert {k.removesuffix(".bam"): v.config.channels for k, v in alone.items()} == PLACES[name]
    assert keys < set(model.state_dict()) and model.state_dict().keys() == twin.state_dict().keys()


@pytest.mark.parametrize("decoder", ["Unet", "FPN", "DeepLabV3Plus"])
def test_features_are_refined_maps(decoder):
    plain = randomised(getattr(smp, decoder)("resnet18", encoder_weights=None, classes=2)).eval()
    model = copy.deepcopy(plain)
    inserted = insert_bam(model.encoder, at="bottlenecks", module=reference.BAM)
    bams = {path: randomised(bam) for path, bam in inserted.items()}
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    features, e = model.encoder(x), plain.encoder
    y = e.maxpool(features[1])
    for i, feature in enumerate(features[2:], start=1):
        y = getattr(e, f"layer{i}")(y)
        y = bams[f"layer{i}.bam"](y) if f"layer{i}.bam" in bams else y
        assert relative_error(feature, y) < 1e-12
    decoded = plain.decoder(features)
    assert relative_error(model(x), plain.segmentation_head(decoded)) < 1e-12
    assert relative_error(model(x), plain(x)) > 1e-3


def test_checkpoint_of_the_plain_network_loads():
    plain = smp.Unet("resnet18", encoder_weights=None)
    model = smp.Unet("resnet18", encoder_weights=None)
    insert_bam(model, at="blocks", identity_start=True, residual=False, combine="sigmoid_sum")
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and missing and all(".bam." in key for key in missing)
    x = torch.randn(1, 3, 64, 32)
    assert torch.equal(model.eval()(x), plain.eval()(x))
