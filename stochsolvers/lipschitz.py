r"""Lipschitz constants of layers from the Fourier transform of their kernels.

A circular convolution is block-diagonalised by the two-dimensional DFT (Bibi et al. 2019, eq. 21), with
one n2 × n1 block Â(f) per frequency f, so that

    L = ||A||² = max_f λ_max(Â(f) Â(f)ᴴ)                                   (Bibi et al. 2019, lemma 2).

A stride s keeps one output in s², which folds the s² frequencies that alias into one block
[Â(f_1), …, Â(f_{s²})] / s. Groups give blocks of their own. A dense map is the 1 × 1 grid.

Under zero padding the formula on the layer's own grid (`grid="layer"`, the paper's choice) is an
approximation that can be too small. `grid="padded"` evaluates it on a torus that holds the whole
linear convolution, H + kh − 1 by W + kw − 1 rounded up to the strides; the layer is a corner of that
torus' map, so the value is an upper bound whatever the padding.
"""

import functools
import math
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from stochsolvers import _checks
from stochsolvers._typing import Array
from stochsolvers.linear_maps import Conv, Dense, LinearMap

Grid: TypeAlias = Literal["layer", "padded"]


class Bracket(NamedTuple):
    """Two numbers that hold a constant between them."""

    lower: Array
    upper: Array


@functools.partial(jax.jit, static_argnames="grid")
def lipschitz_constant(linear_map: LinearMap, *, grid: Grid = "layer") -> Array:
    r"""L = λ_max(A A*), the squared spectral norm of a layer.

    Args:
      linear_map: `Dense` or `Conv`.
      grid: "layer" for lemma 2 on the layer's own grid: exact for CIRCULAR padding whose strides
        divide the grid, an approximation otherwise. "padded" for an upper bound under any padding.

    Returns:
      scalar, in float32 or the kernel's wider dtype. Differentiable, `jit`-able.

    References:
      Bibi et al. 2019, lemma 2; Sedghi et al. 2019.
    """
    blocks = _symbol(linear_map, grid)
    return jnp.maximum(jnp.max(jnp.linalg.eigvalsh(_smaller_gram(blocks))), 0.0)


@functools.partial(jax.jit, static_argnames="grid")
def lipschitz_bracket(linear_map: LinearMap, *, grid: Grid = "layer") -> Bracket:
    r"""lower ≤ L ≤ upper for L = max_f λ_max(Â(f) Â(f)ᴴ), round-off included.

    Args:
      linear_map: `Dense` or `Conv`.
      grid: as in `lipschitz_constant`; the upper end for "padded" bounds the layer under any padding.

    Returns:
      Bracket of scalars, in float32 or the kernel's wider dtype.
    """
    constant = lipschitz_constant(linear_map, grid=grid)
    floats = jnp.finfo(constant.dtype)
    slack = 4 * linear_map.kernel.size**0.5 * floats.eps
    lower = jnp.minimum(constant * (1 - slack), floats.max)
    return Bracket(lower, constant * (1 + slack) + floats.tiny)


@functools.partial(jax.jit, static_argnames="grid")
def feature_lipschitz_constants(linear_map: LinearMap, *, grid: Grid = "layer") -> Array:
    r"""L_i of the n1 terms f_i of objective (5): L_i = n1 ||A_i||², shape (n1,).

    With unit stride ||A_i||² = max_f ||Â(f)_{:, i}||², a norm and no eigenvalue.

    References:
      Bibi et al. 2019, section 5.
    """
    blocks = _symbol(linear_map, grid)  # (frequencies, groups, outputs, aliases, inputs)
    columns = jnp.moveaxis(blocks, -1, -3)  # (frequencies, groups, inputs, outputs, aliases)
    if columns.shape[-1] == 1:
        squared = jnp.sum(jnp.abs(columns) ** 2, axis=(-2, -1))
    else:
        gram = jnp.einsum("...oa,...ob->...ab", columns.conj(), columns, precision="highest")
        squared = jnp.linalg.eigvalsh(gram)[..., -1]
    norms = jnp.max(squared, axis=0).reshape(-1)
    return linear_map.in_features * norms


@functools.partial(jax.jit, static_argnames="grid")
def output_lipschitz_constants(linear_map: LinearMap, *, grid: Grid = "layer") -> Array:
    r"""Blockwise constants of the outputs, M_j = ||(A A*)_{jj}|| = max_f ||Â(f)_{j, :}||², (n2,).

    They are the coordinate constants of F, which the step sizes of `nsync` need.
    """
    blocks = _symbol(linear_map, grid)
    return jnp.max(jnp.sum(jnp.abs(blocks) ** 2, axis=(-2, -1)), axis=0).reshape(-1)


