"""What a benchmark measured, on disk; the page that shows it."""

import dataclasses
import datetime
import json
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from tabulate import tabulate

from benchmarks import measure
from experiments.output import runs, terminal

HERE = Path(__file__).parent
PAGE = HERE / "README.md"
RESULTS = HERE / "results"
TITLES = {
    "lipschitz": "Lipschitz constants of convolutions",
    "dense": "Solvers of dense layers",
    "convolution": "Solvers of convolutions",
    "forms": "The choice of a form",
    "derivatives": "Derivatives",
    "sampling": "Sampling",
    "masks": "Masks of exact count",
    "certificates": "Certificates",
    "reports": "Reports of networks",
    "equilibrium": "Equilibrium layers",
    "training": "Training steps",
    "training_step": "Training steps beside torch",
    "spectral_norm": "Spectral normalisation",
    "proxprop": "Proximal backpropagation",
    "convex": "Convex programs",
}
"""The sections of the page, one for each command, in its order."""
NAMES = tuple(TITLES)
_COMPARE = {"≤": operator.le, "≥": operator.ge}


@dataclasses.dataclass(frozen=True)
class Goal:
    """A bound on a figure: "≤" or "≥", and the number."""

    relation: str
    bound: float

    def met_by(self, value: float) -> bool:
        """Whether the figure meets it."""
        return _COMPARE[self.relation](value, self.bound)

    def __str__(self) -> str:
        return f"{self.relation} {self.bound:.3g}"


@dataclasses.dataclass(frozen=True)
class Figure:
    """One line of the page.

    Attributes:
      what: measured.
      against: the other side of a ratio, or what an error is relative to.
      value: a ratio of times, of bytes, or an error, as `unit` says.
      unit: "×" for a ratio, else printed after the value.
      goal: None where there is none.
      floor: the same figure from operation counts and the measured rates; None where not computed.
      detail: medians in seconds, sizes, and whatever else tells how the value came about.
    """

    what: str
    against: str
    value: float
    unit: str = "×"
    goal: Goal | None = None
    floor: float | None = None
    detail: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Options:
    """Command line of a benchmark."""

    rounds: int = 15
    """Samples of each side, interleaved."""
    quick: bool = False
    """Small sizes and two rounds: to see that it runs. Nothing is written."""


def main(
    name: str, benchmark: Callable[[Options], Sequence[Figure]], args: list[str] | None
) -> None:
    """Parse the command line, measure, write the results, redraw the page, print."""
    module = f"benchmarks.{name}"
    options = terminal.parse(Options, module, args, description=benchmark.__doc__)
    if options.quick:
        options = dataclasses.replace(options, rounds=2)
    figures = list(benchmark(options))
    if not options.quick:
        write(name, options, figures)
        runs.write_text(PAGE, page(read_all()))
    header, rows = _table([{"figures": [as_dict(f) for f in figures]}])
    rows = [[terminal.shown(cell) for cell in row] for row in rows]
    print(tabulate(rows, header, tablefmt="simple", disable_numparse=True))


def as_dict(figure: Figure) -> dict[str, Any]:
    """As JSON."""
    return dataclasses.asdict(figure)


def write(name: str, options: Options, figures: Sequence[Figure]) -> None:
    """One file for each benchmark and kind of device."""
    environment = runs.environment()
    rates = {"matmul_flops": measure.matmul_rate(), "bytes": measure.bandwidth()}
    content = {
        "benchmark": name,
        "command": f"python -m benchmarks.{name} --rounds {options.rounds}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        **environment,
        "rates_per_second": rates,
        "figures": [as_dict(figure) for figure in figures],
    }
    path = RESULTS / f"{name}-{jax.default_backend()}.json"
    runs.write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_all() -> list[dict[str, Any]]:
    """The stored results, in the order of the page."""
    contents = [json.loads(runs.read_text(path)) for path in sorted(RESULTS.glob("*.json"))]
    return sorted(contents, key=lambda content: NAMES.index(content["benchmark"]))


def page(contents: Sequence[dict[str, Any]]) -> str:
    """The page in Markdown: for each device a summary, the goals missed, a section for each command."""
    parts = [runs.read_text(HERE / "HEADER.md").rstrip()]
    for backend in dict.fromkeys(content["hardware"]["device"] for content in contents):
        chosen = [c for c in contents if c["hardware"]["device"] == backend]
        hardware = chosen[0]["hardware"]
        parts.append(f"## {hardware['cores']} cores, {hardware['processor'] or backend}")
        parts += _summary(chosen)
        for content in chosen:
            parts.append(f"### {TITLES[content['benchmark']]}")
            parts.append(markdown_table(*_table([content])))
            parts.append(_provenance(content))
    parts.append(runs.read_text(HERE / "NOTES.md").rstrip())
    return "\n\n".join(parts) + "\n"


def _summary(contents: Sequence[dict[str, Any]]) -> list[str]:
    """How many goals are met, section by section, and those that are not."""
    rows, missed = [], []
    for content in contents:
        name = content["benchmark"]
        goals = [figure for figure in content["figures"] if figure["goal"]]
        misses = [f for f in goals if not Goal(**f["goal"]).met_by(f["value"])]
        met = f"{len(goals) - len(misses)} of {len(goals)}" if goals else ""
        rows.append([TITLES[name], f"`{name}`", str(len(content["figures"])), met])
        missed.append({"figures": misses})
    parts = [markdown_table(["section", "benchmarks.", "figures", "goals met"], rows)]
    if any(content["figures"] for content in missed):
        parts += ["Goals that are missed:", markdown_table(*_table(missed))]
    return parts


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, without padding: its cells are long."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _table(contents: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for content in contents:
        for figure in content["figures"]:
            goal = Goal(**figure["goal"]) if figure["goal"] else None
            met = "" if goal is None else "yes" if goal.met_by(figure["value"]) else "**no**"
            floor = "" if figure["floor"] is None else _number(figure["floor"], figure["unit"])
            value = _number(figure["value"], figure["unit"])
            text = "" if goal is None else f"{goal}{figure['unit']}"
            rows.append([figure["what"], figure["against"], value, text, met, floor])
    return ["what", "against", "measured", "goal", "met", "floor"], rows


def _number(value: float, unit: str) -> str:
    return f"{value:.3g}{unit}" if unit == "×" else f"{value:.2g}{unit}"


def _provenance(content: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    rates = content["rates_per_second"]
    return (
        f"`{content['command']}`, {content['date']}; float32 matrix product "
        f"{rates['matmul_flops'] / 1e9:.0f} GFLOP/s, elementwise pass {rates['bytes'] / 1e9:.1f} GB/s; "
        f"{versions}"
    )


if __name__ == "__main__":
    runs.write_text(PAGE, page(read_all()))
    print(f"written to {PAGE.relative_to(HERE.parent)}")
