r"""Step sizes: numbers, schedules k -> η_k, and rules that compute them from a problem.

Every solver takes any of these as `step_size`, and `schedule_of` makes one schedule of them. A rule
computes a
constant of the problem, such as L, and from it the steps; a layer keeps the constant from one input to the
next.

References:
  Bibi et al. 2019, section 4; Gorbunov, Hanzely and Richtárik, A unified theory of SGD, AISTATS 2020.
"""

import abc
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from stochsolvers import _checks
from stochsolvers._typing import Array, Scalar, as_float, static_field, value_object
from stochsolvers.estimators import Estimator, OutputCoordinates
from stochsolvers.lipschitz import Grid, lipschitz_constant
from stochsolvers.problems import FixedPointProblem, LayerProblem, NormalizedProblem, Problem


@value_object
class Constant:
    """η_k = value for every k; a number, or one for each output feature."""

    value: Array

    def __call__(self, k: Array | int) -> Array:
        """The step size of iteration k."""
        return self.value


@value_object
class ExponentialDecay:
    """η_k = initial · rate^k, callable with the iteration k = 0, 1, …."""

    initial: Scalar
    rate: Scalar

    def __post_init__(self):
        _checks.positive("initial step size", self.initial)
        _checks.positive("rate of exponential_decay", self.rate)

    def __call__(self, k: Array | int) -> Array:
        """The step size of iteration k."""
        rate, k = jnp.broadcast_arrays(jnp.asarray(as_float(self.rate)), jnp.asarray(k))
        return self.initial * lax.pow(rate, k)  # of a float and an integer: no promotion


def exponential_decay(initial: Scalar, rate: Scalar) -> ExponentialDecay:
    r"""The paper's schedule η_k = η_0 ρ^k.

    Args:
      initial: η_0 > 0, 1/L in the paper. May be traced.
      rate: ρ > 0, at most 1 for a decay. May be traced.

    References:
      Bibi et al. 2019, section 4; Bottou 2012.
    """
    return ExponentialDecay(initial, rate)


class StepSizeRule(abc.ABC):
    """A step size that is a function of a constant of the problem, which depends on no input.

    A layer computes the constant once for many inputs; a solver, where it is not given. A rule of your own
    is a subclass under `stochsolvers.value_object` with these two methods.
    """

    @abc.abstractmethod
    def constant(self, problem: Problem, estimator: Estimator) -> Array:
        """The constant that sets the step, from the problem's linear map, loss and ridge alone."""

    @abc.abstractmethod
    def schedule(self, constant: Array, problem: Problem) -> Callable[[Array], ArrayLike]:
        """k -> η_k, given the constant."""


@value_object
class InverseLipschitz(StepSizeRule):
    r"""η_k = scale · decay^k / (L_ℓ L + λ), with L of lemma 2: the paper's choice.

    Safe for the full gradient on `grid="padded"`. For a small τ/n1 it is far too long, and the iterates can
    grow until the decay makes them contract; `InverseExpectedSmoothness` is the step that theory supports
    there.

    Args:
      scale: a factor on the step, traced.
      decay: a factor for each iteration, traced.
      grid: the grid on which L is computed, see `lipschitz_constant`.
    """

    scale: Scalar = 1.0
    decay: Scalar = 1.0
    grid: Grid = static_field(default="layer", kw_only=True)

    def __post_init__(self):
        _checks.positive("scale", self.scale)
        _checks.rank("scale", self.scale, 0)
        _checks.positive("decay", self.decay)
        _checks.rank("decay", self.decay, 0)

    def constant(self, problem: Problem, estimator: Estimator) -> Array:
        """L = λ_max(A A*); 1 for problems z = h(z)."""
        if isinstance(problem, FixedPointProblem):
            return jnp.ones((), problem.dtype)
        if isinstance(problem, NormalizedProblem) and self.grid == "layer":
            return problem.squared_norm()
        return lipschitz_constant(_layer(self, problem).linear_map, grid=self.grid)

    def schedule(self, constant: Array, problem: Problem) -> Callable[[Array], ArrayLike]:
        """k -> η_k."""
        smoothness = problem.smoothness(jnp.asarray(constant, problem.dtype))
        return _inverse(smoothness, self.scale, self.decay, problem)


@value_object
class InverseExpectedSmoothness(StepSizeRule):
    r"""η_k = scale · decay^k / 𝓛 with the estimator's expected smoothness 𝓛, on the padded grid.

    Args:
      scale: a factor on the step; ½ is the theorem's.
      decay: a factor for each iteration.

    References:
      Gorbunov, Hanzely and Richtárik 2020, A unified theory of SGD, theorem 4.1 (proximal steps).
    """

    scale: Scalar = 0.5
    decay: Scalar = 1.0

    def __post_init__(self):
        _checks.positive("scale", self.scale)
        _checks.rank("scale", self.scale, 0)
        _checks.positive("decay", self.decay)
        _checks.rank("decay", self.decay, 0)

    def constant(self, problem: Problem, estimator: Estimator) -> Array:
        """𝓛, the ridge included."""
        return estimator.expected_smoothness(_layer(self, problem))

    def schedule(self, constant: Array, problem: Problem) -> Callable[[Array], ArrayLike]:
        """k -> η_k."""
        return _inverse(constant, self.scale, self.decay, problem)


