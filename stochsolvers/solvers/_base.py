"""The base class of solvers: what every algorithm has for free."""

import abc
import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from stochsolvers import _checks, step_sizes
from stochsolvers._shards import automatic, is_explicit
from stochsolvers._typing import (
    Array,
    Scalar,
    join_static,
    split_static,
    static_field,
    value_object,
)
from stochsolvers.estimators import Estimator, Full
from stochsolvers.estimators.forms import gradient_form
from stochsolvers.problems import FixedPointProblem, LayerProblem, Problem
from stochsolvers.solvers import _loop
from stochsolvers.solvers._loop import Diagnostics, Step
from stochsolvers.solvers._run import LastPoint, Run
from stochsolvers.solvers._solution import Solution
from stochsolvers.solvers.derivatives import DerivativeLike, Implicit, Truncated, canonical
from stochsolvers.solvers.implicit import LayerMap, ProxGradientMap, fixed_point, halved, repeated
from stochsolvers.step_sizes import InverseLipschitz, Schedule, StepSizeRule


@value_object
class Solver(abc.ABC):
    r"""An algorithm with its options, as a value: everything but the problem.

    A solver of your own is a subclass under `stochsolvers.value_object` with a field or attribute
    `num_iters` and a method `step`; `init` says what is carried beside the iterate. For instance gradient
    steps with a heavy ball:

        @ss.value_object
        class HeavyBall(ss.Solver):
            num_iters: int = ss.static_field()
            momentum: float = 0.5
            step_size: ss.StepSizeLike = None

            def init(self, run, z):
                return z

            def step(self, run, k, z, previous):
                point = z - run.step_size(k) * run.gradient(z) + self.momentum * (z - previous)
                return ss.Step(run.prox(point, k), memory=z, point=point)

    It then runs as a function (`solve`) and in layers, stops at a tolerance, is differentiated in all ways,
    and is certified. `step_size` may be declared as a field; it is 1/L otherwise. One that samples
    sets `stochastic = True`, defines `estimator`, and takes `run.estimate(k, z)`. A `__post_init__` of its
    own calls `super().__post_init__()`.

    A solver made of numbers is hashable, and so can be a module's static attribute.

    Args:
      tol: where an example stops, see `prox_gd`; only for solvers that do not sample. None runs all
        iterations.
      gap_tol: the certified gap at which an example stops, likewise; see `prox_gd`.
      derivative: "unrolled", "remat", `Truncated(n)`, "implicit" or `Implicit(...)`; see
        `solvers.derivatives`. None is unrolled, implicit where a tolerance is given. Solvers that sample
        have no implicit derivative.
    """

    tol: Scalar | None = dataclasses.field(default=None, kw_only=True)
    gap_tol: Scalar | None = dataclasses.field(default=None, kw_only=True)
    derivative: DerivativeLike = static_field(default=None, kw_only=True)

    stochastic: ClassVar[bool] = False
    """Whether `solve` needs a key unless it is deterministic."""
    per_output: ClassVar[bool] = False
    """Whether a step size may be one number for each output feature."""

    def __post_init__(self):
        name = type(self).__name__
        for count in ("num_iters", "num_outer", "num_inner"):
            if count in {field.name for field in dataclasses.fields(self)}:
                object.__setattr__(self, count, _checks.count(count, getattr(self, count)))
        _checks.count(f"num_iters of {name}", self._option("num_iters"))
        step_sizes.check(self._option("step_size"), per_output=self.per_output)
        resolved = canonical(self.derivative, stops=self.stops)
        if self.stochastic and isinstance(resolved, Implicit):
            what, wanted = "derivative", "'unrolled', 'remat' or Truncated(...)"
            if self.derivative is None:
                what, wanted = ("gap_tol" if self.tol is None else "tol"), "None"
            _checks.fail(f"{what} of {name}", wanted, getattr(self, what))
        for what in ("tol", "gap_tol"):
            if getattr(self, what) is not None:
                _checks.non_negative(what, getattr(self, what))
                _checks.rank(what, getattr(self, what), 0)

    # what a subclass defines

    def init(self, run: Run, z: Array) -> Any:
        """What is carried beside the iterate, before the first iteration from z."""
        return None

    @abc.abstractmethod
    def step(self, run: Run, k: Array, z: Array, memory: Any) -> Step:
        """Iteration k = 0, 1, … from z."""

    def estimator(self) -> Estimator:
        """The estimator of ∇F; the full gradient by default."""
        return Full()

    def default_step_size(self) -> StepSizeRule:
        """The rule where `step_size` is None."""
        return InverseLipschitz()

    def deterministic(self) -> "Solver":
        """The solver that takes this one's place where nothing is sampled, as in evaluation.

        By default this one, along the full gradient. It runs with this one's step sizes.
        """
        return self

    def check(self, problem: Any) -> None:  # noqa: B027 - nothing to refuse by default
        """Refuse problems that the algorithm is not for; called at trace time."""

    # what it has for free

    @property
    def stops(self) -> bool:
        """Whether a tolerance is given, so that examples may stop before the last iteration."""
        return self.tol is not None or self.gap_tol is not None

    def step_constant(self, problem: Problem) -> Array | None:
        """The problem constant that sets the step, L for 1/L; None for a fixed step."""
        rule = self.rule()
        return rule.constant(problem, self.estimator()) if isinstance(rule, StepSizeRule) else None

    def schedule(
        self,
        problem: Problem,
        step_constant: Array | None = None,
        *,
        deterministic: bool = False,
    ) -> Schedule:
        """k ↦ η_k of a solve; `step_constant` is what the method of that name returned."""
        estimator = self.estimator()
        if deterministic and self.constant_depends_on_sampling():
            estimator, step_constant = self._full_estimator(), None
        return step_sizes.schedule_of(self.rule(), problem, estimator, step_constant)

    def constant_depends_on_sampling(self) -> bool:
        """Whether steps of the sampling's constant are too long when nothing is sampled."""
        return False

    def takes_gradient_steps(self) -> bool:
        """Whether every iteration is prox_{ηg}(z − η ∇F(z)), so that theory bounds how it contracts."""
        return False

    def solve(
        self,
        key: Array | None,
        problem: Problem,
        *,
        init: Array | None = None,
        step_constant: Array | None = None,
        deterministic: bool = False,
        trace_objective: bool = False,
        certify: bool = False,
        pre_activation: bool = False,
    ) -> Solution:
        """Run the algorithm.

        Args:
          key: random key; iteration k uses `fold_in(key, k)`. None where nothing is sampled.
          problem: the layer's problem; for solvers that do not sample also a `FixedPointProblem`.
          init: z_0, zero by default.
          step_constant: what the method of that name returned, where the caller keeps it.
          deterministic: sample nothing: as many steps of the same sizes along the full gradient.
          trace_objective: also return P(z_k) for every iteration, which reads the input each time.
          certify: also return a bound on P(z_K) − min P.
          pre_activation: also return the w_K with prox_g(w_K) = z_K, from zero; with an implicit derivative
            both are those of one proximal gradient step further. z_K itself for a `FixedPointProblem`.

        Returns:
          `Solution`. A path of inputs, weights, steps, tolerances and options that are arrays compiles once.
        """
        if not isinstance(problem, LayerProblem if self.stochastic else Problem):
            wanted = "a LayerProblem" + ("" if self.stochastic else " or a FixedPointProblem")
            what = f"problem of {type(self).__name__}"
            _checks.fail(what, wanted, type(problem).__name__)
        deterministic = deterministic or not self.stochastic
        if key is None and not deterministic:
            _checks.fail("key", "a random key for a stochastic solver", None)
        if key is not None:
            _checks.random_key("key", key, "a random key, or None where nothing is sampled")
        self.check(problem)
        if isinstance(problem, LayerProblem):
            self.estimator().check(problem)
        traced, static = split_static(self)
        run = functools.partial(
            _solve,
            static=static,
            from_zero=init is None,
            deterministic=deterministic,
            trace_objective=trace_objective,
            pre_activation=pre_activation,
        )
        key = None if deterministic else key
        operands = traced, key, problem, _starting_point(problem, init), step_constant
        if is_explicit():
            solver = self.deterministic() if deterministic else self
            specs = _specs(problem, solver, trace_objective=trace_objective)
            if pre_activation:
                specs = dataclasses.replace(specs, pre_activation=specs.value)
            solution = automatic(run, specs, *operands)
        else:
            solution = run(*operands)
        if certify and solution.certificate is None:
            gap = lax.stop_gradient(problem.certificate(solution.value))
            solution = dataclasses.replace(solution, certificate=gap)
        return solution

    def rule(self) -> Any:
        """The step size, with its default: a number, a schedule or a `StepSizeRule`."""
        step_size = self._option("step_size")
        return self.default_step_size() if step_size is None else step_size

    def _option(self, name: str, default: Any = None) -> Any:
        """A field or attribute that a subclass may have."""
        return getattr(self, name, default)

    def _full_estimator(self) -> Estimator:
        return Full()

    def _num_gradients(self, from_zero: bool) -> int:
        """How often ∇F is evaluated in all its digits, for the choice of its form."""
        return self._option("num_iters")

    def _opening(self, run: Run) -> Run | None:
        """A run for the first iteration from zero that computes the same more cheaply, or None."""
        return None

    def _last_map(self, run: Run, iterations: Array | None) -> Any:
        """T, whose fixed points the last iterates are taken for, after so many iterations of each example."""
        if isinstance(run.problem, FixedPointProblem):
            return LayerMap(run.problem)
        schedule, last = run.step_size, self._option("num_iters") - 1
        step = lax.stop_gradient(jnp.minimum(schedule(0), schedule(last)))
        return ProxGradientMap(run.gradient, run.problem.proximal_term, step)

    def _iterate(
        self, run: Run, z: Array, *, derivative: Any, trace_objective: bool
    ) -> tuple[Array, LastPoint | None, Diagnostics, dict[str, Array]]:
        """All iterations: the last iterate, what it is the prox of, the diagnostics, and how it ended."""
        traced, static = split_static(self)

        def update(operands, k, z, memory):
            traced, run = operands
            memory, last = memory
            step = join_static(traced, static).step(run, k, z, memory)
            if not isinstance(step, Step):
                what = f"what {type(self).__name__}.step returns"
                _checks.fail(what, "a Step(value, memory)", type(step).__name__)
            return step._replace(memory=(step.memory, run.last_point(step, k, last)))

        def opening(operands, k, z, memory):
            traced, run = operands
            return update((traced, self._opening(run)), k, z, memory)

        cheap = run.from_zero and self._opening(run) is not None
        options: dict[str, Any] = {
            "memory": (self.init(run, z), run.first_point(z, per_entry=self.per_output)),
            "opening": opening if cheap else None,
            "trace_objective": trace_objective,
        }
        arguments = run.problem, update, (traced, run), z, self._option("num_iters")
        if not self.stops:
            z, (_, last), diagnostics = _loop.iterate(*arguments, derivative=derivative, **options)
            return z, last, diagnostics, {}
        tolerances = (
            None if tol is None else jnp.asarray(tol, z.dtype) for tol in (self.tol, self.gap_tol)
        )
        outcome = _loop.iterate_until(*arguments, *tolerances, from_zero=run.from_zero, **options)
        ends = {"status": outcome.status, "iterations": outcome.iterations}
        if outcome.certificate is not None:
            ends["certificate"] = outcome.certificate
        return outcome.value, None, outcome.diagnostics, ends


