"""What the pictures of the analysis share: figures without a display, colours, files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bam_kernels.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's blue and vermilion, which colour-blind readers tell apart; more of theirs follow.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#555555"
DPI = 90


def new_figure(size: tuple[float, float]) -> Figure:
    """A figure of (width, height) inches, through the object interface: needs no display, and
    pyplot's state stays untouched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    """As PNG, whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=DPI)
