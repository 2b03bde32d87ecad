"""Pictures of a run: accuracy over epochs, residuals over the iterations of a solver."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "legend.frameon": False,
    "savefig.dpi": 150,
}


@dataclasses.dataclass(frozen=True)
class Curve:
    """One line of a picture.

    Attributes:
      label: in the legend.
      x: abscissas.
      y: ordinates.
      color: number in matplotlib's colour cycle.
      dashed: instead of solid.
      band: lower and upper ordinates of a shaded band, or None.
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    color: int
    dashed: bool = False
    band: tuple[np.ndarray, np.ndarray] | None = None


def accuracy(path: Path, curves: Sequence[Curve], *, title: str) -> None:
    """Validation accuracy over epochs, the legend beside the axes."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 4.2), layout="constrained")
        axes = figure.subplots()
        _draw(axes, curves)
        axes.set(title=title, xlabel="epoch", ylabel="validation accuracy (%)")
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
        figure.savefig(path, metadata={"Software": None})


def residuals(path: Path, panels: Sequence[tuple[str, Sequence[Curve]]], *, title: str) -> None:
    """Residuals over iterations on a logarithmic scale, one panel for each layer."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * len(panels), 4.4), layout="constrained")
        grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)
        for axes, (name, curves) in zip(grid[0], panels, strict=True):
            _draw(axes, curves)
            axes.set(title=name, xlabel="iteration k", yscale="log")
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
        grid[0][0].set_ylabel("‖z$_k$ − z$_{k−1}$‖ / ‖z$_K$‖")
        figure.suptitle(title)
        figure.savefig(path, metadata={"Software": None})


def rates(path: Path, curves: Sequence[Curve], *, title: str) -> None:
    """Test accuracy over dropout rates, which stand at equal distances."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.subplots()
        values = sorted({rate for curve in curves for rate in curve.x})
        placed = [dataclasses.replace(c, x=np.searchsorted(values, c.x)) for c in curves]
        _draw(axes, placed)
        axes.set_xticks(range(len(values)), [f"{value:g}" for value in values])
        axes.set(title=title, xlabel="dropout rate p", ylabel="test accuracy (%)")
        axes.legend()
        figure.savefig(path, metadata={"Software": None})


def _draw(axes: Axes, curves: Sequence[Curve]) -> None:
    for curve in curves:
        color = f"C{curve.color}"
        axes.plot(
            curve.x,
            curve.y,
            color=color,
            linestyle="--" if curve.dashed else "-",
            marker="o" if len(curve.x) < 12 else None,
            markersize=4,
            label=curve.label,
        )
        if curve.band is not None:
            axes.fill_between(curve.x, *curve.band, color=color, alpha=0.15, linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
