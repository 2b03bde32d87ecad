"""NSync: randomised proximal coordinate descent over the output features."""

from typing import Any, ClassVar

import jax.numpy as jnp

from stochsolvers import _checks
from stochsolvers._typing import Array, count_field, static_field, value_object
from stochsolvers.estimators import OutputCoordinates, feature_axis
from stochsolvers.problems import LayerProblem
from stochsolvers.sampling import canonical_tau
from stochsolvers.solvers._base import Solver
from stochsolvers.solvers._loop import Step
from stochsolvers.solvers._run import Run
from stochsolvers.solvers._solution import Solution
from stochsolvers.solvers.derivatives import DerivativeLike
from stochsolvers.solvers.gradient_descent import ProxGD
from stochsolvers.step_sizes import InverseLipschitz, InverseSeparable, StepSizeLike


@value_object
class NSync(Solver):
    r"""Proximal coordinate descent, z_j ← prox_{g/v_j}(z_j − ∇_j F(z)/v_j) for j in a τ-nice S; see `nsync`.

    Args:
      tau: τ of n2: a count (int, an array may be traced) or a fraction (float).
      num_iters: K ≥ 1.
      step_size: a number, (n2,) of them, a schedule or a rule; None for `InverseSeparable()`. Proposition 6
        takes 1.0, with one iteration.
      derivative: "unrolled", "remat" or `Truncated(n)`.

    References:
      Richtárik and Takáč 2016; Bibi et al. 2019, proposition 6.
    """

    tau: int | float | Array = count_field()
    num_iters: int = static_field()
    step_size: StepSizeLike = None
    stochastic: ClassVar[bool] = True
    per_output: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "tau", canonical_tau(self.tau))

    def step(self, run: Run, k: Array, z: Array, memory: Any) -> Step:
        """The coordinates of S move; from zero all of them enter the domain of g."""
        step = run.step_size(k)
        if step.ndim:
            _checks.trailing("step_size", step, (run.problem.linear_map.out_features,))
            step = jnp.expand_dims(step, range(z.ndim - 1))
        drawn = run.estimator.draw(run.fold_key(k), run.problem, z)
        mask = feature_axis(drawn, run.problem, outputs=True)
        point = z - step * jnp.where(mask, run.gradient(z), 0.0)
        touched = mask | (k == 0) if run.from_zero else mask
        value = jnp.where(touched, run.problem.prior.prox(point, step), z)
        return Step(value, memory, point, moved=touched)

    def estimator(self) -> OutputCoordinates:
        """τ-nice sampling of the outputs."""
        return OutputCoordinates(self.tau)

    def default_step_size(self) -> InverseSeparable:
        """1/v_j of the sampling's expected separable overapproximation."""
        return InverseSeparable()

    def deterministic(self) -> ProxGD:
        """As many steps of `ProxGD`."""
        return ProxGD(self.num_iters, derivative=self.derivative)

    def constant_depends_on_sampling(self) -> bool:
        """True for rules of the sampling: all coordinates at once allow shorter steps only."""
        return not isinstance(self.step_size, InverseLipschitz)

    def check(self, problem: LayerProblem) -> None:
        """Refuse priors that are not separable."""
        if not problem.prior.separable:
            _checks.fail("prior of nsync", "a separable prior", type(problem.prior).__name__)

    def _full_estimator(self) -> OutputCoordinates:
        return OutputCoordinates(1.0)


def nsync(
    key: Array,
    problem: LayerProblem,
    *,
    tau: int | float | Array,
    num_iters: int,
    step_size: StepSizeLike = None,
    init: Array | None = None,
    derivative: DerivativeLike = None,
    trace_objective: bool = False,
    certify: bool = False,
) -> Solution:
    r"""Proximal coordinate descent, z_j ← prox_{g/v_j}(z_j − ∇_j F(z)/v_j) for j in a τ-nice S.

    Coordinates outside S stay. From z = 0 with v = 1, one iteration is prox_g(m ⊙ (A x + b)): the linear
    map, then dropout of exactly n2 − τ outputs without rescaling, then the activation (proposition
    6). As printed, the proposition applies the prox to all coordinates at every iteration, which
    moves the fixed point; here only the first iteration from the default start does, so that the
    start enters the domain of g.

    Args:
      key: random key; iteration k uses `fold_in(key, k)`.
      problem: the layer's problem; its prior must be separable.
      tau: τ of n2: a count (int, may be traced) or a fraction of n2 (float).
      num_iters: number of iterations, static, ≥ 1.
      step_size: 1/v_j: a number, one for each output (n2,), k -> step, or a rule; None for
        `InverseSeparable()`, the step that theory supports. Proposition 6 takes 1.0.
      init: z_0, zero by default.
      derivative: "unrolled" (the default), "remat" or `Truncated(n)`; see `solvers.derivatives`.
      trace_objective: also return P(z_k) for every iteration.
      certify: also return a bound on P(z_K) − min P.

    Raises:
      ValueError: at trace time, for a prior that is not separable, τ outside 1..n2, and as in
        `prox_gd`.

    References:
      Richtárik and Takáč 2016; Bibi et al. 2019, proposition 6, eq. 32.
    """
    solver = NSync(tau, num_iters, step_size, derivative=derivative)
    return solver.solve(key, problem, init=init, trace_objective=trace_objective, certify=certify)