@value_object
class InverseSeparable(StepSizeRule):
    r"""Step sizes scale / v_j for each output j, with v of the sampling's ESO.

    v_j = β L + (1 − β) ||(A A*)_jj|| + λ, β = (τ−1)/(n2−1), on the padded grid.

    References:
      Richtárik and Takáč 2016, On optimal probabilities in stochastic coordinate descent methods.
    """

    scale: Scalar = 1.0

    def __post_init__(self):
        _checks.positive("scale", self.scale)
        _checks.rank("scale", self.scale, 0)

    def constant(self, problem: Problem, estimator: Estimator) -> Array:
        """The v_j, shape (n2,)."""
        if not isinstance(estimator, OutputCoordinates):
            _checks.fail("InverseSeparable", "OutputCoordinates", type(estimator).__name__)
        return estimator.separable_constants(_layer(self, problem))

    def schedule(self, constant: Array, problem: Problem) -> Constant:
        """k -> scale / v, shape (n2,), the same for every k."""
        return Constant(_safe_inverse(constant, self.scale))


StepSizeLike: TypeAlias = ArrayLike | Callable[[Array], ArrayLike] | StepSizeRule | None


def check(step_size: StepSizeLike, *, per_output: bool = False) -> None:
    """Require a rule, a schedule, a positive number or None; one number for each output if `per_output`."""
    wanted = "a number > 0, a function k -> step, a rule or None"
    if isinstance(step_size, type):  # callable, and no schedule
        _checks.fail("step_size", wanted, _checks.named(step_size))
    if step_size is None or callable(step_size) or isinstance(step_size, StepSizeRule):
        return
    _checks.positive("step_size", step_size, wanted)
    if not per_output:
        _checks.rank("step_size", step_size, 0)


@value_object
class Schedule:
    """k -> η_k in a problem's dtype, as a value that carries all it depends on."""

    steps: Any
    dtype: Any = static_field()

    def __call__(self, k: Array | int) -> Array:
        """The step size of iteration k."""
        return jnp.asarray(self.steps(k), self.dtype)


def schedule_of(
    step_size: StepSizeLike,
    problem: Problem,
    estimator: Estimator,
    constant: Array | None = None,
) -> Schedule:
    """Any step size as k -> η_k in the problem's dtype.

    Args:
      step_size: what a solver was given; None is `InverseLipschitz()`.
      problem: the layer's problem.
      estimator: of its gradient.
      constant: what the rule's `constant` returned, where the caller keeps it.
    """
    check(step_size, per_output=True)
    _checks.instance("problem of schedule_of", problem, Problem, "a Problem")
    steps: Any = InverseLipschitz() if step_size is None else step_size
    if isinstance(steps, StepSizeRule):
        _checks.instance("estimator of schedule_of", estimator, Estimator, "an Estimator")
        constant = steps.constant(problem, estimator) if constant is None else constant
        steps = steps.schedule(constant, problem)
    if not callable(steps):
        steps = Constant(jnp.asarray(steps))
    if not jax.tree.leaves(steps) or jax.tree.leaves(steps) == [steps]:  # a function
        steps = jax.tree_util.Partial(steps)
    return Schedule(steps, problem.dtype)


def _inverse(constant: Array, scale: Scalar, decay: Scalar, problem: Problem) -> ExponentialDecay:
    """k -> scale · decay^k / constant."""
    initial = _safe_inverse(jnp.asarray(constant, problem.dtype), scale)
    steps = object.__new__(ExponentialDecay)  # a step that is no number is reported, not raised
    object.__setattr__(steps, "initial", initial)
    object.__setattr__(steps, "rate", jnp.asarray(decay, problem.dtype))
    return steps


def _layer(rule: StepSizeRule, problem: Problem) -> LayerProblem:
    """The problem, which has to be a layer's."""
    if not isinstance(problem, LayerProblem):
        _checks.fail(f"problem of {type(rule).__name__}", "a LayerProblem", type(problem).__name__)
    return problem


def _safe_inverse(constant: Array, scale: Scalar) -> Array:
    """Scale / constant.

    A map that is zero has no curvature to set a step: any will do, and `scale` is one. With a constant
    that overflows the step would be 0, and an iterate that does not move would pass for a solution: NaN.
    """
    known = jnp.isfinite(constant) & (constant > 0)
    step = scale / jnp.where(known, constant, 1)
    return jnp.where(jnp.isfinite(constant), step, jnp.nan)
