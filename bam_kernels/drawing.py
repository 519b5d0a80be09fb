"""What all pictures share: figures without a display, colours, files. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bam_kernels.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers tell apart.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#7F7F7F")
GREY = "#555555"


def new_figure(size: tuple[float, float]) -> Figure:
    """A figure of (width, height) inches, through the object interface: needs no display, and
    pyplot's state stays untouched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path, dpi: int = 130) -> None:
    """As PNG, whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=dpi)
