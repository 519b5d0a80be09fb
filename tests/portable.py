"""What the tests of exported, traced and stripped modules run on, and how they are compared."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_module import randomize
from tolerances import relative_error
from torch import Tensor, nn

from bam_kernels import BAM, SqueezeExcite, insert_bam

BOUND = 1e-5  # relative to eager, in float32

MODULES: dict[str, Callable[[], nn.Module]] = {
    "paper": lambda: BAM(24, 4),
    "official": lambda: BAM(24, 4, preset="official"),
    "product": lambda: BAM(24, 4, combine="product"),
    "max": lambda: BAM(24, 4, combine="max", dilation=2),
    "sigmoid_sum": lambda: BAM(24, 4, combine="sigmoid_sum", num_dilated=1),
    "no_channel": lambda: BAM(24, 4, channel=False, num_dilated=3),
    "no_spatial": lambda: BAM(24, 4, spatial=False),
    "no_residual": lambda: BAM(24, 4, residual=False),
    "deep_mlp": lambda: BAM(24, 4, mlp_layers=3, norm_hidden=True),
    "no_norms": lambda: BAM(24, 4, norm_hidden=False, norm_final=False, num_dilated=1),
    "fightingcv": lambda: BAM(24, 4, preset="fightingcv"),
    "changzy00": lambda: BAM(24, 4, preset="changzy00"),
    "squeeze_excite": lambda: SqueezeExcite(24, 4),
}
TRACED = (3, 3, 9, 12)  # the size that is traced; N, H and W are dynamic
OTHERS = ((1, 3, 13, 6), (5, 3, 7, 16))


def network(kind: str) -> nn.Module:
    """A module between two of torch's, in inference, with statistics of its own."""
    model = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), MODULES[kind](), nn.ReLU())
    return randomize(model).eval()


def resnet50() -> nn.Module:
    """torchvision's, with BAM at the paper's three places, in inference, with random statistics."""
    model = pytest.importorskip("torchvision.models").resnet50(num_classes=10)
    insert_bam(model, after=["layer1", "layer2", "layer3"])
    return calm_norms(model).eval()


def calm_norms(model: nn.Module) -> nn.Module:
    """Random batch norms under which a deep residual network does not grow without bounds."""
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.weight.uniform_(0.2, 0.6)
                part.bias.normal_(std=0.2)
                part.running_mean.normal_(std=0.1)
                part.running_var.uniform_(0.5, 1.5)
    return model


def assert_equal_on(
    found: Callable[[Tensor], Tensor], model: nn.Module, sizes: tuple[tuple[int, ...], ...]
) -> None:
    """`found` gives what the model gives, on fresh inputs of these sizes."""
    for size in sizes:
        x = torch.randn(size)
        with torch.no_grad():
            want = model(x)
            got = found(x)
        error = relative_error(got, want)
        assert error <= BOUND, f"{size}: relative error {error:.2e}, at most {BOUND}"


def run_python(code: str, folder: Path, *, without_us: bool = False) -> str:
    """What a fresh Python process prints; `without_us` makes importing bam_kernels fail in it."""
    if without_us:
        code = "import sys\nsys.modules['bam_kernels'] = None\n" + code
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = str(Path(__file__).resolve().parents[1])
    environ["PYTHONPATH"] = "" if without_us else root
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
