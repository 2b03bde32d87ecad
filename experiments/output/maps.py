"""The map of where a solver layer pays, from the rows of `experiments.map`.

A cell holds the networks of one width and schedule; its controls are the network without dropout and the one
with dropout. With v and a the means over the seeds of validation and test accuracy,

    rate of dropout, τ and test of each method, solver of the cell:   argmax v,
    gain of a network over both controls:                             a − max(a_none, a_dropout).
"""

import dataclasses
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from experiments.output import plots
from experiments.output.rows import METHODS, Row, Rows, Table, frame

CONTROLS = ("none", "dropout")
TESTS = {"": "sampled", "full_gradient_": "full gradient"}
"""Prefixes of the accuracies of a network that samples, and how it is tested."""
CAPTION = """\
Solver: of each cell the method, τ and test, sampled or along the full gradient, with the best mean validation
accuracy over the seeds; the rate p of dropout is chosen likewise. Over no dropout, over dropout: difference
in test accuracy, points, mean over the seeds (from the least to the greatest). Time: seconds of an epoch,
with the scores of the validation images, over those without dropout, measured in this run. Pays: ahead of
both controls in every seed; of networks that do not differ, one is ahead of another in all n seeds by chance
in 1 of 2ⁿ cells."""
MARKERS = {"none": "s", "dropout": "D"}
"""Of the controls; the solvers have circles."""


@dataclasses.dataclass(frozen=True)
class Network:
    """One network of a cell, over its seeds.

    Attributes:
      name: name in tables.
      method: what its marked layers are.
      parameter: p or τ, as text.
      validation: mean accuracy; −∞ where a seed diverged.
      test: accuracy of each seed, by the test with the better validation accuracy.
      how: that test; "" for a network that does not sample.
      seconds: mean seconds of an epoch.
    """

    name: str
    method: str
    parameter: str
    validation: float
    test: Mapping[int, float]
    how: str
    seconds: float

    def gains(self, control: "Network") -> np.ndarray:
        """Test accuracy minus a control's, of each seed that both have."""
        return np.array([self.test[k] - control.test[k] for k in self.test if k in control.test])

    @property
    def label(self) -> str:
        """Method, parameter and test."""
        words = f"{METHODS[self.method]} {self.parameter}".strip()
        return f"{words}, {self.how}" if self.how else words


@dataclasses.dataclass(frozen=True)
class Cell:
    """The networks of one width and schedule, in the order of the rows."""

    width: float
    epochs: int
    networks: tuple[Network, ...]

    @property
    def title(self) -> str:
        """Width and schedule."""
        return f"LeNet ×{self.width:g}, {self.epochs} epochs"

    @property
    def chosen(self) -> dict[str, Network]:
        """For each method, the network of the best validation accuracy."""
        ascending = sorted(self.networks, key=lambda network: network.validation)
        return {each.method: each for each in ascending if each.test}

    @property
    def controls(self) -> tuple[Network, ...]:
        """No dropout, and dropout at its best rate; () unless there are both."""
        found = tuple(self.chosen[method] for method in CONTROLS if method in self.chosen)
        return found if len(found) == len(CONTROLS) else ()

    @property
    def solver(self) -> Network | None:
        """The network of the best validation accuracy that is no control."""
        solvers = [n for method, n in self.chosen.items() if method not in CONTROLS]
        return max(solvers, key=lambda network: network.validation, default=None)

    def gains(self, network: Network) -> np.ndarray:
        """Of each seed, over the control of the better mean; empty where there are not both controls."""
        each = [network.gains(control) for control in self.controls]
        return min(each, key=np.mean) if each and all(map(len, each)) else np.array([])

    def pays(self, network: Network) -> bool:
        """Whether a network is ahead of both controls in every seed."""
        each = [network.gains(control) for control in self.controls]
        return bool(each) and all(len(gains) > 0 and gains.min() > 0 for gains in each)

    def time(self, network: Network) -> float:
        """Seconds of an epoch over those without dropout."""
        return network.seconds / self.chosen["none"].seconds


