"""Decompositions of stacks of matrices that may run side by side.

On CPU, jaxlib 0.10 hands the matrices of a batched LAPACK call to XLA's threads and waits for them. Two
such calls side by side, of two layers in one program, can hold all threads of a small machine, and
then wait for ever. Here the matrices of a stack are therefore decomposed one at a time on CPU, which
takes as long. Under `vmap` they are a batch again, but for `inverse`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from stochsolvers._typing import Array

_Tree = TypeVar("_Tree")


def eigvalsh(matrices: Array) -> Array:
    """Eigenvalues of Hermitian matrices (..., n, n), ascending, shape (..., n)."""
    return _each(functools.partial(jnp.linalg.eigvalsh, symmetrize_input=False), matrices)


def eigh(matrices: Array) -> tuple[Array, Array]:
    """Eigenvalues and eigenvectors of Hermitian matrices, shapes (..., n) and (..., n, n)."""
    return _each(lambda m: tuple(jnp.linalg.eigh(m, symmetrize_input=False)), matrices)


def svd(matrices: Array) -> tuple[Array, Array, Array]:
    """Thin singular value decompositions P, Σ, Qᵀ of matrices (..., m, n); NaN of what is not finite."""
    return _each(lambda m: tuple(jnp.linalg.svd(_finite(m), full_matrices=False)), matrices)


def singular_values(matrices: Array) -> Array:
    """Singular values of matrices (..., m, n), descending, shape (..., min(m, n))."""
    return _each(lambda m: jnp.linalg.svd(_finite(m), compute_uv=False), matrices)


def _finite(matrices: Array) -> Array:
    """The matrices, or NaN: LAPACK's singular vectors of a matrix with an infinite entry take for ever."""
    is_finite = jnp.all(jnp.isfinite(matrices), axis=(-2, -1), keepdims=True)
    return jnp.where(is_finite, matrices, jnp.nan)


def inverse(matrices: Array) -> Array:
    """Inverses L⁻ᵀ L⁻¹ of positive definite matrices H = L Lᵀ (..., n, n); NaN where tr(H) is not finite.

    Lower triangles are read. Where round-off has made H indefinite it is that of H + n ε tr(H) I.
    """
    return _each(_inverse, matrices)


@jax.custom_jvp
def _inverse(matrix: Array) -> Array:
    return _inverse_side_by_side(matrix)


@_inverse.defjvp
def _inverse_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """d(H⁻¹) = −H⁻¹ dH H⁻¹; `custom_vmap` has no reverse mode of its own."""
    inverse, moved = _inverse(*primals), jnp.tril(tangents[0])
    return inverse, -inverse @ (moved + jnp.tril(moved, -1).T) @ inverse


@jax.jit
def _inverse_of_one(matrix: Array) -> Array:
    identity = jnp.eye(len(matrix), dtype=matrix.dtype)
    round_off = len(matrix) * float(jnp.finfo(matrix.dtype).eps) * jnp.trace(matrix)
    lower = lax.linalg.cholesky(matrix, symmetrize_input=False)
    lower = lax.cond(
        jnp.all(jnp.isfinite(jnp.diagonal(lower))),
        lambda: lower,
        lambda: lax.linalg.cholesky(matrix + round_off * identity, symmetrize_input=False),
    )
    half = lax.linalg.triangular_solve(lower, identity, left_side=True, lower=True)
    inverse = jnp.matmul(half.T, half, precision=lax.Precision.HIGHEST)
    return jnp.where(jnp.isfinite(round_off), inverse, jnp.nan)


_inverse_side_by_side = custom_vmap(_inverse_of_one)


@_inverse_side_by_side.def_vmap
def _inverses(size: int, batched: Any, matrices: Array) -> tuple[Array, bool]:
    del size, batched
    one_by_one = functools.partial(lax.map, _inverse_side_by_side)
    return lax.platform_dependent(matrices, cpu=one_by_one, default=jax.vmap(_inverse_of_one)), True


def _each(decompose: Callable[[Array], _Tree], matrices: Array) -> _Tree:
    shape = matrices.shape[:-2]
    if math.prod(shape) <= 1:
        return decompose(matrices)
    flat = matrices.reshape(-1, *matrices.shape[-2:])
    results = lax.platform_dependent(
        flat, cpu=functools.partial(lax.map, decompose), default=jax.vmap(decompose)
    )
    return jax.tree.map(lambda part: part.reshape(*shape, *part.shape[1:]), results)
