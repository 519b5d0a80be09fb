"""The command line and its demo: exit statuses, what is printed and written, and the measuring."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from bam_kernels import __version__, cli, demo, dispatch
from bam_kernels.analysis import parity
from bam_kernels.analysis.figure import sample_channels
from bam_kernels.backends import cpp_library

np = pytest.importorskip("numpy")
PIL = pytest.importorskip("PIL.Image")
pytest.importorskip("torchvision")
pytest.importorskip("matplotlib")
pytest.importorskip("triton")

SMALL = ["--size", "64", "--batch", "4"]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A picture with edges and shades, 90 x 70."""
    y, x = np.mgrid[:70, :90] / 70
    shades = np.stack([x, y, (np.hypot(x - 0.6, y - 0.5) < 0.3) * 0.9], axis=-1)
    path = tmp_path / "photo.png"
    PIL.fromarray((shades.clip(0, 1) * 255).astype(np.uint8)).save(path)
    return path


def assert_shows_something(path: Path) -> None:
    """A picture of many colours whose panels, left to right, all have content."""
    pixels = np.asarray(PIL.open(path).convert("RGB"))
    assert pixels.shape[0] > 600 and pixels.shape[1] > 1200
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 1000
    for panel in np.array_split(pixels, 5, axis=1):
        assert panel.reshape(-1, 3).std(axis=0).max() > 10


