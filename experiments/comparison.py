"""Rows of tables 3 to 5 as files, as a table over seeds, and as pictures."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import plots, results

COLUMNS = (
    *("dataset", "study", "arm", "seed", "accuracy", "std", "trials", "full_gradient_accuracy"),
    *("validation_accuracy", "validation_std", "validation_full_gradient_accuracy"),
    *("paper_accuracy", "paper_std", "epochs", "finetune_epochs", "batch_size", "train_examples"),
    *("parameters", "train_seconds", "error"),
)
ROWS, PICTURE = "results.jsonl", "accuracy.png"


def write(out: Path, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """All rows as JSON Lines, the final ones as `name`.csv."""
    results.write_jsonl(out / ROWS, rows)
    finals = [row for row in rows if row["kind"] == "final"]
    results.write_csv(out / f"{name}.csv", COLUMNS, finals)


def clear(out: Path, pictures: Iterable[str]) -> None:
    """Delete an earlier run's pictures, which do not belong to the rows that follow."""
    for picture in (PICTURE, *pictures):
        (out / picture).unlink(missing_ok=True)


def mean_of(rows: Iterable[Mapping[str, Any]], key: str) -> float | None:
    """Mean over rows, that is over seeds; None where a row lacks the number."""
    values: list[Any] = [row.get(key) for row in rows]
    return None if not values or None in values else float(np.mean(values))


def spread_of(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """Sample standard deviation over rows, that is over seeds; None for a single one."""
    values: list[Any] = [row.get(key) for row in rows]
    return None if len(values) < 2 or None in values else float(np.std(values, ddof=1))


def grouped(finals: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """The rows of all seeds by (study, arm), in order of appearance."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in finals:
        groups.setdefault((row["study"], row["arm"]), []).append(row)
    return groups


def table(finals: Sequence[Mapping[str, Any]]) -> str:
    """Accuracies over seeds beside the paper's, with the gain over the finetuned baseline."""
    groups = grouped(finals)
    lines = []
    for (study, arm), rows in groups.items():
        accuracy = mean_of(rows, "accuracy")
        control = mean_of(groups.get((study, "control"), []), "accuracy")
        gain = ""
        if arm not in ("baseline", "control") and accuracy is not None and control is not None:
            gain = f"{accuracy - control:+.2f}"
        failed = "diverged" if accuracy is None else ""
        trials = mean_of(rows, "std")
        lines.append(
            [
                f"{rows[0]['label']} {rows[0]['arm_label']}",
                failed or results.percent(accuracy, spread_of(rows, "accuracy")),
                "" if trials is None else f"{trials:.3f}",
                results.percent(mean_of(rows, "full_gradient_accuracy")),
                gain,
                results.percent(mean_of(rows, "validation_accuracy")),
                results.percent(rows[0]["paper_accuracy"], rows[0]["paper_std"]),
            ]
        )
    first = finals[0]
    seeds = len({row["seed"] for row in finals})
    header = ["network", "test %", "± trials", "full gradient", "gain", "validation %", "paper"]
    notes = [
        results.format_table(header, lines),
        f"{first['dataset']}, {seeds} seed{'s' if seeds > 1 else ''}"
        + ("; ± beside the accuracy is over seeds." if seeds > 1 else "."),
        f"Epochs: {first['epochs']} + {first['finetune_epochs']} here, 300 + finetuning in the paper.",
        "The gain is over the baseline that was finetuned for the same epochs.",
    ]
    if all(row["paper_accuracy"] is None for row in finals):
        notes.append(f"The paper has no numbers for this network on {first['dataset']}.")
    return "\n".join(notes)


def draw(out: Path, rows: Sequence[Mapping[str, Any]], *, title: str) -> None:
    """Validation accuracy over epochs, a colour for each study, as the mean over seeds."""
    curves = []
    epochs = [row for row in rows if row["kind"] == "epoch"]
    studies = list(dict.fromkeys(row["study"] for row in epochs))
    markers = itertools.count(len(studies))
    for (study, arm), records in grouped(epochs).items():
        by_epoch: dict[int, list[float]] = {}
        for record in records:
            by_epoch.setdefault(record["epoch"], []).append(record["validation_accuracy"])
        x = np.array(sorted(by_epoch))
        values = [np.array(by_epoch[epoch]) for epoch in x]
        band = None
        if len({record["seed"] for record in records}) > 1:
            band = (np.array([v.min() for v in values]), np.array([v.max() for v in values]))
        plain = arm in ("baseline", "control")
        color = studies.index(study) if plain else next(markers)
        label = f"{records[0]['label']} {records[0]['arm_label']}"
        y = np.array([v.mean() for v in values])
        curves.append(plots.Curve(label, x, y, color, dashed=arm == "control", band=band))
    if curves:
        results.write_figure(out / PICTURE, lambda path: plots.accuracy(path, curves, title=title))
