"""Every public function and class with hostile arguments; the numbers go to `results.json`.

python tests/robustness/sweep.py [--examples 30] [--only REGEX] [--missing] [--write]

Fixed cases first: every wrong kind of every argument, every hostile number in one entry and in all entries
of every array, other dtypes, empty batches and axes of size one. Then random ones: several arguments at once,
with hostile numbers among random ones. A verdict is one of `verdicts.py`; those of `DEFECTS` are listed.
"""

import argparse
import collections
import datetime
import faulthandler
import importlib.metadata
import json
import os
import pathlib
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # thousands of small programs
HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results.json"
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

import cases  # noqa: E402
import compilation  # noqa: E402
import hostile  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import verdicts  # noqa: E402
from cases import Case  # noqa: E402
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

jax.config.update("jax_enable_x64", True)  # for the comparison; arguments are in float32
compilation.quicken()
MANY_PROGRAMS = 2000  # a process can hold a limited number


def hostile_arrays(good: Any) -> st.SearchStrategy[Any]:
    """Arrays of that shape with hostile entries among ordinary ones."""
    array = np.asarray(good, np.float32)
    entry = st.sampled_from(list(hostile.ENTRIES.values())) | st.floats(-4, 4, width=32)
    filled = st.lists(entry, min_size=array.size, max_size=array.size)
    return filled.map(lambda numbers: np.array(numbers, np.float32).reshape(array.shape))


def changes(entry: cases.Entry) -> st.SearchStrategy[dict[str, Any]]:
    """Hostile numbers in one to three arguments."""
    arguments = entry.arguments(hostile.Sizes())
    choices = {
        name: hostile_arrays(argument.good)
        if argument.kind in ("array", "weight")
        else st.sampled_from(list(hostile.NUMBERS.values()))
        for name, argument in arguments.items()
        if argument.kind in ("array", "weight", "number") and argument.good is not None
    }
    names = st.lists(st.sampled_from(sorted(choices)), min_size=1, max_size=3, unique=True)
    some = names.flatmap(lambda chosen: st.fixed_dictionaries({n: choices[n] for n in chosen}))
    return some if choices else st.just({})


def timed(found: Iterator[Case]) -> Iterator[tuple[float, Case]]:
    """Each case with its seconds."""
    while True:
        start = watched()
        case = next(found, None)
        if case is None:
            return
        yield time.monotonic() - start, case


def watched() -> float:
    """The time; the process ends, and says where it was, if the next case never returns from native code."""
    faulthandler.dump_traceback_later(2 * verdicts.LIMIT, exit=True)
    return time.monotonic()


def random_cases(entry: cases.Entry, examples: int) -> list[tuple[float, Case]]:
    found: list[tuple[float, Case]] = []

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(changes(entry))
    def collect(given: dict[str, Any]) -> None:
        if given:
            start = watched()
            outcome = cases.of_numbers(entry, given)
            seconds = time.monotonic() - start
            found.append((seconds, Case(", ".join(given), f"random {given}", outcome)))

    collect()
    return found


def swept(name: str, examples: int) -> dict[str, Any]:
    """The verdicts on one entry, counted, its defects, and its slowest case."""
    if compilation.compiled() > MANY_PROGRAMS:
        jax.clear_caches()
        compilation.forget()
    entry = cases.ENTRIES[name]
    found = [*timed(cases.all_cases(entry)), *random_cases(entry, examples)]
    defects: dict[tuple[str, str], list[str]] = {}
    for _, case in found:
        if case.outcome.is_defect:
            print(" ", case.argument, case.hostile, *case.outcome, sep=" | ", flush=True)
            which = case.hostile.partition(" {")[0]
            defects.setdefault((case.argument, case.outcome.verdict), []).append(which)
    return {
        "slowest case in seconds": round(max((seconds for seconds, _ in found), default=0), 1),
        "verdicts": dict(collections.Counter(case.outcome.verdict for _, case in found)),
        "defects": [
            {"argument": argument, "verdict": verdict, "hostile": sorted(set(which))}
            for (argument, verdict), which in defects.items()
        ],
    }


def stored() -> dict[str, Any]:
    """The entries in `results.json`, without those that are gone."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))["entries"] if RESULTS.exists() else {}
    return {name: found[name] for name in cases.ENTRIES if name in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--examples", type=int, default=30, help="random cases of each entry")
    parser.add_argument("--only", default="", help="a regular expression of names")
    parser.add_argument("--missing", action="store_true", help="only what results.json has not")
    parser.add_argument("--write", action="store_true", help="to results.json, after each entry")
    options = parser.parse_args()
    for name in cases.ENTRIES:
        if not re.search(options.only, name) or (options.missing and name in stored()):
            continue
        start = time.monotonic()
        found = swept(name, options.examples)
        print(f"{name}: {found['verdicts']}, {time.monotonic() - start:.1f} s", flush=True)
        if options.write:
            entries = stored() | {name: found}
            draft = RESULTS.with_suffix(f".{os.getpid()}")  # for two sweeps side by side
            draft.write_text(summary(entries, options.examples), encoding="utf-8")
            draft.replace(RESULTS)


def summary(entries: dict[str, Any], examples: int) -> str:
    """The results as JSON: the totals first."""
    total: collections.Counter[str] = collections.Counter()
    for entry in entries.values():
        total.update(entry["verdicts"])
    content = {
        "command": f"python tests/robustness/sweep.py --examples {examples} --write",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy")},
        "entries swept": len(entries),
        "cases": sum(total.values()),
        "verdicts": dict(total.most_common()),
        "entries": dict(sorted(entries.items())),
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    main()
