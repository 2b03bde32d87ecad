"""Pictures of a run, from the lines of `panels`, in the style of `stochsolvers.plot`."""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

import stochsolvers as ss
from experiments.output import runs


@dataclasses.dataclass(frozen=True)
class Curve:
    """One line of a picture.

    Attributes:
      label: text in the legend.
      x: abscissas.
      y: ordinates.
      color: index in the colours of `stochsolvers.plot`.
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
"""Lines by the titles of their axes."""
SEEDS = "mean over the seeds, band from least to greatest"
IMAGES = "of one seed: median over images, band around the middle 80%"
STYLE: Any = ss.plot.STYLE
COLORS = (*ss.plot.COLORS, "0.6")
TICKS = (-50, -20, -5, -2, -1, 0, 1, 2, 5, 20, 50)
"""Of gains in points."""


@contextlib.contextmanager
def figure(path: Path, size: tuple[float, float]) -> Iterator[Figure]:
    """A figure in the style of `stochsolvers.plot`, saved to the path at the end of the block."""
    with runs.whole_file(path) as partial, mpl.rc_context(STYLE):
        drawn = Figure(figsize=size)
        yield drawn
        drawn.savefig(partial, metadata={"Software": None})


def accuracy(path: Path, contents: Panels, *, title: str) -> None:
    """Validation accuracy over epochs, one panel for each comparison."""
    title = _titled(title, contents.values())
    _panels(path, contents, title, xlabel="epoch", ylabel="validation accuracy (%)")


def residuals(path: Path, contents: Panels, *, title: str) -> None:
    """Residuals over iterations on a logarithmic scale, one panel for each layer."""
    title = f"{title}\n{IMAGES}"
    ylabel = "‖z$_k$ − z$_{k−1}$‖ / ‖z$_K$‖"
    _panels(path, contents, title, xlabel="iteration k", ylabel=ylabel, yscale="log")


def progress(path: Path, contents: Mapping[str, Panels], *, title: str) -> None:
    """Two rows of axes, loss and accuracy, each over epochs and over seconds; one legend."""
    with figure(path, (7.4, 6.4)) as drawn:
        grid = drawn.subplots(len(contents), 2, squeeze=False, sharex="col", sharey="row")
        for line, (ylabel, panels) in zip(grid, contents.items(), strict=True):
            for axes, (xlabel, curves), below in zip(line, panels.items(), grid[-1], strict=True):
                _draw(axes, curves)
                below.set_xlabel(xlabel)
            line[0].set_ylabel(ylabel)
            values = np.concatenate([c.y for curves in panels.values() for c in curves])
            if values.min() > 0 and values.max() > 5 * values.min():
                _logarithmic(line[0])
        every = [curves for panels in contents.values() for curves in panels.values()]
        drawn.suptitle(_titled(title, every))
        legend(drawn, grid[0, :1])


def descent(path: Path, contents: Panels, *, title: str) -> None:
    """Axes side by side over seconds, of one seed, logarithmic but for percentages, with one legend."""
    ends = [curve.x[-1] for curves in contents.values() for curve in curves]
    xscale = "log" if max(ends) > 20 * min(ends) else "linear"
    with figure(path, (10.2, 4.0)) as drawn:
        grid = drawn.subplots(1, len(contents), squeeze=False)[0]
        for axes, (ylabel, curves) in zip(grid, contents.items(), strict=True):
            _draw(axes, curves, markers=False)
            axes.set(xlabel="seconds", ylabel=ylabel, xscale=xscale)
            if xscale == "log":
                _plain_numbers(axes.xaxis)
            else:
                axes.set_xlim(left=0)
            if "%" not in ylabel:
                _logarithmic(axes)
        drawn.suptitle(title)
        legend(drawn, grid[:1])


def path(path: Path, contents: Panels, *, title: str) -> None:
    """Axes side by side over β/β_max."""
    with figure(path, (7.4, 3.4)) as drawn:
        grid = drawn.subplots(1, len(contents), squeeze=False)[0]
        for axes, (ylabel, curves) in zip(grid, contents.items(), strict=True):
            _draw(axes, curves)
            axes.set(xlabel="β/β$_{max}$", ylabel=ylabel, xscale="log")
            axes.set_xticks(curves[0].x, [f"{value:g}" for value in curves[0].x])
            axes.xaxis.set_minor_formatter(NullFormatter())
        drawn.suptitle(_titled(title, contents.values()))


def rates(path: Path, contents: Sequence[Curve], *, title: str) -> None:
    """Test accuracy over dropout rates, at equal distances on the axis."""
    with figure(path, (6.4, 4.2)) as drawn:
        axes = drawn.subplots()
        values = sorted({rate for curve in contents for rate in curve.x})
        _draw(axes, [dataclasses.replace(c, x=np.searchsorted(values, c.x)) for c in contents])
        axes.set_xticks(range(len(values)), [f"{value:g}" for value in values])
        title = _titled(title, [contents])
        axes.set(title=title, xlabel="dropout rate p", ylabel="test accuracy (%)")
        axes.legend()


def gains(path: Path, contents: Mapping[str, Mapping[str, list[float]]], *, title: str) -> None:
    """A row for each arm, its seeds and their mean; logarithmic beyond one point."""
    arms = list(dict.fromkeys(arm for group in contents.values() for arm in group))
    every = [value for group in contents.values() for values in group.values() for value in values]
    low, high = min(*every, -1.0), max(*every, 1.0)
    with figure(path, (2.6 + 2.2 * len(contents), 1.2 + 0.35 * len(arms))) as drawn:
        grid = drawn.subplots(1, len(contents), squeeze=False, sharex=True, sharey=True)[0]
        for axes, (name, group) in zip(grid, contents.items(), strict=True):
            values = {arm: group.get(arm, np.nan) for arm in arms}
            ss.plot.table(values, label="gain (points)", ax=axes)
            axes.axvline(0, color="0.4", linewidth=1)
            axes.set(title=name)
            axes.set_xscale("symlog", linthresh=1.0, linscale=0.5)
            axes.set_xlim(1.4 * low, 5 * high)  # with room for the means as numbers
            shown = [tick for tick in TICKS if low <= tick <= high]
            axes.set_xticks(shown, [f"{tick:g}" for tick in shown])
            axes.minorticks_off()
        drawn.suptitle(title)


def _panels(path: Path, panels: Panels, title: str, *, xlabel: str, ylabel: str, **axis: Any):
    """Axes side by side, at most three in a row, with one legend for all of them."""
    count = len(panels)
    columns = 2 if count == 4 else min(count, 3)
    rows = -(-count // columns)
    with figure(path, (3.4 * max(columns, 2), 3.0 * rows + 0.9)) as drawn:
        grid = drawn.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
        for axes, (name, curves) in zip(grid, panels.items(), strict=False):
            _draw(axes, curves)
            axes.set(title=name, **axis)
        for axes in grid[count:]:
            axes.set_visible(False)
        for axes in grid[max(0, count - columns) : count]:
            axes.set_xlabel(xlabel)
            axes.tick_params(labelbottom=True)
        for axes in grid[::columns]:
            axes.set_ylabel(ylabel)
        drawn.suptitle(title)
        legend(drawn, grid[:count], max(columns, 2))


def legend(drawn: Figure, grid: Iterable[Axes], columns: int | None = None) -> None:
    """One legend below, of all labels of some axes, by default in one row."""
    found = [axes.get_legend_handles_labels() for axes in grid]
    shown = {label: line for pair in found for line, label in zip(*pair, strict=True)}
    place, count = "outside lower center", columns or max(1, len(shown))
    drawn.legend(shown.values(), shown.keys(), loc=place, ncols=count)


def _titled(title: str, panels: Iterable[Sequence[Curve]]) -> str:
    """The title, with a line that explains the bands if there are any."""
    has_bands = any(curve.band is not None for curves in panels for curve in curves)
    return f"{title}\n{SEEDS}" if has_bands else title


def _logarithmic(axes: Axes) -> None:
    """A logarithmic scale with numbers at 1, 2 and 5 times powers of ten."""
    axes.set_yscale("log")
    _plain_numbers(axes.yaxis)


def _plain_numbers(axis: Axis) -> None:
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def _draw(axes: Axes, curves: Sequence[Curve], *, markers: bool = True) -> None:
    for curve in curves:
        color = COLORS[curve.color % len(COLORS)]
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
