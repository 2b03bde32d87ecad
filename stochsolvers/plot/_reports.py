"""Pictures of reports on whole networks; the reports' own `plot` methods are calls of these."""

import math
from typing import TYPE_CHECKING, Any

from stochsolvers import _checks
from stochsolvers.plot import _axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def report(report: Any, *, ax: "Axes | None" = None) -> "Axes":
    """The picture of a report: of norms, of certificates, of a replacement.

    Args:
      report: what `lipschitz_report`, `certify` or `replace_layers` returns, or any object with a method
        `plot(ax)`.
      ax: matplotlib `Axes`; by default those of a new figure.

    Returns:
      the `Axes`.

    Raises:
      ImportError: without matplotlib.
      ValueError: for other objects.
    """
    draw: Any = getattr(report, "plot", None)
    if not callable(draw):
        _checks.fail("report", "a report with a method plot(ax)", type(report).__name__)
    drawn: Any = draw(ax)
    return drawn


def norms(report: Any, *, ax: "Axes | None" = None) -> "Axes":
    """A bar for each layer's norm, from the first layer down; see `LipschitzReport.plot`."""
    rows = report.rows
    ax = _axes.axes(ax, "LipschitzReport.plot", (6.4, 1.0 + 0.3 * len(rows)))
    widths = [row.upper if math.isfinite(row.upper) else 0.0 for row in rows]
    colors = [_axes.COLORS[1] if row.note else _axes.COLORS[0] for row in rows]
    ax.barh(range(len(rows)), widths, height=0.7, color=colors)
    for place, (row, width) in enumerate(zip(rows, widths, strict=True)):
        if math.isfinite(row.upper) and not row.is_tight:
            ends = [row.lower, row.upper]
            ax.plot(ends, [place, place], color="black", marker="|", linewidth=1)
        if row.note:
            at = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
            ax.annotate(row.note, (width, place), **at)
    ax.axvline(1.0, color="0.4", linestyle="--", linewidth=1)
    _axes.categories(ax, [row.name for row in rows])
    ax.set_xlabel("spectral norm")
    bounded = math.isfinite(report.bound)
    ax.set_title(f"Lipschitz bound {report.bound:.3g}" if bounded else "no Lipschitz bound")
    return ax


def changes(report: Any, *, ax: "Axes | None" = None) -> "Axes":
    """Two bars for each layer: the change of its output and of the model's; see `ReplacementReport.plot`."""
    rows = report.rows
    ax = _axes.axes(ax, "ReplacementReport.plot", (6.4, 1.2 + 0.4 * len(rows)))
    bars = (
        ("the layer's output", [row.change for row in rows], -0.2),
        ("the model's, by it alone", [row.model_change for row in rows], 0.2),
    )
    for (label, values, offset), color in zip(bars, _axes.COLORS, strict=False):
        widths = [0.0 if math.isnan(value) else 100 * value for value in values]
        places = [place + offset for place in range(len(rows))]
        ax.barh(places, widths, height=0.38, color=color, label=label)
    _axes.categories(ax, [row.name for row in rows])
    ax.set_xlabel("relative change in percent")
    if not math.isnan(report.model_change):
        ax.set_title(f"all together change the model's output by {report.model_change:.1%}")
    _axes.legend(ax, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return ax


def certificates(report: Any, *, ax: "Axes | None" = None) -> "Axes":
    """A dot for each solver layer's certified gap; see `CertificateReport.plot`."""
    rows = report.rows
    ax = _axes.axes(ax, "CertificateReport.plot", (6.4, 1.2 + 0.32 * len(rows)))
    known = [(i, row.relative_gap) for i, row in enumerate(rows) if 0 < row.relative_gap < math.inf]
    ax.plot([gap for _, gap in known], [i for i, _ in known], "o", color=_axes.COLORS[0])
    for place, row in enumerate(rows):
        if math.isinf(row.relative_gap) or row.relative_gap == 0:
            text = "solved exactly" if row.relative_gap == 0 else "no finite certificate"
            at = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 9}
            ax.annotate(text, (0.02, place), color=_axes.COLORS[1 if row.relative_gap else 2], **at)
    ax.set_xscale("log")
    _axes.categories(ax, [row.name for row in rows])
    ax.set_xlabel("certified gap / |objective|, of the batch's worst example")
    return ax
