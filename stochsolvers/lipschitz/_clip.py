r"""Projection of a layer onto the maps of bounded norm, by clipping its singular values."""

import dataclasses
import functools
import math
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from stochsolvers import _checks, _linalg
from stochsolvers._typing import Array, Scalar
from stochsolvers.linear_maps import Contraction, Conv, Dense, LinearMap, Matrix, Transposed
from stochsolvers.lipschitz._formula import on_torus, smaller_gram
from stochsolvers.lipschitz._norm import spectral_norm
from stochsolvers.lipschitz._torus import half_spectrum, is_exact, mirrored, torus
from stochsolvers.lipschitz._types import compute_dtype, of_map

_Map = TypeVar("_Map", bound=LinearMap)
_ROUNDS = 4  # in which the level on the torus of a zero-padded layer is matched to the layer's norm


@of_map
def clip_singular_values(
    linear_map: _Map,
    bound: Scalar,
    *,
    taps: Literal["kernel", "grid"] = "kernel",
    tolerance: float = 1e-3,
    num_iters: int = 100,
) -> _Map:
    r"""argmin_B ||B − A||_F subject to ||B|| ≤ c: every singular value σ becomes min(σ, c).

    Exact for dense maps, matrices and contractions, and for a circular convolution whose kernel may have taps
    on its whole grid (`taps="grid"`).

    With the taps of A alone (`taps="kernel"`) B must also be a convolution with so many taps. Dykstra's
    alternating projections between the two sets, singular values clipped at every frequency of the torus and
    taps cropped, converge to the nearest such B. They end when no singular value is above (1 + tolerance) c,
    and the kernel is divided by what is left of that.

    Under zero padding, or with strides that do not divide the grid, the torus is that of `grid="padded"`, on
    which the norm is larger than the layer's. Its level is raised until the norm of the layer itself is c; B
    is then near the nearest map, not exactly it.

    A map with ||A|| ≤ c is returned as it is.

    Args:
      linear_map: a `Dense`, `Conv`, `Contraction` or `Matrix`, or the transposed map of one.
      bound: c > 0, traced.
      taps: of a convolution.
      tolerance: relative, of the norm.
      num_iters: of alternating projections, at most.

    Returns:
      a map of the same kind; its norm is c to round-off where `spectral_norm` is exact.

    Raises:
      ValueError: at trace time, for a map without a kernel, and for `taps="grid"` of a layer that is not
        circular.

    References:
      Sedghi, Gupta and Long 2019, section 3; Boyle and Dykstra 1986.
    """
    _checks.positive("bound", bound)
    _checks.rank("bound", bound, 0)
    _checks.positive("tolerance", tolerance)
    _checks.rank("tolerance", tolerance, 0)
    _checks.member("taps", taps, ("kernel", "grid"))
    num_iters = _checks.count("num_iters", num_iters)
    base: Any = linear_map
    if isinstance(base, Transposed):
        options: Any = {"taps": taps, "tolerance": tolerance, "num_iters": num_iters}
        return clip_singular_values(base.base, bound, **options).T  # pyright: ignore
    if isinstance(base, Dense | Matrix):
        kernel = _clipped_kernel(base.kernel, bound)
        return dataclasses.replace(base, kernel=kernel)  # pyright: ignore
    if isinstance(base, Contraction):
        return _of_contraction(base, bound)  # pyright: ignore
    if not isinstance(base, Conv):
        kinds = "a Dense, Conv, Contraction or Matrix"
        _checks.fail("map of clip_singular_values", kinds, type(base).__name__)
    if taps == "grid":
        if not is_exact(base):
            expected = "CIRCULAR padding and strides that divide the grid"
            _checks.fail("layer of taps='grid'", expected, f"{base.padding}, {base.strides}")
        return _on_whole_grid(base, bound)  # pyright: ignore
    return _with_the_taps(base, bound, tolerance, num_iters)  # pyright: ignore


def clipped(matrices: Array, bound: Array) -> Array:
    """Σ_i min(σ_i, c) p_i q_iᴴ for matrices (..., m, n); one without a σ_i above c is returned as it is."""
    p, sigma, q = _linalg.svd(matrices)
    inside = jnp.matmul(p * jnp.minimum(sigma, bound)[..., None, :], q, precision="highest")
    return jnp.where(jnp.all(sigma <= bound, axis=-1)[..., None, None], matrices, inside)


@jax.jit
def _clipped_kernel(kernel: Array, bound: Scalar) -> Array:
    wide = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    return clipped(wide, jnp.asarray(bound, wide.dtype)).astype(kernel.dtype)


@jax.jit
def _of_contraction(contraction: Contraction, bound: Scalar) -> Contraction:
    wide = contraction.astype(compute_dtype(contraction))

    def blocks_of(kernel):
        return dataclasses.replace(wide, kernel=kernel).blocks()

    blocks, transposed = jax.vjp(blocks_of, wide.kernel)
    change = clipped(blocks, jnp.asarray(bound, blocks.dtype)) - blocks
    # each entry of a block is the sum of so many of the kernel's, and stands in so many rows
    labels, sizes = wide.labels, dict(zip(wide.labels.kernel, wide.kernel.shape, strict=True))
    summed = math.prod(sizes[label] for label in labels.kernel_summed)
    repeated = blocks.size * summed // wide.kernel.size
    kernel = wide.kernel + transposed(change)[0] / (summed * repeated)
    return dataclasses.replace(contraction, kernel=kernel.astype(contraction.kernel.dtype))


