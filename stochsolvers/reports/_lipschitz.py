r"""Spectral norms of a network's layers, and the Lipschitz bound that they prove.

The bound is propagated through the graph of the forward pass, value by value (`_propagation`): a layer
multiplies the constant of its input by its own ℓ, an addition adds those of its terms, a concatenation takes
the root of the sum of their squares. For a chain f = h_n ∘ f_n ∘ … ∘ h_1 ∘ f_1 ∘ h_0 it is the product

    ||f(x) − f(y)|| ≤ c_0 ⋯ c_n ℓ_1 ⋯ ℓ_n ||x − y||,

for a residual connection x + f(x) it is 1 + ℓ_f.

ℓ_i is ||A_i|| for an affine layer, max_c |γ_c| / sqrt(v_c + ε) for batch normalisation at inference (of it and
the layer before it ||diag(γ / sqrt(v + ε)) A_i||), max_c |γ_c| / sqrt(ε) for a normalisation by the variance
of its own input, `solver_bound` for a solver, `equilibrium_bound` for an equilibrium layer (of the map to the
equilibrium, which its solver approximates to a tolerance); the c_i are those of the operations between the
layers. Where a layer has no norm or an operation no constant that is known, the bound is infinite, and the
report names the cause.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from stochsolvers import _checks, _layers
from stochsolvers._typing import Array, Scalar
from stochsolvers.linear_maps import Conv, Dense, LinearMap
from stochsolvers.lipschitz import operator_bracket
from stochsolvers.reports import _table
from stochsolvers.reports._bounds import (
    equilibrium_bound,
    has_bound,
    solver_bound,
    squared_norm_bracket,
)
from stochsolvers.reports._entries import Entries, sizes_at_zero
from stochsolvers.reports._propagation import LayerBound, names_between, propagate
from stochsolvers.reports._trace import Call, Trace

_BYPASSED = "on one of several paths"
_NOT_BOUNDED = "not bounded"
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


class Standardisation(NamedTuple):
    """A normalisation (x − m) / sqrt(v + ε) γ + β by the moments of its own input, or without m.

    Attributes:
      scale: γ or None.
      bias: β or None.
      epsilon: ε.
      count: the most entries that share their moments.
    """

    scale: Array | None
    bias: Array | None
    epsilon: Scalar
    count: int


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
      standardised: of a normalisation by the moments of its own input, or None.

    A part that is none of these has no bound.
    """

    kind: str
    linear_map: LinearMap | None = None
    normalisation: tuple[Array | None, Array, Scalar] | None = None
    settings: _layers.Settings | None = None
    kept: Array | None = None
    reference: Array | None = None
    equilibrium: tuple[Any, tuple[LinearMap | None, ...]] | None = None
    standardised: "Standardisation | None" = None

    @property
    def bounded(self) -> bool:
        """Whether there is a norm to compute."""
        kinds = self.linear_map, self.normalisation, self.equilibrium, self.standardised
        return any(kind is not None for kind in kinds)

    @property
    def measured(self) -> bool:
        """Whether its norm is that of a map."""
        return self.linear_map is not None or self.equilibrium is not None

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
        from stochsolvers.reports._chart import bar_chart

        return bar_chart(self, ax)


def norms_report(
    trace: Trace,
    parts: Sequence[Part],
    strays: Mapping[str, int],
    kinds: Mapping[str, str],
    radius: float | None = None,
) -> LipschitzReport:
    """The report on a traced network, all norms from one compiled call.

    Args:
      trace: of the forward pass.
      parts: one for each of its calls.
      strays: position of each module with parameters that no known layer accounts for, by name.
      kinds: its class, by name.
      radius: of the ball of inputs that the bound is to hold for, or None for all inputs.
    """
    if radius is not None and not (isinstance(radius, int | float) and 0 <= radius < math.inf):
        _checks.fail("radius", "a finite number ≥ 0, or None", radius)
    joined = {i: A for i, part in enumerate(parts) if (A := _joined(trace, parts, i)) is not None}
    arrays = [
        (
            p.linear_map,
            p.settings if p.has_solver_bound else None,
            p.kept,
            p.reference,
            p.equilibrium,
        )
        for p in parts
        if p.measured
    ] + [(A, None, None, None, None) for A in joined.values()]
    measured = iter(jax.device_get(_measure(arrays)) if arrays else ())
    numbers = [next(measured) if p.measured else _scaling(p) for p in parts]
    together = {i: float(next(measured)[1]) for i in joined}
    layers = [
        _layer_bound(part, number, together.get(i, math.inf))
        for i, (part, number) in enumerate(zip(parts, numbers, strict=True))
    ]

    entries = Entries(trace.program, trace.dependent)
    plain = propagate(trace, [LayerBound()] * len(layers), entries)
    ball = math.inf if radius is None else float(radius)
    zero = sizes_at_zero(trace) if math.isfinite(ball) else None
    proved = propagate(trace, layers, entries, ball, zero)
    unknown = proved.unknown if math.isfinite(ball) else plain.unknown
    is_bounded = math.isfinite(proved.constant)

    rows = [
        (call.position, _row(call, part, number))
        for call, part, number in zip(trace.calls, parts, numbers, strict=True)
    ]
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


