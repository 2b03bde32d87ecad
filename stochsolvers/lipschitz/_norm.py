r"""Norms of a layer as it is, not squared: ||A||, a penalty on it, stable rank and condition number."""

import dataclasses
import functools
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from stochsolvers import _checks
from stochsolvers._shards import replicated
from stochsolvers._typing import Array, Scalar
from stochsolvers.linear_maps import Conv, LinearMap, Matrix
from stochsolvers.linear_maps._base import check_map
from stochsolvers.lipschitz._bracket import lipschitz_bracket
from stochsolvers.lipschitz._constant import lipschitz_constant
from stochsolvers.lipschitz._formula import singular_values
from stochsolvers.lipschitz._matrix_free import FAILURE, STEPS, image_norm, ritz_vector, root
from stochsolvers.lipschitz._operator import operator_bracket
from stochsolvers.lipschitz._torus import is_exact
from stochsolvers.lipschitz._types import Bracket, compute_dtype, of_map
from stochsolvers.lipschitz.machinery.blocks import best_of_all, block_size, scale_of
from stochsolvers.lipschitz.machinery.taps import taps_and_phases
from stochsolvers.lipschitz.machinery.top import top_square
from stochsolvers.lipschitz.machinery.written import base_of, checked, entries, has_blocks, is_small

_EIGENVALUES = 512  # up to this order, eigenvalues rather than a search


@of_map
@replicated
@jax.jit
def spectral_norm(linear_map: LinearMap) -> Array:
    r"""||A|| = max_{||x|| = 1} ||A x||, the largest singular value of the layer as it is: not squared.

    Its square is the L of `lipschitz_constant` where lemma 2 is exact. Under zero padding, or with strides
    that do not divide the grid, it is the norm of the layer itself, which lemma 2 is not.

    Exact to round-off for dense maps, contractions, matrices and circular convolutions, and for every other
    map whose matrix has up to 2^22 entries, which is written out. Of a larger one it is ||A v|| at the Ritz
    vector v after 64 Lanczos steps, a lower bound; `spectral_norm_bracket` says how far off it can be.

    Its derivative is <u, dA v> at the singular vectors u and v; 0 at A = 0, and a subgradient where they are
    not unique.

    Args:
      linear_map: A.

    Returns:
      scalar, in float32 or the map's wider dtype. Differentiable, `jit`-able.

    Example:
      >>> print(f"{ss.spectral_norm(ss.Dense(jnp.array([[3.0, 0.0], [0.0, 1.0]]))):.3f}")
      3.000
    """
    base = base_of(linear_map)
    if isinstance(base, Conv) and not is_exact(base):
        if not is_small(base):
            return _ritz_value(base)
        base = _written(base)
    if not has_blocks(base):
        return _ritz_value(base)
    base, scale = _in_units(base)
    return root(_square(base)) * scale


def _in_units(linear_map: LinearMap) -> tuple[LinearMap, Array]:
    """The map in units of a power of two, in which no square over- or underflows: a norm is homogeneous."""
    scale = jnp.asarray(1.0, compute_dtype(linear_map))
    if not (hasattr(linear_map, "kernel") and has_blocks(linear_map)):
        return linear_map, scale
    scale = scale_of(linear_map.kernel.astype(scale.dtype))  # pyright: ignore
    return linear_map.astype(scale.dtype).scaled(1 / scale), scale


@of_map
@functools.partial(jax.jit, static_argnames=("num_iters", "failure_probability"))
def spectral_norm_bracket(
    linear_map: LinearMap,
    *,
    num_iters: int = 32,
    key: Array | None = None,
    failure_probability: float = FAILURE,
) -> Bracket:
    r"""lower ≤ ||A|| ≤ upper for the layer as it is, not squared, round-off included.

    The roots of `lipschitz_bracket` where lemma 2 is exact, else of `operator_bracket`, whose arguments these
    are; `Bracket.method` says how the ends were obtained.
    """
    linear_map, scale = _in_units(linear_map)
    if is_exact(linear_map) and has_blocks(linear_map):
        squared = lipschitz_bracket(linear_map)
    else:
        squared = operator_bracket(
            linear_map, num_iters=num_iters, key=key, failure_probability=failure_probability
        )
    lower, upper = jnp.sqrt(squared.lower) * scale, jnp.sqrt(squared.upper) * scale
    upper = jnp.maximum(upper, jnp.finfo(upper.dtype).tiny)
    return Bracket(
        jnp.maximum(jnp.nextafter(lower, -jnp.ones_like(lower)), 0.0),
        jnp.nextafter(upper, jnp.full_like(upper, jnp.inf)),
        method=squared.method,
        failure_probability=squared.failure_probability,
    )


