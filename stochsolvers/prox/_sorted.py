r"""Singular values thresholded by weights of their own, largest with largest: sorted ℓ1.

For c_1 ≥ c_2 ≥ … ≥ 0 and σ_1 ≥ σ_2 ≥ …, the prox of Σ c_i σ_i is f(σ) = max(y, 0), y the nearest
non-increasing sequence to σ − c (Bogdan et al. 2015, prop. 2.2): the mean of σ − c over blocks. The
dual ball is Σ_{i ≤ k} σ_i ≤ Σ_{i ≤ k} c_i for all k, and the projection onto it σ − f(σ).
"""

import functools

import jax
import jax.numpy as jnp

from stochsolvers import _linalg
from stochsolvers._typing import Array
from stochsolvers.prox._spectra import EXCESS, diagonal, product, scaled


def blocks(x: Array) -> Array:
    r"""Whether entries are of one block of the nearest non-increasing sequence, shape (..., r, r).

    A block ends at i where min_{j ≤ i} mean(x_j..x_i) ≥ max_{k > i} mean(x_{i+1}..x_k): the ends of the
    smallest concave function above the partial sums. Equal entries stay apart.
    """
    size = x.shape[-1]
    sums = jnp.cumsum(x - jnp.mean(x, -1, keepdims=True), -1)
    before = jnp.pad(sums, [(0, 0)] * (x.ndim - 1) + [(1, 0)])[..., :-1]
    order = jnp.arange(size)
    count = order[None, :] - order[:, None] + 1
    count = jnp.expand_dims(count, range(x.ndim - 1)).astype(x.dtype)
    means = (sums[..., None, :] - before[..., :, None]) / jnp.maximum(count, 1)  # of j..k
    left = jnp.min(jnp.where(count >= 1, means, jnp.inf), -2)[..., :-1]
    right = jnp.max(jnp.where(count >= 1, means, -jnp.inf), -1)[..., 1:]
    slack = 4 * jnp.finfo(x.dtype).eps * jnp.max(jnp.abs(sums), -1, keepdims=True, initial=0)
    ends = jnp.cumsum(left >= right - slack, -1)
    label = jnp.pad(ends, [(0, 0)] * (x.ndim - 1) + [(1, 0)])[..., :size]
    return label[..., :, None] == label[..., None, :]


def _mean(block: Array, x: Array) -> Array:
    """The mean over the entry's block; exact for blocks of one."""
    total = jnp.sum(jnp.where(block, x[..., None, :], 0), -1)
    return total / jnp.sum(block, -1, dtype=x.dtype)


def _apply(function: str, sigma: Array, weights: Array) -> tuple[Array, Array, Array]:
    """f(σ), or σ − f(σ), and the blocks and where f > 0."""
    block = blocks(sigma - weights)
    excess = _mean(block, sigma - weights)
    if function == EXCESS:
        return jax.nn.relu(excess), block, excess > 0
    capped = (sigma - _mean(block, sigma)) + _mean(block, weights)
    capped = jnp.where(excess > 0, jax.nn.relu(capped), sigma)
    # round-off of the means must not leave the ball
    sums, bounds = jnp.cumsum(capped, -1), jnp.cumsum(weights, -1)
    inside = jnp.where(sums > bounds, bounds / jnp.where(sums > bounds, sums, 1), 1)
    return capped * jnp.min(inside, -1, keepdims=True, initial=1), block, excess > 0


def _slopes(sigma: Array, f: Array, block: Array, positive: Array, weights: Array) -> Array:
    """(f_i − f_j)/(σ_i − σ_j), and its limits where σ_i = σ_j."""

    def pairs(x):
        return x[..., :, None], x[..., None, :]

    (a, b), (u, v), (c, d), (p, q) = map(pairs, (sigma, f, weights, positive))
    alone, other = pairs(jnp.sum(block, -1) == 1)
    moved = jnp.abs(a - b)
    slope = jnp.minimum(jnp.abs(u - v) / jnp.where(moved > 0, moved, 1), 1)
    free = alone & other & (c == d) & ((p & q) | (c == 0))
    slope = jnp.where(free, 1, jnp.where(moved > 0, slope, 0))
    return jnp.where(block & ~free, 0, slope)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _of_singular_values(function: str, matrix: Array, weights: Array) -> Array:
    """P f(Σ) Qᵀ (`EXCESS`), or P (Σ − f(Σ)) Qᵀ, for PΣQᵀ and weights of shape (..., r)."""
    matrix, scale = scaled(matrix)
    left, sigma, right = _linalg.svd(matrix)
    values = _apply(function, sigma, weights / scale)[0]
    return scale[..., None] * product(left * values[..., None, :], right)


@_of_singular_values.defjvp
def _of_singular_values_jvp(function, primals, tangents):
    # as that of `_spectra.of_singular_values`; the diagonal of Pᵀ dV Q moves all values of its block
    (matrix, weights), (tangent, dweights) = primals, tangents
    scaled_matrix, scale = scaled(matrix)
    left, sigma, right = _linalg.svd(scaled_matrix)
    left_t, right_t = jnp.swapaxes(left, -1, -2), jnp.swapaxes(right, -1, -2)
    f, block, positive = _apply(EXCESS, sigma, weights / scale)
    at_zero = (weights == 0).astype(sigma.dtype)
    total = sigma[..., :, None] + sigma[..., None, :]
    plus = (f[..., :, None] + f[..., None, :]) / jnp.where(total > 0, total, 1)
    plus = jnp.where(total > 0, plus, at_zero[..., None, :] * at_zero[..., :, None])
    ratio = jnp.where(sigma > 0, f / jnp.where(sigma > 0, sigma, 1), at_zero)[..., None, :]
    core = product(left_t, tangent, right_t)
    core_t = jnp.swapaxes(core, -1, -2)
    minus = _slopes(sigma, f, block, positive, weights)
    straight = jnp.diagonal(core, axis1=-2, axis2=-1)
    moved = jnp.where(positive | (weights == 0), _mean(block, straight - dweights), 0)
    apart = 1 - diagonal(jnp.ones_like(sigma))
    inner = 0.5 * (minus * apart * (core + core_t) + plus * (core - core_t)) + diagonal(moved)
    outer = product(left, inner, right)
    rows, columns = matrix.shape[-2:]
    if rows > columns:
        across = product(tangent, right_t)
        outer += product((across - product(left, core)) * ratio, right)
    if columns > rows:
        across = product(left_t, tangent)
        outer += product(left * ratio, across - product(core, right))
    outer = outer.astype(matrix.dtype)
    primal = _of_singular_values(function, matrix, weights)
    return primal, outer if function == EXCESS else tangent - outer


of_singular_values = jax.jit(_of_singular_values, static_argnums=0)  # as those of `_spectra`
