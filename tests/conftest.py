"""Shared by all tests: where kernels run, and a seed that is printed when a test fails.

With a GPU the kernels are compiled and run on it; without one, Triton's interpreter runs the same
kernels on CPU tensors. Triton decides that when it is imported, so it is decided here first.
"""

from __future__ import annotations

import os
import random

import pytest
import torch

# What is tested is ours, at every width; tests/test_convolution_choice.py tests the choice.
os.environ["BAM_KERNELS_CONVOLUTIONS"] = "fused"

_HAS_GPU = torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available())
if not _HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)  # interpreted kernels are one thread; a pool only steals their core
    from bam_kernels.testing.interpreter import accelerate

    accelerate()

# The tables of tolerances are for fp32 arithmetic; the test of TF32 switches it on for itself.
torch.backends.cudnn.allow_tf32 = False
torch.backends.cuda.matmul.allow_tf32 = False


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full-size", action="store_true",
        help="large networks at their own input size: minutes each, and up to 16 GB of memory",
    )  # fmt: skip


@pytest.fixture
def full_size(request: pytest.FixtureRequest) -> bool:
    """Whether networks that take minutes at their own input size are run at it."""
    return request.config.getoption("--full-size")


def kernel_device() -> torch.device:
    """Where the kernels run in this test session."""
    if not _HAS_GPU:
        return torch.device("cpu")
    return torch.device("cuda" if torch.cuda.is_available() else "xpu")


@pytest.fixture
def device() -> torch.device:
    return kernel_device()


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A fresh seed for torch's generators; set BAM_KERNELS_TEST_SEED to repeat a failure."""
    value = int(os.environ.get("BAM_KERNELS_TEST_SEED", random.SystemRandom().randrange(2**31)))
    torch.manual_seed(value)
    request.node.user_properties.append(("seed", value))
    return value


@pytest.fixture
def large_tiles(monkeypatch: pytest.MonkeyPatch):
    """Tiles for tests of what stands above the kernels: the interpreter's time goes with their
    number. The kernels' own tests run the shipped tables, and so does everything on a GPU."""
    if _HAS_GPU:
        yield
        return
    from bam_kernels.backends.triton import configs

    tile = configs.Tile(128, 256, 4, 1)
    split = configs.split_weight_gradient
    # A few tiles in two parts are split as well as in as many parts as there are tiles.
    monkeypatch.setattr(
        configs, "split_weight_gradient", lambda n, h: min(n, 2) if n <= 16 else split(n, h)
    )
    with configs.override(**dict.fromkeys(configs.KERNELS, tile)):
        yield


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    outcome = yield
    report = outcome.get_result()
    for name, value in item.user_properties:
        if name == "seed" and report.failed:
            report.sections.append(("seed", f"repeat with BAM_KERNELS_TEST_SEED={value}"))
