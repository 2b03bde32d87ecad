"""The cases of an entry, and their verdicts."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import entries_factors
import entries_networks
import entries_solvers
import hostile
import jax
import numpy as np
import verdicts
from entries import Entry, good
from hostile import DEGENERATE, Argument, Sizes
from verdicts import Outcome

ENTRIES: dict[str, Entry] = {
    **entries_factors.ENTRIES,
    **entries_solvers.ENTRIES,
    **entries_networks.ENTRIES,
}


class Case(NamedTuple):
    """One hostile argument, or hostile sizes."""

    argument: str
    hostile: str
    outcome: Outcome


def wrong_kinds(entry: Entry) -> Iterator[tuple[str, str]]:
    """Names of arguments and of what is no such argument."""
    for name, argument in entry.arguments(Sizes()).items():
        for wrong in hostile.WRONG_KINDS[argument.kind]:
            yield name, wrong


def of_wrong_kind(
    entry: Entry,
    name: str,
    wrong: str,
    *,
    abstract: bool = False,
    arguments: dict[str, Argument] | None = None,
) -> Outcome:
    """The verdict on an argument of a wrong kind; `abstract` traces the call and computes nothing."""
    arguments = entry.arguments(Sizes()) if arguments is None else arguments
    chosen = arguments[name]
    given = good(arguments) | {name: hostile.substitute(chosen, wrong)}

    def call() -> Any:
        if abstract and not entry.on_host:
            return jax.eval_shape(lambda: jax.tree.leaves(entry.run(given)))
        return entry.run(given)

    return verdicts.of_wrong_kind(call, wrong in chosen.allowed)


def of_numbers(entry: Entry, changes: dict[str, Any], sizes: Sizes = Sizes()) -> Outcome:  # noqa: B008
    """The verdict on arguments with hostile numbers."""
    given = good(entry.arguments(sizes)) | changes
    has = {"has_nan": False, "has_inf": False}
    for value in changes.values():
        has["has_nan"] |= bool(np.isnan(np.asarray(value, np.float64)).any())
        has["has_inf"] |= bool(np.isinf(np.asarray(value, np.float64)).any())
    wide = (lambda: entry.run(verdicts.in_float64(given))) if entry.compares else None
    outcome = verdicts.of_numbers(lambda: entry.run(given), wide, **has)
    if outcome.is_defect and _is_documented(entry, changes):
        return Outcome("value", "documented")
    return outcome


def _is_documented(entry: Entry, changes: dict[str, Any]) -> bool:
    """Whether an argument has a number that is documented to be lost, or to overflow."""
    arguments, hostiles = entry.arguments(Sizes()), hostile.NUMBERS | hostile.ENTRIES
    for name, value in changes.items():
        array = np.asarray(value, np.float32)
        for which in hostiles.keys() & set(arguments[name].allowed):
            number = np.float32(hostiles[which])
            if np.any((array == number) | (np.isnan(array) & np.isnan(number))):
                return True
    return False


def numbers(entry: Entry) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Fixed hostile numbers: in one entry and in all entries of each array, and for each scalar."""
    for name, argument in entry.arguments(Sizes()).items():
        if argument.good is None:
            continue
        if argument.kind in ("array", "weight"):
            for which, number in hostile.ENTRIES.items():
                for everywhere in (False, True):
                    changed = hostile.with_entries(argument.good, number, everywhere)
                    yield name, which + " everywhere" * everywhere, {name: changed}
        elif argument.kind == "number":
            for which, number in hostile.NUMBERS.items():
                yield name, which, {name: number}


def of_cast(entry: Entry, name: str, argument: Argument, cast: str) -> Outcome:
    """An array of another dtype is refused, or gives what the same numbers give."""
    changed = hostile.CASTS[cast](argument.good)
    given = good(entry.arguments(Sizes()))
    result, error = verdicts.attempt(lambda: entry.run(given | {name: changed}))
    if error is not None:
        return verdicts.of_error(error)
    if not entry.compares:
        return Outcome("value")
    same = given | {name: np.asarray(changed).astype(np.float32)}
    wanted, error = verdicts.attempt(lambda: entry.run(same))
    if error is not None:
        return Outcome("accepted", f"but not the same numbers in float32: {error}"[:200])
    found, wanted = (dict(verdicts.named_leaves(one)) for one in (result, wanted))
    for leaf, value in wanted.items():
        if leaf.endswith("?"):
            continue
        difference = verdicts.compare(found[leaf], value, False)
        if difference:
            return Outcome("wrong", f"{leaf} {difference}".replace("in float64", "in float32"))
    return Outcome("value")


def all_cases(entry: Entry) -> Iterator[Case]:
    """Every fixed case of an entry."""
    for name, wrong in wrong_kinds(entry):
        yield Case(name, wrong, of_wrong_kind(entry, name, wrong))
    for name, which, changes in numbers(entry):
        outcome = of_numbers(entry, changes)
        if which in entry.arguments(Sizes())[name].allowed and outcome.is_defect:
            outcome = Outcome("value", "documented")
        yield Case(name, which, outcome)
    for name, argument in entry.arguments(Sizes()).items():
        if argument.kind == "array" and argument.good is not None:
            for cast in hostile.CASTS:
                yield Case(name, cast, of_cast(entry, name, argument, cast))
    for which, sizes in DEGENERATE.items():
        yield Case("sizes", which, of_numbers(entry, {}, sizes))
