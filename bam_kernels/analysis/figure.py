"""The picture of the attention process, in the manner of the paper's Fig. 5. Needs matplotlib."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np

PROFILE_CHANNELS = 200  # Sec. 6.2: "uniformly sampled 200 channels"
_COLORMAP = "viridis"  # perceptually uniform: equal steps of the value look equal


@dataclasses.dataclass(frozen=True)
class Stage:
    """One BAM at work on one image, on the CPU.

    Attributes:
        name: of the BAM in its network.
        before: F averaged in magnitude over the channels, [H, W].
        attention: M averaged over the channels, [H, W], or [1, 1] without a spatial branch.
        after: F' averaged in magnitude over the channels, [H, W].
        profile: M averaged over the positions, [C].
        baseline: the features of a network without BAM at the same stage, as `before`, or None.
    """

    name: str
    before: Tensor
    attention: Tensor
    after: Tensor
    profile: Tensor
    baseline: Tensor | None = None


def sample_channels(channels: int, count: int = PROFILE_CHANNELS) -> Tensor:
    """The indices of `count` channels spread evenly over all, or of all where there are fewer."""
    return torch.linspace(0, channels - 1, min(count, channels)).round().long()


def draw_attention(
    photo: np.ndarray, stages: Sequence[Stage], path: Path, *, subtitle: str = ""
) -> None:
    """Write the picture: the photograph, and a row for each stage.

    A row holds the features before BAM, the 2-D attention map and the features behind it, resized
    to the photograph (bilinear) with its contours on top, and the channel attention profile. The
    two feature maps of a row share one colour scale.

    Args:
        photo: [S, S, 3], uint8.
        stages: what the rows show, top down.
        path: of the file; its suffix names the format.
        subtitle: one line under the title.

    Raises:
        OSError: the file cannot be written.
    """
    # Agg through the object interface: no display is needed and pyplot's state stays untouched.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = len(stages)
    figure = Figure(figsize=(16, 2.85 * rows + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08, wspace=0.03, hspace=0.04)
    figure.suptitle(f"BAM's attention, stage by stage\n{subtitle}".rstrip(), fontsize=14)
    grid = figure.add_gridspec(rows, 5, width_ratios=[1.25, 1.2, 1.2, 1.2, 1.35])

    axes = figure.add_subplot(grid[:, 0])
    axes.imshow(photo)
    axes.set_title("photograph")
    axes.axis("off")
    contours = _contours(photo)
    for row, stage in enumerate(stages):
        low = float(min(stage.before.min(), stage.after.min()))
        high = float(max(stage.before.max(), stage.after.max()))
        height, width = stage.before.shape
        panels = (
            (f"features before, {height} x {width}", stage.before, low, high, "mean |F|"),
            ("attention map", stage.attention, None, None, "mean of M over C"),
            ("features after", stage.after, low, high, "mean |F'|"),
        )
        for column, (title, values, vmin, vmax, unit) in enumerate(panels, start=1):
            axes = figure.add_subplot(grid[row, column])
            shown = axes.imshow(resized(values, photo), cmap=_COLORMAP, vmin=vmin, vmax=vmax)
            axes.imshow(contours)
            axes.set_title(title if column > 1 else f"{stage.name}: {title}", fontsize=10)
            axes.axis("off")
            bar = figure.colorbar(shown, ax=axes, fraction=0.046, pad=0.03)
            bar.set_label(unit, fontsize=8)
            bar.ax.tick_params(labelsize=8)
        _draw_profile(figure.add_subplot(grid[row, 4]), stage)
    figure.savefig(path, dpi=100)


def _draw_profile(axes: Any, stage: Stage) -> None:
    chosen = sample_channels(stage.profile.numel())
    axes.plot(chosen.numpy(), stage.profile[chosen].numpy(), linewidth=0.9)
    axes.set_title(f"channel profile, {chosen.numel()} of {stage.profile.numel()}", fontsize=10)
    axes.set_xlabel("channel", fontsize=8)
    axes.set_ylabel("mean of M over H, W", fontsize=8)
    axes.set_xlim(0, stage.profile.numel() - 1)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)


def resized(values: Tensor, photo: np.ndarray) -> np.ndarray:
    """A map [h, w] at the photograph's size [H, W], bilinear."""
    size = photo.shape[:2]
    return F.interpolate(values[None, None].float(), size, mode="bilinear")[0, 0].numpy()


def _contours(photo: np.ndarray) -> np.ndarray:
    """The photograph's edges, white, as RGBA: they place a map without tinting its colours."""
    gray = torch.tensor(photo).float().mean(dim=2)[None, None]
    gray = F.avg_pool2d(gray, 5, stride=1, padding=2, count_include_pad=False)
    dy = F.pad(gray[:, :, 2:] - gray[:, :, :-2], (0, 0, 1, 1))
    dx = F.pad(gray[..., 2:] - gray[..., :-2], (1, 1))
    edges = torch.hypot(dx, dy)[0, 0]
    strongest = torch.quantile(edges.flatten()[:: max(1, edges.numel() // 100_000)], 0.98)
    alpha = (edges / strongest.clamp_min(1e-6)).clamp(0, 1) ** 2 * 0.5
    return torch.stack([torch.ones_like(alpha)] * 3 + [alpha], dim=-1).numpy()
