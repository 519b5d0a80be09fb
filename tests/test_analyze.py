"""The command analyze from images to pictures, and what it says of bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bam_kernels import use_backend
from bam_kernels.cli import main

pytest.importorskip("torchvision", reason="pip install '.[demo]'")
pytest.importorskip("matplotlib", reason="pip install '.[demo]'")
from PIL import Image

from bam_kernels.analysis.images import Images, ImagesError, Preparation

MODEL = ("--model=torchvision:resnet18", "--classes=3", "--size=64", "--batch=5", "--device=cpu")


@pytest.fixture(autouse=True)
def seeded(seed: int):
    """Every test here draws its inputs from a fresh seed; the kernels are not what is tested."""
    with use_backend("reference"):
        yield


def paint(path: Path, size: tuple[int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = torch.randint(0, 256, (size[1] // 8 + 1, size[0] // 8 + 1, 3), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).resize(size).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of images, of several formats and sizes, H != W."""
    for i, name in enumerate(["a", "a", "b", "b", "b", "c", "c", "c"]):
        suffix = ("png", "jpg", "bmp")[i % 3]
        paint(tmp_path / "images" / name / f"{i}.{suffix}", (70 + 9 * i, 90 - 3 * i))
    return tmp_path / "images"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Weights of the network with and without BAM, the latter within a training checkpoint."""
    from torchvision.models import resnet18

    from bam_kernels import insert_bam

    plain = resnet18(num_classes=3)
    folder = tmp_path_factory.mktemp("weights")
    torch.save({"epoch": 3, "model": plain.state_dict()}, folder / "plain.pth")
    insert_bam(plain, at="bottlenecks", example_input=(1, 3, 64, 64))
    torch.save({f"module.{k}": v for k, v in plain.state_dict().items()}, folder / "bam.pth")
    return {name: folder / f"{name}.pth" for name in ("bam", "plain")}


def run(*arguments: object) -> int:
    return main(["analyze", *map(str, arguments)])


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 100
        return picture.size


def test_selectivity(folder, checkpoints, tmp_path, capsys):
    out, numbers = tmp_path / "fig4.png", tmp_path / "fig4.json"
    nets = ("--checkpoint", checkpoints["bam"], "--baseline", checkpoints["plain"])
    written = ("--out", out, "--json", numbers)
    assert run("selectivity", *MODEL, *nets, "--images", folder, *written) == 0
    assert size_of(out)[0] > 900
    found = json.loads(numbers.read_text())
    assert found["classes"] == ["a", "b", "c"] and list(found["networks"]) == ["baseline", "BAM"]
    stages = found["networks"]["BAM"]["stages"]
    assert [each["channels"] for each in stages.values()] == [64, 128, 256, 512]
    assert found["networks"]["BAM"]["images_of_class"] == [2, 3, 3]

    # The same numbers as by the functions.
    from bam_kernels.analysis import class_selectivity
    from bam_kernels.cli import networks

    model = networks.build("torchvision:resnet18", "bam", num_classes=3, size=64)
    networks.load_weights(model, checkpoints["bam"])
    loader = Images(folder, Preparation(64)).loader(3)
    expected = class_selectivity(model, loader)
    for name, each in stages.items():
        told = torch.tensor([float("nan") if i is None else i for i in each["indices"]]).double()
        torch.testing.assert_close(told, expected[name], rtol=1e-4, atol=1e-5, equal_nan=True)
    printed = capsys.readouterr().out
    assert "layer4" in printed and str(out) in printed.replace("\n", "")


def test_maps_and_their_statistics(folder, checkpoints, tmp_path, capsys):
    first, second, file = tmp_path / "1.png", tmp_path / "2.png", tmp_path / "statistics.json"
    nets = ("--checkpoint", checkpoints["bam"], "--baseline", checkpoints["plain"])
    assert run("maps", *MODEL, *nets, "--images", folder, "--out", first, "--draw", 2,
               "--save-statistics", file) == 0  # fmt: skip
    assert json.loads(file.read_text())["images"] == 8
    # Of a flat folder, by the statistics of the other.
    flat = tmp_path / "flat"
    paint(flat / "only.png", (80, 100))
    options = ("--statistics", file, "--modules", "layer1*", "layer2.bam")
    written = ("--out", second, "--json", tmp_path / "2.json")
    assert run("maps", *MODEL, *nets, "--images", flat, *options, *written) == 0
    assert size_of(second)[1] < size_of(first)[1]
    found = json.loads((tmp_path / "2.json").read_text())
    assert found["images"] == [str(flat / "only.png")]
    assert list(found["stages"][0]) == ["layer1.bam", "layer2.bam"]
    assert capsys.readouterr().out.count("statistics of 8 images") == 2


def test_maps_of_what_the_network_corrects(folder, checkpoints, tmp_path, capsys):
    """Biases decide: the baseline takes all for class a, the network for class b."""
    paths = {name: tmp_path / f"{name}.pth" for name in checkpoints}
    for name, favourite in (("plain", 0), ("bam", 1)):
        content = torch.load(checkpoints[name])
        state = content.get("model", content)
        state[next(k for k in state if k.endswith("fc.bias"))] = torch.eye(3)[favourite] * 1e6
        torch.save(content, paths[name])
    arguments = ("maps", *MODEL, "--images", folder, "--checkpoint", paths["bam"],
                 "--pick=corrected", "--modules", "layer3.bam", "--draw=2")  # fmt: skip
    written = ("--out", tmp_path / "x.png", "--json", tmp_path / "x.json")
    assert run(*arguments, "--baseline", paths["plain"], *written) == 0
    told = json.loads((tmp_path / "x.json").read_text())["images"]
    assert told == [str(folder / "b" / name) for name in ("2.bmp", "3.png")]
    content = torch.load(paths["plain"])
    content["model"]["fc.bias"] = torch.eye(3)[1] * 1e6  # now the two are of one mind
    torch.save(content, paths["plain"])
    picture = (tmp_path / "x.png").read_bytes()
    assert run(*arguments, "--baseline", paths["plain"], *written, "--force") == 2
    assert "has no image that the network classifies" in capsys.readouterr().err
    assert (tmp_path / "x.png").read_bytes() == picture


def test_profiles(folder, tmp_path, capsys):
    out = tmp_path / "profiles.png"
    numbers = tmp_path / "profiles.json"
    assert run("profiles", *MODEL, "--images", folder, "--out", out, "--json", numbers) == 0
    found = json.loads(numbers.read_text())["modules"]
    profiles = torch.tensor(found["layer3.bam"]["profiles"])
    assert profiles.shape == (3, 256) and (profiles > 0).all() and (profiles < 1).all()
    assert size_of(out)[0] > 900 and "layer3.bam" in capsys.readouterr().out


def trained(path: Path, attention: str | None, channels: int = 3) -> Path:
    """A checkpoint as train writes it."""
    from bam_kernels.recipes import checkpoint, networks

    network = networks.Network("small_resnet", attention, 3, channels)
    rest: dict[str, dict] = {key: {} for key in ("optimizer", "scheduler", "scaler")}
    settings = {"recipe": {"dataset": "cifar100"}}
    checkpoint.save(path, settings=settings, network=network.record(), epoch=1, rows=[],
                    model=network.build().state_dict(), **rest)  # fmt: skip
    return path


def test_checkpoints_of_train_say_their_network(folder, tmp_path, capsys):
    bam, plain = trained(tmp_path / "bam.pth", "bam"), trained(tmp_path / "plain.pth", None)
    options = ("--device=cpu", "--images", folder, "--json", tmp_path / "x.json", "--force")
    nets = ("--checkpoint", bam, "--baseline", plain)
    assert run("selectivity", *nets, *options, "--out", tmp_path / "x.png") == 0
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["what"].startswith("small_resnet + BAM (bam.pth), 8 images")
    assert list(found["networks"]) == ["baseline", "BAM"]
    capsys.readouterr()
    for arguments, message in (
        (("--checkpoint", plain), "model: expected one with a BAM"),
        (("--checkpoint", trained(tmp_path / "grey.pth", "bam", 1)), "a network of colour images"),
        (("--checkpoint", tmp_path / "none.pth"), "there is no such checkpoint"),
        ((), "expected --model NAME, or --checkpoint FILE of the command train"),
    ):
        assert run("profiles", *arguments, *options, "--out", tmp_path / "y.png") == 2
        err = capsys.readouterr().err.splitlines()
        assert message in err[-1] and len([x for x in err if not x.startswith("...")]) == 1
        assert not (tmp_path / "y.png").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--images", "{tmp}/none"], "no such folder: {tmp}/none"),
        (["--images", "{tmp}/empty"], "{tmp}/empty: no images"),
        (["--images", "{tmp}/broken"], "cannot read the image {tmp}/broken/a/1.png"),
        (["--images", "{tmp}/broken", "--workers=1"], "cannot read the image {tmp}/broken/a/1.png"),
        (["--images", "{tmp}/flat"], "{tmp}/flat: expected a folder of images in it for each of 2"),
        (["--checkpoint", "{tmp}/none.pth"], "--checkpoint: no such file: {tmp}/none.pth"),
        (["--checkpoint", "{tmp}/noise.pth"], "--checkpoint: {tmp}/noise.pth: cannot be read"),
        (["--checkpoint", "{weights}/plain.pth"], "is the checkpoint of another network: it lacks "
         "layer1.bam."),
        (["--checkpoint", "{weights}/bam.pth", "--classes=4"], "another network: fc.weight is "
         "[3, 512], not [4, 512]"),
        (["--model=torchvision:resnet18", "--classes=3", "--attention=none", "--checkpoint",
          "{weights}/bam.pth"], "besides (--model, --attention and --classes say"),
        (["--checkpoint", "{weights}/bam.pth", "--attention=se"], "besides (--model, --attention"),
        (["--checkpoint", "{tmp}/numbers.pth"], "holds no state dict"),
        (["--model=torchvision:resnet"], "--model torchvision:resnet: "),
        (["--model=keras:resnet"], "--model keras:resnet: expected torchvision:NAME or timm:NAME"),
        (["--model=resnet"], "--model resnet: expected torchvision:NAME, timm:NAME or one of"),
        (["--model=torchvision:swin_t"], "--model torchvision:swin_t: at: expected a network"),
        (["--out={tmp}/x.pdf"], "--out: expected a name that ends in .png"),
        (["--out={tmp}/none/x.png"], "--out: no such folder"),
        (["--out={tmp}/there.png"], "--out: {tmp}/there.png exists; --force writes over it"),
        (["--json={tmp}/there.png"], "--json: {tmp}/there.png exists"),
        (["--stages", "layer9"], "stages: 'layer9' matches no layer"),
        (["--device=abacus"], "--device: expected one that is here, got abacus: "),
        (["--device=meta"], "--device: expected one that computes"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_nothing_is_written(
    change, message, folder, checkpoints, tmp_path, capsys
):
    (tmp_path / "empty").mkdir()
    paint(tmp_path / "flat/1.png", (64, 64))
    paint(tmp_path / "broken/b/1.png", (64, 64))
    (tmp_path / "broken/a").mkdir()
    (tmp_path / "broken/a/1.png").write_bytes((tmp_path / "broken/b/1.png").read_bytes()[:99])
    (tmp_path / "there.png").write_text("a file of before")
    (tmp_path / "noise.pth").write_bytes(bytes(range(99)))
    torch.save({"x": 3}, tmp_path / "numbers.pth")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    arguments = {"--images": [str(folder)], "--out": [str(tmp_path / "out.png")]}
    places = {"tmp": tmp_path, "weights": checkpoints["bam"].parent}
    changed = [word.format(**places) for word in change]
    words = [*MODEL, *(w for k, v in arguments.items() if k != change[0] for w in (k, *v))]
    assert run("selectivity", *words, *changed) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("...")]
    assert not out and len(lines) == 1, err
    assert lines[0].startswith("bam_kernels analyze selectivity: error: ")
    assert "Traceback" not in lines[0]
    assert message.format(**places) in lines[0]
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--attention=none"], "model: expected one with a BAM or SqueezeExcite"),
        (["--baseline", "{weights}/plain.pth", "--baseline-stages", "layer1"], "got 1 (layer1)"),
        (
            [
                "--baseline",
                "{weights}/plain.pth",
                "--modules",
                "layer2.bam",
                "--baseline-stages",
                "layer1",
            ],
            "baseline: expected a map [5, 8, 8] of 'layer1' beside 'layer2.bam', got",
        ),
        (["--pick=corrected"], "--pick corrected: expected --baseline"),
        (["--modules", "layer9.bam"], "modules: expected names among layer1.bam"),
        (["--statistics", "{tmp}/none.json"], "none.json: cannot be read"),
        (["--statistics", "{tmp}/other.json"], "other.json: not a file of map statistics"),
        (["--statistics", "{tmp}/empty.json"], "statistics: expected those of 'before' at"),
    ],
)
def test_bad_input_of_maps(change, message, folder, checkpoints, tmp_path, capsys):
    (tmp_path / "other.json").write_text("[1]")
    (tmp_path / "empty.json").write_text('{"format": 1, "images": 0, "stages": {}}')
    places = {"tmp": tmp_path, "weights": checkpoints["bam"].parent}
    changed = [word.format(**places) for word in change]
    assert run("maps", *MODEL, "--images", folder, "--out", tmp_path / "x.png", *changed) == 2
    err = capsys.readouterr().err
    assert message in err and not (tmp_path / "x.png").exists()


def test_a_missing_package_is_named(folder, tmp_path, monkeypatch, capsys):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name)
    )
    assert run("profiles", *MODEL, "--images", folder, "--out", tmp_path / "x.png") == 2
    assert "matplotlib is not installed; pip install 'bam_kernels[demo]'" in capsys.readouterr().err


def test_images_are_cropped_and_come_back(tmp_path):
    """A mirrored camera turn, transparency and grey are RGB; the photo is what was prepared."""
    grey = torch.randint(0, 256, (40, 60), dtype=torch.uint8).numpy()
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.new("RGBA", (50, 40), (9, 200, 30, 0)).save(tmp_path / "clear.png")
    prepare = Preparation(32)
    found = Images(tmp_path, prepare)
    assert found.classes == [] and [p.name for p, _ in found.samples] == ["clear.png", "grey.png"]
    image, label = found[0]
    assert image.shape == (3, 32, 32) and label == 0
    photo = prepare.photo(image)
    assert photo.shape == (32, 32, 3) and photo[5, 7].tolist() == [9, 200, 30]
    with pytest.raises(ImagesError, match="no such folder"):
        Images(tmp_path / "none", prepare)
