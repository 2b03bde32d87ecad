"""Tables 3 to 5 over seeds: each network beside the paper's, and beside its control."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments import results


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
                rows[0]["name"],
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
