"""The solver layer of Linen's transposed convolution."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from stochsolvers import _layers
from stochsolvers._typing import Array
from stochsolvers.linear_maps import LinearMap
from stochsolvers.linen._layers import SolverLayer, linear_map_of


class SolverConvTranspose(SolverLayer, nn.ConvTranspose, kw_only=True):
    """`nn.ConvTranspose` and its activation, as a solver; see `stochsolvers.nnx.SolverConvTranspose`.

    Attributes:
      solver, prior, ridge, loss, normalize, output, deterministic, rng_collection, following: as in
        `SolverDense`.
    """

    plain_class = nn.ConvTranspose

    @nn.nowrap
    def output_axis(self) -> int:
        """The kernel's axis of the features of the output."""
        return -2 if self.transpose_kernel else -1

    @nn.compact
    def assembled(self, inputs: Array) -> tuple[LinearMap, Array, Array | None]:
        """A, and x and b in the layer's dtype."""
        _layers.refuse(
            "SolverConvTranspose",
            mask=self.mask,
            preferred_element_type=self.preferred_element_type,
        )
        size = (self.kernel_size,) if isinstance(self.kernel_size, int) else tuple(self.kernel_size)
        _layers.pixels_of(self, inputs, len(size))
        features = (jnp.shape(inputs)[-1], self.features)
        shape = (*size, *(reversed(features) if self.transpose_kernel else features))
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        kernel, bias = self._with_following(kernel, bias)
        promoted: Any = self.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        inputs, kernel, bias = promoted
        return linear_map_of(self, kernel, jnp.shape(inputs)), inputs, bias
