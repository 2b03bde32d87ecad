"""A certified lower end of the spectrum."""

import jax
import jax.numpy as jnp

from stochsolvers import _linalg
from stochsolvers._typing import Array
from stochsolvers.linear_maps import Conv, LinearMap
from stochsolvers.lipschitz._constant import (
    DIRECT,
    Bracket,
    block_size,
    lipschitz_constant,
    scale_of,
    search_for,
    widened,
)
from stochsolvers.lipschitz._formula import blocks_of
from stochsolvers.lipschitz._search import frobenius_bounds
from stochsolvers.lipschitz._taps import compute_dtype, taps_and_phases


@jax.jit
def strong_convexity(linear_map: LinearMap, *, upper: Array | None = None) -> Array:
    r"""A certified lower bound on λ_min(A A*): 0 unless the structure gives better.

    For a dense map with n2 ≤ n1, and for a circular convolution whose strides divide its grid,

        λ_min(A A*) = c − max_f λ_max(c I − Â(f) Â(f)ᴴ),    c = 1.02 L,

    less all round-off, by the search of `lipschitz_bracket`: a Cholesky factorisation for a frequency,
    eigenvalues for a few. Up to 16 channels it is the least of all eigenvalues, less 8 n ε L. Zero
    padding admits no bound from the spectrum.

    Args:
      linear_map: `Dense` or `Conv`.
      upper: about L, if it is at hand; the bound is the tighter, the nearer it is.

    Returns:
      scalar ≥ 0, in float32 or the kernel's wider dtype.
    """
    dtype = compute_dtype(linear_map)
    if isinstance(linear_map, Conv):
        divides = all(
            n % s == 0 for n, s in zip(linear_map.spatial_shape, linear_map.strides, strict=True)
        )
        if linear_map.padding != "CIRCULAR" or not divides:
            return jnp.zeros((), dtype)
    taps, phases = taps_and_phases(linear_map, "layer")
    if taps.shape[3] > phases.cosines.shape[1] * taps.shape[2]:  # more outputs than inputs
        return jnp.zeros((), dtype)
    if block_size(taps, phases) <= DIRECT:
        return _least_of_all(linear_map)
    scale = scale_of(taps)
    taps = taps / scale
    upper = lipschitz_constant(linear_map) if upper is None else jnp.asarray(upper, dtype)
    # c is above the mean of any block's eigenvalues, so that every c I − G has a positive one to find
    mean = jnp.max(frobenius_bounds(taps, phases)) / block_size(taps, phases)
    level = 1.02 * jnp.maximum(upper / scale / scale, mean)
    found = search_for(taps, phases, certify=True, below=level)
    lower = widened(Bracket(level - (found.ceiling + found.slack), level), taps, phases).lower
    lower = jnp.where(jnp.isfinite(level), lower * scale * scale, 0.0)  # L may overflow
    return jnp.where(jnp.all(jnp.isfinite(taps)), lower, jnp.nan)


def _least_of_all(linear_map: LinearMap) -> Array:
    blocks = blocks_of(linear_map, "layer")
    blocks = blocks.reshape(*blocks.shape[:-2], -1)
    gram = jnp.matmul(blocks, blocks.conj().swapaxes(-1, -2), precision="highest")
    eigenvalues = _linalg.eigvalsh(gram)
    slack = 8 * blocks.shape[-1] * jnp.finfo(gram.dtype).eps * jnp.max(eigenvalues)
    return jnp.maximum(jnp.min(eigenvalues) - slack, 0.0)
