"""Anderson acceleration of the fixed-point iteration."""

import dataclasses
from typing import Any

from stochsolvers import _checks
from stochsolvers._typing import Array, static_field, value_object
from stochsolvers.solvers._base import Solver
from stochsolvers.solvers._loop import Step, unit_of
from stochsolvers.solvers._mixing import mix, no_history
from stochsolvers.solvers._run import Run
from stochsolvers.step_sizes import StepSizeLike


@value_object
class Anderson(Solver):
    r"""Anderson acceleration of z ← T(z), of type II, for each example by itself.

    z_{k+1} = T(y_k),     y_{k+1} = Σ_i α_i T(y_i),     α = argmin_{Σ α = 1} ||Σ_i α_i (T(y_i) − y_i)||²

    over the last `memory` points i, with T as in `FixedPoint`. An iteration evaluates T once. A mixed point
    whose residual ||T(y) − y|| is larger than the last one's is refused: the example goes on from T of the
    last, by some plain steps, and the points before are forgotten. See `solvers._mixing` for the linear
    systems and for round-off.

    Args:
      num_iters: K ≥ 1, the cap where a tolerance is given.
      tol, gap_tol: where to stop, see `prox_gd`.
      memory: the most points that are mixed, ≥ 1; 1 is `FixedPoint`.
      step_size: a number, a schedule, a rule, or None for 1/L.
      derivative: "unrolled", "remat", `Truncated(n)`, "implicit" or `Implicit(...)`; None is unrolled,
        implicit where a tolerance is given.

    References:
      Anderson 1965; Walker and Ni 2011.
    """

    num_iters: int = static_field()
    memory: int = static_field(default=5, kw_only=True)
    step_size: StepSizeLike = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "memory", _checks.count("memory", self.memory))

    def init(self, run: Run, z: Array) -> Any:
        """y_0 and no history."""
        unit = unit_of(run.problem, None if run.from_zero else z)
        return z, no_history(z, unit, self.memory)

    def step(self, run: Run, k: Array, z: Array, memory: Any) -> Step:
        """T at the mixed point, and the next mixed point."""
        y, history = memory
        point = run.gradient_step(y, k)
        value = run.prox(point, k)
        history, following = mix(history, k, y, value)
        return Step(value, (following, history), point, origin=y)

    def _num_gradients(self, from_zero: bool) -> int:
        return self.num_iters - from_zero

    def _opening(self, run: Run) -> Run | None:
        return run.at_zero()
