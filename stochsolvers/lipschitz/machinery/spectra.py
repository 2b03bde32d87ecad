"""Largest eigenvalues: Lanczos, bounds on norms, round-off."""

import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import lax

from stochsolvers._shards import varying
from stochsolvers._typing import Array


def unit_round_off(dtype) -> float:
    """u, the largest relative error of one rounding."""
    return float(jnp.finfo(dtype).eps) / 2


def gamma(count: int, dtype) -> float:
    """γ_k = k u / (1 − k u): the relative error of k roundings in a row (Higham 2002, lemma 3.1)."""
    total = count * unit_round_off(dtype)
    return total / (1 - total) if total < 0.5 else math.inf


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
    init = varying(init, start)
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
