"""Maps before and behind BAMs, their statistics over a data set, and the attention by class."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor, nn

from bam_kernels import BAM, SqueezeExcite, insert_bam, use_backend
from bam_kernels.analysis import (
    GlobalStatistics,
    attention_maps,
    attention_process,
    class_attention,
    draw_class_attention,
    draw_process,
    global_statistics,
    running,
)
from bam_kernels.analysis.map_statistics import RunningStatistics


@pytest.fixture(autouse=True)
def seeded(seed: int):
    """Every test here draws its inputs from a fresh seed; the kernels are not what is tested."""
    with use_backend("reference"):
        yield


def stage(c_in: int, c_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, 3, stride, 1), nn.BatchNorm2d(c_out), nn.ReLU(),
        nn.Conv2d(c_out, c_out, 3, 1, 1), nn.BatchNorm2d(c_out), nn.ReLU(),
    )  # fmt: skip


def network(with_bam: bool = True) -> nn.Sequential:
    """Two stages with a BAM and one without, and a head of 4 classes; all numbers random."""
    net = nn.Sequential()
    net.stage1, net.stage2, net.stage3 = stage(3, 16, 1), stage(16, 32, 2), stage(32, 48, 2)
    net.pool, net.flat, net.head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 4)
    if with_bam:
        insert_bam(net, at="bottlenecks", example_input=(1, 3, 24, 24))
    with torch.no_grad():
        for part in net.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.weight.uniform_(0.5, 2.0)
                part.bias.normal_(std=0.5)
                part.running_mean.normal_(std=0.1)
                part.running_var.uniform_(0.5, 2.0)
    return net


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def test_process_is_what_the_module_took_and_gave():
    net = network().double().eval()
    x = torch.randn(3, 3, 12, 20, dtype=torch.float64)
    with torch.no_grad():
        before = net.stage1[:6](x)
        after = net.stage1[6](before)
        m = after / before.clamp_min(1e-300) - 1  # F' = F + F * M where F > 0
        with attention_process(net) as process, attention_maps(net) as maps:
            net(x)
    found = process["stage1.bam"]
    assert list(process) == ["stage1.bam", "stage2.bam"]
    assert error(found.before, before.abs().mean(dim=1)) < 1e-14
    assert error(found.after, after.abs().mean(dim=1)) < 1e-14
    whole = maps["stage1.bam"].map
    assert error(m[before > 0], whole[before > 0]) < 1e-9
    assert error(found.attention, whole.mean(dim=1)) < 1e-14
    assert error(found.profile, whole.mean(dim=(2, 3))) < 1e-14
    one = found.stage("stage1.bam", 2)
    assert one.baseline is None and torch.equal(one.profile, found.profile[2])
    assert not any(m._forward_hooks for m in net.modules()) and net.stage1[6].observer is None


def test_baseline_stands_beside():
    net, plain = network().train(), network(with_bam=False).train()
    x = torch.randn(2, 3, 12, 20)
    with running(net, baseline=plain, example_input=(1, 3, 24, 24)) as run:
        found = run(x)
        assert not plain.training
    assert plain.training and net.stage1.training
    with torch.no_grad():
        expected = plain.eval().stage1(x)
        expected2 = plain.stage2(expected)
    assert error(found["stage1.bam"].baseline, expected.abs().mean(dim=1)) < 1e-6
    assert error(found["stage2.bam"].baseline, expected2.abs().mean(dim=1)) < 1e-6
    assert list(found["stage1.bam"].maps) == ["baseline", "before", "attention", "after"]
    for options in ({"baseline_stages": ["stage2"]}, {"example_input": (1, 3, 24, 24)}):
        with running(net, modules=["stage2*"], baseline=plain, **options) as run:
            again = run(x)
        assert list(again) == ["stage2.bam"]
        assert error(again["stage2.bam"].baseline, expected2.abs().mean(dim=1)) < 1e-6


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_running_statistics_are_those_of_the_whole(offset):
    """E[x^2] - E[x]^2 would leave nothing of the deviation at an offset of 1e6 times it."""
    whole = offset + torch.randn(1000, dtype=torch.float64) * 0.3
    found = RunningStatistics()
    for part in whole.split([1, 500, 0, 7, 492]):
        found.update(part)
    assert found.count == 1000
    assert found.mean == pytest.approx(whole.mean().item(), rel=1e-12, abs=1e-12)
    assert found.std == pytest.approx(whole.std(correction=0).item(), rel=1e-6)
    assert (found.least, found.most) == (whole.min().item(), whole.max().item())
    normalized = found.normalize(whole)
    assert abs(normalized.mean()) < 1e-6 and normalized.std(correction=0) == pytest.approx(1)
    constant = RunningStatistics()
    constant.update(torch.full((4,), 3.0))
    assert constant.normalize(torch.tensor([3.0, 5.0])).tolist() == [0, 0]


def test_statistics_of_a_loader_and_their_file(tmp_path):
    net, plain = network().double(), network(with_bam=False).double()
    x = torch.randn(9, 3, 12, 20, dtype=torch.float64)
    options = {"baseline": plain, "example_input": (1, 3, 24, 24)}
    found = global_statistics(net, [(part, None) for part in x.split([2, 6, 1])], **options)
    assert found.images == 9
    with running(net, **options) as run:
        whole = run(x)
    for name, process in whole.items():
        assert set(found[name]) == {"baseline", "before", "attention", "after"}
        for kind, values in process.maps.items():
            wide = values.double()
            assert found[name][kind].count == wide.numel()
            assert found[name][kind].mean == pytest.approx(wide.mean().item(), rel=1e-11)
            assert found[name][kind].std == pytest.approx(wide.std(correction=0).item(), rel=1e-9)
    path = tmp_path / "statistics.json"
    found.save(path)
    assert GlobalStatistics.load(path) == found
    found.check({name: process.maps for name, process in whole.items()})
    with pytest.raises(ValueError, match=r"expected those of 'x' at 'stage1\.bam', got baseline"):
        found.check({"stage1.bam": {"x": x}})


@pytest.mark.parametrize(
    "text",
    [
        None,
        "no JSON",
        "[]",
        '{"format": 2}',
        '{"format": 1, "images": 3, "stages": {"a": {"after": {"mean": 1}}}}',
        '{"format": 1, "images": 3, "stages": {"a": 4}}',
        json.dumps({"format": 1, "images": 3, "stages": {"a": {"after": {
            "count": 1, "mean": "0", "squared_deviations": 0, "least": 0, "most": 0}}}}),
    ],
)  # fmt: skip
def test_other_files_are_refused(text, tmp_path):
    path = tmp_path / "statistics.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=r"statistics\.json: (cannot be read|not a file of map)"):
        GlobalStatistics.load(path)


def test_attention_by_class():
    net = network().double()
    x = torch.randn(11, 3, 12, 20, dtype=torch.float64)
    y = torch.tensor([0, 3, 3, 0, 1, 3, 0, 0, 1, 0, 3])  # none of 2
    batches = list(zip(x.split([4, 1, 6]), y.split([4, 1, 6]), strict=True))
    found = class_attention(net, batches)
    with running(net) as run:
        whole = run(x)
    assert list(found) == ["stage1.bam", "stage2.bam"]
    for name, process in whole.items():
        assert found[name].counts.tolist() == [5, 2, 0, 4]
        for k in (0, 1, 3):
            assert error(found[name].profiles[k], process.profile[y == k].mean(dim=0)) < 1e-13
            assert error(found[name].spatial[k], process.attention[y == k].mean(dim=0)) < 1e-13
        assert found[name].profiles[2].isnan().all() and found[name].spatial[2].isnan().all()
    assert list(class_attention(net, batches, modules=["stage2.bam"])) == ["stage2.bam"]


def test_squeeze_excite_has_a_map_without_positions():
    net = nn.Sequential(nn.Conv2d(3, 16, 3), SqueezeExcite(16))
    with running(net) as run:
        found = run(torch.rand(2, 3, 9, 12))["1"]
    assert found.attention.shape == (2, 1, 1) and found.before.shape == (2, 7, 10)


@pytest.mark.parametrize(
    ("model", "options", "kind", "message"),
    [
        (nn.Linear(2, 2), {}, ValueError, "model: expected one with a BAM"),
        (3, {}, TypeError, "model: expected a torch.nn.Module, got int"),
        ("bam", {"modules": ["layer9*"]}, ValueError, "modules: expected names among stage1.bam"),
        ("bam", {"modules": "stage1.bam"}, TypeError, "modules: expected a list of names, got str"),
        ("bam", {"modules": []}, ValueError, "modules: expected at least one name"),
        ("bam", {"baseline": "plain", "baseline_stages": ["stage1"]}, ValueError,
         "baseline: expected 2 stages, one a BAM"),
        ("bam", {"baseline": "plain", "baseline_stages": ["stage2", "stage3"]}, ValueError,
         "baseline: expected a map"),
    ],
)  # fmt: skip
def test_bad_arguments(model, options, kind, message):
    made = {"bam": network, "plain": lambda: network(with_bam=False)}
    options = {k: made[v]() if v == "plain" else v for k, v in options.items()}
    model = made[model]() if isinstance(model, str) else model
    with pytest.raises(kind, match=message):
        global_statistics(model, [torch.randn(2, 3, 12, 20)], **options)


def test_bad_batches():
    net = network()
    with pytest.raises(ValueError, match="loader: expected at least one image"):
        global_statistics(net, [])
    with pytest.raises(TypeError, match="loader: expected batches of images, got str"):
        global_statistics(net, ["images"])
    with pytest.raises(ValueError, match=r"stage 'stage1\.bam', before: .*NaN"):
        global_statistics(net, [torch.full((1, 3, 8, 8), math.nan)])
    with pytest.raises(ValueError, match="one N, got N of"):
        GlobalStatistics().update({"a": {"x": torch.ones(2, 3, 3), "y": torch.ones(1, 3, 3)}})
    assert not any(m._forward_hooks for m in net.modules())


def drawn(path) -> tuple[tuple[int, int], int]:
    from PIL import Image

    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return picture.size, len(picture.convert("RGB").getcolors(1 << 24))


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    net, plain = network(), network(with_bam=False)
    x, y = torch.rand(4, 3, 24, 40), torch.arange(4)
    options = {"baseline": plain, "example_input": (1, 3, 24, 24)}
    statistics = global_statistics(net, [x], **options)
    with running(net, **options) as run:
        process = run(x)
    photos = [(255 * image).byte().permute(1, 2, 0).numpy() for image in x[:2]]
    stages = [[each.stage(name, i) for name, each in process.items()] for i in range(2)]
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    draw_process(photos[:1], stages[:1], statistics, one, titles=["noise"])
    draw_process(photos, stages, statistics, two)
    (width, height), colours = drawn(two)
    assert width > 600 and height > drawn(one)[0][1] + 150 and colours > 500
    by_class = tmp_path / "classes.png"
    draw_class_attention(class_attention(net, [(x, y)]), by_class, classes=["a", "b"])
    (width, _), colours = drawn(by_class)
    assert width > 500 and colours > 300
    with pytest.raises(ValueError, match="as many of both, at least 1, got 2 and 1"):
        draw_process(photos, stages[:1], statistics, one)
    with pytest.raises(ValueError, match="statistics: expected those of 'baseline'"):
        draw_process(photos, stages, global_statistics(net, [x]), one)
    with pytest.raises(ValueError, match="found: expected at least one BAM"):
        draw_class_attention({}, by_class)


def test_one_map_of_a_flat_image_is_not_stretched():
    """Normalised by the data set, an image in which nothing stands out shows nothing."""
    bam = BAM(16)
    busy = 3 * torch.rand(8, 16, 9, 12)
    statistics = global_statistics(bam, [busy])
    flat = torch.full((1, 16, 9, 12), 1.5) + 1e-3 * torch.rand(1, 16, 9, 12)
    with running(bam) as run:
        maps = run(flat)[""].maps
    normalized = statistics[""]["before"].normalize(maps["before"])
    assert normalized.max() - normalized.min() < 0.05
