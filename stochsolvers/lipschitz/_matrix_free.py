r"""The norm of a map from its products alone, for maps too large to be written out.

k Lanczos steps on G = A A* or A* A, whichever is smaller (order n), from a start in a uniformly random
direction give the largest Ritz value θ ≤ λ_max(G) = ||A||². With probability at least 1 − p over the start

    λ_max(G) ≤ θ / (1 − ε),    sqrt(ε) = log(1.648 sqrt(n) / p) / (2k − 1),

by P(λ_max > θ / (1 − ε)) ≤ 1.648 sqrt(n) exp(−sqrt(ε) (2k − 1)) (Kuczyński and Woźniakowski 1992, theorem
4.1 (b)).
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from stochsolvers._shards import varying
from stochsolvers._typing import Array
from stochsolvers.linear_maps import Conv, LinearMap
from stochsolvers.lipschitz._types import Bracket, rescaled
from stochsolvers.lipschitz.machinery import spectra
from stochsolvers.lipschitz.machinery.blocks import scale_of
from stochsolvers.lipschitz.machinery.written import (
    adjoint,
    base_of,
    checked,
    product_error,
    sizes,
)

STEPS = 64
FAILURE = 1e-6


def matrix_free_bracket(
    linear_map: LinearMap,
    num_iters: int = STEPS,
    key: Array | None = None,
    failure: float = FAILURE,
) -> Bracket:
    """Lanczos from below; from above `squared_norm_bound`, else the probable bound.

    A `squared_norm_bound` below the Rayleigh quotient is none, and is replaced by infinity.
    """
    base = base_of(linear_map)
    lower, scale = lanczos_bound(_constant(base), num_iters, key)
    bound = base.squared_norm_bound()
    if bound is not None:
        rounded = jnp.asarray(bound, lower.dtype)
        if jnp.result_type(bound) != lower.dtype:
            rounded = jnp.nextafter(rounded, jnp.full_like(rounded, jnp.inf))
        bound = rounded / scale / scale
        upper = jnp.where(bound < lower, jnp.inf, bound) + 0 * lower  # NaN if that is
        return rescaled(lower, upper, scale, "bound")
    upper = _times(lower, overshoot(base, num_iters, failure))
    return rescaled(lower, upper, scale, "probability", failure)


def norm_estimate(linear_map: LinearMap, *, safe: bool) -> Array:
    """The map's bound, else the Ritz value θ = ||A v||², or θ / (1 − ε) if `safe`; differentiable."""
    base = checked(base_of(linear_map))
    bound = base.squared_norm_bound()
    if bound is not None:
        # one product refutes a bound that is far off, and maps that are not finite
        return matrix_free_bracket(base, 1).upper if safe else jnp.asarray(bound, base.dtype)
    vector, scale = lax.stop_gradient(ritz_vector(_constant(base), STEPS, None))
    forward, _, shape = smaller_side(base)
    with jax.default_matmul_precision("highest"):
        image = forward(vector.reshape(shape)) / scale
    value = jnp.sum(image**2) / jnp.sum(vector**2)
    if safe:
        value = _times(value, overshoot(base, STEPS, FAILURE))
    return value * scale * scale


def _constant(linear_map: LinearMap) -> LinearMap:
    return jax.tree.map(lax.stop_gradient, linear_map)


def _times(value: Array, factor: float) -> Array:
    return value * factor if math.isfinite(factor) else value + factor  # 0 · ∞ is no bound


def overshoot(linear_map: LinearMap, num_iters: int, failure: float) -> float:
    """1 / (1 − ε) with the round-off of the products; infinite if there are too few steps for any bound."""
    size = min(sizes(linear_map))
    root = 0.0
    if num_iters < size:  # not all of the space
        root = math.log(1.648 * math.sqrt(size) / failure) / (2 * num_iters - 1)
    return (1 + 8 * product_error(linear_map)) / (1 - root**2) if root < 1 else math.inf


