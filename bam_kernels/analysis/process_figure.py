"""The pictures of the attention process, the paper's Fig. 5 and 6, and of what classes attend to.

Need matplotlib.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from bam_kernels.analysis.figure import Stage, resized, sample_channels
from bam_kernels.analysis.map_statistics import GlobalStatistics
from bam_kernels.analysis.process import ClassAttention
from bam_kernels.drawing import COLORS, new_figure, save

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

DEVIATIONS = 2.5  # the colour scale's ends, in standard deviations from a stage's mean
MOST_CLASSES = 12  # whose spatial maps are shown; the heat maps of profiles hold any number

_HEAT = "inferno"  # dark to bright, also to colour-blind readers

_TITLES = {
    "baseline": "baseline's features",
    "before": "features before BAM",
    "attention": "attention map M",
    "after": "features after BAM",
}


def draw_process(
    photos: Sequence[np.ndarray],
    stages: Sequence[Sequence[Stage]],
    statistics: GlobalStatistics,
    path: Path,
    *,
    titles: Sequence[str] = (),
    subtitle: str = "",
) -> None:
    """Write the picture: for each image, a row a stage.

    A row holds the 2-D maps of Fig. 5, the baseline's features first where there are any, resized
    to the image (bilinear), in standard deviations from the mean of the maps of this kind at this
    stage over the statistics' data set, all on one colour scale, over the image in grey; and the
    channel profile of the attention, of 200 channels sampled evenly.

    Args:
        photos: images [H, W, 3], uint8.
        stages: for each image, its stages in order; `Process.stage` gives them.
        statistics: of the maps, by the stages' names.
        path: of the PNG, replaced whole.
        titles: a line for each image.
        subtitle: a line under the title.

    Raises:
        ValueError: no image, different numbers of photos and stages, no statistics of a map.
        ImportError: there is no matplotlib.
        OSError: the file cannot be written.
    """
    if not photos or len(photos) != len(stages):
        raise ValueError(
            f"photos, stages: expected as many of both, at least 1, got {len(photos)} and "
            f"{len(stages)}"
        )
    for each in stages:
        statistics.check({stage.name: _maps(stage) for stage in each})
    kinds = list(_maps(stages[0][0]))
    count = len(stages[0])
    rows = len(photos) * count
    figure = new_figure((1.45 * (len(kinds) + 1) + 2.6, 1.4 * rows + 1.1))
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.0, hspace=0.0)
    figure.suptitle(f"The attention process, stage by stage\n{subtitle}".rstrip(), fontsize=11)
    grid = figure.add_gridspec(
        rows + 1, len(kinds) + 2,
        width_ratios=[1.25, *[1.0] * len(kinds), 1.7], height_ratios=[*[1.0] * rows, 0.07],
    )  # fmt: skip
    for number, (photo, each) in enumerate(zip(photos, stages, strict=True)):
        first = number * count
        axes = figure.add_subplot(grid[first : first + count, 0])
        axes.imshow(photo)
        axes.set_title(titles[number] if number < len(titles) else "image", fontsize=8)
        axes.axis("off")
        grey = photo.mean(axis=2)
        for row, stage in enumerate(each):
            for column, kind in enumerate(kinds, start=1):
                axes = figure.add_subplot(grid[first + row, column])
                normalized = statistics[stage.name][kind].normalize(_maps(stage)[kind])
                shown = _heat(axes, resized(normalized, photo), grey)
                axes.set_xticks([])
                axes.set_yticks([])
                if row == 0:
                    axes.set_title(_TITLES[kind], fontsize=8)
                if column == 1:
                    axes.set_ylabel(stage.name, fontsize=8)
            _profile(
                figure.add_subplot(grid[first + row, -1]), stage,
                first=row == 0, last=row == count - 1,
            )  # fmt: skip
    bar = figure.colorbar(shown, cax=figure.add_subplot(grid[-1, 1:-1]), orientation="horizontal")
    bar.set_label(
        "standard deviations from the mean of such maps at this stage over "
        f"{statistics.images} images", fontsize=8,
    )  # fmt: skip
    bar.ax.tick_params(labelsize=8)
    save(figure, path, dpi=90)


def _heat(axes: Axes, values: np.ndarray, grey: np.ndarray) -> Any:
    """A map over its image: what is below the mean lets the image through, what stands out hides
    it."""
    axes.imshow(grey, cmap="gray", vmin=0, vmax=255)
    alpha = ((values + DEVIATIONS) / (2 * DEVIATIONS)).clip(0, 1) * 0.6 + 0.3
    return axes.imshow(values, cmap=_HEAT, vmin=-DEVIATIONS, vmax=DEVIATIONS, alpha=alpha)


def _maps(stage: Stage) -> dict[str, Tensor]:
    return {k: getattr(stage, k) for k in _TITLES if getattr(stage, k) is not None}


def _profile(axes: Axes, stage: Stage, *, first: bool, last: bool) -> None:
    """The mean of M over the positions, for channels sampled evenly."""
    chosen = sample_channels(stage.profile.numel())
    axes.plot(chosen.numpy(), stage.profile[chosen].numpy(), linewidth=0.8, color=COLORS[0])
    axes.set_ylim(0, 1.15 * max(1.0, float(stage.profile.max())))
    axes.set_xlim(0, stage.profile.numel() - 1)
    axes.set_ylabel("M", fontsize=7)
    axes.yaxis.set_label_position("right")
    axes.yaxis.tick_right()
    axes.text(0.01, 0.97, f"{chosen.numel()} of {stage.profile.numel()} channels", fontsize=6,
              va="top", transform=axes.transAxes)  # fmt: skip
    if first:
        axes.set_title("channel profile", fontsize=8)
    if last:
        axes.set_xlabel("channel", fontsize=7)
    axes.tick_params(labelsize=6)
    axes.grid(alpha=0.3)


def draw_class_attention(
    found: Mapping[str, ClassAttention],
    path: Path,
    *,
    classes: Sequence[str] = (),
    subtitle: str = "",
) -> None:
    """Write the picture: a column a BAM, the channel and the spatial attention over the classes.

    Above, the channel profile: the mean over the classes, and the span from the lowest class to the
    highest, for 200 channels sampled evenly. In the middle the same channels, a row a class. Below,
    the spatial map of each class, at most 12 of them, on one scale a stage.

    Args:
        found: by BAM, what `class_attention` returns.
        path: of the PNG, replaced whole.
        classes: their names; numbers where there is none.
        subtitle: a line under the title.

    Raises:
        ValueError: no BAM.
        ImportError: there is no matplotlib.
        OSError: the file cannot be written.
    """
    if not found:
        raise ValueError("found: expected at least one BAM, got none")
    columns = len(found)
    figure = new_figure((3.4 * columns + 0.6, 8.2))
    figure.suptitle(f"Attention by class, stage by stage\n{subtitle}".rstrip(), fontsize=11)
    grid = figure.add_gridspec(3, columns, height_ratios=[1.1, 1.2, 1.9])
    for column, (name, attention) in enumerate(found.items()):
        present = [k for k, count in enumerate(attention.counts.tolist()) if count]
        names = [classes[k] if k < len(classes) else str(k) for k in present]
        profiles = attention.profiles[present]
        chosen = sample_channels(profiles.shape[1])
        sampled = profiles[:, chosen]
        axes = figure.add_subplot(grid[0, column])
        _spread(axes, chosen, sampled, profiles.shape[1])
        axes.set_title(f"{name}: channel profile, {len(chosen)} of {profiles.shape[1]}", fontsize=9)
        if column == 0:
            axes.set_ylabel("M, mean over positions", fontsize=8)
            axes.legend(frameon=False, fontsize=7, loc="upper right")
        axes = figure.add_subplot(grid[1, column])
        image = axes.imshow(
            sampled.numpy(), aspect="auto", cmap="viridis", interpolation="nearest",
            extent=(-0.5, profiles.shape[1] - 0.5, len(present) - 0.5, -0.5),
        )  # fmt: skip
        if len(names) <= 2 * MOST_CLASSES:
            axes.set_yticks(range(len(names)), names)
        axes.tick_params(labelsize=7)
        axes.set_xlabel("channel", fontsize=8)
        if column == 0:
            axes.set_ylabel("class", fontsize=8)
        _bar(figure, image, axes, "M")
        axes = figure.add_subplot(grid[2, column])
        _tiles(figure, axes, attention.spatial[present], names)
    save(figure, path, dpi=90)


def _spread(axes: Axes, chosen: Tensor, profiles: Tensor, channels: int) -> None:
    x = chosen.numpy()
    lowest, highest = profiles.min(dim=0).values, profiles.max(dim=0).values
    axes.fill_between(x, lowest.numpy(), highest.numpy(), color=COLORS[5], alpha=0.45, linewidth=0,
                      label="lowest to highest class")  # fmt: skip
    axes.plot(x, profiles.mean(dim=0).numpy(), color=COLORS[0], linewidth=0.8,
              label="mean over classes")  # fmt: skip
    axes.set_xlim(0, channels - 1)
    axes.set_ylim(0, max(1.0, float(highest.max())))
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)


def _bar(figure: Any, image: Any, axes: Any, label: str) -> None:
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    bar.set_label(label, fontsize=7)
    bar.ax.tick_params(labelsize=6)


def _tiles(figure: Any, axes: Axes, spatial: Tensor, names: Sequence[str]) -> None:
    """The classes' maps side by side in one coordinate system, each of width 1."""
    spatial, names = spatial[:MOST_CLASSES], names[:MOST_CLASSES]
    across = min(4, len(names))
    low, high = float(spatial.min()), float(spatial.max())
    tall = spatial.shape[1] / spatial.shape[2]
    for k, name in enumerate(names):
        left, top = 1.12 * (k % across), (tall + 0.3) * (k // across)
        image = axes.imshow(
            spatial[k].numpy(), cmap="viridis", vmin=low, vmax=high,
            extent=(left, left + 1, top + tall, top),
        )  # fmt: skip
        axes.text(left + 0.5, top - 0.03, name, fontsize=7, ha="center", va="bottom")
    down = -(-len(names) // across)
    axes.set_xlim(0, 1.12 * across - 0.12)
    axes.set_ylim((tall + 0.3) * down - 0.3, -0.3)
    axes.axis("off")
    _bar(figure, image, axes, "M, mean over channels")
