"""Train a small network with and without BAM, and draw the paper's analysis of both (Sec. 6).

The data are scikit-learn's handwritten digits painted in some colour somewhere on crops of
photographs: what is to be recognised is a small part of the image. Other digits and other
photographs are held out. Both networks see the same images in the same order.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from _common import Parser, crops
from torch import Tensor, nn

from bam_kernels import insert_bam

CHANNELS = (32, 64, 128, 256)  # of the stages: half of a ResNet-18's
PHOTOGRAPHS = {"train": ("astronaut", "coffee"), "held out": ("chelsea", "rocket")}


def photographs(part: str) -> list[Tensor]:
    """scikit-image's photographs, [3, H, W] in 0 to 1."""
    from skimage import data

    return [
        torch.tensor(getattr(data, name)()).permute(2, 0, 1).float() / 255
        for name in PHOTOGRAPHS[part]
    ]


def digits() -> dict[str, tuple[Tensor, Tensor]]:
    """scikit-learn's digits, [N, 8, 8] in 0 to 1, and labels [N], by part."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32) / 16
    labels = torch.tensor(data.target)
    return {"train": (images[:1297], labels[:1297]), "held out": (images[1297:], labels[1297:])}


class Scenes:
    """Digits on photographs, drawn at random: images [N, 3, S, S] in 0 to 1, labels [N]."""

    def __init__(self, part: str, size: int) -> None:
        self.photos, self.size = photographs(part), size
        self.images, self.labels = digits()[part]

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(self.labels), (count,))
        share = -(-count // len(self.photos))
        scenes = torch.cat([crops(photo, share, self.size) for photo in self.photos])
        scenes = scenes[torch.randperm(len(scenes))[:count]]
        for scene, digit in zip(scenes, self.images[chosen], strict=True):
            side = int(torch.randint(self.size * 5 // 12, self.size * 7 // 12, ()))
            y, x = (int(torch.randint(self.size - side + 1, ())) for _ in range(2))
            ink = F.interpolate(digit[None, None], (side, side), mode="bilinear")[0].clamp(0, 1)
            spot = scene[:, y : y + side, x : x + side]
            # Some colour, light on what is dark and dark on what is light.
            colour = 0.7 * (spot.mean((1, 2), keepdim=True) < 0.5) + 0.3 * torch.rand(3, 1, 1)
            spot += 0.95 * ink * (colour - spot)
        return scenes, self.labels[chosen]


def network(attention: bool, size: int) -> nn.Module:
    """timm's resnet10t, a block a stage, at half its width; BAMs behind the first three stages."""
    import timm

    model = timm.create_model("resnet10t", num_classes=10, channels=CHANNELS)
    if attention:
        insert_bam(model, at="bottlenecks", example_input=(1, 3, size, size))
    return model


def normalized(images: Tensor) -> Tensor:
    return ((images - 0.45) / 0.27).contiguous(memory_format=torch.channels_last)


def train(model: nn.Module, scenes: Scenes, steps: int, batch: int, title: str) -> None:
    """AdamW with a learning rate that rises and falls once."""
    from tqdm import trange

    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=steps, pct_start=0.15
    )
    model.train()
    with trange(steps, desc=title) as bar:
        for _ in bar:
            images, labels = scenes.draw(batch)
            with torch.autocast(device.type, torch.bfloat16):
                logits = model(normalized(images).to(device))
            loss = F.cross_entropy(logits.float(), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}")


@torch.inference_mode()
def predictions(model: nn.Module, images: Tensor) -> Tensor:
    """[N] classes."""
    device = next(model.parameters()).device
    parts = [model(normalized(part).to(device)).argmax(1).cpu() for part in images.split(100)]
    return torch.cat(parts)


def main() -> None:
    parser = Parser(__doc__, steps=1000, batch=64, size=96)
    parser.add_argument("--output", type=Path, default=Path("attention_output"), metavar="DIR",
        help="for pictures and checkpoints (default: %(default)s)")  # fmt: skip
    args = parser.parse(least_size=64)
    parser.need("timm", "sklearn", "skimage", "matplotlib", "tqdm")
    if not args.output.parent.is_dir():
        parser.error(f"--output: there is no folder {args.output.parent}")
    args.output.mkdir(exist_ok=True)

    networks = {}
    for name, attention in (("baseline", False), ("BAM", True)):
        torch.manual_seed(args.seed)
        model = network(attention, args.size)
        networks[name] = model.to(args.device, memory_format=torch.channels_last)
        torch.manual_seed(args.seed + 1)
        train(model, Scenes("train", args.size), args.steps, args.batch, name)
        model.eval()
        torch.save(model.state_dict(), args.output / f"{name}.pth")

    torch.manual_seed(args.seed + 2)
    images, labels = Scenes("held out", args.size).draw(20 * args.batch)
    for name, model in networks.items():
        right = (predictions(model, images) == labels).float().mean()
        print(f"{name}: accuracy on held-out digits and photographs {right:.3f}")


if __name__ == "__main__":
    main()
