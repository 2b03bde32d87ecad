r"""Convolutions of few channels or few pixels as one matrix product, and pooling by reshaping, for CPUs.

XLA's CPU backend is slow at convolutions from few channels, at images smaller than the kernel, at the
derivatives of both, and at the derivative of a maximum over windows. On other backends, and for one image
alone, as reports see a network, the functions here are the layer itself and Flax's pooling.

Outputs are computed in blocks of r × q pixels. All outputs of a block see the same window of the image, of
(r − 1) s + k rows, s the stride and k the taps, so that with the kernel written out for each pixel (u, v)
of a block

    y[p r + u, j] = Σ_{a, i} kernel[a, i, j] x̃[(p r + u) s + a, i] = Σ_{c, i} K[c, i, u, j] x̃[p r s + c, i],
    K[c, i, u, j] = kernel[c − u s, i, j],

and likewise along the columns: a product of gathered windows and K. Larger blocks gather less and multiply
by more zeros. A block of the whole image gathers nothing.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

Pair = tuple[int, int]


def pooled(layer: nnx.Conv, x: jax.Array, *, block: Pair) -> jax.Array:
    """The maximum over 2×2 pixels of `layer(x)`, for a layer of unit stride and VALID padding.

    Args:
      layer: the convolution.
      x: images (batch, height, width, channels); a last row or column without a partner is left out.
      block: r and q, even numbers; 2 where they do not divide the number of rows or columns.
    """
    if _is_plain(x):
        return nnx.max_pool(layer(x), (2, 2), (2, 2))
    kernel, bias, x = _cast(layer, x)
    rows, columns = (n - k + 1 for n, k in zip(x.shape[1:3], kernel.shape, strict=False))
    counts = rows // 2 * 2, columns // 2 * 2
    r, q = (size if n % size == 0 else 2 for n, size in zip(counts, block, strict=True))
    y = in_blocks(x, kernel, counts=(counts[0] // r, counts[1] // q), block=(r, q))
    return merged(max_of_four(y)) + bias


def convolved(layer: nnx.Conv, x: jax.Array) -> jax.Array:
    """`layer(x)`, as a product with the whole image where that has no more pixels than the kernel taps.

    The product is for SAME padding, a unit stride and one group; others are left to the layer.
    """
    taps, (height, width) = layer.kernel.shape[:2], x.shape[1:3]
    settings = layer.strides, layer.kernel_dilation, layer.input_dilation, layer.feature_group_count
    usual = layer.padding == "SAME" and all(each in (1, (1, 1)) for each in settings)
    few = height * width <= math.prod(taps)
    if _is_plain(x) or not (usual and few):
        return layer(x)
    kernel, bias, x = _cast(layer, x)
    low = tuple((k - 1) // 2 for k in taps)
    written_out = _written_out(kernel, (height, width), (height, width), low)
    y = x.reshape(len(x), -1) @ written_out.reshape(-1, height * width * kernel.shape[-1])
    return y.reshape(len(x), height, width, -1) + bias


def max_pool(x: jax.Array) -> jax.Array:
    """The maximum over 2×2 pixels; over fewer in the last row and column of an odd grid."""
    batch, height, width, channels = x.shape
    if _is_plain(x) or height % 2 or width % 2:
        return nnx.max_pool(x, (2, 2), (2, 2), padding="SAME")
    x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
    upper, lower = (larger(x[:, :, u, :, 0], x[:, :, u, :, 1]) for u in (0, 1))
    return larger(upper, lower)


def _is_plain(x: jax.Array) -> bool:
    """Whether the layer itself computes: for one image it is as quick, and seen by reports."""
    return jax.default_backend() != "cpu" or len(x) == 1


def _cast(layer: nnx.Conv, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Kernel, bias (0 if there is none) and images in the type that the layer computes in."""
    kernel = layer.kernel[...]
    bias = jnp.zeros(kernel.shape[-1:], kernel.dtype) if layer.bias is None else layer.bias[...]
    dtype = layer.dtype or jnp.result_type(x, kernel, bias)
    return kernel.astype(dtype), bias.reshape(1, 1, 1, -1).astype(dtype), x.astype(dtype)


def in_blocks(x: jax.Array, kernel: jax.Array, *, counts: Pair, block: Pair) -> jax.Array:
    """The first outputs of a correlation without padding, shape (batch, *counts, *block, outputs).

    Args:
      x: images (batch, height, width, channels).
      kernel: (rows, columns, channels, outputs).
      counts: number of blocks along rows and columns.
      block: r and q.
    """
    (h, w), (r, q), channels = counts, block, x.shape[-1]
    # a window reaches into so many blocks of the image
    a, b = (-(-(size + k - 1) // size) for size, k in zip(block, kernel.shape, strict=False))
    missing = (h + a - 1) * r - x.shape[1], (w + b - 1) * q - x.shape[2]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((0, n, 0) for n in missing), (0, 0, 0)])
    x = x.reshape(-1, h + a - 1, r, w + b - 1, q, channels).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(*x.shape[:3], -1)
    windows = [x[:, i : i + h, j : j + w] for i in range(a) for j in range(b)]
    written_out = _written_out(kernel, (a * r, b * q), block)
    blocks = written_out.reshape(a, r, b, q, -1).transpose(0, 2, 1, 3, 4)
    y = jnp.concatenate(windows, axis=-1) @ blocks.reshape(a * b * r * q * channels, -1)
    return y.reshape(-1, h, w, r, q, kernel.shape[-1])


def _written_out(
    kernel: jax.Array, window: Pair, block: Pair, low: tuple[int, ...] = (0, 0)
) -> jax.Array:
    """K, shape (*window, channels, *block, outputs), for a window that begins `low` taps late."""
    zero = jnp.zeros((), kernel.dtype)

    def shifted(*places: int) -> jax.Array:
        sizes = zip(places, window, kernel.shape, low, strict=False)
        pads = [(place - cut, size - k - place + cut, 0) for place, size, k, cut in sizes]
        return lax.pad(kernel, zero, [*pads, (0, 0, 0), (0, 0, 0)])

    rows = [jnp.stack([shifted(u, v) for v in range(block[1])], 3) for u in range(block[0])]
    return jnp.stack(rows, 3)


def max_of_four(y: jax.Array) -> jax.Array:
    """Blocks (..., r, q, outputs) to the maxima over 2×2 pixels, (..., r / 2, q / 2, outputs)."""
    *batch, r, q, outputs = y.shape
    y = y.reshape(*batch, r // 2, 2, q // 2, 2, outputs)
    upper, lower = (larger(y[..., u, :, 0, :], y[..., u, :, 1, :]) for u in (0, 1))
    return larger(upper, lower)


def merged(y: jax.Array) -> jax.Array:
    """Blocks (batch, h, w, r, q, outputs) as images (batch, h r, w q, outputs)."""
    batch, h, w, r, q, outputs = y.shape
    return y.transpose(0, 1, 3, 2, 4, 5).reshape(batch, h * r, w * q, outputs)


@jax.custom_jvp
def larger(first: jax.Array, second: jax.Array) -> jax.Array:
    """max(a, b) with the derivative of a pool: where both are equal, that of the first."""
    return jnp.maximum(first, second)


@larger.defjvp
def _(primals, tangents):
    first, second = primals
    return larger(first, second), jnp.where(first >= second, *tangents)
