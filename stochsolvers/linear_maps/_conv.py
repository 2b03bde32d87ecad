"""The convolution of a layer."""

import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from stochsolvers import _checks, _convolution
from stochsolvers._shards import automatic, batch_spec, is_explicit
from stochsolvers._typing import Array, Scalar, static_field, value_object
from stochsolvers.linear_maps._base import LinearMap, with_kernel_scaled

Padding: TypeAlias = (
    Literal["SAME", "VALID", "CIRCULAR", "CAUSAL"] | int | Sequence[tuple[int, int]]
)
_EACH: Any = 1  # for each axis


@value_object
class Conv(LinearMap):
    r"""Cross-correlation of an image with a bank of filters, Flax's convolution, on one to three axes.

        A(x)[p, j] = Σ_{a, i} kernel[a, i, j] x̃[s p + d a, i],

    x̃ the padded input, s the stride and d the kernel dilation; the position p and the tap a have one index
    for each spatial axis. With CIRCULAR padding and unit stride on two axes this is the t-product with the
    flipped kernel (Bibi et al. 2019, lemma 1).

    Args:
      kernel: shape (*taps, n1 / groups, n2), one number of taps k for each spatial axis.
      spatial_shape: of the input, (W,), (H, W) or (D, H, W). An integer stands for all axes, as it does
        in `strides` and `kernel_dilation`.
      strides: window strides.
      padding: "SAME", "VALID", "CIRCULAR", on one axis "CAUSAL" (d (k − 1) zeros before the input), one
        integer for all sides, or explicit (low, high) pairs, with `flax`'s meaning.
      kernel_dilation: spacing of the filter taps.
      feature_group_count: number of groups; it divides n1 and n2.
      circular_low: under CIRCULAR, how many pixels of the opposite border come before the image on each
        axis, in 0 .. d (k − 1); by default ⌊d (k − 1) / 2⌋, as in `flax`. Another choice shifts the output.

    Raises:
      ValueError: at trace time, for ranks, dtypes, paddings or group counts that do not fit.
    """

    kernel: Array
    spatial_shape: tuple[int, ...] = static_field()
    strides: tuple[int, ...] = static_field(default=_EACH, kw_only=True)
    padding: Padding = static_field(default="SAME", kw_only=True)
    kernel_dilation: tuple[int, ...] = static_field(default=_EACH, kw_only=True)
    feature_group_count: int = static_field(default=1, kw_only=True)
    circular_low: tuple[int, ...] | None = static_field(default=None, kw_only=True)

    def __post_init__(self):
        _checks.floating("kernel of Conv", self.kernel)
        object.__setattr__(self, "kernel", jnp.asarray(self.kernel))
        object.__setattr__(self, "spatial_shape", self._checked_shape())
        axes = len(self.spatial_shape)
        for name in ("strides", "kernel_dilation"):
            object.__setattr__(self, name, _checks.counts(name, getattr(self, name), axes))
        object.__setattr__(self, "padding", _canonical_padding(self.padding, axes))
        if self.circular_low is not None:
            object.__setattr__(self, "circular_low", self._checked_low(self.circular_low))
        groups = _checks.count("feature_group_count", self.feature_group_count)
        if self.out_features % groups:
            _checks.fail("feature_group_count", f"a divisor of n2 = {self.out_features}", groups)
        if min(self.out_shape) < 1:
            _checks.fail("output shape of Conv", "at least one pixel", self.out_shape)

    def _checked_shape(self) -> tuple[int, ...]:
        """`spatial_shape` as a tuple; the kernel has two axes more."""
        shape = self.spatial_shape
        if not isinstance(shape, int | np.integer | tuple | list):
            _checks.fail("spatial_shape", "one to three integers", _checks.named(shape))
        axes = self.kernel.ndim - 2 if isinstance(shape, int | np.integer) else len(shape)
        if not 1 <= axes <= 3:
            _checks.fail("spatial_shape", "one to three spatial axes", shape)
        if self.kernel.ndim != axes + 2:
            expected = f"{axes + 2} axes for spatial_shape {shape}"
            _checks.fail("shape of kernel of Conv", expected, self.kernel.shape)
        return _checks.counts("spatial_shape", shape, axes)

    def _checked_low(self, low: tuple[int, ...] | int) -> tuple[int, ...]:
        if self.padding != "CIRCULAR":
            _checks.fail("padding of Conv with circular_low", "'CIRCULAR'", repr(self.padding))
        axes = len(self.spatial_shape)
        if not isinstance(low, int | np.integer | tuple | list):
            _checks.fail("circular_low", f"{axes} integers", _checks.named(low))
        low = (low,) * axes if isinstance(low, int | np.integer) else tuple(low)
        if len(low) != axes:
            _checks.fail("circular_low", f"{axes} integers", low)
        extents = zip(low, self.dilated_kernel_shape, strict=True)
        return tuple(_checks.count("circular_low", n, minimum=0, maximum=k - 1) for n, k in extents)

    @property
    def in_features(self) -> int:
        """n1."""
        return self.kernel.shape[-2] * self.feature_group_count

    @property
    def out_features(self) -> int:
        """n2."""
        return self.kernel.shape[-1]

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Shape (*spatial_shape, n1) of one input, without batch axes."""
        return (*self.spatial_shape, self.in_features)

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape (*spatial, n2) of one output, without batch axes."""
        sizes = zip(
            self.spatial_shape, self.pads, self.dilated_kernel_shape, self.strides, strict=True
        )
        spatial = tuple((n + lo + hi - k) // s + 1 for n, (lo, hi), k, s in sizes)
        return (*spatial, self.out_features)

    @property
    def dilated_kernel_shape(self) -> tuple[int, ...]:
        """d (k − 1) + 1 for each spatial axis, the extent of one filter."""
        taps = zip(self.kernel.shape[:-2], self.kernel_dilation, strict=True)
        return tuple(d * (k - 1) + 1 for k, d in taps)

    @property
    def pads(self) -> tuple[tuple[int, int], ...]:
        """(low, high) pixels added to each spatial axis before the windows slide."""
        extents = self.dilated_kernel_shape
        if self.padding == "VALID":
            return ((0, 0),) * len(extents)
        if self.padding == "CAUSAL":
            return tuple((k - 1, 0) for k in extents)
        if self.padding == "CIRCULAR":
            lows = self.circular_low or tuple((k - 1) // 2 for k in extents)
            return tuple((low, k - 1 - low) for low, k in zip(lows, extents, strict=True))
        if self.padding == "SAME":
            pairs = lax.padtype_to_pads(self.spatial_shape, extents, self.strides, "SAME")
            return tuple((int(low), int(high)) for low, high in pairs)
        return self.padding  # pyright: ignore[reportReturnType]

    def __call__(self, x: Array) -> Array:
        """A(x), shape (..., *in_shape) to (..., *out_shape)."""
        _checks.trailing("argument of Conv", x, self.in_shape)
        batch = x.shape[: x.ndim - len(self.in_shape)]
        return self._forward(x.reshape(-1, *self.in_shape)).reshape(*batch, *self.out_shape)

    def adjoint(self, z: Array) -> Array:
        """A*(z), the transposed convolution, shape (..., *out_shape) to (..., *in_shape)."""
        _checks.trailing("argument of Conv.adjoint", z, self.out_shape)
        z = z.astype(jnp.promote_types(z.dtype, self.kernel.dtype))
        batch = z.shape[: z.ndim - len(self.out_shape)]
        flat = z.reshape(-1, *self.out_shape)
        spec = batch_spec(flat, 1) if is_explicit() else None
        x = automatic(lambda A, z: A._transposed(z), spec, self, flat)
        return x.reshape(*batch, *self.in_shape)

    def restrict(self, indices: Array) -> "Conv":
        """A on a subset S of input feature maps, x_S ↦ Σ_{i∈S} A_i x_i.

        A grouped kernel is first written out as its ungrouped equal, since a subset need not take
        the same number of features from every group.

        Args:
          indices: integer array (τ,), may be traced.
        """
        kernel = self.ungrouped_kernel()[..., indices, :]
        return dataclasses.replace(self, kernel=kernel, feature_group_count=1)

    def restrict_outputs(self, indices: Array) -> "Conv":
        """x ↦ A(x)_S for a subset S of output feature maps; grouped kernels as in `restrict`.

        Args:
          indices: integer array (τ,), may be traced.
        """
        kernel = self.ungrouped_kernel()[..., indices]
        return dataclasses.replace(self, kernel=kernel, feature_group_count=1)

    def scaled(self, factor: Scalar) -> "Conv":
        """The map with the kernel c W."""
        return with_kernel_scaled(self, factor)

    def absolute(self) -> "Conv":
        """|A|, or a map above it where the taps of a CIRCULAR filter larger than the image meet."""
        return dataclasses.replace(self, kernel=jnp.abs(self.kernel))

    def ungrouped_kernel(self) -> Array:
        """The kernel (*taps, n1, n2) of the same map with one group: zeros between groups."""
        groups = self.feature_group_count
        if groups == 1:
            return self.kernel
        *taps, n_in, n2 = self.kernel.shape
        blocks = self.kernel.reshape(*taps, n_in, groups, n2 // groups)
        full = jnp.einsum("...igj,gk->...kigj", blocks, jnp.eye(groups, dtype=self.kernel.dtype))
        return full.reshape(*taps, groups * n_in, n2)

    def _forward(self, x: Array) -> Array:
        return self._correlate(x, self.kernel, self.pads, strides=self.strides)

    def _transposed(self, z: Array) -> Array:
        """A correlation with the flipped kernel; behind strides, of the kernel's phases."""
        template = jax.ShapeDtypeStruct((z.shape[0], *self.in_shape), z.dtype)
        if max(self.strides) == 1:
            reach = zip(self.pads, self.dilated_kernel_shape, strict=True)
            pads = tuple((k - 1 - low, k - 1 - high) for (low, high), k in reach)
            kernel = _convolution.flipped(self.kernel, self.feature_group_count)
            return self._correlate(z, kernel, pads)
        if max(self.kernel_dilation) == 1:
            x = self._on_phases()._transposed(z)
            return jax.linear_transpose(self._phases, template)(x)[0]
        return jax.linear_transpose(self._forward, template)(z)[0]

    def _phases(self, x: Array) -> Array:
        """The padded input in blocks of one stride, (B, *blocks, groups · Π strides · n1 / groups)."""
        groups, padded = self.feature_group_count, []
        if self.padding == "CIRCULAR":
            x = jnp.pad(x, ((0, 0), *self.pads, (0, 0)), mode="wrap")
        sizes = zip(x.shape[1:-1], self.pads, self._phase_counts, self.strides, strict=True)
        for size, (low, _), (count, _), stride in sizes:
            low = 0 if self.padding == "CIRCULAR" else low
            padded.append((low, count * stride - size - low, 0))
        x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *padded, (0, 0, 0)])
        counts = [count for count, _ in self._phase_counts]
        pairs = zip(counts, self.strides, strict=True)
        x = x.reshape(-1, *(n for pair in pairs for n in pair), groups, self.kernel.shape[-2])
        within = range(2, x.ndim - 2, 2)  # the axes of the strides
        x = x.transpose(0, *range(1, x.ndim - 2, 2), x.ndim - 2, *within, x.ndim - 1)
        return x.reshape(-1, *counts, math.prod(self.strides) * self.in_features)

    def _on_phases(self) -> "Conv":
        """The map of unit stride from `_phases` to the outputs."""
        *taps, n_in, n2 = self.kernel.shape
        blocks = [k for _, k in self._phase_counts]
        sizes = list(zip(blocks, self.strides, taps, strict=True))
        kernel = jnp.pad(self.kernel, [*((0, k * s - t) for k, s, t in sizes), (0, 0), (0, 0)])
        kernel = kernel.reshape(*(n for k, s, _ in sizes for n in (k, s)), n_in, n2)
        spatial = range(kernel.ndim - 2)
        kernel = kernel.transpose(*spatial[::2], *spatial[1::2], kernel.ndim - 2, kernel.ndim - 1)
        return Conv(
            kernel.reshape(*blocks, -1, n2),
            tuple(count for count, _ in self._phase_counts),
            padding="VALID",
            feature_group_count=self.feature_group_count,
        )

    @property
    def _phase_counts(self) -> tuple[tuple[int, int], ...]:
        """Blocks of one stride that the input fills, and that a filter fills, for each axis."""
        taps = (-(-k // s) for k, s in zip(self.kernel.shape[:-2], self.strides, strict=True))
        return tuple((n + k - 1, k) for n, k in zip(self.out_shape[:-1], taps, strict=True))

    def _correlate(
        self,
        x: Array,
        kernel: Array,
        pads: _convolution.Pads,
        *,
        strides: tuple[int, ...] | None = None,
    ) -> Array:
        """Windows of a batch, padded with zeros or, if CIRCULAR, with the opposite border."""
        if self.padding == "CIRCULAR":
            x = jnp.pad(x, ((0, 0), *pads, (0, 0)), mode="wrap")
            pads = ((0, 0),) * len(pads)
        return _convolution.correlate(
            x,
            kernel,
            pads,
            strides=strides,
            dilation=self.kernel_dilation,
            groups=self.feature_group_count,
        )


def _canonical_padding(padding: Padding, axes: int) -> str | tuple[tuple[int, int], ...]:
    """A known name, or a (low, high) pair for each axis as hashable structure."""
    if isinstance(padding, str):
        names = ("SAME", "VALID", "CIRCULAR", "CAUSAL")
        _checks.member("padding", padding, names if axes == 1 else names[:3])
        return padding
    if isinstance(padding, int | np.integer):
        padding = ((int(padding), int(padding)),) * axes
    try:
        pairs = tuple((operator.index(low), operator.index(high)) for low, high in padding)
    except (TypeError, ValueError):
        pairs = ()
    if len(pairs) != axes or min(min(pair) for pair in pairs) < 0:
        count = ("one (low, high) pair", "two (low, high) pairs", "three (low, high) pairs")
        _checks.fail(
            "padding",
            f"'SAME', 'VALID', 'CIRCULAR' or {count[axes - 1]} of integers >= 0",
            repr(padding),
        )
    return pairs
