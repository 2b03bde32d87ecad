"""The dropout layers that one solver iteration is, as modules; see `stochsolvers.dropout`."""

from typing import Any

from flax import nnx

from stochsolvers import _checks, _layers, dropout
from stochsolvers._typing import Array
from stochsolvers.estimators import ImportanceScore
from stochsolvers.linear_maps import Conv, Dense, LinearMap, dense_general
from stochsolvers.nnx._stochastic import Stochastic


class TauNiceDropout(Stochastic):
    """Dropout that keeps exactly τ features, (n/τ) m ⊙ x (Bibi et al. 2019, proposition 1).

    Args:
      tau: features to keep: a count (int) or a fraction (float), so τ = 1.0 − p.
      spatial_ndim: 2 to drop whole feature maps.
      deterministic: pass inputs through; flipped by `train()` and `eval()`.
      rng_collection: name of the random stream.
      rngs: random streams.
    """

    def __init__(
        self,
        tau: int | float,
        *,
        spatial_ndim: int = 0,
        deterministic: bool = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ):
        self.tau, self.spatial_ndim = tau, spatial_ndim
        self.init_stochastic(deterministic, rng_collection, rngs)

    def __call__(
        self, inputs: Array, *, deterministic: bool | None = None, rngs: Any = None
    ) -> Array:
        """The masked inputs."""
        if self.deterministic if deterministic is None else deterministic:
            return inputs
        key = self.key(rngs)
        return self._dropped(key, inputs)

    def _dropped(self, key: Array, inputs: Array) -> Array:
        return dropout.tau_nice_dropout(key, inputs, self.tau, spatial_ndim=self.spatial_ndim)


class OutputDropout(TauNiceDropout):
    """Dropout after a linear map: exactly τ outputs kept, not rescaled (proposition 6)."""

    def _dropped(self, key: Array, inputs: Array) -> Array:
        return dropout.output_dropout(key, inputs, self.tau, spatial_ndim=self.spatial_ndim)


class AdditiveDropout(Stochastic):
    r"""Additive dropout: adds (I − (n1/τ) Σ_{i∈S} A_i A_i*) z to A x + b (proposition 2).

    Args:
      layer: the linear layer whose A it uses (its parameters are shared, not copied).
      tau: input features in the sum: a count (int) or a fraction (float).
      deterministic: add the mean, (I − A A*) z; flipped by `train()` and `eval()`.
      rng_collection: name of the random stream.
      rngs: random streams.
    """

    def __init__(
        self,
        layer: nnx.Linear | nnx.Conv,
        tau: int | float,
        *,
        deterministic: bool = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ):
        self.layer, self.tau = layer, tau
        self.init_stochastic(deterministic, rng_collection, rngs)

    def __call__(
        self, inputs: Array, z: Array, *, deterministic: bool | None = None, rngs: Any = None
    ) -> Array:
        """A x + b + (I − (n1/τ) Σ_{i∈S} A_i A_i*) z."""
        _checks.activations(f"inputs of {type(self).__name__}", inputs)
        linear_map = linear_map_of(self.layer, inputs.shape)
        if isinstance(linear_map, Dense | Conv):
            _checks.trailing(f"inputs of {type(self).__name__}", inputs, linear_map.in_shape)
        if self.deterministic if deterministic is None else deterministic:
            return self.layer(inputs) + z - linear_map(linear_map.adjoint(z))
        return self.layer(inputs) + dropout.additive_dropout(
            self.key(rngs), linear_map, z, self.tau
        )


class ImportanceDropout(Stochastic):
    """Dropout that keeps exactly τ features with non-uniform probabilities (section 5).

    Args:
      layer: the linear layer that follows, whose columns set the probabilities.
      tau: features to keep: a count (int) or a fraction (float).
      by: "gradient" for p_i ∝ ||A_i|| ||x_i||, "lipschitz" for p_i ∝ L_i.
      deterministic: pass inputs through; flipped by `train()` and `eval()`.
      rng_collection: name of the random stream.
      rngs: random streams.
    """

    def __init__(
        self,
        layer: nnx.Linear | nnx.Conv,
        tau: int | float,
        *,
        by: ImportanceScore = "gradient",
        deterministic: bool = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ):
        _checks.member("by", by, ("gradient", "lipschitz"))
        self.layer, self.tau = layer, tau
        self.by: ImportanceScore = by
        self.init_stochastic(deterministic, rng_collection, rngs)

    def __call__(
        self, inputs: Array, *, deterministic: bool | None = None, rngs: Any = None
    ) -> Array:
        """The masked inputs, each divided by its probability."""
        if self.deterministic if deterministic is None else deterministic:
            return inputs
        _checks.activations(f"inputs of {type(self).__name__}", inputs)
        linear_map = linear_map_of(self.layer, inputs.shape)
        return dropout.importance_dropout(self.key(rngs), linear_map, inputs, self.tau, by=self.by)


def linear_map_of(layer: Any, inputs_shape: tuple[int, ...]) -> LinearMap:
    """The linear map A of a Flax layer, for inputs of this shape, batch axes included.

    Args:
      layer: an `nnx.Linear`, `Conv`, `ConvTranspose`, `LinearGeneral` or `Einsum`.
      inputs_shape: of the layer's inputs.

    Raises:
      ValueError: for another layer, and for unsupported options.
    """
    inputs_shape = _checks.shape("inputs_shape of linear_map_of", inputs_shape)
    if isinstance(layer, nnx.Linear):
        return Dense(layer.kernel[...])
    if isinstance(layer, nnx.LinearGeneral):
        kernel, groups = layer.kernel[...], tuple(layer.batch_axis)
        return dense_general(kernel, tuple(inputs_shape), axis=layer.axis, batch_axis=groups)
    if isinstance(layer, nnx.Einsum):
        return _layers.einsum_map(layer.einsum_str, layer.kernel[...], inputs_shape)
    if isinstance(layer, nnx.ConvTranspose):
        return _layers.conv_transpose_map(layer, layer.kernel[...], inputs_shape)
    if not isinstance(layer, nnx.Conv):
        _checks.fail("layer", "a linear layer of nnx", type(layer).__name__)
    kernel = layer.kernel[...]
    return _layers.conv_map(layer, kernel, inputs_shape[1 - kernel.ndim : -1])
