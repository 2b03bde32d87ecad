"""The picture of a Lipschitz report; the only place that needs matplotlib."""

import math
from typing import Any


def bar_chart(report: Any, ax: Any = None) -> Any:
    """A bar for each layer's norm, from the first layer down; see `LipschitzReport.plot`."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "LipschitzReport.plot needs matplotlib: pip install 'stochsolvers[plot]'"
        ) from error
    rows = report.rows
    if ax is None:
        _, ax = plt.subplots(figsize=(6.4, 1.0 + 0.3 * len(rows)), layout="constrained")
    places = range(len(rows))
    finite = [math.isfinite(row.upper) for row in rows]
    ax.barh(
        places,
        [row.upper if ok else 0.0 for row, ok in zip(rows, finite, strict=True)],
        height=0.7,
        color=["C1" if row.note else "C0" for row in rows],
    )
    for place, row, ok in zip(places, rows, finite, strict=True):
        if ok and not row.is_tight:
            ax.plot([row.lower, row.upper], [place, place], color="black", marker="|", linewidth=1)
        if row.note:
            start = row.upper if ok else 0.0
            ax.annotate(
                row.note, (start, place), xytext=(4, 0), textcoords="offset points", va="center"
            )
    ax.axvline(1.0, color="0.4", linestyle="--", linewidth=1)
    ax.set_yticks(places, [row.name for row in rows])
    ax.invert_yaxis()
    ax.set_xlabel("spectral norm")
    bounded = math.isfinite(report.bound)
    ax.set_title(f"Lipschitz bound {report.bound:.3g}" if bounded else "no Lipschitz bound")
    ax.spines[["top", "right"]].set_visible(False)
    return ax
