r"""Search for unit neurons that respond to a dual point more than it allows.

    ascend  ||Θ (X u)₊||₂  over  ||u|| ≤ 1,       Θ of shape (C, n);   for one output |θᵀ(X u)₊|

by normalised subgradient steps from many starts, which prove nothing: the maximum is NP-hard.

References:
  Pilanci and Ergen 2020, section 3 (the constraint); Bach 2017, Breaking the curse of dimensionality with
  convex neural networks, section 3.2 (conditional gradients over neurons).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from stochsolvers import _checks
from stochsolvers._typing import Array, Scalar, at_least_float32, value_object
from stochsolvers.convex import _inputs
from stochsolvers.convex._patterns import Patterns


@value_object
class Responses:
    """Unit neurons u found, shape (d, S), ||Θ(X u)₊||, shape (S,), and Θ(X u)₊ in units of it, (C, S)."""

    units: Array
    values: Array
    outputs: Array


def separate(
    key: Array,
    X: Any,
    v: Any,
    patterns: Patterns | None = None,
    *,
    threshold: Scalar = 0.0,
    starts: Any = None,
    num_starts: int = 256,
    num_iters: int = 150,
    max_gates: int | None = None,
) -> Patterns | None:
    r"""Gates u whose neurons violate ||v (X u)₊|| ≤ threshold: the largest first, one for each pattern.

    Gates added to a sampled program where v = −∂ℓ is the dual point of its solution, and the threshold β.
    Every gate found also violates ||XᵀD v|| ≤ threshold, the constraint of the gated program.

    Args:
      key: of the random starts.
      X: data, shape (n, d).
      v: dual point, shape (n,) or (C, n).
      patterns: gates whose patterns are not to be returned again.
      threshold: traced or not; gates at or below it are left out.
      starts: further starts, shape (d, S): the neurons of a network.
      num_starts: Gaussian starts.
      num_iters: steps from each.
      max_gates: at most so many gates; None for all.

    Returns:
      `Patterns`, or None where nothing above the threshold was found, which proves nothing. Not for jit.
    """
    if patterns is not None:
        _checks.instance("patterns", patterns, Patterns, "Patterns, or None")
    if max_gates is not None:
        max_gates = _checks.count("max_gates", max_gates)
    _checks.non_negative("threshold", threshold)
    _checks.rank("threshold", threshold, 0)
    found = search_responses(key, X, v, starts=starts, num_starts=num_starts, num_iters=num_iters)
    values = np.asarray(found.values)
    order = np.argsort(-values)
    order = order[values[order] > float(threshold)]
    mask = np.asarray(jnp.asarray(X, found.units.dtype) @ found.units >= 0)
    known = (
        set() if patterns is None else {m.tobytes() for m in np.packbits(patterns.mask, axis=0).T}
    )
    packed = np.packbits(mask, axis=0).T
    kept: list[int] = []
    for i in order:
        if packed[i].tobytes() not in known and (max_gates is None or len(kept) < max_gates):
            known.add(packed[i].tobytes())
            kept.append(int(i))
    return Patterns(found.units[:, np.array(kept)], jnp.asarray(mask[:, kept])) if kept else None


def search_responses(
    key: Array,
    X: Any,
    v: Any,
    *,
    starts: Any = None,
    num_starts: int = 256,
    num_iters: int = 150,
) -> Responses:
    """The best point of each ascent; arguments as in `separate`."""
    _checks.random_key("key", key)
    _checks.rank("X", X, 2)
    _checks.real_array("dual point", v)
    if jnp.ndim(v) not in (1, 2) or jnp.shape(v)[-1] != jnp.shape(X)[0]:
        _checks.fail("shape of the dual point", f"(..., {jnp.shape(X)[0]})", jnp.shape(v))
    _inputs.finite("X", X)
    _inputs.finite("dual point", v)
    _checks.count("num_starts", num_starts)
    _checks.count("num_iters", num_iters)
    dtype = at_least_float32(jnp.result_type(X))
    X, theta = jnp.asarray(X, dtype), jnp.asarray(v, dtype).reshape(-1, jnp.shape(v)[-1])
    if starts is None:
        starts = jnp.zeros((X.shape[1], 0), dtype)
    starts = jnp.asarray(starts, dtype)
    return _search(key, X, theta, starts, num_starts, jnp.asarray(num_iters))


@jax.jit(static_argnums=4)
def _search(key: Array, X: Array, theta: Array, starts: Array, num: int, num_iters: Array):
    gaussian = jax.random.normal(key, (X.shape[1], num), X.dtype)
    return _ascend(X, theta, _unit(jnp.concatenate([starts, gaussian], axis=1)), num_iters)


def _ascend(X: Array, theta: Array, units: Array, num_iters: Array) -> Responses:
    """u ← (u + s g/||g||)/||·||, g a subgradient, s = ½ · 10^(−3k/K); the best point of each start."""

    def step(k, state):
        units, best = state
        values, outputs, gradient = _respond(X, theta, units)
        better = values > best.values
        best = Responses(
            jnp.where(better[None, :], units, best.units),
            jnp.where(better, values, best.values),
            jnp.where(better[None, :], outputs, best.outputs),
        )
        size = 0.5 * 10 ** (-3 * k.astype(X.dtype) / num_iters)
        return _unit(units + size * _unit(gradient)), best

    values, outputs, _ = _respond(X, theta, units)
    _, best = lax.fori_loop(0, num_iters, step, (units, Responses(units, values, outputs)))
    return best


def _respond(X: Array, theta: Array, units: Array) -> tuple[Array, Array, Array]:
    """||Θ(X u)₊||, Θ(X u)₊ in units of it, and a subgradient of the first."""
    linear = X @ units
    response = theta @ jnp.maximum(linear, 0)
    values = jnp.linalg.norm(response, axis=0)
    outputs = response / jnp.where(values > 0, values, 1)[None, :]
    return values, outputs, X.T @ jnp.where(linear > 0, theta.T @ outputs, 0)


def _unit(columns: Array) -> Array:
    norms = jnp.linalg.norm(columns, axis=0, keepdims=True)
    return columns / jnp.where(norms > 0, norms, 1)


def distinct(found: Responses, num: int, threshold: float = 0.0) -> list[int]:
    """Indices of the largest responses above the threshold, no two of which are nearly the same neuron."""
    units, values, outputs = (np.asarray(a) for a in (found.units, found.values, found.outputs))
    kept: list[int] = []
    for i in np.argsort(-values):
        if values[i] <= threshold or len(kept) == num:
            break
        near = units[:, kept].T @ units[:, i] > 0.999
        if not np.any(near & (np.sum(outputs[:, kept] * outputs[:, [i]], axis=0) > 0.999)):
            kept.append(int(i))
    return kept
