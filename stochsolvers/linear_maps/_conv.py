"""The convolution of a layer."""

import dataclasses
import operator
from collections.abc import Sequence
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from stochsolvers import _checks, _convolution
from stochsolvers._typing import Array, static_field, value_object
from stochsolvers.linear_maps._base import LinearMap

Padding: TypeAlias = Literal["SAME", "VALID", "CIRCULAR"] | Sequence[tuple[int, int]]


@value_object
class Conv(LinearMap):
    r"""Cross-correlation of an image with a bank of filters, Flax's convolution.

        A(x)[p, q, j] = Σ_{a, b, i} kernel[a, b, i, j] x̃[s p + d a, s q + d b, i],

    x̃ the padded input, s the stride and d the kernel dilation. With CIRCULAR padding and unit stride
    this is the t-product with the flipped kernel (Bibi et al. 2019, lemma 1).

    Args:
      kernel: HWIO, shape (kh, kw, n1 / groups, n2).
      spatial_shape: (H, W) of the input.
      strides: window strides.
      padding: "SAME", "VALID", "CIRCULAR", or explicit (low, high) pairs, with `flax`'s meaning.
      kernel_dilation: spacing of the filter taps.
      feature_group_count: number of groups; it divides n1 and n2.

    Raises:
      ValueError: at trace time, for ranks, dtypes, paddings or group counts that do not fit.
    """

    kernel: Array
    spatial_shape: tuple[int, int] = static_field()
    strides: tuple[int, int] = static_field(default=(1, 1), kw_only=True)
    padding: Padding = static_field(default="SAME", kw_only=True)
    kernel_dilation: tuple[int, int] = static_field(default=(1, 1), kw_only=True)
    feature_group_count: int = static_field(default=1, kw_only=True)

    def __post_init__(self):
        _checks.floating("kernel of Conv", self.kernel)
        _checks.rank("kernel of Conv", self.kernel, 4)
        object.__setattr__(self, "kernel", jnp.asarray(self.kernel))
        for name in ("spatial_shape", "strides", "kernel_dilation"):
            object.__setattr__(self, name, _checks.pair_of_counts(name, getattr(self, name)))
        object.__setattr__(self, "padding", _canonical_padding(self.padding))
        groups = _checks.count("feature_group_count", self.feature_group_count)
        if self.out_features % groups:
            _checks.fail("feature_group_count", f"a divisor of n2 = {self.out_features}", groups)
        if min(self.out_shape) < 1:
            _checks.fail("output shape of Conv", "at least one pixel", self.out_shape)

    @property
    def in_features(self) -> int:
        """n1."""
        return self.kernel.shape[2] * self.feature_group_count

    @property
    def out_features(self) -> int:
        """n2."""
        return self.kernel.shape[3]

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Shape (H, W, n1) of one input, without batch axes."""
        return (*self.spatial_shape, self.in_features)

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape (H', W', n2) of one output, without batch axes."""
        sizes = zip(
            self.spatial_shape, self.pads, self.dilated_kernel_shape, self.strides, strict=True
        )
        spatial = tuple((n + lo + hi - k) // s + 1 for n, (lo, hi), k, s in sizes)
        return (*spatial, self.out_features)

    @property
    def dilated_kernel_shape(self) -> tuple[int, int]:
        """(d (kh − 1) + 1, d (kw − 1) + 1), the extent of one filter."""
        (kh, kw), (dh, dw) = self.kernel.shape[:2], self.kernel_dilation
        return dh * (kh - 1) + 1, dw * (kw - 1) + 1

    @property
    def pads(self) -> tuple[tuple[int, int], ...]:
        """(low, high) rows and columns added before the windows slide."""
        if self.padding == "VALID":
            return ((0, 0), (0, 0))
        if self.padding == "CIRCULAR":
            return tuple(((k - 1) // 2, k // 2) for k in self.dilated_kernel_shape)
        if self.padding == "SAME":
            pairs = lax.padtype_to_pads(
                self.spatial_shape, self.dilated_kernel_shape, self.strides, "SAME"
            )
            return tuple((int(low), int(high)) for low, high in pairs)
        return self.padding  # pyright: ignore[reportReturnType]

    def __call__(self, x: Array) -> Array:
        """A(x), shape (..., H, W, n1) to (..., H', W', n2)."""
        _checks.trailing("argument of Conv", x, self.in_shape)
        batch = x.shape[:-3]
        return self._forward(x.reshape(-1, *self.in_shape)).reshape(*batch, *self.out_shape)

    def adjoint(self, z: Array) -> Array:
        """A*(z), the transposed convolution, shape (..., H', W', n2) to (..., H, W, n1)."""
        _checks.trailing("argument of Conv.adjoint", z, self.out_shape)
        z = z.astype(jnp.promote_types(z.dtype, self.kernel.dtype))
        batch = z.shape[:-3]
        return self._transposed(z.reshape(-1, *self.out_shape)).reshape(*batch, *self.in_shape)

    def restrict(self, indices: Array) -> "Conv":
        """A on a subset S of input feature maps, x_S ↦ Σ_{i∈S} A_i x_i.

        A grouped kernel is first written out as its ungrouped equal, since a subset need not take
        the same number of features from every group.

        Args:
          indices: integer array (τ,), may be traced.
        """
        return Conv(
            self.ungrouped_kernel()[:, :, indices, :],
            self.spatial_shape,
            strides=self.strides,
            padding=self.padding,
            kernel_dilation=self.kernel_dilation,
        )

    def absolute(self) -> "Conv":
        """|A|."""
        return dataclasses.replace(self, kernel=jnp.abs(self.kernel))

    def ungrouped_kernel(self) -> Array:
        """The kernel (kh, kw, n1, n2) of the same map with one group: zeros between groups."""
        groups = self.feature_group_count
        if groups == 1:
            return self.kernel
        kh, kw, n_in, n2 = self.kernel.shape
        blocks = self.kernel.reshape(kh, kw, n_in, groups, n2 // groups)
        full = jnp.einsum("hwigj,gk->hwkigj", blocks, jnp.eye(groups, dtype=self.kernel.dtype))
        return full.reshape(kh, kw, groups * n_in, n2)

    def _forward(self, x: Array) -> Array:
        return self._correlate(x, self.kernel, self.pads, strides=self.strides)

    def _transposed(self, z: Array) -> Array:
        """A correlation with the flipped kernel; behind strides, of the kernel's phases."""
        template = jax.ShapeDtypeStruct((z.shape[0], *self.in_shape), z.dtype)
        if self.strides == (1, 1):
            reach = zip(self.pads, self.dilated_kernel_shape, strict=True)
            rows, columns = ((k - 1 - low, k - 1 - high) for (low, high), k in reach)
            kernel = _convolution.flipped(self.kernel, self.feature_group_count)
            return self._correlate(z, kernel, (rows, columns))
        if self.kernel_dilation == (1, 1):
            x = self._on_phases()._transposed(z)
            return jax.linear_transpose(self._phases, template)(x)[0]
        return jax.linear_transpose(self._forward, template)(z)[0]

    def _phases(self, x: Array) -> Array:
        """The padded input in blocks of one stride, (B, rows, columns, groups · sh · sw · n1 / groups)."""
        groups, padded = self.feature_group_count, []
        if self.padding == "CIRCULAR":
            x = jnp.pad(x, ((0, 0), *self.pads, (0, 0)), mode="wrap")
        sizes = zip(x.shape[1:3], self.pads, self._phase_counts, self.strides, strict=True)
        for size, (low, _), (count, _), stride in sizes:
            low = 0 if self.padding == "CIRCULAR" else low
            padded.append((low, count * stride - size - low, 0))
        x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *padded, (0, 0, 0)])
        (rows, _), (columns, _), (sh, sw) = *self._phase_counts, self.strides
        x = x.reshape(-1, rows, sh, columns, sw, groups, self.kernel.shape[2])
        return x.transpose(0, 1, 3, 5, 2, 4, 6).reshape(
            -1, rows, columns, sh * sw * self.in_features
        )

    def _on_phases(self) -> "Conv":
        """The map of unit stride from `_phases` to the outputs."""
        (rows, kh), (columns, kw), (sh, sw) = *self._phase_counts, self.strides
        full = [(0, kh * sh - self.kernel.shape[0]), (0, kw * sw - self.kernel.shape[1])]
        kernel = jnp.pad(self.kernel, [*full, (0, 0), (0, 0)])
        kernel = kernel.reshape(kh, sh, kw, sw, *self.kernel.shape[2:]).transpose(0, 2, 1, 3, 4, 5)
        return Conv(
            kernel.reshape(kh, kw, -1, self.out_features),
            (rows, columns),
            padding="VALID",
            feature_group_count=self.feature_group_count,
        )

    @property
    def _phase_counts(self) -> tuple[tuple[int, int], ...]:
        """Blocks of one stride that the input fills, and that a filter fills, for each axis."""
        taps = (-(-k // s) for k, s in zip(self.kernel.shape[:2], self.strides, strict=True))
        return tuple((n + k - 1, k) for n, k in zip(self.out_shape[:2], taps, strict=True))

    def _correlate(
        self, x: Array, kernel: Array, pads: _convolution.Pads, *, strides: tuple[int, int] = (1, 1)
    ) -> Array:
        """Windows of a batch, padded with zeros or, if CIRCULAR, with the opposite border."""
        if self.padding == "CIRCULAR":
            x = jnp.pad(x, ((0, 0), *pads, (0, 0)), mode="wrap")
            pads = ((0, 0), (0, 0))
        return _convolution.correlate(
            x,
            kernel,
            pads,
            strides=strides,
            dilation=self.kernel_dilation,
            groups=self.feature_group_count,
        )


def _canonical_padding(padding: Padding) -> str | tuple[tuple[int, int], ...]:
    """A known name, or ((low, high), (low, high)) as hashable structure."""
    if isinstance(padding, str):
        _checks.member("padding", padding, ("SAME", "VALID", "CIRCULAR"))
        return padding
    try:
        pairs = tuple((operator.index(low), operator.index(high)) for low, high in padding)
    except (TypeError, ValueError):
        pairs = ()
    if len(pairs) != 2 or min(min(pair) for pair in pairs) < 0:
        _checks.fail(
            "padding",
            "'SAME', 'VALID', 'CIRCULAR' or two (low, high) pairs of integers >= 0",
            repr(padding),
        )
    return pairs
