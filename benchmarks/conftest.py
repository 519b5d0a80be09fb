"""``pytest benchmarks``: options, the machine in the JSON, and how a time is taken.

Each benchmark is one side (ours, or a peer of ours) on one map, in a group with the others. A round
is as many calls as last some milliseconds; on a GPU they take turns among inputs that are together
larger than its cache, and its own events are the clock. For ratios that a drift of the machine's
clock cannot touch, ``python -m bam_kernels bench`` interleaves the sides.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import suite

from bam_kernels.benchmarking.cpu import machine
from bam_kernels.benchmarking.gpu import environment
from bam_kernels.benchmarking.timing import gigabytes_per_second


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bam_kernels")
    group.addoption("--quick", action="store_true",
        help="two sites, one dtype, no compiled ResNet-50: less than ten minutes")  # fmt: skip
    group.addoption("--tiny", action="store_true",
        help="toys, once each: does everything run? Its times mean nothing")  # fmt: skip
    group.addoption("--device", choices=("auto", "cpu", "cuda"), default="auto",
        help="where to measure (default: a GPU, if there is one)")  # fmt: skip
    group.addoption("--batch", type=int, help="N of every map (default: 8 on a CPU, 32 on a GPU)")
    group.addoption("--threads", type=int, default=2, help="of a CPU's (default: 2)")


def pytest_configure(config: pytest.Config) -> None:
    option = config.option
    if option.quick and option.tiny:
        raise pytest.UsageError("--quick, --tiny: expected one of them")
    if option.device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch.cuda.is_available() is False")
    if option.batch is not None and option.batch < 2:
        raise pytest.UsageError(f"--batch: expected at least 2, got {option.batch}")
    if option.threads < 1:
        raise pytest.UsageError(f"--threads: expected at least 1, got {option.threads}")
    config.suite = suite.Suite.of(option)
    if config.suite.device.type == "cpu":
        torch.set_num_threads(option.threads)
    if option.tiny and hasattr(option, "benchmark_min_rounds"):
        option.benchmark_min_rounds = 1


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name, values in metafunc.config.suite.parameters().items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values, ids=str)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    timer = DeviceTimer() if config.suite.device.type == "cuda" else time.perf_counter
    for item in items:
        parameters = dict(getattr(item, "callspec", None).params) if _is_ours(item) else {}
        if parameters:
            shared = [str(v) for name, v in parameters.items() if not name.endswith("side")]
            words = (item.function.__name__.removeprefix("test_"), *shared)
            item.add_marker(pytest.mark.benchmark(group=" ".join(words), timer=timer))


def _is_ours(item: pytest.Item) -> bool:
    return hasattr(item, "callspec") and Path(__file__).parent in Path(item.path).parents


class DeviceTimer:
    """Seconds on the GPU's own clock, when all that was launched is done."""

    def __init__(self) -> None:
        self.last: torch.cuda.Event | None = None
        self.seconds = 0.0

    def __call__(self) -> float:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        if self.last is not None:  # in steps: an elapsed time is a float32
            self.seconds += self.last.elapsed_time(event) / 1e3
        self.last = event
        return self.seconds


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Time calls, and put beside the time what it means.

    ``measure(call, fewest_bytes, **extra)``: `fewest_bytes` is what a fused implementation cannot
    do without moving; over the time it is a bandwidth, and over a copy's of this run a share.
    """
    found = request.config.suite

    def run(call: Callable[[], object], fewest_bytes: int | None = None, **extra: Any) -> None:
        call()
        begin = time.perf_counter()
        call()
        found.synchronize()
        seconds = max(time.perf_counter() - begin, 1e-7)
        calls = 1 if found.tiny else max(1, min(1000, math.ceil(found.least_seconds / seconds)))
        benchmark.pedantic(
            call, rounds=found.rounds, iterations=calls, warmup_rounds=0 if found.tiny else 2
        )
        benchmark.extra_info.update({k: v for k, v in extra.items() if v is not None})
        if fewest_bytes is not None:
            benchmark.extra_info["fewest_bytes"] = fewest_bytes
        if fewest_bytes is not None and benchmark.stats is not None and not found.tiny:
            rate = gigabytes_per_second(fewest_bytes, benchmark.stats.stats.median * 1e3)
            benchmark.extra_info["gigabytes_per_second"] = rate
            benchmark.extra_info["share_of_copy"] = rate / found.copy_gigabytes(fewest_bytes)

    return run


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    found = config.suite
    machine_info["bam_kernels"] = {
        **machine.environment(config.option.threads),
        **({"gpu": environment.environment(found.device)} if found.device.type == "cuda" else {}),
        **({"not_a_measurement": True} if found.tiny else {}),
    }


def pytest_report_header(config: pytest.Config) -> str:
    return config.suite.describe()