def is_map(rows: Iterable[Row]) -> bool:
    """Whether the rows are of `experiments.map`."""
    return any("tau" in row for row in rows)


def epoch_seconds(rows: Rows) -> dict[tuple[str, int], float]:
    """Of each network and seed the median seconds of an epoch, without the first, which compiles.

    Of a single epoch, its seconds.
    """

    def median(seconds: Table) -> float:
        each = np.diff([0.0, *seconds])
        return float(np.median(each[1:] if len(each) > 1 else each))

    return frame(rows, "epoch").groupby(["name", "seed"])["seconds"].agg(median).to_dict()


def cells(rows: Rows) -> list[Cell]:
    """The cells of the map by schedule and width; [] for other commands' rows."""
    if not is_map(rows):
        return []
    tests = [f"{split}{prefix}accuracy" for split in ("", "validation_") for prefix in TESTS]
    finals, seconds = frame(rows, "final", *tests), epoch_seconds(rows)
    finals["seconds"] = [
        seconds.get(key) for key in zip(finals["name"], finals["seed"], strict=True)
    ]
    return [
        Cell(width, epochs, tuple(_network(each) for _, each in group.groupby("name", sort=False)))
        for (epochs, width), group in finals.groupby(["epochs", "width"])
    ]


def _network(finals: Table) -> Network:
    first = finals.iloc[0]
    about = first["name"], first["method"], _parameter(first)
    if finals["accuracy"].isna().any():
        return Network(*about, -np.inf, {}, "", np.nan)
    tests = [prefix for prefix in TESTS if finals[f"{prefix}accuracy"].notna().all()]
    means = {prefix: finals[f"validation_{prefix}accuracy"].mean() for prefix in tests}
    best = max(tests, key=lambda prefix: means[prefix])
    test = finals.set_index("seed")[f"{best}accuracy"].to_dict()
    how = TESTS[best] if len(tests) > 1 else ""
    return Network(*about, means[best], test, how, finals["seconds"].mean())


def _parameter(row: Row) -> str:
    if pd.notna(row["tau"]):
        return f"τ = {row['tau']:g} n"
    return f"p = {row['dropout_rate']:g}" if pd.notna(row["dropout_rate"]) else ""


def completed(rows: Rows) -> Rows:
    """The rows with seconds of an epoch, and with dropout at its chosen rates as what others gain over.

    Rows of other commands are returned as they are.
    """
    if not is_map(rows):
        return rows
    best = {c.chosen["dropout"].name for c in cells(rows) if "dropout" in c.chosen}
    seconds = epoch_seconds(rows)
    return [
        {
            **row,
            "arm": "dropout" if row["name"] in best else row["arm"],
            "epoch_seconds": seconds.get((row["name"], row["seed"])),
        }
        for row in rows
    ]


def answer(contents: Sequence[Cell]) -> str:
    """Whether a solver pays: a sentence, and a table with a line for each cell; "" for no cells."""
    if not contents:
        return ""
    lines = [_line(cell) for cell in contents if cell.solver and cell.controls]
    if not lines:
        return sentence(contents)
    table = pd.DataFrame(lines).to_markdown(index=False, disable_numparse=True)
    return "\n\n".join([sentence(contents), table, CAPTION])


def sentence(contents: Sequence[Cell]) -> str:
    """In how many cells the chosen solver is ahead of both controls."""
    pays = [cell.pays(cell.solver) for cell in contents if cell.solver and cell.controls]
    if not pays:
        return "No cell of the map has both controls and a solver."
    where = f"In {sum(pays)} of {len(pays)} cells" if any(pays) else "In no cell"
    return (
        f"{where} of the map, the solver that the validation images choose is ahead of both controls, "
        "no dropout and dropout at its best rate, in every seed."
    )