@jax.jit
def strong_convexity(linear_map: LinearMap) -> Array:
    r"""A certified lower bound on λ_min(A A*): 0 unless the structure gives better.

    The smallest eigenvalue, less its round-off, for a dense map with n2 ≤ n1 and for a circular
    convolution whose strides divide its grid. Zero padding admits no bound from the spectrum.
    """
    dtype = _compute_dtype(linear_map)
    if isinstance(linear_map, Conv):
        divides = all(
            n % s == 0 for n, s in zip(linear_map.spatial_shape, linear_map.strides, strict=True)
        )
        if linear_map.padding != "CIRCULAR" or not divides:
            return jnp.zeros((), dtype)
    blocks = _symbol(linear_map, "layer")
    blocks = blocks.reshape(*blocks.shape[:-2], -1)
    if blocks.shape[-2] > blocks.shape[-1]:
        return jnp.zeros((), dtype)
    gram = jnp.matmul(blocks, blocks.conj().swapaxes(-1, -2), precision="highest")
    eigenvalues = jnp.linalg.eigvalsh(gram)
    slack = 8 * blocks.shape[-1] * jnp.finfo(dtype).eps * jnp.max(eigenvalues)
    return jnp.maximum(jnp.min(eigenvalues) - slack, 0.0)


def _compute_dtype(linear_map: LinearMap):
    return jnp.promote_types(linear_map.kernel.dtype, jnp.float32)


def _smaller_gram(blocks: Array) -> Array:
    """Â Âᴴ or Âᴴ Â, whichever is smaller: their non-zero eigenvalues are the same."""
    matrix = blocks.reshape(*blocks.shape[:-2], -1)
    adjoint = matrix.conj().swapaxes(-1, -2)
    left, right = (matrix, adjoint)
    if matrix.shape[-2] > matrix.shape[-1]:
        left, right = adjoint, matrix
    return jnp.matmul(left, right, precision="highest")


def _symbol(linear_map: LinearMap, grid: Grid) -> Array:
    """Blocks Â / sqrt(aliases), shape (frequencies, groups, n2 / groups, aliases, n1 / groups)."""
    _checks.member("grid", grid, ("layer", "padded"))
    kernel = linear_map.kernel.astype(_compute_dtype(linear_map))
    if isinstance(linear_map, Dense):
        return kernel.T[None, None, :, None, :]
    shape, strides = _torus(linear_map, grid)
    spectrum = jnp.fft.fft2(_on_torus(kernel, linear_map.kernel_dilation, shape), axes=(0, 1))
    groups = linear_map.feature_group_count
    spectrum = spectrum.reshape(*spectrum.shape[:3], groups, -1)
    (rows, columns), (sh, sw) = shape, strides
    # frequency f + a rows/s aliases with f for a = 0 … s − 1: split each axis into (alias, f)
    spectrum = spectrum.reshape(sh, rows // sh, sw, columns // sw, *spectrum.shape[2:])
    blocks = jnp.einsum("apbqigo->pqgoabi", spectrum)
    p, q, g, o, a, b, i = blocks.shape
    half = _half_spectrum(p, q)
    return blocks.reshape(p * q, g, o, a * b, i)[half] / math.sqrt(sh * sw)


def _half_spectrum(rows: int, columns: int) -> np.ndarray:
    """One frequency of each pair ±f: a real kernel's other block is the complex conjugate."""
    p, q = np.divmod(np.arange(rows * columns), columns)
    mirrored = (-p % rows) * columns + (-q % columns)
    return np.flatnonzero(np.arange(rows * columns) <= mirrored)


def _torus(conv: Conv, grid: Grid) -> tuple[tuple[int, int], tuple[int, int]]:
    """Grid of the DFT, and the strides that fold it."""
    if grid == "padded" and conv.padding == "CIRCULAR":
        # the torus is the layer's own; a stride that does not divide it only drops outputs
        strides = [
            s if n % s == 0 else 1 for n, s in zip(conv.spatial_shape, conv.strides, strict=True)
        ]
        return conv.spatial_shape, (strides[0], strides[1])
    extents = conv.dilated_kernel_shape if grid == "padded" else (1, 1)
    rows, columns = (
        -(-(n + k - 1) // s) * s
        for n, k, s in zip(conv.spatial_shape, extents, conv.strides, strict=True)
    )
    return (rows, columns), conv.strides


def _on_torus(kernel: Array, dilation: tuple[int, int], shape: tuple[int, int]) -> Array:
    """Kernel taps at their dilated positions on the torus; taps that wrap around add up."""
    kh, kw, n_in, n_out = kernel.shape
    rows = np.arange(kh) * dilation[0] % shape[0]
    columns = np.arange(kw) * dilation[1] % shape[1]
    torus = jnp.zeros((*shape, n_in, n_out), kernel.dtype)
    return torus.at[rows[:, None], columns[None, :]].add(kernel)
