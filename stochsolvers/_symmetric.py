"""The product of a matrix with its own transpose, for half the work."""

import jax
import jax.numpy as jnp

from stochsolvers._typing import Array

TRIANGLE = 256  # a symmetric product of at least so many columns computes one triangle


def symmetric_product(matrix: Array, precision: str | None = None) -> Array:
    r"""WᵀW for W (n1, n2), in little more than half the work of a general product where n2 is large.

        [W₁ W₂]ᵀ[W₁ W₂] = [W₁ᵀW₁, W₁ᵀW₂; (W₁ᵀW₂)ᵀ, W₂ᵀW₂],    recursively.

    Its derivative is dWᵀW + (dWᵀW)ᵀ, whose transpose is the one product W (Ḡ + Ḡᵀ).
    """
    return _symmetric_product(precision, matrix)


def _product(precision, left, right):
    return jnp.matmul(left.T, right, precision=precision)


def _symmetric_product_value(precision, matrix):
    n2 = matrix.shape[1]
    if n2 < TRIANGLE:
        return _product(precision, matrix, matrix)
    left, right = matrix[:, : n2 // 2], matrix[:, n2 // 2 :]
    across = _product(precision, left, right)
    return jnp.block(
        [
            [_symmetric_product_value(precision, left), across],
            [across.T, _symmetric_product_value(precision, right)],
        ]
    )


_symmetric_product = jax.custom_jvp(_symmetric_product_value, nondiff_argnums=(0,))


@_symmetric_product.defjvp
def _symmetric_product_jvp(precision, primals, tangents):
    (matrix,), (tangent,) = primals, tangents
    half = _product(precision, matrix, tangent)
    return _symmetric_product(precision, matrix), half + half.T
