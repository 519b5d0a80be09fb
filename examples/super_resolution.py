"""A small SRResNet with a BAM behind each residual block doubles the resolution of photographs.

It adds to a bicubic enlargement what that lacks, and is measured on a photograph of which it has
not seen a pixel.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from _common import Parser, crops, photographs, train
from _compare import add_options, compare
from torch import Tensor, nn

from bam_kernels import insert_bam


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut, [N, C, H, W] to the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(x)))


class SRResNet(nn.Module):
    """[N, 3, H, W] to [N, 3, 2H, 2W]."""

    def __init__(self, channels: int, blocks: int) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, channels, 3, padding=1)
        self.body = nn.Sequential(*(ResidualBlock(channels) for _ in range(blocks)))
        self.tail = nn.Conv2d(channels, 12, 3, padding=1)
        nn.init.zeros_(self.tail.weight), nn.init.zeros_(self.tail.bias)

    def forward(self, x: Tensor) -> Tensor:
        return enlarge(x) + F.pixel_shuffle(self.tail(self.body(F.relu(self.head(x)))), 2)


def enlarge(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bicubic", align_corners=False)


def shrink(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=0.5, mode="bicubic", align_corners=False, antialias=True)


def psnr(found: Tensor, truth: Tensor) -> float:
    """Peak signal-to-noise ratio in dB."""
    return (-10 * torch.log10((found.clamp(0, 1) - truth).square().mean())).item()


def main() -> None:
    parser = Parser(__doc__, steps=200, batch=8, size=48)
    parser.add_argument("--channels", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="a PNG of bicubic, network and truth"
    )
    add_options(parser)
    args = parser.parse(least_size=16)
    if args.size % 2 or args.size > 400:
        parser.error(f"--size: expected an even number up to 400, got {args.size}")
    if args.blocks < 1 or args.channels < 16:
        parser.error("--blocks, --channels: expected at least 1 and 16")
    if args.output is not None and not args.output.parent.is_dir():
        parser.error(f"--output: there is no folder {args.output.parent}")
    parser.need("sklearn", "PIL", "tqdm", *(["torchvision"] if args.output else []))
    china, flower = (photo[:, :426] for photo in photographs())
    truth = flower[None].to(args.device)
    small = shrink(truth)
    print(f"PSNR on the other photograph, bicubic: {psnr(enlarge(small), truth):.2f} dB")

    def run(bam: bool) -> float:
        model = SRResNet(args.channels, args.blocks)
        # Where the crops lie is the same with and without: making BAMs draws numbers too.
        state = torch.get_rng_state()
        if bam:
            # Nearly as the identity: a fresh BAM behind each block sets the training back at first.
            example = (1, 3, args.size, args.size)
            inserted = insert_bam(model, at="blocks", identity_start=True, example_input=example)
            print(f"BAMs: {', '.join(inserted)}")
        torch.set_rng_state(state)
        model.to(args.device)

        def loss() -> Tensor:
            sharp = crops(china, args.batch, args.size).to(args.device)
            return F.l1_loss(model(shrink(sharp)), sharp)

        last = train(model, args.steps, loss, "training")
        print(f"last loss: {last:.4f}")
        with torch.no_grad():
            found = model.eval()(small)
        figure = psnr(found, truth)
        print(f"PSNR on the other photograph, network: {figure:.2f} dB")
        if args.output is not None:
            from torchvision.utils import save_image

            save_image(torch.cat([enlarge(small), found, truth]).clamp(0, 1), args.output, nrow=3)
            print(f"picture: {args.output}")
        return figure

    compare(args, "PSNR in dB", run)


if __name__ == "__main__":
    main()
