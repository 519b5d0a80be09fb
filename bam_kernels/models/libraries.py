"""Networks of torchvision and segmentation_models_pytorch, as the paper has them.

DenseNet, MobileNetV2 and SqueezeNet 1.1 keep those libraries' keys and initialisation. The
libraries are imported when a network is built, and not before.
"""

from __future__ import annotations

from torch import nn

from bam_kernels.models.description import Description

_FIRES = (3, 4, 6, 7, 9, 10, 11, 12)


def densenet100_bc(num_classes: int, in_channels: int) -> nn.Module:
    """DenseNet-BC of 100 layers and growth rate 12 (Huang et al., CVPR 2017), for CIFAR.

    torchvision's, with 16 layers in each of three dense blocks, and CIFAR's stem: one 3x3
    convolution of stride 1, without norm and pooling.
    """
    from torchvision.models import DenseNet

    k = 12
    model = DenseNet(k, (16, 16, 16), num_init_features=2 * k, num_classes=num_classes)
    model.features.conv0 = nn.Conv2d(in_channels, 2 * k, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.features.conv0.weight)
    del model.features.norm0, model.features.relu0, model.features.pool0
    return model


def mobilenet_v2(num_classes: int, in_channels: int) -> nn.Module:
    """torchvision's MobileNetV2 (Sandler et al., CVPR 2018)."""
    from torchvision import models

    model = models.mobilenet_v2(num_classes=num_classes)
    if in_channels != 3:
        model.features[0][0] = nn.Conv2d(in_channels, 32, 3, 2, 1, bias=False)
        nn.init.kaiming_normal_(model.features[0][0].weight, mode="fan_out")
    return model


def squeezenet1_1(num_classes: int, in_channels: int) -> nn.Module:
    """torchvision's SqueezeNet 1.1 (Iandola et al., 2016)."""
    from torchvision import models

    model = models.squeezenet1_1(num_classes=num_classes)
    if in_channels != 3:
        model.features[0] = nn.Conv2d(in_channels, 64, 3, 2)
        nn.init.kaiming_uniform_(model.features[0].weight)
        nn.init.zeros_(model.features[0].bias)
    return model


def upernet_resnet50(num_classes: int, in_channels: int) -> nn.Module:
    """UPerNet (Xiao et al., ECCV 2018) on a ResNet-50 (Sec. 5.8): maps of logits, [N, K, H, W].

    segmentation_models_pytorch's, which strides in the 3x3 convolutions, as does the code that
    the paper trains.
    """
    from segmentation_models_pytorch import UPerNet

    model = UPerNet("resnet50", encoder_weights=None, classes=num_classes)
    if in_channels != 3:  # its own argument makes the convolution on the CPU, wherever the rest is
        model.encoder.conv1 = nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False)
        nn.init.kaiming_normal_(model.encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
    return model


DESCRIPTIONS = (
    Description(
        "cifar_densenet100_bc",
        "DenseNet100-BC (k=12)",
        "cifar100",
        (32, 32),
        100,
        densenet100_bc,
        # "Back and forth of the transition block" (Table 3): before it and behind its pooling.
        bottlenecks=({"at": "bottlenecks"}, {"after": ["features.transition?.pool"]}),
        # The paper has no such network. The k = 12 maps that a layer adds are too few for r = 16;
        # its inner 4 k are what is refined.
        blocks=({"after": ["features.denseblock?.*.relu2"]},),
        requires=("torchvision",),
    ),
    Description(
        "mobilenet_v2",
        "MobileNetV2",
        "imagenet",
        (224, 224),
        1000,
        mobilenet_v2,
        blocks=({"after": ["features.*.conv"]},),
        requires=("torchvision",),
    ),
    Description(
        "squeezenet1_1",
        "SqueezeNet v1.1",
        "imagenet",
        (224, 224),
        1000,
        squeezenet1_1,
        blocks=({"after": [f"features.{i}" for i in _FIRES]},),
        requires=("torchvision",),
    ),
    Description(
        "upernet_resnet50",
        "UperNet",
        "ade20k",
        (512, 512),
        150,
        upernet_resnet50,
        blocks=None,
        encoder="encoder",
        requires=("segmentation_models_pytorch",),
    ),
)
