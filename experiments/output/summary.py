"""The tables, the page and the pictures of a run, from its rows."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.output import maps, panels, plots, runs, terminal, views
from experiments.output.rows import (
    Rows,
    Table,
    are_implicit,
    are_swapped,
    diverged,
    frame,
    gains,
    ordered,
    relative_gaps,
    title_of,
)

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
    "map.png": "gain in test accuracy over both controls, no dropout and dropout at its best rate, against "
    "time; filled what the validation images choose of each method, lines from the least to the greatest "
    "seed",
}
DRAWINGS: tuple[tuple[Callable[[Rows], Any], Callable[..., None]], ...] = (
    (panels.accuracy, plots.accuracy),
    (panels.residuals, plots.residuals),
    (panels.rates, plots.rates),
    (panels.progress, plots.progress),
    (panels.descent, plots.descent),
    (panels.path, plots.path),
    (panels.swaps, plots.gains),
    (maps.cells, maps.draw),
)
"""For each of the pictures, what it holds and how it is drawn."""
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
MEANS = (
    *("accuracy", "full_gradient_accuracy", "validation_accuracy", "gain", "std", "train_seconds"),
    *("objective", "lower_bound", "neurons", "search_seconds", "gap"),
    *("start_validation_accuracy", "gain_over_none", "epoch_seconds"),
)
"""Entries of the final rows whose means over the seeds are taken; that of std is called trial_std."""
SPREADS = {
    "accuracy": "seed_std",
    "full_gradient_accuracy": "full_gradient_seed_std",
    "validation_accuracy": "validation_seed_std",
    "gain": "gain_seed_std",
    "start_validation_accuracy": "start_seed_std",
    "gain_over_none": "gain_over_none_std",
}
"""Those whose sample standard deviations are taken, and the names of these in the summary."""
CONSTANTS = ("trials", "paper_accuracy", "paper_std", "epochs", "batch_size", "parameters")
CONSTANTS += ("schedule", "family")
TAGS = ("arm", "method", "study", "variant", "fraction", "bound")


def summarise(rows: Rows) -> Table:
    """One row for each network: means over its seeds, standard deviations over seeds and over trials.

    A mean that a seed lacks is None, and so is a standard deviation over one seed.
    """
    finals = frame(maps.completed(rows), "final", *MEANS, *CONSTANTS, *TAGS)
    finals["gain"], finals["gap"] = gains(finals), relative_gaps(finals, finals)
    finals["gain_over_none"] = gains(finals, ("none",))
    numbers = list(MEANS)
    finals[numbers] = finals[numbers].astype(float)
    # a network that does not sample at test time
    full = finals["full_gradient_accuracy"].fillna(finals["accuracy"])
    each = [row for row in rows if row["kind"] == "final"]
    finals = finals.assign(
        full_gradient_accuracy=full,
        schedule=list(map(_schedule, each)),
        hardware=list(map(_hardware, each)),
    )
    key = ["dataset", "name"]
    groups = finals.groupby(key, sort=False)
    constants = finals.drop_duplicates(key).set_index(key)[list(CONSTANTS)].convert_dtypes()
    parts: list[Table] = [
        constants,
        groups[numbers]
        .agg(lambda values: values.mean(skipna=False))
        .rename(columns={"std": "trial_std"}),
        groups[list(SPREADS)].agg(lambda values: values.std(skipna=False)).rename(columns=SPREADS),
        groups.agg(
            seeds=("seed", lambda seeds: " ".join(map(str, seeds))),
            diverged=("accuracy", diverged),
            hardware=("hardware", lambda found: "; ".join(found.unique())),
            bound=("bound", lambda found: ", ".join(found.dropna().unique())),
            fraction=(
                "fraction",
                lambda found: " ".join(f"{x:g}" for x in found.dropna().unique()),
            ),
        ),
    ]
    found: Table = pd.concat(parts, axis=1).reset_index()
    comparable = found["dataset"].isin(PAPER_DATASETS)
    paper = found[["paper_accuracy", "paper_std"]].astype(float).where(comparable)
    found[["paper_accuracy", "paper_std"]] = paper
    found["difference"] = found["accuracy"] - found["paper_accuracy"]
    return found.astype(object).where(found.notna(), None)


def table(rows: Rows) -> str:
    """The summary as aligned text, with remarks on seeds, epochs and the paper's numbers."""
    rows = ordered(rows)
    view, summary = views.of(rows), summarise(rows)
    finals = [row for row in rows if row["kind"] == "final"]
    seeds = len({row["seed"] for row in finals})
    shown = views.cells(summary)[list(view.printed)].map(terminal.shown)
    lines = [
        shown.rename(columns=terminal.shown).to_markdown(
            index=False,
            tablefmt="simple",
            disable_numparse=True,
            colalign=("left", *["right"] * (len(view.printed) - 1)),
        ),
        f"{title_of(finals)}, {seeds} seed{'s' if seeds > 1 else ''}"
        + ("; ± beside a number is over seeds." if seeds > 1 else "."),
    ]
    if any("finetune_epochs" in row for row in finals):
        epochs = f"{finals[0]['epochs']} + {finals[0]['finetune_epochs']}"
        paper = "" if are_swapped(rows) else " here, 300 + finetuning in the paper"
        lines.append(f"Epochs: {epochs}{paper}.")
        lines.append("The gain is over the baseline that was finetuned for the same epochs.")
    if are_implicit(finals):
        lines.append("The gain is over backpropagation, seed by seed. The paper has curves only.")
    elif view in (views.PLAIN, views.CONTROLLED) and summary["paper_accuracy"].isna().all():
        datasets = ", ".join(summary["dataset"].unique())
        lines.append(f"The paper has no numbers for this network on {datasets}.")
    if contents := maps.cells(rows):
        lines += ["The gain is over dropout at its best validation rate.", maps.sentence(contents)]
    return "\n".join(lines)


def page(rows: Rows, pictures: Iterable[str] = (), notes: str = "") -> str:
    """The results page: paper, ours, difference, schedule, seeds, hardware."""
    rows = ordered(rows)
    view, finals = views.of(rows), [row for row in rows if row["kind"] == "final"]
    shown = views.cells(summarise(rows))[[*view.page, *views.ENDS]]
    versions = dict.fromkeys(
        ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        for row in finals
        if "versions" in row
    )
    parts = [
        f"{MARK}\n# {title_of(finals)}",
        maps.answer(maps.cells(rows)),
        shown.to_markdown(index=False, disable_numparse=True),
        view.caption,
        "\n".join(f"- `{name}`: {PICTURES[name]}." for name in pictures),
        "Versions: " + "; ".join(versions) + ".",
        notes.strip(),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


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
    rows, remarks = ordered(rows), []
    columns = [*COLUMNS, *views.of(rows).stored]
    text = summarise(rows)[columns].to_csv(index=False, lineterminator="\n")
    runs.write_text(folder / CSV, text)
    for name in OLD:
        if (folder / name).exists():
            (folder / name).unlink()
            remarks.append(f"{folder / name}: removed, {CSV} takes its place")
    for name, (contents_of, draw) in zip(PICTURES, DRAWINGS, strict=True):
        if contents := contents_of(rows):
            draw(folder / name, contents, title=title_of(rows))
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
