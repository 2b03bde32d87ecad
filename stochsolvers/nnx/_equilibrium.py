"""Equilibrium layers: z = Wᵀσ(W z + U x + b), solved by any solver, ||W|| within a certified bound."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from stochsolvers import _checks, _equilibria
from stochsolvers._typing import Array, Scalar
from stochsolvers.equilibrium import DeepProblem, EquilibriumProblem, Regularized
from stochsolvers.linear_maps import Dense, LinearMap
from stochsolvers.nnx._equilibrium_base import Equilibrium, EquilibriumUnit
from stochsolvers.problems import FixedPointProblem
from stochsolvers.prox import NonNegative, Prior
from stochsolvers.solvers import Solver
from stochsolvers.solvers.derivatives import DerivativeLike


class EquilibriumLinear(EquilibriumUnit):
    r"""z = Wᵀσ(W z + U x + b), the minimiser of G(z) = ½||z||² − S(W z + U x + b); ||W|| ≤ `bound`.

    The kernel is divided by max(1, u/bound), u ≥ ||W|| a certified upper bound on its norm, and derivatives
    pass through that (`equilibrium.normalized`). The state of the norm is kept beside the parameters: in
    training it follows the kernel at little cost, in evaluation it is not changed.

    Args:
      in_features: of x; None where x is the drive itself, U = I, as after a layer and a normalisation of your
        own.
      features: of z.
      hidden_features: of W z; as many as of z by default.
      prior: g, whose prox at step 1 is the activation σ; ReLU by default.
      bound: ω, the most that ||W|| may be: below 1, or 1 for a bounded σ.
      solver: `Anderson`, `FixedPoint`, `ProxGD`, …; by default Anderson with the tolerance 1e-5.
      derivative: of a solver that does not name its own: "implicit", `Implicit(...)`, `Truncated(n)`,
        "unrolled", "remat".
      regularizer: a `Regularized` prior of z that is composed into the layer.
      warm_start: the shape of z, batch axes included, where each call in training starts from where the last
        one ended; calls on another shape start from zero. None starts from zero.
      deterministic: keep norms and starting points as they are; flipped by `train()` and `eval()`.
      rngs: random streams for initialisation.
      **options: use_bias, kernel_init, input_kernel_init, bias_init, dtype, param_dtype, precision,
        promote_dtype.

    References:
      Xie et al. 2023, section 3; Bai et al. 2019.
    """

    def __init__(
        self,
        in_features: int | None,
        features: int,
        hidden_features: int | None = None,
        *,
        prior: Prior = NonNegative(),  # noqa: B008 - a frozen value
        bound: Scalar = 0.95,
        solver: Solver | None = None,
        derivative: DerivativeLike = "implicit",
        regularizer: Regularized | None = None,
        warm_start: tuple[int, ...] | None = None,
        deterministic: bool = False,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        hidden = features if hidden_features is None else hidden_features
        self.in_features, self.features, self.hidden_features = in_features, features, hidden
        self.init_equilibrium(
            solver=solver,
            derivative=derivative,
            regularizer=regularizer,
            warm_start=warm_start,
            deterministic=deterministic,
        )
        own = None if in_features is None else (in_features, hidden)
        shapes = own, (features, hidden)
        self._init_unit(shapes, prior, bound, rngs, **options)

    def _maps(
        self, inputs: Any, input_kernel: Array | None, kernel: Array
    ) -> tuple[LinearMap | None, LinearMap]:
        return None if input_kernel is None else Dense(input_kernel), Dense(kernel)

    def _kept_map(self, kernel: Array) -> LinearMap | None:
        return Dense(kernel)


class EquilibriumConv(EquilibriumUnit):
    """`EquilibriumLinear` with convolutions: U with strides, W of unit stride on the pixels of U x.

    Args:
      in_features: of x; None where x is the drive itself, U = I.
      features: of z.
      kernel_size: of both, one number for each of 1 to 3 spatial axes.
      hidden_features: of W z; as many as of z by default.
      strides: of U.
      padding: of both, "SAME" or "CIRCULAR".
      input_kernel_size: of U where it is another one.
      spatial_shape: of the inputs, on which the norm of W depends. With it the norm is kept; without, it is
        computed at every call.
      prior, bound, solver, derivative, regularizer, warm_start, deterministic, rngs: as in
        `EquilibriumLinear`.
      **options: likewise.
    """

    def __init__(
        self,
        in_features: int | None,
        features: int,
        kernel_size: int | Sequence[int],
        hidden_features: int | None = None,
        *,
        strides: int | Sequence[int] = 1,
        padding: str = "SAME",
        input_kernel_size: int | Sequence[int] | None = None,
        spatial_shape: tuple[int, ...] | int | None = None,
        prior: Prior = NonNegative(),  # noqa: B008 - a frozen value
        bound: Scalar = 0.95,
        solver: Solver | None = None,
        derivative: DerivativeLike = "implicit",
        regularizer: Regularized | None = None,
        warm_start: tuple[int, ...] | None = None,
        deterministic: bool = False,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        hidden = features if hidden_features is None else hidden_features
        size, own = _equilibria.kernel_sizes(kernel_size, input_kernel_size)
        _equilibria.check_padding("EquilibriumConv", padding)
        self.in_features, self.features, self.hidden_features = in_features, features, hidden
        self.kernel_size, self.input_kernel_size, self.padding = size, own, padding
        self.strides = _checks.counts("strides", strides, len(size))
        self.spatial_shape = None
        if spatial_shape is not None:
            self.spatial_shape = _checks.counts("spatial_shape", spatial_shape, len(size))
        self.init_equilibrium(
            solver=solver,
            derivative=derivative,
            regularizer=regularizer,
            warm_start=warm_start,
            deterministic=deterministic,
        )
        own = None if in_features is None else (*own, in_features, hidden)
        shapes = own, (*size, features, hidden)
        self._init_unit(shapes, prior, bound, rngs, **options)

    def _kernel_ndim(self) -> int:
        return len(self.kernel_size) + 2

    def _maps(
        self, inputs: Any, input_kernel: Array | None, kernel: Array
    ) -> tuple[LinearMap | None, LinearMap]:
        return _equilibria.conv_maps(
            inputs, input_kernel, kernel, self.strides, self.padding, self.spatial_shape
        )

    def _kept_map(self, kernel: Array) -> LinearMap | None:
        if self.spatial_shape is None:
            return None
        own = None
        if self.in_features is not None:
            shape = (*self.input_kernel_size, self.in_features, self.hidden_features)
            own = jnp.zeros(shape, kernel.dtype)
        pixels = jax.ShapeDtypeStruct((*self.spatial_shape, 1), kernel.dtype)
        return self._maps(pixels, own, kernel)[1]


class DeepEquilibrium(Equilibrium):
    r"""z = h_n ∘ … ∘ h_1(z) of several equilibrium layers, each with its own drive U_i x + b_i.

    With α < 1 each is averaged, (1 − α) I + α h_i; see `equilibrium.DeepProblem`.

    Args:
      layers: `EquilibriumLinear`s or `EquilibriumConv`s, whose z have one shape. Their parameters, priors and
        bounds are used; their solvers, regularisers and starting points are not.
      alpha: α in (0, 1].
      solver, derivative, regularizer, warm_start, deterministic: as in `EquilibriumLinear`.

    References:
      Xie et al. 2023, section 3.3.
    """

    def __init__(
        self,
        layers: Sequence[EquilibriumUnit],
        *,
        alpha: Scalar = 1.0,
        solver: Solver | None = None,
        derivative: DerivativeLike = "implicit",
        regularizer: Regularized | None = None,
        warm_start: tuple[int, ...] | None = None,
        deterministic: bool = False,
    ):
        if not isinstance(layers, Sequence):
            _checks.fail("layers of DeepEquilibrium", "a sequence of layers", _checks.named(layers))
        for layer in layers:
            if not isinstance(layer, EquilibriumUnit):
                wanted = "EquilibriumLinear and EquilibriumConv layers"
                _checks.fail("layers of DeepEquilibrium", wanted, type(layer).__name__)
        if not layers:
            _checks.fail("layers of DeepEquilibrium", "at least one layer", "none")
        self.layers, self.alpha = nnx.List(list(layers)), alpha
        self.dtype, self.precision = layers[0].dtype, layers[0].precision
        self.init_equilibrium(
            solver=solver,
            derivative=derivative,
            regularizer=regularizer,
            warm_start=warm_start,
            deterministic=deterministic,
        )

    def problem(self, inputs: Array) -> EquilibriumProblem | DeepProblem:
        """The problem that the layer solves at these inputs, for objectives, certificates and distances."""
        problems = [layer.unit_problem(inputs)[0] for layer in self.layers]
        return _equilibria.composed(problems, self.alpha, self.regularizer)

    def normalize(self) -> None:
        """Compute the kept norms of all layers afresh from their kernels."""
        for layer in self.layers:
            layer.normalize()

    def _prepared(self, inputs: Array, deterministic: bool) -> tuple[FixedPointProblem, Any]:
        problems = []
        for layer in self.layers:
            problem, state = layer.unit_problem(inputs)
            if not deterministic:
                layer.keep_norm(state)
            problems.append(problem)
        dtype = self.layers[0]._promoted(inputs)[0].dtype
        return _equilibria.composed(problems, self.alpha, self.regularizer), dtype
