"""The dropout layers that one solver iteration is, as Linen modules; see `stochsolvers.dropout`."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from stochsolvers import _checks, dropout
from stochsolvers._typing import Array
from stochsolvers.estimators import ImportanceScore
from stochsolvers.linear_maps import LinearMap
from stochsolvers.linen._layers import linear_map_of


class TauNiceDropout(nn.Module):
    """Dropout that keeps exactly τ features, (n/τ) m ⊙ x (Bibi et al. 2019, proposition 1).

    Attributes:
      tau: features to keep: a count (int) or a fraction (float), so τ = 1.0 − p.
      spatial_ndim: 2 to drop whole feature maps.
      deterministic: pass inputs through.
      rng_collection: name of the random stream.
    """

    tau: int | float
    spatial_ndim: int = 0
    deterministic: bool = False
    rng_collection: str = "dropout"

    def __call__(
        self, inputs: Array, *, deterministic: bool | None = None, rng: Array | None = None
    ) -> Array:
        """The masked inputs; `rng` is a key in place of the stream's next one."""
        if is_deterministic(self, deterministic):
            return inputs
        key = self.make_rng(self.rng_collection) if rng is None else rng
        return self._dropped(key, inputs)

    @nn.nowrap
    def _dropped(self, key: Array, inputs: Array) -> Array:
        return dropout.tau_nice_dropout(key, inputs, self.tau, spatial_ndim=self.spatial_ndim)


class OutputDropout(TauNiceDropout):
    """Dropout after a linear map: exactly τ outputs kept, not rescaled (proposition 6)."""

    @nn.nowrap
    def _dropped(self, key: Array, inputs: Array) -> Array:
        return dropout.output_dropout(key, inputs, self.tau, spatial_ndim=self.spatial_ndim)


class AdditiveDropout(nn.Module):
    r"""Additive dropout: adds (I − (n1/τ) Σ_{i∈S} A_i A_i*) z to A x + b (proposition 2).

    Attributes:
      layer: the linear layer whose A it uses. A layer of the surrounding module is shared; one that belongs
        to no module yet becomes this module's own, named "layer".
      tau: input features in the sum: a count (int) or a fraction (float).
      deterministic: add the mean, (I − A A*) z.
      rng_collection: name of the random stream.
    """

    layer: nn.Module
    tau: int | float
    deterministic: bool = False
    rng_collection: str = "dropout"

    def __call__(
        self,
        inputs: Array,
        z: Array,
        *,
        deterministic: bool | None = None,
        rng: Array | None = None,
    ) -> Array:
        """A x + b + (I − (n1/τ) Σ_{i∈S} A_i A_i*) z; `rng` as in `TauNiceDropout`."""
        _checks.activations(f"inputs of {type(self).__name__}", inputs)
        outputs = _called(self.layer, inputs)  # creates the parameters
        linear_map = _linear_map(self.layer, inputs)
        if is_deterministic(self, deterministic):
            return outputs + z - linear_map(linear_map.adjoint(z))
        key = self.make_rng(self.rng_collection) if rng is None else rng
        return outputs + dropout.additive_dropout(key, linear_map, z, self.tau)


class ImportanceDropout(nn.Module):
    """Dropout that keeps exactly τ features with non-uniform probabilities (section 5).

    Attributes:
      layer: the linear layer that follows, whose columns set the probabilities; shared as in
        `AdditiveDropout`. It is not applied here, except by `init`.
      tau: features to keep: a count (int) or a fraction (float).
      by: "gradient" for p_i ∝ ||A_i|| ||x_i||, "lipschitz" for p_i ∝ L_i.
      deterministic: pass inputs through.
      rng_collection: name of the random stream.
    """

    layer: nn.Module
    tau: int | float
    by: ImportanceScore = "gradient"
    deterministic: bool = False
    rng_collection: str = "dropout"

    def __post_init__(self) -> None:
        _checks.member("by", self.by, ("gradient", "lipschitz"))
        super().__post_init__()

    def __call__(
        self, inputs: Array, *, deterministic: bool | None = None, rng: Array | None = None
    ) -> Array:
        """The masked inputs, each divided by its probability; `rng` as in `TauNiceDropout`."""
        _checks.activations(f"inputs of {type(self).__name__}", inputs)
        if self.is_initializing():
            _called(self.layer, inputs)  # creates the parameters
        if is_deterministic(self, deterministic):
            return inputs
        key = self.make_rng(self.rng_collection) if rng is None else rng
        linear_map = _linear_map(self.layer, inputs)
        return dropout.importance_dropout(key, linear_map, inputs, self.tau, by=self.by)


def is_deterministic(module: Any, given: bool | None) -> bool:
    """The flag of a call, or the module's own."""
    return bool(module.deterministic if given is None else given)


def _called(layer: Any, inputs: Array) -> Array:
    _checks.instance("layer", layer, nn.Module, "a linear layer of Linen with a kernel")
    return layer(inputs)


def _linear_map(layer: nn.Module, inputs: Array) -> LinearMap:
    kernel: Any = layer.get_variable("params", "kernel")
    if kernel is None:
        _checks.fail("layer", "a linear layer of Linen with a kernel", type(layer).__name__)
    return linear_map_of(layer, kernel, jnp.shape(inputs))
