r"""Step sizes: numbers, schedules k -> η_k, and rules that read them off a problem.

Every solver takes any of these as `step_size`. A rule names a constant of the problem; a layer that
has a Lipschitz constant at hand passes it to the rule, which then computes nothing.
"""

import abc
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from stochsolvers import _checks
from stochsolvers._typing import Array, Scalar, static_field, value_object
from stochsolvers.estimators import Estimator
from stochsolvers.lipschitz import Grid, lipschitz_constant
from stochsolvers.problems import LayerProblem


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
        return self.initial * jnp.asarray(self.rate) ** k


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
    """A step size that is read off a constant of the problem, which depends on no input.

    A layer computes the constant once for many inputs; a solver, where it is not given.
    """

    @abc.abstractmethod
    def constant(self, problem: LayerProblem, estimator: Estimator) -> Array:
        """What the step is read off, from the problem's linear map and ridge alone."""

    @abc.abstractmethod
    def schedule(self, constant: Array, problem: LayerProblem) -> Callable[[Array], ArrayLike]:
        """k -> η_k, given the constant."""


@value_object
class InverseLipschitz(StepSizeRule):
    r"""η_k = scale · decay^k / (L + λ), with L of lemma 2: the paper's choice.

    Safe for the full gradient. For a small τ/n1 it is far too long, and the iterates can grow before
    the decay tames them; `InverseExpectedSmoothness` is the step that theory supports there.

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
        _checks.positive("decay", self.decay)

    def constant(self, problem: LayerProblem, estimator: Estimator) -> Array:
        """L = λ_max(A A*)."""
        return lipschitz_constant(problem.linear_map, grid=self.grid)

    def schedule(self, constant: Array, problem: LayerProblem) -> Callable[[Array], ArrayLike]:
        """k -> η_k."""
        return _inverse(constant + jnp.asarray(problem.ridge), self.scale, self.decay, problem)


@value_object
class InverseExpectedSmoothness(StepSizeRule):
    r"""η_k = scale · decay^k / 𝓛 with the estimator's expected smoothness 𝓛, on the padded grid.

    Args:
      scale: a factor on the step; ½ is the theorem's.
      decay: a factor for each iteration.

    References:
      Gower et al. 2019, SGD: general analysis and improved rates, theorem 3.1.
    """

    scale: Scalar = 0.5
    decay: Scalar = 1.0

    def __post_init__(self):
        _checks.positive("scale", self.scale)
        _checks.positive("decay", self.decay)

    def constant(self, problem: LayerProblem, estimator: Estimator) -> Array:
        """𝓛, the ridge included."""
        return estimator.expected_smoothness(problem)

    def schedule(self, constant: Array, problem: LayerProblem) -> Callable[[Array], ArrayLike]:
        """k -> η_k."""
        return _inverse(constant, self.scale, self.decay, problem)


StepSizeLike: TypeAlias = ArrayLike | Callable[[Array], ArrayLike] | StepSizeRule | None


def as_steps(step_size: StepSizeLike, *, per_output: bool = False) -> Any:
    """Any step size as a pytree: a rule, or a callable k -> η_k. None is `InverseLipschitz()`.

    Numbers are checked here, where they may still be concrete.
    """
    if step_size is None:
        return InverseLipschitz()
    if isinstance(step_size, StepSizeRule | Constant | ExponentialDecay):
        return step_size
    if callable(step_size):
        return jax.tree_util.Partial(step_size)
    _checks.positive("step_size", step_size)
    if not per_output:
        _checks.rank("step_size", step_size, 0)
    return Constant(jnp.asarray(step_size))


@value_object
class Schedule:
    """k -> η_k in a problem's dtype, as a value that carries all it depends on."""

    steps: Any
    dtype: Any = static_field()

    def __call__(self, k: Array | int) -> Array:
        """The step size of iteration k."""
        return jnp.asarray(self.steps(k), self.dtype)


def as_schedule(steps: Any, problem: LayerProblem, estimator: Estimator) -> Schedule:
    """What `as_steps` returned as k -> η_k in the problem's dtype."""
    if isinstance(steps, StepSizeRule):
        steps = steps.schedule(steps.constant(problem, estimator), problem)
    return Schedule(steps, problem.dtype)


def _inverse(constant, scale, decay, problem: LayerProblem) -> ExponentialDecay:
    # a map that is zero has no curvature to set a step: any will do, and 1 keeps it finite; with one
    # that overflows the step would be 0, and an iterate that does not move would pass for a solution
    constant = jnp.asarray(constant, problem.dtype)
    initial = scale / jnp.where(jnp.isfinite(constant), constant, jnp.nan)
    return ExponentialDecay(jnp.where(constant == 0, 1.0, initial), decay)
