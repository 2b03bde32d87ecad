r"""The symbol of a layer as a trigonometric polynomial in its few taps.

A convolution has few taps K_t ∈ R^{n1 × n2} at positions p_t of the torus and many frequencies f, so

    Â(f)ᵀ = Σ_t exp(−2πi f·p_t) K_t

is one small matrix product with a table of phases that is known at trace time, and needs no padded
transform. Frequencies f and −f are conjugate: half of them suffice, and where every phase is ±1 the
symbol is real. A kernel that does not vary along an axis needs no frequency along it but zero.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stochsolvers._typing import Array
from stochsolvers.linear_maps import Conv, LinearMap
from stochsolvers.lipschitz._torus import half_spectrum, torus
from stochsolvers.lipschitz._types import Grid, check_grid, compute_dtype
from stochsolvers.lipschitz.machinery.written import base_of, entries, product_error

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
      error: bound on the errors of the taps, in the Frobenius norm and relative to it; 0 if they are known.
    """

    cosines: np.ndarray
    sines: np.ndarray
    num_real: int
    nodes: Nodes | None = None
    error: float = 0.0


_ONE = Phases(np.ones((1, 1, 1)), np.zeros((1, 1, 1)), 1)
"""Of one block without frequencies."""


def taps_and_phases(linear_map: LinearMap, grid: Grid) -> tuple[Array, Phases]:
    """The taps, shape (groups, taps, n1 / groups, n2 / groups), and the table of their phases.

    A transposed map has those of its base: the singular values are the same. A map without a kernel is
    written out, one tap with all of its inputs and outputs.
    """
    check_grid(grid)
    dtype = compute_dtype(linear_map)
    linear_map = base_of(linear_map)
    if isinstance(linear_map, Conv):
        *sizes, n_in, n2 = linear_map.kernel.shape
        groups = linear_map.feature_group_count
        kernel = linear_map.kernel.astype(dtype).reshape(-1, n_in, groups, n2 // groups)
        shape, strides = torus(linear_map, grid)
        phases = _phases(shape, strides, tuple(sizes), linear_map.kernel_dilation)
        return kernel.transpose(2, 0, 1, 3), phases
    if hasattr(linear_map, "blocks"):
        blocks = linear_map.blocks().astype(dtype)  # pyright: ignore
        summed = blocks.size != sum(leaf.size for leaf in jax.tree.leaves(linear_map))
        return blocks[:, None], _ONE._replace(error=product_error(linear_map) if summed else 0.0)
    matrix, error = entries(linear_map)
    return matrix[None, None], _ONE._replace(error=error)


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


@functools.lru_cache(maxsize=64)
def _phases(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    kernel: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Phases:
    points, aliases = math.prod(shape), math.prod(strides)
    grid = tuple(n // s if k > 1 else 1 for n, s, k in zip(shape, strides, kernel, strict=True))
    frequency = np.unravel_index(half_spectrum(grid), grid)
    alias = np.unravel_index(np.arange(aliases), strides)
    tap = np.unravel_index(np.arange(math.prod(kernel)), kernel)
    turns = np.zeros((len(frequency[0]), aliases, len(tap[0])), np.int64)  # of 1 / points
    for n, s, d, f, a, t in zip(shape, strides, dilation, frequency, alias, tap, strict=True):
        # frequency f + a n/s aliases with f for a = 0 … s − 1
        turns += (f[:, None, None] + a[:, None] * (n // s)) * (t * d) * (points // n)
    turns %= points
    is_real = np.all(2 * turns % points == 0, axis=(1, 2))
    angles = -2 * np.pi / points * turns
    order = np.argsort(~is_real, kind="stable")
    sines = np.where(is_real[:, None, None], 0.0, np.sin(angles))
    scale = 1 / math.sqrt(aliases)
    nodes = None
    if aliases == 1:
        step = np.stack([f * d for f, d in zip(frequency, dilation, strict=True)])
        nodes = _nodes(step[:, order], shape, kernel)
    return Phases(scale * np.cos(angles)[order], scale * sines[order], int(is_real.sum()), nodes)


def _nodes(step: np.ndarray, shape: tuple[int, ...], kernel: tuple[int, ...]) -> Nodes | None:
    """The nodes for frequencies with phases 2π step / shape from tap to tap, (axes, frequencies)."""
    grid = tuple(2 * k - 1 for k in kernel)
    half = np.stack(np.unravel_index(half_spectrum(grid), grid))  # zero is the first
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
    taps = np.stack(np.unravel_index(np.arange(math.prod(kernel)), kernel))
    turns = np.einsum("xg,xt->gt", half / np.array(grid)[:, None], taps)
    angles = -2 * np.pi * turns[:, None, :]
    return Nodes(
        np.cos(angles), np.sin(angles), here + mirrored, here - mirrored, abs(here) + abs(mirrored)
    )
