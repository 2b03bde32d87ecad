r"""Spectral norms of a network's layers, and the Lipschitz bound that they prove.

A network f = h_n ∘ f_n ∘ … ∘ h_1 ∘ f_1 ∘ h_0 of layers f_i with constants ℓ_i, and of functions h_i
with constants c_i, satisfies

    ||f(x) − f(y)|| ≤ c_0 ⋯ c_n ℓ_1 ⋯ ℓ_n ||x − y||.

ℓ_i is ||A_i|| for an affine layer, max_c |γ_c| / sqrt(v_c + ε) for batch normalisation at inference, and
`solver_bound` for a solver, `equilibrium_bound` for an equilibrium layer (of the map to the equilibrium,
which its solver approximates to a tolerance); the c_i are those of the operations between the layers. The
product proves nothing where the output sees the input on a way around a layer, as with a residual
connection, where there are parameters that no known layer accounts for, nor where an operation has no
constant that is known: the bound is then infinite, and the report names the cause.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from stochsolvers import _checks, _layers
from stochsolvers._typing import Array, Scalar
from stochsolvers.linear_maps import LinearMap
from stochsolvers.lipschitz import operator_bracket
from stochsolvers.reports import _table
from stochsolvers.reports._bounds import (
    equilibrium_bound,
    has_bound,
    solver_bound,
    squared_norm_bracket,
)
from stochsolvers.reports._trace import Call, Trace

_BYPASSED = "on one of several paths"
_NOT_BOUNDED = "not bounded"


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
class Part:
    """What a Flax room knows of one layer.

    Attributes:
      kind: name of the layer's class.
      linear_map: A, or None.
      normalisation: γ or None, v and ε of a normalisation at inference, which scales its channels by
        γ / sqrt(v + ε); or None.
      settings: of a solver layer, or None.
      kept: the constant that a solver layer keeps, or None.
      reference: the fingerprint of what it is of, or None.
      equilibrium: the problem of an equilibrium layer, and the map U of each of its layers, None for the
        identity; or None.

    A part that is neither a map nor a normalisation nor an equilibrium has no bound.
    """

    kind: str
    linear_map: LinearMap | None = None
    normalisation: tuple[Array | None, Array, Scalar] | None = None
    settings: _layers.Settings | None = None
    kept: Array | None = None
    reference: Array | None = None
    equilibrium: tuple[Any, tuple[LinearMap | None, ...]] | None = None

    @property
    def bounded(self) -> bool:
        """Whether there is a norm to compute."""
        kinds = self.linear_map, self.normalisation, self.equilibrium
        return any(kind is not None for kind in kinds)

    @property
    def has_solver_bound(self) -> bool:
        """Whether it is a solver layer for which `solver_bound` holds."""
        settings = self.settings
        return settings is not None and has_bound(settings.solver, settings.loss)


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
      factor: their part of the bound, c_0 ⋯ c_n; 1 for activations such as ReLU and pools of disjoint
        windows, 0 where the output does not depend on the input, infinite where it is not known.
      unknown: names of the operations that have no constant, or none that is known, such as `sign` and
        the product of two functions of the input.
    """

    rows: tuple[LayerNorm, ...]
    between: tuple[str, ...]
    factor: float
    unknown: tuple[str, ...]

    @property
    def product(self) -> float:
        """The product of the layers' constants, whether or not it bounds the network's."""
        return math.prod(row.constant for row in self.rows)

    @property
    def bound(self) -> float:
        """A Lipschitz constant of the network; infinite where none is proved."""
        if self.factor == 0.0:
            return 0.0
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
            lines.append(f"Lipschitz bound of the network: {self.bound:.4g}{between}")
        else:
            lines.append(f"No Lipschitz bound of the network; product: {self.product:.4g}")
        if self.unknown and self.factor:
            lines.append(f"No Lipschitz constant is known of: {', '.join(self.unknown)}")
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
        from stochsolvers.reports._chart import bar_chart

        return bar_chart(self, ax)


