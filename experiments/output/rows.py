"""Stored rows: their names, their kinds as tables, and which of them are compared."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from experiments import networks

Row = Mapping[str, Any]
Rows = Sequence[Row]
Table = Any
"""A `pandas` DataFrame or Series; its annotations do not know what a selection of columns is."""
METHODS: Mapping[Any, str] = networks.NAMES
"""The methods as tables and pictures name them."""
BASELINES = ("dropout", "control", "backpropagation")
"""Roles of the networks over which the others gain."""


def name_of(row: Row) -> str:
    """The name of a row's network."""
    return row.get("name") or f"{row['variant']} {METHODS.get(row['method'], row['method'])}"


def title_of(rows: Rows) -> str:
    """Networks and data sets: "LeNet on digits"; every variant of table 2 is a LeNet."""
    kinds = ("LeNet" if row.get("variant") else name_of(row).split()[0] for row in rows)
    datasets = (str(row["dataset"]) for row in rows)
    return " on ".join(", ".join(dict.fromkeys(names)) for names in (kinds, datasets))


def rate_of(row: Row) -> float | None:
    """The dropout rate of a row's study."""
    return row.get("config", {}).get("rate") if row.get("study") else None


def ordered(rows: Rows) -> list[Row]:
    """The rows in ascending order of their studies' dropout rates; in the given order without rates."""
    rates = {row["study"]: rate for row in rows if (rate := rate_of(row)) is not None}
    return sorted(rows, key=lambda row: rates.get(row.get("study"), 0.0))


def frame(rows: Iterable[Row], kind: str, *keys: str) -> Table:
    """The rows of a kind as a table, with their names and rates and all of the keys as columns."""
    chosen = [
        {**row, "name": name_of(row), "rate": rate_of(row)} for row in rows if row["kind"] == kind
    ]
    found = pd.DataFrame(chosen)
    return found.reindex(columns=list(dict.fromkeys([*found.columns, *keys, "name", "rate"])))


def diverged(accuracies: Sequence[Any]) -> str:
    """How many seeds of a network diverged, in words; "" for none."""
    count = int(pd.isna(list(accuracies)).sum())
    return f"diverged {count} of {len(accuracies)}" if count else ""


def are_objectives(rows: Rows) -> bool:
    """Whether the rows are of methods that minimise one objective."""
    return any(row["kind"] == "epoch" and "objective" in row for row in rows)


def are_swapped(rows: Rows) -> bool:
    """Whether the rows are of `experiments.swap`."""
    return any("start_validation_accuracy" in row for row in rows)


def are_implicit(rows: Rows) -> bool:
    """Whether the rows are of `experiments.proxprop`."""
    return any(row.get("method") == "backpropagation" for row in rows)


def have_control(rows: Rows) -> bool:
    """Whether some of the rows are of networks without dropout."""
    return any(row.get("arm", row.get("method")) == "none" for row in rows)


def gains(finals: Table, baselines: Sequence[str] = BASELINES) -> Table:
    """Test accuracy over that of the baseline of the same comparison and seed; NaN for baselines."""
    role = finals["arm"].astype(object).where(finals["arm"].notna(), finals["method"])
    family = [finals[key] for key in ("dataset", "study", "variant", "seed")]
    known = finals["accuracy"].astype(float).where(role.isin(baselines))
    baseline = known.groupby(family, dropna=False).transform("last")
    plain = role.isna() | role.isin(("baseline", *baselines))
    return (finals["accuracy"].astype(float) - baseline).mask(plain)


def relative_gaps(table: Table, finals: Table) -> Table:
    """(objective − bound)/objective, the best lower bound of the same family; NaN where there is none."""
    family = ["dataset", "study", "seed", "family"]
    best = finals.assign(bound=finals["lower_bound"].astype(float)).groupby(family, dropna=False)
    best = best["bound"].max().clip(lower=0).rename("best").reset_index()
    bound = table[family].merge(best, on=family, how="left")["best"].to_numpy()
    objective = table["objective"].astype(float)
    return ((objective - bound) / objective).mask(objective == 0)
