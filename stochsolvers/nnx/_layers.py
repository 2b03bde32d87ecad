"""Solver layers: the parameters of `nnx.Linear` and `nnx.Conv`, the forward pass of a solver."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from stochsolvers import _checks, _layers
from stochsolvers._typing import Array, Scalar
from stochsolvers.linear_maps import Conv, Dense, LinearMap
from stochsolvers.losses import Loss, Squares
from stochsolvers.nnx._stochastic import Stochastic
from stochsolvers.problems import LayerProblem
from stochsolvers.prox import NonNegative, Prior
from stochsolvers.solvers import Solution, Solver


class SolverState(nnx.Variable):
    """Non-trainable state of a solver layer: the constant that sets its step, λ_max(A A*) for 1/L."""


class SolverRecord(nnx.Variable):
    """Measurements of the solves of solver layers within `nnx.capture`; `certify` tabulates them."""


class SolverLayer(Stochastic):
    """What the two solver layers share; not for use on its own."""

    prior: Prior
    solver: Solver
    ridge: Scalar
    loss: Loss
    lipschitz: SolverState | None
    reference: SolverState | None
    kernel: Any
    bias: Any
    dtype: Any
    precision: Any
    promote_dtype: Any

    def _init_solver(self, prior: Prior, solver: Solver, ridge: Scalar, loss: Loss) -> None:
        _layers.check_factors(type(self).__name__, solver, prior, ridge, loss)
        self.prior, self.solver, self.ridge = _attribute(prior), _attribute(solver), ridge
        self.loss = _attribute(loss)
        self.lipschitz = self.reference = nnx.data(None)
        kept = self._constant()
        if kept is not None:
            self.lipschitz = SolverState(kept[0])
            self.reference = SolverState(jnp.zeros_like(kept[1]))  # no kernel yet

    def _kept_map(self) -> LinearMap | None:
        """The map whose constant can be kept; None where it depends on the inputs."""
        raise TypeError("a solver layer defines _kept_map")

    def _linear_map(self, kernel: Array, inputs: Array) -> LinearMap:
        raise TypeError("a solver layer defines _linear_map")

    def _constant(self) -> tuple[Array, Array] | None:
        """The constant that sets the step and the fingerprint of the map that it is of, or None."""
        if self.kernel[...].ndim > self._kernel_ndim():  # a stack of layers made by `nnx.vmap`
            graph, state = nnx.split(self)
            constants = [
                nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], state))._constant()
                for i in range(len(self.kernel[...]))
            ]
            return jax.tree.map(lambda *parts: jnp.stack(parts), *constants)
        linear_map = self._kept_map()
        if linear_map is None:
            return None
        constant = _layers.step_constant(self.solver, linear_map, self.ridge, self.loss)
        if constant is None:
            return None
        return constant, _layers.fingerprint(self.solver, linear_map, self.ridge)

    def _kernel_ndim(self) -> int:
        return 2

    def refresh_lipschitz(self) -> None:
        """Recompute the kept constant from the current kernel, and use it from now on."""
        if self.lipschitz is not None and self.reference is not None:
            self.lipschitz[...], self.reference[...] = self._constant()  # pyright: ignore

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
            loss=self.loss,
        )

    def solve(
        self,
        inputs: Array,
        *,
        skip: Array | None = None,
        deterministic: bool | None = None,
        rngs: Any = None,
        certify: bool = False,
    ) -> Solution:
        """The layer's output with the solver's residuals, as a `Solution`.

        Args:
          inputs: x, features last.
          skip: added to the bias; the residual connection of a ResNet block.
          deterministic: full gradient instead of sampling; default, the attribute's value.
          rngs: key, stream or `nnx.Rngs` in place of the layer's own.
          certify: fill in `Solution.certificate`, the certified gap of each example.
        """
        problem = self.problem(inputs, skip=skip)
        deterministic = self.deterministic if deterministic is None else deterministic
        sampled = self.solver.stochastic and not deterministic
        parameters = [self.kernel[...]] + ([] if self.bias is None else [self.bias[...]])
        output, *_ = self.promote_dtype((inputs, *parameters), dtype=self.dtype)
        return _layers.run(
            self.solver,
            self.key(rngs) if sampled else None,
            problem,
            kept=None if self.lipschitz is None else self.lipschitz[...],
            reference=None if self.reference is None else self.reference[...],
            deterministic=deterministic,
            precision=self.precision,
            dtype=output.dtype,
            certify=certify,
            record=self._record if self._is_captured() else None,
        )

    def _is_captured(self) -> bool:
        captures = getattr(self, "__captures__", ())  # what `nnx.capture` hands to `sow`
        return any(type(variable) is SolverRecord for variable in captures)

    def _record(self, observation: Any) -> None:
        self.sow(SolverRecord, "solves", observation)

    def __call__(self, inputs: Array, **kwargs: Any) -> Array:
        """prox_g of the solver's last iterate; keyword arguments as in `solve`."""
        return self.solve(inputs, **kwargs).value