def spectral_penalty(linear_maps: LinearMap | Iterable[LinearMap], bound: Scalar = 1.0) -> Array:
    r"""Σ_A max(0, ||A|| − c)², to be added to a loss.

    Args:
      linear_maps: A, or several.
      bound: c ≥ 0, traced.

    Returns:
      scalar; its derivative with respect to A is 2 max(0, ||A|| − c) u vᵀ.
    """
    _checks.non_negative("bound", bound)
    _checks.rank("bound", bound, 0)
    several = [linear_maps] if isinstance(linear_maps, LinearMap) else linear_maps
    if not isinstance(several, Iterable) or isinstance(
        several, str | dict | jax.Array | np.ndarray
    ):
        wanted = "a LinearMap, or several"
        _checks.fail("linear_maps of spectral_penalty", wanted, _checks.named(several))
    maps = list(several)
    for one in maps:
        check_map("maps of spectral_penalty", one)
    norms = [spectral_norm(one) for one in maps]
    terms = [jnp.maximum(norm - jnp.asarray(bound, norm.dtype), 0) ** 2 for norm in norms]
    return sum(terms[1:], start=terms[0]) if terms else jnp.zeros(())


@of_map
@jax.jit
def stable_rank(linear_map: LinearMap) -> Array:
    r"""||A||_F² / ||A||², between 1 and the rank; of the layer as it is, NaN for A = 0.

    The norm is that of `spectral_norm`; the Frobenius norm is exact, for a map without a kernel if it may be
    written out.
    """
    norm = spectral_norm(linear_map)
    base = base_of(linear_map)
    base = checked(base)
    unit = base.scaled(1 / jnp.where(norm > 0, norm, 1.0))
    return jnp.where(norm > 0, _squared_frobenius(unit), jnp.nan)


@of_map
@jax.jit
def condition_number(linear_map: LinearMap) -> Array:
    r"""σ_max / σ_min over the min(inputs, outputs) singular values of the layer as it is; ∞ if σ_min = 0.

    Raises:
      ValueError: at trace time, for a zero-padded convolution, or a map without a kernel, whose matrix has
        more than 2^22 entries.
    """
    values = singular_values(linear_map, grid="operator")
    least = values[-1]
    return jnp.where(least > 0, values[0] / jnp.where(least > 0, least, 1.0), jnp.inf)


def _square(linear_map: LinearMap) -> Array:
    """L; of a few matrices of modest order from their eigenvalues, a program that is soon compiled."""
    if isinstance(linear_map, Conv):
        return lipschitz_constant(linear_map)
    taps, phases = taps_and_phases(linear_map, "layer")
    if block_size(taps, phases) > _EIGENVALUES:
        return lipschitz_constant(linear_map)
    return top_square(taps, phases, best_of_all(lax.stop_gradient(taps), phases))


def _written(linear_map: LinearMap) -> Matrix:
    matrix, _ = entries(linear_map)
    return Matrix(matrix, (matrix.shape[0],), (matrix.shape[1],))


def _ritz_value(linear_map: LinearMap) -> Array:
    linear_map = checked(linear_map)
    vector, _ = ritz_vector(jax.tree.map(lax.stop_gradient, linear_map), STEPS, None)
    return image_norm(linear_map, lax.stop_gradient(vector))


def _squared_frobenius(linear_map: LinearMap) -> Array:
    """Σ of the squares of the matrix' entries."""
    if isinstance(linear_map, Conv) and not _taps_meet(linear_map):
        squared = linear_map.kernel**2  # the sum of all entries of the map with these taps
        ones = jnp.ones((1, *linear_map.in_shape), squared.dtype)
        return jnp.sum(dataclasses.replace(linear_map, kernel=squared)(ones))
    if hasattr(linear_map, "blocks"):
        blocks = linear_map.blocks()  # pyright: ignore
        copies = math.prod(linear_map.out_shape) // (blocks.shape[0] * blocks.shape[2])
        return copies * jnp.sum(blocks**2)
    if not is_small(linear_map) and not hasattr(linear_map, "kernel"):
        return jnp.sum(singular_values(linear_map, grid="operator") ** 2)  # says what is too large
    matrix, _ = entries(linear_map)
    return jnp.sum(matrix**2)


def _taps_meet(conv: Conv) -> bool:
    extents = zip(conv.dilated_kernel_shape, conv.spatial_shape, strict=True)
    return conv.padding == "CIRCULAR" and any(k > n for k, n in extents)
