"""The tables, the page and the pictures of a run, from its rows."""

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.output import gains, objectives, panels, plots, runs
from experiments.output.panels import Rows, diverged, grouped, name_of

CSV, PAGE, NOTES = "summary.csv", "README.md", "NOTES.md"
PICTURES = {
    "accuracy.png": "validation accuracy over epochs, mean over the seeds, band from least to greatest",
    "residual.png": "inside the solvers of one seed, median over images, band around the middle 80%; "
    "dashed along the full gradient",
    "rates.png": "test accuracy over dropout rates, mean over the seeds, band from least to greatest",
    "progress.png": "loss and accuracy over epochs and over seconds, compilation and scoring included, mean "
    "over the seeds, band from least to greatest",
    "descent.png": "objective, its relative distance from the best lower bound, and validation accuracy over "
    "seconds of compilation and training, of the first seed",
    "path.png": "validation accuracy and neurons of the gated program over β/β_max, mean over the seeds, "
    "band from least to greatest",
    "gains.png": "gain in test accuracy over the network finetuned as long; bars are means over seeds, dots "
    "the seeds",
}
OLD = ("table2.csv",)
"""File names of earlier revisions for the summary; such files are removed."""
FILES = (CSV, PAGE, *PICTURES, *OLD)
MARK = "<!-- Drawn by python -m experiments.report; remarks belong in NOTES.md. -->"
PAPER_DATASETS = ("cifar10", "cifar100")
COLUMNS = (
    *("dataset", "name", "seeds", "diverged", "accuracy", "seed_std", "trial_std", "trials"),
    *("full_gradient_accuracy", "full_gradient_seed_std", "validation_accuracy"),
    *("validation_seed_std", "paper_accuracy", "paper_std", "difference", "gain", "gain_seed_std"),
    *("epochs", "batch_size", "parameters", "train_seconds"),
)
BASELINES = ("dropout", "control", "backpropagation")


def summarise(rows: Rows) -> list[dict[str, Any]]:
    """One row for each network: means over its seeds, and standard deviations over seeds and trials."""
    finals = [row for row in rows if row["kind"] == "final"]
    baselines = {_family(row): row["accuracy"] for row in finals if _role(row) in BASELINES}
    groups = grouped(finals, lambda row: (row["dataset"], name_of(row)))
    common = [
        _summary(dataset, name, group, baselines) for (dataset, name), group in groups.items()
    ]
    more = objectives.summaries(rows) or gains.summaries(rows) or [{}] * len(common)
    return [summary | further for summary, further in zip(common, more, strict=True)]


def _role(row: Mapping[str, Any]) -> str | None:
    """The role of a network in its comparison: the arm of a finetuning study, or table 2's method."""
    return row.get("arm") or row.get("method")


