"""The table of methods that minimise one objective; see `experiments.convex`."""

from collections.abc import Mapping
from typing import Any

from experiments.output import panels, runs
from experiments.output.panels import Rows

COLUMNS = (
    "family",
    "objective",
    "lower_bound",
    "gap",
    "bound",
    "neurons",
    "fraction",
    "search_seconds",
)
"""Further columns of the summary."""
CAPTION = """\
Objective: Σ_j ½(f(x_j) − y_j)² + (β/2)(||W||² + ||a||²), all outputs together, at the last weights. Relative
gap: (objective − lower bound)/objective, with the best lower bound of the networks with the same activation:
"exact" is the certificate of the gated program, which bounds every network with its gates; "bound" is proved
for ReLU networks of any width, and loose; there is none for more than 300 features. Neurons: those that are
not zero (of Adam and SGD above 0.001 times the largest). The gated program chose β/β_max on the validation
images, learning rates were chosen likewise from a grid, and the test images were read once. Seconds:
compilation and training with the rate that was chosen, without the choices and the scores. ± is the sample
standard deviation over seeds (n − 1)."""
HEADER = [
    "network",
    "test %",
    "validation %",
    "objective",
    "relative gap",
    "bound",
    "neurons",
    "seconds",
]


def summaries(rows: Rows) -> list[dict[str, Any]]:
    """Means over the seeds of what only these rows have, in the order of the networks; [] for other rows."""
    if not panels.is_descent(rows):
        return []
    best = panels.bounds(rows)
    finals = [row for row in rows if row["kind"] == "final"]
    groups = panels.grouped(finals, lambda row: (row["dataset"], panels.name_of(row)))
    return [_summary(group, best) for group in groups.values()]


def _summary(group: Rows, best: Mapping[tuple[Any, ...], float]) -> dict[str, Any]:
    gaps = [{"gap": panels.relative_gap(row, best)} for row in group]
    means = {
        key: _mean(group, key) for key in ("objective", "lower_bound", "neurons", "search_seconds")
    }
    fractions = dict.fromkeys(f"{row['fraction']:g}" for row in group if "fraction" in row)
    bounds = dict.fromkeys(row["bound"] for row in group if "bound" in row)
    return {
        **means,
        "gap": _mean(gaps, "gap"),
        "family": group[0].get("family"),
        "bound": ", ".join(bounds),
        "fraction": " ".join(fractions),
    }


def _mean(group: Rows, key: str) -> float | None:
    values = [row.get(key) for row in group]
    return None if None in values else sum(values) / len(values)  # pyright: ignore


def cells(row: Mapping[str, Any]) -> list[str]:
    """Those of `HEADER` for a row of the summary."""
    return [
        row["name"],
        row["diverged"] or runs.percent(row["accuracy"], row["seed_std"]),
        runs.percent(row["validation_accuracy"], row["validation_seed_std"]),
        _number(row["objective"], ".5g"),
        _number(row["gap"], ".2g"),
        row["bound"],
        _number(row["neurons"], ".0f"),
        _number(row["train_seconds"], ".1f"),
    ]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
