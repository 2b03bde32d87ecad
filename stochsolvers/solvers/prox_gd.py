"""Proximal gradient descent, with Nesterov momentum as an option."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from stochsolvers import _checks
from stochsolvers._typing import Array
from stochsolvers.estimators import Full
from stochsolvers.problems import LayerProblem
from stochsolvers.solvers import _loop
from stochsolvers.solvers._loop import Solution, Step
from stochsolvers.solvers.step_sizes import StepSizeLike, as_schedule, as_steps


def prox_gd(
    problem: LayerProblem,
    *,
    step_size: StepSizeLike = None,
    num_iters: int,
    init: Array | None = None,
    momentum: bool = False,
    trace_objective: bool = False,
) -> Solution:
    r"""Proximal gradient descent, z ← prox_{ηg}(z − η ∇F(z)).

    From z = 0 with η = 1, one iteration is the plain layer prox_g(A x + b). With η ≤ 1/L it satisfies
    P(z_k) − P* ≤ ||z_0 − z*||²/(2ηk), and contracts by 1 − ηλ with a ridge. With momentum the gradient
    is taken at y_k = z_k + ((t_{k−1} − 1)/t_k)(z_k − z_{k−1}), t_k = (1 + sqrt(1 + 4 t_{k−1}²))/2, and
    the bound is 2||z_0 − z*||²/(η(k + 1)²).

    Args:
      problem: the layer's problem.
      step_size: η: a number, k -> η_k, a rule, or None for 1/L (`InverseLipschitz`), through which
        derivatives then pass as well. A function of your own is compiled once for each function
        object: define it once, or use `exponential_decay`.
      num_iters: number of iterations, static, ≥ 1.
      init: z_0, zero by default.
      momentum: FISTA.
      trace_objective: also return P(z_k) for every iteration.

    Returns:
      `Solution`; a path of steps, weights or inputs compiles once.

    Raises:
      ValueError: at trace time, for an iteration count below 1, a non-positive number as step size,
        or an init of another shape.

    References:
      Bibi et al. 2019, eq. 3; Beck and Teboulle 2009.
    """
    num_iters = _checks.count("num_iters", num_iters)
    return _prox_gd(
        problem,
        as_steps(step_size),
        _loop.starting_point(problem, init),
        num_iters=num_iters,
        momentum=momentum,
        trace_objective=trace_objective,
    )


@functools.partial(jax.jit, static_argnames=("num_iters", "momentum", "trace_objective"))
def _prox_gd(
    problem: LayerProblem,
    steps: Any,
    z0: Array,
    *,
    num_iters: int,
    momentum: bool,
    trace_objective: bool,
) -> Solution:
    schedule = as_schedule(steps, problem, Full())

    def descend(k, y):
        step = schedule(k)
        point = y - step * problem.gradient(y)
        return problem.prior.prox(point, step), point

    def plain(k, z, memory):
        value, point = descend(k, z)
        return Step(value, memory, point)

    def accelerated(k, z, memory):
        y, t = memory
        value, point = descend(k, y)
        t_next = 0.5 * (1.0 + jnp.sqrt(1.0 + 4.0 * t**2))
        return Step(value, (value + (t - 1.0) / t_next * (value - z), t_next), point)

    z, diagnostics = _loop.iterate(
        problem,
        accelerated if momentum else plain,
        z0,
        num_iters,
        memory=(z0, jnp.ones((), problem.dtype)) if momentum else None,
        trace_objective=trace_objective,
    )
    return _loop.solution(z, diagnostics)
