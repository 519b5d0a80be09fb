"""What a call of BAM costs the host, without a GPU: every launch of a kernel replaced by a no-op.

    python benchmarks/host_overhead.py --json FILE

Ours runs all of its Python and all of Triton's (arguments bound and specialised, the compiled
kernel looked up), for a GPU that is not there, and launches nothing; the tensors are small and on
the CPU. Eager is the plain module on the same tensors: as many calls into PyTorch as on a GPU, and
the arithmetic of a tiny map. Neither holds what the driver takes for a launch, of which ours has
fewer. Rounds take turns; medians of microseconds a call.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.pop("TRITON_INTERPRET", None)

import torch  # noqa: E402

import bam_kernels  # noqa: E402
from bam_kernels import dispatch, reference  # noqa: E402
from bam_kernels.benchmarking.cpu import machine  # noqa: E402
from bam_kernels.testing.aot import without_launches  # noqa: E402

TARGET = "sm_90"
SHAPE = (1, 32, 4, 4)


@contextmanager
def no_launches() -> Iterator[list[Any]]:
    """A list of the kernels that would have been launched. CPU tensors count as a GPU's."""
    kernels: list[Any] = []
    why_not = dispatch.why_not
    dispatch.why_not = lambda backend, device_type: None
    try:
        with bam_kernels.use_backend("triton"), without_launches(TARGET, kernels.append):
            yield kernels
    finally:
        dispatch.why_not = why_not


def microseconds(call: Callable[[], object], calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls * 1e6


def measure(preset: str, rounds: int, calls: int) -> dict[str, Any]:
    """One inference of a module, ours and eager, in turns."""
    ours = bam_kernels.BAM(SHAPE[1], preset=preset).eval()
    eager = reference.BAM(SHAPE[1], preset=preset).eval()
    x = torch.randn(SHAPE)
    with torch.inference_mode(), no_launches() as kernels:
        sides = {"ours": lambda: ours(x), "eager": lambda: eager(x)}
        for side in sides.values():
            side()
        kernels.clear()
        ours(x)
        launches = len(kernels)
        taken: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, side in sides.items():
                microseconds(side, 20)
                taken[name].append(microseconds(side, calls))
    medians = {f"{name}_us": statistics.median(values) for name, values in taken.items()}
    return {
        "preset": preset, "site": "x".join(map(str, SHAPE)), "launches": launches, **medians,
        "ratio": medians["ours_us"] / medians["eager_us"],
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
    rows = [measure(preset, args.rounds, args.calls) for preset in ("paper", "official")]
    print(f"{'preset':10}{'launches':>9}{'ours us':>10}{'eager us':>10}{'ratio':>8}")
    for row in rows:
        print(
            f"{row['preset']:10}{row['launches']:9d}{row['ours_us']:10.1f}{row['eager_us']:10.1f}"
            f"{row['ratio']:8.2f}"
        )
    if args.json is not None:
        result = {"what": __doc__.splitlines()[0], **machine.environment(1), "rows": rows}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
