"""Sequential averaging: of all fixed points, the one of least prior."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from stochsolvers import _checks
from stochsolvers._typing import Array, Scalar, static_field, value_object
from stochsolvers.solvers._base import Solver
from stochsolvers.solvers._loop import Step
from stochsolvers.solvers._run import Run
from stochsolvers.step_sizes import StepSizeLike


@value_object
class SequentialAveraging(Solver):
    r"""The sequential averaging method: of the fixed points of T, the one where R is least.

    z_{k+1} = β_k S(z_k) + (1 − β_k) T(z_k),     S(z) = z − s ∇R(z),     β_k = min(2/((k + 1)(1 − c)), 1)

    for k = 0, 1, …, with T as in `FixedPoint` and S a contraction of factor c < 1. It converges to
    argmin {R(z) : z = T(z)} at the rate O(1/k) for every T with ||T(a) − T(b)|| ≤ ||a − b|| that has a fixed
    point. For a μ-strongly convex R with an L_R-Lipschitz gradient and s ≤ 2/(L_R + μ), S contracts by
    c = sqrt(1 − 2 s μ L_R/(L_R + μ)); for R(z) = ½||z − a||² by |1 − s|.

    Where β_k = 1 the start is forgotten. The solution's derivatives with a tolerance are those of the fixed
    point of the last averaged map; they tend to those of the limit as β_k does to 0.

    Args:
      gradient: ∇R, a function of z; a value with arrays, such as a `jax.tree_util.Partial`, where derivatives
        are to reach them.
      prior_step: s > 0.
      contraction: c, in [0, 1).
      num_iters: K ≥ 1, the cap where a tolerance is given.
      tol: stop an example where β_k ||S(z_k) − T(z_k)|| ≤ tol max(1, ||z_{k+1}||), which takes about 1/tol
        iterations: the left side, ||z_{k+1} − T(z_k)||, goes to zero as β_k does.
      step_size: that of T: a number, a schedule, a rule, or None for 1/L, which is 1 for problems z = h(z).
      derivative: as for every solver.

    References:
      Xu 2004, Viscosity approximation methods for nonexpansive mappings; Sabach and Shtern 2017, A first
      order method for solving convex bilevel optimization problems; Xie et al. 2023.
    """

    gradient: Callable[[Array], Array]
    prior_step: Scalar
    contraction: Scalar
    num_iters: int = static_field(kw_only=True)
    step_size: StepSizeLike = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        if not callable(self.gradient):
            _checks.fail("gradient", "a function of z", repr(self.gradient))
        _checks.positive("prior_step", self.prior_step)
        _checks.rank("prior_step", self.prior_step, 0)
        _checks.non_negative("contraction", self.contraction)
        _checks.rank("contraction", self.contraction, 0)
        if isinstance(self.contraction, int | float) and self.contraction >= 1:
            _checks.fail("contraction", "a number < 1", self.contraction)

    def step(self, run: Run, k: Array, z: Array, memory: Any) -> Step:
        """The average of S(z) and T(z)."""
        value = run.prox(run.gradient_step(z, k), k)
        weight = self._weight(k + 1, z.dtype)
        chosen = _descend(z, self.gradient, self.prior_step)
        return Step(weight * chosen + (1 - weight) * value, memory, origin=value)

    def _weight(self, count: Array | int, dtype: Any) -> Array:
        """β after `count` iterations."""
        count, contraction = (jnp.asarray(a, dtype) for a in (count, self.contraction))
        return jnp.minimum(2 / (count * (1 - contraction)), 1)

    def _last_map(self, run: Run, iterations: Array | None) -> "AveragedMap":
        count = self.num_iters if iterations is None else iterations
        weight = lax.stop_gradient(self._weight(count, run.problem.dtype))
        gradient: Any = self.gradient
        if jax.tree_util.all_leaves([gradient]):  # a function
            gradient = jax.tree_util.Partial(gradient)
        return AveragedMap(gradient, self.prior_step, super()._last_map(run, iterations), weight)


@value_object
class AveragedMap:
    """z ↦ β S(z) + (1 − β) T(z), one β for each example."""

    gradient: Any
    prior_step: Scalar
    step_map: Any
    weight: Array
    symmetric: ClassVar[bool] = False

    def point(self, z: Array) -> Array:
        """Refused: an average is no value of a prox."""
        _checks.fail("pre_activation of SequentialAveraging", False, True)

    def __call__(self, z: Array) -> Array:
        """The average of S(z) and T(z)."""
        weight = jnp.expand_dims(self.weight, range(self.weight.ndim, z.ndim))
        return weight * _descend(z, self.gradient, self.prior_step) + (1 - weight) * self.step_map(
            z
        )


def _descend(z: Array, gradient: Callable[[Array], Array], step: Scalar) -> Array:
    """S(z) = z − s ∇R(z)."""
    return z - jnp.asarray(step, z.dtype) * gradient(z)
