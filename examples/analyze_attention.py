"""Train a small network with and without BAM, and draw the paper's analysis of both (Sec. 6).

The data are handwritten digits painted in some colour somewhere on crops of photographs. Other
digits and photographs are held out. Both networks see the same images in the same order.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from _common import Parser
from _scenes import Scenes
from torch import Tensor, nn

from bam_kernels import analysis, insert_bam

CHANNELS = (32, 64, 128, 256)  # of the stages: half of a ResNet-18's
DRAWN = 3  # scenes in the picture of the maps


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
            images, labels, _ = scenes.draw(batch)
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
    """The classes that a network takes images [N, 3, H, W] for, [N]."""
    device = next(model.parameters()).device
    model.eval()
    return torch.cat([model(normalized(x).to(device)).argmax(1).cpu() for x in images.split(100)])


def draw(networks: dict[str, nn.Module], size: int, count: int, folder: Path) -> None:
    """The paper's Fig. 4, 5 and 6 of `count` held-out scenes, and what they show in numbers."""
    images, labels, squares = Scenes("held out", size).draw(count)
    found = {name: predictions(model, images) for name, model in networks.items()}
    for name, classes in found.items():
        accuracy = (classes == labels).float().mean()
        print(f"{name}, accuracy on held-out digits and photographs: {accuracy:.3f}")
    told = f"resnet10t at half width, {count} held-out scenes"
    shape, bam, baseline = (1, 3, size, size), networks["BAM"], networks["baseline"]
    held_out = list(zip(normalized(images).split(100), labels.split(100), strict=True))

    selectivity = {
        name: analysis.class_selectivity(model, held_out, example_input=shape)
        for name, model in networks.items()
    }
    for name, each in selectivity.items():
        means = ", ".join(f"{stage} {each.alive(stage).mean():.3f}" for stage in each)
        print(f"{name}, mean class selectivity: {means}")
    analysis.draw_selectivity(selectivity, folder / "selectivity.png", subtitle=told)

    # As in the paper, maps are normalised by the training data, and what is drawn is what the
    # baseline takes for something else, where there is enough of it.
    scenes, _, _ = Scenes("train", size).draw(count)
    options = {"baseline": baseline, "example_input": shape}
    statistics = analysis.global_statistics(bam, normalized(scenes).split(100), **options)
    statistics.save(folder / "statistics.json")
    corrected = (found["BAM"] == labels) & (found["baseline"] != labels)
    chosen = torch.cat([corrected.nonzero(), (~corrected).nonzero()]).flatten()[:DRAWN].tolist()
    with analysis.running(bam, **options) as run:
        process = run(normalized(images[chosen]))
        some = run(normalized(images[:200]))
    photos = [(255 * images[i]).round().byte().permute(1, 2, 0).numpy() for i in chosen]
    stages = [[p.stage(name, k) for name, p in process.items()] for k in range(len(chosen))]
    took = {name: classes[chosen].tolist() for name, classes in found.items()}
    titles = [f"a {labels[i]}; baseline: {took['baseline'][k]}, BAM: {took['BAM'][k]}"
              for k, i in enumerate(chosen)]  # fmt: skip
    picture = folder / "maps.png"
    analysis.draw_process(photos, stages, statistics, picture, titles=titles, subtitle=told)
    for name, each in some.items():
        height, width = each.attention.shape[1:]
        inside = F.interpolate(squares[:200, None].float(), (height, width), mode="area")[:, 0]
        m = each.attention.cpu()
        on, beside = ((m * w).sum() / w.sum() for w in (inside, 1 - inside))
        print(f"{name}: mean M on the digits {on:.3f}, beside them {beside:.3f}")

    by_class = analysis.class_attention(bam, held_out)
    analysis.draw_class_attention(by_class, folder / "profiles.png", subtitle=told)
    print(f"pictures: {picture}, profiles.png, selectivity.png")


def main() -> None:
    parser = Parser(__doc__, steps=1000, batch=64, size=96)
    parser.add_argument("--output", type=Path, default=Path("attention_output"), metavar="DIR",
        help="for pictures and weights (default: %(default)s)")  # fmt: skip
    parser.add_argument("--load", action="store_true",
        help="take the weights that are in --output, and only draw")  # fmt: skip
    args = parser.parse(least_size=64)
    parser.need("timm", "sklearn", "skimage", "matplotlib", "tqdm")
    if not args.output.parent.is_dir():
        parser.error(f"--output: there is no folder {args.output.parent}")
    args.output.mkdir(exist_ok=True)

    networks = {}
    for name, attention in (("baseline", False), ("BAM", True)):
        torch.manual_seed(args.seed)
        model = network(attention, args.size).to(args.device, memory_format=torch.channels_last)
        path = args.output / f"{name}.pth"
        if args.load:
            if not path.is_file():
                parser.error(f"--load: there is no {path}")
            model.load_state_dict(torch.load(path, map_location=args.device))
        else:
            torch.manual_seed(args.seed + 1)
            train(model, Scenes("train", args.size), args.steps, args.batch, name)
            torch.save(model.state_dict(), path)
        networks[name] = model
    torch.manual_seed(args.seed + 2)
    draw(networks, args.size, 20 * args.batch, args.output)


if __name__ == "__main__":
    main()
