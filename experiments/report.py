"""Tables and pictures from stored results.

    python -m experiments.report
    python -m experiments.report DIR DIR
    python -m experiments.report DIR DIR --out DIR

Every folder is redrawn in its place; with --out, several make one table, as runs of other seeds do.
Accuracies are means over the seeds, with their sample standard deviation over the seeds (n − 1); the
standard deviation over the trials of one trained network (n), which samples at test time, is another
column, its mean over the seeds. Where a seed diverged, there is no mean.
"""

import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments.output import runs, summary, terminal
from experiments.output.rows import name_of

STORED = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Config:
    """Redraw the table and the pictures of stored results."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Folders with a results.jsonl, in themselves or in folders below; by default experiments/results."""
    out: Path | None = None
    """Make one table of all of them, in this folder; by default each is redrawn where it is."""


def found(folders: Iterable[Path]) -> list[Path]:
    """All folders with results among the given folders and their subfolders.

    Raises:
      runs.FolderError: one of the given folders has none.
    """
    every: list[Path] = []
    for folder in folders:
        below = sorted(path.parent for path in folder.rglob(runs.ROWS))
        if not below:
            raise runs.FolderError(f"{folder}: has no {runs.ROWS}")
        every += below
    return every


def load(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """The rows of several folders, in their order.

    Raises:
      runs.FolderError: a folder is damaged or has no finished network, or two have the same network
        and seed.
    """
    rows: list[dict[str, Any]] = []
    seen: dict[tuple[Any, ...], Path] = {}
    for folder in folders:
        stored = runs.read_rows(folder / runs.ROWS)
        for row in stored:
            if row["kind"] == "final":
                key = (row["dataset"], name_of(row), row["seed"])
                if key in seen:
                    what = f"{key[1]} on {key[0]} with seed {key[2]}"
                    raise runs.FolderError(f"{folder} and {seen[key]} both hold {what}")
                seen[key] = folder
        if folder not in seen.values():
            raise runs.FolderError(f"{folder}: has no finished network")
        rows += stored
    return rows


def main(args: list[str] | None = None) -> None:
    """Parse the command line, print the tables, write the files."""
    config = terminal.parse(Config, "experiments.report", args)
    try:
        folders = found(config.folders or [STORED])
        groups = {config.out: folders} if config.out else {each: [each] for each in folders}
        for out, group in groups.items():
            rows = load(group)
            remarks = summary.write(out, rows)
            print("\n".join([summary.table(rows), *remarks, f"written to {out}\n"]))
    except (runs.FolderError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
