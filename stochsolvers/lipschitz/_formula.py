r"""The constants by their formulas: every block, and the decomposition of each."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from stochsolvers import _linalg
from stochsolvers._typing import Array
from stochsolvers.linear_maps import Conv, Dense, LinearMap
from stochsolvers.lipschitz._taps import (
    Grid,
    check_grid,
    compute_dtype,
    half_spectrum,
    taps_and_phases,
    torus,
)


def lipschitz_formula(linear_map: LinearMap, grid: Grid) -> Array:
    """max_f λ_max(Â(f) Â(f)ᴴ) from the eigenvalues of every block."""
    blocks = _symbol(linear_map, grid)
    return jnp.maximum(jnp.max(_linalg.eigvalsh(_smaller_gram(blocks))), 0.0)


@functools.partial(jax.jit, static_argnames="grid")
def feature_lipschitz_constants(linear_map: LinearMap, *, grid: Grid = "layer") -> Array:
    r"""L_i of the n1 terms f_i of objective (5): L_i = n1 ||A_i||², shape (n1,).

    With unit stride ||A_i||² = max_f ||Â(f)_{:, i}||², a norm and no eigenvalue.

    References:
      Bibi et al. 2019, section 5.
    """
    blocks = _blocks(linear_map, grid)
    columns = jnp.moveaxis(blocks, -1, -3)  # (frequencies, groups, inputs, outputs, aliases)
    if columns.shape[-1] == 1:
        squared = jnp.sum(jnp.abs(columns) ** 2, axis=(-2, -1))
    else:
        gram = jnp.einsum("...oa,...ob->...ab", columns.conj(), columns, precision="highest")
        squared = _linalg.eigvalsh(gram)[..., -1]
    norms = jnp.max(squared, axis=0).reshape(-1)
    return linear_map.in_features * norms


@functools.partial(jax.jit, static_argnames="grid")
def output_lipschitz_constants(linear_map: LinearMap, *, grid: Grid = "layer") -> Array:
    r"""Blockwise constants of the outputs, M_j = ||(A A*)_{jj}|| = max_f ||Â(f)_{j, :}||², (n2,).

    They are the coordinate constants of F, which the step sizes of `nsync` need.
    """
    blocks = _blocks(linear_map, grid)
    return jnp.max(jnp.sum(jnp.abs(blocks) ** 2, axis=(-2, -1)), axis=0).reshape(-1)


def _blocks(linear_map: LinearMap, grid: Grid) -> Array:
    """Blocks for half of the frequencies, from the taps: (frequencies, groups, outputs, aliases, inputs)."""
    taps, phases = taps_and_phases(linear_map, grid)
    re, im = (
        jnp.einsum("fat,gtio->fgoai", jnp.asarray(part, taps.dtype), taps, precision="highest")
        for part in (phases.cosines, phases.sines)
    )
    return re if phases.num_real == len(phases.cosines) else lax.complex(re, im)


def _smaller_gram(blocks: Array) -> Array:
    """Â Âᴴ or Âᴴ Â, whichever is smaller: their non-zero eigenvalues are the same."""
    matrix = blocks.reshape(*blocks.shape[:-2], -1)
    adjoint = matrix.conj().swapaxes(-1, -2)
    left, right = (matrix, adjoint)
    if matrix.shape[-2] > matrix.shape[-1]:
        left, right = adjoint, matrix
    return jnp.matmul(left, right, precision="highest")


@functools.partial(jax.jit, static_argnames="grid")
def singular_values(linear_map: LinearMap, *, grid: Grid = "layer") -> Array:
    r"""All singular values of the map that lemma 2 describes, with multiplicity, in descending order.

    They are those of the blocks Â(f), the union over frequencies and groups: of the layer itself if it
    is dense, or CIRCULAR with strides that divide its grid. Otherwise of the circular layer in its place.

    Returns:
      shape (min(inputs, outputs),) for one group, counted over the torus of `grid`; each group adds
      the smaller one of its own inputs and outputs.

    References:
      Sedghi et al. 2019, The singular values of convolutional layers.
    """
    blocks = _symbol(linear_map, grid)
    values = _linalg.singular_values(blocks.reshape(*blocks.shape[:-2], -1))
    if isinstance(linear_map, Conv):
        shape, strides = torus(linear_map, grid)
        rows, columns = (n // s for n, s in zip(shape, strides, strict=True))
        half = half_spectrum(rows, columns)
        p, q = np.divmod(half, columns)
        twice = (-p % rows) * columns + (-q % columns) != half
        values = jnp.concatenate([values, values[twice]])
    return -jnp.sort(-values.ravel())


def _symbol(linear_map: LinearMap, grid: Grid) -> Array:
    """Blocks Â / sqrt(aliases), shape (frequencies, groups, n2 / groups, aliases, n1 / groups)."""
    check_grid(grid)
    kernel = linear_map.kernel.astype(compute_dtype(linear_map))
    if isinstance(linear_map, Dense):
        return kernel.T[None, None, :, None, :]
    shape, strides = torus(linear_map, grid)
    spectrum = jnp.fft.fft2(_on_torus(kernel, linear_map.kernel_dilation, shape), axes=(0, 1))
    groups = linear_map.feature_group_count
    spectrum = spectrum.reshape(*spectrum.shape[:3], groups, -1)
    (rows, columns), (sh, sw) = shape, strides
    # frequency f + a rows/s aliases with f for a = 0 … s − 1: split each axis into (alias, f)
    spectrum = spectrum.reshape(sh, rows // sh, sw, columns // sw, *spectrum.shape[2:])
    blocks = jnp.einsum("apbqigo->pqgoabi", spectrum)
    p, q, g, o, a, b, i = blocks.shape
    half = half_spectrum(p, q)
    return blocks.reshape(p * q, g, o, a * b, i)[half] / math.sqrt(sh * sw)


def _on_torus(kernel: Array, dilation: tuple[int, int], shape: tuple[int, int]) -> Array:
    """Kernel taps at their dilated positions on the torus; taps that wrap around add up."""
    kh, kw, n_in, n_out = kernel.shape
    rows = np.arange(kh) * dilation[0] % shape[0]
    columns = np.arange(kw) * dilation[1] % shape[1]
    torus = jnp.zeros((*shape, n_in, n_out), kernel.dtype)
    return torus.at[rows[:, None], columns[None, :]].add(kernel)
