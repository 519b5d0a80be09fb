"""The recipes, their data, the order of it, and what train and evaluate say and write."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import pickle
from pathlib import Path

import pytest
import recipe_toys
import torch
from tolerances import relative_error
from torch.utils.data import TensorDataset

from bam_kernels import cli, use_backend
from bam_kernels.recipes import RECIPES, RecipeError, checkpoint, data, order
from bam_kernels.recipes.recipe import Recipe

for package in ("torchvision", "sklearn", "skimage", "PIL", "tqdm"):
    pytest.importorskip(package, reason="pip install '.[train]'")


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    """The toy recipe, for the time of a test; on plain PyTorch, not Triton's interpreter."""
    from bam_kernels.recipes import networks

    monkeypatch.setattr(data, "DATASETS", dict(data.DATASETS))
    monkeypatch.setattr(networks, "SMALL", dict(networks.SMALL))
    monkeypatch.setitem(RECIPES, "toy", None)  # imported by name in many places: put back
    recipe_toys.register()
    with use_backend("reference"):
        yield


def rows(folder: Path) -> list[dict[str, float]]:
    found = csv.DictReader((folder / "metrics.csv").read_text().splitlines())
    return [{key: float(value) for key, value in row.items()} for row in found]


def run(*words: object, status: int = 0) -> None:
    assert cli.main([str(word) for word in words]) == status


def toy(out: Path, *words: object, status: int = 0) -> None:
    run("train", "--recipe=toy", "--device=cpu", f"--out={out}", *words, status=status)


# --- recipes ----------------------------------------------------------------------------------


def test_every_value_has_a_source(capsys):
    for name, recipe in RECIPES.items():
        assert recipe.name == name and recipe.dataset in data.DATASETS
        assert recipe.record().keys() - {"name"} == recipe.sources.keys()
        assert json.loads(json.dumps(recipe.record())) == recipe.record()
    run("train", "--recipe=cifar100", "--show")
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "150, 225" in out and "Sec. 5.1" in out and "not in the paper" in out


def test_values_are_changed_and_marked_as_given():
    recipe = RECIPES["cifar100"].changed(epochs=10, lr=0.2, batch=128)
    assert (recipe.epochs, recipe.milestones, recipe.lr) == (10, (5, 8), 0.2)
    assert recipe.sources["lr"] == recipe.sources["milestones"] == "given"
    assert recipe.sources["batch"] == RECIPES["cifar100"].sources["batch"]
    assert RECIPES["cifar100"].changed(epochs=1).milestones == ()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "epochs: expected a whole number of at least 1, got 0"),
        ({"batch": 2.5}, "batch: expected a whole number"),
        ({"lr": float("nan")}, "lr: expected a number above 0, got nan"),
        ({"weight_decay": -1.0}, "weight_decay: expected a number of at least 0"),
        ({"milestones": (30, 20)}, "milestones: expected rising epochs"),
        ({"epochs": 20, "milestones": (20,)}, "below epochs=20"),
    ],
)
def test_values_out_of_range(values, message):
    with pytest.raises(RecipeError, match=message):
        RECIPES["digits"].changed(**values)


