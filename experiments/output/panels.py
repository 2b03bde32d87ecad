"""The curves of the pictures, from stored rows."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments import networks
from experiments.output.plots import Curve

Row = Mapping[str, Any]
Rows = Sequence[Row]
Panels = dict[str, list[Curve]]
PROGRESS = {"train_loss": "training loss", "validation_accuracy": "validation accuracy (%)"}
DESCENT = ("objective", "objective − lower bound, relative", "validation accuracy (%)")
PATH = {"validation_accuracy": "validation accuracy (%)", "neurons": "neurons that are not zero"}
PLAIN = ("dropout", "baseline", "backpropagation", "Adam", "SGD")
"""Words in the labels of networks that the others are compared with; their lines are dashed."""


def name_of(row: Row) -> str:
    """The name of a row's network."""
    names: Mapping[Any, str] = networks.NAMES
    return row.get("name") or f"{row['variant']} {names.get(row['method'], row['method'])}"


def title_of(rows: Rows) -> str:
    """Networks and data sets: "LeNet on digits"; every variant of table 2 is a LeNet."""
    kinds = ("LeNet" if row.get("variant") else name_of(row).split()[0] for row in rows)
    datasets = (str(row["dataset"]) for row in rows)
    return " on ".join(", ".join(dict.fromkeys(names)) for names in (kinds, datasets))


def ordered(rows: Rows) -> list[Row]:
    """The rows in ascending order of their studies' dropout rates; in the given order without rates."""
    rates = {row["study"]: rate for row in rows if (rate := _rate(row)) is not None}
    return sorted(rows, key=lambda row: rates.get(row.get("study"), 0.0))


def _rate(row: Row) -> float | None:
    return row.get("config", {}).get("rate") if row.get("study") else None


def grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    """The rows grouped by a key, in order of appearance."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def diverged(finals: Rows) -> str:
    """How many seeds of a network diverged, in words; "" for none."""
    count = sum(row["accuracy"] is None for row in finals)
    return f"diverged {count} of {len(finals)}" if count else ""


def accuracy(rows: Rows) -> Panels:
    """Validation accuracy over epochs, mean over the seeds, with a band from least to greatest.

    Nothing for rows of objectives: some are of iterations, and `descent` draws them over seconds.
    """
    if is_descent(rows):
        return {}
    labels, colors = _labels(rows), _colors(rows)
    finals = grouped((row for row in rows if row["kind"] == "final"), name_of)
    panels: Panels = {}
    for name, group in grouped((r for r in rows if r["kind"] == "epoch"), name_of).items():
        title, label = labels[name]
        epochs = grouped(group, lambda row: row["epoch"])
        x = sorted(epochs)
        values = [[row["validation_accuracy"] for row in epochs[k]] for k in x]
        missing = diverged(finals.get(name, []))
        full = f"{label}, {missing}" if missing else label
        curve = _over_seeds(full, np.array(x), values, colors[label], plain=_is_plain(label))
        panels.setdefault(title, []).append(curve)
    return panels


def progress(rows: Rows) -> dict[str, Panels]:
    """Training loss and validation accuracy over epochs and over seconds, beside those of backpropagation.

    Seconds are the means over the seeds of the time since the start: compilation, training, and scoring
    after each epoch. Nothing for rows without backpropagation.
    """
    if not any(row.get("method") == "backpropagation" for row in rows):
        return {}
    labels, colors = _labels(rows), _colors(rows)
    contents: dict[str, Panels] = {}
    for name, group in grouped((r for r in rows if r["kind"] == "epoch"), name_of).items():
        label = labels[name][1]
        epochs = grouped(group, lambda row: row["epoch"])
        seconds = [float(np.mean([row["seconds"] for row in epochs[k]])) for k in sorted(epochs)]
        axes = {"epoch": sorted(epochs), "seconds": seconds}
        for key, ylabel in PROGRESS.items():
            values = [[row[key] for row in epochs[k]] for k in sorted(epochs)]
            for xlabel, x in axes.items():
                curve = _over_seeds(
                    label, np.array(x), values, colors[label], plain=_is_plain(label)
                )
                contents.setdefault(ylabel, {}).setdefault(xlabel, []).append(curve)
    return contents


def is_descent(rows: Rows) -> bool:
    """Whether the rows are of methods that minimise one objective."""
    return any(row["kind"] == "epoch" and "objective" in row for row in rows)


def bounds(rows: Rows) -> dict[tuple[Any, ...], float]:
    """The best lower bound on the objective of each family of networks, data set, study and seed."""
    found: dict[tuple[Any, ...], float] = {}
    for row in rows:
        if row["kind"] == "final" and row.get("lower_bound") is not None:
            key = _family(row)
            found[key] = max(row["lower_bound"], found.get(key, 0.0))
    return found


def relative_gap(row: Row, best: Mapping[tuple[Any, ...], float]) -> float | None:
    """(objective − best lower bound)/objective, None where there is no bound or no objective."""
    bound, objective = best.get(_family(row)), row.get("objective")
    return None if bound is None or not objective else (objective - bound) / objective


def _family(row: Row) -> tuple[Any, ...]:
    return row["dataset"], row.get("study"), row["seed"], row.get("family")


def descent(rows: Rows) -> Panels:
    """Objective, its relative distance from the best lower bound, and accuracy over seconds.

    Of the first seed: another one may have another β. Seconds are of compilation and training.
    """
    panels: Panels = {}
    if not is_descent(rows):
        return panels
    labels, colors, best = _labels(rows), _colors(rows), bounds(rows)
    seed = rows[0]["seed"]
    epochs = [row for row in rows if row["kind"] == "epoch" and row["seed"] == seed]
    for name, group in grouped(epochs, name_of).items():
        label = labels[name][1]
        x = np.array([row["seconds"] for row in group])
        gaps = [relative_gap(row, best) for row in group]
        lines = (
            [row["objective"] for row in group],
            None if None in gaps else gaps,
            [row["validation_accuracy"] for row in group],
        )
        for title, values in zip(DESCENT, lines, strict=True):
            if values is not None:
                curve = Curve(label, x, np.array(values), colors[label], _is_plain(label))
                panels.setdefault(title, []).append(curve)
    return panels


def path(rows: Rows) -> Panels:
    """Validation accuracy and neurons over β/β_max, mean over the seeds, with a band."""
    panels: Panels = {}
    points = [point for row in rows if row["kind"] == "final" for point in row.get("path", ())]
    groups = grouped(points, lambda point: point["fraction"])
    x = sorted(groups)
    for number, (key, title) in enumerate(PATH.items()):
        values = [[point[key] for point in groups[fraction]] for fraction in x]
        if values:
            panels[title] = [_over_seeds(title, np.array(x), values, number, plain=False)]
    return panels


def residuals(rows: Rows) -> Panels:
    """Relative residuals inside the solvers of the first seed, one panel for each layer."""
    labels, colors = _labels(rows), _colors(rows)
    panels: Panels = {}
    curves = grouped(
        (row for row in rows if row["kind"] == "residuals"),
        lambda row: (name_of(row), row["layer"], row["deterministic"]),
    )
    for (name, layer, deterministic), (row, *_) in curves.items():
        title, label = labels[name]
        how = row.get("how") or ("full gradient" if deterministic else "sampled")
        low, middle, high = (np.array(row[key]) for key in ("low", "middle", "high"))
        x, band = 1 + np.arange(len(middle)), None if deterministic else (low, high)
        curve = Curve(f"{label}, {how}", x, middle, colors[label], deterministic, band)
        panels.setdefault(f"{title}, {layer} layer", []).append(curve)
    return panels


def rates(rows: Rows) -> list[Curve]:
    """Test accuracy over the dropout rate, mean over the seeds; a gap where a seed diverged."""
    labels, colors = _labels(rows), _colors(rows)
    finals = [row for row in rows if row["kind"] == "final" and _rate(row) is not None]
    curves = []
    for label, group in grouped(finals, lambda row: labels[name_of(row)][1]).items():
        points = grouped(group, _rate)
        x = sorted(points)
        values = [
            [np.nan if diverged(points[rate]) else row["accuracy"] for row in points[rate]]
            for rate in x
        ]
        curve = _over_seeds(label, np.array(x), values, colors[label], plain=_is_plain(label))
        curves.append(curve)
    return curves


def _over_seeds(
    label: str, x: np.ndarray, values: Sequence[Sequence[float]], color: int, *, plain: bool
) -> Curve:
    low, mean, high = (np.array([f(each) for each in values]) for f in (np.min, np.mean, np.max))
    band = (low, high) if max(map(len, values)) > 1 else None
    return Curve(label, x, mean, color, plain, band)


def _is_plain(label: str) -> bool:
    return any(word in label for word in PLAIN)


def _colors(rows: Rows) -> dict[str, int]:
    """A colour for each label, the same in every picture of the rows."""
    labels = dict.fromkeys(label for _, label in _labels(rows).values())
    return {label: k for k, label in enumerate(labels)}


def _labels(rows: Rows) -> dict[str, tuple[str, str]]:
    """For each network, the words that all names of its comparison begin with, and the other words."""
    labels = {}
    for group in grouped(rows, lambda row: row.get("study") or row.get("variant")).values():
        names = list(dict.fromkeys(map(name_of, group)))
        words = [name.split() for name in names]
        common = 0
        for column in zip(*(name[:-1] for name in words), strict=False):
            if len(set(column)) > 1:
                break
            common += 1
        for name, parts in zip(names, words, strict=True):
            labels[name] = " ".join(parts[:common]), " ".join(parts[common:])
    return labels
