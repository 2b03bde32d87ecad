"""Tables and pictures from stored results.

    python -m experiments.report DIR
    python -m experiments.report DIR DIR --out DIR

Several folders make one table, as runs of other seeds do. Accuracies are means over the seeds, with
their standard deviation over the seeds; the standard deviation over the trials of one trained network,
which samples at test time, is another column.
"""

import dataclasses
import functools
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from experiments import networks, plots, results

Rows = Sequence[Mapping[str, Any]]
CSV, PAGE, NOTES = "summary.csv", "README.md", "NOTES.md"
PICTURES = ("accuracy.png", "residual.png")
MARK = "<!-- Drawn by python -m experiments.report; remarks belong in NOTES.md. -->"
PAPER_DATASETS = ("cifar10", "cifar100")
COLUMNS = (
    *("dataset", "name", "seeds", "accuracy", "seed_std", "trial_std", "trials"),
    *("full_gradient_accuracy", "full_gradient_seed_std", "validation_accuracy"),
    *("validation_seed_std", "paper_accuracy", "paper_std", "difference", "gain", "gain_seed_std"),
    *("epochs", "batch_size", "parameters", "train_seconds"),
)


BASELINES = ("dropout", "control")


@dataclasses.dataclass(frozen=True)
class Config:
    """Redraw the table and the pictures of stored results."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders with a results.jsonl."""
    out: Path | None = None
    """Folder to write to; by default the folder itself, if there is one only."""


def summarise(rows: Rows) -> list[dict[str, Any]]:
    """One row for each network of the final rows: means over its seeds, and two kinds of spread."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["kind"] == "final":
            groups.setdefault((row["dataset"], name_of(row)), []).append(row)
    baselines = {
        _family(row): row["accuracy"]
        for row in rows
        if row["kind"] == "final" and _role(row) in BASELINES and row["accuracy"] is not None
    }
    return [_summary(dataset, name, group, baselines) for (dataset, name), group in groups.items()]


def _role(row: Mapping[str, Any]) -> str | None:
    """What a network is in its comparison: the arm of a finetuning study, or table 2's method."""
    return row.get("arm") or row.get("method")


