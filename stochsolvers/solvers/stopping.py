r"""Stopping: iterate until each example meets a tolerance, or the cap is reached.

An example has converged at the first k with

    ||T(y_k) − y_k||₂ ≤ tol · max(1, ||z_{k+1}||₂),      z_{k+1} = T(y_k),

T the step's map and y_k the point at which it was taken (z_k, or the extrapolated point with
momentum). From then on it does not change. For Prox-GD the left side is η times the norm of the
gradient mapping.
"""

import enum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from stochsolvers._shards import varying
from stochsolvers._typing import Array
from stochsolvers.problems import LayerProblem
from stochsolvers.solvers import _loop
from stochsolvers.solvers._loop import Diagnostics, Update


class Status(enum.IntEnum):
    """How a solver with a tolerance ended, for each example."""

    CONVERGED = 0
    MAX_ITERS = 1
    DIVERGED = 2


class Outcome(NamedTuple):
    """What the loop returns: the last iterate, the diagnostics up to the cap, and how each example ended."""

    value: Array
    diagnostics: Diagnostics
    status: Array
    iterations: Array


class _State(NamedTuple):
    z: Array
    memory: Any
    running: Array
    converged: Array
    iterations: Array
    diagnostics: Diagnostics


def iterate_until(
    problem: LayerProblem,
    update: Update,
    operands: Any,
    init: Array,
    num_iters: int,
    tol: Array,
    *,
    memory: Any = None,
    origin: Any = lambda z, memory: z,
    opening: Update | None = None,
    trace_objective: bool = False,
) -> Outcome:
    """`_loop.iterate` with a tolerance; not differentiable in reverse mode.

    `origin` is (z, memory) -> y, the point at which the next update takes its gradient.
    """
    batch = problem.batch_shape
    axes = tuple(range(len(batch), init.ndim))

    def advance(update, k, state):
        step = update(operands, k, state.z, state.memory)
        seen = _loop.observe(problem, state.z, step, trace_objective=trace_objective)
        moved = problem.norm(step.value - origin(state.z, state.memory))
        small = moved <= tol * jnp.maximum(1.0, problem.norm(step.value))
        running = state.running

        def where_running(new, old):
            if jnp.shape(new) != init.shape:
                return new  # a scalar of the whole batch
            return jnp.where(jnp.expand_dims(running, axes), new, old)

        def record(buffer, entry):
            return buffer.at[k].set(jnp.where(running, entry, 0))

        finite = seen.finite | ~running
        recorded = Diagnostics(
            record(state.diagnostics.residual, seen.residual),
            None if seen.objective is None else record(state.diagnostics.objective, seen.objective),
            state.diagnostics.finite & finite,
        )
        return _State(
            where_running(step.value, state.z),
            jax.tree.map(where_running, step.memory, state.memory),
            running & ~small & finite,
            state.converged | (running & small & finite),
            state.iterations + running,
            recorded,
        )

    buffer = jnp.zeros((num_iters, *batch), init.dtype)
    none = jnp.zeros(batch, bool)
    state = _State(
        init,
        memory,
        ~none,
        none,
        none.astype(jnp.int32),
        Diagnostics(buffer, buffer if trace_objective else None, ~none),
    )
    state, start = varying(state, (problem, operands)), 0
    if opening is not None:
        start, state = 1, advance(opening, 0, state)
    _, state = lax.while_loop(
        lambda carry: (carry[0] < num_iters) & jnp.any(carry[1].running),
        lambda carry: (carry[0] + 1, advance(update, *carry)),
        (jnp.asarray(start), state),
    )
    residuals, objectives, finite = state.diagnostics
    if objectives is not None:
        last = jnp.take_along_axis(objectives, state.iterations[None] - 1, axis=0)
        reached = jnp.arange(num_iters).reshape(-1, *(1,) * len(batch)) < state.iterations
        objectives = jnp.where(reached, objectives, last)
    status = jnp.where(
        state.converged, Status.CONVERGED, jnp.where(finite, Status.MAX_ITERS, Status.DIVERGED)
    )
    diagnostics = Diagnostics(residuals, objectives, finite[None])
    return Outcome(state.z, diagnostics, status.astype(jnp.int32), state.iterations)
