"""Figures of the paper that no network as it describes them has, and why: not to be hit."""

from __future__ import annotations

PARAMS, GFLOPS = "params", "gflops"

_PLACES = "the text does not say where MobileNetV2's BAMs are"
_WIDTHS = "the text does not give StairNet's widths; those counted are ours"
_SQUEEZE = "SqueezeNet 1.1 has 0.349 at 224 x 224 by the count that gives the other rows"

REASONS: dict[tuple[str, str, str], str] = {
    ("1c", "ResNet50", PARAMS): "Tables 2, 3 and 10 print 23.71 for the same network",
    (
        "1c",
        "ResNet50 + ResBlock",
        PARAMS,
    ): "Table 1c prints 23.68 without the block, Tables 2, 3 and 10 23.71",
    ("1c", "WideResNet28 (w=8) + BAM", PARAMS): "Tables 2, 3 and 10 print 23.42 for the same one",
    ("1c", "ResNeXt 8x64d", PARAMS): "Tables 1a, 2 and 3 print 34.52 for the same network",
    ("4", "MobileNetV2 + BAM", PARAMS): _PLACES,
    ("4", "MobileNetV2 + BAM", GFLOPS): _PLACES,
    ("4", "SqueezeNet v1.1", GFLOPS): _SQUEEZE,
    ("4", "SqueezeNet v1.1 + BAM", GFLOPS): _SQUEEZE,
    ("7", "VGG16 StairNet", PARAMS): _WIDTHS,
    ("7", "VGG16 StairNet + BAM", PARAMS): _WIDTHS,
    ("7", "MobileNet StairNet", PARAMS): _WIDTHS,
    ("7", "MobileNet StairNet + BAM", PARAMS): _WIDTHS,
    ("10", "ResNeXt29 16x64d + SE", PARAMS): "an SE in each of its 9 blocks, with r = 16 and "
    "biases as in the table's other networks, adds 0.52; printed is 0.56",
}
"""By table, row and column. Each of these differs: one that is equal has no place here."""
