"""What a CPU run found: ratios and rates of a row, the bars, and the tables on the terminal."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bam_kernels.benchmarking import sites
from bam_kernels.benchmarking.cpu import peers

INFERENCE_RATIO, HALF_RATIO, TRAINING_RATIO = 1.5, 1.0, 1.5
OVERHEAD_RATIO = 0.5
PEAK_UNITS = 0.3
PEAK_BYTES = 4 << 20
"""The kernel counts resident memory to within some 0.1 of a map this large; smaller ones are
measured and not judged."""


def flops(problem: peers.Problem) -> int:
    """FLOPs of a call, multiplications and additions apart.

    P = N H W positions, h = C / 16. Forward: the 1x1 reduction 2 P C h, two dilated convolutions
    of 3x3 2 * 2 P 9 h h, the projection 2 P h, the pooling P C, and the gate 4 P C (a sum, a
    sigmoid counted as one, a product, a sum). A training step adds twice the convolutions (by input
    and by weight) and 8 P C for the gate's and the pooling's gradients.
    """
    n, c, height, width = problem.size
    p, h = n * height * width, problem.hidden
    convolutions = 2 * p * c * h + 2 * 2 * p * 9 * h * h + 2 * p * h
    forward = convolutions + 5 * p * c
    if problem.mode == sites.INFERENCE:
        return forward
    return forward + 2 * convolutions + 8 * p * c


def moved_bytes(problem: peers.Problem) -> int:
    """The x-sized traffic that a fused module cannot do without: 3 |x| forward, and 5 |x| back."""
    training = problem.mode == sites.TRAINING
    passes = sites.FORWARD_PASSES + (sites.BACKWARD_PASSES if training else 0)
    return passes * problem.x_bytes


def row(
    problem: peers.Problem,
    times: Mapping[str, dict[str, Any]],
    errors: Mapping[str, float],
    reasons: Mapping[str, str],
    limits: Mapping[str, Any],
) -> dict[str, Any]:
    """A problem as a JSON object: times of a call, ratios to the best peer, rates reached.

    A ratio is the best peer's median over ours: above 1, ours is the faster. The best peer is the
    fastest over all peers and layouts.
    """
    found: dict[str, Any] = {
        "site": "x".join(map(str, problem.size)),
        **dataclasses.asdict(problem),
        "x_bytes": problem.x_bytes,
        "flops": flops(problem),
        "moved_bytes": moved_bytes(problem),
        "sides": {key: {**time, "relative_error": errors[key]} for key, time in times.items()},
        "not_run": dict(reasons),
    }
    others = {k: v["median_ms"] for k, v in times.items() if not k.startswith(peers.OURS)}
    best = min(others, key=others.__getitem__, default=None)
    found["best_peer"] = best
    found["ratios"], found["achieved"] = {}, {}
    for layout in peers.LAYOUTS:
        ours = times.get(f"{peers.OURS} {layout}")
        if ours is None:
            continue
        if best is not None:
            found["ratios"][layout] = others[best] / ours["median_ms"]
        seconds = ours["median_ms"] / 1e3
        gflops = flops(problem) / seconds / 1e9
        gigabytes = moved_bytes(problem) / seconds / 1e9
        found["achieved"][layout] = {
            "gflops": gflops,
            "of_matmul": gflops / limits["matmul_gflops"][problem.dtype],
            "gigabytes_per_second": gigabytes,
            "of_copy": gigabytes / limits["copy_gigabytes_per_second"][found["site"]],
        }
    return found


# --- bars -------------------------------------------------------------------------------------


def bars(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every bar of a run: what it asks, where, what was found (None: nothing), and if it passes."""
    found = []
    for each in result["rows"]:
        training = each["mode"] == sites.TRAINING
        if each["dtype"] != "float32":
            least, who = HALF_RATIO, "the best peer"
        elif training:
            least, who = TRAINING_RATIO, "the better of eager and torch.compile"
        else:
            least, who = INFERENCE_RATIO, "the best peer"
        for layout in peers.LAYOUTS:
            ratio = each["ratios"].get(layout)
            found.append(
                {
                    "bar": f"{each['mode']} {each['dtype']} at least {least} x {who}",
                    "where": f"{each['site']} {each['preset']} {layout}",
                    "found": ratio,
                    "pass": ratio is not None and ratio >= least,
                }
            )
    if "overhead" in result:
        ratio = result["overhead"].get("ratio")
        found.append(
            {
                "bar": f"a call's overhead at most {OVERHEAD_RATIO} of eager's",
                "where": result["overhead"]["site"],
                "found": ratio,
                "pass": ratio is not None and ratio <= OVERHEAD_RATIO,
            }
        )
    for each in result.get("memory", []):
        if each["side"] != peers.OURS or each["x_bytes"] < PEAK_BYTES:
            continue
        peak = max(each[key] for key in ("peak", "first_call")) if "peak" in each else None
        found.append(
            {
                "bar": f"peak memory of inference at most {PEAK_UNITS} |x|",
                "where": f"{each['site']} {each['dtype']} {each['layout']}",
                "found": peak,
                "pass": peak is not None and peak <= PEAK_UNITS,
            }
        )
    return found


# --- tables -----------------------------------------------------------------------------------


