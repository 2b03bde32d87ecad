"""The transposed convolution of a layer."""

import operator
from typing import Any, Literal, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import lax

from stochsolvers import _checks
from stochsolvers._typing import Array
from stochsolvers.linear_maps._base import LinearMap
from stochsolvers.linear_maps._conv import Conv

TransposePadding: TypeAlias = Literal["SAME", "VALID", "CIRCULAR"] | Any


def conv_transpose(
    kernel: Array,
    spatial_shape: tuple[int, ...] | int,
    *,
    strides: tuple[int, ...] | int = 1,
    padding: TransposePadding = "SAME",
    kernel_dilation: tuple[int, ...] | int = 1,
    transpose_kernel: bool = False,
) -> LinearMap:
    r"""Flax's transposed convolution (`ConvTranspose`) as a map, `Conv(...).T` of one with the same pads.

        A(x)[p, j] = Σ_{a, i} kernel[a, i, j] x̃[p + d a, i],

    x̃ the input with s − 1 zeros between its pixels and (low, high) zeros around them. With K = d (k − 1) + 1
    it is the adjoint of the convolution with the flipped kernel, stride s and K − 1 − low zeros before the
    image. Its outputs have s n pixels ("SAME", "CIRCULAR") or s (n − 1) + max(K, s) ("VALID").

    Args:
      kernel: shape (*taps, n1, n2), or (*taps, n2, n1) with `transpose_kernel`.
      spatial_shape: of the input, with one to three axes. An integer stands for all axes, here and below.
      strides: s, how many output pixels apart the input's pixels are.
      padding: "SAME", "VALID", "CIRCULAR", one integer, or integers or (low, high) pairs for each axis.
      kernel_dilation: d, spacing of the filter taps.
      transpose_kernel: the kernel is that of the convolution of which this is the adjoint, neither flipped
        nor with its features swapped.

    Raises:
      ValueError: at trace time, for structure that does not fit, and for explicit padding beyond the
        filter's reach (low > K − 1 or high > K − 1 + s − 1), where outputs would always be zero.
    """
    _checks.floating("kernel of conv_transpose", kernel)
    kernel = jnp.asarray(kernel)
    axes = kernel.ndim - 2
    if not 1 <= axes <= 3:
        _checks.fail("shape of kernel of conv_transpose", "3 to 5 axes", kernel.shape)
    sizes = _checks.counts("spatial_shape", spatial_shape, axes)
    strides = _checks.counts("strides", strides, axes)
    dilation = _checks.counts("kernel_dilation", kernel_dilation, axes)
    extents = [d * (k - 1) + 1 for k, d in zip(kernel.shape, dilation, strict=False)]
    geometry = list(zip(sizes, strides, extents, strict=True))
    if not transpose_kernel:
        kernel = lax.rev(kernel, tuple(range(axes))).swapaxes(-1, -2)
    options: dict[str, Any] = {"padding": padding}
    if not isinstance(padding, str):
        pads = _pairs(padding, axes)
        shape, options["padding"] = _explicit(geometry, pads)
    elif padding == "VALID":
        shape = tuple(s * (n - 1) + max(k, s) for n, s, k in geometry)
    else:
        _checks.member("padding", padding, ("SAME", "VALID", "CIRCULAR"))
        shape = tuple(s * n for n, s, _ in geometry)
    if padding == "CIRCULAR":
        # where Flax's layer puts the first tap of an even filter, and of one behind strides
        beyond = [max(k - s, 0) for _, s, k in geometry]
        options["circular_low"] = tuple(
            (n + 1) // 2 if transpose_kernel else n // 2 for n in beyond
        )
    return Conv(kernel, shape, strides=strides, kernel_dilation=dilation, **options).T


def _pairs(padding: Any, axes: int) -> list[tuple[int, int]]:
    """(low, high) of each axis; an integer stands for both sides, or for all."""
    each = (padding,) * axes if isinstance(padding, int | np.integer) else padding
    try:
        pairs = [(p, p) if isinstance(p, int | np.integer) else tuple(p) for p in each]
        pairs = [(operator.index(low), operator.index(high)) for low, high in pairs]
    except (TypeError, ValueError):
        pairs = []
    if len(pairs) != axes:
        expected = "'SAME', 'VALID', 'CIRCULAR', an integer, or an integer or a pair for each axis"
        _checks.fail("padding of conv_transpose", expected, repr(padding))
    return pairs


def _explicit(
    geometry: list[tuple[int, int, int]], pads: list[tuple[int, int]]
) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
    """Shape and padding of the convolution whose adjoint has these pads."""
    shape, padding = [], []
    for (n, s, k), (low, high) in zip(geometry, pads, strict=True):
        if low > k - 1 or high > k + s - 2:
            expected = f"low <= {k - 1} and high <= {k + s - 2}"
            _checks.fail("padding of conv_transpose", expected, (low, high))
        shape.append(s * (n - 1) + low + high + 2 - k)
        padding.append((k - 1 - low, max(k - 1 - high, 0)))
    if min(shape) < 1:
        _checks.fail("output shape of conv_transpose", "at least one pixel", tuple(shape))
    return tuple(shape), padding
