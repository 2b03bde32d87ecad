"""What a report needs of each layer: a certified norm, a Lipschitz constant."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from stochsolvers import _layers
from stochsolvers._compilation import jit_once
from stochsolvers._typing import Array, Scalar
from stochsolvers.linear_maps import Conv, Dense, LinearMap
from stochsolvers.lipschitz import operator_bracket, strong_convexity
from stochsolvers.reports._bounds import (
    equilibrium_bound,
    has_bound,
    solver_bound,
    squared_norm_bracket,
)
from stochsolvers.reports._norms import least_eigenvalue, squared_norm
from stochsolvers.reports._progress import Progress
from stochsolvers.reports._propagation import LayerBound
from stochsolvers.reports._trace import Trace

_NARROW = 2.0**-22  # for the rounding of a number to float32
_UNIFORM = 1.05  # ratio of scales from which a normalisation is measured with the layer before it


class Standardisation(NamedTuple):
    """A normalisation (x − m) / sqrt(v + ε) γ + β by the moments of its own input, or without m.

    Attributes:
      scale: γ or None.
      bias: β or None.
      epsilon: ε.
      entries: the most of them that share their moments.
    """

    scale: Array | None
    bias: Array | None
    epsilon: Scalar
    entries: int


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
      fold: (s, t) of a solver layer that returns the u with s u + t = w_K, where `linear_map` is that of w_K;
        of a normalisation y ↦ s y + t behind such a layer, its own; or None.
      channels_last: whether a normalisation is along the last axis.

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
    fold: tuple[Array, Array] | None = None
    channels_last: bool = True

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


Numbers = tuple[float, float, float]
"""Lower and upper bound on a layer's norm, and its Lipschitz constant."""


def measured(parts: Sequence[Part], progress: bool | None = None) -> list[Numbers]:
    """Of each part; of layers that share a kernel once."""
    found: dict[Any, Numbers] = {}
    numbers = []
    note = Progress("norms of layers", len(parts), progress)
    for done, part in enumerate(parts):
        note(done)
        leaves, structure = jax.tree.flatten(_arrays_of(part))
        key = part.kind, structure, tuple(map(id, leaves))
        if key not in found:
            found[key] = _measured(part)
        numbers.append(found[key])
    note(len(parts))
    return numbers


def _arrays_of(part: Part) -> Any:
    normalisation, standardised = part.normalisation, part.standardised
    return part.linear_map, normalisation, part.settings, part.kept, part.equilibrium, standardised


def _measured(part: Part) -> Numbers:
    if part.equilibrium is not None:
        return _as_floats(_measure_equilibrium(*part.equilibrium))
    if part.linear_map is None:
        return _scaling(part)
    lower, upper = norm_of(part.linear_map)
    settings = part.settings
    if settings is None or not part.has_solver_bound:
        return lower, upper, upper
    least = least_eigenvalue(part.linear_map)
    if least is None:
        least = strong_convexity(part.linear_map, upper=jnp.asarray(upper**2))
    known = settings, part.linear_map, upper**2 * (1 + _NARROW), least * (1 - _NARROW)
    constant, is_current = math.nan, False
    if part.reference is not None and np.any(np.asarray(part.reference)):  # zeros are of no kernel
        constant, is_current = jax.device_get(_measure_solver(*known, part.kept, part.reference))
    if not is_current:
        constant, _ = jax.device_get(_measure_solver(*known, None, None))
    return lower, upper, float(constant)


def norm_of(linear_map: LinearMap) -> tuple[float, float]:
    """lower ≤ ||A|| ≤ upper."""
    squares = squared_norm(linear_map)
    if squares is None:
        bracket = jax.device_get(squared_norm_bracket(linear_map))
        squares = float(bracket.lower), float(bracket.upper)
    return math.sqrt(squares[0]), math.sqrt(squares[1])


@jit_once
def _measure_solver(settings, linear_map, upper, least, kept, reference):
    """`solver_bound`, and whether the constant that the layer keeps is of its kernel."""
    dtype = linear_map.dtype
    upper, least = jnp.asarray(upper, dtype), jnp.asarray(least, dtype)
    is_current = jnp.ones((), bool)
    if kept is None or reference is None:
        kept = _layers.current_constant(settings, linear_map, None, None)
    else:
        now = _layers.fingerprint(settings, linear_map)
        is_current = _layers.is_current(reference, now, len(linear_map.in_shape))
    return solver_bound(settings, linear_map, upper, kept, least), is_current