def lanczos_bound(linear_map: LinearMap, num_iters: int, key: Array | None) -> tuple[Array, Array]:
    """(θ less its round-off, divided by scale², and scale); NaN if a product is not finite."""
    linear_map = checked(linear_map)
    vector, scale = ritz_vector(linear_map, num_iters, key)
    forward, _, shape = smaller_side(linear_map)
    with jax.default_matmul_precision("highest"):
        image = norm(forward(vector.reshape(shape)) / scale)
        error = _image_error(linear_map, vector, image * scale) / scale
    few = 1 - 128 * spectra.unit_round_off(vector.dtype)
    lower = (jnp.maximum(few * image - 2 * error, 0.0) / norm(vector)) ** 2 * few
    return lower, scale


def ritz_vector(linear_map: LinearMap, num_iters: int, key: Array | None) -> tuple[Array, Array]:
    """The top Ritz vector on the smaller side, and a power of two about the size of A's products."""
    forward, backward, shape = smaller_side(linear_map)
    size, dtype = math.prod(shape), linear_map.dtype
    start = spectra.fixed_start(size, dtype)
    if key is not None:
        start = jax.random.normal(key, (size,), dtype)
        start = start / jnp.linalg.norm(start)
    start = varying(start, linear_map)
    with jax.default_matmul_precision("highest"):
        scale = scale_of(forward(start.reshape(shape)))

        def gram(x):
            return backward(forward(x.reshape(shape)) / scale).ravel() / scale

        _, vector = spectra.lanczos(gram, start, num_iters)
    # the Ritz vectors of the zero map are not defined
    return jnp.where(jnp.all(jnp.isfinite(vector)), vector, start), scale


def smaller_side(
    linear_map: LinearMap,
) -> tuple[Callable[[Array], Array], Callable[[Array], Array], tuple[int, ...]]:
    """A and its adjoint, or the other way round, such that the first acts on the smaller side; its shape."""
    dtype = linear_map.dtype

    def forward(x):
        return linear_map(x[None])[0].astype(dtype)

    def backward(z):
        return adjoint(linear_map, z[None])[0].astype(dtype)

    inputs, outputs = sizes(linear_map)
    if outputs < inputs:
        return backward, forward, linear_map.out_shape
    return forward, backward, linear_map.in_shape


def image_norm(linear_map: LinearMap, vector: Array) -> Array:
    """||A v|| for a unit vector v of the smaller side; differentiable, where it is 0 with derivative 0."""
    forward, _, shape = smaller_side(linear_map)
    with jax.default_matmul_precision("highest"):
        image = forward(vector.reshape(shape))
    scale = scale_of(image)
    return root(jnp.sum((image / scale) ** 2)) * scale


def root(square: Array) -> Array:
    """sqrt(max(x, 0)) with the derivative 0 at 0; NaN stays."""
    positive = square > 0
    value = jnp.sqrt(jnp.where(positive, square, 1.0))
    return jnp.where(positive, value, jnp.where(jnp.isnan(square), square, 0.0))


def _image_error(linear_map: LinearMap, vector: Array, image: Array) -> Array:
    """Round-off of ||A v||: each pixel of a convolution is a sum of known length, otherwise an allowance."""
    if not isinstance(linear_map, Conv):
        return product_error(linear_map) * image
    kernel = linear_map.kernel
    fan = kernel[..., 0].size
    if min(sizes(linear_map)) < sizes(linear_map)[0]:
        fan = kernel[..., 0, :].size // linear_map.feature_group_count
    forward, _, shape = smaller_side(linear_map.absolute())
    reach = norm(forward(jnp.abs(vector).reshape(shape)))
    return reach * spectra.gamma(fan + 2, vector.dtype)


def norm(array: Array) -> Array:
    """||·||₂ with few roundings."""
    return jnp.sqrt(spectra.pairwise_sum(array.ravel() ** 2))
