"""The picture of a replacement."""

import math
from typing import Any


def bar_chart(report: Any, ax: Any = None) -> Any:
    """Two bars for each layer: the change of its output and of the model's; see `ReplacementReport.plot`."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "ReplacementReport.plot needs matplotlib: pip install 'stochsolvers[plot]'"
        ) from error
    rows = report.rows
    if ax is None:
        _, ax = plt.subplots(figsize=(6.4, 1.2 + 0.4 * len(rows)), layout="constrained")
    bars = (
        ("the layer's output", [row.change for row in rows], -0.2, "C0"),
        ("the model's, by it alone", [row.model_change for row in rows], 0.2, "C1"),
    )
    for label, values, offset, color in bars:
        widths = [0.0 if math.isnan(value) else 100 * value for value in values]
        places = [place + offset for place in range(len(rows))]
        ax.barh(places, widths, height=0.38, color=color, label=label)
    ax.set_yticks(range(len(rows)), [row.name for row in rows])
    ax.invert_yaxis()
    ax.set_xlabel("relative change in percent")
    if not math.isnan(report.model_change):
        ax.set_title(f"all together change the model's output by {report.model_change:.1%}")
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    return ax