def show(result: Mapping[str, Any], console: Console) -> None:
    """The whole run as tables."""
    for mode in (sites.INFERENCE, sites.TRAINING):
        rows = [each for each in result["rows"] if each["mode"] == mode]
        if rows:
            console.print(_times(rows, mode))
            _reasons(rows, console)
    for where, reason in result.get("not_timed", {}).items():
        console.print(f"- {where} not timed: {reason}", markup=False)
    limits = result["limits"]
    rates = ", ".join(f"{k} {v:.0f} GFLOP/s" for k, v in limits["matmul_gflops"].items())
    copies = ", ".join(f"{k} {v:.1f}" for k, v in limits["copy_gigabytes_per_second"].items())
    console.print(f"Machine: matmul {rates}; copy in GB/s: {copies}")
    if "overhead" in result:
        told = result["overhead"]
        if "ratio" in told:
            console.print(
                f"Overhead of a call at {told['site']}: ours {told['ours_us']:.1f} us, "
                f"eager {told['eager_us']:.1f} us, ratio {told['ratio']:.2f}"
            )
        else:
            console.print(f"Overhead of a call: not measured: {told['error']}")
    if result.get("memory"):
        console.print(_memory(result["memory"]))


def _times(rows: Sequence[Mapping[str, Any]], mode: str) -> Table:
    keys = list(dict.fromkeys(k for each in rows for k in (*each["sides"], *each["not_run"])))
    if mode == sites.TRAINING:
        keys = [key for key in keys if any(key in each["sides"] for each in rows)]
    table = Table(title=f"{mode}: medians of a call in ms", box=box.SIMPLE, title_justify="left")
    for name in ("site", "dtype", "preset"):
        table.add_column(name, no_wrap=True)
    names = [key.replace("channels_last", "c_last") for key in keys]
    names += ["best peer", "ratio nchw", "c_last", "GFLOP/s", "GB/s"]
    for name in names:
        table.add_column(name, justify="right")
    for each in rows:
        cells = [each["site"], each["dtype"], each["preset"]]
        for key in keys:
            side = each["sides"].get(key)
            cells.append("-" if side is None else f"{side['median_ms']:.3f}")
        cells.append((each["best_peer"] or "-").replace("channels_last", "c_last"))
        cells += [
            f"{each['ratios'][layout]:.2f}" if layout in each["ratios"] else "-"
            for layout in peers.LAYOUTS
        ]
        best = max(each["achieved"].values(), key=lambda rates: rates["gflops"], default=None)
        cells += (
            ["-", "-"]
            if best is None
            else [f"{best['gflops']:.0f}", f"{best['gigabytes_per_second']:.1f}"]
        )
        table.add_row(*cells)
    return table


def _reasons(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Why a side has no time, each reason once with where it held."""
    where: dict[tuple[str, str], list[str]] = {}
    for each in rows:
        for key, reason in each["not_run"].items():
            where.setdefault((key, reason), []).append(f"{each['site']} {each['dtype']}")
    for (key, reason), places in where.items():
        at = "everywhere" if len(places) == len(rows) else ", ".join(dict.fromkeys(places))
        console.print(f"- {key} not run ({at}): {reason}", markup=False)


def _memory(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(
        title="inference: peak memory beyond input and output, in |x|",
        box=box.SIMPLE, title_justify="left",
    )  # fmt: skip
    for name in ("site", "dtype", "side", "layout"):
        table.add_column(name)
    for name in ("MB of x", "resident", "first call", "torch's allocator"):
        table.add_column(name, justify="right")
    for each in rows:
        cells = [each["site"], each["dtype"], each["side"], each["layout"]]
        cells.append(f"{each['x_bytes'] / 1e6:.1f}")
        if "error" in each:
            cells += [each["error"], "-", "-"]
        else:
            cells += [f"{each[k]:.2f}" for k in ("peak", "first_call", "torch_allocator")]
        table.add_row(*cells)
    return table


_LAYOUTS = {sites.NCHW: "NCHW", sites.CHANNELS_LAST: "channels_last"}


def markdown(result: Mapping[str, Any], preset: str = "paper") -> str:
    """The README's table: a line a mode, dtype and site of a preset, times in ms."""
    names = ("mode", "dtype", "site", *(f"ours, {_LAYOUTS[key]}" for key in peers.LAYOUTS))
    names += ("best peer", "its time", *(f"ratio, {_LAYOUTS[key]}" for key in peers.LAYOUTS))
    lines = [names, ["---"] * len(names)]
    for each in result["rows"]:
        if each["preset"] != preset:
            continue
        sides, best = each["sides"], each["best_peer"]
        ours = (sides.get(f"{peers.OURS} {key}") for key in peers.LAYOUTS)
        cells = [each["mode"], each["dtype"], each["site"]]
        cells += ["-" if side is None else f"{side['median_ms']:.2f}" for side in ours]
        cells += ["-", "-"] if best is None else [best, f"{sides[best]['median_ms']:.2f}"]
        ratios = (each["ratios"].get(key) for key in peers.LAYOUTS)
        lines.append([*cells, *("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def show_bars(found: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Each bar on a line, pass or miss."""
    for each in found:
        word = "pass" if each["pass"] else "MISS"
        value = "nothing measured" if each["found"] is None else f"{each['found']:.2f}"
        console.print(f"{word}  {each['bar']}: {value} ({each['where']})", markup=False)
    missed = sum(not each["pass"] for each in found)
    console.print(f"{len(found) - missed} of {len(found)} bars passed", markup=False)
