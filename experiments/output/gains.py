"""The table and the picture of layers that were swapped in networks of today; see `experiments.swap`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from experiments.output import panels, plots, runs
from experiments.output.panels import Rows

COLUMNS = ("start_validation_accuracy", "start_seed_std")
"""Further columns of the summary."""
HEADER = ["network", "test %", "± trials", "full gradient", "as swapped", "validation %", "gain"]
CAPTION = """\
Test accuracy after the last epoch, the test images read once. As swapped: validation accuracy of the trained
network with the solvers in place, before it is finetuned. Gain: test accuracy over that of the network as it
was, finetuned as long, seed by seed. ± is the sample standard deviation over seeds (n − 1); ± trials that
over repeated tests of one network (n), which samples; full gradient: the same network without sampling."""

TICKS = (-50, -20, -5, -2, -1, 0, 1, 2, 5, 20, 50)
Gains = dict[str, dict[str, list[float]]]
"""For each network and arm, the gain of each seed."""


def are_swapped(rows: Rows) -> bool:
    """Whether the rows are of `experiments.swap`."""
    return any("start_validation_accuracy" in row for row in rows)


def summaries(rows: Rows) -> list[dict[str, Any]]:
    """Means over the seeds of what only these rows have, in the order of the networks; [] for other rows."""
    if not are_swapped(rows):
        return []
    finals = [row for row in rows if row["kind"] == "final"]
    groups = panels.grouped(finals, lambda row: (row["dataset"], panels.name_of(row)))
    return [dict(zip(COLUMNS, _start(group), strict=True)) for group in groups.values()]


def _start(group: Rows) -> tuple[float | None, float | None]:
    values: list[Any] = [row.get(COLUMNS[0]) for row in group]
    if None in values:
        return None, None
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def cells(row: Mapping[str, Any], common: Sequence[str]) -> list[str]:
    """A line of the table, from the cells that all tables have."""
    name, accuracy, trials, full, validation, gain, _ = common
    start = runs.percent(row["start_validation_accuracy"], row["start_seed_std"])
    return [name, accuracy, trials, full, start, validation, gain]


def of(rows: Rows) -> Gains:
    """The gains of the rows, {} of other commands' rows; seeds that diverged are left out."""
    if not are_swapped(rows):
        return {}
    finals = [r for r in rows if r["kind"] == "final" and r["accuracy"] is not None]
    controls = {(r["study"], r["seed"]): r["accuracy"] for r in finals if r["arm"] == "control"}
    gains: Gains = {}
    for row in finals:
        control = controls.get((row["study"], row["seed"]))
        if COLUMNS[0] in row and control is not None:
            title, label = panels.name_of(row).split(" ", 1)
            values = gains.setdefault(title, {}).setdefault(label, [])
            values.append(row["accuracy"] - control)
    return gains


def draw(path: Path, contents: Gains, *, title: str) -> None:
    """A bar for each arm, its mean over the seeds, and a dot for each seed; logarithmic beyond one point."""
    arms = list(dict.fromkeys(arm for group in contents.values() for arm in group))
    every = [value for group in contents.values() for values in group.values() for value in values]
    low, high = min(*every, -1.0), max(*every, 1.0)
    with mpl.rc_context(plots.STYLE):
        size = (2.6 + 2.2 * len(contents), 1.2 + 0.35 * len(arms))
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(1, len(contents), squeeze=False, sharex=True, sharey=True)[0]
        for axes, (name, group) in zip(grid, contents.items(), strict=True):
            for place, arm in enumerate(arms):
                values = group.get(arm, [])
                if values:
                    axes.barh(place, np.mean(values), color="C0", alpha=0.4, height=0.6)
                    axes.plot(values, [place] * len(values), "o", color="C0", markersize=4)
            axes.axvline(0, color="0.3", linewidth=0.8)
            axes.set(title=name, xlabel="gain (points)", axisbelow=True)
            axes.set_xscale("symlog", linthresh=1.0, linscale=0.5)
            axes.set_xlim(1.4 * low, 1.4 * high)
            shown = [tick for tick in TICKS if low <= tick <= high]
            axes.set_xticks(shown, [f"{tick:g}" for tick in shown])
            axes.minorticks_off()
        grid[0].set_yticks(range(len(arms)), arms)
        grid[0].invert_yaxis()
        figure.suptitle(title)
        figure.savefig(path, metadata={"Software": None})
