"""Pictures of a run: accuracy over epochs, residuals over the iterations of a solver."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

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
      label: text in the legend.
      x: abscissas.
      y: ordinates.
      color: index in matplotlib's colour cycle.
      dashed: whether the line is dashed instead of solid.
      band: lower and upper ordinates of a shaded band, or None.
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    color: int
    dashed: bool = False
    band: tuple[np.ndarray, np.ndarray] | None = None


Panels = Mapping[str, Sequence[Curve]]
"""Curves by the titles of their axes."""
SEEDS = "mean over the seeds, band from least to greatest"
IMAGES = "of one seed: median over images, band around the middle 80%"


def accuracy(path: Path, contents: Panels, *, title: str) -> None:
    """Validation accuracy over epochs, one panel for each comparison."""
    title = _titled(title, [curve for curves in contents.values() for curve in curves], SEEDS)
    _panels(path, contents, title, xlabel="epoch", ylabel="validation accuracy (%)")


def residuals(path: Path, contents: Panels, *, title: str) -> None:
    """Residuals over iterations on a logarithmic scale, one panel for each layer."""
    title = f"{title}\n{IMAGES}"
    ylabel = "‖z$_k$ − z$_{k−1}$‖ / ‖z$_K$‖"
    _panels(path, contents, title, xlabel="iteration k", ylabel=ylabel, yscale="log")


def progress(path: Path, contents: Mapping[str, Panels], *, title: str) -> None:
    """Two rows of axes, loss and accuracy, each over epochs and over seconds; one legend."""
    curves = [c for row in contents.values() for each in row.values() for c in each]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.4, 6.4), layout="constrained")
        grid = figure.subplots(len(contents), 2, squeeze=False, sharex="col", sharey="row")
        for line, (ylabel, panels) in zip(grid, contents.items(), strict=True):
            for axes, (xlabel, drawn), below in zip(line, panels.items(), grid[-1], strict=True):
                _draw(axes, drawn)
                below.set_xlabel(xlabel)
            line[0].set_ylabel(ylabel)
            values = np.concatenate([c.y for drawn in panels.values() for c in drawn])
            if values.min() > 0 and values.max() > 5 * values.min():
                _logarithmic(line[0])
        figure.suptitle(_titled(title, curves, SEEDS))
        handles = {str(line.get_label()): line for line in grid[0, 0].lines}
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles)
        )
        figure.savefig(path, metadata={"Software": None})


def descent(path: Path, contents: Panels, *, title: str) -> None:
    """Axes side by side over seconds, of one seed, logarithmic but for percentages, with one legend."""
    ends = [curve.x[-1] for curves in contents.values() for curve in curves]
    xscale = "log" if max(ends) > 20 * min(ends) else "linear"
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.2, 4.0), layout="constrained")
        grid = figure.subplots(1, len(contents), squeeze=False)[0]
        for axes, (ylabel, curves) in zip(grid, contents.items(), strict=True):
            _draw(axes, curves, markers=False)
            axes.set(xlabel="seconds", ylabel=ylabel, xscale=xscale)
            if xscale == "log":
                _plain_numbers(axes.xaxis)
            else:
                axes.set_xlim(left=0)
            if "%" not in ylabel:
                _logarithmic(axes)
        figure.suptitle(title)
        handles = {str(line.get_label()): line for line in grid[0].lines}
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles)
        )
        figure.savefig(path, metadata={"Software": None})


def path(path: Path, contents: Panels, *, title: str) -> None:
    """Axes side by side over β/β_max."""
    curves = [curve for drawn in contents.values() for curve in drawn]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.4, 3.4), layout="constrained")
        grid = figure.subplots(1, len(contents), squeeze=False)[0]
        for axes, (ylabel, drawn) in zip(grid, contents.items(), strict=True):
            _draw(axes, drawn)
            axes.set(xlabel="β/β$_{max}$", ylabel=ylabel, xscale="log")
            axes.set_xticks(drawn[0].x, [f"{value:g}" for value in drawn[0].x])
            axes.xaxis.set_minor_formatter(NullFormatter())
        figure.suptitle(_titled(title, curves, SEEDS))
        figure.savefig(path, metadata={"Software": None})


def _logarithmic(axes: Axes) -> None:
    """A logarithmic scale with numbers at 1, 2 and 5 times powers of ten."""
    axes.set_yscale("log")
    _plain_numbers(axes.yaxis)


def _plain_numbers(axis: Axis) -> None:
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def _titled(title: str, curves: Sequence[Curve], note: str) -> str:
    """The title, with a line that explains the bands if there are any."""
    return f"{title}\n{note}" if any(curve.band is not None for curve in curves) else title


def _panels(path: Path, panels: Panels, title: str, *, xlabel: str, ylabel: str, **axis: Any):
    """Axes side by side, at most three in a row, with one legend for all of them."""
    count = len(panels)
    columns = 2 if count == 4 else min(count, 3)
    rows = -(-count // columns)
    with mpl.rc_context(STYLE):
        size = (3.4 * max(columns, 2), 3.0 * rows + 0.9)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
        handles: dict[str, Any] = {}
        for axes, (name, curves) in zip(grid, panels.items(), strict=False):
            _draw(axes, curves)
            axes.set(title=name, **axis)
            handles |= {line.get_label(): line for line in axes.lines}
        for axes in grid[count:]:
            axes.set_visible(False)
        for axes in grid[max(0, count - columns) : count]:
            axes.set_xlabel(xlabel)
            axes.tick_params(labelbottom=True)
        for axes in grid[::columns]:
            axes.set_ylabel(ylabel)
        figure.suptitle(title)
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=max(columns, 2)
        )
        figure.savefig(path, metadata={"Software": None})


def rates(path: Path, contents: Sequence[Curve], *, title: str) -> None:
    """Test accuracy over dropout rates, at equal distances on the axis."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.subplots()
        values = sorted({rate for curve in contents for rate in curve.x})
        placed = [dataclasses.replace(c, x=np.searchsorted(values, c.x)) for c in contents]
        _draw(axes, placed)
        axes.set_xticks(range(len(values)), [f"{value:g}" for value in values])
        axes.set(
            title=_titled(title, contents, SEEDS),
            xlabel="dropout rate p",
            ylabel="test accuracy (%)",
        )
        axes.legend()
        figure.savefig(path, metadata={"Software": None})


def _draw(axes: Axes, curves: Sequence[Curve], *, markers: bool = True) -> None:
    for curve in curves:
        color = f"C{curve.color}"
        axes.plot(
            curve.x,
            curve.y,
            color=color,
            linestyle="--" if curve.dashed else "-",
            marker="o" if markers and len(curve.x) < 12 else None,
            markersize=4,
            label=curve.label,
        )
        if curve.band is not None:
            axes.fill_between(curve.x, *curve.band, color=color, alpha=0.15, linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
