"""Maps by their products: the matrix of a small one, written out."""

import math

import jax
import jax.numpy as jnp

from stochsolvers import _checks
from stochsolvers._typing import Array
from stochsolvers.linear_maps import Conv, Dense, LinearMap, Matrix, Transposed
from stochsolvers.lipschitz._types import compute_dtype
from stochsolvers.lipschitz.machinery import spectra

DENSE_SIZE = 2**22
"""Entries of a matrix that is small enough to be written out."""


def sizes(linear_map: LinearMap) -> tuple[int, int]:
    """Numbers of inputs and outputs."""
    return math.prod(linear_map.in_shape), math.prod(linear_map.out_shape)


def base_of(linear_map: LinearMap) -> LinearMap:
    """A for A, A.T and their transposes."""
    while isinstance(linear_map, Transposed):
        linear_map = linear_map.base
    return linear_map


def is_small(linear_map: LinearMap) -> bool:
    """Whether the map may be written out."""
    return math.prod(sizes(linear_map)) <= DENSE_SIZE


def has_blocks(linear_map: LinearMap) -> bool:
    """Whether the singular values are those of known matrices, or of one that may be written out."""
    linear_map = base_of(linear_map)
    known = isinstance(linear_map, Dense | Conv | Matrix) or hasattr(linear_map, "blocks")
    return known or is_small(linear_map)


def checked(linear_map: LinearMap) -> LinearMap:
    """The map in the type that is computed in, its results compared with the shape that it claims."""
    linear_map = linear_map.astype(compute_dtype(linear_map))
    x = jax.ShapeDtypeStruct((1, *linear_map.in_shape), linear_map.dtype)
    z = jax.eval_shape(lambda x: linear_map(x), x)
    what = f"result of {type(linear_map).__name__}"
    if z.shape != (1, *linear_map.out_shape):
        _checks.fail(f"shape of {what} at {x.shape}", (1, *linear_map.out_shape), z.shape)
    if not jnp.issubdtype(z.dtype, jnp.floating):
        _checks.fail(f"dtype of {what}", "a real floating-point dtype", z.dtype)
    return linear_map


def product_error(linear_map: LinearMap) -> float:
    """An allowance for the round-off of a map's own products, ||fl(A x) − A x|| ≤ error ||A||_F ||x||.

    8 log2(entries) u, which covers sums in pairs and Fourier transforms; 0 if products with unit vectors are
    exact.
    """
    if isinstance(base_of(linear_map), Dense | Conv | Matrix):
        return 0.0
    depth = math.ceil(math.log2(max(2, math.prod(sizes(linear_map)))))
    return 8 * depth * spectra.unit_round_off(compute_dtype(linear_map))


def entries(linear_map: LinearMap) -> tuple[Array, float]:
    """The matrix (inputs, outputs), and the `product_error` of it.

    From the products with the unit vectors of the smaller side; on that of the outputs with the adjoint,
    for a map of a user's own the one that JAX derives.
    """
    dtype = compute_dtype(linear_map)
    if isinstance(linear_map, Dense | Matrix):
        return linear_map.kernel.astype(dtype), 0.0
    linear_map = checked(linear_map)
    inputs, outputs = sizes(linear_map)
    with jax.default_matmul_precision("highest"):
        if inputs <= outputs:
            units = jnp.eye(inputs, dtype=dtype).reshape(inputs, *linear_map.in_shape)
            matrix = linear_map(units).reshape(inputs, outputs)
        else:
            units = jnp.eye(outputs, dtype=dtype).reshape(outputs, *linear_map.out_shape)
            matrix = adjoint(linear_map, units).reshape(outputs, inputs).T
    return matrix.astype(dtype), product_error(linear_map)


def adjoint(linear_map: LinearMap, z: Array) -> Array:
    """A*(z); of a map of a user's own by linear transposition: a mistake in its `adjoint` does no harm."""
    if isinstance(base_of(linear_map), Dense | Conv | Matrix):
        return linear_map.adjoint(z)
    return LinearMap.adjoint(linear_map, z)