def norms_report(
    trace: Trace, parts: Sequence[Part], strays: Mapping[str, int], kinds: Mapping[str, str]
) -> LipschitzReport:
    """The report on a traced network, all norms from one compiled call.

    Args:
      trace: of the forward pass.
      parts: one for each of its calls.
      strays: position of each module with parameters that no known layer accounts for, by name.
      kinds: its class, by name.
    """
    arrays = [
        (
            p.linear_map,
            p.normalisation,
            p.settings if p.has_solver_bound else None,
            p.kept,
            p.reference,
            p.equilibrium,
        )
        for p in parts
        if p.bounded
    ]
    measured = iter(jax.device_get(_measure(arrays)))
    rows = []
    for call, part in zip(trace.calls, parts, strict=True):
        numbers = next(measured) if part.bounded else (0.0, math.inf, math.inf)
        rows.append((call.position, _row(call, part, numbers)))
    for name, position in strays.items():
        missing = LayerNorm(name, kinds[name], (), 0.0, math.inf, math.inf, _NOT_BOUNDED)
        rows.append((position, missing))
    rows.sort(key=lambda entry: entry[0])
    rows = tuple(row for _, row in rows)
    return LipschitzReport(rows, trace.between, trace.factor, trace.unknown)


@jax.jit
def _measure(parts: list[Any]) -> list[tuple[Array, Array, Array]]:
    """Lower and upper bounds on each norm, and the layer's constant.

    Layers of the same structure and shapes are one loop, so that a deep network compiles as fast as
    its different layers.
    """
    groups: dict[Any, list[int]] = {}
    for i, part in enumerate(parts):
        leaves, structure = jax.tree.flatten(part)
        key = structure, tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
        groups.setdefault(key, []).append(i)
    results: dict[int, tuple[Array, Array, Array]] = {}
    for members in groups.values():
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(parts[i] for i in members))
        measured = jax.lax.map(lambda part: _measure_one(*part), stacked)
        for place, i in enumerate(members):
            results[i] = jax.tree.map(lambda array, place=place: array[place], measured)
    return [results[i] for i in range(len(parts))]


def _measure_one(linear_map, normalisation, settings, kept, reference, equilibrium):
    if equilibrium is not None:
        return _measure_equilibrium(*equilibrium)
    if linear_map is None:
        scale, variance, epsilon = normalisation
        largest = jnp.max(
            jnp.abs(1.0 if scale is None else scale) * jax.lax.rsqrt(variance + epsilon)
        )
        return largest, largest, largest
    bracket = squared_norm_bracket(linear_map)
    lower, upper = jnp.sqrt(bracket.lower), jnp.sqrt(bracket.upper)
    if settings is None:
        return lower, upper, upper
    constant = _layers.current_constant(settings, linear_map, kept, reference)
    return lower, upper, solver_bound(settings, linear_map, bracket.upper, constant)


def _measure_equilibrium(
    problem: Any, input_maps: Sequence[LinearMap | None]
) -> tuple[Array, Array, Array]:
    one = jnp.ones((), problem.dtype)
    inputs = [
        (one, one) if A is None else tuple(jnp.sqrt(end) for end in squared_norm_bracket(A))
        for A in input_maps
    ]
    layers = getattr(problem, "equilibria", (problem,))
    squared_norms = [operator_bracket(layer.linear_map).upper for layer in layers]
    bound = equilibrium_bound(problem, squared_norms, [upper for _, upper in inputs])
    lower = jnp.max(jnp.stack([lower for lower, _ in inputs]))
    return lower, jnp.linalg.norm(jnp.stack([upper for _, upper in inputs])), bound


def _row(call: Call, part: Part, numbers: Sequence[Any]) -> LayerNorm:
    lower, upper, constant = map(float, numbers)
    note = "" if call.on_every_path else _BYPASSED
    if not part.bounded:
        note = _NOT_BOUNDED
    elif part.settings is not None and not part.has_solver_bound:
        constant, note = math.inf, _NOT_BOUNDED
    return LayerNorm(call.label, part.kind, call.input_shape, lower, upper, constant, note)


def _cells(row: LayerNorm) -> list[str]:
    shape = "×".join(map(str, row.input_shape)) or "–"
    ends = f"{row.lower:.4g}", f"{row.upper:.4g}"
    norm = ends[0] if ends[0] == ends[1] else f"[{', '.join(ends)}]"
    constant = f"{row.constant:.4g}" if math.isfinite(row.constant) else "–"
    norm = norm if math.isfinite(row.upper) else "–"
    return [row.name, row.kind, shape, norm, constant, row.note]
