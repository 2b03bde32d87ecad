r"""The symbol of a layer as a trigonometric polynomial in its few taps.

A convolution has few taps K_t ∈ R^{n1 × n2} at positions p_t of the torus and many frequencies f, so

    Â(f)ᵀ = Σ_t exp(−2πi f·p_t) K_t

is one small matrix product with a table of phases that is known at trace time, and needs no padded
transform. Frequencies f and −f are conjugate: half of them suffice, and where every phase is ±1 the
symbol is real. A kernel that does not vary along an axis needs no frequency along it but zero.
"""

import functools
import math
from typing import Literal, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np

from stochsolvers import _checks
from stochsolvers._typing import Array
from stochsolvers.linear_maps import Conv, LinearMap

Grid: TypeAlias = Literal["layer", "padded"]

_NODES_PAY = 1.5  # frequencies for each node, above which interpolation is faster


class Nodes(NamedTuple):
    """Few frequencies g that determine the Gram matrix at every f, G(f) = Σ_g D(f − g) G(g).

    G(f) = Σ_δ C_δ exp(2πi f·δ) has δ from −(k − 1) to k − 1, so that its values on a grid of 2k − 1 points
    an axis determine it, D the Dirichlet kernel Σ_δ exp(2πi f·δ) / (2k − 1).

    Attributes:
      cosines, sines: phases as in `Phases`, (nodes, 1, taps), of half of the nodes, zero first.
      real, imaginary: weights (frequencies, nodes) of the two parts of G(g), g and −g together.
      absolute: Σ |D| over g and −g.
    """

    cosines: np.ndarray
    sines: np.ndarray
    real: np.ndarray
    imaginary: np.ndarray
    absolute: np.ndarray


class Phases(NamedTuple):
    """exp(−2πi f·p_t) / sqrt(aliases) for half of the frequencies, those with real phases first.

    Attributes:
      cosines, sines: float64 arrays (frequencies, aliases, taps) in host memory.
      num_real: how many of the frequencies, the first ones, have no imaginary part.
      nodes: if they are far fewer than the frequencies.
    """

    cosines: np.ndarray
    sines: np.ndarray
    num_real: int
    nodes: Nodes | None = None


def check_grid(grid: str) -> None:
    """Refuse unknown grids."""
    _checks.member("grid", grid, ("layer", "padded"))


def compute_dtype(linear_map: LinearMap):
    """float32, or the kernel's own type if that is wider."""
    return jnp.promote_types(linear_map.kernel.dtype, jnp.float32)


def taps_and_phases(linear_map: LinearMap, grid: Grid) -> tuple[Array, Phases]:
    """The taps, shape (groups, taps, n1 / groups, n2 / groups), and the table of their phases."""
    check_grid(grid)
    kernel = linear_map.kernel.astype(compute_dtype(linear_map))
    if not isinstance(linear_map, Conv):
        return kernel[None, None], Phases(np.ones((1, 1, 1)), np.zeros((1, 1, 1)), 1)
    kh, kw, n_in, _ = kernel.shape
    taps = kernel.reshape(kh * kw, n_in, linear_map.feature_group_count, -1).transpose(2, 0, 1, 3)
    shape, strides = torus(linear_map, grid)
    return taps, _phases(shape, strides, (kh, kw), linear_map.kernel_dilation)


def folded(taps: Array, phases: Phases) -> tuple[Array, Phases]:
    """The same symbol from fewer taps: those that meet at one place of a torus smaller than the kernel."""
    if phases.nodes is not None:
        return taps, phases
    table = np.concatenate([phases.cosines, phases.sines]).reshape(-1, taps.shape[1])
    places, place = np.unique(table, axis=1, return_inverse=True)
    count = places.shape[1]
    if count == taps.shape[1]:
        return taps, phases
    first = np.array([np.argmax(place == k) for k in range(count)])
    sums = [sum(taps[:, t] for t in np.flatnonzero(place == k)) for k in range(count)]
    cosines, sines = phases.cosines[..., first], phases.sines[..., first]
    return jnp.stack(sums, axis=1), phases._replace(cosines=cosines, sines=sines)


