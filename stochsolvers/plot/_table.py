"""A table of results as a picture."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from stochsolvers import _checks
from stochsolvers.plot import _axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def table(
    results: Mapping[str, Any],
    *,
    label: str = "",
    baseline: str | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    r"""A row for each method: a dot for each seed, a bar at their mean, and the mean as a number.

    Args:
      results: the values of each method, a number or a sequence over seeds; or for each column (a variant,
        a schedule) a mapping of methods to these: a colour a column, methods in order of first occurrence.
        NaN is a run without a value, such as one that diverged. Of a table of pandas:
        `rows.groupby("method", sort=False)["accuracy"].agg(list).to_dict()`.
      label: of the horizontal axis, with its unit.
      baseline: a method: the values become differences to its mean in the same column, and a line is at zero.
      ax: matplotlib `Axes`; by default those of a new figure.

    Returns:
      the `Axes`.

    Raises:
      ImportError: without matplotlib.
      ValueError: for no results, values that are no numbers, and a baseline that is not among the methods.
    """
    columns = _columns(results)
    methods = list(dict.fromkeys(method for column in columns.values() for method in column))
    if baseline is not None:
        columns = {name: _from_baseline(column, baseline) for name, column in columns.items()}
    count = len(columns)
    ax = _axes.axes(ax, "plot.table", (6.4, 1.0 + 0.32 * count * len(methods)))
    offsets = 0.7 * ((np.arange(count) + 0.5) / count - 0.5)
    half = 0.28 / count
    for i, (name, column) in enumerate(columns.items()):
        color = _axes.COLORS[i % len(_axes.COLORS)]
        for method, values in column.items():
            place, known = methods.index(method) + offsets[i], values[np.isfinite(values)]
            if known.size:
                mean = known.mean()
                ax.plot([mean, mean], [place - half, place + half], color=color, linewidth=2.5)
                ax.plot(
                    known, np.full(known.size, place), "o", color=color, ms=4.5, alpha=0.6, mew=0
                )
                text = f"{mean:+.2f}" if baseline else f"{mean:.2f}"
                right = (max(known.max(), mean), place)
                ax.annotate(
                    text.replace("-", "−"),
                    right,
                    (6, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                    bbox={"facecolor": ax.get_facecolor(), "edgecolor": "none", "pad": 0.5},
                )
        ax.plot([], [], color=color, linewidth=2.5, label=name)
    _axes.categories(ax, methods)
    if baseline is not None:
        ax.axvline(0.0, color="0.4", linewidth=1)
    ax.margins(x=0.12)
    ax.set_xlabel(label)
    if count > 1:
        _axes.legend(ax, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return ax


def _columns(results: Any) -> dict[str, dict[str, np.ndarray]]:
    """Values by column and method; one column "" where there are no columns."""
    wanted = "a mapping of methods to numbers, or of columns to such mappings"
    if not isinstance(results, Mapping) or not results:
        _checks.fail("results", wanted, repr(results))
    nested = all(isinstance(value, Mapping) for value in results.values())
    columns: Mapping[str, Mapping[str, Any]] = results if nested else {"": results}
    return {
        str(name): {str(method): _values(method, one, wanted) for method, one in column.items()}
        for name, column in columns.items()
    }


def _values(method: str, values: float | Sequence[float], wanted: str) -> np.ndarray:
    try:
        return np.atleast_1d(np.asarray(values, np.float64)).ravel()
    except (TypeError, ValueError):
        _checks.fail(f"results of {method!r}", wanted, repr(values))


def _from_baseline(column: Mapping[str, np.ndarray], baseline: str) -> dict[str, np.ndarray]:
    known = column.get(baseline, np.array([]))
    known = known[np.isfinite(known)]
    if not known.size:
        _checks.fail("baseline", f"a method with a result, of {list(column)}", repr(baseline))
    return {method: values - known.mean() for method, values in column.items()}
