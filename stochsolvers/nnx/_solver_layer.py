"""What the solver layers share: their state, and the call that solves."""

from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from stochsolvers import _checks, _layers
from stochsolvers._typing import Array, Scalar
from stochsolvers.linear_maps import LinearMap
from stochsolvers.losses import Loss, Squares
from stochsolvers.nnx._stand_ins import refresh_folds
from stochsolvers.nnx._stochastic import Stochastic
from stochsolvers.nnx._twins import twin_of
from stochsolvers.problems import LayerProblem, NormalizedProblem
from stochsolvers.prox import NonNegative, Prior
from stochsolvers.solvers import Solution, Solver
from stochsolvers.surgery import _fold


class SolverState(nnx.Variable):
    """Non-trainable state of a solver layer: the constant that sets its step, λ_max(A A*) for 1/L."""


class SolverRecord(nnx.Variable):
    """Measurements of the solves of solver layers within `nnx.capture`; `certify` tabulates them."""


class KeepsConstant(nnx.Module):
    """A layer with a constant of its kernel beside the parameters."""

    def refresh_lipschitz(self) -> None:
        """Recompute the kept constant from the current kernel, and use it from now on."""


class SolverLayer(Stochastic, KeepsConstant):
    """What the solver layers share; not for use on its own.

    Attributes:
      plain_class: the class of `nnx` that it is a twin of.
      rounds_as_plain: whether the library's product A x has the plain layer's bits.
    """

    plain_class: ClassVar[Any]
    rounds_as_plain: ClassVar[bool] = True

    prior: Prior
    solver: Solver
    ridge: Scalar
    loss: Loss
    normalize: bool
    output: _layers.Output
    lipschitz: SolverState | None
    reference: SolverState | None
    fold_scale: SolverState | None
    fold_shift: SolverState | None
    kernel: Any
    bias: Any
    dtype: Any
    precision: Any
    promote_dtype: Any

    @classmethod
    def from_layer(
        cls,
        layer: Any,
        *,
        solver: Solver,
        prior: Prior = NonNegative(),  # noqa: B008 - a frozen value
        ridge: Scalar = 0.0,
        loss: Loss = Squares(),  # noqa: B008
        normalize: bool = False,
        output: _layers.Output = "activation",
        deterministic: bool = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        **options: Any,
    ) -> Self:
        """The solver twin of a trained layer; it holds the very same parameter variables.

        Args:
          layer: an `nnx.Linear`, `Conv`, `ConvTranspose` or `LinearGeneral` for the twin of this name.
          solver: a configuration such as `ProxGD(num_iters=10)`.
          prior: g, whose prox is the activation.
          ridge: λ.
          loss: ℓ between A* z and the input.
          normalize: in normalised units, see `SolverLinear`.
          output: "activation" or "pre_activation", see there.
          deterministic: use the full gradient; flipped by `train()` and `eval()`.
          rng_collection: name of the random stream.
          rngs: random streams for sampling, or one of them.
          **options: of a convolution `spatial_shape`, as in `SolverConv`.

        Raises:
          ValueError: for a layer of another class, a subclass with a call of its own, which would be lost,
            and options of the layer that a solver does not support.
        """
        twin = twin_of(
            layer,
            cls.plain_class,
            cls,
            SolverLayer,
            solver=solver,
            prior=prior,
            ridge=ridge,
            loss=loss,
            normalize=normalize,
            output=output,
            rngs=nnx.Rngs(0, **{rng_collection: 0}),  # whose draws are replaced
            **options,
        )
        twin.init_stochastic(deterministic, rng_collection, rngs)
        twin.refresh_lipschitz()
        return twin

    def _init_solver(
        self,
        settings: _layers.Settings,
        *,
        trained: bool = False,
        fold: tuple[Array, Array] | None = None,
    ) -> None:
        """Set what a solver layer has beside the plain layer.

        Args:
          settings: of the layer.
          trained: whether the kernel is there, so that its constant can be kept.
          fold: (s, t) of a normalisation y ↦ s y + t that the model applies to what the layer returns.
        """
        settings.check(type(self).__name__)
        self.prior, self.solver = attribute(settings.prior), attribute(settings.solver)
        self.loss, self.ridge = attribute(settings.loss), settings.ridge
        self.normalize, self.output = settings.normalize, settings.output
        self.fold_scale = self.fold_shift = nnx.data(None)
        if fold is not None:
            self.fold_scale, self.fold_shift = map(SolverState, fold)
        self.lipschitz = self.reference = nnx.data(None)
        kept = self._constant()
        if kept is not None:
            self.lipschitz = SolverState(kept[0])
            self.reference = SolverState(kept[1] if trained else jnp.zeros_like(kept[1]))

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
        return _layers.constant_and_fingerprint(_layers.Settings.of(self), linear_map)

    def _kernel_ndim(self) -> int:
        return 2

    def _output_axis(self) -> int:
        """The kernel's axis of the features of the output."""
        return -1

    def _plain_call(self, inputs: Array) -> Array:
        """A x + b, as the plain layer computes it."""
        raise TypeError("a solver layer defines _plain_call")

    def _fold(self) -> tuple[Array, Array] | None:
        """(s, t) of the normalisation that the model applies to the layer's output."""
        if self.fold_scale is None or self.fold_shift is None:
            return None
        return self.fold_scale[...], self.fold_shift[...]

    def _folded_kernel(self) -> Array:
        """The kernel of the map that is solved with."""
        return _fold.folded(self.kernel[...], None, self._fold(), axis=self._output_axis())[0]

    def refresh_lipschitz(self) -> None:
        """Recompute the kept constant from the current kernel, and use it from now on."""
        if self.lipschitz is not None and self.reference is not None:
            self.lipschitz[...], self.reference[...] = self._constant()  # pyright: ignore

    def problem(self, inputs: Array, *, skip: Array | None = None) -> LayerProblem:
        """The convex problem that the layer solves at these inputs, for objectives and certificates."""
        problem, kept = self._plain_problem(inputs, skip), self._kept()
        settings = _layers.Settings.of(self)
        if not settings.normalize:
            return problem
        constant = _layers.current_constant(settings, problem.linear_map, *kept)
        return settings.prepared(problem, constant)[0]

    def _plain_problem(self, inputs: Array, skip: Array | None) -> LayerProblem:
        inputs, kernel, bias = self.promote_dtype(
            (inputs, self.kernel[...], None if self.bias is None else self.bias[...]),
            dtype=self.dtype,
        )
        kernel, bias = _fold.folded(kernel, bias, self._fold(), axis=self._output_axis())
        linear_map = self._linear_map(kernel, inputs)
        return _layers.Settings.of(self).problem(linear_map, inputs, bias, skip)

    def _kept(self) -> tuple[Array | None, Array | None]:
        if self.lipschitz is None or self.reference is None:
            return None, None
        return self.lipschitz[...], self.reference[...]

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
        if isinstance(problem, NormalizedProblem):
            problem = problem.plain
        deterministic = self.deterministic if deterministic is None else deterministic
        sampled = self.solver.stochastic and not deterministic
        parameters = [self.kernel[...]] + ([] if self.bias is None else [self.bias[...]])
        output, *_ = self.promote_dtype((inputs, *parameters), dtype=self.dtype)
        kept, reference = self._kept()
        return _layers.run(
            _layers.Settings.of(self),
            self.key(rngs) if sampled else None,
            problem,
            kept=kept,
            reference=reference,
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
        """The solver's last iterate, or its pre-activation; keyword arguments as in `solve`."""
        _checks.activations(f"inputs of {type(self).__name__}", inputs)
        output = _layers.output_of(self, self.solve(inputs, **kwargs))
        fold = self._fold()
        if self.output == "activation" or (fold is None and self.rounds_as_plain):
            return output
        if fold is None:
            fold = _fold.identity(output)
        problem = self._plain_problem(inputs, kwargs.get("skip"))
        return _fold.unfolded(output, self._plain_call(inputs), problem, fold)


def refresh_lipschitz(model: nnx.Module) -> None:
    """Recompute every kept Lipschitz constant and norm of a model, in place (the paper: once an epoch).

    BatchNorms that `replace_layers` has folded into solvers are folded anew.

    A layer made by `from_layer` keeps its constant from the start. One made by its constructor, whose
    weights may be about to be loaded, computes it at every call until this function has run.
    """
    _checks.instance("model of refresh_lipschitz", model, nnx.Module, "an nnx.Module")
    refresh_folds(model)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, KeepsConstant):
            module.refresh_lipschitz()


def attribute(value: Any) -> Any:
    """A value object as a module's attribute: static if it is made of numbers, data if of arrays."""
    arrays = any(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(value))
    return nnx.data(jax.tree.map(jnp.asarray, value)) if arrays else value
