r"""Values of equilibrium layers with bounds on their round-off.

With v = W z + c, p = σ(v) and h = Wᵀp computed as v + e, σ(v + e) + d and Wᵀp + f,

    ||computed h − h(z)|| ≤ ||f|| + ω (||e|| + ||d||),        ω = ||W||,

for σ brings no two points further apart.
"""

from typing import NamedTuple

import jax.numpy as jnp

from stochsolvers._typing import Array
from stochsolvers.problems._products import Products, tree_round_off, two_sum
from stochsolvers.prox import Prior


class Evaluation(NamedTuple):
    """A value and a bound on the Euclidean norm of its error, for each example."""

    value: Array
    error: Array


def equilibrium_layer(products: Products, drive: Array, prior: Prior, z: Array) -> Evaluation:
    """Wᵀσ(W z + c), W the map of the products."""
    ndim, eps = products.batch_ndim, float(jnp.finfo(z.dtype).eps)
    forward = products.forward(z)
    total, low = two_sum(forward.total, drive)
    v = total + (low + forward.rest)
    moved = norm(forward.error + 2 * eps * jnp.abs(v), ndim)
    p = proximal_step(prior, v, 1.0, ndim)
    back = products.backward(p.value)
    value = back.total + back.rest
    error = norm(back.error + eps * jnp.abs(value), ndim)
    return Evaluation(value, error + 1.01 * jnp.sqrt(products.constant) * (moved + p.error))


def proximal_step(prior: Prior, v: Array, step: Array | float, batch_ndim: int) -> Evaluation:
    """prox_{ηg}(v) with the round-off of formulas, and of decompositions if g is not separable."""
    value, eps = prior.prox(v, step), float(jnp.finfo(v.dtype).eps)
    sizes = jnp.abs(v) + jnp.abs(value)
    size = 0 if prior.separable else max(v.shape[batch_ndim:])
    return Evaluation(value, (8 + 8 * size) * eps * norm(sizes, batch_ndim))


def distance(z: Array, evaluation: Evaluation, batch_ndim: int) -> Array:
    """A bound on ||z − T(z)||, from T(z) with its error; +∞ if that is no number."""
    shape = z.shape[batch_ndim:]
    step = (1 + tree_round_off(shape, z)) * norm(z - evaluation.value, batch_ndim)
    bound = step + 1.01 * evaluation.error
    return jnp.where(jnp.isnan(bound), jnp.inf, bound)


def norm(array: Array, batch_ndim: int) -> Array:
    """The Euclidean norm of each example, in units of its largest entry: no square over- or underflows."""
    axes = tuple(range(batch_ndim, array.ndim))
    largest = jnp.max(jnp.abs(array), axis=axes, initial=0)
    unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    return unit * jnp.sqrt(jnp.sum((array / jnp.expand_dims(unit, axes)) ** 2, axis=axes))
