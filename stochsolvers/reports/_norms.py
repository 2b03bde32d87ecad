"""Certified brackets of a layer's squared spectral norm."""

import jax.numpy as jnp
from jax import lax

from stochsolvers._typing import Array
from stochsolvers.linear_maps import Conv, LinearMap
from stochsolvers.lipschitz import Bracket, lipschitz_bracket


def is_exact(linear_map: LinearMap) -> bool:
    """Whether lemma 2 on the layer's own grid is the norm: dense, or circular with whole strides."""
    if not isinstance(linear_map, Conv):
        return True
    sizes = zip(linear_map.spatial_shape, linear_map.strides, strict=True)
    return linear_map.padding == "CIRCULAR" and all(n % s == 0 for n, s in sizes)


def squared_norm_bracket(linear_map: LinearMap) -> Bracket:
    """lower ≤ ||A||² ≤ upper: up to round-off where it is exact, around zero padding otherwise."""
    if is_exact(linear_map):
        return lipschitz_bracket(linear_map)
    upper = lipschitz_bracket(linear_map, grid="padded").upper

    def normalised(x: Array) -> Array:
        return x / jnp.maximum(jnp.linalg.norm(x.ravel()), jnp.finfo(x.dtype).tiny)

    def iterate(_, x):
        return normalised(linear_map.adjoint(linear_map(x)))

    start = normalised(jnp.ones(linear_map.in_shape, upper.dtype))
    image = linear_map(lax.fori_loop(0, 30, iterate, start))
    return Bracket(jnp.minimum(jnp.sum(image**2), upper), upper)
