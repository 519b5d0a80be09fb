"""The class-selectivity index against sums written out in float64, however the batches are cut."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from bam_kernels import BAM, insert_bam, use_backend
from bam_kernels.analysis import (
    Selectivity,
    class_selectivity,
    draw_selectivity,
    selectivity_index,
    stage_layers,
)


@pytest.fixture(autouse=True)
def seeded(seed: int):
    """Every test here draws its inputs from a fresh seed; the kernels are not what is tested."""
    with use_backend("reference"):
        yield


def block(c_in: int, c_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, 3, stride, 1), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)
    )


class Net(nn.Module):
    """Three stages, no shortcuts, so that a unit can be dead."""

    def __init__(self, widths: tuple[int, int, int] = (16, 24, 32), linear: bool = False) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(block(3, widths[0]), block(widths[0], widths[0]))
        self.stage2 = nn.Sequential(block(widths[0], widths[1], 2), block(widths[1], widths[1]))
        self.stage3 = nn.Sequential(block(widths[1], widths[2], 2), block(widths[2], widths[2]))
        if linear:
            self.stage2[1][2] = nn.Identity()
        self.head = nn.Linear(widths[2], 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.head(x.mean(dim=(2, 3)))


def randomized(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.weight.uniform_(0.5, 1.5)
                part.bias.normal_(std=0.3)
                part.running_mean.normal_(std=0.2)
                part.running_var.uniform_(0.5, 2.0)
    return model


def cut(x: Tensor, y: Tensor, sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def by_hand(features: Tensor, labels: Tensor) -> list[float]:
    """The index of each channel, in plain Python floats."""
    found = []
    for c in range(features.shape[1]):
        means = []
        for k in sorted(set(labels.tolist())):
            mine = [i for i, label in enumerate(labels.tolist()) if label == k]
            total = math.fsum(max(v, 0.0) for i in mine for v in features[i, c].flatten().tolist())
            means.append(total / (len(mine) * features[0, c].numel()))
        most = max(means)
        rest = (math.fsum(means) - most) / (len(means) - 1)
        found.append((most - rest) / (most + rest) if most + rest > 0 else math.nan)
    return found


def stage_features(model: Net, x: Tensor) -> dict[str, Tensor]:
    """Composed here, without hooks: BAMs stand last in their stages."""
    model.eval()
    with torch.no_grad():
        found = {"": x}
        for name in ("stage1", "stage2", "stage3"):
            found[name] = getattr(model, name)(list(found.values())[-1])
    del found[""]
    return found


@pytest.mark.parametrize("with_bam", [False, True])
def test_equals_sums_written_out(with_bam):
    """Uneven batches, uneven and missing classes, a dead unit, H != W."""
    model = randomized(Net()).double()
    if with_bam:
        bams = insert_bam(model, at="bottlenecks", example_input=(1, 3, 24, 40))
        randomized(nn.ModuleList(bams.values()))
    with torch.no_grad():
        dead = model.stage2[1][1]
        dead.weight[5], dead.bias[5] = 0.0, -1.0
    x = torch.randn(19, 3, 24, 40, dtype=torch.float64)
    y = torch.tensor([0, 1, 1, 4, 0, 5, 4, 1, 1, 1, 0, 5, 5, 4, 1, 0, 4, 4, 5])  # none of 2 and 3
    found = class_selectivity(model, cut(x, y, [7, 1, 9, 2]), example_input=(1, 3, 24, 40))
    assert list(found) == ["stage1", "stage2", "stage3"]
    assert found.counts.tolist() == [4, 6, 0, 0, 5, 4]
    for name, features in stage_features(model, x).items():
        expected = torch.tensor(by_hand(features, y), dtype=torch.float64)
        assert found[name].isnan().tolist() == expected.isnan().tolist()
        assert found[name].isnan().sum() == found.record()["stages"][name]["dead"]
        alive = ~expected.isnan()
        error = (found[name] - expected)[alive].norm() / expected[alive].norm()
        assert error < 1e-12
        assert found.class_means[name].isnan().any(dim=1).tolist() == [0, 0, 1, 1, 0, 0]
    assert bool(found["stage2"][5].isnan()) and len(found.alive("stage2")) < 24


def test_batches_make_no_difference_to_float32_features():
    """The network rounds in float32, by batch; the sums add nothing to that."""
    model = randomized(Net())
    x, y = torch.randn(40, 3, 16, 24), torch.randint(0, 4, (40,))
    y[:4] = torch.arange(4)
    whole, single, uneven = (
        class_selectivity(model, cut(x, y, sizes), stages=["stage?"])
        for sizes in ([40], [1] * 40, [3, 30, 6, 1])
    )
    for name in whole:
        for other in (single, uneven):
            torch.testing.assert_close(
                other.class_means[name], whole.class_means[name], rtol=2e-6, atol=1e-6
            )


def test_negative_activities_count_as_none():
    model = randomized(Net(linear=True)).double()
    x, y = torch.randn(12, 3, 16, 16).double(), torch.arange(12) % 3
    features = stage_features(model, x)["stage2"]
    assert (features < 0).any()
    found = class_selectivity(model, [(x, y)], stages=["stage2"])
    expected = torch.tensor(by_hand(features, y), dtype=torch.float64)
    torch.testing.assert_close(found["stage2"], expected, equal_nan=True)
    assert (found.alive("stage2") >= 0).all() and (found.alive("stage2") <= 1).all()


def test_index_of_known_units():
    same, single, dead = torch.full((4,), 2.5), torch.tensor([0.0, 0, 7, 0]), torch.zeros(4)
    half = torch.tensor([3.0, 1, 1, 1])
    index = selectivity_index(torch.stack([same, single, dead, half], dim=1))
    assert index[:2].tolist() == [0, 1] and bool(index[2].isnan())
    assert index[3].item() == pytest.approx(0.5)
    # One class far above the others: what is left of them is not lost in the sum.
    tiny = torch.tensor([1.0, 1e-18, 3e-18], dtype=torch.float64)[:, None]
    assert selectivity_index(tiny).item() == pytest.approx(1 - 4e-18, abs=1e-17)


def test_nothing_is_left_on_the_model():
    model = randomized(Net())
    insert_bam(model, at="bottlenecks", example_input=(1, 3, 32, 32))
    model.train()
    model.stage1.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) for m in model.modules()]
    x, y = torch.randn(6, 3, 16, 16), torch.arange(6) % 2
    class_selectivity(model, [(x, y)], stages=["stage1", "stage2"])
    with pytest.raises(ValueError, match="puts out"):
        class_selectivity(model, [(x, y)], stages=["head"])
    assert modes == [m.training for m in model.modules()]
    assert hooks == [len(m._forward_hooks) for m in model.modules()]
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("with_bam", [False, True])
@pytest.mark.parametrize(
    ("name", "plain", "refined"),
    [
        ("resnet18", ["layer1", "layer2", "layer3", "layer4"], None),
        ("mobilenet_v2", ["features.3", "features.6", "features.13", "features"], None),
        (
            "densenet121",
            [*(f"features.denseblock{i}" for i in (1, 2, 3)), "features"],
            [*(f"features.transition{i}.bam" for i in (1, 2, 3)), "features"],
        ),
    ],
)
def test_stages_of(name, plain, refined, with_bam):
    models = pytest.importorskip("torchvision").models
    with torch.device("meta"):
        model = models.get_model(name)
        if with_bam:
            insert_bam(model, at="bottlenecks")
    assert stage_layers(model) == ((refined or plain) if with_bam else plain)


def images(n: int = 4) -> Tensor:
    return torch.randn(n, 3, 16, 16)


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        (lambda: [], ValueError, "loader: expected at least one image, got none"),
        (lambda: [images()], TypeError, r"loader: expected batches \(images, labels\), got Tensor"),
        (lambda: [(images(), [0, 1, 0, 1])], TypeError, "as tensors, got Tensor and list"),
        (lambda: [(images(), torch.rand(4))], TypeError, "an integer type, got torch.float32"),
        (lambda: [(images(), torch.arange(3))], ValueError, r"labels \[4\], one an image"),
        (lambda: [(images(), torch.arange(4) - 1)], ValueError, "labels from 0, got -1"),
        (lambda: [(images(), torch.ones(4).long())], ValueError, "at least 2 classes"),
        (lambda: [(images() * torch.nan, torch.arange(4))], ValueError, "stage 'stage1'.*NaN"),
    ],
)
def test_bad_loaders(loader, error, message):
    with pytest.raises(error, match=message):
        class_selectivity(Net(), loader(), stages=["stage1", "stage2"])


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        ("net", {}, TypeError, "model: expected a torch.nn.Module, got str"),
        (Net(), {"stages": "stage1"}, TypeError, r"write stages=\['stage1'\]"),
        (Net(), {"stages": ["stage9"]}, ValueError, "stages: 'stage9' matches no layer"),
        (Net(), {"stages": []}, ValueError, "stages: expected at least one name"),
        (BAM(16), {}, ValueError, "pass example_input="),
        (block(3, 8), {}, ValueError, "expected a network that downsamples"),
    ],
)
def test_bad_models_and_stages(model, options, error, message):
    with pytest.raises(error, match=message):
        class_selectivity(model, [(images(), torch.arange(4))], **options)


def test_bad_means():
    with pytest.raises(ValueError, match="class_means: expected none below 0"):
        selectivity_index(torch.tensor([[1.0], [-1.0]]))


def random_selectivity(names: list[str], channels: int) -> Selectivity:
    means = {name: torch.rand(5, channels).double() ** 3 for name in names}
    means[names[0]][:, 3] = 0
    return Selectivity(
        {k: selectivity_index(v) for k, v in means.items()}, means, torch.full((5,), 9)
    )


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    path = tmp_path / "fig4.png"
    two = {"ResNet": random_selectivity(["a", "b"], 40), "BAM": random_selectivity(["a", "c"], 40)}
    draw_selectivity(two, path, subtitle="random numbers")
    with Image.open(path) as picture:
        assert picture.width > 500 and picture.height > 350
        colours = picture.convert("RGB").getcolors(1 << 24)
    assert len(colours) > 100  # axes alone are greys
    with pytest.raises(ValueError, match="as many stages of each, got 2 of ResNet, 1 of BAM"):
        draw_selectivity({**two, "BAM": random_selectivity(["a"], 9)}, path)
    with pytest.raises(ValueError, match="networks: expected at least one"):
        draw_selectivity({}, path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
