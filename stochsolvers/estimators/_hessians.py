"""A A* as an operator: Gram matrix, convolution with the Gram kernel, product of spectra; see `forms`."""

import itertools
import math

import jax
import jax.numpy as jnp
from jax import lax

from stochsolvers._symmetric import symmetric_product
from stochsolvers._typing import Array, static_field, value_object
from stochsolvers.linear_maps import Conv, Dense, LinearMap


def hessian_of(linear_map: LinearMap, form: str) -> "Dense | Conv | Spectrum | Toeplitz":
    """A A* as an operator."""
    if isinstance(linear_map, Dense):
        precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
        return Dense(symmetric_product(linear_map.kernel, precision))
    assert isinstance(linear_map, Conv)
    kernel = gram_kernel(linear_map)
    circular = linear_map.padding == "CIRCULAR"
    if form == "fourier":
        whole = Spectrum.of(kernel, linear_map)
    else:
        extents = [k - 1 for k in linear_map.dilated_kernel_shape]
        whole = Conv(
            kernel,
            linear_map.out_shape[:-1],
            padding="CIRCULAR" if circular else [(e, e) for e in extents],
            kernel_dilation=linear_map.kernel_dilation,
            feature_group_count=linear_map.feature_group_count,
        )
    rims = _rims(linear_map)
    return Toeplitz(whole, rims) if rims else whole


