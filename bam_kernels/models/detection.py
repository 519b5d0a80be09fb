"""Detectors on torchvision's Faster R-CNN and SSD, with the paper's encoders and BAMs.

They take lists of images [C, H, W] in 0..1 and put out what torchvision's do: losses in training,
boxes, labels and scores otherwise.
"""

from __future__ import annotations

import functools
from collections import OrderedDict

import torch
from torch import Tensor, nn

from bam_kernels.models import resnet
from bam_kernels.models.description import Description
from bam_kernels.models.layers import initialise
from bam_kernels.models.mobilenet_v1 import mobilenet_v1_features
from bam_kernels.models.stairnet import TopDown


def faster_rcnn(shape: resnet.Shape, num_classes: int, in_channels: int) -> nn.Module:
    """torchvision's Faster R-CNN (Ren et al., 2015) on a ResNet with a feature pyramid.

    The paper (Sec. 5.5) does not say which maps of its ResNet-101 it detects on. The encoder is a
    ResNet of `bam_kernels.models`, and ``backbone.body`` has its keys but ``fc``. Its batch norms
    learn; with a few images a GPU those of a trained encoder are better kept in eval mode.
    """
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import BackboneWithFPN

    encoder = resnet.ResNet(shape, num_classes, in_channels)
    layers = {f"layer{i + 1}": str(i) for i in range(4)}
    widths = [shape.outputs << i for i in range(4)]
    backbone = BackboneWithFPN(encoder, layers, widths, 256)
    return FasterRCNN(backbone, num_classes, **_normalisation(in_channels))


def _normalisation(in_channels: int) -> dict[str, list[float]]:
    """ImageNet's mean and standard deviation, which are torchvision's defaults; none elsewhere."""
    if in_channels == 3:
        return {}
    return {"image_mean": [0.0] * in_channels, "image_std": [1.0] * in_channels}


class Levels(nn.Module):
    """A detector's maps, from fine to coarse, each by way of a place for a BAM.

    Args:
        features: puts out the maps by name, in order.
        top_down: StairNet's way from coarse to fine, or None.
        widths: C of each map that comes out.

    Shapes: [N, in_channels, H, W] to a dictionary of maps [N, widths[i], H_i, W_i].
    """

    def __init__(self, features: nn.Module, top_down: nn.Module | None, widths: list[int]) -> None:
        super().__init__()
        self.features, self.top_down = features, top_down
        self.refine = nn.ModuleList(nn.Sequential() for _ in widths)  # where "bam" goes
        self.out_channels = widths

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        maps = list(self.features(x).values())
        if self.top_down is not None:
            maps = self.top_down(maps)
        refined = (refine(y) for refine, y in zip(self.refine, maps, strict=True))
        return OrderedDict((str(i), y) for i, y in enumerate(refined))


_ANCHORS = {
    "vgg16": {
        "aspect_ratios": [[2], [2, 3], [2, 3], [2, 3], [2], [2]],
        "scales": [0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05],
        "steps": [8, 16, 32, 64, 100, 300],
    },
    "mobilenet": {"aspect_ratios": [[2], [2, 3], [2, 3], [2, 3], [2, 3], [2, 3]]},
}
"""SSD300's boxes as torchvision has them, and those of its SSD on MobileNets, a map an entry."""


def ssd(backbone: str, stair: bool, num_classes: int, in_channels: int) -> nn.Module:
    """SSD300 (Liu et al., 2016) or, with `stair`, StairNet (Woo et al., 2018) on it.

    Args:
        backbone: "vgg16", torchvision's SSD300 with its 3x3 predictors; or "mobilenet", SSD on
            MobileNet v1 as it is known in Caffe, with 1x1 predictors. The paper does not describe
            the latter.
        stair: whether the maps pass `TopDown` first.
        num_classes: with the background.
        in_channels: of the images.
    """
    from torchvision.models import vgg
    from torchvision.models.detection import ssd as torchvision_ssd

    if backbone == "vgg16":
        layers = vgg.make_layers(vgg.cfgs["D"])
        if in_channels != 3:
            layers[0] = nn.Conv2d(in_channels, 64, 3, padding=1)
        initialise(layers)  # as VGG's own; not by way of a VGG, which has 120 million more
        features = torchvision_ssd.SSDFeatureExtractorVGG(layers, highres=False)
        widths, size = [512, 1024, 512, 256, 256, 256], 3
        normalisation = {"image_mean": [0.48235, 0.45882, 0.40784], "image_std": [1 / 255] * 3}
    else:
        features, widths = mobilenet_v1_features(in_channels)
        size, normalisation = 1, {}
    if in_channels != 3:
        normalisation = _normalisation(in_channels)
    top_down = None
    if stair:
        top_down = TopDown(widths, separable=backbone == "mobilenet")
        widths = [TopDown.WIDTH] * len(widths)
    levels = Levels(features, top_down, widths)
    with torch.device("cpu"):  # they are no buffers, and are made there in each forward
        anchors = torchvision_ssd.DefaultBoxGenerator(**_ANCHORS[backbone])
    head = torchvision_ssd.SSDHead(widths, anchors.num_anchors_per_location(), num_classes)
    if size == 1:
        for predictors in (head.classification_head, head.regression_head):
            for i, each in enumerate(predictors.module_list):
                predictors.module_list[i] = made = nn.Conv2d(each.in_channels, each.out_channels, 1)
                nn.init.xavier_uniform_(made.weight)
                nn.init.zeros_(made.bias)
    return torchvision_ssd.SSD(levels, anchors, (300, 300), num_classes, head=head, **normalisation)


def _describe_ssd(name: str, title: str, backbone: str, stair: bool) -> Description:
    return Description(
        name,
        title,
        "voc2007",
        (300, 300),
        21,  # with the background
        functools.partial(ssd, backbone, stair),
        # "Right before every classifier" (Sec. 5.6): each map that the predictors take.
        bottlenecks=({"after": ["refine.*"]},),
        blocks=None,
        encoder="backbone",
        requires=("torchvision",),
    )


def _describe_faster_rcnn(name: str, title: str, encoder: resnet.Shape) -> Description:
    return Description(
        name,
        title,
        "coco",
        (480, 640),  # torchvision scales the shorter side to 800
        91,  # torchvision's numbering, with the background
        functools.partial(faster_rcnn, encoder),
        encoder="backbone.body",
        requires=("torchvision",),
    )


DESCRIPTIONS = (
    _describe_faster_rcnn("fasterrcnn_resnet50_fpn", "Faster R-CNN, ResNet50", resnet.RESNET50),
    _describe_faster_rcnn("fasterrcnn_resnet101_fpn", "Faster R-CNN, ResNet101", resnet.RESNET101),
    _describe_ssd("ssd300_vgg16", "VGG16 SSD", "vgg16", stair=False),
    _describe_ssd("ssd300_mobilenet", "MobileNet SSD", "mobilenet", stair=False),
    _describe_ssd("stairnet300_vgg16", "VGG16 StairNet", "vgg16", stair=True),
    _describe_ssd("stairnet300_mobilenet", "MobileNet StairNet", "mobilenet", stair=True),
)
