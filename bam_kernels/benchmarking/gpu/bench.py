"""What ``bench`` times on a GPU: whole modules, fused, eager and compiled, each also as a graph.

The long run with its parity tests, sweep and sanitizer is benchmarks/gpu.sh; this is its table of
times, on whatever shapes are asked for, in a form that ``results`` reads as well.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bam_kernels.benchmarking import timing
from bam_kernels.benchmarking.cost import case_of
from bam_kernels.benchmarking.cpu.peers import Problem
from bam_kernels.benchmarking.cpu.report import flops
from bam_kernels.benchmarking.gpu import bandwidth, peers, report
from bam_kernels.benchmarking.gpu.environment import environment
from bam_kernels.benchmarking.sites import CHANNELS_LAST, INFERENCE, NCHW, RESNET50, TRAINING, Case

COMPILE = "compile"
PEERS = ("eager", COMPILE)


@dataclasses.dataclass(frozen=True)
class Options:
    """What a run times.

    Args:
        sites: [N, C, H, W] of x.
        dtypes, layouts, modes, presets: by name, as in `sites.Case`.
        peers: of `PEERS`; eager is always there.
        rounds: times taken of each side.
        least_ms: a time's least duration, in ms.
        device: a CPU, where Triton's interpreter is on, tries the benchmark itself.
        smoke: a toy, which the result says of itself.
    """

    sites: tuple[tuple[int, int, int, int], ...] = tuple(
        (batch, site.channels, site.height, site.width)
        for batch, site in itertools.product((32, 256), RESNET50)
    )
    dtypes: tuple[str, ...] = ("float16", "float32")
    layouts: tuple[str, ...] = (CHANNELS_LAST, NCHW)
    modes: tuple[str, ...] = (INFERENCE, TRAINING)
    presets: tuple[str, ...] = ("paper", "official")
    peers: tuple[str, ...] = PEERS
    rounds: int = 20
    least_ms: int = 2
    device: str = "cuda"
    smoke: bool = False

    def cases(self) -> list[Case]:
        """What is timed, in order; batch statistics take more than one sample."""
        found = itertools.product(
            self.modes, self.presets, self.dtypes, self.layouts, self.sites
        )  # fmt: skip
        return [
            case_of(size, dtype, layout, mode, preset)
            for mode, preset, dtype, layout, size in found
            if mode == INFERENCE or size[0] > 1
        ]


QUICK = Options(
    sites=((32, 256, 56, 56), (32, 1024, 14, 14)), dtypes=("float16",),
    layouts=(CHANNELS_LAST,), presets=("paper",), rounds=10,
)  # fmt: skip
"""Two sites, in about a minute, most of it torch.compile's."""

SMOKE = Options(
    sites=((2, 32, 4, 5),), dtypes=("float32",), layouts=(NCHW,), presets=("paper",),
    rounds=2, least_ms=1, smoke=True,
)  # fmt: skip


def run(options: Options, console: Console) -> dict[str, Any]:
    """Everything, as the JSON object that --json writes; one case's failure is told in its place.

    Raises:
        RuntimeError: there is no such device.
    """
    device = torch.device(options.device)
    settings = peers.Settings(
        device=device, copy_gbs=None, rounds=options.rounds, warmups=1 if options.smoke else 5,
        least_ms=options.least_ms, compile_backend="eager" if options.smoke else "inductor",
        dry=options.smoke,
    )  # fmt: skip
    result: dict[str, Any] = {
        "format": report.FORMAT,
        "sections": ["bandwidth", "times"],
        "environment": environment(device),
        **({"not_a_measurement": True} if options.smoke else {}),
    }
    cases = options.cases()
    compile_as = (COMPILE,) if COMPILE in options.peers else ()
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("the device's limits", total=len(cases) + 1)
        nbytes = bandwidth.SMALL_BYTES if options.smoke else bandwidth.LARGE_BYTES
        large = bandwidth.measure_copy(nbytes, 2, settings)
        smaller = bandwidth.measure_copy(nbytes // 4, 2, settings)
        best = bandwidth.fastest((large, smaller))
        if best is None:
            raise RuntimeError(f"{device}: no copy could be timed: {large.get('error')}")
        result["bandwidth"] = {
            "counted": "bytes read + bytes written", "large": large, "sizes": [smaller],
            "best": best,
        }  # fmt: skip
        settings = dataclasses.replace(settings, copy_gbs=best["gbs"])
        result["limits"] = {
            "matmul_gflops": {
                dtype: bandwidth.matmul_gflops(dtype, settings) for dtype in options.dtypes
            },
            "copy_gigabytes_per_second": {"large": best["gbs"]},
        }
        progress.advance(task)
        result["cases"] = []
        for case in cases:
            progress.update(task, description=str(case))
            result["cases"].append(_measure(case, settings, compile_as))
            progress.advance(task)
    return report.finite(result)


def _measure(case: Case, settings: peers.Settings, compile_as: tuple[str, ...]) -> dict[str, Any]:
    try:
        entry = peers.measure_case(case, settings, lambda: False, compile_as)
        entry["flops"] = flops(Problem(case.shape.size, case.shape.dtype, case.mode, case.preset))
        entry["spot_check"] = peers.spot_check(case, *peers.build(case, settings.device))
    except Exception as error:
        return {"case": case.record(), **timing.describe(error)}
    finally:
        peers.release(settings.device)
    return entry


def wrong(result: dict[str, Any]) -> list[str]:
    """The cases that failed, or whose numbers are not float64's, in words."""
    found = []
    for entry in result["cases"]:
        case = " ".join(str(value) for value in entry["case"].values())
        if "error" in entry:
            found.append(f"{case}: {entry['error']}")
        elif not entry["spot_check"]["ok"]:
            found.append(f"{case}: wrong numbers")
    return found
