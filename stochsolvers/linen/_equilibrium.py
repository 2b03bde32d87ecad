"""Equilibrium layers for Flax Linen; see `stochsolvers.nnx.EquilibriumLinear`."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import dtypes

from stochsolvers import _checks, _equilibria, _layers
from stochsolvers._typing import Array, Scalar
from stochsolvers.equilibrium import DeepProblem, EquilibriumProblem, Regularized
from stochsolvers.linear_maps import Dense, LinearMap
from stochsolvers.linen._layers import RECORDS, STATE
from stochsolvers.problems import FixedPointProblem
from stochsolvers.prox import NonNegative, Prior
from stochsolvers.solvers import Solution, Solver
from stochsolvers.solvers.derivatives import DerivativeLike


class Equilibrium(nn.Module):
    """The base class of equilibrium layers; one of your own defines `problem(inputs)`.

    Attributes:
      solver, derivative, regularizer: as in `stochsolvers.nnx.EquilibriumLinear`.
      warm_start: start each call in which "solver_state" is mutable from where the last one of that shape
        ended.
      dtype: of the computation; by default that of the inputs and the parameters.
    """

    solver: Solver | None = None
    derivative: DerivativeLike = "implicit"
    regularizer: Regularized | None = None
    warm_start: bool = False
    dtype: Any = None

    def __post_init__(self) -> None:
        _equilibria.check_solver(type(self).__name__, self.solver, self.regularizer)
        super().__post_init__()

    def problem(self, inputs: Array) -> FixedPointProblem:
        """The problem that the layer solves at these inputs."""
        raise TypeError("an equilibrium layer defines problem")

    def _prepared(self, inputs: Array, follows: bool) -> tuple[FixedPointProblem, Any]:
        """The problem of a call, which may update what is kept, and the dtype of the result."""
        problem = self.problem(inputs)
        parameters = jax.tree.leaves(self.variables.get("params", {}))
        return problem, _equilibria.result_type(self.dtype, inputs, parameters)

    def solve(
        self,
        inputs: Array,
        *,
        init: Array | None = None,
        deterministic: bool | None = None,
        certify: bool = False,
    ) -> Solution:
        """The layer's equilibrium as a `Solution`; see `stochsolvers.nnx.Equilibrium.solve`.

        With `deterministic` "solver_state" is not written, even if it is mutable.
        """
        follows = self.is_mutable_collection(STATE) and not deterministic
        problem, dtype = self._prepared(inputs, follows)
        follows = follows and self.warm_start
        kept = self.get_variable(STATE, "start") if follows else None
        records = self.is_mutable_collection(RECORDS) and not self.is_initializing()
        solution = _equilibria.run(
            self.solver,
            self.derivative,
            problem,
            init=_equilibria.starting_point(problem, init, kept),
            precision=getattr(self, "precision", None),
            dtype=dtype,
            certify=certify,
            record=functools.partial(self.sow, RECORDS, "solves") if records else None,
        )
        if follows:
            if kept is None or kept.shape != problem.shape:
                kept = jnp.zeros(problem.shape, problem.dtype)
            self.put_variable(STATE, "start", _equilibria.next_start(solution.value, kept))
        return solution

    def __call__(self, inputs: Array, **options: Any) -> Array:
        """The equilibrium z*; options as in `solve`."""
        return self.solve(inputs, **options).value


class EquilibriumUnit(Equilibrium):
    """What the layers with one W share; not for use on its own."""

    def __post_init__(self) -> None:
        layer: Any = self
        _equilibria.Unit(layer.prior, layer.bound).check(type(self).__name__)
        super().__post_init__()

    def problem(self, inputs: Array) -> EquilibriumProblem | DeepProblem:
        """The problem that the layer solves at these inputs, for objectives, certificates and distances."""
        return _equilibria.composed([self.unit_problem(inputs)[0]], 1.0, self.regularizer)

    def assembled(self, inputs: Array) -> Any:
        """x in the layer's dtype, U or None for the identity, W before it is normalised, b or None."""
        raise TypeError("an equilibrium layer defines assembled")

    def maps(self, inputs: Array) -> tuple[LinearMap | None, LinearMap]:
        """U, None for the identity, and W before it is normalised, at inputs of this shape."""
        return self.assembled(inputs)[1:3]

    def unit_problem(self, inputs: Array, follows: bool = False) -> tuple[EquilibriumProblem, Any]:
        """The problem without the regulariser, and the dtype of the result.

        Args:
          inputs: x.
          follows: write the state of the norm.
        """
        layer: Any = self
        _checks.activations(f"inputs of {type(self).__name__}", inputs)
        inputs, input_map, linear_map, bias = self.assembled(inputs)
        linear_map = self._within_bound(linear_map, follows)
        unit = _equilibria.Unit(layer.prior, layer.bound)
        with _layers.precision_context(layer.precision):
            return unit.problem(input_map, linear_map, inputs, bias), inputs.dtype

    def normalize(self, inputs: Array) -> None:
        """Compute the kept norm of W afresh: `apply(..., method="normalize", mutable=["solver_state"])`.

        Args:
          inputs: of the layer, for their shape.
        """
        kept = _equilibria.norm_of(self.maps(inputs)[1])
        if kept is not None:
            self.put_variable(STATE, "norm", kept)

    def _prepared(self, inputs: Array, follows: bool) -> tuple[FixedPointProblem, Any]:
        problem, dtype = self.unit_problem(inputs, follows)
        return _equilibria.composed([problem], 1.0, self.regularizer), dtype

    def _parameters(self, inputs: Array, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> Any:
        layer: Any = self
        (own, shape), input_kernel = shapes, None
        if layer.use_input_kernel:
            init = layer.input_kernel_init
            input_kernel = self.param("input_kernel", init, own, layer.param_dtype)
        kernel = self.param("kernel", layer.kernel_init, shape, layer.param_dtype)
        bias = None
        if layer.use_bias:
            bias = self.param("bias", layer.bias_init, shape[-1:], layer.param_dtype)
        return layer.promote_dtype(inputs, input_kernel, kernel, bias, dtype=layer.dtype)

    def _within_bound(self, linear_map: LinearMap, follows: bool) -> LinearMap:
        layer: Any = self
        kept = self.get_variable(STATE, "norm")
        if kept is None and follows:
            kept = _equilibria.norm_of(linear_map)
        linear_map, kept = _equilibria.within_bound(linear_map, layer.bound, kept)
        if follows and kept is not None:
            self.put_variable(STATE, "norm", kept)
        return linear_map


class EquilibriumLinear(EquilibriumUnit):
    """z = Wᵀσ(W z + U x + b); see `stochsolvers.nnx.EquilibriumLinear`.

    The state of the norm of W is in the collection "solver_state": an `apply` in which that is mutable has it
    follow the kernel, one to which it is given reads it, and without it the norm is computed at every call.

    Attributes:
      features: of z.
      hidden_features: of W z; as many as of z by default.
      prior: g, whose prox at step 1 is the activation σ; ReLU by default.
      bound: ω, the most that ||W|| may be: below 1, or 1 for a bounded σ.
      use_input_kernel: False where x is the drive itself, U = I.
    """

    features: int = -1
    hidden_features: int | None = None
    prior: Prior = NonNegative()
    bound: Scalar = 0.95
    use_input_kernel: bool = True
    use_bias: bool = True
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Any = nn.initializers.lecun_normal()
    input_kernel_init: Any = nn.initializers.lecun_normal()
    bias_init: Any = nn.initializers.zeros_init()
    promote_dtype: Any = dtypes.promote_dtype

    @nn.compact
    def assembled(self, inputs: Array) -> Any:
        """x in the layer's dtype, U or None for the identity, W before it is normalised, b or None."""
        hidden = self.features if self.hidden_features is None else self.hidden_features
        shapes = (jnp.shape(inputs)[-1], hidden), (self.features, hidden)
        inputs, input_kernel, kernel, bias = self._parameters(inputs, shapes)
        own = None if input_kernel is None else Dense(input_kernel)
        return inputs, own, Dense(kernel), bias


class EquilibriumConv(EquilibriumUnit):
    """`EquilibriumLinear` with convolutions; see `stochsolvers.nnx.EquilibriumConv`.

    Attributes:
      features: of z.
      kernel_size: of both, one number for each of 1 to 3 spatial axes.
      hidden_features: of W z; as many as of z by default.
      strides: of U.
      padding: of both, "SAME" or "CIRCULAR".
      input_kernel_size: of U where it is another one.
      prior, bound, use_input_kernel: as in `EquilibriumLinear`.
    """

    features: int = -1
    kernel_size: int | Sequence[int] = (3, 3)
    hidden_features: int | None = None
    strides: int | Sequence[int] = 1
    padding: str = "SAME"
    input_kernel_size: int | Sequence[int] | None = None
    prior: Prior = NonNegative()
    bound: Scalar = 0.95
    use_input_kernel: bool = True
    use_bias: bool = True
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Any = nn.initializers.lecun_normal()
    input_kernel_init: Any = nn.initializers.lecun_normal()
    bias_init: Any = nn.initializers.zeros_init()
    promote_dtype: Any = dtypes.promote_dtype

    def __post_init__(self) -> None:
        _equilibria.check_padding("EquilibriumConv", self.padding)
        super().__post_init__()

    @nn.compact
    def assembled(self, inputs: Array) -> Any:
        """x in the layer's dtype, U or None for the identity, W before it is normalised, b or None."""
        hidden = self.features if self.hidden_features is None else self.hidden_features
        size, own = _equilibria.kernel_sizes(self.kernel_size, self.input_kernel_size)
        strides = _checks.counts("strides", self.strides, len(size))
        shapes = (*own, jnp.shape(inputs)[-1], hidden), (*size, self.features, hidden)
        inputs, input_kernel, kernel, bias = self._parameters(inputs, shapes)
        maps = _equilibria.conv_maps(inputs, input_kernel, kernel, strides, self.padding, None)
        return inputs, *maps, bias


class DeepEquilibrium(Equilibrium):
    """z = h_n ∘ … ∘ h_1(z) of several equilibrium layers; see `stochsolvers.nnx.DeepEquilibrium`.

    Attributes:
      layers: `EquilibriumLinear`s or `EquilibriumConv`s, whose z have one shape.
      alpha: α in (0, 1].
    """

    layers: Sequence[EquilibriumUnit] = ()
    alpha: Scalar = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.layers, Sequence):
            got = _checks.named(self.layers)
            _checks.fail("layers of DeepEquilibrium", "a sequence of layers", got)
        for layer in self.layers:
            if not isinstance(layer, EquilibriumUnit):
                wanted = "EquilibriumLinear and EquilibriumConv layers"
                _checks.fail("layers of DeepEquilibrium", wanted, type(layer).__name__)
        if not self.layers:
            _checks.fail("layers of DeepEquilibrium", "at least one layer", "none")
        super().__post_init__()

    def problem(self, inputs: Array) -> EquilibriumProblem | DeepProblem:
        """The problem that the layer solves at these inputs, for objectives, certificates and distances."""
        return self._prepared(inputs, False)[0]  # pyright: ignore[reportReturnType]

    def normalize(self, inputs: Array) -> None:
        """Compute the kept norms of all layers afresh, as `EquilibriumLinear.normalize` does."""
        for layer in self.layers:
            layer.normalize(inputs)

    def _prepared(self, inputs: Array, follows: bool) -> tuple[FixedPointProblem, Any]:
        pairs = [layer.unit_problem(inputs, follows) for layer in self.layers]
        problems, kinds = zip(*pairs, strict=True)
        return _equilibria.composed([*problems], self.alpha, self.regularizer), kinds[0]


def promotes_plainly(unit: EquilibriumUnit) -> bool:
    """Whether a layer has Flax's own promotion of dtypes."""
    layer: Any = unit
    return layer.promote_dtype is dtypes.promote_dtype
