"""Proximal stochastic gradient descent with any sampling of the input features."""

import functools
from typing import Any, cast

import jax

from stochsolvers import _checks
from stochsolvers._typing import Array
from stochsolvers.estimators import Estimator, OutputCoordinates, TauNice
from stochsolvers.problems import LayerProblem
from stochsolvers.sampling import num_sampled
from stochsolvers.solvers import _loop
from stochsolvers.solvers._loop import Solution, Step
from stochsolvers.solvers.derivatives import DerivativeLike, Unrolling, unrolling
from stochsolvers.solvers.step_sizes import StepSizeLike, as_schedule, as_steps


def prox_sg(
    key: Array,
    problem: LayerProblem,
    *,
    tau: int | float | Array | None = None,
    step_size: StepSizeLike = None,
    num_iters: int,
    init: Array | None = None,
    sampling: Estimator | None = None,
    derivative: DerivativeLike = None,
    trace_objective: bool = False,
    certify: bool = False,
) -> Solution:
    r"""Proximal stochastic gradient, z ← prox_{η_k g}(z − η_k ∇Ψ_{S_k}(z)).

    With τ-nice sampling, ∇Ψ_S(z) = (n1/τ) Σ_{i∈S} A_i (A_i* z − x_i) − b + λ z. From z = 0 with η = 1, one
    iteration is prox_g((n1/τ) A (m ⊙ x) + b): dropout of exactly n1 − τ input features (whole feature
    maps for a convolution), then the plain layer (proposition 1).

    Args:
      key: random key; iteration k uses `fold_in(key, k)`.
      problem: the layer's problem.
      tau: τ of a τ-nice sampling: a count (int, may be traced) or a fraction of n1 (float).
      step_size: a number, k -> η_k (`exponential_decay`), a rule, or None for 1/L. A function of your
        own is compiled once for each function object: define it once.
      num_iters: number of iterations, static, ≥ 1.
      init: z_0, zero by default.
      sampling: any member of `stochsolvers.estimators` in place of `tau`.
      derivative: "unrolled" (the default), "remat" or `Truncated(n)`; see `solvers.derivatives`.
      trace_objective: also return P(z_k) for every iteration.
      certify: also return a bound on P(z_K) − min P.

    Returns:
      `Solution`; `finite` is False for an example whose iterates overflowed.

    Raises:
      ValueError: at trace time, for τ outside 1..n1, both or neither of `tau` and `sampling`, and
        as in `prox_gd`.

    References:
      Bibi et al. 2019, proposition 1; Xiao and Zhang 2014.
    """
    num_iters = _checks.count("num_iters", num_iters)
    solution = _prox_sg(
        key,
        problem,
        as_sampling(tau, sampling, problem),
        as_steps(step_size),
        _loop.starting_point(problem, init),
        unrolling(derivative, "prox_sg"),
        num_iters=num_iters,
        trace_objective=trace_objective,
    )
    return _loop.certified(problem, solution) if certify else solution


@functools.partial(jax.jit, static_argnames=("num_iters", "trace_objective"))
def _prox_sg(
    key: Array,
    problem: LayerProblem,
    estimator: Estimator,
    steps: Any,
    z0: Array,
    derivative: Unrolling,
    *,
    num_iters: int,
    trace_objective: bool,
) -> Solution:
    schedule = as_schedule(steps, problem, estimator)

    def update(operands, k, z, memory):
        problem, estimator, schedule = operands
        step = schedule(k)
        point = z - step * estimator(jax.random.fold_in(key, k), problem, z)
        return Step(problem.prior.prox(point, step), memory, point)

    z, diagnostics = _loop.iterate(
        problem,
        update,
        (problem, estimator.prepare(problem), schedule),
        z0,
        num_iters,
        derivative=derivative,
        trace_objective=trace_objective,
    )
    return _loop.solution(z, diagnostics)


def as_sampling(
    tau: int | float | Array | None,
    sampling: Estimator | None,
    problem: LayerProblem | None = None,
) -> Estimator:
    """The estimator that `tau` or `sampling` names; exactly one of them is given."""
    if (tau is None) == (sampling is None):
        _checks.fail("tau, sampling", "exactly one of the two", f"{tau!r}, {sampling!r}")
    if problem is None:
        _checks.positive("tau", tau)
    else:
        count = getattr(sampling, "tau", None) if tau is None else tau
        if count is not None:
            outputs = isinstance(sampling, OutputCoordinates)
            linear_map = problem.linear_map
            num_sampled(count, linear_map.out_features if outputs else linear_map.in_features)
    return cast(Estimator, sampling) if tau is None else TauNice(tau)
