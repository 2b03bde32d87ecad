r"""Anderson's update of type II, for each example: from a few pairs (y_i, T(y_i)) to the next point.

With the residuals g_i = T(y_i) − y_i of the m last points, the next point is

    y⁺ = Σ_i α_i T(y_i),     α = argmin_{Σ α = 1} ||Σ_i α_i g_i||² + δ tr(H) ||α||²,     H_ij = <g_i, g_j>,

by α ∝ (H/tr(H) + δ I)⁻¹ 1. Divided by its trace, H is of one size at every distance from the solution; δ is
1e-10 in float64 and 1e-6 in float32. The m × m systems are solved by unrolled elimination, all examples side
by side.

A mixed point whose residual is larger than the last one's is refused. The next point is then T of the last
point that was not, the pairs before that are forgotten, and some plain steps y⁺ = T(y) follow: one, and twice
as many after every further refusal, half as many after every mixed point that was not refused. Where
||T(a) − T(b)|| ≤ ||a − b|| no plain step has a larger residual, and refusals in a row cost an example about
log₂ of the iterations that the plain one takes.

References:
  Anderson 1965; Walker and Ni 2011, Anderson acceleration for fixed-point iterations.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from stochsolvers._typing import Array


class History(NamedTuple):
    """The last m pairs of each example, in a ring: entry k mod m is that of iteration k.

    Attributes:
      values: T(y_i), shape (m, *batch, ...).
      residuals: g_i in units of `unit`, shaped alike.
      gram: H, shape (m, m, *batch).
      valid: which entries an example uses, shape (m, *batch).
      newest: the entry of the last point that was not refused, shape (*batch,).
      unit: about the largest number of an example, shape (*batch,), so that no square overflows.
      mixed: whether the next point is a mixture, shape (*batch,).
      wait: plain steps that are left, shape (*batch,).
      patience: how many follow the next refusal, shape (*batch,).
    """

    values: Array
    residuals: Array
    gram: Array
    valid: Array
    newest: Array
    unit: Array
    mixed: Array
    wait: Array
    patience: Array


def no_history(point: Array, unit: Array, memory: int) -> History:
    """Before the first iteration, for points shaped as this one."""
    batch = unit.shape
    pairs = jnp.zeros((memory, *point.shape), point.dtype)
    return History(
        pairs,
        pairs,
        jnp.zeros((memory, memory, *batch), point.dtype),
        jnp.zeros((memory, *batch), bool),
        jnp.zeros(batch, jnp.int32),
        unit,
        jnp.zeros(batch, bool),
        jnp.zeros(batch, jnp.int32),
        jnp.ones(batch, jnp.int32),
    )


def mix(history: History, k: Array | int, y: Array, value: Array) -> tuple[History, Array]:
    """The pair (y, T(y)) of iteration k put in, and the next point."""
    history, weights = weigh(history, k, y, value)
    return history, combine(weights, history.values)


def weigh(history: History, k: Array | int, y: Array, value: Array) -> tuple[History, Array]:
    """The pair (y, T(y)) of iteration k put in, and α, shape (m, *batch)."""
    history, slot, refused = _put(history, k, y, value)
    each = jnp.expand_dims(jnp.arange(len(history.values)), range(1, 1 + history.unit.ndim))
    newest = jnp.where(refused, history.newest, slot)
    last = each == newest[None]
    valid = (history.valid & ~refused[None]) | last
    wait = jnp.where(refused, history.patience, jnp.maximum(history.wait - 1, 0))
    easier = jnp.where(history.mixed, jnp.maximum(history.patience // 2, 1), history.patience)
    used = jnp.where(wait[None] > 0, last, valid)
    weights = _weights(history.gram, used)
    history = history._replace(
        valid=valid,
        newest=newest,
        mixed=jnp.sum(used, axis=0) > 1,
        wait=wait,
        patience=jnp.where(refused, 2 * history.patience, easier),
    )
    return history, weights


def combine(weights: Array, arrays: Array) -> Array:
    """Σ_i α_i of arrays (m, *batch, ...) that a ring holds."""
    weights = jnp.expand_dims(weights, range(weights.ndim, arrays.ndim))
    # one after the other: XLA's CPU backend takes several times as long over the stack
    terms = [w * v for w, v in zip(weights, arrays, strict=True)]
    return functools.reduce(jnp.add, terms)


def _put(history: History, k: Array | int, y: Array, value: Array) -> tuple[History, Array, Array]:
    """The history with a pair in its place k mod m, that place, and whether the pair is refused."""
    slot = (jnp.asarray(k) % len(history.values)).astype(history.newest.dtype)
    axes = tuple(range(history.unit.ndim, y.ndim))
    residual = (value - y) / jnp.expand_dims(history.unit, axes)
    residuals = history.residuals.at[slot].set(residual)
    row = jnp.stack([jnp.sum(each * residual, axis=axes) for each in residuals])
    diagonal = jnp.stack([history.gram[i, i] for i in range(len(row))])
    before = jnp.take_along_axis(diagonal, history.newest[None], axis=0)[0]
    refused = lax.stop_gradient((row[slot] > before) & history.mixed)
    history = history._replace(
        values=history.values.at[slot].set(value),
        residuals=residuals,
        gram=history.gram.at[slot].set(row).at[:, slot].set(row),
    )
    return history, slot, refused


def _weights(gram: Array, valid: Array) -> Array:
    """α, shape (m, *batch), 0 for entries that are not valid."""
    memory = len(gram)
    trace = sum(jnp.where(valid[i], gram[i, i], 0) for i in range(memory))
    scale = 1 / jnp.where(trace > 0, trace, 1)
    ridge = 1e-10 if gram.dtype == jnp.float64 else 1e-6
    rows = [
        [
            jnp.where(valid[i] & valid[j], gram[i, j] * scale, 0)
            + (jnp.where(valid[i], ridge, 1.0).astype(gram.dtype) if i == j else 0)
            for j in range(memory)
        ]
        for i in range(memory)
    ]
    weights = jnp.stack(_solve(rows, list(valid.astype(gram.dtype)), ridge))
    return weights / jnp.sum(weights, axis=0, keepdims=True)


def _solve(rows: list[list[Array]], right: list[Array], least: float) -> list[Array]:
    """Elimination without pivots for symmetric matrices whose eigenvalues are at least `least`."""
    size = len(rows)
    for i in range(size):
        rows[i][i] = jnp.maximum(rows[i][i], least)  # but for round-off
        for j in range(i + 1, size):
            factor = rows[i][j] / rows[i][i]
            for column in range(j, size):
                rows[j][column] = rows[j][column] - factor * rows[i][column]
            right[j] = right[j] - factor * right[i]
    solution: list[Array] = [right[0]] * size
    for i in reversed(range(size)):
        known = sum(
            (rows[i][j] * solution[j] for j in range(i + 1, size)), jnp.zeros_like(right[i])
        )
        solution[i] = (right[i] - known) / rows[i][i]
    return solution
