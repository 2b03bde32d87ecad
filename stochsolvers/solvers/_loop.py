"""The one scan that every solver runs in, and the result that every solver returns."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from stochsolvers import _checks
from stochsolvers._typing import Array, value_object
from stochsolvers.problems import LayerProblem
from stochsolvers.solvers import derivatives
from stochsolvers.solvers.derivatives import Unrolled, Unrolling


@value_object
class Solution:
    r"""What a solver returns.

    Attributes:
      value: the last iterate z_K, shape (*batch, …) as the layer's output. The only differentiable
        field: the others are diagnostics, constant under differentiation.
      residuals: ||z_{k+1} − z_k||₂ for each iteration and example, shape (K, *batch), in units of z.
        It goes to zero for a solver that converges; with a decaying step it does so in any case.
        With a tolerance K is the cap, and an example that has stopped has residual 0.
      objectives: P(z_{k+1}), shape (K, *batch), where asked for, else None. It stays at its last value
        for an example that has stopped.
      finite: whether every iterate of an example was finite, shape (*batch,).
      status: a `Status` for each example, shape (*batch,), where a tolerance was given, else None.
      iterations: iterations that each example took, shape (*batch,), where a tolerance was given.
      certificate: a bound on P(z_K) − min P for each example, shape (*batch,), where asked for
        (`certify=True`); see `LayerProblem.certificate`.
    """

    value: Array
    residuals: Array
    objectives: Array | None
    finite: Array
    status: Array | None = None
    iterations: Array | None = None
    certificate: Array | None = None


class Diagnostics(NamedTuple):
    """What one iteration reports; kept apart from what it carries."""

    residual: Array
    objective: Array | None
    finite: Array


class Step(NamedTuple):
    """The outcome of one update: the next iterate, what else is carried, the point before the prox."""

    value: Array
    memory: Any
    point: Array


Update = Callable[[Any, Array, Array, Any], Step]
"""(operands, k, z, memory) -> Step; all that derivatives pass through is in the operands."""


def iterate(
    problem: LayerProblem,
    update: Update,
    operands: Any,
    init: Array,
    num_iters: int,
    *,
    memory: Any = None,
    first: Array | int = 0,
    opening: Update | None = None,
    derivative: Unrolling | None = None,
    trace_objective: bool = False,
) -> tuple[Array, Diagnostics]:
    """Run `update` for k = first, …, first + num_iters − 1 and stack its diagnostics.

    `opening` is a cheaper equal of the first update, from a known starting point.
    """

    def observed(update):
        def body(operands, carry, k):
            z, memory = carry
            step = update(operands, k, z, memory)
            diagnostics = observe(problem, z, step, trace_objective=trace_objective)
            return (step.value, step.memory), diagnostics

        return body

    (z, _), diagnostics = derivatives.scan(
        observed(update),
        operands,
        (init, memory),
        first + jnp.arange(num_iters),
        Unrolled() if derivative is None else derivative,
        opening=None if opening is None else observed(opening),
    )
    return z, diagnostics


def observe(problem: LayerProblem, z: Array, step: Step, *, trace_objective: bool) -> Diagnostics:
    """Residual, finiteness and, on request, objective of one step; nothing is differentiated."""
    z, value, point = lax.stop_gradient((z, step.value, step.point))
    axes = tuple(range(len(problem.batch_shape), value.ndim))
    # a projection can turn an infinite point into a finite iterate: look at both
    finite = jnp.all(jnp.isfinite(point) & jnp.isfinite(value), axis=axes)
    objective = lax.stop_gradient(problem).objective(value) if trace_objective else None
    return Diagnostics(problem.norm(value - z), objective, finite)


def solution(z: Array, diagnostics: Diagnostics, **fields: Array) -> Solution:
    """The result, from the last iterate and the stacked diagnostics."""
    finite = jnp.all(diagnostics.finite, axis=0)
    return Solution(z, diagnostics.residual, diagnostics.objective, finite, **fields)


def certified(problem: LayerProblem, solution: Solution) -> Solution:
    """The same with the certificate of its value."""
    return dataclasses.replace(solution, certificate=problem.certificate(solution.value))


def starting_point(problem: LayerProblem, init: Array | None) -> Array:
    """z_0: zero, or the user's point in the problem's shape and dtype."""
    if init is None:
        return jnp.zeros(problem.shape, problem.dtype)
    _checks.floating("init", init)
    if jnp.shape(init) != problem.shape:
        _checks.fail("shape of init", f"{problem.shape}", jnp.shape(init))
    return jnp.asarray(init, problem.dtype)