def _family(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """A key that the networks of one comparison share."""
    return row["dataset"], row.get("study"), row.get("variant"), row["seed"]


def _summary(
    dataset: str, name: str, group: Rows, baselines: Mapping[tuple[Any, ...], float | None]
) -> dict[str, Any]:
    first = group[0]
    accuracy, seed_std = _over_seeds(group, "accuracy")
    full, full_std = _over_seeds(group, "full_gradient_accuracy")
    if full is None:  # a network that does not sample at test time
        full, full_std = accuracy, seed_std
    validation, validation_std = _over_seeds(group, "validation_accuracy")
    comparable = dataset in PAPER_DATASETS
    paper = first.get("paper_accuracy") if comparable else None
    swapped = _role(first) not in (None, "baseline", *BASELINES)
    pairs = [(row["accuracy"], baselines.get(_family(row)) if swapped else None) for row in group]
    each = [  # seed by seed: both networks had the same validation split
        {"gain": None if None in pair else pair[0] - pair[1]} for pair in pairs
    ]
    gain, gain_std = _over_seeds(each, "gain")
    return {
        "dataset": dataset,
        "name": name,
        "seeds": " ".join(str(row["seed"]) for row in group),
        "diverged": diverged(group),
        "accuracy": accuracy,
        "seed_std": seed_std,
        "trial_std": _over_seeds(group, "std")[0],
        "trials": first.get("trials"),
        "full_gradient_accuracy": full,
        "full_gradient_seed_std": full_std,
        "validation_accuracy": validation,
        "validation_seed_std": validation_std,
        "paper_accuracy": paper,
        "paper_std": first.get("paper_std") if comparable else None,
        "difference": accuracy - paper if None not in (accuracy, paper) else None,
        "gain": gain,
        "gain_seed_std": gain_std,
        "epochs": first.get("epochs"),
        "batch_size": first.get("batch_size"),
        "parameters": first.get("parameters"),
        "train_seconds": _over_seeds(group, "train_seconds")[0],
        "schedule": _schedule(first),
        "hardware": "; ".join(dict.fromkeys(map(_hardware, group))),
    }


def _over_seeds(group: Rows, key: str) -> tuple[Any, float | None]:
    """Mean and sample standard deviation over seeds, n − 1, for two or more; neither if one lacks it."""
    values: list[Any] = [row.get(key) for row in group]
    if None in values:
        return None, None
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def table(rows: Rows) -> str:
    """The summary as aligned text, with remarks on seeds, epochs and the paper's numbers."""
    rows = panels.ordered(rows)
    finals = [row for row in rows if row["kind"] == "final"]
    header = ["network", "test %", "± trials", "full gradient", "validation %", "gain", "paper"]
    seeds = len({row["seed"] for row in finals})
    summaries, cells = summarise(rows), _cells
    if panels.is_descent(rows):
        header, cells = objectives.HEADER, objectives.cells
    elif gains.are_swapped(rows):
        header, cells = gains.HEADER, _swapped_cells
    lines = [
        runs.format_table(header, list(map(cells, summaries))),
        f"{panels.title_of(finals)}, {seeds} seed{'s' if seeds > 1 else ''}"
        + ("; ± beside a number is over seeds." if seeds > 1 else "."),
    ]
    if any("finetune_epochs" in row for row in finals):
        epochs = f"{finals[0]['epochs']} + {finals[0]['finetune_epochs']}"
        paper = "" if gains.are_swapped(rows) else " here, 300 + finetuning in the paper"
        lines.append(f"Epochs: {epochs}{paper}.")
        lines.append("The gain is over the baseline that was finetuned for the same epochs.")
    if any(row.get("method") == "backpropagation" for row in finals):
        lines.append("The gain is over backpropagation, seed by seed. The paper has curves only.")
    elif cells is _cells and all(row["paper_accuracy"] is None for row in summaries):
        datasets = ", ".join(dict.fromkeys(row["dataset"] for row in finals))
        lines.append(f"The paper has no numbers for this network on {datasets}.")
    return "\n".join(lines)


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [
        row["name"],
        row["diverged"] or runs.percent(row["accuracy"], row["seed_std"]),
        "" if row["trial_std"] is None else f"{row['trial_std']:.3f}",
        runs.percent(row["full_gradient_accuracy"], row["full_gradient_seed_std"]),
        runs.percent(row["validation_accuracy"], row["validation_seed_std"]),
        runs.percent(row["gain"], row["gain_seed_std"]),
        runs.percent(row["paper_accuracy"], row["paper_std"]),
    ]


def _swapped_cells(row: Mapping[str, Any]) -> list[str]:
    return gains.cells(row, _cells(row))


CAPTION = """\
Test accuracy after the last epoch, the test images read once. ± after an accuracy is the sample standard
deviation over seeds (n − 1), given two or more; ± trials that over repeated tests of one trained network
(n), which samples, mean over the seeds. Full gradient: the same network without sampling. Difference:
from the paper. Validation %: of a network that samples, the mean of as many tests; rows without a
validation_std have a single one. Gain: over dropout in the same layers or, for a swapped network, over
the baseline that was finetuned as long, seed by seed. Where a seed diverged, there is no mean."""


IMPLICIT = """\
Test accuracy after the last epoch, the test images read once; ± is the sample standard deviation over seeds
(n − 1). Gain: over backpropagation, seed by seed. The paper (Frerix et al. 2018) has curves only, and its
curves of conjugate gradients are not to be compared with these: in its published code the search direction
and the residual share memory, so that its directions are not conjugate from the second step on."""


def page(rows: Rows, pictures: Iterable[str] = (), notes: str = "") -> str:
    """The results page: paper, ours, difference, schedule, seeds, hardware."""
    rows = panels.ordered(rows)
    finals = [row for row in rows if row["kind"] == "final"]
    versions = dict.fromkeys(
        ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        for row in finals
        if "versions" in row
    )
    parts = [
        f"{MARK}\n# {panels.title_of(finals)}",
        runs.markdown_table(*_markdown(rows)),
        _caption(rows),
        "\n".join(f"- `{name}`: {PICTURES[name]}." for name in pictures),
        "Versions: " + "; ".join(versions) + ".",
        notes.strip(),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _markdown(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the page's table."""
    summaries = summarise(rows)
    last = ["schedule", "seeds", "hardware"]
    if panels.is_descent(rows):
        header = [*objectives.HEADER, "β/β_max"]
        lines = [[*objectives.cells(row), row["fraction"]] for row in summaries]
    elif gains.are_swapped(rows):
        header, lines = gains.HEADER, [_swapped_cells(row) for row in summaries]
    else:
        header = ["network", "paper", "ours, test %", "± trials", "full gradient", "difference"]
        header += ["validation %", "gain"]
        lines = []
        for row in summaries:
            name, accuracy, trials, full, validation, gain, paper = _cells(row)
            difference = "" if row["difference"] is None else f"{row['difference']:+.2f}"
            lines.append([name, paper, accuracy, trials, full, difference, validation, gain])
    ends = [[row[key] for key in last] for row in summaries]
    return header + last, [line + end for line, end in zip(lines, ends, strict=True)]


def _caption(rows: Rows) -> str:
    if panels.is_descent(rows):
        return objectives.CAPTION
    if gains.are_swapped(rows):
        return gains.CAPTION
    implicit = any(row.get("method") == "backpropagation" for row in rows if row["kind"] == "final")
    return IMPLICIT if implicit else CAPTION


def _schedule(row: Mapping[str, Any]) -> str:
    if "schedule" in row:
        return row["schedule"]
    training = row.get("config", {}).get("training", {})
    rates = training.get("learning_rates") or (
        [training["learning_rate"] * 10.0**-k for k in range(3)]
        if "learning_rate" in training
        else []
    )
    swapped = row.get("finetune_epochs") and row.get("arm") != "baseline"
    epochs = f"{row.get('epochs')}" + f" + {row.get('finetune_epochs')}" * bool(swapped)
    parts = [f"{epochs} epochs", f"batches of {row.get('batch_size')}"]
    parts += [", ".join(f"{rate:g}" for rate in rates)] if rates else []
    parts += [training["optimizer"]] if training.get("optimizer") else []
    step = row.get("config", {}).get("network", {}).get("step")
    parts += [step] if step else []
    parts += ["crop and flip"] if training.get("augment") else []
    parts += ["bfloat16"] if training.get("precision") == "bf16" else []
    return "; ".join(parts)


def _hardware(row: Mapping[str, Any]) -> str:
    hardware = row.get("hardware", {})
    device, processor = hardware.get("device", "?"), hardware.get("processor", "?")
    if device != "cpu":
        return device
    count = hardware.get("cores", "?")
    return f"{count} core{'s' * (count != 1)}, {processor}"


def write(folder: Path, rows: Rows) -> list[str]:
    """Write the summary, the page and the pictures; a page that was not drawn by this command is kept.

    Returns:
      one line for each file that was kept as it is, or removed.
    """
    rows, remarks = panels.ordered(rows), []
    columns = COLUMNS + objectives.COLUMNS * panels.is_descent(rows)
    columns += gains.COLUMNS * gains.are_swapped(rows)
    runs.write_csv(folder / CSV, columns, summarise(rows))
    for name in OLD:
        if (folder / name).exists():
            (folder / name).unlink()
            remarks.append(f"{folder / name}: removed, {CSV} takes its place")
    title = panels.title_of(rows)
    drawings = (
        (panels.accuracy(rows), plots.accuracy),
        (panels.residuals(rows), plots.residuals),
        (panels.rates(rows), plots.rates),
        (panels.progress(rows), plots.progress),
        (panels.descent(rows), plots.descent),
        (panels.path(rows), plots.path),
        (gains.of(rows), gains.draw),
    )
    for name, (contents, draw) in zip(PICTURES, drawings, strict=True):
        if contents:
            drawing = functools.partial(draw, contents=contents, title=title)
            runs.write_figure(folder / name, drawing)
        elif (folder / name).exists():
            remarks.append(f"{folder / name}: kept, the rows hold nothing to draw it from")
    target, notes = folder / PAGE, folder / NOTES
    if not target.exists() or runs.read_text(target).startswith(MARK):
        pictures = [name for name in PICTURES if (folder / name).exists()]
        text = page(rows, pictures, runs.read_text(notes) if notes.exists() else "")
        runs.write_text(target, text)
    else:
        remarks.append(f"{target}: kept, it was written by hand")
    return remarks
