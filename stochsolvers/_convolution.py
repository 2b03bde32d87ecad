r"""Correlations with derivatives that XLA's CPU backend computes fast, inside loops too.

The backend has one fast routine, for images (batch, rows, columns, features) and kernels (rows, columns,
features, outputs), with one, two or three spatial axes. Outside loops it rewrites the transposed convolutions
that JAX derives into that form; in the body of a loop it does not, and they take many times as long. Here

    y = K ⋆ x,   x̄ = (flipped K)ᵀ ⋆ ȳ,   K̄ = ȳᵀ ⋆ xᵀ,

are all written in that form. In the last the examples are the features. Where the default backend is
another one, within `shard_map`, and on meshes with explicit axes, these are JAX's own convolution and
derivatives: the same values.
"""

import functools
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from stochsolvers._shards import is_explicit
from stochsolvers._typing import Array

Counts: TypeAlias = tuple[int, ...]
Pads: TypeAlias = tuple[tuple[int, int], ...]


def correlate(
    x: Array,
    kernel: Array,
    pads: Pads,
    *,
    strides: Counts | None = None,
    base: Counts | None = None,
    dilation: Counts | None = None,
    groups: int = 1,
) -> Array:
    """Σ_{a, i} kernel[a, i, j] x̃[s p + d a, i] of a batch, x̃ padded with zeros; a, p run over spatial axes.

    Args:
      x: shape (B, *sizes, n1), one to three spatial axes.
      kernel: shape (*taps, n1 / groups, n2).
      pads: (low, high) for each spatial axis; negative ones cut off.
      strides: s; 1 if None, as are the next two.
      base: distance of the pixels of x in x̃, zeros between them.
      dilation: d.
      groups: of features.
    """
    dtype = jnp.promote_types(x.dtype, kernel.dtype)
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    ones = (1,) * len(pads)
    geometry = _Geometry(pads, strides or ones, base or ones, dilation or ones, groups)
    # transposes by hand do not know the types of shard_map, and symbolic sizes are not compared
    manual = jax.sharding.get_abstract_mesh().manual_axes
    known = all(isinstance(n, int) and n > 0 for n in x.shape)
    if jax.default_backend() != "cpu" or manual or is_explicit() or not known:
        return _lax(x, kernel, geometry)
    return _correlate(x, kernel, geometry)


class _Geometry(NamedTuple):
    pads: Pads
    strides: Counts
    base: Counts
    dilation: Counts
    groups: int


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _correlate(x: Array, kernel: Array, geometry: _Geometry) -> Array:
    return _fast(x, kernel, geometry)


def _tangent(geometry: _Geometry, primals: Any, tangents: Any) -> tuple[Array, Array]:
    """The derivatives as transposes of the transposes, so that reverse mode runs the latter."""
    x, kernel = primals
    pads, strides, base, dilation, groups = geometry
    axes = range(len(pads))
    images_last = (*(1 + i for i in axes), 0, 1 + len(axes))  # (B, *sizes, n) to (*sizes, B, n)
    y = _correlate(x, kernel, geometry)
    starts = [low for low, _ in pads]
    reach = [dilation[i] * (kernel.shape[i] - 1) for i in axes]
    beyond = [
        strides[i] * (y.shape[1 + i] - 1) - base[i] * (x.shape[1 + i] - 1) - starts[i] for i in axes
    ]

    def gradient_of_x(y: Array) -> Array:
        around = tuple((reach[i] - starts[i], -beyond[i]) for i in axes)
        turned = flipped(kernel, groups)
        return _fast(*_even(y, turned, groups), _Geometry(around, base, strides, dilation, groups))

    def gradient_of_kernel(y: Array) -> Array:
        around = tuple((starts[i], reach[i] + beyond[i]) for i in axes)
        features = x.reshape(*x.shape[:-1], groups, -1)
        features = features.transpose(features.ndim - 1, *range(1, features.ndim - 1), 0)
        features = lax.optimization_barrier(features.reshape(*features.shape[:-2], -1))
        windows = lax.optimization_barrier(y.transpose(images_last))
        pair = _even(features, windows, groups)
        products = _fast(*pair, _Geometry(around, dilation, base, strides, groups))
        return lax.optimization_barrier(products).transpose(images_last)

    directions = zip((gradient_of_x, gradient_of_kernel), tangents, strict=True)
    parts = [
        jax.linear_transpose(gradient, y)(direction)[0]
        for gradient, direction in directions
        if not isinstance(direction, SymbolicZero)
    ]
    return y, functools.reduce(jnp.add, parts)


_correlate.defjvp(_tangent, symbolic_zeros=True)


def flipped(kernel: Array, groups: int) -> Array:
    """The kernel (*taps, n2 / groups, n1) of the adjoint.

    The barrier keeps XLA from folding the flip into the convolution's window.
    """
    *taps, n_in, n2 = kernel.shape
    axes = range(len(taps))
    blocks = lax.rev(kernel, tuple(axes)).reshape(*taps, n_in, groups, n2 // groups)
    turned = blocks.transpose(*axes, blocks.ndim - 1, blocks.ndim - 2, blocks.ndim - 3)
    turned = turned.reshape(*taps, n2 // groups, groups * n_in)
    return lax.optimization_barrier(turned)


def _even(x: Array, kernel: Array, groups: int) -> tuple[Array, Array]:
    """The same with one feature more, of zeros, where their number is odd, which the backend is slow at.

    Not for the convolution itself, which stays the plain layer's to the last bit.
    """
    if groups > 1 or x.shape[-1] == 1 or x.shape[-1] % 2 == 0:
        return x, kernel
    x = jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, 1),))
    return x, jnp.pad(kernel, ((0, 0),) * (kernel.ndim - 2) + ((0, 1), (0, 0)))


def _fast(x: Array, kernel: Array, geometry: _Geometry) -> Array:
    """`_lax` without the cases that XLA's CPU backend is slow at.

    An image smaller than the filter is padded first; and where nothing is left to pad, one row too
    many is computed, from a row of zeros.
    """
    pads, strides, base, dilation, groups = geometry
    nothing = ((0, 0),) * len(pads)
    sizes = zip(x.shape[1:-1], base, kernel.shape[:-2], dilation, strict=True)
    if any(b * (n - 1) < d * (k - 1) for n, b, k, d in sizes):
        around = [(low, high, b - 1) for (low, high), b in zip(pads, base, strict=True)]
        x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *around, (0, 0, 0)])
        x, pads, base = lax.optimization_barrier(x), nothing, (1,) * len(pads)
    rows = None
    if max(kernel.shape[:-2]) > 1 and not any(map(any, pads)):
        pads, rows = ((0, strides[0]), *nothing[1:]), -1
    return _lax(x, kernel, _Geometry(pads, strides, base, dilation, groups))[:, :rows]


def _lax(x: Array, kernel: Array, geometry: _Geometry) -> Array:
    spatial = "DHW"[-len(geometry.pads) :]
    images = f"N{spatial}C"
    return lax.conv_general_dilated(
        x,
        kernel,
        geometry.strides,
        geometry.pads,
        lhs_dilation=geometry.base,
        rhs_dilation=geometry.dilation,
        dimension_numbers=(images, f"{spatial}IO", images),
        feature_group_count=geometry.groups,
    )