def _family(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What the networks of one comparison have in common."""
    return row["dataset"], row.get("study"), row.get("variant"), row["seed"]


def _summary(
    dataset: str, name: str, group: Rows, baselines: Mapping[tuple[Any, ...], float]
) -> dict[str, Any]:
    first = group[0]
    accuracy, seed_std = _over_seeds(group, "accuracy")
    full, full_std = _over_seeds(group, "full_gradient_accuracy")
    if full is None:  # a network that does not sample at test time
        full, full_std = accuracy, seed_std
    validation, validation_std = _over_seeds(group, "validation_accuracy")
    comparable = dataset in PAPER_DATASETS
    paper = first.get("paper_accuracy") if comparable else None
    gains = [  # seed by seed: both networks had the same validation split
        {"gain": row["accuracy"] - baselines[key]}
        for row in group
        if row["accuracy"] is not None  # else it diverged
        and _role(row) not in (None, "baseline", *BASELINES)
        and (key := _family(row)) in baselines
    ]
    gain, gain_std = _over_seeds(gains, "gain")
    return {
        "dataset": dataset,
        "name": name,
        "seeds": " ".join(str(row["seed"]) for row in group),
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
    """Mean and sample standard deviation over seeds; the latter needs two."""
    values = [row[key] for row in group if row.get(key) is not None]
    if not values:
        return None, None
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def name_of(row: Mapping[str, Any]) -> str:
    """The network of a row."""
    names: Mapping[Any, str] = networks.NAMES
    return row.get("name") or f"{row['variant']} {names.get(row['method'], row['method'])}"


def table(rows: Rows) -> str:
    """The summary as aligned text."""
    header = ["network", "test %", "± trials", "full gradient", "validation %", "gain", "paper"]
    return results.format_table(header, [_cells(row) for row in summarise(rows)])


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [
        row["name"],
        results.percent(row["accuracy"], row["seed_std"]),
        "" if row["trial_std"] is None else f"{row['trial_std']:.3f}",
        results.percent(row["full_gradient_accuracy"], row["full_gradient_seed_std"]),
        results.percent(row["validation_accuracy"], row["validation_seed_std"]),
        results.percent(row["gain"], row["gain_seed_std"]),
        results.percent(row["paper_accuracy"], row["paper_std"]),
    ]


def page(rows: Rows, notes: str = "") -> str:
    """The results page: paper, ours, difference, schedule, seeds, hardware."""
    summaries = summarise(rows)
    header = ["network", "paper", "ours, test %", "± trials", "full gradient", "difference"]
    header += ["validation %", "gain", "schedule", "seeds", "hardware"]
    lines = []
    for row in summaries:
        name, accuracy, trials, full, validation, gain, paper = _cells(row)
        difference = "" if row["difference"] is None else f"{row['difference']:+.2f}"
        schedule = [row["schedule"], row["seeds"], row["hardware"]]
        lines.append([name, paper, accuracy, trials, full, difference, validation, gain, *schedule])
    finals = [row for row in rows if row["kind"] == "final"]
    versions = dict.fromkeys(
        ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        for row in finals
        if "versions" in row
    )
    parts = [
        f"{MARK}\n# Results on {', '.join(dict.fromkeys(row['dataset'] for row in summaries))}",
        results.markdown_table(header, lines),
        "Test accuracy after the last epoch, the test images read once. ± after an accuracy is the "
        "standard deviation over seeds, given two or more; ± trials that over repeated tests of one "
        "trained network, which samples. Full gradient: the same network without sampling. "
        "Difference: from the paper. Gain: over dropout in the same layers or, for a swapped "
        "network, over the baseline that was finetuned as long, seed by seed.",
        "Versions: " + "; ".join(versions) + ".",
        *([notes.strip()] if notes.strip() else []),
    ]
    return "\n\n".join(parts) + "\n"


def _schedule(row: Mapping[str, Any]) -> str:
    training = row.get("config", {}).get("training", {})
    rates = training.get("learning_rates") or (
        [training["learning_rate"] * 10.0**-k for k in range(3)]
        if "learning_rate" in training
        else []
    )
    parts = [f"{row.get('epochs')} epochs", f"batches of {row.get('batch_size')}"]
    parts += [", ".join(f"{rate:g}" for rate in rates)] if rates else []
    parts += ["crop and flip"] if training.get("augment") else []
    parts += ["bfloat16"] if training.get("precision") == "bf16" else []
    return "; ".join(parts)


def _hardware(row: Mapping[str, Any]) -> str:
    hardware = row.get("hardware", {})
    device, processor = hardware.get("device", "?"), hardware.get("processor", "?")
    return f"{hardware.get('cores', '?')} cores, {processor}" if device == "cpu" else device


def write(folder: Path, rows: Rows) -> None:
    """Write the summary, the page and the pictures; a page by another hand is kept."""
    results.write_csv(folder / CSV, COLUMNS, summarise(rows))
    target, notes = folder / PAGE, folder / NOTES
    if not target.exists() or target.read_text().startswith(MARK):
        text = page(rows, notes.read_text() if notes.exists() else "")
        with results.whole_file(target) as partial:
            partial.write_text(text)
    title = ", ".join(dict.fromkeys(str(row["dataset"]) for row in rows))
    contents = accuracy_panels(rows), residual_panels(rows)
    for name, panels, draw in zip(
        PICTURES, contents, (plots.accuracy, plots.residuals), strict=True
    ):
        if panels:
            results.write_figure(folder / name, functools.partial(draw, panels=panels, title=title))


def accuracy_panels(rows: Rows) -> dict[str, list[plots.Curve]]:
    """Validation accuracy over epochs, mean over the seeds, with a band from least to greatest."""
    titles, colors = _labels(rows), _Colors()
    groups: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if row["kind"] == "epoch":
            epochs = groups.setdefault(name_of(row), {})
            epochs.setdefault(row["epoch"], []).append(row["validation_accuracy"])
    panels: dict[str, list[plots.Curve]] = {}
    for name, epochs in groups.items():
        title, label = titles[name]
        x = np.array(sorted(epochs))
        low, mean, high = (np.array([f(epochs[k]) for k in x]) for f in (np.min, np.mean, np.max))
        band = (low, high) if max(map(len, epochs.values())) > 1 else None
        plain = "dropout" in label or "baseline" in label
        panels.setdefault(title, []).append(plots.Curve(label, x, mean, colors[label], plain, band))
    return panels


def residual_panels(rows: Rows) -> dict[str, list[plots.Curve]]:
    """Relative residuals inside the solvers of the first seed, one panel for each layer."""
    titles, colors = _labels(rows), _Colors()
    panels: dict[str, list[plots.Curve]] = {}
    seen = set()
    for row in rows:
        key = (name_of(row), row["layer"], row["deterministic"]) if _is_residual(row) else None
        if key is None or key in seen:
            continue
        seen.add(key)
        title, label = titles[name_of(row)]
        how = "full gradient" if row["deterministic"] else "sampled"
        x = 1 + np.arange(len(row["middle"]))
        band = None if row["deterministic"] else (np.array(row["low"]), np.array(row["high"]))
        curve = plots.Curve(
            f"{label}, {how}", x, np.array(row["middle"]), colors[label], row["deterministic"], band
        )
        panels.setdefault(f"{title}, {row['layer']} layer", []).append(curve)
    return panels


class _Colors(dict[str, int]):
    """A colour for each label, in the order in which they are first asked for."""

    def __missing__(self, label: str) -> int:
        return self.setdefault(label, len(self))


def _labels(rows: Rows) -> dict[str, tuple[str, str]]:
    """Name of a network to the title of its comparison, the words common to all, and what is its own."""
    comparisons: dict[Any, list[str]] = {}
    for row in rows:
        names = comparisons.setdefault(row.get("study") or row.get("variant"), [])
        if name_of(row) not in names:
            names.append(name_of(row))
    labels = {}
    for names in comparisons.values():
        words = [name.split() for name in names]
        common = 0
        for column in zip(*(name[:-1] for name in words), strict=False):
            if len(set(column)) > 1:
                break
            common += 1
        for name, parts in zip(names, words, strict=True):
            labels[name] = " ".join(parts[:common]), " ".join(parts[common:])
    return labels


def _is_residual(row: Mapping[str, Any]) -> bool:
    return row["kind"] == "residuals"


def load(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """The rows of several folders, in their order.

    Raises:
      results.FolderError: a folder has no results, or two have the same network and seed.
    """
    rows: list[dict[str, Any]] = []
    seen: dict[tuple[Any, ...], Path] = {}
    for folder in folders:
        path = folder / results.ROWS
        if not path.exists():
            raise results.FolderError(f"{folder}: has no {results.ROWS}")
        found = results.read_jsonl(path)
        for row in found:
            if row["kind"] == "final":
                key = (row["dataset"], name_of(row), row["seed"])
                if key in seen:
                    what = f"{key[1]} on {key[0]} with seed {key[2]}"
                    raise results.FolderError(f"{folder} and {seen[key]} both hold {what}")
                seen[key] = folder
        rows += found
    return rows


def main(args: list[str] | None = None) -> None:
    """Parse the command line, print the table, write the files."""
    config = tyro.cli(Config, prog="python -m experiments.report", args=args)
    try:
        rows = load(config.folders)
        out = config.out or (config.folders[0] if len(config.folders) == 1 else None)
        if out is None:
            print(page(rows))
            return
        write(out, rows)
    except (results.FolderError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{table(rows)}\nwritten to {out}")


if __name__ == "__main__":
    main()