def _as_floats(numbers: Any) -> Numbers:
    lower, upper, constant = map(float, jax.device_get(numbers))
    return lower, upper, constant


def layer_bounds(
    trace: Trace, parts: Sequence[Part], numbers: Sequence[Numbers]
) -> list[LayerBound]:
    """What the propagation needs of each call."""
    bounds, pairs = [], folded_pairs(trace, parts)
    for index, (part, number) in enumerate(zip(parts, numbers, strict=True)):
        A, joined = _joined(trace, parts, index), math.inf
        if A is not None:
            joined = norm_of(A)[1]
        elif index in pairs:
            before, ratio = pairs[index]
            joined = ratio * numbers[before][2] if math.isfinite(ratio) else math.inf
        bounds.append(_layer_bound(part, number, joined))
    return bounds


def folded_pairs(trace: Trace, parts: Sequence[Part]) -> dict[int, tuple[int, float]]:
    r"""The normalisations y ↦ s' y + t' that are folded into the solver layer directly before them.

    With the (s, t) that the solver layer keeps, it and the normalisation are together

        x ↦ s' (y + (w_K − w_1) / s) + t' = (s' / s) w_K + const.,    w_1 = s y + t,

    which has max|s' / s| times the constant of w_K.

    Returns:
      for the index of each such normalisation, that of the solver layer and max|s' / s|: about 1, or +∞ if
      (s', t') and (s, t) differ by more than round-off.
    """
    pairs = {}
    for index, (part, call) in enumerate(zip(parts, trace.calls, strict=True)):
        if call.follows is None or part.normalisation is None or part.fold is None:
            continue
        first, span = parts[call.follows], trace.spans[call.follows]
        if first.settings is None or first.fold is None or first.linear_map is None:
            continue
        batch = span.input_shape[: len(span.input_shape) - len(first.linear_map.in_shape)]
        seen = trace.program.avals[trace.program.steps[span.stop].writes[0]].shape
        if seen == call.input_shape == (*batch, *first.linear_map.out_shape):
            pairs[index] = call.follows, _ratio(part.fold, first.fold)
    return pairs


def _ratio(present: tuple[Array, Array], kept: tuple[Array, Array]) -> float:
    """max|s' / s| for (s', t') and (s, t) that are equal to round-off; else +∞."""
    tolerance = 64 * float(jnp.finfo(jnp.result_type(*kept)).eps)
    (s, t), (s0, t0) = (
        tuple(np.asarray(one, np.float64) for one in pair) for pair in (present, kept)
    )
    if s.shape != s0.shape or not np.all(np.abs(s - s0) <= tolerance * np.abs(s0)):
        return math.inf
    if not np.all(np.abs(t - t0) <= tolerance * (np.abs(t0) + np.max(np.abs(t0)) + 1)):
        return math.inf
    return float(np.max(np.abs(s[s0 != 0] / s0[s0 != 0]), initial=1.0))


def _joined(trace: Trace, parts: Sequence[Part], index: int) -> LinearMap | None:
    """diag(γ / sqrt(v + ε)) A of a batch normalisation directly after an affine layer, or None."""
    before = trace.calls[index].follows
    if before is None or parts[index].normalisation is None or not parts[index].channels_last:
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
    if np.max(np.abs(scale)) <= _UNIFORM * np.min(np.abs(scale)):
        return None  # little to gain over the product of the norms
    kernel = np.asarray(A.kernel)
    return dataclasses.replace(A, kernel=jnp.asarray((kernel * scale).astype(kernel.dtype)))


def _scales(part: Part) -> np.ndarray:
    """γ / sqrt(v + ε) of a batch normalisation."""
    scale, variance, epsilon = cast(Any, part.normalisation)
    inverse = 1 / np.sqrt(np.asarray(variance, np.float64) + float(epsilon))
    return inverse if scale is None else np.asarray(scale, np.float64) * inverse


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
    if (
        part.settings is not None and part.fold is not None
    ):  # with the normalisation behind it alone
        return LayerBound(math.inf, math.inf)
    if part.has_solver_bound and upper > 0:
        side = constant / upper
    largest = math.inf
    if part.standardised is not None:
        scale, bias = (
            default if array is None else float(np.max(np.abs(np.asarray(array, np.float64))))
            for array, default in ((part.standardised.scale, 1.0), (part.standardised.bias, 0.0))
        )
        largest = math.sqrt(part.standardised.entries) * scale + bias
    return LayerBound(constant, side, largest, joined)


@jit_once
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
