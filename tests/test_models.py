"""bam_kernels.models: every network with the fused module against the same with the plain one.

In float64: in float32 one unit of a ReLU on which the two round to different sides moves the
gradients of a deep network by 1e-3, which would hide a fault; here they agree to 1e-13.
"""

from __future__ import annotations

import pytest
import torch
from tolerances import PARITY, relative_error
from torch import Tensor, nn

from bam_kernels import dispatch, models, reference, use_backend

torchvision = pytest.importorskip("torchvision", reason="pip install '.[models]'")
pytestmark = pytest.mark.usefixtures("seed")
needs_cpp = pytest.mark.skipif(
    dispatch.why_not("cpp", "cpu") is not None, reason=str(dispatch.why_not("cpp", "cpu"))
)

PEERS = {"bam": reference.BAM, "bam-c": reference.BAM, "se": reference.SqueezeExcite}
CLASSIFIERS = [n for n in models.names() if models.get(n).dataset in ("cifar100", "imagenet")]
DETECTORS = [n for n in models.names() if n.startswith(("fasterrcnn", "ssd", "stairnet"))]
GRADIENTS = {"bam": 1e-11, "bam-c": 1e-9, "se": 1e-11}
"""Largest relative error of gradients. Over 5 to 14 seeds the largest were 5e-13 with BAMs at the
bottlenecks (ResNet-101), 2e-11 with one in each of PreResNet-110's 54 blocks, 1e-14 with SEs."""


def images(name: str, n: int, size: tuple[int, int] | None = None) -> Tensor:
    return torch.randn(n, 3, *(size or models.get(name).input_size), dtype=torch.float64)


def calibrated(model: nn.Module, run) -> nn.Module:
    """Batch norms with random weights, and statistics that are near what they see in a `run`: with
    statistics from nowhere a deep network's maps grow until every sigmoid is 0 or 1."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(std=0.3)
            norm.momentum = 1.0
        run(model.train())
        for norm in norms:
            norm.momentum = 0.1
            std = norm.running_var.sqrt()
            norm.running_mean += 0.2 * std * torch.randn_like(std)
            norm.running_var *= torch.empty_like(std).uniform_(0.6, 1.6)
    return model.eval()


def twins(name: str, attention: str, run=None, **options) -> tuple[nn.Module, nn.Module]:
    """The network with plain attention, and the same with the fused one; float64, eval mode.

    In the largest only the attention's weights have gradients: the others' would take as long as
    all the rest, and the gradient of x, which comes by way of every layer, tells as much.
    """
    options["dtype"] = torch.float64
    module = PEERS[attention]
    plain = models.create(name, attention=attention, attention_module=module, **options)
    size = tuple(min(s, 112) for s in models.get(name).input_size)  # the larger take long
    calibrated(plain, run or (lambda model: model(images(name, 2, size))))
    fused = models.create(name, attention=attention, device="meta", **options)
    fused.load_state_dict(plain.state_dict(), strict=True, assign=True)
    if sum(p.numel() for p in plain.parameters()) > 3e7:
        for model in (plain, fused):
            for path, parameter in model.named_parameters():
                parameter.requires_grad_(".bam." in path)
    return plain, fused.eval()


def assert_same(plain: nn.Module, fused: nn.Module, x: Tensor, attention: str = "bam") -> None:
    """Forward and backward, the one on plain PyTorch, the other on the C++ kernels."""
    found = []
    weight = None
    for model, backend in ((plain, "reference"), (fused, "cpp")):
        leaf = x.clone().requires_grad_()
        with use_backend(backend):
            y = model(leaf)
            weight = torch.randn_like(y) if weight is None else weight
            (y * weight).sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert None not in grads.values()
        found.append({"y": y, "dx": leaf.grad})
        for part, inside in (("dattention", True), ("dothers", False)):
            those = [g.flatten() for name, g in grads.items() if (".bam." in name) is inside]
            if those:
                found[-1][part] = torch.cat(those)
        model.zero_grad()
    assert found[0].keys() == found[1].keys() >= {"y", "dx", "dattention"}
    for name, want in found[0].items():
        error = relative_error(found[1][name], want)
        bound = PARITY[torch.float64] if name == "y" else GRADIENTS[attention]
        assert error <= bound, f"{name}: relative error {error:.2e}, at most {bound:.0e}"


@needs_cpp
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_fused_network_is_the_plain_one(name):
    """The real network at its own input size, forward and backward."""
    plain, fused = twins(name, "bam")
    assert_same(plain, fused, images(name, 1))


@needs_cpp
@pytest.mark.parametrize(
    ("name", "attention"),
    (
        ("cifar_resnet50", "se"),
        ("cifar_preresnet110", "bam-c"),
        ("cifar_densenet100_bc", "se"),
        ("mobilenet_v2", "bam-c"),
        ("squeezenet1_1", "bam-c"),
        ("resnet18", "se"),
    ),
)
def test_fused_modules_in_every_block(name, attention):
    """Images that are not square as well, on networks that take them."""
    plain, fused = twins(name, attention)
    h, w = models.get(name).input_size
    assert_same(plain, fused, images(name, 2, (h - 3, w - 8)), attention)


ABLATIONS = (
    {"dilation": 1},
    {"reduction": 8},
    {"spatial": False},
    {"channel": False},
    {"combine": "product"},
    {"combine": "max"},
    {"combine": "sigmoid_sum"},
    {"residual": False},
    {"num_dilated": 3},
    {"preset": "official", "pool": "global"},
)


@needs_cpp
@pytest.mark.parametrize("options", ABLATIONS, ids=str)
def test_ablations_of_table_1(options):
    """Each option reaches every BAM, and the fused network stays the plain one."""
    name = "squeezenet1_1"
    size = (96, 128)
    plain, fused = twins(name, "bam", lambda model: model(images(name, 2, size)), **options)
    bams = [m for m in fused.modules() if isinstance(m, reference.BAM)]
    default = models.create(name, attention="bam", device="meta")
    for bam in bams:
        for option, value in options.items():
            if option != "preset":
                assert getattr(bam.config, option) == value
    assert [m.config for m in default.modules() if isinstance(m, reference.BAM)] != [
        bam.config for bam in bams
    ]
    assert_same(plain, fused, images(name, 1, size))


@needs_cpp
def test_super_resolution():
    plain, fused = twins("srresnet", "bam")
    assert plain(images("srresnet", 1, (9, 12))).shape == (1, 3, 36, 48)
    assert_same(plain, fused, images("srresnet", 1))


@needs_cpp
def test_segmentation(full_size):
    """On small images: ADE20K's size takes a minute."""
    name = "upernet_resnet50"
    size = models.get(name).input_size if full_size else (64, 96)
    plain, fused = twins(name, "bam", lambda model: model(images(name, 2, size)))
    assert plain(images(name, 1, size)).shape == (1, 150, *size)
    assert_same(plain, fused, images(name, 1, size))


