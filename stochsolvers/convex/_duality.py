r"""Lower bounds on convex programs with a norm, and certified gaps, all round-off included.

For minimise_V Σ_j ℓ((A* V)_j, y_j) + β R(V), R a norm on a cone, and r with r_j ∈ dom ℓ*(·, y_j),

    D(s r) = −Σ_j ℓ*(s r_j, y_j) ≤ min        for 0 ≤ s ≤ β / R°(−A r),

R° the dual norm, R°(w) = sup {<w, V> : R(V) ≤ 1}. At r = ∂ℓ(A* V) this needs one product with A.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp

from stochsolvers._typing import Array
from stochsolvers.losses import Loss, Squares
from stochsolvers.problems import LayerProblem
from stochsolvers.prox import _balls

_SHARES = (
    1.0,
    0.5,
    0.25,
    0.125,
    0.0,
)  # of the largest scale, tried for losses that are not squares


def euclidean_norm(W: Array, axes: tuple[int, ...]) -> Array:
    """||W||₂ over some axes, whose squares may leave the range of numbers."""
    return jnp.squeeze(_balls.weighted_norm(axes, W, jnp.ones((1,) * W.ndim, W.dtype)), axes)


def _events(array: Array, like: Array) -> Array:
    return jnp.expand_dims(array, range(array.ndim, like.ndim))


def scaled_dual(problem: LayerProblem, r: Array, norm: Array, beta: Array) -> tuple[Array, Array]:
    """The best D(s r) over the scales s that are tried, and s, each of shape (*batch,).

    Args:
      problem: for its loss, targets and batch axes.
      r: a dual point, shaped as the targets.
      norm: R°(−A r) or more.
      beta: β.
    """
    largest = jnp.where(norm == 0, jnp.inf, beta / jnp.where(norm == 0, 1, norm))  # NaN stays
    loss, y = problem.loss, problem.inputs
    if type(loss) is Squares:
        energy, slope = problem.sum(r * r), problem.sum(r * y)
        s = jnp.clip(-slope / jnp.where(energy > 0, energy, 1), 0, largest)
        return -s * slope - 0.5 * s * s * energy, s
    scales = [share * jnp.minimum(largest, 1.0) for share in _SHARES]
    values = [-problem.sum(loss.conjugate(_events(s, r) * r, y)) for s in scales]
    best = jnp.argmax(jnp.stack(values), axis=0)
    chosen = jnp.take_along_axis(jnp.stack(scales), best[None], axis=0)[0]
    return jnp.max(jnp.stack(values), axis=0), chosen


def product_round_off(problem: LayerProblem, terms: int) -> float:
    """ε with |error| ≤ ε Σ|t| for products that sum so many terms, as `LinearMap` says of large maps."""
    return 4 * math.log2(2 * terms) * float(jnp.finfo(problem.dtype).eps)


class DualNorm(NamedTuple):
    """R°(−A r) with what it takes for a bound on its error.

    Attributes:
      value: R°(−A r), as computed.
      error: |R°(−A r) − value| at most.
    """

    value: Array
    error: Array


def certified_gap(problem: Any, V: Array, u: Array, u_error: Array, dual_norm: Any) -> Array:
    r"""P(V) − D(s r) ≥ P(V) − min P at r = ∂ℓ(u), shape (*batch,), as the sum of two gaps.

        Σ_j [ℓ(u_j) + ℓ*(s r_j) − s u_j r_j] + [β R(V) + s <r, u>],

    Each of them is ≥ 0. Errors of u = A* V, of R° and of sums are added.

    Args:
      problem: with a loss, targets, β and `prior_value`, which is β R.
      V: the variable.
      u: A* V.
      u_error: entrywise bound on its error.
      dual_norm: (r, entrywise error of r or None) ↦ `DualNorm`.
    """
    loss, y, eps = problem.loss, problem.inputs, float(jnp.finfo(problem.dtype).eps)
    rounding = 8 * eps * (1 + math.log2(V.size))
    r = loss.derivative(u, y)
    own_error = None if type(loss).dual_error is Loss.dual_error else loss.dual_error(r, y)
    norm = dual_norm(r, own_error)
    _, s = scaled_dual(problem, r, norm.value + norm.error, problem.beta * (1 - 4 * eps))
    scaled = _events(s, r) * r
    if type(loss) is Squares:
        off = jnp.abs(r - scaled) + u_error
        loss_gap = 0.5 * problem.sum(off * off) * (1 + rounding)
    else:
        terms, sizes, own = loss.gap(u, scaled, y)
        off = jnp.abs(r - scaled)
        loss_gap = problem.sum(jnp.maximum(terms, 0) + own) + rounding * problem.sum(sizes)
        loss_gap += problem.sum(off * u_error + 0.5 * loss.smoothness * u_error * u_error)
    value, product = problem.prior_value(V), problem.sum(scaled * u)
    slack = problem.sum(jnp.abs(scaled) * u_error)
    slack += rounding * (jnp.abs(value) + problem.sum(jnp.abs(scaled * u)))
    gap = loss_gap + jnp.maximum(value + product, 0) + slack
    return jnp.where(jnp.isnan(gap), jnp.inf, gap)
