"""Residual blocks of two solvers, the folding of batch normalisation, and refreshed constants, in Linen."""

from collections.abc import Mapping
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from flax.core import DenyList

from stochsolvers import _checks
from stochsolvers._typing import Array, Scalar
from stochsolvers.linen._equilibrium import EquilibriumUnit
from stochsolvers.linen._layers import RECORDS, STATE, SolverConv, SolverLayer
from stochsolvers.prox import NonNegative, Prior
from stochsolvers.solvers import Solver

Variables = Mapping[str, Any]
_Layer = TypeVar("_Layer", nn.Dense, nn.Conv)


class SolverResNetBlock(nn.Module, kw_only=True):
    r"""A ResNet block as two consecutive solvers, the second with bias b₂ + x (appendix J).

    With one iteration of unit step each it is ReLU(A₂ ReLU(A₁ x + b₁) + b₂ + x). The parameters of the two
    convolutions are those of the plain ones, named "first" and "second".

    Attributes:
      first: the block's first convolution, with its batch normalisation folded in (`fold_batch_norm`).
      second: the second, of the same kind; its output has the shape of the block's input.
      solver: configuration of both.
      prior: g of both; ReLU by default.
      ridge: λ of both.
      normalize: of both, as in `SolverDense`.
      deterministic: use the full gradient.
    """

    first: nn.Conv
    second: nn.Conv
    solver: Solver
    prior: Prior = NonNegative()
    ridge: Scalar = 0.0
    normalize: bool = False
    deterministic: bool = False

    def __post_init__(self) -> None:
        for name in ("first", "second"):
            object.__setattr__(self, name, self._twin(getattr(self, name)))
        super().__post_init__()

    def _twin(self, layer: nn.Conv) -> nn.Conv:
        if isinstance(layer, SolverConv):
            return layer
        return SolverConv.from_layer(
            layer,
            solver=self.solver,
            prior=self.prior,
            ridge=self.ridge,
            normalize=self.normalize,
            deterministic=self.deterministic,
            parent=None,
            name=None,
        )

    def __call__(self, inputs: Array, *, deterministic: bool | None = None) -> Array:
        """The block's output, shaped as its inputs."""
        first, second = cast(Any, self.first), cast(Any, self.second)
        hidden = first(inputs, deterministic=deterministic)
        return second(hidden, skip=inputs, deterministic=deterministic)


def fold_batch_norm(
    layer: _Layer, variables: Variables, norm: nn.BatchNorm, norm_variables: Variables
) -> tuple[_Layer, dict[str, Any]]:
    r"""The layer that equals `norm(layer(x))` at inference, and its variables.

    BN(A x + b) = s ⊙ (A x) + s ⊙ (b − m) + β, s = γ / sqrt(v + ε), with running mean m and variance v: the
    kernel's output features are scaled and the bias moves (Bibi et al. 2019, appendix J).

    Args:
      layer: not bound to variables.
      variables: its own, {"params": {"kernel": ..., "bias": ...}}.
      norm: the batch normalisation that follows, of the last axis.
      norm_variables: its own, {"params": {"scale": ..., "bias": ...}, "batch_stats": {"mean": ...,
        "var": ...}}.

    Returns:
      a layer of the same class and options, with a bias, and {"params": {"kernel": ..., "bias": ...}}.
    """
    for name, given in (("variables", variables), ("norm_variables", norm_variables)):
        _checks.instance(name, given, Mapping, "a mapping of collections")
    if isinstance(layer, SolverLayer):
        _checks.fail("layer", "a plain layer (fold it, then `from_layer`)", type(layer).__name__)
    if not isinstance(layer, nn.Dense | nn.Conv):
        _checks.fail("layer", "an nn.Dense or nn.Conv", type(layer).__name__)
    if not isinstance(norm, nn.BatchNorm):
        _checks.fail("norm", "an nn.BatchNorm", type(norm).__name__)
    if norm.axis != -1:
        _checks.fail("axis of the BatchNorm", -1, norm.axis)
    kernel = _variable("variables", variables, "params", "kernel")
    mean = _variable("norm_variables", norm_variables, "batch_stats", "mean")
    if mean.shape != (layer.features,):
        _checks.fail("features of the BatchNorm", layer.features, mean.shape[-1])
    scale = jax.lax.rsqrt(
        _variable("norm_variables", norm_variables, "batch_stats", "var") + norm.epsilon
    )
    if norm.use_scale:
        scale = scale * _variable("norm_variables", norm_variables, "params", "scale")
    bias = _variable("variables", variables, "params", "bias") if layer.use_bias else 0.0
    bias = scale * (bias - mean)
    if norm.use_bias:
        bias = bias + _variable("norm_variables", norm_variables, "params", "bias")
    columns = jnp.expand_dims(scale, range(kernel.ndim - 1)).astype(kernel.dtype)
    folded = layer.clone(use_bias=True, parent=None)
    return folded, {"params": {"kernel": kernel * columns, "bias": bias.astype(kernel.dtype)}}


def _variable(argument: str, variables: Variables, collection: str, name: str) -> Array:
    own = variables.get(collection, {})
    if name not in own:
        _checks.fail(argument, f"{name!r} in the collection {collection!r}", sorted(own))
    return nn.unbox(own[name])


def refresh_lipschitz(
    module: nn.Module,
    variables: Variables,
    *inputs: Any,
    rngs: Mapping[str, Array] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The variables with every kept Lipschitz constant and norm recomputed (the paper: once an epoch).

    One `apply` in which "solver_state" alone is written back: batch statistics and the starting points of
    equilibrium layers stay. Until it has run on a model from `init`, the layers compute their constants at
    every call. May be called within `jax.jit`.

    Args:
      module: the network, not bound to variables.
      variables: its variables; "solver_state" may be missing.
      *inputs: of the network, of the batch shape at hand; the constants do not depend on their values.
      rngs: keys of the random streams, where layers sample.
      **options: keyword arguments of the network's call.
    """
    _checks.instance("module of refresh_lipschitz", module, nn.Module, "an nn.Module")
    _checks.instance("variables", variables, Mapping, "a mapping of collections")

    def exact(call, args, kwargs, context):
        result = call(*args, **kwargs)
        layer = context.module
        if isinstance(layer, EquilibriumUnit) and context.method_name == "unit_problem":
            layer.normalize(args[0])
        return result

    # records are not asked for, parameters are not to be created here
    mutable = DenyList(("params", RECORDS))
    with nn.intercept_methods(exact):
        _, written = module.apply(
            dict(variables), *inputs, rngs=cast(Any, rngs), mutable=mutable, **options
        )
    before = traverse_util.flatten_dict(dict(variables.get(STATE, {})))
    now = traverse_util.flatten_dict(cast(Any, written).get(STATE, {}))
    kept = {path: value for path, value in now.items() if path[-1] != "start"}
    return {**variables, STATE: traverse_util.unflatten_dict(before | kept)}
