"""A segmentation network with BAMs in its encoder finds shapes drawn on photographs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from _common import Parser, crops, draw_shapes, photographs, train
from torch import Tensor, nn

from bam_kernels import attention_maps, insert_bam


def overlap(model: nn.Module, images: Tensor, masks: Tensor) -> float:
    """Intersection over union of what is no background, over all images."""
    model.eval()
    with torch.no_grad():
        found = model(images).argmax(1)
    right = (found == masks) & (masks > 0)
    return (right.sum() / ((found > 0) | (masks > 0)).sum()).item()


def main() -> None:
    parser = Parser(__doc__, steps=200, batch=8, size=64)
    parser.add_argument(
        "--encoder", default="resnet18", help="of segmentation_models_pytorch (default: resnet18)"
    )
    args = parser.parse(least_size=64)
    if args.size % 32 or args.size > 400:
        parser.error(f"--size: expected a multiple of 32 up to 384, got {args.size}")
    parser.need("segmentation_models_pytorch", "sklearn", "PIL", "tqdm")
    import segmentation_models_pytorch as smp

    try:
        model = smp.Unet(args.encoder, encoder_weights=None, classes=3)
    except (KeyError, ValueError, RuntimeError) as problem:
        parser.error(f"--encoder: {str(problem)[:200]}")
    keys = set(model.state_dict())
    try:
        inserted = insert_bam(model.encoder, at="bottlenecks")
    except ValueError as problem:
        parser.error(f"--encoder: {problem}")
    assert keys < set(model.state_dict())  # a checkpoint of the plain network still fits
    model.to(args.device)
    china, flower = photographs()

    def scenes(photo: Tensor, count: int) -> tuple[Tensor, Tensor]:
        images, masks, _ = draw_shapes(crops(photo, count, args.size))
        return images.to(args.device), masks.to(args.device)

    weight = torch.tensor([0.2, 1.0, 1.0], device=args.device)  # most of an image is background

    def loss() -> Tensor:
        images, masks = scenes(china, args.batch)
        return F.cross_entropy(model(images), masks, weight)

    test = scenes(flower, 4 * args.batch)
    print(f"BAMs: {', '.join(f'encoder.{path}' for path in inserted)}")
    print(f"overlap on the other photograph, untrained: {overlap(model, *test):.3f}")
    last = train(model, args.steps, loss, "training")
    print(f"last loss: {last:.3f}")
    print(f"overlap on the other photograph, trained: {overlap(model, *test):.3f}")
    with torch.no_grad(), attention_maps(model) as maps:
        model.eval()(test[0])
    inside = (test[1] > 0).float()[:, None]
    for path, found in maps.items():
        m = found.spatial_map[:, None]
        here = F.interpolate(inside, m.shape[2:], mode="area")
        on, off = (m * here).sum() / here.sum(), (m * (1 - here)).sum() / (1 - here).sum()
        print(f"{path}: mean M on the shapes {on:.3f}, beside them {off:.3f}")


if __name__ == "__main__":
    main()
