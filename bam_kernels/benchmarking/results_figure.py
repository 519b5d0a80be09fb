"""Results files as pictures. Needs matplotlib, which is imported when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bam_kernels.benchmarking.results import Results, provenance
from bam_kernels.drawing import COLORS, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# A name keeps its colour and its place in every picture; others follow.
_NAMES = ("fused", "eager", "torch.compile", "ONNX Runtime", "OpenVINO", "eager, CUDA graph",
          "torch.compile, CUDA graph")  # fmt: skip
_OURS = "ours"

Groups = Mapping[str, Mapping[str, float]]
"""By place along the axis, the bars: by name their heights."""


def draw(results: Results, folder: Path) -> list[Path]:
    """Write a file's pictures, one for each preset it holds, as PNG; returns their paths.

    Speed-ups, a peer's time over ours, for the CPU benchmark and the GPU run; passes over x-sized
    memory, fused beside eager, for the traffic meter.

    Raises:
        ImportError: there is no matplotlib.
    """
    panels = {"cpu": cpu_panels, "gpu": gpu_panels, "traffic": _traffic}[results.kind](results.data)
    written = []
    for preset, found in panels.items():
        path = folder / f"{results.path.stem}-{preset}.png"
        save(_figure(results, preset, found), path)
        written.append(path)
    return written


# --- what is drawn: by preset and panel, the groups of bars ------------------------------------


def cpu_panels(data: Mapping[str, Any]) -> dict[str, dict[str, Groups]]:
    """Each side in the faster of its memory formats."""
    found: dict[str, dict[str, Any]] = {}
    for row in data["rows"]:
        best: dict[str, float] = {}
        for key, side in row["sides"].items():
            name = key.rpartition(" ")[0] or key
            best[name] = min(side["median_ms"], best.get(name, float("inf")))
        ours = best.pop(_OURS, None)
        if ours is None or not best:
            continue
        panel = found.setdefault(row["preset"], {}).setdefault(f"{row['mode']}, {row['dtype']}", {})
        panel[row["site"]] = {_peer(name): time / ours for name, time in best.items()}
    return found


def gpu_panels(data: Mapping[str, Any]) -> dict[str, dict[str, Groups]]:
    """Plain calls against plain calls, CUDA graphs against CUDA graphs."""
    found: dict[str, dict[str, Any]] = {}
    for entry in data["cases"]:
        case = entry["case"]
        ms = {k: v["median_ms"] for k, v in entry.get("peers", {}).items() if "median_ms" in v}
        bars = {}
        for name, time in ms.items():
            ours = ms.get("fused_graphed" if name.endswith("_graphed") else "fused")
            if ours is not None and not name.startswith("fused"):
                bars[_peer(name)] = time / ours
        if not bars:
            continue
        site = "x".join(str(case[key]) for key in ("batch", "channels", "height", "width"))
        title = f"{case['mode']}, {case['dtype']}, {case['layout']}"
        found.setdefault(case["preset"], {}).setdefault(title, {})[site] = bars
    return found


def _peer(name: str) -> str:
    graphed = name.endswith("_graphed")
    name = name.removesuffix("_graphed")
    told = {
        "compile": "torch.compile",
        "compile_autotune": "torch.compile, max-autotune",
        "onnxruntime": "ONNX Runtime",
        "openvino": "OpenVINO",
    }.get(name, name)
    return f"{told}, CUDA graph" if graphed else told


def _traffic(data: Mapping[str, Any]) -> dict[str, dict[str, Groups]]:
    found: dict[str, dict[str, Any]] = {}
    for row in data["rows"]:
        shape = "x".join(map(str, row["shape"]))
        panel = found.setdefault(row["preset"], {}).setdefault(f"{shape}, {row['layout']}", {})
        for part in ("forward", "backward", "inference"):
            panel.setdefault(part, {})[row["module"]] = row["passes"][part]
    return found


# --- how --------------------------------------------------------------------------------------


def _figure(results: Results, preset: str, panels: Mapping[str, Groups]) -> Figure:
    from matplotlib.figure import Figure

    speed = results.kind != "traffic"
    names, colors = _named(panels)
    columns = 2
    rows = -(-len(panels) // columns)
    height = 1.5 + 2.9 * rows
    figure = Figure(figsize=(12, height), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0, 0.995, 1 - 1.0 / height), hspace=0.08, wspace=0.04)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=not speed).flatten()
    _fill(axes, panels, names, colors, speed)
    for ax in axes[len(panels) :]:
        ax.remove()
    what = (
        f"A peer's time over the fused BAM's, {preset} preset: above 1 the fused BAM is faster"
        if speed
        else f"Passes over x-sized memory, fused and eager BAM, {preset} preset"
    )
    top = height - 0.12
    figure.text(0.01, top / height, what, va="top", fontsize=14,
                fontweight="bold")  # fmt: skip
    figure.text(0.01, (top - 0.33) / height, provenance(results), va="top", fontsize=9,
                color="#555555" if results.measured else "#B00000")  # fmt: skip
    handles, labels = _legend(axes, names)
    figure.legend(handles, labels, loc="upper left", ncols=len(names), frameon=False, fontsize=10,
                  bbox_to_anchor=(0.003, (top - 0.52) / height))  # fmt: skip
    return figure


def draw_panels(axes: Sequence[Axes], panels: Mapping[str, Groups]) -> None:
    """Speed-ups into axes of a larger picture, the legend into the first of them."""
    names, colors = _named(panels)
    _fill(axes, panels, names, colors, speed=True)
    axes[0].legend(frameon=False, fontsize=8, loc="upper right", ncols=2)


def _named(panels: Mapping[str, Groups]) -> tuple[list[str], dict[str, str]]:
    """The bars' names in order, and a colour for each."""
    found = dict.fromkeys(n for groups in panels.values() for bars in groups.values() for n in bars)
    order = [*_NAMES, *(name for name in found if name not in _NAMES)]
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(order)}
    return [name for name in order if name in found], colors


