"""A benchmark as a picture: times per site, and how far the machine's limits are.

Needs matplotlib, which is imported when a picture is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bam_kernels.benchmarking import results_figure
from bam_kernels.benchmarking.results import Results, provenance
from bam_kernels.drawing import save

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Speed-ups of each mode and dtype, and a roofline with a point for each of our times.

    Args:
        result: what `bam_kernels.benchmarking.cpu.run.run` returns, or `gpu.bench.run`.
        path: of the PNG, replaced whole.

    Raises:
        ImportError: there is no matplotlib.
    """
    from matplotlib.figure import Figure

    gpu = "cases" in result
    results = Results(path, "gpu" if gpu else "cpu", dict(result))
    found = (results_figure.gpu_panels if gpu else results_figure.cpu_panels)(result)
    panels = {
        (f"{title}, {preset}" if len(found) > 1 else title): groups
        for preset, each in found.items()
        for title, groups in each.items()
    }
    points = list(_gpu_points(result) if gpu else _cpu_points(result))
    dtypes = list(dict.fromkeys(point.dtype for point in points))
    rows = -(-(len(panels) + len(dtypes)) // 2)
    height = 1.3 + 3.2 * max(rows, 1)
    figure = Figure(figsize=(12, height), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0, 0.995, 1 - 0.75 / height))
    axes = list(figure.subplots(max(rows, 1), 2, squeeze=False).flatten())
    if panels:
        results_figure.draw_panels(axes, panels)
    after = axes[len(panels) :]
    for ax, dtype in zip(after, dtypes, strict=False):
        _roofline(ax, result["limits"], dtype, [point for point in points if point.dtype == dtype])
    for ax in after[len(dtypes) :]:
        ax.remove()
    top = height - 0.12
    where = "GPU" if gpu else "CPU"
    figure.text(0.01, top / height, f"BAM on this {where}: a peer's time over ours, and the "
                "machine's limits", va="top", fontsize=14, fontweight="bold")  # fmt: skip
    figure.text(0.01, (top - 0.33) / height, provenance(results), va="top",
                fontsize=9, color="#555555" if results.measured else "#B00000")  # fmt: skip
    save(figure, path)


class _Point(NamedTuple):
    """One of our times, as a rate: FLOP per byte, GFLOP/s, and what it is of."""

    intensity: float
    gflops: float
    dtype: str
    mode: str
    site: str


def _cpu_points(result: Mapping[str, Any]) -> Iterator[_Point]:
    for row in result["rows"]:
        if row["achieved"]:
            rate = max(each["gflops"] for each in row["achieved"].values())
            intensity = row["flops"] / row["moved_bytes"]
            yield _Point(intensity, rate, row["dtype"], row["mode"], row["site"])


def _gpu_points(result: Mapping[str, Any]) -> Iterator[_Point]:
    for entry in result["cases"]:
        case, peers = entry["case"], entry.get("peers", {})
        times = [
            each["median_ms"]
            for name, each in peers.items()
            if name.startswith("fused") and "median_ms" in each
        ]
        if times and case["dtype"] in result["limits"]["matmul_gflops"]:
            site = "x".join(str(case[k]) for k in ("batch", "channels", "height", "width"))
            yield _Point(
                entry["flops"] / entry["moved_bytes"], entry["flops"] / min(times) / 1e6,
                case["dtype"], case["mode"], site,
            )  # fmt: skip


def _roofline(ax: Axes, limits: Mapping[str, Any], dtype: str, points: list[_Point]) -> None:
    """GFLOP/s over FLOP per byte of x-sized memory, both what the fused module needs at least."""
    peak = limits["matmul_gflops"][dtype]
    copies = limits["copy_gigabytes_per_second"]
    low = min(point.intensity for point in points) / 2
    high = max(point.intensity for point in points) * 2
    for name, style in (("large", "--"), (max(copies, key=copies.__getitem__), "-")):
        if name not in copies:
            continue
        knee = peak / copies[name]
        xs = [low, *([knee] if low < knee < high else []), high]
        ax.plot(xs, [min(peak, x * copies[name]) for x in xs], style, color="#333333", linewidth=1,
                label=f"copy of {'a large map' if name == 'large' else name}: "
                f"{copies[name]:.0f} GB/s")  # fmt: skip
    for mode, marker, color in (("inference", "o", "#0072B2"), ("training", "s", "#D55E00")):
        some = [(point.intensity, point.gflops) for point in points if point.mode == mode]
        if some:
            ax.plot(*zip(*some, strict=True), marker, color=color, label=mode, markersize=6)
    highest: dict[str, tuple[float, float]] = {}
    for x, y, *_, site in points:  # a site's points lie above one another: one name for all
        name = site.partition("x")[2]
        if y > highest.get(name, (0.0, 0.0))[1]:
            highest[name] = x, y
    for name, at in highest.items():
        ax.annotate(name, at, xytext=(0, 6), textcoords="offset points", fontsize=8, ha="center")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("FLOP per byte of x-sized memory")
    ax.set_ylabel("GFLOP/s")
    ax.set_title(f"roofline, {dtype}: matrix product {peak:.0f} GFLOP/s", loc="left", fontsize=11)
    ax.grid(True, color="#DDDDDD", linewidth=0.7)
    ax.legend(frameon=False, fontsize=8, loc="lower right")
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