def _line(cell: Cell) -> dict[str, str]:
    solver, (none, dropout) = cell.solver, cell.controls
    assert solver is not None
    return {
        "cell": cell.title,
        "solver": solver.label,
        "test %": f"{np.mean(list(solver.test.values())):.2f}",
        "over no dropout": _spread(solver.gains(none)),
        "over dropout": _spread(solver.gains(dropout)),
        "best p": dropout.parameter.removeprefix("p = "),
        "time": f"× {cell.time(solver):.2f}",
        "pays": "yes" if cell.pays(solver) else "no",
    }


def _spread(gains: np.ndarray) -> str:
    """Mean over the seeds, and from the least to the greatest."""
    if not len(gains):
        return ""
    ends = f" ({gains.min():+.2f} to {gains.max():+.2f})" if len(gains) > 1 else ""
    return f"{gains.mean():+.2f}{ends}"


def draw(path: Path, contents: Sequence[Cell], *, title: str) -> None:
    """Gains over both controls against time: a row of panels for each schedule, a column for each width."""
    schedules = sorted({cell.epochs for cell in contents})
    widths = sorted({cell.width for cell in contents})
    size = (max(7.0, 3.3 * len(widths)), 2.8 * len(schedules) + 1.4)
    with plots.figure(path, size) as drawn:
        grid = drawn.subplots(len(schedules), len(widths), squeeze=False, sharex=True, sharey=True)
        methods = dict.fromkeys(n.method for cell in contents for n in cell.networks)
        colors = {m: f"C{k}" for k, m in enumerate(m for m in methods if m not in CONTROLS)}
        for axes in grid.ravel():
            axes.set_visible(False)
        for cell in contents:
            axes = grid[schedules.index(cell.epochs), widths.index(cell.width)]
            axes.set_visible(True)
            axes.set(title=cell.title)
            axes.margins(x=0.2)
            for network in cell.networks:
                _point(axes, cell, network, colors.get(network.method, "0.35"))
        _shade(grid)
        for axes in grid[:, 0]:
            axes.set_ylabel("gain over both controls (points)")
        for axes in grid[-1]:
            axes.set_xlabel("seconds of an epoch, × no dropout")
        drawn.suptitle(f"{title}\n{textwrap.fill(sentence(contents), round(11 * size[0]))}")
        plots.legend(drawn, grid.ravel())


def _point(axes: Axes, cell: Cell, network: Network, color: str) -> None:
    """A chosen network filled, with a line from the least to the greatest seed; another solver hollow."""
    is_chosen, gains = cell.chosen.get(network.method) == network, cell.gains(network)
    if not len(gains) or not (is_chosen or network.method not in CONTROLS):
        return
    place = cell.time(network), float(gains.mean())
    axes.plot(
        *place,
        color=color,
        linestyle="none",
        marker=MARKERS.get(network.method, "o"),
        markersize=6,
        markerfacecolor=color if is_chosen else "none",
        label=METHODS[network.method] if is_chosen else "_",
    )
    if is_chosen:
        axes.vlines(place[0], gains.min(), gains.max(), color=color, linewidth=1.2)
    axes.annotate(
        network.parameter.removesuffix(" n").replace(" ", ""),
        place,
        (6, 2) if is_chosen else (-6, 2),
        textcoords="offset points",
        ha="left" if is_chosen else "right",
        fontsize="x-small",
        color=color,
    )


def _shade(grid: np.ndarray) -> None:
    """The half of each panel where a network is ahead of both controls."""
    low, high = grid[0, 0].get_ylim()
    low, high = min(low, -0.2), max(high, 0.2)
    for axes in grid.ravel():
        axes.axhline(0, color="0.3", linewidth=0.8)
        axes.axhspan(0, high, color="C2", alpha=0.08, linewidth=0)
        axes.set_ylim(low, high)
    words, place = "ahead of both controls", (0.02, 0.98)
    grid[0, 0].annotate(
        words, place, xycoords="axes fraction", va="top", fontsize="small", color="0.35"
    )
