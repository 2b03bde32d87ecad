"""NSync: randomised proximal coordinate descent over the output features."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from stochsolvers import _checks
from stochsolvers._typing import Array, Scalar, value_object
from stochsolvers.estimators import Estimator, OutputCoordinates, feature_axis
from stochsolvers.problems import LayerProblem
from stochsolvers.sampling import num_sampled
from stochsolvers.solvers import _loop
from stochsolvers.solvers._loop import Solution, Step
from stochsolvers.solvers.derivatives import DerivativeLike, Unrolling, unrolling
from stochsolvers.solvers.step_sizes import (
    Constant,
    StepSizeLike,
    StepSizeRule,
    as_schedule,
    as_steps,
)


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

    def constant(self, problem: LayerProblem, estimator: Estimator) -> Array:
        """The v_j, shape (n2,)."""
        if not isinstance(estimator, OutputCoordinates):
            _checks.fail("InverseSeparable", "OutputCoordinates", type(estimator).__name__)
        return estimator.separable_constants(problem)

    def schedule(self, constant: Array, problem: LayerProblem) -> Constant:
        """k -> scale / v, shape (n2,), the same for every k."""
        safe = jnp.where(constant > 0, constant, 1.0)
        return Constant(jnp.where(constant > 0, self.scale / safe, 1.0))


def nsync(
    key: Array,
    problem: LayerProblem,
    *,
    tau: int | float | Array,
    num_iters: int,
    step_size: StepSizeLike = 1.0,
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
      step_size: 1/v_j: a number, one for each output (n2,), k -> step, or a rule;
        `InverseSeparable()` is the step that theory supports.
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
    num_iters = _checks.count("num_iters", num_iters)
    if not problem.prior.separable:
        _checks.fail("prior of nsync", "a separable prior", type(problem.prior).__name__)
    coordinates = OutputCoordinates(tau)
    num_sampled(tau, problem.linear_map.out_features)
    solution = _nsync(
        key,
        problem,
        coordinates,
        as_steps(step_size, per_output=True),
        _loop.starting_point(problem, init),
        unrolling(derivative, "nsync"),
        num_iters=num_iters,
        enter_domain=init is None,
        trace_objective=trace_objective,
    )
    return _loop.certified(problem, solution) if certify else solution


@functools.partial(jax.jit, static_argnames=("num_iters", "enter_domain", "trace_objective"))
def _nsync(
    key: Array,
    problem: LayerProblem,
    coordinates: OutputCoordinates,
    steps: Any,
    z0: Array,
    derivative: Unrolling,
    *,
    num_iters: int,
    enter_domain: bool,
    trace_objective: bool,
) -> Solution:
    schedule = as_schedule(steps, problem, coordinates)

    def update(operands, k, z, memory):
        problem, schedule = operands
        step = schedule(k)
        if step.ndim:
            _checks.trailing("step_size", step, (problem.linear_map.out_features,))
        mask = feature_axis(coordinates.draw(jax.random.fold_in(key, k), problem, z), problem)
        point = z - step * jnp.where(mask, problem.gradient(z), 0.0)
        touched = mask | (k == 0) if enter_domain else mask
        value = jnp.where(touched, problem.prior.prox(point, step), z)
        return Step(value, memory, point)

    z, diagnostics = _loop.iterate(
        problem,
        update,
        (problem, schedule),
        z0,
        num_iters,
        derivative=derivative,
        trace_objective=trace_objective,
    )
    return _loop.solution(z, diagnostics)
