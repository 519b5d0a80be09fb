"""What the examples share: arguments, photographs with shapes on them, and a training loop."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor, nn


class Parser(argparse.ArgumentParser):
    """A bad argument is one line on stderr and exit status 2."""

    def __init__(self, description: str, *, steps: int, batch: int, size: int) -> None:
        super().__init__(description=description)
        add = self.add_argument
        add("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: %(default)s)")
        add("--steps", type=int, default=steps, help="of training (default: %(default)s)")
        add("--batch", type=int, default=batch, metavar="N", help="images (default: %(default)s)")
        add("--size", type=int, default=size, metavar="PIXELS", help="sides (default: %(default)s)")
        add("--seed", type=int, default=0, help="of weights and data (default: %(default)s)")

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)

    def parse(self, *, least_size: int, least_batch: int = 2) -> argparse.Namespace:
        """The arguments, checked; seeds torch's generators."""
        args = self.parse_args()
        least = {"steps": 1, "batch": least_batch, "size": least_size}
        for name, value in least.items():
            if getattr(args, name) < value:
                self.error(f"--{name}: expected at least {value}, got {getattr(args, name)}")
        try:
            args.device = torch.device(args.device)
            torch.empty(1, device=args.device)
        except (RuntimeError, AssertionError, NotImplementedError) as problem:
            self.error(f"--device: {str(problem).splitlines()[0]}")
        if args.device.type == "meta":
            self.error("--device: expected one that computes, got meta")
        torch.manual_seed(args.seed)
        return args

    def need(self, *packages: str) -> None:
        """Say what to install where a package is missing."""
        for name in packages:
            try:
                importlib.import_module(name)
            except ImportError as problem:
                self.error(f"needs {name}: pip install 'bam_kernels[examples]' ({problem})")


def photographs() -> tuple[Tensor, Tensor]:
    """scikit-learn's two sample photographs, a temple and a flower: [3, 427, 640] in 0 to 1."""
    from sklearn.datasets import load_sample_images

    china, flower = load_sample_images().images
    to_tensor = [torch.tensor(photo).permute(2, 0, 1).float() / 255 for photo in (china, flower)]
    return to_tensor[0], to_tensor[1]


def more_photographs(*names: str) -> list[Tensor]:
    """scikit-image's photographs of these names: [3, H, W] in 0 to 1."""
    from skimage import data

    return [torch.tensor(getattr(data, n)()).permute(2, 0, 1).float() / 255 for n in names]


def crops(photo: Tensor, count: int, size: int) -> Tensor:
    """[count, 3, size, size] cut out anywhere, half of them mirrored."""
    h, w = photo.shape[1:]
    size_h, size_w = h - size + 1, w - size + 1
    found = []
    for _ in range(count):
        y, x = int(torch.randint(size_h, ())), int(torch.randint(size_w, ()))
        crop = photo[:, y : y + size, x : x + size]
        found.append(crop.flip(2) if torch.rand(()) < 0.5 else crop)
    return torch.stack(found)


def draw_shapes(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One rectangle or ellipse of one colour on each image, half seen through.

    Returns:
        The images; their masks [N, H, W], 0 where nothing was drawn, else 1 or 2 for the shape; and
        the boxes [N, 4] as x0, y0, x1, y1.
    """
    n, _, h, w = images.shape
    sizes = torch.randint(h // 5, h // 2, (n, 2))
    y0 = (torch.rand(n) * (h - sizes[:, 0])).long()
    x0 = (torch.rand(n) * (w - sizes[:, 1])).long()
    y1, x1 = y0 + sizes[:, 0], x0 + sizes[:, 1]
    y, x = torch.arange(h)[None, :, None] + 0.5, torch.arange(w)[None, None, :] + 0.5
    top, left, bottom, right = (t[:, None, None] for t in (y0, x0, y1, x1))
    dy = (2 * y - top - bottom) / (bottom - top)
    dx = (2 * x - left - right) / (right - left)
    kind = torch.randint(1, 3, (n, 1, 1))
    inside = torch.where(kind == 1, torch.maximum(dy.abs(), dx.abs()), (dy**2 + dx**2).sqrt()) < 1
    colour = torch.rand(n, 3, 1, 1)
    drawn = torch.where(inside[:, None], 0.4 * images + 0.6 * colour, images)
    return drawn, inside * kind, torch.stack([x0, y0, x1, y1], 1).float()


def train(
    model: nn.Module,
    steps: int,
    loss_of: Callable[[], Tensor],
    title: str,
    lr: float = 1e-3,
    decay: bool = False,
) -> float:
    """AdamW, the BAMs at ten times the learning rate of the rest; returns the last loss.

    With `decay` the rate falls to 0 along a cosine, and batch norms' running statistics settle.
    """
    from tqdm import trange

    bams = [p for name, p in model.named_parameters() if ".bam." in name]
    theirs = {id(p) for p in bams}
    rest = [p for p in model.parameters() if id(p) not in theirs]
    groups = [{"params": rest}] + ([{"params": bams, "lr": 10 * lr}] if bams else [])
    optimizer = torch.optim.AdamW(groups, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if decay else None
    model.train()
    value = float("nan")
    with trange(steps, desc=title, file=sys.stderr) as bar:
        for _ in bar:
            optimizer.zero_grad()
            loss = loss_of()
            loss.backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
            value = loss.item()
            bar.set_postfix(loss=f"{value:.3f}")
    return value
