"""What a call of BAM costs the host, without a GPU: every launch of a kernel replaced by a no-op.

    python benchmarks/host_overhead.py --json FILE

Ours runs all of its Python, for a GPU that is not there, and launches nothing; the tensors are
small and on the CPU. What a launcher decided is kept and replayed, as on a GPU
(`bam_kernels.backends.triton.replay`); "anew" is the same without that, with all of Triton's
Python too (arguments bound and specialised, the compiled kernel looked up). Eager is the plain
module on the same tensors: as many calls into PyTorch as on a GPU, and the arithmetic of a tiny
map. None holds what the driver takes for a launch, of which ours has fewer. A training step is a
forward and a backward. Rounds take turns; medians of microseconds a call.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.pop("TRITON_INTERPRET", None)

import torch  # noqa: E402

import bam_kernels  # noqa: E402
from bam_kernels import dispatch, reference  # noqa: E402
from bam_kernels.benchmarking.cpu import machine  # noqa: E402
from bam_kernels.benchmarking.sites import INFERENCE, TRAINING  # noqa: E402
from bam_kernels.testing.aot import without_launches  # noqa: E402

TARGET = "sm_90"
SHAPE = (1, 32, 4, 4)


@contextmanager
def no_launches() -> Iterator[list[Any]]:
    """A list of the kernels that would have been launched. CPU tensors count as a GPU's."""
    kernels: list[Any] = []
    from bam_kernels.backends.triton import replay

    why_not, applies = dispatch.why_not, replay.applies
    dispatch.why_not = lambda backend, device_type: None
    replay.applies = lambda x: True
    try:
        with bam_kernels.use_backend("triton"), without_launches(TARGET, kernels.append):
            yield kernels
    finally:
        dispatch.why_not, replay.applies = why_not, applies


def microseconds(call: Callable[[], object], calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls * 1e6


@contextmanager
def nothing_kept() -> Iterator[None]:
    """No call is replayed."""
    from bam_kernels.backends.triton import replay

    applies, replay.applies = replay.applies, lambda x: False
    try:
        yield
    finally:
        replay.applies = applies


def caller(module: torch.nn.Module, mode: str) -> Callable[[], None]:
    """One call of a module in a mode, on a map of its own."""
    x = torch.randn(SHAPE if mode == INFERENCE else (2, *SHAPE[1:]))
    if mode == INFERENCE:
        module.eval()

        def infer() -> None:
            with torch.inference_mode():
                module(x)

        return infer
    dout = torch.randn_like(x)
    parameters = list(module.train().parameters())

    def step() -> None:
        x.grad = None
        for each in parameters:
            each.grad = None
        module(x).backward(dout)

    x.requires_grad_()
    return step


def measure(preset: str, mode: str, rounds: int, calls: int) -> dict[str, Any]:
    """One inference or training step of a module: ours, ours deciding anew, and eager, in turns."""
    ours = caller(bam_kernels.BAM(SHAPE[1], preset=preset), mode)
    eager = caller(reference.BAM(SHAPE[1], preset=preset), mode)
    with no_launches() as kernels:
        for side in (ours, eager):
            side()
        kernels.clear()
        ours()
        launches = len(kernels)
        sides = {"ours": ours, "anew": ours, "eager": eager}
        taken: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, side in sides.items():
                with nothing_kept() if name == "anew" else nullcontext():
                    microseconds(side, 20)
                    taken[name].append(microseconds(side, calls))
    medians = {f"{name}_us": statistics.median(values) for name, values in taken.items()}
    return {
        "preset": preset, "mode": mode, "site": "x".join(map(str, SHAPE)), "launches": launches,
        **medians, "ratio": medians["ours_us"] / medians["eager_us"],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15, help="times taken (default: 15)")
    parser.add_argument("--calls", type=int, default=200, help="calls a time (default: 200)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'preset':10}{'mode':11}{'launches':>8}", end="")
    print(f"{'ours us':>10}{'anew us':>10}{'eager us':>10}{'ours / eager':>14}")
    rows = []
    for preset, mode in itertools.product(("paper", "official"), (INFERENCE, TRAINING)):
        row = measure(preset, mode, args.rounds, args.calls)
        rows.append(row)
        print(
            f"{preset:10}{mode:11}{row['launches']:8d}{row['ours_us']:10.1f}{row['anew_us']:10.1f}"
            f"{row['eager_us']:10.1f}{row['ratio']:14.2f}",
            flush=True,
        )
    if args.json is not None:
        result = {"what": __doc__.splitlines()[0], **machine.environment(1), "rows": rows}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
