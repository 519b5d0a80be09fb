"""The examples run, on tiny sizes, and say in one line what is wrong with their arguments."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bam_kernels import use_backend

FOLDER = Path(__file__).resolve().parent.parent / "examples"
NAMES = sorted(path.stem for path in FOLDER.glob("[!_]*.py"))
NEEDS = {
    "analyze_attention": ("timm", "sklearn", "skimage", "matplotlib", "tqdm"),
    "detect_boxes": ("torchvision", "sklearn", "PIL", "tqdm"),
    "finetune_classifier": ("torchvision", "sklearn", "tqdm"),
    "segment_shapes": ("segmentation_models_pytorch", "sklearn", "skimage", "PIL", "tqdm"),
    "super_resolution": ("sklearn", "PIL", "tqdm"),
}
TINY = {
    "analyze_attention": ["--steps=1", "--batch=4", "--size=64"],
    "detect_boxes": ["--steps=1", "--batch=2", "--size=64"],
    "finetune_classifier": ["--steps=1", "--batch=4", "--size=32", "--network=timm:resnet10t"],
    "segment_shapes": ["--steps=2", "--batch=2", "--size=64"],
    "super_resolution": ["--steps=2", "--batch=2", "--size=16", "--blocks=2", "--channels=16"],
}


def run(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch, capsys) -> tuple[str, str]:
    """stdout and stderr of an example run in this process; SystemExit comes through."""
    for package in NEEDS[name]:
        pytest.importorskip(package, reason="pip install '.[examples]'")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    monkeypatch.syspath_prepend(str(FOLDER))
    state = torch.get_rng_state()
    try:
        with use_backend("reference"):  # not Triton's interpreter
            runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    finally:
        torch.set_rng_state(state)
    return capsys.readouterr()


def number(text: str, label: str) -> float:
    found = re.findall(rf"{label}: (-?\d+\.\d+)", text)
    assert len(found) == 1, text
    return float(found[0])


def test_each_is_listed_and_short():
    assert sorted(NEEDS) == sorted(TINY) == NAMES
    assert all(len(p.read_text().splitlines()) < 150 for p in FOLDER.glob("*.py"))


def test_analyze_attention(monkeypatch, capsys, tmp_path):
    folder = tmp_path / "out"
    arguments = (*TINY["analyze_attention"], f"--output={folder}")
    out, err = run("analyze_attention", *arguments, monkeypatch=monkeypatch, capsys=capsys)
    for name in ("baseline", "BAM"):
        assert 0 <= number(out, f"{name}, accuracy on held-out digits and photographs") <= 1
        assert f"{name}, mean class selectivity: layer1 0." in out and f"{name}: 100%" in err
    assert len(re.findall(r"mean M on the digits 0\.\d+, beside them 0\.\d+", out)) == 3
    from PIL import Image

    for picture in ("selectivity", "maps", "profiles"):
        with Image.open(folder / f"{picture}.png") as drawn:
            assert min(drawn.size) > 400
            assert len(drawn.convert("RGB").getcolors(1 << 24)) > 100


def test_finetune_classifier(monkeypatch, capsys):
    pytest.importorskip("timm")
    out, err = run(
        "finetune_classifier", *TINY["finetune_classifier"], monkeypatch=monkeypatch, capsys=capsys
    )
    assert "BAMs: layer1.bam, layer2.bam, layer3.bam" in out
    assert 0 < number(out, "jump of the outputs by inserting them") < 0.1
    figures = [float(x) for x in re.findall(r"(?:before|after|BAMs): (\d\.\d+)", out)]
    assert len(figures) == 4 and all(0 <= x <= 1 for x in figures)
    assert abs(figures[0] - figures[1]) < 0.1
    assert all(title in err for title in ("before", "on without", "on with BAMs"))


def test_detect_boxes(monkeypatch, capsys):
    out, err = run("detect_boxes", *TINY["detect_boxes"], monkeypatch=monkeypatch, capsys=capsys)
    assert "BAMs: backbone.body.layer1.bam, backbone.body.layer2.bam" in out
    for label in ("untrained", "trained"):
        assert 0 <= number(out, f"other photograph, {label}") <= 1
    assert number(out, "last loss") > 0 and "training: 100%" in err


def test_segment_shapes(monkeypatch, capsys):
    out, err = run(
        "segment_shapes", *TINY["segment_shapes"], monkeypatch=monkeypatch, capsys=capsys
    )
    assert "BAMs: encoder.layer1.bam, encoder.layer2.bam, encoder.layer3.bam" in out
    for label in ("untrained", "trained"):
        assert 0 <= number(out, f"other photographs, {label}") <= 1
    assert len(re.findall(r"mean M on the shapes 0\.\d+, beside them 0\.\d+", out)) == 3
    assert "training: 100%" in err


def test_super_resolution(monkeypatch, capsys, tmp_path):
    picture = tmp_path / "sr.png"
    arguments = (*TINY["super_resolution"], f"--output={picture}")
    out, _ = run("super_resolution", *arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert "BAMs: body.0.bam, body.1.bam" in out
    assert number(out, "PSNR on the other photograph, bicubic") > 20
    assert number(out, "PSNR on the other photograph, network") > 15
    from PIL import Image

    assert Image.open(picture).size == (3 * 642 + 2, 430)


@pytest.mark.parametrize("name", ["detect_boxes", "segment_shapes", "super_resolution"])
def test_with_and_without_from_the_same_draws(name, monkeypatch, capsys):
    """Each training of a comparison is the one that its seed alone gives; and the draws of data
    are the same both ways."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import _common

    label = {"super_resolution": "network"}.get(name, " trained").strip()
    pattern = rf"other photographs?, {label}: (\d+\.\d+)"
    drawn: list[list[torch.Tensor]] = []
    crops = _common.crops

    def recorded(*args):
        drawn[-1].append(crops(*args))
        return drawn[-1][-1]

    monkeypatch.setattr(_common, "crops", recorded)
    tiny = (*TINY[name], "--seed=5")
    drawn.append([])
    out, _ = run(name, *tiny, "--compare=1", monkeypatch=monkeypatch, capsys=capsys)
    figures = [float(x) for x in re.findall(pattern, out)]
    assert len(figures) == 2 and out.count("BAMs: ") == 1
    half = len(drawn[0]) // 2
    assert half > 0 and all(map(torch.equal, drawn[0][:half], drawn[0][half:]))
    means = [float(x) for x in re.findall(r"seeds: 1, mean: (-?\d+\.\d+)", out)]
    assert means[:2] == pytest.approx(figures, abs=0.006)
    assert means[2] == pytest.approx(means[1] - means[0], abs=0.002)
    drawn.append([])
    out, _ = run(name, *tiny, "--attention=none", monkeypatch=monkeypatch, capsys=capsys)
    assert [float(x) for x in re.findall(pattern, out)] == figures[:1] and "BAMs: " not in out
    assert all(map(torch.equal, drawn[1], drawn[0][:half]))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        *((name, ["--steps=0"], "--steps: expected at least 1, got 0") for name in NAMES),
        *((name, ["--device=abacus"], "--device: ") for name in NAMES),
        *((name, ["--size=7"], "--size: expected at least") for name in NAMES),
        ("analyze_attention", ["--output=/no/such/folder/x"], "--output: there is no folder"),
        ("analyze_attention", ["--load", "--output=/tmp"], "--load: there is no /tmp/baseline.pth"),
        ("super_resolution", ["--batch=two"], "--batch: invalid int value: 'two'"),
        ("super_resolution", ["--size=33"], "--size: expected an even number"),
        ("super_resolution", ["--blocks=0"], "--blocks, --channels: expected"),
        ("super_resolution", ["--output=/no/such/folder/x.png"], "--output: there is no folder"),
        ("segment_shapes", ["--size=80"], "--size: expected a multiple of 32"),
        ("segment_shapes", ["--encoder=resnet"], "--encoder: "),
        ("detect_boxes", ["--size=500"], "--size: expected at most 400"),
        ("finetune_classifier", ["--network=resnet18"], "--network: expected torchvision:NAME"),
        ("finetune_classifier", ["--network=timm:resnet"], "--network: "),
        ("finetune_classifier", ["--network=torchvision:vgg"], "--network: "),
        ("finetune_classifier", ["--network=torchvision:swin_t"], "at: expected layers with"),
        ("finetune_classifier", ["--reduction=100"], "reduction=100"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(name, arguments, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(name, *arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1
    assert err.startswith(f"{name}.py: error: ") and message in err


def test_a_missing_package_is_named(monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(pytest, "importorskip", lambda *args, **kwargs: None)
    with pytest.raises(SystemExit) as stopped:
        run("super_resolution", monkeypatch=monkeypatch, capsys=capsys)
    assert stopped.value.code == 2
    assert "needs tqdm: pip install 'bam_kernels[examples]'" in capsys.readouterr().err


def test_help_of_a_process():
    command = [sys.executable, str(FOLDER / "super_resolution.py"), "--help"]
    found = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True)
    assert found.returncode == 0 and "--device" in found.stdout and "--steps" in found.stdout
