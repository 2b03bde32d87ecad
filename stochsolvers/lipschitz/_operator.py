"""The norm of a layer as it is: zero padding, strides and all, from its own products."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from stochsolvers import _checks
from stochsolvers._shards import varying
from stochsolvers._typing import Array
from stochsolvers.linear_maps import Conv, Dense, LinearMap
from stochsolvers.lipschitz import _spectra
from stochsolvers.lipschitz._constant import Bracket, lipschitz_bracket, rescaled, scale_of
from stochsolvers.lipschitz._taps import compute_dtype

_DENSE_SIZE = 2**22  # entries of a matrix that is small enough to be written out


@functools.partial(jax.jit, static_argnames="num_iters")
def operator_bracket(
    linear_map: LinearMap, *, num_iters: int = 32, key: Array | None = None
) -> Bracket:
    r"""lower ≤ ||A||² ≤ upper for the layer's own matrix A, whatever its padding, round-off included.

    An operator of up to four million entries is written out, and its bracket is as tight as that of a
    dense layer. A larger one gets the Rayleigh quotient of the top Ritz vector after `num_iters` Lanczos
    steps on A A* or A* A, whichever is smaller, each one product with A and one with A*; its upper end is
    that of `lipschitz_bracket` on the padded grid. The fewer pixels, the further that is above: in VGG16
    by up to 1 % at 32×32 pixels, 13 % at 8×8, 50 % at 4×4 (benchmarks/lipschitz.py). The lower end is
    then the better value, the upper one the safe step.

    Args:
      linear_map: `Dense` or `Conv`.
      num_iters: number of Lanczos steps; their vectors are kept.
      key: for a random start; a fixed vector in no special direction if None.

    Returns:
      `Bracket` of scalars, in float32 or the kernel's wider dtype.
    """
    num_iters = _checks.count("num_iters", num_iters)
    if isinstance(linear_map, Dense):
        return lipschitz_bracket(linear_map)
    inputs, outputs = math.prod(linear_map.in_shape), math.prod(linear_map.out_shape)
    kernel = linear_map.kernel.astype(compute_dtype(linear_map))
    scale = scale_of(kernel)
    unit_map = dataclasses.replace(linear_map, kernel=kernel / scale)
    with jax.default_matmul_precision("highest"):
        if inputs * outputs <= _DENSE_SIZE:
            units = jnp.eye(inputs, dtype=kernel.dtype).reshape(inputs, *linear_map.in_shape)
            matrix = unit_map(units).reshape(inputs, outputs)  # products with 0 and 1 are exact
            return rescaled(lipschitz_bracket(Dense(matrix)), scale)
        lower = _lanczos_bound(unit_map, num_iters, key)
    upper = lipschitz_bracket(unit_map, grid="padded").upper
    return rescaled(Bracket(lower, upper), scale)


def _lanczos_bound(conv: Conv, num_iters: int, key: Array | None) -> Array:
    """The Rayleigh quotient of the top Ritz vector, less its round-off."""
    absolute = dataclasses.replace(conv, kernel=jnp.abs(conv.kernel))
    forward, backward, bound = conv, conv.adjoint, absolute
    shape, fan = conv.in_shape, conv.kernel[..., 0].size
    if math.prod(conv.out_shape) < math.prod(shape):
        forward, backward, bound = conv.adjoint, conv, absolute.adjoint
        shape, fan = conv.out_shape, conv.kernel[:, :, 0].size // conv.feature_group_count
    size, dtype = math.prod(shape), conv.kernel.dtype
    start = _spectra.fixed_start(size, dtype)
    if key is not None:
        start = jax.random.normal(key, (size,), dtype)
    start = varying(start, conv)

    def gram(x):
        return backward(forward(x.reshape(shape))).ravel()

    _, vector = _spectra.lanczos(gram, start, num_iters)
    # each entry of the image is an inner product of `fan` terms
    error = _norm(bound(jnp.abs(vector).reshape(shape))) * _spectra.gamma(fan + 2, dtype)
    few = 1 - 128 * _spectra.unit_round_off(dtype)
    image = _norm(forward(vector.reshape(shape)))
    return (jnp.maximum(few * image - 2 * error, 0.0) / _norm(vector)) ** 2 * few


def _norm(array: Array) -> Array:
    return jnp.sqrt(_spectra.pairwise_sum(array.ravel() ** 2))
