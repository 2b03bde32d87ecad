r"""Spectral functions of matrices, with derivatives that are finite where eigenvalues meet.

f is max(x − c, 0) (`EXCESS`) or min(x, c) (`CAPPED`). Matrices are divided by a power of two near the
largest entry before they are decomposed: the derivatives do not change.
"""

import functools

import jax
import jax.numpy as jnp

from stochsolvers import _linalg
from stochsolvers._typing import Array
from stochsolvers.prox._balls import power_of_two

EXCESS, CAPPED = "excess", "capped"


def symmetric(matrix: Array) -> Array:
    """(M + Mᵀ)/2."""
    return 0.5 * matrix + 0.5 * jnp.swapaxes(matrix, -1, -2)


def product(*factors: Array) -> Array:
    """The matrix product, without the reduced precision that accelerators use by default."""
    return functools.reduce(functools.partial(jnp.matmul, precision="highest"), factors)


def scaled(matrix: Array) -> tuple[Array, Array]:
    """M/s and s of shape (..., 1), a power of two near the largest |entry|."""
    scale = power_of_two(matrix, (-2, -1))
    return matrix / scale, scale[..., 0]


def _apply(function: str, x: Array, bound: Array) -> Array:
    return jax.nn.relu(x - bound) if function == EXCESS else jnp.minimum(x, bound)


def _derivatives(function: str, x: Array, bound: Array) -> tuple[Array, Array]:
    """(f(x_i) − f(x_j))/(x_i − x_j), the derivative where x_i = x_j, and df/dc."""
    high = jnp.maximum(x[..., :, None], x[..., None, :])
    low = jnp.minimum(x[..., :, None], x[..., None, :])
    c = bound[..., None]
    between = (low <= c) & (high > c)
    slope = (high - c) / jnp.where(between, high - low, 1)
    slopes = jnp.where(between, slope, jnp.where(low > c, 1, 0)).astype(x.dtype)
    above = (x > bound).astype(x.dtype)
    # min(x, c) = x − max(x − c, 0)
    return (slopes, -above) if function == EXCESS else (1 - slopes, above)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _of_eigenvalues(function: str, matrix: Array, bound: Array) -> Array:
    """Q f(Λ) Qᵀ for a symmetric matrix QΛQᵀ, c of shape (..., 1) or (..., n)."""
    matrix, scale = scaled(matrix)
    values, vectors = _linalg.eigh(matrix)
    kept = vectors * _apply(function, values, bound / scale)[..., None, :]
    return scale[..., None] * symmetric(product(kept, jnp.swapaxes(vectors, -1, -2)))


@_of_eigenvalues.defjvp
def _of_eigenvalues_jvp(function, primals, tangents):
    # Daleckii–Krein: dF = Q (Γ ∘ Qᵀ dS Q + diag(df/dc)) Qᵀ with Γ the divided differences.
    (matrix, bound), (tangent, dbound) = primals, tangents
    matrix, scale = scaled(matrix)
    values, vectors = _linalg.eigh(matrix)
    transposed = jnp.swapaxes(vectors, -1, -2)
    bound = bound / scale
    kept = vectors * _apply(function, values, bound)[..., None, :]
    slopes, by_bound = _derivatives(function, values, bound)
    inner = slopes * product(transposed, tangent, vectors) + diagonal(by_bound * dbound)
    primal = scale[..., None] * symmetric(product(kept, transposed))
    return primal, product(vectors, inner, transposed)


def diagonal(values: Array) -> Array:
    """Diagonal matrices."""
    size = values.shape[-1]
    eye = jnp.eye(size, dtype=values.dtype).reshape((1,) * (values.ndim - 1) + (size, size))
    return values[..., None, :] * eye


@jax.custom_jvp
def _singular_values(matrix: Array) -> Array:
    """Σ of PΣQᵀ, descending."""
    matrix, scale = scaled(matrix)
    return scale * _linalg.singular_values(matrix)


@_singular_values.defjvp
def _singular_values_jvp(primals, tangents):
    (matrix,), (tangent,) = primals, tangents
    matrix, scale = scaled(matrix)
    left, sigma, right = _linalg.svd(matrix)
    # the diagonal of Pᵀ dV Q
    moved = jnp.sum(left * product(tangent, jnp.swapaxes(right, -1, -2)), -2)
    return scale * sigma, moved


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _of_singular_values(function: str, matrix: Array, bound: Array) -> Array:
    """P f(Σ) Qᵀ for PΣQᵀ, c ≥ 0 of shape (..., 1)."""
    matrix, scale = scaled(matrix)
    left, sigma, right = _linalg.svd(matrix)
    values = _apply(function, sigma, bound / scale)
    return scale[..., None] * product(left * values[..., None, :], right)


@_of_singular_values.defjvp
def _of_singular_values_jvp(function, primals, tangents):
    # Daleckii–Krein for the odd function of [[0, V], [Vᵀ, 0]]: the symmetric part of M = Pᵀ dV Q
    # meets (f_i − f_j)/(σ_i − σ_j), the skew part (f_i + f_j)/(σ_i + σ_j), and what lies outside
    # the ranges of P and Q meets f_i/σ_i.
    (matrix, bound), (tangent, dbound) = primals, tangents
    matrix, scale = scaled(matrix)
    left, sigma, right = _linalg.svd(matrix)
    left_t, right_t = jnp.swapaxes(left, -1, -2), jnp.swapaxes(right, -1, -2)
    bound = bound / scale
    values = _apply(function, sigma, bound)
    minus, by_bound = _derivatives(function, sigma, bound)
    # f(σ)/σ as σ → 0; for c = 0, f is the identity, or 0
    none, identity = bound == 0, float(function == EXCESS)
    minus = jnp.where(none[..., None], identity, minus)
    at_zero = jnp.where(none, identity, 1 - identity).astype(sigma.dtype)
    total = sigma[..., :, None] + sigma[..., None, :]
    plus = (values[..., :, None] + values[..., None, :]) / jnp.where(total > 0, total, 1)
    plus = jnp.where(total > 0, plus, at_zero[..., None])
    ratio = jnp.where(sigma > 0, values / jnp.where(sigma > 0, sigma, 1), at_zero)[..., None, :]
    core = product(left_t, tangent, right_t)
    core_t = jnp.swapaxes(core, -1, -2)
    inner = 0.5 * (minus * (core + core_t) + plus * (core - core_t))
    outer = product(left, inner + diagonal(by_bound * dbound), right)
    rows, columns = matrix.shape[-2:]
    if rows > columns:
        across = product(tangent, right_t)
        outer += product((across - product(left, core)) * ratio, right)
    if columns > rows:
        across = product(left_t, tangent)
        outer += product(left * ratio, across - product(core, right))
    primal = scale[..., None] * product(left * values[..., None, :], right)
    return primal, outer.astype(matrix.dtype)


# outside of any program they are one each, not one an operation
of_eigenvalues = jax.jit(_of_eigenvalues, static_argnums=0)
singular_values = jax.jit(_singular_values)
of_singular_values = jax.jit(_of_singular_values, static_argnums=0)
