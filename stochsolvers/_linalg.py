"""Decompositions of stacks of matrices that may run side by side.

On CPU, jaxlib 0.10 hands the matrices of a batched LAPACK call to XLA's threads and waits for them. Two
such calls side by side, of two layers in one program, can hold all threads of a small machine, and
then wait for ever. Here the matrices of a stack are therefore decomposed one at a time on CPU, which
takes as long. Under `vmap` they are a batch again.
"""

import functools
import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from stochsolvers._typing import Array

_Tree = TypeVar("_Tree")


def eigvalsh(matrices: Array) -> Array:
    """Eigenvalues of Hermitian matrices (..., n, n), ascending, shape (..., n)."""
    return _each(functools.partial(jnp.linalg.eigvalsh, symmetrize_input=False), matrices)


def eigh(matrices: Array) -> tuple[Array, Array]:
    """Eigenvalues and eigenvectors of Hermitian matrices, shapes (..., n) and (..., n, n)."""
    return _each(lambda m: tuple(jnp.linalg.eigh(m, symmetrize_input=False)), matrices)


def svd(matrices: Array) -> tuple[Array, Array, Array]:
    """Thin singular value decompositions P, Σ, Qᵀ of matrices (..., m, n)."""
    return _each(lambda m: tuple(jnp.linalg.svd(m, full_matrices=False)), matrices)


def singular_values(matrices: Array) -> Array:
    """Singular values of matrices (..., m, n), descending, shape (..., min(m, n))."""
    return _each(functools.partial(jnp.linalg.svd, compute_uv=False), matrices)


def _each(decompose: Callable[[Array], _Tree], matrices: Array) -> _Tree:
    shape = matrices.shape[:-2]
    if math.prod(shape) <= 1:
        return decompose(matrices)
    flat = matrices.reshape(-1, *matrices.shape[-2:])
    results = lax.platform_dependent(
        flat, cpu=functools.partial(lax.map, decompose), default=jax.vmap(decompose)
    )
    return jax.tree.map(lambda part: part.reshape(*shape, *part.shape[1:]), results)
