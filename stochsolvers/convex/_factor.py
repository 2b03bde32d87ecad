"""A Cholesky factor in blocks, whose triangular solves are products."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from stochsolvers._typing import Array, value_object

BLOCK = 512


@value_object
class Factor:
    r"""L of M = L Lᵀ in rows of blocks, with the inverses of the blocks on its diagonal.

    A triangular solve of one right side reads L once; LAPACK's runs at a fraction of the memory's rate, and these
    products at all of it: 18 for 47 ms at n = 5000.

    Args:
      below: the rows of blocks left of the diagonal, shapes (b, 0), (b, b), (b, 2b), …
      inverses: of the diagonal blocks, shape (m, b, b).
    """

    below: tuple[Array, ...]
    inverses: Array

    def solve(self, right: Array) -> Array:
        """M⁻¹ applied to the last axis of an array (..., n)."""
        n, size = right.shape[-1], self.inverses.shape[-1]
        rows = right.reshape(-1, n)
        padded = jnp.pad(rows, ((0, 0), (0, len(self.below) * size - n)))
        x = self._forward(padded.T)
        return self._backward(x)[:n].T.reshape(right.shape)

    def _forward(self, x: Array) -> Array:
        """L⁻¹ x, (N, C)."""
        size, done = self.inverses.shape[-1], []
        for i, (row, inverse) in enumerate(zip(self.below, self.inverses, strict=True)):
            part = x[i * size : (i + 1) * size]
            if i:
                part = part - _product(row, jnp.concatenate(done))
            done.append(_product(inverse, part))
        return jnp.concatenate(done)

    def _backward(self, x: Array) -> Array:
        """L⁻ᵀ x, (N, C): what a block was found to be leaves the blocks above it at once."""
        size, done = self.inverses.shape[-1], []
        for i in reversed(range(len(self.below))):
            part = _product(self.inverses[i].T, x[i * size :])
            done.append(part)
            if i:
                x = x[: i * size] - _product(self.below[i].T, part)
        return jnp.concatenate(done[::-1])


def _product(left: Array, right: Array) -> Array:
    return jnp.matmul(left, right, precision="highest")


def factor(matrix: Array, shift: Any, block: int = BLOCK) -> Factor:
    """Of M + shift I, M (n, n) symmetric positive semi-definite."""
    n = len(matrix)
    size = min(block, n)
    count = -(-n // size)
    extra = count * size - n
    shifted = matrix + shift * jnp.eye(n, dtype=matrix.dtype)
    lower = lax.linalg.cholesky(shifted, symmetrize_input=False)
    if extra:
        lower = jnp.pad(lower, ((0, extra), (0, extra)))
        lower += jnp.diag(jnp.pad(jnp.zeros(n, lower.dtype), (0, extra), constant_values=1.0))
    blocks = [lower[i * size : (i + 1) * size] for i in range(count)]
    diagonal = jnp.stack([row[:, i * size : (i + 1) * size] for i, row in enumerate(blocks)])
    identity = jnp.broadcast_to(jnp.eye(size, dtype=lower.dtype), diagonal.shape)
    inverses = lax.linalg.triangular_solve(diagonal, identity, left_side=True, lower=True)
    return Factor(tuple(row[:, : i * size] for i, row in enumerate(blocks)), jnp.tril(inverses))


def empty(n: int, dtype: Any, block: int = BLOCK) -> Factor:
    """A factor of the same structure, of zeros."""
    shape = jax.ShapeDtypeStruct((n, n), dtype)
    like = jax.eval_shape(lambda M: factor(M, 1.0, block), shape)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
