"""Measurements of one solve of a solver layer or an equilibrium layer."""

import contextlib
import contextvars
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from stochsolvers._typing import Array
from stochsolvers.lipschitz import is_exact, lipschitz_constant
from stochsolvers.problems import LayerProblem, Problem
from stochsolvers.reports._bounds import (
    equilibrium_numbers,
    first_step,
    guarantee,
    norms_of,
)
from stochsolvers.solvers import Solution, Solver, Status

_ROUND_OFF = (
    64.0  # residuals below this many eps of ||z_K|| are round-off of the step, with room to spare
)

_calls: contextvars.ContextVar[Iterator[int] | None] = contextvars.ContextVar(
    "_calls", default=None
)


@contextlib.contextmanager
def numbered_calls() -> Iterator[None]:
    """Within it, observations are numbered in the order in which they are traced."""
    token = _calls.set(itertools.count())
    try:
        yield
    finally:
        _calls.reset(token)


class Observation(NamedTuple):
    """Measurements of one solve.

    Attributes:
      call: its index in the order of the trace.
      lipschitz: L = λ_max(A A*), without the ridge: the middle of its bracket where lemma 2 is exact (dense,
        circular), else `lipschitz_constant` on the layer's own grid.
      lower: a lower bound on ||A||².
      upper: an upper bound on ||A||².
      step_size: the first step, the largest where outputs have their own.
      contraction_bound: the guaranteed factor of the residuals; +∞ where there is no guarantee.
      num_iters: the iterations taken, the maximum over the batch.
      contraction: measured factor of the residuals, shape (*batch,); +∞ where there is none.
      objective: P(z_K), shape (*batch,).
      gap: its certified gap, shape (*batch,).
      finite: whether every iterate was finite, shape (*batch,).
      feasible: whether z_K is in the domain of g, shape (*batch,).
      growing: whether the solver ended with `Status.UNBOUNDED`, shape (*batch,).
      distance: the certified distance from the equilibrium, shape (*batch,); +∞ for other layers.

    Fields without a shape are scalars. A transformation that stacks layers stacks all of them.
    """

    call: Array
    lipschitz: Array
    lower: Array
    upper: Array
    step_size: Array
    contraction_bound: Array
    num_iters: Array
    contraction: Array
    objective: Array
    gap: Array
    finite: Array
    feasible: Array
    growing: Array
    distance: Array


def observe(
    solver: Solver,
    problem: Problem,
    solution: Solution,
    gap: Array | None,
    step_constant: Array | None,
    deterministic: bool,
) -> Observation:
    """Measure one solve.

    `gap` is the certificate of an equilibrium problem, None where there is no objective; that of a layer's
    problem is computed here, from the same norms as the rest.
    """
    problem, solution = lax.stop_gradient((problem, solution))
    call = jnp.asarray(next(_calls.get() or itertools.repeat(0)))
    if isinstance(problem, LayerProblem):
        return _of_layer(call, solver, problem, solution, step_constant, deterministic)
    return _of_equilibrium(call, solver, problem, solution, gap)


def _of_layer(
    call: Array,
    solver: Solver,
    problem: LayerProblem,
    solution: Solution,
    step_constant: Array | None,
    deterministic: bool,
) -> Observation:
    linear_map = problem.linear_map
    lower, upper, least = norms_of(linear_map)
    gap = problem.certificate(solution.value, squared_norm=upper, strong_convexity=least)
    constant = 0.5 * (lower + upper)
    if not is_exact(linear_map):
        constant = lipschitz_constant(linear_map)
    step = first_step(solver, problem, step_constant, deterministic)
    return Observation(
        call=call,
        lipschitz=constant,
        lower=lower,
        upper=upper,
        step_size=jnp.max(step),
        contraction_bound=guarantee(solver, problem, upper, step_constant, deterministic, least),
        num_iters=_taken(solution),
        contraction=_measured(problem, solution),
        objective=problem.objective(solution.value),
        gap=gap,
        finite=solution.finite,
        feasible=jnp.isfinite(problem.prior_value(solution.value)),
        growing=_ended_growing(solution),
        distance=jnp.full_like(gap, jnp.inf),
    )


def _of_equilibrium(
    call: Array, solver: Solver, problem: Any, solution: Solution, gap: Array | None
) -> Observation:
    """Of a problem z = h(z); only those of `stochsolvers.equilibrium` know norms and distances."""
    infinite = jnp.full(problem.batch_shape, jnp.inf, problem.dtype)
    numbers = equilibrium_numbers(solver, problem)
    value = jnp.asarray(solution.value, problem.dtype)
    return Observation(
        call=call,
        lipschitz=0.5 * (numbers.lower + numbers.upper),
        lower=numbers.lower,
        upper=numbers.upper,
        step_size=jnp.ones((), problem.dtype),
        contraction_bound=numbers.contraction,
        num_iters=_taken(solution),
        contraction=_measured(problem, solution),
        objective=infinite if gap is None else problem.objective(value),
        gap=infinite if gap is None else gap,
        finite=solution.finite,
        feasible=jnp.ones_like(solution.finite),
        growing=_ended_growing(solution),
        distance=problem.distance(value) if hasattr(problem, "distance") else infinite,
    )


def _taken(solution: Solution) -> Array:
    """The iterations of the slowest example."""
    taken = len(solution.residuals) if solution.iterations is None else solution.iterations
    return jnp.max(jnp.asarray(taken))


def _measured(problem: Problem, solution: Solution) -> Array:
    """The contraction of the residuals that are above round-off."""
    eps = jnp.finfo(problem.dtype).eps
    floor = _ROUND_OFF * eps * problem.norm(jnp.asarray(solution.value, problem.dtype))
    return contraction(solution.residuals, floor)


def _ended_growing(solution: Solution) -> Array:
    if solution.status is None:
        return jnp.zeros_like(solution.finite)
    return solution.status == Status.UNBOUNDED


def contraction(residuals: Array, floor: Array) -> Array:
    """(r_m / r_1)^(1/(m − 1)), m the largest with r_1, …, r_m all above the floor; +∞ for m < 2.

    Args:
      residuals: r_k, shape (K, *batch).
      floor: what counts as round-off, shape (*batch,).
    """
    ratios = jnp.sum(jnp.cumprod(residuals > floor[None], axis=0), axis=0) - 1  # m − 1
    last = jnp.take_along_axis(residuals, jnp.maximum(ratios, 0)[None], axis=0)[0]
    total = last / jnp.where(ratios > 0, residuals[0], 1.0)
    return jnp.where(
        ratios > 0, total ** (1.0 / jnp.maximum(ratios, 1).astype(total.dtype)), jnp.inf
    )
