"""Residual blocks of two solvers, and the folding of batch normalisation into a layer."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from stochsolvers import _checks
from stochsolvers._typing import Array, Scalar
from stochsolvers.nnx._layers import SolverConv
from stochsolvers.nnx._solver_layer import SolverLayer
from stochsolvers.prox import NonNegative, Prior
from stochsolvers.solvers import Solver

_Layer = TypeVar("_Layer", nnx.Linear, nnx.Conv)


class SolverResNetBlock(nnx.Module):
    r"""A ResNet block as two consecutive solvers, the second with bias b₂ + x (appendix J).

    With one iteration of unit step each it is ReLU(A₂ ReLU(A₁ x + b₁) + b₂ + x).

    Args:
      first: the block's first convolution, with its batch normalisation folded in
        (`fold_batch_norm`).
      second: the second, of the same kind; its output has the shape of the block's input.
      prior: g of both; ReLU by default.
      solver: configuration of both.
      ridge: λ of both.
      normalize: of both, as in `SolverLinear`.
      rngs: random streams for sampling.
    """

    def __init__(
        self,
        first: nnx.Conv,
        second: nnx.Conv,
        *,
        solver: Solver,
        prior: Prior = NonNegative(),  # noqa: B008 - a frozen value
        ridge: Scalar = 0.0,
        normalize: bool = False,
        rngs: nnx.Rngs | None = None,
    ):
        options: dict[str, Any] = {
            "solver": solver,
            "prior": prior,
            "ridge": ridge,
            "normalize": normalize,
            "rngs": rngs,
        }
        self.first = SolverConv.from_layer(first, **options)
        self.second = SolverConv.from_layer(second, **options)

    def __call__(self, inputs: Array, *, deterministic: bool | None = None) -> Array:
        """The block's output, shaped as its inputs."""
        hidden = self.first(inputs, deterministic=deterministic)
        return self.second(hidden, skip=inputs, deterministic=deterministic)


def fold_batch_norm(layer: _Layer, norm: nnx.BatchNorm) -> _Layer:
    r"""The layer that equals `norm(layer(x))` at inference.

    BN(A x + b) = s ⊙ (A x) + s ⊙ (b − m) + β, s = γ / sqrt(v + ε), with running mean m and variance v: the
    kernel's output features are scaled and the bias moves (Bibi et al. 2019, appendix J).

    Returns:
      a new layer of the same class and options, with a bias; the arguments are unchanged.
    """
    if isinstance(layer, SolverLayer):
        _checks.fail("layer", "a plain layer (fold it, then `from_layer`)", type(layer).__name__)
    if not isinstance(layer, nnx.Linear | nnx.Conv):
        _checks.fail("layer", "an nnx.Linear or nnx.Conv", type(layer).__name__)
    if not isinstance(norm, nnx.BatchNorm):
        _checks.fail("norm", "an nnx.BatchNorm", type(norm).__name__)
    if norm.num_features != layer.out_features:
        _checks.fail("features of the BatchNorm", layer.out_features, norm.num_features)
    scale = jax.lax.rsqrt(norm.var[...] + norm.epsilon)
    if norm.scale is not None:
        scale = scale * norm.scale[...]
    bias = 0.0 if layer.bias is None else layer.bias[...]
    bias = scale * (bias - norm.mean[...])
    if norm.bias is not None:
        bias = bias + norm.bias[...]
    graph, state = nnx.split(layer)
    folded = nnx.merge(graph, state, copy=True)
    columns = jnp.expand_dims(scale, range(layer.kernel.ndim - 1)).astype(layer.kernel.dtype)
    folded.kernel = nnx.Param(layer.kernel[...] * columns)
    folded.bias = nnx.Param(bias.astype(layer.kernel.dtype))
    folded.use_bias = True
    return folded