def _fill(
    axes: Sequence[Axes],
    panels: Mapping[str, Groups],
    names: Sequence[str],
    colors: Mapping[str, str],
    speed: bool,
) -> None:
    for ax, (title, groups) in zip(axes, panels.items(), strict=False):
        _bars(ax, groups, names, colors, speed)
        ax.set_title(title, loc="left", fontsize=11)
        if ax in axes[::2]:
            ax.set_ylabel("speed-up" if speed else "passes over x-sized memory")


def _legend(axes: Sequence[Axes], names: Sequence[str]) -> tuple[list[Any], list[str]]:
    found = {label: handle for ax in axes
             for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}  # fmt: skip
    return [found[name] for name in names], list(names)


def _bars(
    ax: Axes, groups: Groups, names: Sequence[str], colors: Mapping[str, str], speed: bool
) -> None:
    present = [name for name in names if any(name in bars for bars in groups.values())]
    width = min(0.3, 0.84 / len(present))
    highest = max(value for bars in groups.values() for value in bars.values())
    for i, name in enumerate(present):
        at = [
            (k + (i - (len(present) - 1) / 2) * width, bars[name])
            for k, bars in enumerate(groups.values())
            if name in bars
        ]
        drawn = ax.bar([x for x, _ in at], [y for _, y in at], 0.92 * width, color=colors[name],
                       label=name)  # fmt: skip
        size = 7.5 if len(present) * len(groups) > 12 else 9
        ax.bar_label(drawn, [_label(y) for _, y in at], fontsize=size,
                     padding=1.5, color="#333333", zorder=4,
                     bbox={"color": "white", "alpha": 0.8, "pad": 0.4})  # fmt: skip
    ax.set_ylim(0, 1.12 * max(highest, 1.1))
    if speed:
        ax.axhline(1, color="#333333", linewidth=1, linestyle="--", zorder=3)
    ax.set_xticks(range(len(groups)), list(groups), fontsize=9 if len(groups) < 5 else 8)
    ax.set_xlim(-0.6, len(groups) - 0.4)
    ax.yaxis.grid(True, color="#DDDDDD", linewidth=0.7)
    ax.set_axisbelow(True)
    ax.tick_params(length=0)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)


def _label(value: float) -> str:
    """More digits where a little decides: around 1."""
    return f"{value:.2f}" if value < 1.095 else f"{value:.1f}" if value < 100 else f"{value:.0f}"
