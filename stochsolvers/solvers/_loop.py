"""The one scan that every solver runs in, and the result that every solver returns."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from stochsolvers import _checks
from stochsolvers._typing import Array, value_object
from stochsolvers.problems import LayerProblem


@value_object
class Solution:
    r"""What a solver returns.

    Attributes:
      value: the last iterate z_K, shape (*batch, …) as the layer's output. The only differentiable
        field: the others are diagnostics, constant under differentiation.
      residuals: ||z_{k+1} − z_k||₂ for each iteration and example, shape (K, *batch), in units of z.
        It goes to zero for a solver that converges; with a decaying step it does so in any case.
      objectives: P(z_{k+1}), shape (K, *batch), where asked for, else None.
      finite: whether every iterate of an example was finite, shape (*batch,).
    """

    value: Array
    residuals: Array
    objectives: Array | None
    finite: Array


class Diagnostics(NamedTuple):
    """What one iteration reports; kept apart from what it carries."""

    residual: Array
    objective: Array | None
    finite: Array


class Step(NamedTuple):
    """The outcome of one update: the next iterate, what else is carried, the point before the prox."""

    value: Array
    memory: object
    point: Array


Update = Callable[[Array, Array, object], Step]
"""(k, z, memory) -> Step."""


def iterate(
    problem: LayerProblem,
    update: Update,
    init: Array,
    num_iters: int,
    *,
    memory: object = None,
    first: Array | int = 0,
    trace_objective: bool = False,
) -> tuple[Array, Diagnostics]:
    """Run `update` for k = first, …, first + num_iters − 1 and stack its diagnostics."""

    def body(carry, k):
        z, memory = carry
        step = update(k, z, memory)
        diagnostics = observe(problem, z, step, trace_objective=trace_objective)
        return (step.value, step.memory), diagnostics

    (z, _), diagnostics = lax.scan(body, (init, memory), first + jnp.arange(num_iters))
    return z, diagnostics


def observe(problem: LayerProblem, z: Array, step: Step, *, trace_objective: bool) -> Diagnostics:
    """Residual, finiteness and, on request, objective of one step; nothing is differentiated."""
    z, value, point = lax.stop_gradient((z, step.value, step.point))
    axes = tuple(range(len(problem.batch_shape), value.ndim))
    # a projection can turn an infinite point into a finite iterate: look at both
    finite = jnp.all(jnp.isfinite(point) & jnp.isfinite(value), axis=axes)
    objective = lax.stop_gradient(problem).objective(value) if trace_objective else None
    return Diagnostics(problem.norm(value - z), objective, finite)


def solution(z: Array, diagnostics: Diagnostics) -> Solution:
    """The result, from the last iterate and the stacked diagnostics."""
    finite = jnp.all(diagnostics.finite, axis=0)
    return Solution(z, diagnostics.residual, diagnostics.objective, finite)


def starting_point(problem: LayerProblem, init: Array | None) -> Array:
    """z_0: zero, or the user's point in the problem's shape and dtype."""
    if init is None:
        return jnp.zeros(problem.shape, problem.dtype)
    _checks.floating("init", init)
    if jnp.shape(init) != problem.shape:
        _checks.fail("shape of init", f"{problem.shape}", jnp.shape(init))
    return jnp.asarray(init, problem.dtype)
