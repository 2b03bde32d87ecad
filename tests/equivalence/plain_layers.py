"""Plain Flax layers as oracles: their forward pass, and the dense matrix it makes of the identity.

Nothing here imports the library.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The structure of one convolution, in Flax's words; an integer stands for all axes."""

    spatial_shape: tuple[int, ...]
    kernel_size: tuple[int, ...]
    in_features: int
    out_features: int
    padding: str | tuple[tuple[int, int], ...] = "SAME"
    strides: tuple[int, ...] | int = 1
    dilation: tuple[int, ...] | int = 1
    groups: int = 1

    def __post_init__(self):
        for name in ("strides", "dilation"):
            each = np.broadcast_to(getattr(self, name), len(self.spatial_shape))
            object.__setattr__(self, name, tuple(each.tolist()))

    @property
    def in_shape(self):
        return (*self.spatial_shape, self.in_features)

    @property
    def options(self):
        return {
            "strides": self.strides,
            "padding": self.padding,
            "kernel_dilation": self.dilation,
            "feature_group_count": self.groups,
        }

    def kernel(self, rng):
        shape = (*self.kernel_size, self.in_features // self.groups, self.out_features)
        return rng.normal(size=shape)


@functools.cache
def forward(geometry):
    """(kernel, x) -> `nn.Conv` without a bias, any batch shape; compiled once for each shape."""
    layer = nn.Conv(
        geometry.out_features,
        geometry.kernel_size,
        use_bias=False,
        param_dtype=jnp.float64,
        **geometry.options,
    )
    return jax.jit(lambda kernel, x: layer.apply({"params": {"kernel": kernel}}, x))


@functools.cache
def transposed(geometry):
    """(kernel, x, z) -> the transpose of `nn.Conv` at z, by differentiation; x only for its shape."""
    apply = forward(geometry)
    return jax.jit(lambda kernel, x, z: jax.vjp(lambda x: apply(kernel, x), x)[1](z)[0])


def dense_matrix(geometry, kernel):
    """The matrix (outputs, inputs) of `nn.Conv`: the images of the unit vectors, flattened."""
    size = int(np.prod(geometry.in_shape))
    units = np.eye(size).reshape(size, *geometry.in_shape)
    return np.asarray(forward(geometry)(kernel, units)).reshape(size, -1).T