@functools.partial(
    jax.jit,
    static_argnames=("static", "from_zero", "deterministic", "trace_objective", "pre_activation"),
)
def _solve(
    traced: list[Any],
    key: Array | None,
    problem: Problem,
    z: Array,
    step_constant: Array | None,
    *,
    static: Any,
    from_zero: bool,
    deterministic: bool,
    trace_objective: bool,
    pre_activation: bool,
) -> Solution:
    def build(traced):
        given: Solver = join_static(traced, static)
        return given, given.deterministic() if deterministic else given

    given, solver = build(traced)
    schedule = given.schedule(problem, step_constant, deterministic=deterministic)
    estimator = Full()
    if not deterministic and isinstance(problem, LayerProblem):
        estimator = given.estimator().prepare(problem)
    calls = solver._num_gradients(from_zero)
    derivative = canonical(solver.derivative, stops=solver.stops)
    implicit = isinstance(derivative, Implicit)
    gradient = gradient_form(
        problem,
        solver._option("form", "auto"),
        num_calls=calls,
        differentiable=not (implicit or solver.stops),
    )
    keeps_point = pre_activation and not (implicit or solver.stops)
    run = Run(problem, gradient, estimator, schedule, key, from_zero, keeps_point)
    if not (implicit or solver.stops):
        value, last, diagnostics, ends = solver._iterate(
            run, z, derivative=derivative, trace_objective=trace_objective
        )
        solution = _solution(value, diagnostics, ends)
        if last is None:
            return solution
        w = problem.proximal_term.pre_activation(*last)
        return dataclasses.replace(solution, pre_activation=w)
    _, frozen = build(lax.stop_gradient(traced))
    value, _, diagnostics, ends = frozen._iterate(
        *lax.stop_gradient((run, z)), derivative=None, trace_objective=trace_objective
    )
    step_map = solver._last_map(run, ends.get("iterations"))
    if implicit:
        step_map = halved(step_map)
        value = fixed_point(step_map, value, derivative, len(problem.batch_shape))
    else:
        assert isinstance(derivative, Truncated)  # nothing else where a solver stops
        value = repeated(step_map, value, derivative.num_iters - pre_activation)
    w = None
    if pre_activation:
        point = step_map.point(value)
        value = problem.proximal_term.prox(point, step_map.step)
        w = problem.proximal_term.pre_activation(point, step_map.step)
    if (pre_activation or not implicit) and "certificate" in ends:  # of the value before
        ends["certificate"] = lax.stop_gradient(problem.certificate(value))
    return dataclasses.replace(_solution(value, diagnostics, ends), pre_activation=w)


