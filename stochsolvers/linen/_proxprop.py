"""`nn.Dense` and `nn.Conv` of Linen whose parameters take an implicit step in reverse mode."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from stochsolvers import _checks, _layers, proxprop
from stochsolvers._typing import Array
from stochsolvers.linear_maps import Dense


class ProxPropDense(nn.Dense, kw_only=True):
    """`nn.Dense` whose parameters take an implicit step; see `stochsolvers.nnx.ProxPropLinear`.

    Attributes:
      step: `proxprop.Exact(tau)` or `proxprop.ConjugateGradients(tau, num_iters)`.
    """

    step: proxprop.ImplicitStep = proxprop.Exact()

    def __post_init__(self) -> None:
        proxprop.checked_step(self.step)
        super().__post_init__()

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        """x W + b, shape (*batch, n1) to (*batch, features), at least one batch axis."""
        _layers.refuse(
            "ProxPropDense", dot_general=self.dot_general, dot_general_cls=self.dot_general_cls
        )
        _checks.activations(f"inputs of {type(self).__name__}", inputs)
        inputs, kernel, bias = _parameters(self, inputs, (jnp.shape(inputs)[-1], self.features))
        with _layers.precision_context(self.precision):
            return proxprop.apply(Dense(kernel), inputs, bias, self.step)


class ProxPropConv(nn.Conv, kw_only=True):
    """`nn.Conv` whose parameters take an implicit step; see `stochsolvers.nnx.ProxPropConv`.

    Attributes:
      step: `proxprop.Exact(tau)` or `proxprop.ConjugateGradients(tau, num_iters)`.
    """

    step: proxprop.ImplicitStep = proxprop.Exact()

    def __post_init__(self) -> None:
        proxprop.checked_step(self.step)
        super().__post_init__()

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        """The convolution, shape (*batch, *spatial, n1) to (*batch, *spatial, features)."""
        _layers.refuse(
            "ProxPropConv",
            conv_general_dilated=self.conv_general_dilated,
            conv_general_dilated_cls=self.conv_general_dilated_cls,
        )
        _checks.activations(f"inputs of {type(self).__name__}", inputs)
        size = (self.kernel_size,) if isinstance(self.kernel_size, int) else tuple(self.kernel_size)
        shape = (*size, jnp.shape(inputs)[-1] // self.feature_group_count, self.features)
        inputs, kernel, bias = _parameters(self, inputs, shape)
        pixels = jnp.shape(inputs)[1 - kernel.ndim : -1]
        linear_map = _layers.conv_map(self, kernel, pixels, what="ProxPropConv")
        with _layers.precision_context(self.precision):
            return proxprop.apply(linear_map, inputs, bias, self.step)


def _parameters(layer: Any, inputs: Array, shape: tuple[int, ...]) -> Any:
    """Inputs, kernel and bias in the layer's dtype, the parameters being the plain layer's."""
    kernel = layer.param("kernel", layer.kernel_init, shape, layer.param_dtype)
    bias = None
    if layer.use_bias:
        bias = layer.param("bias", layer.bias_init, (layer.features,), layer.param_dtype)
    return layer.promote_dtype(inputs, kernel, bias, dtype=layer.dtype)