def torus(conv: Conv, grid: Grid) -> tuple[tuple[int, int], tuple[int, int]]:
    """Grid of the DFT, and the strides that fold it."""
    check_grid(grid)
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


def half_spectrum(rows: int, columns: int) -> np.ndarray:
    """One frequency of each pair ±f: a real kernel's other block is the complex conjugate."""
    p, q = np.divmod(np.arange(rows * columns), columns)
    mirrored = (-p % rows) * columns + (-q % columns)
    return np.flatnonzero(np.arange(rows * columns) <= mirrored)


@functools.lru_cache(maxsize=64)
def _phases(
    shape: tuple[int, int], strides: tuple[int, int], kernel: tuple[int, int], dilation: tuple
) -> Phases:
    (rows, columns), (sh, sw) = shape, strides
    row, column = np.divmod(np.arange(kernel[0] * kernel[1]), kernel[1])
    tap_rows, tap_columns = row * dilation[0], column * dilation[1]
    folded = rows // sh if kernel[0] > 1 else 1, columns // sw if kernel[1] > 1 else 1
    p, q = np.divmod(half_spectrum(*folded), folded[1])
    # frequency f + a rows/s aliases with f for a = 0 … s − 1
    alias_p, alias_q = np.divmod(np.arange(sh * sw), sw)
    p = p[:, None, None] + alias_p[:, None] * (rows // sh)
    q = q[:, None, None] + alias_q[:, None] * (columns // sw)
    turns = (p * tap_rows * columns + q * tap_columns * rows) % (rows * columns)
    is_real = np.all(2 * turns % (rows * columns) == 0, axis=(1, 2))
    angles = -2 * np.pi / (rows * columns) * turns
    order = np.argsort(~is_real, kind="stable")
    sines = np.where(is_real[:, None, None], 0.0, np.sin(angles))
    scale = 1 / math.sqrt(sh * sw)
    nodes = None
    if sh * sw == 1:
        step = np.stack([p[:, 0, 0] * dilation[0], q[:, 0, 0] * dilation[1]])
        nodes = _nodes(step[:, order], shape, kernel)
    return Phases(scale * np.cos(angles)[order], scale * sines[order], int(is_real.sum()), nodes)


def _nodes(step: np.ndarray, shape: tuple[int, int], kernel: tuple[int, int]) -> Nodes | None:
    """The nodes for frequencies with phases 2π step / shape from tap to tap, (2, frequencies)."""
    grid = 2 * kernel[0] - 1, 2 * kernel[1] - 1
    half = np.stack(np.divmod(half_spectrum(*grid), grid[1]))  # zero is the first
    if half.shape[1] * _NODES_PAY > step.shape[1]:
        return None

    def dirichlet(sign):
        weights = np.ones((step.shape[1], half.shape[1]))
        for s, length, g, points in zip(step, shape, sign * half, grid, strict=True):
            # whole numbers up to the cosine, so that only it is rounded
            turns = (s[:, None] * points - g * length) % (length * points)
            lags = np.arange(points) - points // 2
            turns = turns[..., None] * lags % (length * points)
            weights *= np.mean(np.cos(2 * np.pi / (length * points) * turns), axis=-1)
        return weights

    here, mirrored = dirichlet(1), dirichlet(-1)
    mirrored[:, 0] = 0.0  # zero is its own mirror image
    taps = np.stack(np.divmod(np.arange(kernel[0] * kernel[1]), kernel[1]))
    turns = np.einsum("xg,xt->gt", half / np.array(grid)[:, None], taps)
    angles = -2 * np.pi * turns[:, None, :]
    return Nodes(
        np.cos(angles), np.sin(angles), here + mirrored, here - mirrored, abs(here) + abs(mirrored)
    )
