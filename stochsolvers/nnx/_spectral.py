"""Spectral normalisation by the norm of the layer, for Flax NNX."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from stochsolvers import _checks
from stochsolvers._spectral import SpectralOptions, blocks_map, einsum_map
from stochsolvers._typing import Array, Scalar
from stochsolvers.linear_maps import Dense, LinearMap
from stochsolvers.lipschitz import (
    NormState,
    kept_norm,
    norm_refresh,
    norm_state,
    norm_step,
)
from stochsolvers.nnx._dropout import linear_map_of
from stochsolvers.nnx._solver_layer import KeepsConstant, attribute

_LAYERS = (nnx.Linear, nnx.Conv, nnx.ConvTranspose, nnx.LinearGeneral, nnx.Einsum)


class SpectralStat(nnx.BatchStat):
    """State of `SpectralNorm`, of the kind that Flax's wrapper keeps."""


class SpectralNorm(KeepsConstant):
    r"""A linear layer with the kernel W c / ||A||, where ||A|| is the norm of the layer, not of its kernel.

    A drop-in for `nnx.SpectralNorm`, which divides by an estimate of the norm of the kernel reshaped to a
    matrix: of a convolution that is another number, and often half of ||A||. The parameters stay as they are;
    the normalised kernel is made for each call.

    In training ||A v|| stands for ||A||, v kept as state and improved by `n_steps` steps at each call
    (`lipschitz.norm_step`). After `eval()`, or with `update_stats=False`, it is `spectral_norm(A)` in full,
    computed at each call, or once by `stochsolvers.nnx.refresh_lipschitz(model)` for as long as the kernel
    is that one; nothing is written then.

    Args:
      layer_instance: an `nnx.Linear`, `Conv`, `ConvTranspose`, `LinearGeneral` or `Einsum`, of any strides,
        dilation and groups; its parameters are those of this module, under `layer_instance`.
      bound: c > 0.
      spatial_shape: of a convolution's inputs, (H, W), for which the norm is taken. Without it the norm is
        that for the inputs of each call, and no v is kept: a call in training takes 48 steps.
      shrink_only: W min(1, c / ||A||) in place of W c / ||A||: a layer below the bound stays as it is.
      differentiate_norm: the derivative passes through the norm, with d||A|| = <u, dA v>, as in Flax's
        wrapper; False takes the norm as a constant.
      certified: after `eval()` divide by the upper end of `spectral_norm_bracket`: ||A|| ≤ c is proved.
      n_steps: k, Krylov steps on v in a training call; each is a product with A and one with A* of one
        example. Flax's wrapper takes one power step on the reshaped kernel.
      epsilon: the least norm that is divided by.
      dtype: of the normalised kernel; by default that of the parameter.
      param_dtype: not needed: the state is in float32 or the kernel's wider dtype.
      error_on_non_matrix: refuse kernels with more than two axes.
      update_stats: whether calls are those of training, until `train()` and `eval()` say so.
      rngs: not needed; accepted as Flax's wrapper takes them.

    Raises:
      ValueError: for another layer, a subclass with a call of its own, unsupported options, or a bound ≤ 0.

    References:
      Miyato et al., Spectral normalization for generative adversarial networks, ICLR 2018; Bibi et al. 2019,
      lemma 2.
    """

    def __init__(
        self,
        layer_instance: Any,
        *,
        bound: Scalar = 1.0,
        spatial_shape: tuple[int, ...] | int | None = None,
        shrink_only: bool = False,
        differentiate_norm: bool = True,
        certified: bool = False,
        n_steps: int = 4,
        epsilon: float = 1e-12,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        error_on_non_matrix: bool = False,
        update_stats: bool = True,
        rngs: nnx.Rngs | None = None,
    ):
        del rngs, param_dtype
        _check_layer(layer_instance)
        options = SpectralOptions(
            bound, shrink_only, differentiate_norm, certified, n_steps, epsilon, dtype
        )
        self.options = attribute(options)
        kernel = layer_instance.kernel[...]
        if error_on_non_matrix and kernel.ndim > 2:
            _checks.fail("kernel with error_on_non_matrix", "two axes", kernel.shape)
        if spatial_shape is not None:
            if not isinstance(layer_instance, nnx.Conv | nnx.ConvTranspose):
                _checks.fail("spatial_shape of a layer without pixels", None, spatial_shape)
            size = layer_instance.kernel_size
            axes = 1 if isinstance(size, int) else len(size)
            spatial_shape = _checks.counts("spatial_shape", spatial_shape, axes)
        self.spatial_shape = spatial_shape
        self.layer_instance = layer_instance
        self.use_running_average = not update_stats
        self.vectors: Any = nnx.data(None)
        self.norm: Any = nnx.data(None)
        self.checksum: Any = nnx.data(None)
        kept = self._kept_map(kernel)
        if kept is not None:
            self._keep(norm_state(kept))

    def __call__(self, inputs: Array, update_stats: bool | None = None) -> Array:
        """The layer's output with the normalised kernel.

        Args:
          inputs: of the layer.
          update_stats: True for a call of training, False for one of evaluation; by default the attribute's.
        """
        training = not self.use_running_average if update_stats is None else update_stats
        norm = self._norm(inputs, training)
        graph, state = nnx.split(self.layer_instance)
        layer = nnx.merge(graph, state, copy=True)
        layer.kernel[...] = self.options.normalised(layer.kernel[...], norm)
        return layer(inputs)

    def refresh_lipschitz(self) -> None:
        """Compute the norm in full, for evaluation with the current kernel."""
        kept = self._kept_map(self.layer_instance.kernel[...])
        if kept is not None:
            self._keep(norm_refresh(kept, self.norm_state(), certified=self.options.certified))

    def set_view(self, use_running_average: bool | None = None) -> None:
        """What `nnx.view` may set.

        Args:
          use_running_average: calls are those of evaluation.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def linear_map(self, inputs_shape: tuple[int, ...] = ()) -> LinearMap:
        """The map with the kernel as it is, not normalised.

        Args:
          inputs_shape: of a convolution without a `spatial_shape`, batch axes included.
        """
        kept = self._kept_map(self.layer_instance.kernel[...])
        return linear_map_of(self.layer_instance, inputs_shape) if kept is None else kept

    def _norm(self, inputs: Array, training: bool) -> Array:
        kept = self._kept_map(self.layer_instance.kernel[...])
        if kept is None:
            linear_map = linear_map_of(self.layer_instance, jnp.shape(inputs))
            return self.options.norm_of(linear_map, training=training)
        if not training:
            return kept_norm(kept, self.norm_state(), certified=self.options.certified)
        norm, state = norm_step(kept, self.norm_state(), num_steps=self.options.n_steps)
        self._keep(state)
        return norm

    def _kept_map(self, kernel: Array) -> LinearMap | None:
        """The map whose norm can be kept; None if it depends on the inputs."""
        layer = self.layer_instance
        if isinstance(layer, nnx.Linear):
            return Dense(kernel)
        if isinstance(layer, nnx.LinearGeneral):
            groups, contracted = len(layer.batch_axis), len(layer.axis)
            return blocks_map(kernel, groups, contracted)
        if isinstance(layer, nnx.Einsum):
            return einsum_map(layer.einsum_str, kernel)
        if self.spatial_shape is None:
            return None
        return linear_map_of(layer, (1, *self.spatial_shape, 1))

    def norm_state(self) -> NormState:
        """What is kept of the norm, for `lipschitz.norm_step`; of a layer whose norm needs no inputs."""
        return NormState(self.vectors[...], self.norm[...], self.checksum[...])

    def _keep(self, state: NormState) -> None:
        for name in ("vectors", "norm", "checksum"):
            value, variable = getattr(state, name), getattr(self, name)
            if variable is None:
                setattr(self, name, SpectralStat(value))
            else:
                variable[...] = value


def _check_layer(layer: Any) -> None:
    """Require a linear layer of nnx whose call nobody has extended."""
    kinds = [kind for kind in _LAYERS if isinstance(layer, kind)]
    if not kinds or type(layer).__call__ is not kinds[0].__call__:
        got = f"the class {layer.__name__}" if isinstance(layer, type) else type(layer).__name__
        names = ", ".join(kind.__name__ for kind in _LAYERS)
        _checks.fail(
            "layer_instance of SpectralNorm", f"one of nnx.{names}, with its own call", got
        )
