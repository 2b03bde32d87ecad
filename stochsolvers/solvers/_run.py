"""What the steps of one solve are made from, and what they keep for a pre-activation."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from stochsolvers import _checks
from stochsolvers._typing import Array, static_field, value_object
from stochsolvers.estimators import Estimator, Full
from stochsolvers.estimators.forms import Gradient, ResidualGradient
from stochsolvers.solvers._loop import Step
from stochsolvers.step_sizes import Schedule


@value_object
class Run:
    """What the steps of one solve are made from; derivatives pass through all of it.

    Attributes:
      problem: what is solved, a `LayerProblem` or a `FixedPointProblem`.
      gradient: z ↦ ∇F(z), in the form that the solver asks for.
      estimator: of ∇F; the full gradient where nothing is sampled.
      step_size: k ↦ η_k.
      key: random key, or None.
      from_zero: whether the run starts at the default point, zero.
      keeps_point: whether the last point before the prox is kept, for a pre-activation.
    """

    problem: Any
    gradient: Any
    estimator: Estimator
    step_size: Schedule
    key: Array | None
    from_zero: bool = static_field(default=False)
    keeps_point: bool = static_field(default=False)

    def fold_key(self, k: Array | int) -> Array:
        """The key of iteration k."""
        if self.key is None:
            _checks.fail("key", "a random key for a stochastic solver", None)
        return jax.random.fold_in(self.key, k)

    def estimate(self, k: Array, z: Array) -> Array:
        """An unbiased estimate of ∇F(z) from the draw of iteration k; ∇F(z) where nothing is sampled."""
        if isinstance(self.estimator, Full):
            return self.gradient(z)
        return self.estimator(self.fold_key(k), self.problem, z)

    def gradient_step(self, z: Array, k: Array | int) -> Array:
        """z − η_k ∇F(z); (1 − η_k) z + η_k h(z), which is h(z) at η_k = 1, of a problem z = h(z)."""
        step = self.step_size(k)
        if step.ndim:  # one for each output feature, as of the solver in whose place this one runs
            step = jnp.expand_dims(step, range(z.ndim - step.ndim))
        if isinstance(self.gradient, ResidualGradient):
            return (1 - step) * z + step * self.gradient.problem.next_point(z)
        return z - step * self.gradient(z)

    def at_zero(self) -> "Run | None":
        """The run for an iteration from zero; None where the gradient is no cheaper there."""
        if isinstance(self.gradient, ResidualGradient):
            return None
        return dataclasses.replace(self, gradient=_AtZero(self.gradient))

    def prox(self, point: Array, k: Array | int) -> Array:
        """prox_{η_k g}(point)."""
        return self.problem.proximal_term.prox(point, self.step_size(k))

    def first_point(self, z: Array, *, per_entry: bool) -> "LastPoint | None":
        """What is kept before the first iteration; `per_entry`: where single entries stay behind."""
        if not self.keeps_point:
            return None
        step = jnp.ones_like(self.step_size(0))
        return LastPoint(z, jnp.broadcast_to(step, z.shape) if per_entry else step)

    def last_point(self, step: Step, k: Array, before: "LastPoint | None") -> "LastPoint | None":
        """What is kept after iteration k."""
        if before is None:
            return None
        if step.point is None:
            _checks.fail("point of the solver's Step, for a pre-activation", "an array", None)
        now = LastPoint(step.point, jnp.broadcast_to(self.step_size(k), before.step.shape))
        moved = step.moved
        return now if moved is None else jax.tree.map(lambda *p: jnp.where(moved, *p), now, before)


@value_object
class _AtZero:
    """∇F(0), whatever the argument."""

    gradient: Gradient

    def __call__(self, z: Array) -> Array:
        return self.gradient.at_zero()


class LastPoint(NamedTuple):
    """The last point before the prox, and the step size there."""

    point: Array
    step: Array
