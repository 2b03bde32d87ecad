"""What the equilibrium layers share: options, state, and the call that solves."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import errors, nnx
from flax.nnx.nn import dtypes

from stochsolvers import _checks, _equilibria, _layers
from stochsolvers._typing import Array, Scalar
from stochsolvers.equilibrium import DeepProblem, EquilibriumProblem, Regularized
from stochsolvers.linear_maps import LinearMap
from stochsolvers.nnx._solver_layer import KeepsConstant, SolverRecord, SolverState, attribute
from stochsolvers.problems import FixedPointProblem
from stochsolvers.prox import Prior
from stochsolvers.solvers import Solution, Solver
from stochsolvers.solvers.derivatives import DerivativeLike

_KERNEL_INIT = nnx.initializers.lecun_normal()
_BIAS_INIT = nnx.initializers.zeros_init()


class Equilibrium(KeepsConstant):
    r"""The base class of equilibrium layers: the solution of z = h(z; x) for each example.

    A layer of your own is a subclass with a method `problem(inputs)` that returns a `FixedPointProblem`,
    whose constructor calls `init_equilibrium`. It then solves, is differentiated, starts from where it ended
    and is recorded by `certify` as the layers of the library are.
    """

    solver: Solver | None
    derivative: DerivativeLike
    regularizer: Regularized | None
    start: SolverState | None
    deterministic: bool
    dtype: Any = None
    precision: Any = None

    def init_equilibrium(
        self,
        *,
        solver: Solver | None = None,
        derivative: DerivativeLike = "implicit",
        regularizer: Regularized | None = None,
        warm_start: tuple[int, ...] | None = None,
        deterministic: bool = False,
    ) -> None:
        """Set the options that all equilibrium layers have; see `EquilibriumLinear`."""
        _equilibria.check_solver(type(self).__name__, solver, regularizer)
        self.solver = None if solver is None else attribute(solver)
        self.derivative = attribute(derivative)
        self.regularizer = None if regularizer is None else attribute(regularizer)
        self.deterministic = deterministic
        self.start = nnx.data(None)
        if warm_start is not None:
            self.start = SolverState(jnp.zeros(tuple(warm_start)))

    def set_view(self, deterministic: bool | None = None) -> None:
        """What `nnx.view` may set.

        Args:
          deterministic: keep norms and starting points as they are.
        """
        if deterministic is not None:
            self.deterministic = deterministic

    def problem(self, inputs: Array) -> FixedPointProblem:
        """The problem that the layer solves at these inputs, for objectives, certificates and distances."""
        raise TypeError("an equilibrium layer defines problem")

    def normalize(self) -> None:
        """Compute the kept norms afresh from the current kernels."""

    def refresh_lipschitz(self) -> None:
        """`normalize`, by the name that `refresh_lipschitz` of a model calls."""
        self.normalize()

    def _prepared(self, inputs: Array, deterministic: bool) -> tuple[FixedPointProblem, Any]:
        """The problem of a call, which may update what is kept, and the dtype of the result."""
        parameters = jax.tree.leaves(nnx.state(self, nnx.Param))
        return self.problem(inputs), _equilibria.result_type(self.dtype, inputs, parameters)

    def solve(
        self,
        inputs: Array,
        *,
        init: Array | None = None,
        deterministic: bool | None = None,
        certify: bool = False,
    ) -> Solution:
        """The layer's equilibrium with the solver's residuals, iterations and status, as a `Solution`.

        Args:
          inputs: x, features last.
          init: z_0; by default the kept one of a layer with `warm_start`, else zero.
          deterministic: keep norms and starting points as they are; default, the attribute's value.
          certify: fill in `Solution.certificate`, a bound on the gap of each example.
        """
        deterministic = self.deterministic if deterministic is None else deterministic
        problem, dtype = self._prepared(inputs, deterministic)
        start = None if deterministic else self.start
        kept = None if start is None else start[...]
        solution = _equilibria.run(
            self.solver,
            self.derivative,
            problem,
            init=_equilibria.starting_point(problem, init, kept),
            precision=self.precision,
            dtype=dtype,
            certify=certify,
            record=self._record if self._is_captured() else None,
        )
        if start is not None and kept is not None:
            start[...] = _equilibria.next_start(solution.value, kept)
        return solution

    def __call__(self, inputs: Array, **options: Any) -> Array:
        """The equilibrium z*; options as in `solve`."""
        return self.solve(inputs, **options).value

    def _is_captured(self) -> bool:
        captures = getattr(self, "__captures__", ())
        return any(type(variable) is SolverRecord for variable in captures)

    def _record(self, observation: Any) -> None:
        self.sow(SolverRecord, "solves", observation)


class EquilibriumUnit(Equilibrium):
    """What the layers with one W share; not for use on its own."""

    input_kernel: nnx.Param | None
    kernel: nnx.Param
    bias: nnx.Param | None
    prior: Prior
    bound: Scalar
    norm: SolverState | None
    promote_dtype: Any

    def _init_unit(
        self,
        shapes: tuple[tuple[int, ...] | None, tuple[int, ...]],
        prior: Prior,
        bound: Scalar,
        rngs: nnx.Rngs,
        *,
        use_bias: bool = True,
        kernel_init: Any = _KERNEL_INIT,
        input_kernel_init: Any = _KERNEL_INIT,
        bias_init: Any = _BIAS_INIT,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        promote_dtype: Any = dtypes.promote_dtype,
    ) -> None:
        _equilibria.Unit(prior, bound).check(type(self).__name__)
        input_shape, shape = shapes
        self.input_kernel = nnx.data(None)
        if input_shape is not None:
            own = input_kernel_init(rngs.params(), input_shape, param_dtype)
            self.input_kernel = nnx.Param(own)
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, param_dtype))
        self.bias = nnx.data(None)
        if use_bias:
            self.bias = nnx.Param(bias_init(rngs.params(), shape[-1:], param_dtype))
        self.prior, self.bound = attribute(prior), bound
        self.dtype, self.precision, self.promote_dtype = dtype, precision, promote_dtype
        self.norm = nnx.data(None)
        state = self._norm_state()
        if state is not None:
            self.norm = SolverState(state)

    def _maps(
        self, inputs: Any, input_kernel: Array | None, kernel: Array
    ) -> tuple[LinearMap | None, LinearMap]:
        """U, None for the identity, and W at inputs of this shape."""
        raise TypeError("an equilibrium layer defines _maps")

    def _kept_map(self, kernel: Array) -> LinearMap | None:
        """The map W whose norm can be kept; None where it depends on the inputs."""
        raise TypeError("an equilibrium layer defines _kept_map")

    def _kernel_ndim(self) -> int:
        return 2

    def _norm_state(self) -> _equilibria.Kept | None:
        def state_of(kernel):
            linear_map = self._kept_map(kernel)
            return None if linear_map is None else _equilibria.norm_of(linear_map)

        kernel = self.kernel[...]
        if kernel.ndim > self._kernel_ndim():  # a stack of layers made by `nnx.vmap`
            return jax.lax.map(state_of, kernel)
        return state_of(kernel)

    def normalize(self) -> None:
        """Compute the kept norm of W afresh from the current kernel."""
        if self.norm is not None:
            self.norm.set_value(self._norm_state())

    def problem(self, inputs: Array) -> EquilibriumProblem | DeepProblem:
        """The problem that the layer solves at these inputs, for objectives, certificates and distances."""
        return _equilibria.composed([self.unit_problem(inputs)[0]], 1.0, self.regularizer)

    def maps(self, inputs: Array) -> tuple[LinearMap | None, LinearMap]:
        """U, None for the identity, and W before it is normalised, at inputs of this shape."""
        inputs, input_kernel, kernel, _ = self._promoted(inputs)
        return self._maps(inputs, input_kernel, kernel)

    def unit_problem(self, inputs: Array) -> tuple[EquilibriumProblem, _equilibria.Kept | None]:
        """The problem without the regulariser, and the next state of the kept norm."""
        _checks.activations(f"inputs of {type(self).__name__}", inputs)
        inputs, input_kernel, kernel, bias = self._promoted(inputs)
        input_map, linear_map = self._maps(inputs, input_kernel, kernel)
        kept = None if self.norm is None else self.norm.get_value()
        linear_map, state = _equilibria.within_bound(linear_map, self.bound, kept)
        with _layers.precision_context(self.precision):
            unit = _equilibria.Unit(self.prior, self.bound)
            return unit.problem(input_map, linear_map, inputs, bias), state

    def keep_norm(self, state: _equilibria.Kept | None) -> None:
        """Follow the kernel, but inside a transformation that does not see the layer's state.

        The norm of the next call is then certified from the kernel that it is kept of, as before.
        """
        if self.norm is not None and state is not None:
            with contextlib.suppress(errors.TraceContextError):
                self.norm.set_value(state)

    def _promoted(self, inputs: Array) -> Any:
        bias = None if self.bias is None else self.bias[...]
        own = None if self.input_kernel is None else self.input_kernel[...]
        arrays = inputs, own, self.kernel[...], bias
        return self.promote_dtype(arrays, dtype=self.dtype)

    def _prepared(self, inputs: Array, deterministic: bool) -> tuple[FixedPointProblem, Any]:
        problem, state = self.unit_problem(inputs)
        if not deterministic:
            self.keep_norm(state)
        dtype = self._promoted(inputs)[0].dtype
        return _equilibria.composed([problem], 1.0, self.regularizer), dtype


def promotes_plainly(unit: EquilibriumUnit) -> bool:
    """Whether a layer has Flax's own promotion of dtypes."""
    return unit.promote_dtype is dtypes.promote_dtype
