"""A Faster R-CNN of torchvision with BAMs in its backbone finds shapes drawn on photographs."""

from __future__ import annotations

import torch
from _common import Parser, crops, draw_shapes, photographs, train
from _compare import add_options, compare
from torch import Tensor, nn

from bam_kernels import insert_bam


def build(size: int, bam: bool) -> tuple[nn.Module, dict[str, nn.Module]]:
    """A small detector, and the BAMs in the body of its backbone, at the paper's places, if any."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    # From scratch, so that the batch norms are not frozen.
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
    )
    sizes = {"num_classes": 3, "min_size": size, "max_size": size, "box_detections_per_img": 5}
    proposals = dict.fromkeys(("pre_nms_top_n_train", "pre_nms_top_n_test"), 200)
    proposals |= dict.fromkeys(("post_nms_top_n_train", "post_nms_top_n_test"), 50)
    proposals = {f"rpn_{name}": count for name, count in proposals.items()}  # one shape an image
    model = FasterRCNN(backbone, **sizes, **proposals, box_batch_size_per_image=32)
    # What is drawn after this is the same with and without: making BAMs draws numbers too.
    state = torch.get_rng_state()
    inserted = insert_bam(backbone.body, at="bottlenecks") if bam else {}
    torch.set_rng_state(state)
    return model, inserted


def scenes(photo: Tensor, count: int, size: int, device: torch.device) -> tuple[list, list]:
    """Images, and for each its box and label, as torchvision's detectors take them."""
    images, masks, boxes = draw_shapes(crops(photo, count, size))
    labels = masks.flatten(1).amax(1)
    targets = [
        {"boxes": box[None].to(device), "labels": label[None].to(device)}
        for box, label in zip(boxes, labels, strict=True)
    ]
    return list(images.to(device)), targets


def mean_overlap(model: nn.Module, images: list, targets: list) -> float:
    """Of each image's most certain box with the true one: intersection over union."""
    from torchvision.ops import box_iou

    model.eval()
    with torch.no_grad():
        found = [model([image])[0] for image in images]
    overlaps = [
        box_iou(f["boxes"][:1], t["boxes"]).max().item() if len(f["boxes"]) else 0.0
        for f, t in zip(found, targets, strict=True)
    ]
    return sum(overlaps) / len(overlaps)


def main() -> None:
    parser = Parser(__doc__, steps=200, batch=4, size=64)
    add_options(parser)
    args = parser.parse(least_size=64)
    if args.size > 400:
        parser.error(f"--size: expected at most 400, the photographs' height, got {args.size}")
    parser.need("torchvision", "sklearn", "PIL", "tqdm")
    china, flower = photographs()

    def run(bam: bool) -> float:
        model, inserted = build(args.size, bam)
        model.to(args.device)
        test = scenes(flower, 8 * args.batch, args.size, args.device)

        def loss() -> Tensor:
            return sum(model(*scenes(china, args.batch, args.size, args.device)).values())

        if inserted:
            print(f"BAMs: {', '.join(f'backbone.body.{path}' for path in inserted)}")
        print(f"mean overlap on the other photograph, untrained: {mean_overlap(model, *test):.3f}")
        last = train(model, args.steps, loss, "training", lr=5e-4)
        figure = mean_overlap(model, *test)
        print(f"last loss: {last:.3f}")
        print(f"mean overlap on the other photograph, trained: {figure:.3f}")
        return figure

    compare(args, "mean overlap", run)


if __name__ == "__main__":
    main()
