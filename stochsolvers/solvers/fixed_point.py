"""The fixed-point iteration itself."""

import dataclasses
from typing import Any

from stochsolvers._typing import Array, static_field, value_object
from stochsolvers.solvers._base import Solver
from stochsolvers.solvers._loop import Step
from stochsolvers.solvers._run import Run
from stochsolvers.step_sizes import StepSizeLike


@value_object
class FixedPoint(Solver):
    r"""The iteration z ← T(z), `num_iters` times.

    T is h for a problem z = h(z), and the proximal gradient step T(z) = prox_{ηg}(z − η ∇F(z)) for a layer's
    problem, of which this is `ProxGD` without momentum. With a step size η the former is (1 − η) z + η h(z).

    Args:
      num_iters: K ≥ 1, the cap where a tolerance is given.
      tol, gap_tol: where to stop, see `prox_gd`.
      step_size: η: a number, a schedule, a rule, or None for 1/L, which is 1 for problems z = h(z).
      derivative: "unrolled", "remat", `Truncated(n)`, "implicit" or `Implicit(...)`; None is unrolled,
        implicit where a tolerance is given.

    References:
      Xie et al. 2023; Bai, Kolter and Koltun 2019.
    """

    num_iters: int = static_field()
    step_size: StepSizeLike = dataclasses.field(default=None, kw_only=True)

    def step(self, run: Run, k: Array, z: Array, memory: Any) -> Step:
        """T(z)."""
        point = run.gradient_step(z, k)
        return Step(run.prox(point, k), memory, point)

    def takes_gradient_steps(self) -> bool:
        """True."""
        return True

    def _num_gradients(self, from_zero: bool) -> int:
        return self.num_iters - from_zero

    def _opening(self, run: Run) -> Run | None:
        return run.at_zero()
