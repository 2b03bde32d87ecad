"""`nnx.Linear` and `nnx.Conv` whose parameters take an implicit step in reverse mode."""

from typing import Any

import jax
from flax import nnx

from stochsolvers import _checks, _layers, proxprop
from stochsolvers._typing import Array
from stochsolvers.linear_maps import Dense
from stochsolvers.nnx._solver_layer import attribute
from stochsolvers.nnx._twins import twin_of


class ProxPropLinear(nnx.Linear):
    r"""`nnx.Linear` whose kernel and bias get d = (AᵀA + I/τ)⁻¹ Aᵀ G in the place of their gradient.

    A = [x 1] are the inputs of the whole batch and G the cotangent of the outputs; see
    `stochsolvers.proxprop`. Values, parameters and the cotangent of the inputs are those of `nnx.Linear`.

    Args:
      in_features: n1.
      out_features: n2.
      step: `proxprop.Exact(tau)` or `proxprop.ConjugateGradients(tau, num_iters)`. A number τ is structure,
        an array is traced.
      rngs: random streams for initialisation.
      **options: those of `nnx.Linear`.

    Raises:
      ValueError: of the call, for inputs (n1,) without a batch axis, so within `vmap` over examples.

    References:
      Frerix et al. 2018.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        step: proxprop.ImplicitStep = proxprop.Exact(),  # noqa: B008 - a frozen value
        rngs: nnx.Rngs,
        **options: Any,
    ):
        dot_general = options.get("dot_general")
        _layers.refuse(
            "ProxPropLinear",
            dot_general=None if dot_general is jax.lax.dot_general else dot_general,
            preferred_element_type=options.get("preferred_element_type"),
        )
        super().__init__(in_features, out_features, rngs=rngs, **options)
        self.step = attribute(proxprop.checked_step(step))

    @classmethod
    def from_layer(
        cls,
        layer: nnx.Linear,
        *,
        step: proxprop.ImplicitStep = proxprop.Exact(),  # noqa: B008
    ) -> "ProxPropLinear":
        """The twin of a layer; it holds the very same parameter variables.

        Raises:
          ValueError: for what is no `nnx.Linear`, or a subclass with a call of its own, which would be lost.
        """
        return twin_of(layer, nnx.Linear, cls, cls, step=step, rngs=nnx.Rngs(0))

    def __call__(self, inputs: Array, out_sharding: None = None) -> Array:
        """x W + b, shape (*batch, n1) to (*batch, n2), at least one batch axis."""
        _layers.refuse("ProxPropLinear", out_sharding=out_sharding)
        inputs, kernel, bias = _promoted(self, inputs)
        with _layers.precision_context(self.precision):
            return proxprop.apply(Dense(kernel), inputs, bias, self.step)


class ProxPropConv(nnx.Conv):
    r"""`nnx.Conv` whose kernel and bias get the implicit step in the place of their gradient.

    As `ProxPropLinear`, with the rows [patch 1] of all positions of all examples: the system of a group of
    features has one Gram matrix of patches for all its output features.

    Args:
      in_features: n1.
      out_features: n2.
      kernel_size: (kh, kw), or one number for each of 1 to 3 spatial axes.
      strides: as in `nnx.Conv`.
      step: as in `ProxPropLinear`.
      rngs: random streams for initialisation.
      **options: those of `nnx.Conv`; `mask` and `input_dilation` are refused.

    Raises:
      ValueError: of the call, for inputs without a batch axis, so within `vmap` over examples.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Any,
        strides: Any = 1,
        *,
        step: proxprop.ImplicitStep = proxprop.Exact(),  # noqa: B008 - a frozen value
        rngs: nnx.Rngs,
        **options: Any,
    ):
        convolve = options.get("conv_general_dilated")
        _layers.refuse(
            "ProxPropConv",
            conv_general_dilated=None if convolve is jax.lax.conv_general_dilated else convolve,
            preferred_element_type=options.get("preferred_element_type"),
        )
        super().__init__(in_features, out_features, kernel_size, strides, rngs=rngs, **options)
        self.step = attribute(proxprop.checked_step(step))

    @classmethod
    def from_layer(
        cls,
        layer: nnx.Conv,
        *,
        step: proxprop.ImplicitStep = proxprop.Exact(),  # noqa: B008
    ) -> "ProxPropConv":
        """The twin of a layer; it holds the very same parameter variables.

        Raises:
          ValueError: for what is no `nnx.Conv`, or a subclass with a call of its own, which would be lost.
        """
        return twin_of(layer, nnx.Conv, cls, cls, step=step, rngs=nnx.Rngs(0))

    def __call__(self, inputs: Array, out_sharding: None = None) -> Array:
        """A x + b, shape (*batch, *spatial, n1) to (*batch, *spatial, n2), at least one batch axis."""
        _layers.refuse("ProxPropConv", out_sharding=out_sharding)
        inputs, kernel, bias = _promoted(self, inputs)
        pixels = inputs.shape[1 - kernel.ndim : -1]
        linear_map = _layers.conv_map(self, kernel, pixels, what="ProxPropConv")
        with _layers.precision_context(self.precision):
            return proxprop.apply(linear_map, inputs, bias, self.step)


def _promoted(layer: Any, inputs: Array) -> Any:
    _checks.activations(f"inputs of {type(layer).__name__}", inputs)
    bias = None if layer.bias is None else layer.bias[...]
    return layer.promote_dtype((inputs, layer.kernel[...], bias), dtype=layer.dtype)
