r"""The grid on which a convolution is block-diagonal, for any number of spatial axes."""

import math

import numpy as np

from stochsolvers.linear_maps import Conv, LinearMap
from stochsolvers.lipschitz._types import Grid, check_grid, of_map
from stochsolvers.lipschitz.machinery.written import base_of


@of_map
def is_exact(linear_map: LinearMap) -> bool:
    """Whether lemma 2 on the layer's own grid is the norm.

    Not of a convolution, or its transpose, under zero padding or with strides that do not divide its grid.
    """
    linear_map = base_of(linear_map)
    if not isinstance(linear_map, Conv):
        return True
    sizes = zip(linear_map.spatial_shape, linear_map.strides, strict=True)
    return linear_map.padding == "CIRCULAR" and all(n % s == 0 for n, s in sizes)


def torus(conv: Conv, grid: Grid) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape of the DFT, and the strides that fold it.

    "layer": that of the input, rounded up to the strides. "padded": n + d (k − 1) on every axis, rounded up,
    so that the linear convolution fits. Under CIRCULAR padding that is the layer's own; a stride that does
    not divide it only drops outputs of the map without that stride.
    """
    check_grid(grid)
    sizes = list(zip(conv.spatial_shape, conv.strides, conv.dilated_kernel_shape, strict=True))
    if grid == "padded" and conv.padding == "CIRCULAR":
        return conv.spatial_shape, tuple(s if n % s == 0 else 1 for n, s, _ in sizes)
    extra = 1 if grid == "padded" else 0
    shape = tuple(-(-(n + extra * (k - 1)) // s) * s for n, s, k in sizes)
    return shape, conv.strides


def mirrored(shape: tuple[int, ...]) -> np.ndarray:
    """The number of −f for every frequency f of a grid, in order."""
    frequencies = np.unravel_index(np.arange(math.prod(shape)), shape)
    opposite = tuple(-f % n for f, n in zip(frequencies, shape, strict=True))
    return np.ravel_multi_index(opposite, shape)


def half_spectrum(shape: tuple[int, ...]) -> np.ndarray:
    """One frequency of each pair ±f: a real kernel's other block is the complex conjugate."""
    return np.flatnonzero(np.arange(math.prod(shape)) <= mirrored(shape))