# --- the order of the images ------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_share_each_batch(world, seed):
    shares = [order.EpochBatches(50, 12, seed, rank, world) for rank in range(world)]
    orders = []
    for epoch in (0, 1):
        for share in shares:
            share.epoch = epoch
        steps = list(zip(*shares, strict=True))
        assert len(steps) == len(shares[0]) == 4
        assert all(len(keys) == 12 // world for step in steps for keys in step)
        whole = order.EpochBatches(50, 12, seed)
        whole.epoch = epoch
        for step, batch in zip(steps, whole, strict=True):
            assert sorted(itertools.chain(*step)) == sorted(batch)
        indices = [key[1] for batch in whole for key in batch]
        assert {key[0] for batch in whole for key in batch} == {epoch}
        assert len(set(indices)) == 48
        orders.append(indices)
    assert orders[0] != orders[1]


def test_augmentation_goes_by_seed_epoch_and_image_alone(seed):
    """Not by workers, nor by what was drawn before; and reading leaves the generator as it was."""

    def epochs(seed: int, workers: int) -> list[torch.Tensor]:
        toys = recipe_toys.toy_data().train
        loader, batches = order.train_loader(
            toys, 12, seed, rank=0, world=1, workers=workers, pin=False
        )
        found = []
        for batches.epoch in (0, 1):
            found.append(torch.cat([images for images, _ in loader]))
        return found

    dataset = order.Seeded(recipe_toys.toy_data().train, seed)
    before = torch.get_rng_state()
    first = dataset[3, 5][0]
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(dataset[3, 5][0], first)
    assert not torch.equal(dataset[4, 5][0], first)
    alone, others = epochs(seed, 0), epochs(seed, 2)
    for a, b in zip(alone, others, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(alone[0], epochs(seed + 1, 0)[0])


def test_evaluation_reads_each_image_once(seed):
    images = torch.randn(23, 1, 4, 4)
    dataset = TensorDataset(images, torch.arange(23))
    found = [
        target
        for rank in range(3)
        for _, targets in order.evaluation_loader(
            dataset, 4, rank=rank, world=3, workers=0, pin=False
        )
        for target in targets.tolist()
    ]
    assert sorted(found) == list(range(23))


@pytest.mark.parametrize(
    ("batch", "world", "message"),
    [
        (9, 2, "--batch: expected a multiple of the 2 processes, got 9"),
        (3, 3, "--batch: expected at least 2 images a process, got 1"),
        (40, 1, "--batch: expected at most the 30 images of the training set, got 40"),
    ],
)
def test_batches_that_cannot_be_shared(batch, world, message):
    with pytest.raises(RecipeError, match=message):
        order.EpochBatches(30, batch, 0, 0, world)


# --- data -------------------------------------------------------------------------------------


def write_cifar(folder: Path, monkeypatch, images: int = 8) -> None:
    """Files as CIFAR-100's, of random images; torchvision is told their checksums."""
    from torchvision.datasets import CIFAR100
    from torchvision.datasets.utils import calculate_md5

    base = folder / "cifar-100-python"
    base.mkdir(parents=True)
    pixels = torch.randint(256, (images, 3072), dtype=torch.uint8).numpy()
    content = {"data": pixels, "fine_labels": torch.randint(100, (images,)).tolist()}
    for name in ("train", "test"):
        (base / name).write_bytes(pickle.dumps(content))
    meta = {"fine_label_names": [f"class {k}" for k in range(100)]}
    (base / "meta").write_bytes(pickle.dumps(meta))
    sums = {name: calculate_md5(base / name) for name in ("train", "test", "meta")}
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": sums["meta"]})


def write_imagenet(folder: Path, images: int = 3) -> None:
    """Two classes of noise, of unequal height and width."""
    from torchvision.utils import save_image

    for part, name in itertools.product(("train", "val"), ("n01", "n02")):
        (folder / part / name).mkdir(parents=True)
        for k in range(images):
            save_image(torch.rand(3, 250 + 20 * k, 300), folder / part / name / f"{k}.jpg")


def test_cifar100_is_cropped_flipped_and_normalised(seed, tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch)
    found = data.load("cifar100", tmp_path)
    assert (found.num_classes, found.in_channels, len(found.train), len(found.test)) == (
        100, 3, 8, 8,
    )  # fmt: skip
    mean, deviation = (torch.tensor(t)[:, None, None] for t in data.CIFAR_STATISTICS)
    pixels = torch.tensor(found.test.data[2]).permute(2, 0, 1) / 255
    assert relative_error(found.test[2][0], (pixels - mean) / deviation) < 1e-6
    padded = torch.zeros(3, 40, 40)
    padded[:, 4:36, 4:36] = pixels
    padded = (padded - mean) / deviation
    seen = set()
    for _ in range(40):
        crop = found.train[2][0]
        places = [
            (y, x, flipped)
            for y, x, flipped in itertools.product(range(9), range(9), (False, True))
            if torch.allclose(
                crop.flip(2) if flipped else crop, padded[:, y : y + 32, x : x + 32], atol=1e-5
            )
        ]
        assert len(places) == 1
        seen.add(places[0])
    assert {flipped for _, _, flipped in seen} == {False, True} and len(seen) > 10


def test_textures_are_standardised_and_share_no_pixel(seed):
    from bam_kernels.recipes import textures

    found = data.load("textures", None)
    assert found.num_classes == len(textures.CLASSES) == 17
    flat = []
    for part, per_class in ((found.train, 96), (found.test, 48)):
        assert len(part) == 17 * per_class
        flat.append(0)
        for k in range(len(part)):
            patch, target = part[k]
            assert patch.shape == (1, 24, 24) and target == k // per_class
            assert abs(patch.mean()) < 1e-4
            if patch.std() < 1 - 1e-4:  # at the floor: the steps of the pixels' 255 tell
                flat[-1] += 1
                steps = (patch - patch.min()) * (textures.LEAST_DEVIATION * 255)
                assert (steps - steps.round()).abs().max() < 1e-2
            else:
                assert abs(patch.std() - 1) < 1e-4
    assert 0.1 < flat[0] / len(found.train) < 0.3 and 140 <= flat[1] <= 160
    patches = [found.test[k][0] for k in range(len(found.test))]
    assert all(torch.equal(patches[k], found.test[k][0]) for k in range(0, 800, 50))
    assert len({patch.numpy().tobytes() for patch in patches}) == len(patches) == 17 * 48
    photo = torch.arange(3 * 64 * 5 * 64, dtype=torch.float32).reshape(1, 3 * 64, 5 * 64)
    dark, light = (set(textures._tiles(photo, colour).flatten().tolist()) for colour in (0, 1))
    assert not dark & light and len(dark | light) == photo.numel()


PHOTOGRAPHS = {
    "astronaut": (512, 512, 115.40, 75.12, "f98a00b3351f8ba2"),
    "brick": (512, 512, 111.46, 26.05, "664a145c5253f0d6"),
    "camera": (512, 512, 129.06, 73.64, "5cb24482a53416f9"),
    "cell": (512, 512, 68.15, 27.82, "9df644d089f5aabb"),
    "chelsea": (300, 451, 119.48, 32.12, "cd822d0a5b86379f"),
    "coffee": (400, 512, 100.82, 59.21, "7728c27f1c740209"),
    "coins": (303, 384, 96.86, 52.88, "e080cc03805f1fa7"),
    "grass": (512, 512, 118.22, 38.59, "b18dae4c68bf850a"),
    "gravel": (512, 512, 126.55, 38.72, "3d51ad45f789cd8b"),
    "hubble_deep_field": (512, 512, 19.41, 26.68, ""),
    "ihc": (512, 512, 163.21, 47.30, "fd48ca0459de8527"),
    "moon": (512, 512, 112.17, 13.33, "a20362266d5b0102"),
    "motorcycle_left": (500, 512, 116.62, 58.58, "62622e79e7ef6238"),
    "retina": (512, 512, 124.09, 10.94, ""),
    "rocket": (427, 512, 64.86, 30.78, ""),
    "china": (427, 512, 146.20, 82.48, ""),
    "flower": (427, 512, 71.22, 57.26, ""),
}  # fmt: skip
"""By name the size, mean and standard deviation in grey levels, and the start of a PNG's SHA-256,
as scikit-image 0.22 to 0.26 and scikit-learn 1.9 ship them and Pillow 10 to 13 reads them."""


def test_textures_are_of_the_photographs_that_were_studied():
    """benchmarks/results/study-textures.json rests on them; another version may ship others."""
    from bam_kernels.recipes import textures

    photos = dict(zip(textures.CLASSES, textures._photographs(), strict=True))
    assert list(photos) == list(PHOTOGRAPHS)
    for name, photo in photos.items():
        height, width, mean, deviation, digest = PHOTOGRAPHS[name]
        levels = (photo * 255).double()
        assert photo.shape == (1, height, width), name
        assert abs(levels.mean() - mean) < 0.1 and abs(levels.std() - deviation) < 0.1, name
        assert (levels - levels.round()).abs().max() < 1e-4
        if f"{name}.png" in textures.SKIMAGE:  # a JPEG's decoder is free to round as it likes
            pixels = levels.round().to(torch.uint8).numpy().tobytes()
            assert hashlib.sha256(pixels).hexdigest().startswith(digest), name


# --- train and evaluate -----------------------------------------------------------------------


def test_train_and_evaluate_agree(seed, tmp_path, capsys):
    toy(tmp_path, "--attention=bam", "--reduction=4", f"--seed={seed}", "--tensorboard")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint.pth", "metrics.csv", "settings.json", "tensorboard", "timing.csv",
    ]  # fmt: skip
    found = rows(tmp_path)
    assert [row["epoch"] for row in found] == [1, 2, 3, 4]
    assert [row["lr"] for row in found] == pytest.approx([0.05, 0.05, 0.005, 0.005])
    assert found[-1]["train_loss"] < found[0]["train_loss"]
    capsys.readouterr()
    run("evaluate", tmp_path, "--device=cpu", "--batch=7")
    out = capsys.readouterr().out
    assert "toy_resnet, attention bam, epoch 4, 30 test images of toy" in out
    assert f"loss: {found[-1]['test_loss']:.4f}" in out
    assert f"top-1 error: {found[-1]['test_top1_error']:.2f} %" in out
    assert f"top-5 error: {found[-1]['test_top5_error']:.2f} %" in out


def test_the_seed_decides(seed, tmp_path):
    for name, number in (("a", seed), ("b", seed), ("c", seed + 1)):
        toy(tmp_path / name, "--epochs=1", f"--seed={number}")
    texts = [(tmp_path / name / "metrics.csv").read_text() for name in "abc"]
    assert texts[0] == texts[1] != texts[2]


def test_tensorboard_has_each_epoch_once(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    toy(tmp_path, "--epochs=3", "--tensorboard")
    found = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = found.Scalars("test_loss")
    assert [each.step for each in scalars] == [1, 2, 3]
    values = [row["test_loss"] for row in rows(tmp_path)]
    assert [each.value for each in scalars] == pytest.approx(values, rel=1e-6)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_amp(amp, seed, tmp_path):
    """Near float32, not equal to it; weights stay float32."""
    words = ["--attention=bam", "--reduction=4", f"--seed={seed}", "--epochs=1", "--batch=36"]
    toy(tmp_path / "float", *words)
    toy(tmp_path / "amp", f"--amp={amp}", *words)
    full, half = rows(tmp_path / "float")[0]["train_loss"], rows(tmp_path / "amp")[0]["train_loss"]
    assert full != half and half == pytest.approx(full, rel=0.05)
    content = checkpoint.load(tmp_path / "amp" / "checkpoint.pth")
    assert all(v.dtype in (torch.float32, torch.int64) for v in content["model"].values())
    assert bool(content["scaler"]) == (amp == "fp16")


def test_a_scaler_is_resumed(seed, tmp_path, monkeypatch):
    """Stopped between checkpoint and metrics.csv."""
    from bam_kernels.recipes.folder import RunFolder

    words = ["--model=toy_conv", "--amp=fp16", f"--seed={seed}", "--epochs=2"]
    toy(tmp_path / "whole", *words)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "write_metrics", stop)
        toy(tmp_path / "broken", *words, status=130)
    assert not (tmp_path / "broken/metrics.csv").exists()
    toy(tmp_path / "broken", *words, "--resume")
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")
    ours, theirs = (checkpoint.load(tmp_path / x / "checkpoint.pth") for x in ("broken", "whole"))
    assert ours["scaler"] == theirs["scaler"] and ours["scaler"]["scale"] > 0
    for key, value in theirs["model"].items():
        assert torch.equal(ours["model"][key], value), key


def test_a_whole_run_is_resumed_without_a_step_and_extended_by_none(tmp_path):
    toy(tmp_path, "--epochs=2")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    toy(tmp_path, "--epochs=2", "--resume")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_imagenet_trains(seed, tmp_path, capsys):
    """A step of ResNet-18 with BAM at 224x224, and its evaluation."""
    write_imagenet(tmp_path / "data")
    words = ["--recipe=imagenet", f"--data={tmp_path / 'data'}", "--model=resnet18", "--epochs=1"]
    words += ["--attention=bam", "--batch=4", "--device=cpu", f"--out={tmp_path / 'run'}"]
    run("train", *words, "--workers=1", "--channels-last")
    (row,) = rows(tmp_path / "run")
    assert 0 < row["train_loss"] < 5 and row["test_top5_error"] == 0
    capsys.readouterr()
    run("evaluate", tmp_path / "run", f"--data={tmp_path / 'data'}", "--device=cpu", "--batch=3")
    assert f"top-1 error: {row['test_top1_error']:.2f} %" in capsys.readouterr().out


def test_cifar100_trains(seed, tmp_path, monkeypatch):
    write_cifar(tmp_path / "data", monkeypatch)
    words = ["--recipe=cifar100", f"--data={tmp_path / 'data'}", "--model=small_resnet"]
    run("train", *words, "--epochs=1", "--batch=4", "--device=cpu", f"--out={tmp_path / 'run'}")
    assert rows(tmp_path / "run")[0]["train_loss"] > 1


def test_recipe_is_checked_when_it_is_made():
    with pytest.raises(RecipeError, match="lr: expected a number above 0, got 0"):
        Recipe(**{**RECIPES["digits"].record(), "lr": 0.0}, sources={})
