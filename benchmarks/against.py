"""This checkout against another one of this library, interleaved: python -m benchmarks.against FOLDER.

Each checkout has a process of its own, which compiles the same calls; they are then timed in turns, a call
of one, the
same call of the other, so that whatever else the machine does hits both alike. FOLDER is made, for
instance, by `git worktree add FOLDER COMMIT`.
"""

import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
from typing import Annotated, Any

import tyro

WORKER = pathlib.Path(__file__).with_name("_worker.py")


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the comparison.

    Attributes:
      folder: the other checkout.
      rounds: samples of each call on each side.
      out: a JSON file for the figures.
    """

    folder: Annotated[pathlib.Path, tyro.conf.Positional]
    rounds: int = 9
    out: pathlib.Path | None = None


class Side:
    """A process that imports the library of one checkout."""

    def __init__(self, root: pathlib.Path):
        threads = {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(root.resolve())}
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER)],
            env={**os.environ, **threads},
            cwd=root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **question: Any) -> Any:
        """The answer to one line of JSON."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def main(options: Options) -> None:
    """Time every call on both sides and print the ratios."""
    here, there = Side(pathlib.Path(__file__).parent.parent), Side(options.folder)
    names = here.ask(ask="names")
    rows = []
    print(f"{'call':44} {'before':>10} {'now':>10}  now / before, median (quartiles)")
    for name in names:
        first = [side.ask(ask="compile", name=name) for side in (there, here)]
        ratios, times = [], []
        for _ in range(options.rounds):
            before, now = (side.ask(ask="time", name=name) for side in (there, here))
            ratios.append(now / before)
            times.append((before, now))
        low, middle, high = statistics.quantiles(ratios, n=4)
        before, now = (statistics.median(column) for column in zip(*times, strict=True))
        row = {"call": name, "before_s": before, "now_s": now, "ratio": middle, "first_s": first}
        rows.append(row | {"quartiles": [low, high]})
        print(
            f"{name:44} {before:10.2e} {now:10.2e}  {middle:.2f} ({low:.2f}–{high:.2f})", flush=True
        )
    if options.out is not None:
        options.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options))