def demo_process(
    folder: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The command in a fresh process, in which nobody has switched Triton's interpreter on."""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    clean["PYTHONPATH"] = str(Path(demo.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-m", "bam_kernels", "demo", *arguments, *SMALL, "--device=cpu"],
        env=clean | environment,
        cwd=folder,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_demo_in_a_process_of_its_own(backend, photo, tmp_path):
    if backend == "cpp":
        reason = cpp_library.why_not()
        if reason is not None:
            pytest.skip(reason)
    output = tmp_path / "out"
    # The C++ kernels are what a CPU takes by itself.
    asked = [] if backend == "cpp" else [f"--backend={backend}"]
    done = demo_process(tmp_path, str(photo), f"--output={output}", *asked)
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(output / "attention.png") in done.stdout and str(photo) in done.stdout
    assert ("interpreted, not a speed" in done.stdout) == (backend == "triton")
    assert "FAILED" not in done.stdout
    assert "network on the fused kernels" in done.stderr
    assert sorted(path.name for path in output.iterdir()) == ["attention.png", "results.json"]
    assert_shows_something(output / "attention.png")

    results = json.loads((output / "results.json").read_text())
    assert results["versions"]["torch"] == torch.__version__
    assert results["interpreted"] is (backend == "triton")
    parts = {part["name"]: part for part in results["parts"]}
    assert list(parts) == ["layer1.bam", "layer2.bam", "layer3.bam", "network"]
    assert {part["backend"] for part in parts.values()} == {backend}
    assert parts["layer1.bam"]["shape"] == [4, 256, 16, 16]
    for part in parts.values():
        assert [c["passed"] for c in part["comparisons"]] == [True] * 4
        # Errors of exactly zero would mean that a path was compared with itself.
        assert all(0 < c["fused"] <= c["bar"] and c["pytorch"] > 0 for c in part["comparisons"])
    first = parts["layer1.bam"]
    assert first["fused"]["kept_input"] == 4 * 256 * 16 * 16 * 4
    assert first["fused"]["kept"] < first["pytorch"]["kept"]


def test_without_a_compiler_the_interpreter_runs(photo, tmp_path, monkeypatch, capsys):
    """As far as the choice; the interpreter's run is above."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "why_not", lambda backend, device_type: "no compiler")
    monkeypatch.setattr(cpp_library, "is_damaged", lambda: False)
    device, backend = demo.resolve(demo.Options(device="cpu"), cli.output.say)
    assert (device.type, backend) == ("cpu", "triton")
    assert (
        "Triton's interpreter in place of the C++ kernels: no compiler" in capsys.readouterr().err
    )
    with pytest.raises(demo.DemoError, match="the C\\+\\+ kernels cannot run: no compiler"):
        demo.resolve(demo.Options(device="cpu", backend="cpp"))
    monkeypatch.setattr(cpp_library, "is_damaged", lambda: True)
    with pytest.raises(demo.DemoError, match="the C\\+\\+ kernels cannot run: no compiler"):
        demo.resolve(demo.Options(device="cpu"))


def test_a_gate_that_is_off_by_a_hundredth_fails(photo, tmp_path, monkeypatch, capsys):
    from bam_kernels.backends import triton

    right = triton.gate_forward
    monkeypatch.setattr(triton, "gate_forward", lambda *args: right(*args) * 1.01)
    output = tmp_path / "out"
    assert cli.main(["demo", str(photo), f"--output={output}", *SMALL]) == cli.FAILED == 1
    printed = capsys.readouterr()
    assert "FAILED" in printed.out
    assert "parity failed: layer1.bam, output, training: error 1.0e-02" in printed.err
    assert_shows_something(output / "attention.png")


# --- exit status 2 ----------------------------------------------------------------------------


def not_there(path: Path) -> Path:
    return path / "nowhere.jpg"


def a_text(path: Path) -> Path:
    (path / "text.png").write_text("not a picture\n")
    return path / "text.png"


def a_folder(path: Path) -> Path:
    return path


def cut_off(path: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    PIL.fromarray(noise).save(path / "whole.png")
    (path / "cut.png").write_bytes((path / "whole.png").read_bytes()[:3000])
    return path / "cut.png"


@pytest.mark.parametrize("broken", [not_there, a_text, a_folder, cut_off])
def test_an_unreadable_image_is_one_line_and_writes_nothing(broken, tmp_path, capsys):
    output = tmp_path / "out"
    image = broken(tmp_path)
    assert cli.main(["demo", str(image), f"--output={output}"]) == cli.USAGE_ERROR == 2
    printed = capsys.readouterr()
    errors = [line for line in printed.err.splitlines() if not line.startswith("...")]
    assert len(errors) == 1
    assert errors[0].startswith(f"bam_kernels demo: error: cannot read the image {image}: ")
    assert not printed.out and not output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size=16"], "--size: expected at least 32, got 16"),
        (["--batch=1"], "--batch: expected at least 2, got 1"),
        (["--device=abacus"], "--device: expected auto, cpu, cuda or xpu, got 'abacus'"),
        (["--device=cuda:99"], "--device: PyTorch finds"),
        (["--device=meta"], "Triton does not run on 'meta' devices"),
        (["--device=meta", "--backend=cpp"], "the C++ backend runs on the CPU, not on 'meta'"),
        (["--output={photo}"], "is not a folder"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, photo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = [argument.format(photo=photo) for argument in arguments]
    assert cli.main(["demo", str(photo), *given]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]


def test_weights_that_cannot_be_had(photo, tmp_path, monkeypatch, capsys):
    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    output = tmp_path / "out"
    assert cli.main(["demo", str(photo), "--pretrained", f"--output={output}"]) == 2
    assert "--pretrained: cannot get the weights: no route to host" in capsys.readouterr().err
    assert not output.exists()


def test_a_package_that_is_missing(photo, monkeypatch, capsys):
    monkeypatch.setattr(cli.output.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["demo", str(photo)]) == 2
    assert capsys.readouterr().err == (
        "bam_kernels demo: error: torchvision is not installed; pip install 'bam_kernels[demo]'\n"
    )


def test_version_and_usage(capsys):
    with pytest.raises(SystemExit) as leaving:
        cli.main(["--version"])
    assert leaving.value.code == 0 and __version__ in capsys.readouterr().out
    with pytest.raises(SystemExit) as leaving:
        cli.main([])
    assert leaving.value.code == 2


# --- the photograph ---------------------------------------------------------------------------


def test_without_an_image_one_of_an_installed_package_is_taken():
    image, source = demo._load_image(None)
    assert min(image.size) > 200 and Path(source).is_file()
    assert np.asarray(image).std() > 20


def test_views_are_the_photograph_its_mirror_image_and_crops(photo):
    image, _ = demo._load_image(photo)
    views, shown = demo._views(image, demo.Options(size=64, batch=4))
    assert views.shape == (4, 3, 64, 64) and shown.shape == (64, 64, 3)
    torch.testing.assert_close(views[1], views[0].flip(-1))
    assert all((views[i] - views[j]).abs().mean() > 0.05 for i in range(4) for j in range(i))
    again, _ = demo._views(image, demo.Options(size=64, batch=4))
    other, _ = demo._views(image, demo.Options(size=64, batch=4, seed=1))
    assert torch.equal(views, again) and not torch.equal(views[2:], other[2:])


# --- parity and cost --------------------------------------------------------------------------


class Square(nn.Module):
    """w * x * x: keeps its input, its square and nothing else that is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((7,), 3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w * x.square()


def square_run(scale: float = 1.0, dtype: torch.dtype = torch.float32) -> parity.Run:
    x = torch.linspace(1, 2, 35, dtype=dtype).view(5, 7)
    return parity.measure(Square().to(dtype), x, lambda y: (scale * y.sum()).backward(), repeats=2)


def test_measure_finds_gradients_and_kept_bytes():
    run, x = square_run(), torch.linspace(1, 2, 35).view(5, 7)
    torch.testing.assert_close(run.input_gradient, 6 * x)
    torch.testing.assert_close(run.gradients["w"], x.square().sum(dim=0))
    assert list(run.outputs) == ["output, training", "output, inference"]
    for y in run.outputs.values():
        torch.testing.assert_close(y, 3 * x * x)
    assert run.cost.kept == 2 * x.nbytes and run.cost.kept_input == x.nbytes
    assert run.cost.forward > 0 and run.cost.backward > 0


@pytest.mark.parametrize("deep", [False, True])
def test_compare_passes_rounding_and_fails_a_wrong_gradient(deep):
    truth, pytorch = square_run(dtype=torch.float64), square_run()
    assert all(c.passed for c in parity.compare(square_run(), pytorch, truth, deep=deep))
    wrong = parity.compare(square_run(1.2), pytorch, truth, deep=deep)
    assert [c.passed for c in wrong] == [True, True, False, False]
    assert wrong[2].fused == pytest.approx(0.2, rel=1e-4)
    off = parity.compare(square_run(float("nan")), pytorch, truth, deep=deep)
    assert [c.passed for c in off] == [True, True, False, False]
    assert off[3].what == "gradient of w, the worst layer's"


def test_a_bar_follows_pytorchs_own_error_above_the_floor():
    assert parity.Comparison("y", 5e-6, 2e-6, floor=1e-6).passed
    assert not parity.Comparison("y", 2e-5, 2e-6, floor=1e-6).passed
    assert parity.Comparison("y", 9e-7, 0.0, floor=1e-6).passed
    assert not parity.Comparison("y", float("nan"), 2e-6, floor=1e-6).passed


# --- tables -----------------------------------------------------------------------------------


def test_table_without_rich_is_aligned_text(monkeypatch, capsys):
    monkeypatch.setattr(cli.output.importlib.util, "find_spec", lambda name: None)
    cli.output.print_table("Title", ("", "ms"), [[["fused", "1.5"]], [["PyTorch", "12.5"]]])
    assert capsys.readouterr().out == (
        "Title\n           ms\n-------  ----\nfused     1.5\n-------  ----\nPyTorch  12.5\n\n"
    )


def test_table_with_rich_keeps_brackets(capsys):
    pytest.importorskip("rich")
    cli.output.print_table("Title", ("", "ms"), [[["[4, 256, 56, 56]", "1.5"]]])
    assert "[4, 256, 56, 56]" in capsys.readouterr().out


@pytest.mark.parametrize("channels", [1, 64, 200, 1024])
def test_profile_samples_channels_evenly(channels):
    chosen = sample_channels(channels)
    assert chosen.numel() == min(channels, 200) and chosen[0] == 0 and chosen[-1] == channels - 1
    steps = chosen.diff()
    assert steps.numel() == 0 or (steps.min() >= 1 and steps.max() - steps.min() <= 1)