class _Torus:
    """The blocks of half of the frequencies of convolutions with one geometry, and the way back."""

    def __init__(self, conv: Conv):
        self.conv = conv
        self.shape, self.strides = torus(conv, "layer" if is_exact(conv) else "padded")
        self.folded = tuple(n // s for n, s in zip(self.shape, self.strides, strict=True))
        self.half = half_spectrum(self.folded)
        is_own = mirrored(self.folded)[self.half] == self.half
        self.weights = np.where(is_own, 1.0, 2.0)  # frequencies f and −f

    def blocks(self, kernel: Array, dilation: tuple[int, ...] | None = None) -> Array:
        """Â / sqrt(aliases), shape (frequencies, groups, n2 / groups, aliases · n1 / groups)."""
        axes, groups = len(self.shape), self.conv.feature_group_count
        dilation = self.conv.kernel_dilation if dilation is None else dilation
        spectrum = jnp.fft.fftn(on_torus(kernel, dilation, self.shape), axes=tuple(range(axes)))
        split = [n for pair in zip(self.strides, self.folded, strict=True) for n in pair]
        blocks = spectrum.reshape(*split, kernel.shape[-2], groups, -1)
        alias, frequency = range(0, 2 * axes, 2), range(1, 2 * axes, 2)
        i, g, o = range(2 * axes, blocks.ndim)
        blocks = blocks.transpose(*frequency, g, o, *alias, i)
        count, aliases = math.prod(self.folded), math.prod(self.strides)
        blocks = blocks.reshape(count, groups, kernel.shape[-1] // groups, -1)
        return blocks[self.half] / math.sqrt(aliases)

    def kernel(self, blocks: Array, like: Array, dilation: tuple[int, ...] | None = None) -> Array:
        """The taps of the torus' kernel with these blocks: the projection onto kernels like one."""

        def parts(kernel):
            image = self.blocks(kernel, dilation)
            return jnp.real(image), jnp.imag(image)

        weights = jnp.asarray(self.weights, like.dtype)[:, None, None, None]
        transposed = jax.linear_transpose(parts, like)
        (taps,) = transposed((weights * jnp.real(blocks), weights * jnp.imag(blocks)))
        norm = math.prod(self.folded)  # Σ |blocks|² over all frequencies is that times Σ |taps|²
        dilation = self.conv.kernel_dilation if dilation is None else dilation
        meeting = _taps_at_each_place(like.shape[:-2], dilation, self.shape)
        return taps / (norm * jnp.asarray(meeting, like.dtype)[..., None, None])


def _taps_at_each_place(
    counts: tuple[int, ...], dilation: tuple[int, ...], shape: tuple[int, ...]
) -> np.ndarray:
    """How many taps of a filter lie where this one does; more than one only on a torus smaller than it."""
    total = np.ones(counts)
    for axis, (k, d, n) in enumerate(zip(counts, dilation, shape, strict=True)):
        places = np.arange(k) * d % n
        same = (places[:, None] == places).sum(axis=1)
        total = total * same.reshape([-1 if a == axis else 1 for a in range(len(counts))])
    return total


@jax.jit
def _on_whole_grid(conv: Conv, bound: Scalar) -> Conv:
    """The circular convolution with the clipped blocks, a tap at every pixel."""
    dtype = compute_dtype(conv)
    grid, ones = _Torus(conv), (1,) * len(conv.spatial_shape)
    kernel = conv.kernel.astype(dtype)
    blocks = clipped(grid.blocks(kernel), jnp.asarray(bound, dtype))
    like = jnp.zeros((*grid.shape, *kernel.shape[-2:]), dtype)
    return dataclasses.replace(
        conv,
        kernel=grid.kernel(blocks, like, ones).astype(conv.kernel.dtype),
        kernel_dilation=ones,
        circular_low=tuple(low % n for (low, _), n in zip(conv.pads, grid.shape, strict=True)),
    )


@functools.partial(jax.jit, static_argnames="num_iters")
def _with_the_taps(conv: Conv, bound: Scalar, tolerance: Scalar, num_iters: int) -> Conv:
    wide = conv.astype(compute_dtype(conv))
    bound = jnp.asarray(bound, wide.dtype)
    before = spectral_norm(wide)
    level, kernel = bound, wide.kernel
    for _ in range(1 if is_exact(conv) else _ROUNDS):
        kernel = _dykstra(wide, level, jnp.asarray(tolerance, wide.dtype), num_iters)
        norm = spectral_norm(dataclasses.replace(wide, kernel=kernel))
        level = level * bound / jnp.where(norm > 0, norm, bound)
        kernel = kernel * jnp.minimum(1.0, bound / jnp.where(norm > 0, norm, bound))
    kernel = jnp.where(before <= bound, wide.kernel, kernel)
    return dataclasses.replace(conv, kernel=kernel.astype(conv.kernel.dtype))


def _dykstra(conv: Conv, level: Array, tolerance: Array, num_iters: int) -> Array:
    """The kernel nearest to that of `conv` whose blocks have no singular value above the level."""
    grid = _Torus(conv)

    def unfinished(carry):
        k, _, _, largest = carry
        return (k < num_iters) & (largest > (1 + tolerance) * level)

    def step(carry):
        k, kernel, correction, _ = carry
        target = grid.blocks(kernel) + correction
        inside = clipped(target, level)
        kernel = grid.kernel(inside, kernel)
        return k + 1, kernel, target - inside, largest(kernel)

    def largest(kernel):
        values = _linalg.eigvalsh(smaller_gram(grid.blocks(kernel)))
        return jnp.sqrt(jnp.maximum(jnp.max(values), 0.0))

    kernel = conv.kernel
    init = jnp.asarray(0), kernel, jnp.zeros_like(grid.blocks(kernel)), largest(kernel)
    return lax.while_loop(unfinished, step, init)[1]
