"""Give a trained network BAMs and train it on, beside the same network without them.

The network is first trained on handwritten digits, as a stand-in for a checkpoint; BAMs are then
inserted at the paper's places so that its outputs hardly change, and both networks are trained on.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from _common import Parser, train
from torch import Tensor, nn

from bam_kernels import insert_bam


def digits(size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's 1797 digits, enlarged to [N, 3, size, size]: train and test images, labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, (size, size), mode="bilinear").expand(-1, 3, -1, -1)
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels))
    images, labels = images[order], labels[order]
    return images[:1297], labels[:1297], images[1297:], labels[1297:]


def build(parser: Parser, name: str) -> nn.Module:
    """A network of torchvision or timm by name, with 10 classes."""
    source, _, model = name.partition(":")
    if source not in ("torchvision", "timm") or not model:
        parser.error(f"--network: expected torchvision:NAME or timm:NAME, got {name}")
    parser.need(source)
    try:
        if source == "timm":
            import timm

            return timm.create_model(model, num_classes=10)
        from torchvision.models import get_model

        return get_model(model, num_classes=10)
    except (RuntimeError, ValueError, TypeError) as problem:
        parser.error(f"--network: {problem}")


def main() -> None:
    parser = Parser(__doc__, steps=60, batch=32, size=32)
    parser.add_argument(
        "--network",
        default="torchvision:resnet18",
        help="torchvision:NAME or timm:NAME (default: %(default)s)",
    )
    parser.add_argument(
        "--at",
        default="bottlenecks",
        choices=("bottlenecks", "blocks"),
        help="where BAMs go (default: %(default)s)",
    )
    parser.add_argument("--reduction", type=int, default=16, help="r (default: %(default)s)")
    args = parser.parse(least_size=32)
    parser.need("sklearn", "tqdm")
    plain = build(parser, args.network).to(args.device)
    images, labels, test_images, test_labels = (t.to(args.device) for t in digits(args.size))

    def batch_loss(model: nn.Module):
        def loss() -> Tensor:
            chosen = torch.randint(len(labels), (args.batch,), device=args.device)
            return F.cross_entropy(model(images[chosen]), labels[chosen])

        return loss

    def outputs(model: nn.Module) -> Tensor:
        model.eval()
        with torch.no_grad():
            return torch.cat([model(part) for part in test_images.split(100)])

    def accuracy(model: nn.Module) -> str:
        return f"{(outputs(model).argmax(1) == test_labels).float().mean().item():.3f}"

    with_bam = copy.deepcopy(plain)
    try:  # on a copy first: a bad option should not cost a training
        insert_bam(with_bam, at=args.at, reduction=args.reduction)
    except ValueError as problem:
        parser.error(str(problem))

    train(plain, args.steps, batch_loss(plain), "before")
    with_bam = copy.deepcopy(plain)
    inserted = insert_bam(with_bam, at=args.at, reduction=args.reduction, identity_start=True)
    before = outputs(plain)
    jump = ((outputs(with_bam) - before).norm() / before.norm()).item()
    print(f"BAMs: {', '.join(inserted)}")
    print(f"jump of the outputs by inserting them: {jump:.4f}")
    print(f"test accuracy before: {accuracy(plain)}, with BAMs: {accuracy(with_bam)}")
    train(plain, args.steps, batch_loss(plain), "on without", lr=5e-4)
    train(with_bam, args.steps, batch_loss(with_bam), "on with BAMs", lr=5e-4)
    print(f"test accuracy after: {accuracy(plain)}, with BAMs: {accuracy(with_bam)}")


if __name__ == "__main__":
    main()
