"""Solver layers for Flax NNX: the parameters of the plain layers, the forward pass of a solver.

`SolverLinear` and `SolverConv` subclass `nnx.Linear` and `nnx.Conv` and add no parameters, so a plain
network's parameter state loads into its solver twin unchanged. Beside the parameters they hold a
random stream and, where the step size is read off it, the layer's Lipschitz constant as
non-trainable `SolverState`, which `refresh_lipschitz` recomputes.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from stochsolvers import _checks, _layers, dropout
from stochsolvers._typing import Array, Scalar
from stochsolvers.estimators import ImportanceScore
from stochsolvers.linear_maps import Conv, Dense, LinearMap
from stochsolvers.problems import LayerProblem
from stochsolvers.prox import NonNegative, Prior
from stochsolvers.solvers import Solution, Solver

_Layer = TypeVar("_Layer", nnx.Linear, nnx.Conv)


class SolverState(nnx.Variable):
    """Non-trainable state of a solver layer: its cached Lipschitz constant λ_max(A A*)."""


class _Stochastic(nnx.Module):
    """A random stream and the deterministic flag that `train()` and `eval()` flip."""

    def _init_stochastic(self, deterministic: bool, rng_collection: str, rngs: Any) -> None:
        self.deterministic = deterministic
        self.rng_collection = rng_collection
        if isinstance(rngs, nnx.Rngs):
            self.rngs = rngs[rng_collection].fork()
        elif isinstance(rngs, nnx.RngStream):
            self.rngs = rngs.fork()
        elif rngs is None:
            self.rngs = nnx.data(None)
        else:
            _checks.fail("rngs", "an nnx.Rngs, an nnx.RngStream or None", type(rngs).__name__)

    def _is_deterministic(self, deterministic: bool | None) -> bool:
        return self.deterministic if deterministic is None else deterministic

    def _key(self, rngs: Any) -> Array:
        source = self.rngs if rngs is None else rngs
        if source is None:
            _checks.fail(
                f"rngs of {type(self).__name__}",
                "a random stream at construction or call, or deterministic=True",
                None,
            )
        if isinstance(source, nnx.Rngs):
            source = source[self.rng_collection]
        return source() if isinstance(source, nnx.RngStream) else source


class _SolverLayer(_Stochastic):
    prior: Prior
    solver: Solver
    ridge: Scalar
    lipschitz: SolverState | None

    def _init_solver(self, prior: Prior, solver: Solver, ridge: Scalar) -> None:
        _checks.non_negative("ridge", ridge)
        self.prior, self.solver, self.ridge = prior, solver, ridge
        constant = self._lipschitz_constant()
        self.lipschitz = nnx.data(None) if constant is None else SolverState(constant)

    def _lipschitz_constant(self) -> Array | None:
        raise TypeError("a solver layer defines _lipschitz_constant")

    def _linear_map(self, kernel: Array, inputs: Array) -> LinearMap:
        raise TypeError("a solver layer defines _linear_map")

    def refresh_lipschitz(self) -> None:
        """Recompute the cached Lipschitz constant from the current kernel."""
        if self.lipschitz is not None:
            self.lipschitz[...] = self._lipschitz_constant()

    def problem(self, inputs: Array, *, skip: Array | None = None) -> LayerProblem:
        """The convex problem that the layer solves at these inputs, for objectives and certificates."""
        inputs, kernel, bias = self.promote_dtype(
            (inputs, self.kernel[...], None if self.bias is None else self.bias[...]),
            dtype=self.dtype,
        )
        return _layers.make_problem(
            self._linear_map(kernel, inputs),
            inputs,
            bias,
            skip,
            prior=self.prior,
            ridge=self.ridge,
        )

    def solve(
        self,
        inputs: Array,
        *,
        skip: Array | None = None,
        deterministic: bool | None = None,
        rngs: Any = None,
    ) -> Solution:
        """The layer's output with the solver's residuals, as a `Solution`.

        Args:
          inputs: x, features last.
          skip: added to the bias; the residual connection of a ResNet block.
          deterministic: full gradient instead of sampling; default, the attribute's value.
          rngs: key, stream or `nnx.Rngs` in place of the layer's own.
        """
        problem = self.problem(inputs, skip=skip)
        deterministic = self._is_deterministic(deterministic)
        sampled = self.solver.stochastic and not deterministic
        cached = None if self.lipschitz is None else self.lipschitz[...]
        output, _ = self.promote_dtype((inputs, self.kernel[...]), dtype=self.dtype)
        return _layers.run(
            self.solver,
            self._key(rngs) if sampled else None,
            problem,
            lipschitz=_layers.step_constant(self.solver, problem.linear_map, cached),
            deterministic=deterministic,
            precision=self.precision,
            dtype=output.dtype,
        )

    def __call__(self, inputs: Array, **kwargs: Any) -> Array:
        """prox_g of the solver's last iterate; keyword arguments as in `solve`."""
        return self.solve(inputs, **kwargs).value


