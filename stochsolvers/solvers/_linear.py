r"""Linear systems (I − J) u = v of fixed points, for each example, at one product with J an iteration.

For a symmetric J with 0 ⪯ J ⪯ I, conjugate gradients. Else the fixed point u = v + J u, accelerated as
`solvers.Anderson` is: with ‖J‖ ≤ ω < 1 it converges at least at the rate ω.

Both know their residual v − (I − J) u at the end. An example whose residual is neither at most tol ||v|| nor
of the size of round-off, some ε (||v|| + ||u||), has not been solved.

References:
  Hestenes and Stiefel 1952; Bai, Kolter and Koltun 2019, section 3.1.3.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from stochsolvers._shards import varying
from stochsolvers._typing import Array
from stochsolvers.solvers._mixing import History, mix, no_history

_MEMORY = 5
ROUND_OFF = 50.0  # ε times sizes: a residual of it is no failure


def solve(
    operator: Callable[[Array], Array],
    right_side: Array,
    start: Array | None,
    tol: Array,
    max_iters: int,
    batch_ndim: int,
    *,
    symmetric: bool,
    mark: bool,
) -> Array:
    """(I − J)⁻¹ v for each example, the first `batch_ndim` axes, given u ↦ (I − J) u.

    Args:
      operator: I − J.
      right_side: v.
      start: where to start from, if not from scratch.
      tol: residual over ||v|| at which an example is solved.
      max_iters: the most iterations.
      batch_ndim: number of batch axes.
      symmetric: whether 0 ⪯ J ⪯ I.
      mark: NaN for examples that have not been solved.
    """
    axes = tuple(range(batch_ndim, right_side.ndim))

    def spread(weights):
        return jnp.expand_dims(weights, axes)

    def dot(a, b):
        return jnp.sum(a * b, axis=axes)

    # in units of the largest entry: small cotangents have squares that are zero
    largest = jnp.max(jnp.abs(right_side), axis=axes, initial=0)
    unit = jnp.where(largest > 0, largest, 1)
    right_side = right_side / spread(unit)
    start = None if start is None else start / spread(unit)
    method = _conjugate_gradients if symmetric else _accelerated
    solution, residual = method(operator, right_side, start, tol, max_iters, dot, spread)
    if mark:
        eps = jnp.finfo(right_side.dtype).eps
        size = dot(right_side, right_side)
        floor = (ROUND_OFF * eps) ** 2 * (size + dot(solution, solution))
        solved = residual <= jnp.maximum(tol**2 * size, floor)
        solution = jnp.where(spread(solved), solution, jnp.nan)
    return solution * spread(unit)


class _Iterate(NamedTuple):
    """Conjugate gradients: solution, residual, direction, ||residual||², running."""

    u: Array
    r: Array
    d: Array
    rho: Array
    running: Array


def _conjugate_gradients(operator, right_side, start, tol, max_iters, dot, spread):
    """The solution of each example, and ||v − (I − J) u||²."""
    eps = jnp.finfo(right_side.dtype).eps
    target = tol**2 * dot(right_side, right_side)
    residual = right_side
    if start is None:
        start = jnp.zeros_like(right_side)
    else:
        residual = right_side - operator(start)
    rho = dot(residual, residual)

    def unfinished(carry):
        k, state = carry
        return (k < max_iters) & jnp.any(state.running)

    def step(carry):
        k, s = carry
        product = operator(s.d)
        curvature = dot(s.d, product)
        running = s.running & (curvature > eps * dot(s.d, s.d))  # else J has the eigenvalue 1
        alpha = jnp.where(running, s.rho / jnp.where(running, curvature, 1), 0)
        u, r = s.u + spread(alpha) * s.d, s.r - spread(alpha) * product
        rho = dot(r, r)
        beta = jnp.where(running, rho / jnp.where(running, s.rho, 1), 0)
        d = r + spread(beta) * s.d
        return k + 1, _Iterate(u, r, d, rho, running & (rho > target))

    first = varying(_Iterate(start, residual, residual, rho, rho > target), rho)
    last = lax.while_loop(unfinished, step, (0, first))[1]
    return last.u, last.rho


class _Mixed(NamedTuple):
    """The next point and its history; each example's solution, its ||residual||², and whether it runs."""

    y: Array
    history: History
    u: Array
    rho: Array
    running: Array


def _accelerated(operator, right_side, start, tol, max_iters, dot, spread):
    """The solution of each example, and the ||v − (I − J) u||² of the point before."""
    eps = jnp.finfo(right_side.dtype).eps
    size = dot(right_side, right_side)

    def unfinished(carry):
        k, state = carry
        return (k < max_iters) & jnp.any(state.running)

    def step(carry):
        k, s = carry
        residual = right_side - operator(s.y)
        value, rho = s.y + residual, dot(residual, residual)
        history, y = mix(s.history, k, s.y, value)
        floor = (4 * eps) ** 2 * (size + dot(value, value))
        running = s.running & (rho > jnp.maximum(tol**2 * size, floor))
        u = jnp.where(spread(s.running), value, s.u)
        return k + 1, _Mixed(y, history, u, jnp.where(s.running, rho, s.rho), running)

    start, unit = right_side if start is None else start, jnp.ones_like(size)
    running = jnp.ones(size.shape, bool)
    first = _Mixed(start, no_history(start, unit, _MEMORY), start, size, running)
    first = varying(first, (start, size))
    last = lax.while_loop(unfinished, step, (0, first))[1]
    return last.u, last.rho
