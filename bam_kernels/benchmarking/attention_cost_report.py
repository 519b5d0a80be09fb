"""What `attention_cost.measure` found, as a table, in words and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bam_kernels.benchmarking.attention_cost import BASELINE, EAGER, FUSED, MODES
from bam_kernels.benchmarking.sites import INFERENCE, TRAINING

# Of the network's output in inference, fused against eager in float32: a kernel that is wrong is
# off by far more; TF32 convolutions on a GPU, which only one of the two may take, by less.
ERROR_LIMIT = 5e-3

STEADY = 1.1
"""How far the 80th percentile of a time lies above the 20th, at most, on an idle machine."""


def problems(result: Mapping[str, Any]) -> list[str]:
    """The networks that failed, or whose fused output is not the eager one's, in words."""
    found = []
    for row in result["rows"]:
        key = f"{row['attention']} {row['kind']}"
        found += [f"{key}, {m}: {row[m]['error']}" for m in MODES if "error" in row[m]]
        error = row.get("relative_error", 0.0)
        if not error <= ERROR_LIMIT:  # NaN as well
            found.append(f"{key}: off from eager by {error:.1e}, at most {ERROR_LIMIT:.0e}")
    return found


def caution(result: Mapping[str, Any]) -> str | None:
    """Why the times mean little, in a line; None where nothing speaks against them."""
    spreads = {
        f"{row['attention']} {row['kind']}, {mode}": row[mode]["p80_ms"] / row[mode]["p20_ms"]
        for row in result["rows"]
        for mode in MODES
        if "p20_ms" in row[mode]
    }
    widest = max(spreads, key=spreads.__getitem__, default=None)
    if widest is None or spreads[widest] <= STEADY:
        return None
    return (
        f"caution: the machine was busy: the times of {widest} spread by a factor of "
        f"{spreads[widest]:.1f} from the 20th to the 80th percentile; ratios below that mean little"
    )


def table(result: Mapping[str, Any]) -> tuple[list[str], list[list[list[str]]]]:
    """Header, and rows in groups by attention; times in ms with their ratio to the baseline."""
    header = ["attention", "kernels", "params M", "GMACs", "inference ms", "x", "training step ms",
              "x", "peak MiB, inference", "peak MiB, training"]  # fmt: skip
    groups: dict[str, list[list[str]]] = {}
    for row in result["rows"]:
        cells = [row["attention"], row["kind"], f"{row['parameters'] / 1e6:.3f}",
                 f"{row['macs'] / 1e9:.4f}"]  # fmt: skip
        for mode in MODES:
            ratio = row["ratios"].get(f"{mode} median_ms")
            cells.append(f"{row[mode]['median_ms']:.2f}" if ratio is not None else "FAILED")
            cells.append(f"{ratio:.2f}" if ratio is not None else "-")
        peaks = [row[mode].get("peak_bytes") for mode in MODES]
        cells += ["-" if peak is None else f"{peak / 2**20:.1f}" for peak in peaks]
        groups.setdefault(row["attention"], []).append(cells)
    return header, list(groups.values())


def title(result: Mapping[str, Any]) -> str:
    """What, on what, with how many threads, and how busy the machine was."""
    machine = result["machine"]
    where = result["gpu"]["device"] if "gpu" in result else machine["cpu"]
    load = f"{machine['load_average'][0]:.1f} to {machine['load_average_after'][0]:.1f}"
    return (
        f"{result['what']}; {where}, {machine['threads']} threads, "
        f"fused on {result['backend']}, load {load} on "
        f"{machine['cores']} cores; medians of {result['settings']['rounds']} "
        "interleaved rounds; x: to the baseline"
    )


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Write the picture: times and training memory over the baseline's, fused beside eager.

    Raises:
        ImportError: there is no matplotlib.
        OSError: the file cannot be written.
    """
    from bam_kernels.drawing import COLORS, GREY, new_figure, save

    panels = {
        "inference": f"{INFERENCE} median_ms",
        "training step": f"{TRAINING} median_ms",
        "peak memory, training": f"{TRAINING} peak_bytes",
    }
    figure = new_figure((10.5, 3.6))
    figure.suptitle(title(result).replace("; medians", ";\nmedians"), fontsize=8, color=GREY)
    rows = [row for row in result["rows"] if row["attention"] != BASELINE]
    names = list(dict.fromkeys(row["attention"] for row in rows))
    for ax, (what, ratio) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for offset, kind, color in ((-0.2, FUSED, COLORS[0]), (0.2, EAGER, COLORS[1])):
            told = {r["attention"]: r["ratios"].get(ratio) for r in rows if r["kind"] == kind}
            at = [(names.index(n) + offset, v) for n, v in told.items() if v is not None]
            bars = ax.bar([x for x, _ in at], [y for _, y in at], 0.36, color=color, label=kind)
            ax.bar_label(bars, fmt="%.2f", fontsize=7)
        ax.axhline(1, color=GREY, linestyle="--", linewidth=1)
        ax.set_xticks(range(len(names)), [name.upper() for name in names])
        ax.set_title(what, fontsize=10)
        ax.tick_params(labelsize=8)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    figure.axes[0].set_ylabel("over the network without attention", fontsize=8)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, ncols=2, loc="outside lower center")
    save(figure, path, dpi=90)
