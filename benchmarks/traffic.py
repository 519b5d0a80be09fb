"""Count what BAM moves and launches, fused and eager, without a GPU; write JSON and a table.

    python benchmarks/traffic.py [--output benchmarks/results/traffic.json]

Triton's interpreter runs the kernels and `bam_kernels.testing.traffic` counts their bytes. These
are counts, not times: exact, and the same on every machine with the same versions.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import bam_kernels  # noqa: E402
from bam_kernels.backends.triton import configs  # noqa: E402
from bam_kernels.benchmarking.cpu.memory import torch_peak  # noqa: E402
from bam_kernels.benchmarking.results import traffic_markdown as markdown  # noqa: E402
from bam_kernels.benchmarking.saved import saved_bytes  # noqa: E402
from bam_kernels.testing.traffic import measure  # noqa: E402

SHAPES = ((2, 256, 56, 56), (4, 512, 28, 28), (4, 1024, 14, 14))  # ResNet-50's three bottlenecks
# The passes over x do not depend on the tiles; the interpreter's time does.
TILE = configs.Tile(128, 256, 4, 1)


def count(
    kind: str, preset: str, shape: tuple[int, ...], fmt: torch.memory_format
) -> dict[str, object]:
    """One training step and one inference: passes, launches, bytes kept and bytes at the peak."""
    package = bam_kernels if kind == "fused" else bam_kernels.reference
    module = package.BAM(shape[1], preset=preset)
    x = torch.randn(shape).contiguous(memory_format=fmt).requires_grad_()
    dout = torch.randn_like(x)
    kept = saved_bytes(module, x, module)
    with measure(strict=True) as forward:
        out = module(x)
    with measure(strict=True) as backward:
        out.backward(dout)
    del out
    x.grad = None
    gc.collect()
    peak = torch_peak(lambda: module(x).backward(dout))
    module.eval()
    with torch.no_grad(), measure(strict=True) as inference:
        module(x)
    meters = {"forward": forward, "backward": backward, "inference": inference}
    size = x.untyped_storage().nbytes()
    return {
        "module": kind,
        "preset": preset,
        "shape": list(shape),
        "layout": "channels_last" if fmt is torch.channels_last else "nchw",
        "passes": {name: round(meter.passes(x), 3) for name, meter in meters.items()},
        "launches": {name: meter.device_launches for name, meter in meters.items()},
        "kept_for_backward": round(kept / size, 3),
        "peak": round(peak / size, 3),
        "outside_bytes": sum(meter.outside_bytes for meter in meters.values()),
    }


def commit() -> str:
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    return run.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/traffic.json")
    args = parser.parse_args()
    import triton

    torch.manual_seed(0)
    rows = []
    cases = list(
        itertools.product(
            SHAPES,
            ("paper", "official"),
            (torch.contiguous_format, torch.channels_last),
            ("eager", "fused"),
        )
    )
    with configs.override(**dict.fromkeys(configs.KERNELS, TILE)):
        for i, (shape, preset, fmt, kind) in enumerate(cases, 1):
            print(f"{i}/{len(cases)}", shape, preset, kind, file=sys.stderr, flush=True)
            rows.append(count(kind, preset, shape, fmt))
    result = {
        "what": "counts under Triton's interpreter, float32; no times",
        "machine": f"{platform.system()} {platform.machine()}, no GPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit(),
        "rows": rows,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(rows))


if __name__ == "__main__":
    main()