class Cached(nn.Module):
    """In place of a detector's features: the maps that it put out once."""

    def __init__(self, maps: dict[str, Tensor]) -> None:
        super().__init__()
        self.maps = maps

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {key: x[:, :1].mean() + value for key, value in self.maps.items()}


@needs_cpp
@pytest.mark.parametrize("name", [n for n in DETECTORS if not n.startswith("faster")])
def test_bam_before_each_predictor(name):
    """From maps of the sizes that the features put out, to the predictors' logits and boxes.

    The features have no BAM, and VGG's take longer than all else: they run without numbers.
    """
    on_meta = models.create(name, device="meta").backbone.features(
        images(name, 2).float().to("meta")
    )
    sizes = [38, 19, 10, 5, 3, 1] if "vgg" in name else [19, 10, 5, 3, 2, 1]
    assert [y.shape[2:] for y in on_meta.values()] == [(size, size) for size in sizes]
    maps = {key: torch.randn(y.shape, dtype=torch.float64).relu() for key, y in on_meta.items()}
    plain = models.create(
        name, attention="bam", attention_module=reference.BAM, dtype=torch.float64
    )
    fused = models.create(name, attention="bam", dtype=torch.float64, device="meta")
    plain.backbone.features = fused.backbone.features = Cached(maps)

    class Predictions(nn.Module):
        def __init__(self, detector: nn.Module) -> None:
            super().__init__()
            self.backbone, self.head = detector.backbone, detector.head

        def forward(self, x: Tensor) -> Tensor:
            found = self.head(list(self.backbone(x).values()))
            return torch.cat([found["cls_logits"], found["bbox_regression"]], 2)

    plain, fused = Predictions(plain), Predictions(fused)
    calibrated(plain, lambda model: model(images(name, 2)))
    fused.load_state_dict(plain.state_dict(), strict=True, assign=True)
    assert_same(plain, fused.eval(), images(name, 2))


@needs_cpp
@pytest.mark.parametrize("name", ("fasterrcnn_resnet50_fpn", "ssd300_mobilenet"))
def test_detectors_learn_and_find(name, full_size):
    """Losses, their gradients, and boxes of whole detectors."""
    sizes = [models.get(name).input_size] * 2 if full_size else [(70, 90), (64, 80)]
    pictures = [torch.rand(3, *size, dtype=torch.float64) for size in sizes]
    targets = [
        {
            "boxes": torch.tensor([[5.0, 8.0, 40.0, 50.0], [20.0, 10.0, 60.0, 60.0]]).double(),
            "labels": torch.tensor([1, 2]),
        }
        for _ in pictures
    ]
    draws = torch.randint(2**31, ()).item()

    def losses(model: nn.Module) -> dict[str, Tensor]:
        torch.manual_seed(draws)  # Faster R-CNN learns from a sample of its proposals
        return model(pictures, targets)

    def smaller(model: nn.Module) -> None:
        if name.startswith("faster") and not full_size:
            model.transform.min_size = (96,)
            model.rpn._post_nms_top_n = {"training": 60, "testing": 30}
            model.roi_heads.fg_bg_sampler.batch_size_per_image = 40

    def run(model: nn.Module) -> None:
        smaller(model)
        losses(model)

    plain, fused = twins(name, "bam", run, num_classes=3)
    smaller(fused)
    found = []
    for model, backend in ((plain, "reference"), (fused, "cpp")):
        model.train()
        for part in model.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.eval()
        with use_backend(backend):
            each = losses(model)
            sum(each.values()).backward()
            with torch.no_grad():
                boxes = model.eval()(pictures)
        grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((torch.stack(list(each.values())), grads, boxes))
    assert relative_error(found[1][0], found[0][0]) <= 1e-11
    assert relative_error(found[1][1], found[0][1]) <= 1e-9
    for ours, want in zip(found[1][2], found[0][2], strict=True):
        assert len(want["boxes"]) > 0 and torch.equal(ours["labels"], want["labels"])
        torch.testing.assert_close(ours["boxes"], want["boxes"], rtol=0, atol=1e-6)