class SolverLinear(_SolverLayer, nnx.Linear):
    r"""`nnx.Linear` and its activation, as a solver of minimise ½||Wz − x||² − <b, z> + (λ/2)||z||² + g(z).

    With `ProxGD(1, step_size=1.0)` it is activation(x W + b); with `ProxSG` of one iteration, the same
    after dropout. More iterations use the same parameters.

    Args:
      in_features: n1.
      out_features: n2.
      prior: g, whose prox is the activation; ReLU by default.
      solver: a configuration such as `ProxSG(tau=0.5, num_iters=10)`.
      ridge: λ; the paper uses 1e-3 with stochastic solvers.
      deterministic: use the full gradient; flipped by `train()` and `eval()`.
      rng_collection: name of the random stream.
      rngs: random streams for initialisation and sampling.
      **options: those of `nnx.Linear`.

    References:
      Bibi et al. 2019, section 3.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        solver: Solver,
        prior: Prior = NonNegative(),  # noqa: B008 - a frozen value
        ridge: Scalar = 0.0,
        deterministic: bool = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs,
        **options: Any,
    ):
        nnx.Linear.__init__(self, in_features, out_features, rngs=rngs, **options)
        self._init_stochastic(deterministic, rng_collection, rngs)
        self._init_solver(prior, solver, ridge)

    @classmethod
    def from_layer(
        cls,
        layer: nnx.Linear,
        *,
        solver: Solver,
        prior: Prior = NonNegative(),  # noqa: B008 - a frozen value
        ridge: Scalar = 0.0,
        deterministic: bool = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> "SolverLinear":
        """The solver twin of a trained layer; it holds the very same parameter variables."""
        twin = cls(
            layer.in_features,
            layer.out_features,
            solver=solver,
            prior=prior,
            ridge=ridge,
            rngs=_placeholder_rngs(rng_collection),
            kernel_init=jax.nn.initializers.zeros,
            **_options(layer, "dot_general"),
        )
        return _adopt(twin, layer, deterministic, rng_collection, rngs)

    def _lipschitz_constant(self) -> Array | None:
        return _layers.step_constant(self.solver, Dense(self.kernel[...]))

    def _linear_map(self, kernel: Array, inputs: Array) -> Dense:
        return Dense(kernel)


class SolverConv(_SolverLayer, nnx.Conv):
    """`nnx.Conv` (two-dimensional) and its activation, as a solver; whole feature maps are sampled.

    Args:
      in_features: n1.
      out_features: n2.
      kernel_size: (kh, kw).
      strides: as in `nnx.Conv`.
      spatial_shape: (H, W) of the inputs, on which the Lipschitz constant depends. With it the
        constant is cached, as in the paper; without, it is computed at every call.
      prior: g, whose prox is the activation; ReLU by default.
      solver: a configuration such as `ProxGD(num_iters=10)`.
      ridge: λ.
      deterministic: use the full gradient; flipped by `train()` and `eval()`.
      rng_collection: name of the random stream.
      rngs: random streams for initialisation and sampling.
      **options: those of `nnx.Conv`; `mask` and `input_dilation` are refused.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Any,
        strides: Any = 1,
        *,
        solver: Solver,
        spatial_shape: tuple[int, int] | None = None,
        prior: Prior = NonNegative(),  # noqa: B008 - a frozen value
        ridge: Scalar = 0.0,
        deterministic: bool = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs,
        **options: Any,
    ):
        nnx.Conv.__init__(
            self, in_features, out_features, kernel_size, strides, rngs=rngs, **options
        )
        self.spatial_shape = spatial_shape
        self._init_stochastic(deterministic, rng_collection, rngs)
        self._init_solver(prior, solver, ridge)

    @classmethod
    def from_layer(
        cls,
        layer: nnx.Conv,
        *,
        solver: Solver,
        spatial_shape: tuple[int, int] | None = None,
        prior: Prior = NonNegative(),  # noqa: B008 - a frozen value
        ridge: Scalar = 0.0,
        deterministic: bool = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> "SolverConv":
        """The solver twin of a trained layer; it holds the very same parameter variables."""
        shape_options = ("padding", "input_dilation", "kernel_dilation", "feature_group_count", "mask")
        twin = cls(
            layer.in_features,
            layer.out_features,
            layer.kernel_size,
            layer.strides,
            solver=solver,
            spatial_shape=spatial_shape,
            prior=prior,
            ridge=ridge,
            rngs=_placeholder_rngs(rng_collection),
            kernel_init=jax.nn.initializers.zeros,
            **_options(layer, *shape_options, "conv_general_dilated"),
        )
        return _adopt(twin, layer, deterministic, rng_collection, rngs)

    def _lipschitz_constant(self) -> Array | None:
        if self.spatial_shape is None:
            return None
        return _layers.step_constant(
            self.solver, self._conv(self.kernel[...], self.spatial_shape)
        )

    def _linear_map(self, kernel: Array, inputs: Array) -> Conv:
        if inputs.ndim < 3:
            _checks.fail("shape of SolverConv's inputs", "(..., H, W, features)", inputs.shape)
        if self.spatial_shape not in (None, inputs.shape[-3:-1]):
            _checks.fail("spatial shape of the inputs", self.spatial_shape, inputs.shape[-3:-1])
        return self._conv(kernel, inputs.shape[-3:-1])

    def _conv(self, kernel: Array, spatial_shape: tuple[int, int]) -> Conv:
        return _layers.conv_map(
            kernel,
            spatial_shape,
            strides=self.strides,
            padding=self.padding,
            kernel_dilation=self.kernel_dilation,
            input_dilation=self.input_dilation,
            feature_group_count=self.feature_group_count,
            mask=self.mask,
        )


def refresh_lipschitz(model: nnx.Module) -> None:
    """Recompute every cached Lipschitz constant of a model, in place (the paper: once an epoch)."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, _SolverLayer):
            module.refresh_lipschitz()


class TauNiceDropout(_Stochastic):
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
        self._init_stochastic(deterministic, rng_collection, rngs)

    def __call__(
        self, inputs: Array, *, deterministic: bool | None = None, rngs: Any = None
    ) -> Array:
        """The masked, rescaled inputs."""
        if self._is_deterministic(deterministic):
            return inputs
        key = self._key(rngs)
        return dropout.tau_nice_dropout(key, inputs, self.tau, spatial_ndim=self.spatial_ndim)


class OutputDropout(TauNiceDropout):
    """Dropout after a linear map: exactly τ outputs kept, not rescaled (proposition 6)."""

    def __call__(
        self, inputs: Array, *, deterministic: bool | None = None, rngs: Any = None
    ) -> Array:
        """The masked inputs."""
        if self._is_deterministic(deterministic):
            return inputs
        key = self._key(rngs)
        return dropout.output_dropout(key, inputs, self.tau, spatial_ndim=self.spatial_ndim)


class AdditiveDropout(_Stochastic):
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
        self._init_stochastic(deterministic, rng_collection, rngs)

    def __call__(
        self, inputs: Array, z: Array, *, deterministic: bool | None = None, rngs: Any = None
    ) -> Array:
        """A x + b + (I − (n1/τ) Σ_{i∈S} A_i A_i*) z."""
        linear_map = linear_map_of(self.layer, inputs.shape)
        if self._is_deterministic(deterministic):
            return self.layer(inputs) + z - linear_map(linear_map.adjoint(z))
        return self.layer(inputs) + dropout.additive_dropout(
            self._key(rngs), linear_map, z, self.tau
        )


class ImportanceDropout(_Stochastic):
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
        self.layer, self.tau, self.by = layer, tau, by
        self._init_stochastic(deterministic, rng_collection, rngs)

    def __call__(
        self, inputs: Array, *, deterministic: bool | None = None, rngs: Any = None
    ) -> Array:
        """The masked inputs, each divided by its probability."""
        if self._is_deterministic(deterministic):
            return inputs
        linear_map = linear_map_of(self.layer, inputs.shape)
        return dropout.importance_dropout(
            self._key(rngs), linear_map, inputs, self.tau, by=self.by
        )


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
        rngs: nnx.Rngs | None = None,
    ):
        options: dict[str, Any] = dict(solver=solver, prior=prior, ridge=ridge, rngs=rngs)
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
    folded.kernel = nnx.Param(layer.kernel[...] * scale.astype(layer.kernel.dtype))
    folded.bias = nnx.Param(bias.astype(layer.kernel.dtype))
    folded.use_bias = True
    if isinstance(folded, _SolverLayer):
        folded.refresh_lipschitz()
    return folded


def linear_map_of(layer: nnx.Linear | nnx.Conv, inputs_shape: tuple[int, ...]) -> LinearMap:
    """The linear map A of a Flax layer, for inputs of this shape."""
    if isinstance(layer, nnx.Linear):
        return Dense(layer.kernel[...])
    return _layers.conv_map(
        layer.kernel[...],
        (inputs_shape[-3], inputs_shape[-2]),
        strides=layer.strides,
        padding=layer.padding,
        kernel_dilation=layer.kernel_dilation,
        input_dilation=layer.input_dilation,
        feature_group_count=layer.feature_group_count,
        mask=layer.mask,
    )


def _placeholder_rngs(rng_collection: str) -> nnx.Rngs:
    """Streams for a twin's constructor, whose draws `_adopt` then replaces."""
    return nnx.Rngs(0, **{rng_collection: 0})


def _options(layer: nnx.Linear | nnx.Conv, *names: str) -> dict[str, Any]:
    common = ("use_bias", "dtype", "param_dtype", "precision", "promote_dtype")
    return {
        name: getattr(layer, name) for name in (*common, "preferred_element_type", *names)
    }


def _adopt(twin: Any, layer: Any, deterministic: bool, rng_collection: str, rngs: Any) -> Any:
    twin.kernel, twin.bias = layer.kernel, layer.bias if layer.use_bias else nnx.data(None)
    twin._init_stochastic(deterministic, rng_collection, rngs)
    twin.refresh_lipschitz()
    return twin
