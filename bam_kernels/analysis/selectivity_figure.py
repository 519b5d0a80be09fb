"""The picture of class selectivity, in the manner of the paper's Fig. 4. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bam_kernels.analysis.selectivity import Selectivity
from bam_kernels.drawing import COLORS, GREY, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS = 20  # of width 0.05
_NETWORKS = (COLORS[0], COLORS[5], *COLORS[1:5])  # the first two are the farthest apart


def draw_selectivity(
    networks: Mapping[str, Selectivity], path: Path, *, subtitle: str = ""
) -> None:
    """Write the picture: a column a stage, matched by their order.

    Above, the distribution of the index over the stage's channels, one outline a network, with its
    mean as a line. Below, a row a network: the class-conditional mean activities, classes by
    channels. Each channel is divided by its highest; channels are sorted by the class that they
    prefer, and in it by their index, so that selective units stand out as blocks.

    Args:
        networks: by name, which the legend shows; one or more, of as many stages each.
        path: of the PNG, replaced whole.
        subtitle: a line under the title.

    Raises:
        ValueError: no network, or of different numbers of stages.
        ImportError: there is no matplotlib.
        OSError: the file cannot be written.
    """
    if not networks:
        raise ValueError("networks: expected at least one, got none")
    stages = {name: list(found) for name, found in networks.items()}
    counts = {len(names) for names in stages.values()}
    if len(counts) > 1:
        told = ", ".join(f"{len(names)} of {name}" for name, names in stages.items())
        raise ValueError(f"networks: expected as many stages of each, got {told}")
    columns = counts.pop()
    rows = len(networks)
    figure = new_figure((2.9 * columns + 0.8, 2.7 + 1.9 * rows))
    figure.suptitle(f"Class selectivity by stage\n{subtitle}".rstrip(), fontsize=12)
    axes = figure.subplots(
        1 + rows, columns, squeeze=False, gridspec_kw={"height_ratios": [1.5, *[1.0] * rows]}
    )
    for column in range(columns):
        here = {name: stages[name][column] for name in networks}
        _distributions(axes[0, column], {n: networks[n].alive(s) for n, s in here.items()})
        dead = {n: int(networks[n][s].isnan().sum()) for n, s in here.items()}
        told = ", ".join(f"{n}: {count}" for n, count in dead.items() if count)
        title = f"stage {column + 1}: {_shared(list(here.values()))}"
        axes[0, column].set_title(title, fontsize=10)
        if told:
            axes[0, column].text(
                0.98, 0.04, f"dead units, left out: {told}", fontsize=7, ha="right", color=GREY,
                transform=axes[0, column].transAxes,
            )  # fmt: skip
        for row, name in enumerate(networks, start=1):
            image = _means(axes[row, column], networks[name], here[name])
            if column == 0:
                axes[row, column].set_ylabel(f"{name}\nclass", fontsize=9)
    for ax in axes[0]:
        ax.set_xlabel("class-selectivity index", fontsize=8)
    axes[0, 0].set_ylabel("share of channels", fontsize=9)
    axes[0, 0].legend(frameon=False, fontsize=8)
    for ax in axes[-1]:
        ax.set_xlabel("channel, by preferred class", fontsize=8)
    bar = figure.colorbar(image, ax=axes[1:, :], fraction=0.02, pad=0.01)
    bar.set_label("mean activity / highest", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    save(figure, path, dpi=90)


def _shared(names: list[str]) -> str:
    """The stage's name where the networks agree on it, else both."""
    return ", ".join(dict.fromkeys(names))


def _distributions(ax: Axes, indices: Mapping[str, Tensor]) -> None:
    edges = torch.linspace(0, 1, BINS + 1, dtype=torch.float64)
    for (name, found), color in zip(indices.items(), _NETWORKS, strict=False):
        if not len(found):
            continue
        shares = torch.histogram(found.clamp(0, 1), edges).hist / len(found)
        ax.stairs(shares.numpy(), edges.numpy(), color=color, fill=True, alpha=0.25)
        ax.stairs(shares.numpy(), edges.numpy(), color=color, linewidth=1.5, label=name)
        ax.axvline(float(found.mean()), color=color, linestyle="--", linewidth=1.2)
    ax.set_xlim(0, 1)
    ax.set_ylim(bottom=0)
    ax.tick_params(labelsize=8)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def _means(ax: Axes, found: Selectivity, stage: str):
    means, index = found.class_means[stage], found[stage]
    means = means.nan_to_num()  # a class without images is drawn as 0
    highest, preferred = means.max(dim=0)
    order = sorted(
        range(len(index)),
        key=lambda c: (bool(index[c].isnan()), int(preferred[c]), float(index[c])),
    )
    shown = (means / highest.clamp_min(1e-30))[:, order]
    image = ax.imshow(shown.numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=1,
                      interpolation="nearest")  # fmt: skip
    ax.tick_params(labelsize=7)
    return image