def _joined(trace: Trace, parts: Sequence[Part], index: int) -> LinearMap | None:
    """diag(γ / sqrt(v + ε)) A of a batch normalisation directly after an affine layer, or None."""
    before = trace.calls[index].follows
    if before is None or parts[index].normalisation is None:
        return None
    first, call = parts[before], trace.calls[before]
    A = first.linear_map
    if first.settings is not None or not isinstance(A, Conv | Dense):
        return None
    shape = (*call.input_shape[: len(call.input_shape) - len(A.in_shape)], *A.out_shape)
    span = trace.spans[before]
    seen = trace.program.avals[trace.program.steps[span.stop].writes[0]].shape
    scale = _scales(parts[index])
    if not seen == shape == trace.calls[index].input_shape or scale.shape != (A.kernel.shape[-1],):
        return None
    kernel = np.asarray(A.kernel)
    return dataclasses.replace(A, kernel=jnp.asarray((kernel * scale).astype(kernel.dtype)))


def _scales(part: Part) -> np.ndarray:
    """γ / sqrt(v + ε) of a batch normalisation."""
    scale, variance, epsilon = cast(Any, part.normalisation)
    inverse = 1 / np.sqrt(np.asarray(variance, np.float64) + float(epsilon))
    scales = inverse if scale is None else np.asarray(scale, np.float64) * inverse
    return scales


def _scaling(part: Part) -> tuple[float, float, float]:
    """Lower and upper bounds on the norm, and the constant, of what is no map."""
    if part.normalisation is not None:
        largest = float(np.max(np.abs(_scales(part))))
    elif part.standardised is not None:
        scale = 1.0 if part.standardised.scale is None else part.standardised.scale
        epsilon = float(part.standardised.epsilon)
        largest = float(np.max(np.abs(np.asarray(scale, np.float64))))
        largest = largest / math.sqrt(epsilon) if epsilon > 0 else math.inf
    else:
        return 0.0, math.inf, math.inf
    return largest, largest, largest


def _layer_bound(part: Part, numbers: Sequence[Any], joined: float) -> LayerBound:
    """What the propagation needs of one call."""
    _, upper, constant = map(float, numbers)
    side = math.inf
    if not part.bounded or (part.settings is not None and not part.has_solver_bound):
        return LayerBound(math.inf, math.inf)
    if part.has_solver_bound and upper > 0:
        side = constant / upper
    largest = math.inf
    if part.standardised is not None:
        scale, bias = (
            default if array is None else float(np.max(np.abs(np.asarray(array, np.float64))))
            for array, default in ((part.standardised.scale, 1.0), (part.standardised.bias, 0.0))
        )
        largest = math.sqrt(part.standardised.count) * scale + bias
    return LayerBound(constant, side, largest, joined)


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


def _measure_one(linear_map, settings, kept, reference, equilibrium):
    if equilibrium is not None:
        return _measure_equilibrium(*equilibrium)
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
    elif part.standardised is not None and not note:
        note = _STANDARDISED
    return LayerNorm(call.name, part.kind, call.input_shape, lower, upper, constant, note)


def _cells(row: LayerNorm) -> list[str]:
    shape = "×".join(map(str, row.input_shape)) or "–"
    ends = f"{row.lower:.4g}", f"{row.upper:.4g}"
    norm = ends[0] if ends[0] == ends[1] else f"[{', '.join(ends)}]"
    constant = f"{row.constant:.4g}" if math.isfinite(row.constant) else "–"
    norm = norm if math.isfinite(row.upper) else "–"
    return [row.name, row.kind, shape, norm, constant, row.note]