def gram_kernel(conv: Conv) -> Array:
    r"""G[δ; j′, j] = Σ_{a − a′ = δ} Σ_i kernel[a, i, j] kernel[a′, i, j′], δ = −(k − 1) … k − 1.

    Returns:
      Kernel (*(2k − 1), n2 / groups, n2), with the groups and dilation of `conv`.
    """
    *taps, inputs, n2 = conv.kernel.shape
    groups, axes = conv.feature_group_count, len(taps)
    blocks = jnp.moveaxis(conv.kernel.reshape(*taps, inputs, groups, n2 // groups), -2, 0)
    spatial = "DHW"[-axes:]
    images = f"N{spatial}C"

    def one_group(kernel):
        # the filters j' as a batch of images, correlated with the filters j: δ runs backwards
        products = lax.conv_general_dilated(
            jnp.moveaxis(kernel, -1, 0),
            kernel,
            (1,) * axes,
            [(k - 1, k - 1) for k in taps],
            dimension_numbers=(images, f"{spatial}IO", images),
        )
        return jnp.moveaxis(lax.rev(products, tuple(range(1, axes + 1))), 0, -2)

    gram = one_group(blocks[0])[None] if groups == 1 else jax.vmap(one_group)(blocks)
    return jnp.moveaxis(gram, 0, -2).reshape(*(2 * k - 1 for k in taps), n2 // groups, n2)


@value_object
class _Rim:
    """B B*, B the map from a strip of padding to the outputs beside it, as an update of all outputs."""

    strip: Conv
    corner: tuple[int, ...] = static_field()

    def subtract_from(self, image: Array, z: Array) -> Array:
        sizes = zip(self.corner, self.strip.out_shape, strict=False)
        window = (..., *(slice(start, start + n) for start, n in sizes), slice(None))
        return image.at[window].add(-self.strip(self.strip.adjoint(z[window])))


def padding_pixels(conv: Conv) -> int:
    """How many zeros are padded."""
    if conv.padding == "CIRCULAR":
        return 0
    padded = math.prod(n + sum(p) for n, p in zip(conv.spatial_shape, conv.pads, strict=True))
    return padded - math.prod(conv.spatial_shape)


def num_rims(conv: Conv) -> int:
    """How many strips of padding there are."""
    return (
        0 if conv.padding == "CIRCULAR" else sum(width > 0 for pads in conv.pads for width in pads)
    )


def _rims(conv: Conv) -> tuple[_Rim, ...]:
    """The strips of zero padding, two for each spatial axis.

    On an axis, a strip is as long as the padded image on the axes after it, and as the image, padded by the
    layer, on the axes before it, so that every pixel of padding is in one strip.
    """
    if conv.padding == "CIRCULAR":
        return ()
    rims, shape, pads = [], conv.spatial_shape, conv.pads
    padded = tuple(n + sum(p) for n, p in zip(shape, pads, strict=True))
    for axis, side in itertools.product(range(len(shape)), (0, 1)):
        width, reach = pads[axis][side], conv.dilated_kernel_shape[axis] - 1
        if not width:
            continue
        before, after = range(axis), range(axis + 1, len(shape))
        strip = Conv(
            conv.kernel,
            (*(shape[i] for i in before), width, *(padded[i] for i in after)),
            padding=(*pads[:axis], ((0, reach), (reach, 0))[side], *((0, 0) for _ in after)),
            kernel_dilation=conv.kernel_dilation,
            feature_group_count=conv.feature_group_count,
        )
        start = (0, conv.out_shape[axis] - width)[side]
        rims.append(_Rim(strip, (*(0 for _ in before), start, *(0 for _ in after))))
    return tuple(rims)


@value_object
class Toeplitz:
    """A A* under zero padding: the convolution with the Gram kernel less the rims."""

    whole: "Conv | Spectrum"
    rims: tuple[_Rim, ...]

    def __call__(self, z: Array) -> Array:
        image = self.whole(z)
        for rim in self.rims:
            image = rim.subtract_from(image, z)
        return image


@value_object
class Spectrum:
    """Convolution with the Gram kernel on a torus, z ↦ irfft(Ĝ(f) rfft(z)), cropped to z's grid."""

    symbol: Array  # (*torus, groups, n2 / groups, n2 / groups), of the last axis the half spectrum
    torus: tuple[int, ...] = static_field()

    @classmethod
    def of(cls, kernel: Array, conv: Conv) -> "Spectrum":
        """Ĝ(f) = Σ_δ G[δ] exp(2πi f·δ), with integer phases so that no digit is lost."""
        shape = gram_torus(conv)
        *taps, block, n2 = kernel.shape
        symbol, blocks, spatial = kernel.reshape(*taps, block, n2 // block, block), "igj", "abc"
        for axis in reversed(range(len(taps))):
            half = shape[axis] // 2 + 1 if axis == len(taps) - 1 else shape[axis]
            phases = _phases(
                shape[axis], half, conv.kernel_dilation[axis], taps[axis], kernel.dtype
            )
            old = spatial[: len(taps)]
            new = old.replace(old[axis], "f")
            equation = f"f{old[axis]},{old}{blocks}->{new}gij"
            symbol, blocks = jnp.einsum(equation, phases, symbol.astype(phases.dtype)), "gij"
        return cls(symbol, shape)

    def __call__(self, z: Array) -> Array:
        groups, block = self.symbol.shape[-3:-1]
        axes = tuple(range(1, len(self.torus) + 1))
        flat = z.reshape(-1, *z.shape[-1 - len(axes) :])
        spectrum = jnp.fft.rfftn(flat, s=self.torus, axes=axes)
        spectrum = spectrum.reshape(*spectrum.shape[:-1], groups, block)
        spectrum = jnp.einsum("b...gi,...gij->b...gj", spectrum, self.symbol)
        spectrum = spectrum.reshape(*spectrum.shape[:-2], groups * block)
        image = jnp.fft.irfftn(spectrum, s=self.torus, axes=axes)
        return image[:, *(slice(n) for n in flat.shape[1:-1])].reshape(z.shape)


def _phases(period: int, num_frequencies: int, dilation: int, taps: int, dtype) -> Array:
    """exp(2πi f δ / N) for f = 0 … F − 1 and the centred taps δ, shape (F, taps)."""
    delta = dilation * (jnp.arange(taps) - taps // 2)
    turns = (jnp.arange(num_frequencies)[:, None] * delta[None]) % period
    angle = (2.0 * math.pi / period) * turns.astype(dtype)
    return lax.complex(jnp.cos(angle), jnp.sin(angle))


def gram_torus(conv: Conv) -> tuple[int, ...]:
    """The layer's own grid, or one on which the taps of G do not wrap around: out + k − 1, 5-smooth."""
    if conv.padding == "CIRCULAR":
        return conv.spatial_shape
    sizes = zip(conv.out_shape, conv.dilated_kernel_shape, strict=False)
    return tuple(_five_smooth(n + k - 1) for n, k in sizes)


def _five_smooth(n: int) -> int:
    """The smallest 2^a 3^b 5^c that is at least n."""
    while True:
        rest = n
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return n
        n += 1
