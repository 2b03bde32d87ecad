r"""Norms, block soft thresholds and projections of groups, with û = v/||v||₂ and n = ||v||₂ of a group.

    ∂n = û,   ∂(1 − c/n)₊ v = (1 − r) dv + r û <û, dv> − û dc,   ∂(c/n) v = r (dv − û <û, dv>) + û dc,

r = c/n. A group is divided by a power of two near its largest entry first: no square overflows or
underflows, no derivative holds the square of a norm. Weights have size 1 in the axes of a group.
"""

import functools

import jax
import jax.numpy as jnp

from stochsolvers._typing import Array

Axes = tuple[int, ...]


def power_of_two(array: Array, axes: Axes) -> Array:
    """A power of two between a third and all of the largest |entry|; 1 for zeros."""
    info = jnp.finfo(array.dtype)
    largest = jnp.max(jnp.abs(array), axes, keepdims=True, initial=0)
    bits = {"exponent_bits": info.nexp, "mantissa_bits": 0}
    scale = jax.lax.reduce_precision(0.5 * largest, **bits)
    return jax.lax.stop_gradient(jnp.where(largest == 0, 1, jnp.maximum(scale, info.tiny)))


def _polar(axes: Axes, v: Array) -> tuple[Array, Array, Array]:
    """û, s and n/s for a power of two s; û = 0 and n/s = 0 where v = 0."""
    scale = power_of_two(v, axes)
    v = v / scale
    squares = jnp.sum(v * v, axes, keepdims=True)
    zero = squares == 0
    root = jnp.sqrt(jnp.where(zero, 1, squares))
    return v / root, scale, jnp.where(zero, 0, root)


def _along(axes: Axes, unit: Array, dv: Array) -> Array:
    """<û, dv>."""
    return jnp.sum(unit * dv, axes, keepdims=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _weighted_norm(axes: Axes, u: Array, gamma: Array) -> Array:
    """γ n, of size 1 in the axes."""
    _, scale, norm = _polar(axes, u)
    return gamma * scale * norm


@_weighted_norm.defjvp
def _weighted_norm_jvp(axes, primals, tangents):
    (u, gamma), (du, dgamma) = primals, tangents
    unit, scale, norm = _polar(axes, u)
    return _weighted_norm(axes, u, gamma), _along(axes, gamma * unit, du) + scale * (norm * dgamma)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _shrink(axes: Axes, v: Array, weight: Array) -> Array:
    """max(1 − c/n, 0) v."""
    _, scale, norm = _polar(axes, v)
    weight = weight / scale
    zero = norm <= weight
    return jnp.where(zero, 0, v * ((norm - weight) / jnp.where(zero, 1, norm)))


@_shrink.defjvp
def _shrink_jvp(axes, primals, tangents):
    (v, weight), (dv, dweight) = primals, tangents
    unit, scale, norm = _polar(axes, v)
    relative = weight / scale
    zero = (norm <= relative) & (relative > 0)  # no weight, no shrinking: also at v = 0
    relative = jnp.where(zero, 1, relative / jnp.where(norm == 0, 1, norm))
    moved = (1 - relative) * dv + unit * (relative * _along(axes, unit, dv) - dweight)
    return _shrink(axes, v, weight), jnp.where(zero, 0, moved)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _project(axes: Axes, w: Array, radius: Array) -> Array:
    """W, or (c/n) w where n > c."""
    unit, scale, norm = _polar(axes, w)
    return jnp.where(norm > radius / scale, unit * radius, w)


@_project.defjvp
def _project_jvp(axes, primals, tangents):
    (w, radius), (dw, dradius) = primals, tangents
    unit, scale, norm = _polar(axes, w)
    outside = norm > radius / scale
    relative = jnp.where(outside, radius / scale / jnp.where(outside, norm, 1), 1)
    moved = relative * (dw - unit * _along(axes, unit, dw)) + unit * dradius
    return _project(axes, w, radius), jnp.where(outside, moved, dw)


# outside of any program they are one each, not one an operation
weighted_norm = jax.jit(_weighted_norm, static_argnums=0)
shrink = jax.jit(_shrink, static_argnums=0)
project = jax.jit(_project, static_argnums=0)