class SolverLinear(SolverLayer, nnx.Linear):
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
        loss: Loss = Squares(),  # noqa: B008
        deterministic: bool = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs,
        **options: Any,
    ):
        dot_general = options.get("dot_general")
        _layers.refuse(
            "SolverLinear",
            dot_general=None if dot_general is jax.lax.dot_general else dot_general,
            preferred_element_type=options.get("preferred_element_type"),
        )
        nnx.Linear.__init__(self, in_features, out_features, rngs=rngs, **options)
        self.init_stochastic(deterministic, rng_collection, rngs)
        self._init_solver(prior, solver, ridge, loss)

    @classmethod
    def from_layer(
        cls,
        layer: nnx.Linear,
        *,
        solver: Solver,
        prior: Prior = NonNegative(),  # noqa: B008 - a frozen value
        ridge: Scalar = 0.0,
        loss: Loss = Squares(),  # noqa: B008
        deterministic: bool = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> "SolverLinear":
        """The solver twin of a trained layer; it holds the very same parameter variables.

        Raises:
          ValueError: for what is no `nnx.Linear`, or a subclass with a call of its own, which would be lost.
        """
        _check_layer(layer, nnx.Linear)
        twin = cls(
            layer.in_features,
            layer.out_features,
            solver=solver,
            prior=prior,
            ridge=ridge,
            loss=loss,
            rngs=_placeholder_rngs(rng_collection),
            kernel_init=jax.nn.initializers.zeros,
            **_options(layer, "dot_general"),
        )
        return _adopt(twin, layer, deterministic, rng_collection, rngs)

    def _kept_map(self) -> Dense:
        return Dense(self.kernel[...])

    def _linear_map(self, kernel: Array, inputs: Array) -> Dense:
        return Dense(kernel)


class SolverConv(SolverLayer, nnx.Conv):
    """`nnx.Conv` and its activation, as a solver; whole feature maps are sampled.

    Args:
      in_features: n1.
      out_features: n2.
      kernel_size: (kh, kw), or one number for each of 1 to 3 spatial axes.
      strides: as in `nnx.Conv`.
      spatial_shape: of the inputs, (H, W) for images, on which the Lipschitz constant depends. With it the
        constant is cached, as in the paper; without, it is computed at every call.
      prior: g, whose prox is the activation; ReLU by default.
      solver: a configuration such as `ProxGD(num_iters=10)`.
      ridge: λ.
      loss: ℓ between A* z and the input; half the squared distance by default.
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
        spatial_shape: tuple[int, ...] | int | None = None,
        prior: Prior = NonNegative(),  # noqa: B008 - a frozen value
        ridge: Scalar = 0.0,
        loss: Loss = Squares(),  # noqa: B008
        deterministic: bool = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs,
        **options: Any,
    ):
        convolve = options.get("conv_general_dilated")
        _layers.refuse(
            "SolverConv",
            conv_general_dilated=None if convolve is jax.lax.conv_general_dilated else convolve,
            preferred_element_type=options.get("preferred_element_type"),
        )
        nnx.Conv.__init__(
            self, in_features, out_features, kernel_size, strides, rngs=rngs, **options
        )
        if spatial_shape is not None:
            rank = self._kernel_ndim() - 2
            spatial_shape = _checks.counts("spatial_shape", spatial_shape, rank)
        self.spatial_shape = spatial_shape
        self.init_stochastic(deterministic, rng_collection, rngs)
        self._init_solver(prior, solver, ridge, loss)

    @classmethod
    def from_layer(
        cls,
        layer: nnx.Conv,
        *,
        solver: Solver,
        spatial_shape: tuple[int, ...] | int | None = None,
        prior: Prior = NonNegative(),  # noqa: B008 - a frozen value
        ridge: Scalar = 0.0,
        loss: Loss = Squares(),  # noqa: B008
        deterministic: bool = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> "SolverConv":
        """The solver twin of a trained layer; it holds the very same parameter variables.

        Raises:
          ValueError: for what is no `nnx.Conv`, or a subclass with a call of its own, which would be lost.
        """
        _check_layer(layer, nnx.Conv)
        shape_options = (
            "padding",
            "input_dilation",
            "kernel_dilation",
            "feature_group_count",
            "mask",
        )
        twin = cls(
            layer.in_features,
            layer.out_features,
            layer.kernel_size,
            layer.strides,
            solver=solver,
            spatial_shape=spatial_shape,
            prior=prior,
            ridge=ridge,
            loss=loss,
            rngs=_placeholder_rngs(rng_collection),
            kernel_init=jax.nn.initializers.zeros,
            **_options(layer, *shape_options, "conv_general_dilated"),
        )
        return _adopt(twin, layer, deterministic, rng_collection, rngs)

    def _kept_map(self) -> Conv | None:
        if self.spatial_shape is None:
            return None
        return _layers.conv_map(self, self.kernel[...], self.spatial_shape)

    def _kernel_ndim(self) -> int:
        return len(self.kernel_size) + 2

    def _linear_map(self, kernel: Array, inputs: Array) -> Conv:
        rank = kernel.ndim - 2
        if inputs.ndim < rank + 1:
            names = {1: "W", 2: "H, W", 3: "D, H, W"}.get(rank, "spatial")
            _checks.fail("shape of SolverConv's inputs", f"(..., {names}, features)", inputs.shape)
        pixels = inputs.shape[-rank - 1 : -1]
        if self.spatial_shape not in (None, pixels):
            _checks.fail("spatial shape of the inputs", self.spatial_shape, pixels)
        return _layers.conv_map(self, kernel, pixels)


def refresh_lipschitz(model: nnx.Module) -> None:
    """Recompute every kept Lipschitz constant of a model, in place (the paper: once an epoch).

    A layer made by `from_layer` keeps its constant from the start. One made by its constructor, whose
    weights may be about to be loaded, computes it at every call until this function has run.
    """
    for _, module in nnx.iter_modules(model):
        if isinstance(module, SolverLayer):
            module.refresh_lipschitz()


def _attribute(value: Any) -> Any:
    """A value object as a module's attribute: static if it is made of numbers, data if of arrays."""
    arrays = any(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(value))
    return nnx.data(jax.tree.map(jnp.asarray, value)) if arrays else value


def _check_layer(layer: Any, kind: type) -> None:
    """Require an instance of a plain layer, or of its solver twin, whose call nobody has extended."""
    known = (kind.__call__, SolverLayer.__call__)  # pyright: ignore[reportFunctionMemberAccess]
    if not isinstance(layer, kind) or type(layer).__call__ not in known:
        got = f"the class {layer.__name__}" if isinstance(layer, type) else type(layer).__name__
        _checks.fail("layer", f"an nnx.{kind.__name__} without a call of its own", got)


def _placeholder_rngs(rng_collection: str) -> nnx.Rngs:
    """Streams for a twin's constructor, whose draws `_adopt` then replaces."""
    return nnx.Rngs(0, **{rng_collection: 0})


def _options(layer: nnx.Linear | nnx.Conv, *names: str) -> dict[str, Any]:
    common = ("use_bias", "dtype", "param_dtype", "precision", "promote_dtype")
    return {name: getattr(layer, name) for name in (*common, "preferred_element_type", *names)}


def _adopt(twin: Any, layer: Any, deterministic: bool, rng_collection: str, rngs: Any) -> Any:
    twin.kernel, twin.bias = layer.kernel, layer.bias if layer.use_bias else nnx.data(None)
    twin.init_stochastic(deterministic, rng_collection, rngs)
    twin.refresh_lipschitz()
    return twin
