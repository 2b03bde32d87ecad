r"""Lemma 2 as it is printed: the DFT of the kernel, every block, and the decomposition of each."""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from stochsolvers import _checks, _linalg
from stochsolvers._shards import replicated
from stochsolvers._typing import Array
from stochsolvers.linear_maps import Conv, LinearMap
from stochsolvers.lipschitz._torus import half_spectrum, is_exact, mirrored, torus
from stochsolvers.lipschitz._types import Grid, check_grid, compute_dtype, of_map
from stochsolvers.lipschitz.machinery.blocks import scale_of
from stochsolvers.lipschitz.machinery.taps import taps_and_phases
from stochsolvers.lipschitz.machinery.written import (
    DENSE_SIZE,
    base_of,
    entries,
    has_blocks,
    is_small,
    sizes,
)


def lipschitz_formula(linear_map: LinearMap, grid: Grid) -> Array:
    """max_f λ_max(Â(f) Â(f)ᴴ) from the eigenvalues of every block."""
    blocks, scale = _symbol(linear_map, grid, "method='formula'")
    matrices = blocks.reshape(*blocks.shape[:-2], -1)
    largest = jnp.maximum(jnp.max(_linalg.eigvalsh(smaller_gram(matrices))), 0.0)
    return largest * scale * scale


@of_map
@replicated
@functools.partial(jax.jit, static_argnames="grid")
def singular_values(linear_map: LinearMap, *, grid: Grid | Literal["operator"] = "layer") -> Array:
    r"""All singular values, with multiplicity, in descending order; not squared.

    With `grid="operator"` they are those of the layer as it is: of the matrix of a zero-padded convolution,
    or of one whose strides do not divide its grid, written out. Else of the map that lemma 2 describes: they
    are those of the blocks Â(f), the union over frequencies and groups: of the layer itself, unless it
    is a convolution that is zero-padded or whose strides do not divide its grid: then of the circular layer
    in its place. A transposed map has those of its base; a map without a kernel is written out.

    Returns:
      shape (min(inputs, outputs),) for one group, counted over the torus of `grid`; each group adds
      the smaller one of its own inputs and outputs. A matrix written out has min(inputs, outputs).

    Raises:
      ValueError: at trace time, for a map without a kernel of more than 2^22 entries, and with
        `grid="operator"` for any other that must be written out and is larger.

    References:
      Sedghi et al. 2019, The singular values of convolutional layers.
    """
    linear_map = base_of(linear_map)
    if grid == "operator":
        if isinstance(linear_map, Conv) and not is_exact(linear_map):
            return _of_matrix(linear_map)
        grid = "layer"
    blocks, scale = _symbol(linear_map, grid, "singular_values")
    values = _linalg.singular_values(blocks.reshape(*blocks.shape[:-2], -1)) * scale
    if isinstance(linear_map, Conv):
        folded = _folded_shape(*torus(linear_map, grid))
        half = half_spectrum(folded)
        values = jnp.concatenate([values, values[mirrored(folded)[half] != half]])
    else:  # axes that a contraction leaves alone repeat its blocks
        values = jnp.tile(values.ravel(), sizes(linear_map)[0] // blocks[0, :, 0].size)
    return -jnp.sort(-values.ravel())


@of_map
@replicated
@functools.partial(jax.jit, static_argnames="grid")
def frequency_norms(conv: Conv, *, grid: Grid = "layer") -> Array:
    r"""σ₁(Â(f)) for every frequency f of the torus: how much the layer amplifies a wave of frequency f.

    Their maximum is ||A||, exactly so for circular padding (lemma 2). With groups it is that of the groups.

    Returns:
      the shape of the torus of `grid`, divided by the strides; the constant wave comes first, as in `fftn`.

    Raises:
      ValueError: at trace time, for other maps than a `Conv`.
    """
    if not isinstance(conv, Conv):
        _checks.fail("map of frequency_norms", "a Conv", type(conv).__name__)
    blocks, scale = _symbol(conv, grid, "frequency_norms")
    folded = _folded_shape(*torus(conv, grid))
    half, mirror = half_spectrum(folded), mirrored(folded)
    place = np.searchsorted(half, np.minimum(np.arange(len(mirror)), mirror))
    values = _linalg.singular_values(blocks.reshape(*blocks.shape[:-2], -1))
    return (jnp.max(values, axis=(1, 2)) * scale)[place].reshape(folded)


def _of_matrix(conv: Conv) -> Array:
    if not is_small(conv):
        what = "map of singular_values(grid='operator')"
        _checks.fail(what, f"at most {DENSE_SIZE} entries", math.prod(sizes(conv)))
    matrix, _ = entries(conv)
    scale = scale_of(matrix)
    return _linalg.singular_values(matrix / scale) * scale


def _symbol(linear_map: LinearMap, grid: Grid, what: str) -> tuple[Array, Array]:
    """Blocks Â / (scale sqrt(aliases)) and the scale.

    Their shape is (frequencies, groups, n2 / groups, aliases, n1 / groups).
    """
    check_grid(grid)
    linear_map = base_of(linear_map)
    if not isinstance(linear_map, Conv):
        if not has_blocks(linear_map):
            entries = math.prod(sizes(linear_map))
            _checks.fail(f"map of {what}", f"at most {DENSE_SIZE} entries", entries)
        taps, _ = taps_and_phases(linear_map, grid)
        scale = scale_of(taps)
        return (taps / scale).transpose(1, 0, 3, 2)[:, :, :, None, :], scale
    kernel = linear_map.kernel.astype(compute_dtype(linear_map))
    scale = scale_of(kernel)
    shape, strides = torus(linear_map, grid)
    axes, folded = len(shape), _folded_shape(shape, strides)
    placed = on_torus(kernel / scale, linear_map.kernel_dilation, shape)
    spectrum = jnp.fft.fftn(placed, axes=tuple(range(axes)))
    # frequency f + a n/s aliases with f for a = 0 … s − 1: split each axis into (alias, f)
    split = [n for pair in zip(strides, folded, strict=True) for n in pair]
    groups, n_in = linear_map.feature_group_count, kernel.shape[-2]
    blocks = spectrum.reshape(*split, n_in, groups, -1)
    alias, frequency, (i, g, o) = (
        *(range(k, 2 * axes, 2) for k in (0, 1)),
        range(2 * axes, blocks.ndim),
    )
    blocks = blocks.transpose(*frequency, g, o, *alias, i)
    blocks = blocks.reshape(math.prod(folded), groups, -1, math.prod(strides), n_in)
    return blocks[half_spectrum(folded)] / math.sqrt(math.prod(strides)), scale


def _folded_shape(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n // s for n, s in zip(shape, strides, strict=True))


def smaller_gram(matrix: Array) -> Array:
    """Â Âᴴ or Âᴴ Â, whichever is smaller: their non-zero eigenvalues are the same."""
    adjoint = matrix.conj().swapaxes(-1, -2)
    left, right = (matrix, adjoint)
    if matrix.shape[-2] > matrix.shape[-1]:
        left, right = adjoint, matrix
    return jnp.matmul(left, right, precision="highest")


def on_torus(kernel: Array, dilation: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """Kernel taps at their dilated positions on the torus; taps that wrap around add up."""
    *taps, n_in, n_out = kernel.shape
    places = [np.arange(k) * d % n for k, d, n in zip(taps, dilation, shape, strict=True)]
    return jnp.zeros((*shape, n_in, n_out), kernel.dtype).at[np.ix_(*places)].add(kernel)
