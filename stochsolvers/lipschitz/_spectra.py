"""Largest eigenvalues of Gram matrices: cheap bounds, Lanczos, a Cholesky certificate, round-off."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from stochsolvers._typing import Array

_SLICE = 128  # length of one inner product of a Gram matrix; the worst round-off grows with it


class Symbols(NamedTuple):
    """A stack of matrices re + i im, shape (..., m, n) with n ≤ m; im is None if they are real."""

    re: Array
    im: Array | None

    @property
    def modulus(self) -> Array:
        """Entrywise absolute values."""
        return jnp.abs(self.re) if self.im is None else jnp.sqrt(self.re**2 + self.im**2)


def unit_round_off(dtype) -> float:
    """u, the largest relative error of one rounding."""
    return float(jnp.finfo(dtype).eps) / 2


def gamma(count: int, dtype) -> float:
    """γ_k = k u / (1 − k u): the relative error of k roundings in a row (Higham 2002, lemma 3.1)."""
    total = count * unit_round_off(dtype)
    return total / (1 - total) if total < 0.5 else math.inf


def grams(symbols: Symbols) -> Array:
    r"""MᴴM of every matrix by real products, shape (..., n, n), with inner products in slices.

    Three real products: PᵀP + QᵀQ and PᵀQ, whose transpose makes up the imaginary part.
    """

    def products(p, q):
        real = _product(p, p)
        if q is None:
            return real
        mixed = _product(p, q)
        return lax.complex(real + _product(q, q), mixed - jnp.swapaxes(mixed, -1, -2))

    rows = symbols.re.shape[-2]
    slices = -(-rows // _SLICE)
    if slices == 1:
        return products(*symbols)
    pad = [(0, 0)] * (symbols.re.ndim - 2) + [(0, slices * _SLICE - rows), (0, 0)]
    padded = jax.tree.map(lambda part: jnp.pad(part, pad), symbols)

    def add(k, total):
        part = jax.tree.map(
            lambda part: lax.dynamic_slice_in_dim(part, k * _SLICE, _SLICE, axis=-2), padded
        )
        return total + products(*part)

    first = jax.tree.map(lambda part: part[..., :_SLICE, :], padded)
    return lax.fori_loop(1, slices, add, products(*first))


def gram_error(symbols: Symbols) -> Array:
    r"""Bound on the round-off of `grams` in the spectral norm, √2 γ || |M|ᵀ|M| ||₂ per matrix."""
    rows, dtype = symbols.re.shape[-2], symbols.re.dtype
    length = min(rows, _SLICE) + -(-rows // _SLICE) + 3
    return math.sqrt(2) * gamma(length, dtype) * perron(symbols.modulus)


def perron(matrix: Array) -> Array:
    r"""An upper bound on ||W||₂² for entrywise W ≥ 0, shape (..., m, n) to (...).

    ||WᵀW||₂ ≤ max_i (WᵀW x)_i / x_i for every x > 0 (Collatz–Wielandt), here after one power step.
    """

    def step(x):
        return jnp.einsum(
            "...mn,...m->...n",
            matrix,
            jnp.einsum("...mn,...n->...m", matrix, x, precision="highest"),
            precision="highest",
        )

    x = step(jnp.ones((*matrix.shape[:-2], matrix.shape[-1]), matrix.dtype))
    floats = jnp.finfo(matrix.dtype)
    x = jnp.maximum(x, 1e-3 * jnp.max(x, axis=-1, keepdims=True)) + floats.tiny
    return 1.05 * jnp.max(step(x) / x, axis=-1)


def norm_bounds(gram: Array) -> Array:
    """min(||G||_F, ||G||_∞) ≥ λ_max(G) of Hermitian matrices (..., n, n), rounded up."""
    squares = jnp.real(gram) ** 2 + jnp.imag(gram) ** 2
    frobenius = jnp.sqrt(jnp.sum(squares, axis=(-2, -1)))
    rows = jnp.max(jnp.sum(jnp.sqrt(squares), axis=-1), axis=-1)
    n = gram.shape[-1]
    return jnp.minimum(
        frobenius * (1 + gamma(n * n + 8, squares.dtype)), rows * (1 + gamma(n + 8, squares.dtype))
    )


def cholesky_certificate(gram: Array, level: Array, *, certify: bool) -> tuple[Array, Array]:
    r"""Whether τ I − G has a Cholesky factorisation, and e with λ_max(G) ≤ τ + e if it has.

    The factor R̂ satisfies R̂ᴴR̂ = τ I − G + E with |E| ≤ c n u |R̂|ᴴ|R̂| (Higham 2002, theorem 10.3), so that
    e = ||E||₂ and the rounding of the diagonal are bounded after the fact. e = 0 if not `certify`.
    """
    n = gram.shape[-1]
    shifted = level * jnp.eye(n, dtype=gram.dtype) - gram
    factor = lax.linalg.cholesky(shifted, symmetrize_input=False)
    succeeded = jnp.real(factor[0, 0]) > 0  # NaN everywhere if not
    if not certify:
        return succeeded, jnp.zeros_like(level)
    constant = 3 if jnp.iscomplexobj(gram) else 1
    error = gamma(constant * (n + 4), level.dtype) * perron(jnp.abs(factor))
    return succeeded, error + 4 * unit_round_off(level.dtype) * level


def lanczos(apply: Callable[[Array], Array], start: Array, num_steps: int) -> tuple[Array, Array]:
    r"""The top Ritz pair (θ, v) of a Hermitian map G ⪰ 0 in a Krylov space, θ = vᴴGv ≤ λ_max(G), ||v|| = 1.

    Full re-orthogonalisation, twice: the basis is thin, so it costs less than the products with G,
    and no spurious copies of converged eigenvalues appear.
    """

    def step(k, carry):
        basis, diagonal, off_diagonal = carry
        image = apply(basis[k])
        alpha = jnp.real(jnp.vdot(basis[k], image))
        for _ in range(2):
            image = image - (basis.conj() @ image) @ basis
        beta = jnp.linalg.norm(image)
        keep = beta > 16 * floats.eps * jnp.abs(alpha) + floats.tiny
        following = jnp.where(keep, image / jnp.where(keep, beta, 1), 0)
        return (
            basis.at[k + 1].set(following, mode="drop"),
            diagonal.at[k].set(alpha),
            off_diagonal.at[k].set(jnp.where(keep, beta, 0)),
        )

    floats = jnp.finfo(start.dtype)
    num_steps = min(num_steps, start.size)
    basis = jnp.zeros((num_steps, start.size), start.dtype)
    zeros = jnp.zeros(num_steps, floats.dtype)
    init = basis.at[0].set(start / jnp.linalg.norm(start)), zeros, zeros
    basis, diagonal, off_diagonal = lax.fori_loop(0, num_steps, step, init)
    tridiagonal = (
        jnp.diag(diagonal) + jnp.diag(off_diagonal[:-1], 1) + jnp.diag(off_diagonal[:-1], -1)
    )
    vector = jnp.linalg.eigh(tridiagonal)[1][:, -1].astype(start.dtype) @ basis
    vector = vector / jnp.linalg.norm(vector)
    return jnp.real(jnp.vdot(vector, apply(vector))), vector


def pairwise_sum(terms: Array) -> Array:
    """Sum over the leading axis as a binary tree: log2 of its length roundings, rounded up."""
    while terms.shape[0] > 1:
        half = -(-terms.shape[0] // 2)
        terms = jnp.pad(terms, [(0, terms.shape[0] % 2)] + [(0, 0)] * (terms.ndim - 1))
        terms = terms[:half] + terms[half:]
    return terms[0]


def fixed_start(size: int, dtype) -> Array:
    """A fixed unit vector in no special direction."""
    vector = np.random.default_rng(0).normal(size=size)
    return jnp.asarray(vector / np.linalg.norm(vector), dtype)


def _product(left: Array, right: Array) -> Array:
    return jnp.matmul(jnp.swapaxes(left, -1, -2), right, precision="highest")
