"""Spectral normalisation by the norm of the layer, for Flax Linen."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from stochsolvers import _checks
from stochsolvers._spectral import SpectralOptions, blocks_map, einsum_map
from stochsolvers._typing import Array, Scalar
from stochsolvers.linear_maps import Dense, LinearMap
from stochsolvers.linen._layers import linear_map_of
from stochsolvers.lipschitz import (
    NormState,
    kept_norm,
    norm_refresh,
    norm_state,
    norm_step,
)

_LAYERS = (nn.Dense, nn.Conv, nn.ConvTranspose, nn.DenseGeneral, nn.Einsum)


class SpectralNorm(nn.Module):
    r"""A linear layer with the kernel W c / ||A||, ||A|| its norm; see `stochsolvers.nnx.SpectralNorm`.

    A drop-in for `nn.SpectralNorm`, called the same way: `SpectralNorm(nn.Conv(8, (3, 3)))(x,
    update_stats=train)`. The parameter tree is the layer's own, as Flax's wrapper has it.

    With `update_stats=True` ||A v|| stands for ||A||; v is kept in the collection, for images of the size
    that the layer was initialised with, and written where the collection is mutable. With
    `update_stats=False` it is the norm in full, computed at each call; a call with the collection mutable
    keeps it for as long as the kernel is that one.

    Attributes:
      layer_instance: an `nn.Dense`, `Conv`, `ConvTranspose`, `DenseGeneral` or `Einsum`.
      n_steps, epsilon, dtype, param_dtype, error_on_non_matrix: as in Flax's wrapper; `param_dtype` is not
        needed.
      collection_name: of the state.
      bound, shrink_only, differentiate_norm, certified: as in `stochsolvers.nnx.SpectralNorm`.
    """

    layer_instance: nn.Module
    n_steps: int = 4
    epsilon: float = 1e-12
    dtype: Any = None
    param_dtype: Any = jnp.float32
    error_on_non_matrix: bool = False
    collection_name: str = "batch_stats"
    bound: Scalar = 1.0
    shrink_only: bool = False
    differentiate_norm: bool = True
    certified: bool = False

    def __post_init__(self) -> None:
        self._options()
        _check_layer(self.layer_instance)
        super().__post_init__()

    @nn.compact
    def __call__(self, *args: Any, update_stats: bool, **kwargs: Any) -> Array:
        """The layer's output with the normalised kernel.

        Args:
          *args: of the layer, the inputs first.
          update_stats: True for a call of training, False for one of evaluation.
          **kwargs: of the layer.
        """
        shape = jnp.shape(args[0] if args else kwargs["inputs"])

        originals: list[Any] = []

        def normalise(path: Any, value: Array) -> Array:
            if str(getattr(path[-1], "key", path[-1])) != "kernel":
                return value
            return self._normalised(value, shape, update_stats)

        def normalised(tree: Any) -> Any:
            originals.append(tree)
            return jax.tree_util.tree_map_with_path(normalise, tree)

        def as_they_were(tree: Any) -> Any:  # of initialisation alone
            return originals[-1] if originals else tree

        return nn.map_variables(
            lambda layer: layer(*args, **kwargs),
            trans_in_fn=normalised,
            trans_out_fn=as_they_were,
            init=self.is_initializing(),
        )(self.layer_instance)

    def _normalised(self, kernel: Array, shape: tuple[int, ...], training: bool) -> Array:
        kernel = jnp.asarray(kernel)
        if self.error_on_non_matrix and kernel.ndim > 2:
            _checks.fail("kernel with error_on_non_matrix", "two axes", kernel.shape)
        options = self._options()
        return options.normalised(
            kernel, self._norm(_map(self.layer_instance, kernel, shape), training)
        )

    def _norm(self, linear_map: LinearMap, training: bool) -> Array:
        options, fresh = self._options(), norm_state(linear_map)
        name = f"{self.layer_instance.name}/kernel"
        if not (
            self.is_mutable_collection(self.collection_name)
            or self.has_variable(self.collection_name, f"{name}/vectors")
        ):
            return options.norm_of(linear_map, training=training)
        variables = {
            part: self.variable(
                self.collection_name, f"{name}/{part}", lambda p=part: getattr(fresh, p)
            )
            for part in ("vectors", "norm", "checksum")
        }
        state = NormState(**{part: variable.value for part, variable in variables.items()})
        if state.vectors.shape != fresh.vectors.shape:  # images of another size
            return options.norm_of(linear_map, training=training)
        writes = self.is_mutable_collection(self.collection_name) and not self.is_initializing()
        if training:
            norm, state = norm_step(linear_map, state, num_steps=self.n_steps)
        else:
            if writes:
                state = norm_refresh(linear_map, state, certified=self.certified)
            norm = kept_norm(linear_map, state, certified=self.certified)
        if writes:
            for part, variable in variables.items():
                variable.value = getattr(state, part)
        return norm

    def _options(self) -> SpectralOptions:
        return SpectralOptions(
            self.bound,
            self.shrink_only,
            self.differentiate_norm,
            self.certified,
            self.n_steps,
            self.epsilon,
            self.dtype,
        )


def _map(layer: Any, kernel: Array, shape: tuple[int, ...]) -> LinearMap:
    """The layer's map, but for copies of it."""
    if isinstance(layer, nn.Dense):
        return Dense(kernel)
    if isinstance(layer, nn.DenseGeneral):
        axes, batch = (
            n if isinstance(n, tuple | list) else (n,) for n in (layer.axis, layer.batch_dims)
        )
        return blocks_map(kernel, len(batch), len(axes))
    if isinstance(layer, nn.Einsum) and layer.einsum_str is not None:
        kept = einsum_map(layer.einsum_str, kernel)
        if kept is not None:
            return kept
    return linear_map_of(layer, kernel, shape)


def _check_layer(layer: Any) -> None:
    """Require a linear layer of Linen whose call nobody has extended."""
    kinds = [kind for kind in _LAYERS if isinstance(layer, kind)]
    if not kinds or type(layer).__call__ is not kinds[0].__call__:
        names = ", ".join(kind.__name__ for kind in _LAYERS)
        got = type(layer).__name__
        _checks.fail("layer_instance of SpectralNorm", f"one of nn.{names}, with its own call", got)
