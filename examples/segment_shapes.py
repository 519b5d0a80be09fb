"""A segmentation network with BAMs in its encoder finds shapes drawn on photographs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from _common import Parser, crops, draw_shapes, more_photographs, photographs, train
from _compare import add_options, compare
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
    add_options(parser)
    args = parser.parse(least_size=64)
    if args.size % 32 or args.size > 400:
        parser.error(f"--size: expected a multiple of 32 up to 384, got {args.size}")
    parser.need("segmentation_models_pytorch", "sklearn", "skimage", "PIL", "tqdm")
    import segmentation_models_pytorch as smp

    try:
        encoder = smp.encoders.get_encoder(args.encoder, weights=None)
        insert_bam(encoder, at="bottlenecks")  # of an encoder that is thrown away: does it take it?
    except (KeyError, ValueError, RuntimeError) as problem:
        parser.error(f"--encoder: {str(problem)[:200]}")
    china, flower = photographs()
    known = [china, *more_photographs("astronaut", "coffee")]
    held_out = [flower, *more_photographs("rocket")]

    def scenes(photos: list[Tensor], count: int) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(photos), (count,)).tolist()
        images = torch.cat([crops(photos[i], 1, args.size) for i in chosen])
        # Channels in any order, so that no colour tells a shape from a photograph.
        images = torch.stack([image[torch.randperm(3)] for image in images])
        images, masks, _ = draw_shapes(images)
        return images.to(args.device), masks.to(args.device)

    weight = torch.tensor([0.2, 1.0, 1.0], device=args.device)  # most of an image is background

    def run(bam: bool) -> float:
        model = smp.Unet(args.encoder, encoder_weights=None, classes=3)
        # What is drawn after this is the same with and without: making BAMs draws numbers too.
        state, keys = torch.get_rng_state(), set(model.state_dict())
        if bam:
            inserted = insert_bam(model.encoder, at="bottlenecks")
            assert keys < set(model.state_dict())  # a checkpoint of the plain network still fits
            print(f"BAMs: {', '.join(f'encoder.{path}' for path in inserted)}")
        torch.set_rng_state(state)
        model.to(args.device)

        def loss() -> Tensor:
            images, masks = scenes(known, args.batch)
            return F.cross_entropy(model(images), masks, weight)

        test = scenes(held_out, 8 * args.batch)
        print(f"overlap on other photographs, untrained: {overlap(model, *test):.3f}")
        last = train(model, args.steps, loss, "training", decay=True)
        figure = overlap(model, *test)
        print(f"last loss: {last:.3f}")
        print(f"overlap on other photographs, trained: {figure:.3f}")
        if bam:
            tell_attention(model, *test)
        return figure

    compare(args, "overlap", run)


def tell_attention(model: nn.Module, images: Tensor, masks: Tensor) -> None:
    """The mean of each BAM's map on the shapes, and beside them."""
    with torch.no_grad(), attention_maps(model) as maps:
        model(images)
    inside = (masks > 0).float()[:, None]
    for path, found in maps.items():
        m = found.spatial_map[:, None]
        here = F.interpolate(inside, m.shape[2:], mode="area")
        on, off = (m * here).sum() / here.sum(), (m * (1 - here)).sum() / (1 - here).sum()
        print(f"{path}: mean M on the shapes {on:.3f}, beside them {off:.3f}")


if __name__ == "__main__":
    main()
