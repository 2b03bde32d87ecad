"""Spectral functions of matrices, with derivatives that are finite where eigenvalues meet."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from stochsolvers import _linalg
from stochsolvers._typing import Array


def symmetric(matrix: Array) -> Array:
    """(M + Mᵀ)/2."""
    return 0.5 * (matrix + jnp.swapaxes(matrix, -1, -2))


def product(*factors: Array) -> Array:
    """The matrix product, without the reduced precision that accelerators use by default."""
    return functools.reduce(functools.partial(jnp.matmul, precision="highest"), factors)


def _divided_differences(x: Array, threshold: ArrayLike) -> Array:
    """(f(x_i) − f(x_j))/(x_i − x_j) for f(x) = max(x − c, 0), the derivative where x_i = x_j."""
    high = jnp.maximum(x[..., :, None], x[..., None, :])
    low = jnp.minimum(x[..., :, None], x[..., None, :])
    between = (low <= threshold) & (high > threshold)
    slope = (high - threshold) / jnp.where(between, high - low, 1)
    return jnp.where(between, slope, jnp.where(low > threshold, 1, 0)).astype(x.dtype)


@jax.custom_jvp
def clip_eigenvalues(matrix: Array) -> Array:
    """Q max(Λ, 0) Qᵀ for a symmetric matrix QΛQᵀ."""
    values, vectors = _linalg.eigh(matrix)
    kept = vectors * jax.nn.relu(values)[..., None, :]
    return symmetric(product(kept, jnp.swapaxes(vectors, -1, -2)))


@clip_eigenvalues.defjvp
def _clip_eigenvalues_jvp(primals, tangents):
    # Daleckii–Krein: dF = Q (Γ ∘ Qᵀ dS Q) Qᵀ with Γ the divided differences.
    (matrix,), (tangent,) = primals, tangents
    values, vectors = _linalg.eigh(matrix)
    transposed = jnp.swapaxes(vectors, -1, -2)
    kept = vectors * jax.nn.relu(values)[..., None, :]
    inner = _divided_differences(values, 0) * product(transposed, tangent, vectors)
    return symmetric(product(kept, transposed)), product(vectors, inner, transposed)


@jax.custom_jvp
def shrink(matrix: Array, threshold: Array) -> Array:
    """P max(Σ − c, 0) Qᵀ for PΣQᵀ, c of shape (..., 1)."""
    left, sigma, right = _linalg.svd(matrix)
    return product(left * jax.nn.relu(sigma - threshold)[..., None, :], right)


@shrink.defjvp
def _shrink_jvp(primals, tangents):
    # Daleckii–Krein for the odd function of [[0, V], [Vᵀ, 0]]: the symmetric part of M = Pᵀ dV Q
    # meets (f_i − f_j)/(σ_i − σ_j), the skew part (f_i + f_j)/(σ_i + σ_j), and what lies outside
    # the ranges of P and Q meets f_i/σ_i.
    (matrix, threshold), (tangent, dthreshold) = primals, tangents
    left, sigma, right = _linalg.svd(matrix)
    left_t, right_t = jnp.swapaxes(left, -1, -2), jnp.swapaxes(right, -1, -2)
    shrunk = jax.nn.relu(sigma - threshold)
    safe = jnp.where(shrunk > 0, sigma, 1)
    ratio = (shrunk / safe)[..., None, :]
    total = sigma[..., :, None] + sigma[..., None, :]
    plus = (shrunk[..., :, None] + shrunk[..., None, :]) / jnp.where(total > 0, total, 1)
    minus = _divided_differences(sigma, threshold[..., None])
    core = product(left_t, tangent, right_t)
    core_t = jnp.swapaxes(core, -1, -2)
    inner = 0.5 * (minus * (core + core_t) + plus * (core - core_t))
    inner = inner - jnp.where(shrunk > 0, dthreshold, 0)[..., None, :] * jnp.eye(
        sigma.shape[-1], dtype=sigma.dtype
    )
    outer = product(left, inner, right)
    rows, columns = matrix.shape[-2:]
    if rows > columns:
        across = product(tangent, right_t)
        outer += product((across - product(left, core)) * ratio, right)
    if columns > rows:
        across = product(left_t, tangent)
        outer += product(left * ratio, across - product(core, right))
    return product(left * shrunk[..., None, :], right), outer.astype(matrix.dtype)
