r"""Exact solutions and conjugate gradients of (AᵀA + I/τ) d = AᵀG, from matrices of rows or a Gram matrix.

All systems are multiplied by τ: (τ AᵀA + I) d = τ AᵀG. Arrays may have a leading axis of groups, whose
systems are independent.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax

from stochsolvers import _linalg
from stochsolvers._shards import varying
from stochsolvers._typing import Array

HIGHEST = lax.Precision.HIGHEST
_BLOCKS, _SMALLEST_BLOCK = 4, 64
UNROLLED = 16
"""Iterations of conjugate gradients up to which no loop is compiled."""


def product(a: Array, b: Array) -> Array:
    """a b in full precision."""
    return jnp.matmul(a, b, precision=HIGHEST)


def exact_by_rows(
    rows: Array, cotangent: Array, tau: Array, bias: bool
) -> tuple[Array, Array | None]:
    r"""τ Aᵀ (τ A Aᵀ + I)⁻¹ G of the rows A, or with a bias A = [rows 1]; the bias's part by itself.

    Args:
      rows: shape (..., N, m).
      cotangent: G, shape (..., N, n).
      tau: τ.
      bias: whether there is one.
    """
    gram = lower_row_gram(rows)
    inverse = tau * _inverse_with_ridge(tau * (gram + 1 if bias else gram))
    if rows.shape[-1] < cotangent.shape[-1]:
        columns = jnp.matmul(product(inverse, rows).mT, cotangent)
        sums = jnp.sum(inverse, -2)[..., None, :]
        return columns, jnp.matmul(sums, cotangent)[..., 0, :] if bias else None
    return _adjoint(rows, product(inverse, cotangent), bias)


def lower_row_gram(rows: Array) -> Array:
    """A Aᵀ of rows (..., N, m) on and below the diagonal; of no use above."""
    count = rows.shape[-2]
    if count < _BLOCKS * _SMALLEST_BLOCK:
        return product(rows, rows.mT)
    ends = [count * (i + 1) // _BLOCKS for i in range(_BLOCKS)]
    parts = []
    for start, end in zip([0, *ends], ends, strict=False):
        part = product(rows[..., start:end, :], rows[..., :end, :].mT)
        parts.append(jnp.pad(part, [*[(0, 0)] * (part.ndim - 1), (0, count - end)]))
    return jnp.concatenate(parts, -2)


def _adjoint(rows: Array, weights: Array, bias: bool) -> tuple[Array, Array | None]:
    return jnp.matmul(rows.mT, weights), jnp.sum(weights, -2) if bias else None


def exact_by_gram(gram: Array, right: Array, tau: Array) -> Array:
    """(τ AᵀA + I)⁻¹ τ AᵀG from AᵀA, shape (..., m, m), and AᵀG, shape (..., m, n)."""
    return product(_inverse_with_ridge(tau * gram), tau * right)


def _inverse_with_ridge(gram: Array) -> Array:
    """(H + I)⁻¹ of H ⪰ 0, shape (..., n, n)."""
    identity = jnp.eye(gram.shape[-1], dtype=gram.dtype)
    return _linalg.inverse(gram + jnp.expand_dims(identity, tuple(range(gram.ndim - 2))))


def conjugate_gradients_by_rows(
    rows: Array, cotangent: Array, tau: Array, bias: bool, num_iters: int
) -> tuple[Array, Array | None]:
    r"""The iterates of `conjugate_gradients` as d = Aᵀ s, from products with τ A Aᵀ (N × N) alone.

    Inner products of the parameters are <Aᵀ s, Aᵀ t> = sᵀ A Aᵀ t.
    """
    gram = product(rows, rows.mT)
    gram = tau * (gram + 1 if bias else gram)
    weights = conjugate_gradients(
        lambda s: product(gram, s), cotangent, num_iters, weight=lambda s, image: image
    )
    return _adjoint(rows, tau * weights, bias)


def conjugate_gradients(
    gram: Callable[[Array], Array],
    right: Array,
    num_iters: int,
    *,
    weight: Callable[[Array, Array], Array] = lambda vector, image: vector,
) -> Array:
    r"""Steps of conjugate gradients on (H + I) d = r from zero, H ⪰ 0, for each column side by side.

    A column of zeros stays one, and one that has converged stays where it is. Columns are scaled to
    entries of at most 1 first, so that no square of theirs vanishes. What overflows is NaN.

    The iteration of `stochsolvers.solvers` is another one: it runs each example to a tolerance, in
    the inner product of D M, where this one takes a fixed number of steps for each column of parameters.

    Args:
      gram: H, for arrays (..., m, n) of n columns.
      right: r, shape (..., m, n).
      num_iters: the number of steps, at one product with H each.
      weight: W v from v and H v, for the inner product <v, w> = (W v)ᵀ w.
    """
    scale = jnp.max(jnp.abs(right), -2, keepdims=True, initial=0)
    r = right / jnp.where(scale > 0, scale, 1)

    def dot(v, image, w):
        return jnp.sum(weight(v, image) * w, -2, keepdims=True)

    def ratio(a, b):
        quotient = jnp.where(b < jnp.inf, a / jnp.where(b > 0, b, 1), jnp.nan)
        return jnp.where(b <= 0, 0, quotient)

    def moved(carry):
        d, r, p, image, rho = carry
        alpha = ratio(rho, dot(p, image, p + image))
        return d + alpha * p, r - alpha * (p + image)

    def step(_, carry):
        *_, p, image, rho = carry
        d, r = moved(carry)
        of_r = gram(r)
        after = dot(r, of_r, r)
        beta = ratio(after, rho)
        return d, r, r + beta * p, of_r + beta * image, after

    image = gram(r)
    first = (jnp.zeros_like(r), r, r, image, dot(r, image, r))
    first = varying(first, first)
    unroll = num_iters <= UNROLLED
    last = lax.fori_loop(0, num_iters - 1, step, first, unroll=unroll) if num_iters > 1 else first
    return scale * moved(last)[0]
