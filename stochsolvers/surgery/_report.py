"""The report of a replacement: what was replaced, how much it changes, what was left and why."""

import dataclasses
import math
import textwrap
from typing import Any

from stochsolvers import plot
from stochsolvers.reports import _table

STRONG = 0.5
"""The relative change above which the report warns."""
_WIDTH = 120  # of the lines below the table


@dataclasses.dataclass(frozen=True)
class ReplacedLayer:
    """One layer with a solver in its place.

    Attributes:
      name: its path.
      kind: the class that it had.
      activation: what follows it in the model, as JAX names it.
      prior: g, as text.
      lipschitz: L = ‖A‖² + λ, the constant that sets the step, of the map with the normalisation folded in.
      step_size: the first step; of the normalised problem if `normalize`, where 1 is the step 1/L.
      num_iters: K.
      change_one: ‖σ(w₁) − σ(y)‖/‖σ(y)‖ for one iteration, at what the layer gets in the plain model; y is the
        plain layer's output, normalised if a normalisation follows. Nothing is sampled.
      change: the same for K iterations.
      model_change: relative change of the model's output if this layer alone is replaced, K iterations.
      gap: the largest certified gap P(z_K) − min P of an example.
      relative_gap: the largest gap/|P(z_K)| of an example.
      normalization: the path of the BatchNorm that is folded in, or "".
      dropout: the path of the Dropout that is switched off, or "".
      tau: the fraction of the inputs that is sampled in its place; NaN without one.
      note: what to know, or "".
    """

    name: str
    kind: str
    activation: str
    prior: str
    lipschitz: float
    step_size: float
    num_iters: int
    change_one: float
    change: float
    model_change: float
    gap: float
    relative_gap: float
    normalization: str = ""
    dropout: str = ""
    tau: float = math.nan
    note: str = ""


@dataclasses.dataclass(frozen=True)
class LayerLeft:
    """A layer that was meant and left as it is.

    Attributes:
      name: its path.
      kind: its class.
      reason: why, and what to do.
    """

    name: str
    kind: str
    reason: str


@dataclasses.dataclass(frozen=True)
class ReplacementReport:
    """What `replace_layers` did; `str` is a table.

    Attributes:
      rows: one for each layer that was replaced; of a stack of layers, one for each of the stack.
      left: the layers that were meant and left.
      model_change_one: ‖f₁(x) − f(x)‖/‖f(x)‖ of the model's output with one iteration in all replaced layers.
      model_change: the same with K iterations.
      notes: what holds for the model.
    """

    rows: tuple[ReplacedLayer, ...]
    left: tuple[LayerLeft, ...]
    model_change_one: float
    model_change: float
    notes: tuple[str, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """Strong changes: finetune, or take fewer iterations."""
        found = [
            f"{row.name} changes its output by {row.change:.0%}"
            for row in self.rows
            if row.change > STRONG
        ]
        if self.model_change > STRONG:
            found.append(f"the model's output changes by {self.model_change:.0%}")
        if self.model_change_one > 1e-3:
            found.append(
                f"one iteration is not the plain model: it changes the output by {self.model_change_one:.1%}"
            )
        return tuple(found)

    def as_dict(self) -> dict[str, list[Any]]:
        """A list for each column of the replaced layers, as `pandas.DataFrame` takes it."""
        return _table.columns(self.rows, ReplacedLayer)

    def __str__(self) -> str:
        """The aligned table of the replaced layers; those that were left; what to know."""
        headers = [
            "layer", "kind", "activation", "L", "step", "K", "change, K = 1", "change", "of model", "gap",
            "relative",
        ]  # fmt: skip
        table = [_table.text(headers, [_cells(row) for row in self.rows])] if self.rows else []
        lines = []
        if not math.isnan(self.model_change):
            lines.append(
                f"The model's output changes by {_percent(self.model_change_one)} for one iteration, by "
                f"{_percent(self.model_change)} for all."
            )
        lines += [f"Warning: {one}." for one in self.warnings]
        for row in self.rows:
            if row.normalization:
                lines.append(f"{row.name}: {row.normalization} is folded in")
            if row.dropout:
                lines.append(f"{row.name}: samples τ = {row.tau:.3g} in place of {row.dropout}")
            if row.note:
                lines.append(f"{row.name}: {row.note}")
        lines += list(self.notes)
        if self.left:
            lines += ["Left as they are:"]
            lines += [f"  {one.name} ({one.kind}): {one.reason}" for one in self.left]
        return "\n".join(table + [_wrapped(line) for line in lines])

    def plot(self, ax: Any = None) -> Any:
        """Bars of the change of every layer's output, and of the model's by each alone.

        Args:
          ax: matplotlib axes; None makes a figure.

        Returns:
          the axes.
        """
        return plot.changes(self, ax=ax)


def _cells(row: ReplacedLayer) -> list[str]:
    return [
        row.name, row.kind, row.activation or "–", _number(row.lipschitz, ".4g"),
        _number(row.step_size, ".3g"), str(row.num_iters), _percent(row.change_one), _percent(row.change),
        _percent(row.model_change), _number(row.gap, ".1e"), _number(row.relative_gap, ".1e"),
    ]  # fmt: skip


def _wrapped(line: str) -> str:
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    return textwrap.fill(line, _WIDTH, subsequent_indent=indent, break_on_hyphens=False)


def _percent(value: float) -> str:
    if math.isnan(value):
        return "–"
    return "0" if value == 0 else f"{value:.1%}" if value >= 1e-3 else f"{value:.0e}"


def _number(value: float, style: str) -> str:
    return "–" if math.isnan(value) else format(value, style)