def _solution(value: Array, diagnostics: Diagnostics, ends: dict[str, Array]) -> Solution:
    finite = jnp.all(diagnostics.finite, axis=0)
    return Solution(value, diagnostics.residual, diagnostics.objective, finite, **ends)


def _specs(problem: Problem, solver: Solver, *, trace_objective: bool) -> Solution:
    """How a solution is split over an explicit mesh: as the problem says of z."""
    axes = problem.value_spec()
    value = jax.sharding.PartitionSpec(*axes)
    batch = jax.sharding.PartitionSpec(*axes[: len(problem.batch_shape)])
    of_all = jax.sharding.PartitionSpec(None, *batch)
    ends = {"status": batch, "iterations": batch} if solver.stops else {}
    if solver.gap_tol is not None:
        ends["certificate"] = batch
    return Solution(value, of_all, of_all if trace_objective else None, batch, **ends)  # pyright: ignore


def _starting_point(problem: Problem, init: Array | None) -> Array:
    """z_0: zero, or the user's point in the problem's shape and dtype."""
    if init is None:
        return jnp.zeros(problem.shape, problem.dtype)
    _checks.floating("init", init)
    if jnp.shape(init) != problem.shape:
        _checks.fail("shape of init", f"{problem.shape}", jnp.shape(init))
    return jnp.asarray(init, problem.dtype)
