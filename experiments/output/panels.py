"""The lines of the pictures, from stored rows."""

from typing import Any

import numpy as np
import pandas as pd

from experiments.output.plots import Curve
from experiments.output.rows import (
    Rows,
    Table,
    are_implicit,
    are_objectives,
    are_swapped,
    diverged,
    frame,
    gains,
    name_of,
    relative_gaps,
)

Panels = dict[str, list[Curve]]
PROGRESS = {"train_loss": "training loss", "validation_accuracy": "validation accuracy (%)"}
DESCENT = {
    "objective": "objective",
    "gap": "objective − lower bound, relative",
    "validation_accuracy": "validation accuracy (%)",
}
PATH = {"validation_accuracy": "validation accuracy (%)", "neurons": "neurons that are not zero"}
PLAIN = ("dropout", "baseline", "backpropagation", "Adam", "SGD")
"""Words in the labels of networks that the others are compared with; their lines are dashed."""


class _Legend:
    """Title, label and style of each network's lines: the same in every picture of the rows."""

    def __init__(self, rows: Rows):
        self.labels = _labels(rows)
        labels = dict.fromkeys(label for _, label in self.labels.values())
        self._colors = {label: k for k, label in enumerate(labels)}

    def line(self, name: str, x: Any, y: Any, *, note: str = "", **options: Any) -> Curve:
        label = self.labels[name][1]
        options = {"dashed": any(word in label for word in PLAIN), **options}
        text = f"{label}, {note}" if note else label
        return Curve(text, np.asarray(x), np.asarray(y), self._colors[label], **options)


def _over_seeds(table: Table, by: str, key: str) -> dict[str, Any]:
    """Abscissas, means over the seeds, and a band from least to greatest, if any has several."""
    groups = table.groupby(by)[key]
    parts = [groups.agg(lambda v, f=f: getattr(v, f)(skipna=False)) for f in ("min", "mean", "max")]
    low, mean, high = (part.to_numpy(float) for part in parts)
    band = (low, high) if groups.size().max() > 1 else None
    return {"x": parts[1].index.to_numpy(), "y": mean, "band": band}


def accuracy(rows: Rows) -> Panels:
    """Validation accuracy over epochs, mean over the seeds, with a band from least to greatest.

    Nothing for rows of objectives: some are of iterations, and `descent` draws them over seconds.
    """
    panels: Panels = {}
    if are_objectives(rows):
        return panels
    legend = _Legend(rows)
    missing = frame(rows, "final", "accuracy").groupby("name")["accuracy"].agg(diverged)
    for name, group in frame(rows, "epoch").groupby("name", sort=False):
        points = _over_seeds(group, "epoch", "validation_accuracy")
        line = legend.line(name, note=missing.get(name, ""), **points)
        panels.setdefault(legend.labels[name][0], []).append(line)
    return panels


def progress(rows: Rows) -> dict[str, Panels]:
    """Training loss and validation accuracy over epochs and over seconds, beside those of backpropagation.

    Seconds are the means over the seeds of the time since the start: compilation, training, and scoring
    after each epoch. Nothing for rows without backpropagation.
    """
    contents: dict[str, Panels] = {}
    if not are_implicit(rows):
        return contents
    legend = _Legend(rows)
    for name, group in frame(rows, "epoch").groupby("name", sort=False):
        seconds = group.groupby("epoch")["seconds"].mean().to_numpy()
        for key, ylabel in PROGRESS.items():
            points = _over_seeds(group, "epoch", key)
            panels = contents.setdefault(ylabel, {"epoch": [], "seconds": []})
            panels["epoch"].append(legend.line(name, **points))
            panels["seconds"].append(legend.line(name, **{**points, "x": seconds}))
    return contents


def descent(rows: Rows) -> Panels:
    """Objective, its relative distance from the best lower bound, and accuracy over seconds.

    Of the first seed: another one may have another β. Seconds are of compilation and training.
    """
    panels: Panels = {}
    if not are_objectives(rows):
        return panels
    legend, keys = _Legend(rows), ("study", "family", "lower_bound")
    epochs = frame(rows, "epoch", *keys)
    epochs["gap"] = relative_gaps(epochs, frame(rows, "final", *keys))
    epochs = epochs[epochs["seed"] == rows[0]["seed"]]
    for name, group in epochs.groupby("name", sort=False):
        for key, title in DESCENT.items():
            if group[key].notna().all():
                panels.setdefault(title, []).append(legend.line(name, group["seconds"], group[key]))
    return panels


def path(rows: Rows) -> Panels:
    """Validation accuracy and neurons over β/β_max, mean over the seeds, with a band."""
    finals = (row for row in rows if row["kind"] == "final")
    points = pd.DataFrame([point for row in finals for point in row.get("path", ())])
    if points.empty:
        return {}
    return {
        title: [Curve(label=title, color=number, **_over_seeds(points, "fraction", key))]
        for number, (key, title) in enumerate(PATH.items())
    }


def residuals(rows: Rows) -> Panels:
    """Relative residuals inside the solvers of the first seed, one panel for each layer."""
    legend, panels = _Legend(rows), {}
    found = frame(rows, "residuals", "how", "layer", "deterministic")
    for row in found.drop_duplicates(["name", "layer", "deterministic"]).to_dict("records"):
        full = row["deterministic"]
        note = row["how"] if isinstance(row["how"], str) else "full gradient" if full else "sampled"
        band = None if full else (np.array(row["low"]), np.array(row["high"]))
        x = 1 + np.arange(len(row["middle"]))
        line = legend.line(row["name"], x, row["middle"], note=note, dashed=full, band=band)
        title = f"{legend.labels[row['name']][0]}, {row['layer']} layer"
        panels.setdefault(title, []).append(line)
    return panels


def rates(rows: Rows) -> list[Curve]:
    """Test accuracy over the dropout rate, mean over the seeds; a gap where a seed diverged."""
    legend = _Legend(rows)
    finals = frame(rows, "final").dropna(subset=["rate"])
    finals = finals.assign(label=[legend.labels[name][1] for name in finals["name"]])
    finals["accuracy"] = finals["accuracy"].astype(float)
    return [
        legend.line(group["name"].iloc[0], **_over_seeds(group, "rate", "accuracy"))
        for _, group in finals.groupby("label", sort=False)
    ]


def swaps(rows: Rows) -> dict[str, dict[str, list[float]]]:
    """For each network of `experiments.swap` and each arm the gain of each seed that did not diverge."""
    found: dict[str, dict[str, list[float]]] = {}
    if not are_swapped(rows):
        return found
    finals = frame(rows, "final", "arm", "method", "study", "variant")
    finals["gain"] = gains(finals)
    swapped = finals.dropna(subset=["gain", "start_validation_accuracy"])
    for name, group in swapped.groupby("name", sort=False):
        title, label = str(name).split(" ", 1)
        found.setdefault(title, {})[label] = group["gain"].tolist()
    return found


def _labels(rows: Rows) -> dict[str, tuple[str, str]]:
    """For each network, the words that all names of its comparison begin with, and the other words."""
    names: dict[Any, dict[str, None]] = {}
    for row in rows:
        names.setdefault(row.get("study") or row.get("variant"), {})[name_of(row)] = None
    labels = {}
    for group in names.values():
        words = [name.split() for name in group]
        common = 0
        for column in zip(*(name[:-1] for name in words), strict=False):
            if len(set(column)) > 1:
                break
            common += 1
        for name, parts in zip(group, words, strict=True):
            labels[name] = " ".join(parts[:common]), " ".join(parts[common:])
    return labels
