r"""The rows of a convolution as a map of its kernel: patches of the padded input, and their Gram matrix.

    A(x)[p, j] = Σ_{a, i} kernel[a, i, j] x̃[s p + d a, i]

is, for each group of features, a matrix of rows p (and examples) and columns (a, i), times kernel[a, i, j].
"""

import itertools
import math

import jax.numpy as jnp
from jax import lax

from stochsolvers._typing import Array
from stochsolvers.linear_maps import Conv


def patches(A: Conv, x: Array) -> Array:
    """The rows, shape (groups, B · positions, taps · n1 / groups), of inputs (B, *spatial, n1)."""
    x = _padded(A, x)
    return _grouped(A, _windows(A, x, first=0), axis=0)


def patch_gram(A: Conv, x: Array, *, bias: bool) -> Array:
    r"""AᵀA of the rows, shape (groups, m, m) with m = taps · n1 / groups, and one more for a bias.

    With v[q] the patches along all spatial axes but the first, of row q of x̃, the block of two taps a and
    a + δ along the first axis is Σ_p S_δ[s p + d a] with S_δ[q] = v[q]ᵀ v[q + d δ], a product over examples
    and the positions along the other axes. So one S_δ serves all pairs of taps at the distance δ.
    """
    taps, (size, *_), step, spacing = _first_axis(A)
    x = jnp.moveaxis(_padded(A, x), 1, 0)  # (rows, B, *others, n1)
    v = jnp.moveaxis(_grouped(A, _windows(A, x, first=1), axis=1), 1, 0)
    v = v[:, 0] if A.feature_group_count == 1 else v  # (rows, groups, B · positions, columns)

    def products(row: Array) -> Array:
        """S_δ[q] for all δ. One row at a time: XLA's CPU backend is slow at batches of products."""
        others = (lax.dynamic_index_in_dim(v, row + spacing * k, 0, False) for k in range(taps))
        left = lax.dynamic_index_in_dim(v, row, 0, False).mT
        return jnp.stack(
            [jnp.matmul(left, right, precision=lax.Precision.HIGHEST) for right in others]
        )

    def summed(rows: Array, tap: int) -> Array:
        """The sum over the rows s p + d a of a tap."""
        start = spacing * tap
        return jnp.sum(lax.slice_in_dim(rows, start, start + step * (size - 1) + 1, step), 0)

    pairs = lax.map(products, jnp.arange(len(v)))  # (rows, taps, groups, columns, columns)
    sums = [summed(pairs[:, : taps - a], a) for a in range(taps)]
    blocks = [
        [sums[a][b - a] if b >= a else sums[b][a - b].mT for b in range(taps)] for a in range(taps)
    ]
    gram = jnp.concatenate([jnp.concatenate(row, -1) for row in blocks], -2)
    if bias:
        ones = jnp.sum(v, -2)
        ones = jnp.concatenate([summed(ones, a) for a in range(taps)], -1)[..., None, :]
        count = jnp.full((*ones.shape[:-1], 1), size * v.shape[-2], gram.dtype)
        right = jnp.concatenate([ones, count], -1).mT
        gram = jnp.concatenate([jnp.concatenate([gram, ones], -2), right], -1)
    return gram if gram.ndim == 3 else gram[None]


def gram_count(A: Conv, examples: int) -> int:
    """Multiplications of `patch_gram` for one group."""
    taps, (size, *others), step, spacing = _first_axis(A)
    rows = step * (size - 1) + spacing * (taps - 1) + 1
    columns = math.prod(A.kernel.shape[1:-1])
    return rows * taps * examples * math.prod(others) * columns**2


def columns_of(A: Conv, kernel: Array) -> Array:
    """A kernel (*taps, n1 / groups, n2) as matrices (groups, taps · n1 / groups, n2 / groups)."""
    groups = A.feature_group_count
    return jnp.moveaxis(kernel.reshape(-1, groups, kernel.shape[-1] // groups), 1, 0)


def kernel_of(A: Conv, columns: Array) -> Array:
    """The kernel of `columns_of`."""
    return jnp.moveaxis(columns, 0, 1).reshape(A.kernel.shape)


def outputs_of(A: Conv, z: Array) -> Array:
    """Outputs (..., n2) as (groups, rows, n2 / groups)."""
    groups = A.feature_group_count
    return jnp.moveaxis(z.reshape(-1, groups, z.shape[-1] // groups), 1, 0)


def _first_axis(A: Conv) -> tuple[int, tuple[int, ...], int, int]:
    """Taps along the first spatial axis, the output's spatial shape, stride and dilation."""
    return A.kernel.shape[0], A.out_shape[:-1], A.strides[0], A.kernel_dilation[0]


def _padded(A: Conv, x: Array) -> Array:
    """x̃, cut to the pixels that some window reaches."""
    mode = "wrap" if A.padding == "CIRCULAR" else "constant"
    x = jnp.pad(x, ((0, 0), *A.pads, (0, 0)), mode=mode)
    extents = zip(A.out_shape[:-1], A.strides, A.dilated_kernel_shape, strict=True)
    reach = tuple(slice(s * (n - 1) + k) for n, s, k in extents)
    return x[(slice(None), *reach)]


def _windows(A: Conv, x: Array, *, first: int) -> Array:
    """The pixels that each tap along the spatial axes from `first` on meets, stacked before the features.

    The spatial axes are 1, 2, ... of x, where those before `first` keep their pixels.
    """
    axes = range(first, len(A.spatial_shape))
    parts = []
    for taps in itertools.product(*(range(A.kernel.shape[i]) for i in axes)):
        at: list[slice] = [slice(None)] * x.ndim
        for i, tap in zip(axes, taps, strict=True):
            start, step = A.kernel_dilation[i] * tap, A.strides[i]
            at[1 + i] = slice(start, start + step * (A.out_shape[i] - 1) + 1, step)
        parts.append(x[tuple(at)])
    return jnp.stack(parts, -2)


def _grouped(A: Conv, windows: Array, *, axis: int) -> Array:
    """(*kept, ..., taps, n1) as (groups, *kept, rows, taps · n1 / groups); the first `axis` axes are kept."""
    *_, taps, features = windows.shape
    groups = A.feature_group_count
    parts = windows.reshape(*windows.shape[:-1], groups, features // groups)
    parts = jnp.moveaxis(parts, -2, 0)
    return parts.reshape(groups, *windows.shape[:axis], -1, taps * features // groups)
