r"""Spectral norms of a network's layers, and the Lipschitz bound that they prove.

The bound is propagated through the graph of the forward pass, value by value (`_propagation`): a layer
multiplies the constant of its input by its own ℓ, an addition adds those of its terms, a concatenation takes
the root of the sum of their squares. For a chain f = h_n ∘ f_n ∘ … ∘ h_1 ∘ f_1 ∘ h_0 it is the product

    ||f(x) − f(y)|| ≤ c_0 ⋯ c_n ℓ_1 ⋯ ℓ_n ||x − y||,

for a residual connection x + f(x) it is 1 + ℓ_f.

ℓ_i is ||A_i|| for an affine layer, max_c |γ_c| / sqrt(v_c + ε) for batch normalisation at inference (together
with the layer before it ||diag(γ / sqrt(v + ε)) A_i||, or what `solver_bound` gives for that map if it is
folded into a solver), max_c |γ_c| / sqrt(ε) for a normalisation by the
variance of its own input, `solver_bound` for a solver, `equilibrium_bound` for an equilibrium layer (of the
map to the equilibrium, which its solver approximates to a tolerance); the c_i are those of the operations
between the layers. Where a layer has no norm or an operation no constant that is known, the bound is
infinite, and the report names the cause.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from stochsolvers import _checks, plot
from stochsolvers.reports import _table
from stochsolvers.reports._entries import Entries, sizes_at_zero
from stochsolvers.reports._measurement import Part as Part
from stochsolvers.reports._measurement import Standardisation as Standardisation
from stochsolvers.reports._measurement import folded_pairs, layer_bounds, measured
from stochsolvers.reports._propagation import LayerBound, names_between, propagate
from stochsolvers.reports._trace import Call, Trace

_BYPASSED = "on one of several paths"
_UNUSED = "the output does not depend on it"
_NOT_BOUNDED = "not bounded"
_STALE = "not bounded: its BatchNorm has changed, call refresh_lipschitz"
_BETWEEN = "counted between the layers"
_ON_A_BALL = frozenset(("mul", "dot_general", "square", "integer_pow", "exp", "_einsum"))
_STANDARDISED = "reached where the variance vanishes"


@functools.singledispatch
def lipschitz_report(model: Any, *args: Any, **options: Any) -> "LipschitzReport":
    """Spectral norms of the layers of a network, and a bound on its Lipschitz constant.

    Args:
      model: an `nnx.Module`, with the arguments of `stochsolvers.nnx.lipschitz_report`, or a Linen
        `nn.Module`, with those of `stochsolvers.linen.lipschitz_report`.
      *args: see there.
      **options: see there.

    Returns:
      `LipschitzReport`.
    """
    _checks.fail("model", "an nnx.Module or a linen.Module", type(model).__name__)


@dataclasses.dataclass(frozen=True)
class LayerNorm:
    """One call of a layer.

    Attributes:
      name: the layer's path in the network.
      kind: name of its class.
      input_shape: what it is called on, batch axes included; () for parameters outside known layers.
      lower: a lower bound on its spectral norm ||A||, of its scale for a normalisation, of the maps U from
        its inputs to its drives, one above the other, for an equilibrium layer.
      upper: an upper bound, infinite where there is none.
      constant: a Lipschitz constant of the layer: `upper`, or what `solver_bound` gives for a solver.
      note: what keeps the product from being a bound, or "".
    """

    name: str
    kind: str
    input_shape: tuple[int, ...]
    lower: float
    upper: float
    constant: float
    note: str

    @property
    def is_tight(self) -> bool:
        """Whether the bounds agree to a thousandth, as for dense and circular layers; `plot` uses it."""
        return self.upper <= 1.001 * self.lower


@dataclasses.dataclass(frozen=True)
class LipschitzReport:
    """The layers of a network in call order; `str` is a table.

    Attributes:
      rows: one record for each call of a layer, and for each module with parameters that no known
        layer accounts for.
      between: names of the operations between the layers.
      factor: the bound if every layer's constant is 1; of a chain c_0 ⋯ c_n. 1 for activations such as ReLU
        and pools of disjoint windows, 0 where the output does not depend on the input, infinite where it
        is not known. Where the inputs are in a ball, bound / product.
      unknown: names of the operations that have no constant, or none that is known, such as `sign` and
        the product of two functions of the input.
      proved: the Lipschitz constant that the graph proves; None for factor × product.
      radius: of the ball of inputs that it holds for.
    """

    rows: tuple[LayerNorm, ...]
    between: tuple[str, ...]
    factor: float
    unknown: tuple[str, ...]
    proved: float | None = None
    radius: float = math.inf

    @property
    def product(self) -> float:
        """The product of the layers' constants, whether or not it bounds the network's."""
        return math.prod(row.constant for row in self.rows)

    @property
    def bound(self) -> float:
        """A Lipschitz constant of the network; infinite where none is proved."""
        if self.factor == 0.0:
            return 0.0
        if self.proved is not None:
            return self.proved
        return math.inf if any(row.note for row in self.rows) else self.factor * self.product

    def as_dict(self) -> dict[str, list[Any]]:
        """A list for each column, as `pandas.DataFrame` takes it."""
        return _table.columns(self.rows, LayerNorm)

    def __str__(self) -> str:
        """The aligned table, a norm as one number where its bounds agree in all four digits shown."""
        headers = ("layer", "kind", "input", "||A||", "constant", "note")
        lines = [_table.text(headers, [_cells(row) for row in self.rows])]
        if self.factor == 0.0:
            lines.append(
                "Lipschitz bound of the network: 0, its output does not depend on the input"
            )
        elif math.isfinite(self.bound):
            names = ", ".join(self.between)
            between = f", of which {self.factor:.4g} between the layers: {names}" if names else ""
            ball = f" for ||x|| ≤ {self.radius:.4g}" if math.isfinite(self.radius) else ""
            lines.append(f"Lipschitz bound of the network{ball}: {self.bound:.4g}{between}")
        else:
            lines.append(f"No Lipschitz bound of the network; product: {self.product:.4g}")
        if self.unknown and self.factor:
            lines.append(f"No Lipschitz constant is known of: {', '.join(self.unknown)}")
            if not _ON_A_BALL.isdisjoint(self.unknown) and not math.isfinite(self.radius):
                lines.append(
                    "Products of functions of the input have one on a ball: give a radius."
                )
        return "\n".join(lines)

    def plot(self, ax: Any = None) -> Any:
        """A bar for each layer's norm; a line shows the bracket where it is not exact.

        Args:
          ax: a matplotlib `Axes`; by default, those of a new figure.

        Returns:
          the `Axes`.

        Raises:
          ImportError: without matplotlib.
        """
        return plot.norms(self, ax=ax)


def norms_report(
    trace: Trace,
    parts: Sequence[Part],
    strays: Mapping[str, int],
    kinds: Mapping[str, str],
    radius: float | None = None,
    progress: bool | None = None,
) -> LipschitzReport:
    """The report on a traced network, with the norms of its layers.

    Args:
      trace: of the forward pass.
      parts: one for each of its calls.
      strays: position of each module with parameters that no known layer accounts for, by name.
      kinds: its class, by name.
      radius: of the ball of inputs that the bound is to hold for, or None for all inputs.
      progress: whether to show how many layers are done; None for a terminal, after two seconds.
    """
    if radius is not None and not (isinstance(radius, int | float) and 0 <= radius < math.inf):
        _checks.fail("radius", "a finite number ≥ 0, or None", radius)
    numbers = measured(parts, progress)
    layers = layer_bounds(trace, parts, numbers)
    entries = Entries(trace.program, trace.dependent)
    plain = propagate(trace, [LayerBound()] * len(layers), entries)
    ball = math.inf if radius is None else float(radius)
    zero = sizes_at_zero(trace) if math.isfinite(ball) else None
    proved = propagate(trace, layers, entries, ball, zero)
    unknown = proved.unknown if math.isfinite(ball) else plain.unknown
    is_bounded = math.isfinite(proved.constant)

    rows = _rows(trace, parts, numbers)
    constant, note = (1.0, _BETWEEN) if is_bounded else (math.inf, _NOT_BOUNDED)
    for name, position in strays.items():
        missing = LayerNorm(name, kinds[name], (), 0.0, math.inf, constant, note)
        rows.append((position, missing))
    rows.sort(key=lambda entry: entry[0])
    report = LipschitzReport(
        tuple(row for _, row in rows),
        names_between(trace),
        plain.constant,
        unknown,
        proved.constant,
        ball,
    )
    if math.isfinite(ball) and is_bounded and report.factor:
        product = report.product
        factor = proved.constant / product if product else plain.constant
        report = dataclasses.replace(report, factor=factor)
    return report


def _rows(
    trace: Trace, parts: Sequence[Part], numbers: Sequence[Any]
) -> list[tuple[int, LayerNorm]]:
    """A row for each call, with its position; one for a solver layer and the normalisation in it."""
    pairs = folded_pairs(trace, parts)
    solvers = {before: (index, ratio) for index, (before, ratio) in pairs.items()}
    rows = []
    for i, (call, part, number) in enumerate(zip(trace.calls, parts, numbers, strict=True)):
        if i in pairs:
            continue
        row = _row(call, part, number)
        if i in solvers:
            index, ratio = solvers[i]
            if math.isinf(ratio):
                row = dataclasses.replace(row, constant=math.inf, note=_STALE)
            elif not row.note:
                note = _path_note(trace.calls[index])
                row = dataclasses.replace(row, constant=ratio * row.constant, note=note)
        elif part.settings is not None and part.fold is not None:
            row = LayerNorm(
                call.name, part.kind, call.input_shape, 0.0, math.inf, math.inf, _NOT_BOUNDED
            )
        rows.append((call.position, row))
    return rows


def _row(call: Call, part: Part, numbers: Sequence[Any]) -> LayerNorm:
    lower, upper, constant = map(float, numbers)
    note = _path_note(call)
    if not part.bounded:
        note = _NOT_BOUNDED
    elif part.settings is not None and not part.has_solver_bound:
        constant, note = math.inf, _NOT_BOUNDED
    elif part.standardised is not None and not note:
        note = _STANDARDISED
    return LayerNorm(call.name, part.kind, call.input_shape, lower, upper, constant, note)


def _path_note(call: Call) -> str:
    if call.on_every_path:
        return ""
    return _BYPASSED if call.is_used else _UNUSED


def _cells(row: LayerNorm) -> list[str]:
    shape = "×".join(map(str, row.input_shape)) or "–"
    ends = f"{row.lower:.4g}", f"{row.upper:.4g}"
    norm = ends[0] if ends[0] == ends[1] else f"[{', '.join(ends)}]"
    constant = f"{row.constant:.4g}" if math.isfinite(row.constant) else "–"
    norm = norm if math.isfinite(row.upper) else "–"
    return [row.name, row.kind, shape, norm, constant, row.note]
