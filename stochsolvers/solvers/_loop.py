"""The two loops that every solver runs in: a fixed number of iterations, and until a tolerance is met."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from stochsolvers._shards import varying
from stochsolvers._typing import Array
from stochsolvers.problems import Problem
from stochsolvers.solvers import derivatives
from stochsolvers.solvers._solution import Status
from stochsolvers.solvers.derivatives import Unrolled, Unrolling


class Step(NamedTuple):
    """The outcome of one iteration.

    Attributes:
      value: the next iterate.
      memory: what else is carried to the next iteration.
      point: the point before the prox, value = prox_{ηg}(point) for η = `run.step_size(k)`. A pre-activation
        is made from it, and it has to be finite: a projection can turn an infinite point into a finite
        iterate. None where there is none.
      origin: where the step was taken, for the stopping test; None for the iterate before.
      moved: where the value is the prox of this point, and not of an earlier one: a mask of the value's
        shape, or one number. None for everywhere.
    """

    value: Array
    memory: Any = None
    point: Array | None = None
    origin: Array | None = None
    moved: Array | None = None


class Diagnostics(NamedTuple):
    """What one iteration reports; kept apart from what it carries."""

    residual: Array
    objective: Array | None
    finite: Array


Update = Callable[[Any, Array, Array, Any], Step]
"""(operands, k, z, memory) -> Step; all that derivatives pass through is in the operands."""


def iterate(
    problem: Problem,
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
) -> tuple[Array, Any, Diagnostics]:
    """Run `update` for k = first, …, first + num_iters − 1: value, memory and all diagnostics.

    `opening` is the same first update, computed more cheaply from a known start.
    """

    def observed(update):
        def body(operands, carry, k):
            z, memory = carry
            step = update(operands, k, z, memory)
            diagnostics = observe(problem, z, step, trace_objective=trace_objective)
            return (step.value, step.memory), diagnostics

        return body

    (z, memory), diagnostics = derivatives.scan(
        observed(update),
        operands,
        (init, memory),
        first + jnp.arange(num_iters),
        Unrolled() if derivative is None else derivative,
        opening=None if opening is None else observed(opening),
    )
    return z, memory, diagnostics


def observe(
    problem: Problem,
    z: Array,
    step: Step,
    *,
    trace_objective: bool,
    unit: Array | None = None,
) -> Diagnostics:
    """Residual, finiteness and, on request, objective of one step; nothing is differentiated."""
    z, value, point = lax.stop_gradient((z, step.value, step.point))
    axes = tuple(range(len(problem.batch_shape), value.ndim))
    finite = jnp.isfinite(value) if point is None else jnp.isfinite(point) & jnp.isfinite(value)
    objective = lax.stop_gradient(problem).objective(value) if trace_objective else None
    return Diagnostics(problem.norm(value - z, unit), objective, jnp.all(finite, axis=axes))


class Outcome(NamedTuple):
    """The last iterate of each example, the diagnostics up to the cap, and how each example ended."""

    value: Array
    diagnostics: Diagnostics
    status: Array
    iterations: Array
    certificate: Array | None = None


class _State(NamedTuple):
    """The iteration goes on for the whole batch; `value` is that of an example when it stopped."""

    z: Array
    memory: Any
    value: Array
    running: Array
    converged: Array
    growing: Array
    iterations: Array
    diagnostics: Diagnostics
    checks: "_Checks | None" = None


def iterate_until(
    problem: Problem,
    update: Update,
    operands: Any,
    init: Array,
    num_iters: int,
    tol: Array | None,
    gap_tol: Array | None,
    *,
    memory: Any = None,
    opening: Update | None = None,
    from_zero: bool = False,
    trace_objective: bool = False,
) -> Outcome:
    r"""`iterate` until each example meets one of two tolerances, or the cap; no reverse mode.

    An example has converged at the first k with

        ||T(y_k) − y_k||₂ ≤ tol · max(1, ||z_{k+1}||₂),      z_{k+1} = T(y_k),

    T the step's map and y_k its origin, if the iterates do not grow at a constant rate. They do if
    2 (k + 1) ||z_{k+1} − z_k|| ≥ ||z_{k+1} − z_0|| ≥ ½ ||z_{k+1}|| ≥ ½ after ten iterations: of an unbounded
    problem the left side of the test tends to a constant, and the right side to infinity. From then on an
    example's value does not change. A start far along an unbounded direction is taken for a solution, and
    so is the growth of fewer than ten iterations: a certificate, which is infinite there, tells them apart.

    With `gap_tol` an example also stops where its certificate is at most that. Certificates of layers are
    computed after ten iterations and then after another ten or a fifth of those so far, whichever is more,
    those of fixed-point problems after every one, and only where some running example has moved so little
    (or at the cap),

        (L/2) ||T(y_k) − y_k||² ≤ 4 gap_tol,

    that a gap of `gap_tol` is possible: the gap at y_k is at least the left side.
    """
    batch = problem.batch_shape
    axes, unit = tuple(range(len(batch), init.ndim)), unit_of(problem, None if from_zero else init)
    gaps = None if gap_tol is None else _Gaps.of(problem, gap_tol)

    def advance(update, k, state):
        step = update(operands, k, state.z, state.memory)
        seen = observe(problem, state.z, step, trace_objective=trace_objective, unit=unit)
        origin = state.z if step.origin is None else step.origin
        moved, size = problem.norm(step.value - origin, unit), problem.norm(step.value, unit)
        small = jnp.isfinite(size)
        if tol is not None:
            small &= moved <= tol * jnp.maximum(1, size)
        distance = size if from_zero else problem.norm(step.value - init, unit)
        steady = (2 * (k + 1) * seen.residual >= distance) & (2 * distance >= size)
        growing = small & steady & (size >= 1) & (k >= 9)
        running = state.running

        def record(buffer, entry):
            return buffer.at[k].set(jnp.where(running, entry, 0))

        finite = seen.finite | ~running
        recorded = Diagnostics(
            record(state.diagnostics.residual, seen.residual),
            None if seen.objective is None else record(state.diagnostics.objective, seen.objective),
            state.diagnostics.finite & finite,
        )
        value = jnp.where(jnp.expand_dims(running, axes), step.value, state.value)
        done = small & ~growing & finite & (tol is not None)
        checks = state.checks
        if gaps is not None:
            checks = gaps.check(checks, k, value, moved, running, last=k == num_iters - 1)
            done |= (checks.gap <= gaps.gap_tol) & finite
        return _State(
            step.value,
            step.memory,
            value,
            running & ~done & finite,
            state.converged | (running & done),
            jnp.where(running, growing & finite, state.growing),
            state.iterations + running.astype(state.iterations.dtype),
            recorded,
            checks,
        )

    buffer, none = jnp.zeros((num_iters, *batch), init.dtype), jnp.zeros(batch, bool)
    diagnostics = Diagnostics(buffer, buffer if trace_objective else None, ~none)
    counts = none.astype(jnp.int32)
    checks = (
        None
        if gaps is None
        else _Checks(jnp.full(batch, jnp.inf, init.dtype), jnp.array(gaps.certifier.interval - 1))
    )
    state = _State(init, memory, init, ~none, none, none, counts, diagnostics, checks)
    state, start = varying(state, (problem, operands)), 0
    if opening is not None:
        start, state = 1, advance(opening, 0, state)
    _, state = lax.while_loop(
        lambda carry: (carry[0] < num_iters) & jnp.any(carry[1].running),
        lambda carry: (carry[0] + 1, advance(update, *carry)),
        (jnp.asarray(start), state),
    )
    outcome = _outcome(state)
    if gaps is None or state.checks is None:
        return outcome
    gap = state.checks.gap  # of the last iteration too, at the cap
    if tol is not None:
        gap = gaps.at_the_end(state.checks, state.value)
    gap = jnp.where(state.diagnostics.finite, gap, jnp.inf)  # of an iterate before it diverged
    stuck = (outcome.status == Status.UNBOUNDED) & jnp.isfinite(gap)  # a bounded problem
    status = jnp.where(stuck, Status.MAX_ITERS, outcome.status).astype(jnp.int32)
    return outcome._replace(certificate=gap, status=status)


class _Checks(NamedTuple):
    """The last certificate of each example, and the iteration after which the next one is due."""

    gap: Array
    due: Array


class _Gaps(NamedTuple):
    """Certificates of the iterates of one problem."""

    certifier: Any
    gap_tol: Array

    @classmethod
    def of(cls, problem: Problem, gap_tol: Array) -> "_Gaps":
        return cls(problem.certifier(), gap_tol)

    def check(
        self,
        checks: _Checks,
        k: Array | int,
        value: Array,
        moved: Array,
        running: Array,
        *,
        last: Array | bool,
    ) -> _Checks:
        """The gaps after iteration k where it is time; those of examples that have stopped stay."""
        if isinstance(k, int) and k < self.certifier.interval - 1 and not last:
            return checks  # of the first iteration, too early for any
        near = running & (0.5 * self.certifier.smoothness * moved**2 <= 4.0 * self.gap_tol)
        now = ((checks.due <= k) & jnp.any(near)) | last

        def certified(checks):
            gap = jnp.where(running, self.certifier(value), checks.gap)
            interval = self.certifier.interval
            if interval > 1:
                interval = jnp.maximum(interval, (k + 1) // 5)
            due = jnp.asarray(k + interval, checks.due.dtype)
            return varying(_Checks(gap, due), checks)

        return lax.cond(now, certified, lambda checks: checks, checks)

    def at_the_end(self, checks: _Checks, value: Array) -> Array:
        """The certificates of the values, of which those that are small enough are known."""
        return lax.cond(
            jnp.all(checks.gap <= self.gap_tol),
            lambda: checks.gap,
            lambda: jnp.where(checks.gap <= self.gap_tol, checks.gap, self.certifier(value)),
        )


def unit_of(problem: Problem, init: Array | None) -> Array:
    """A power of two of about the largest number that an example is made of, at least 1."""
    largest = lax.stop_gradient(problem.largest_entries())
    if init is not None:
        axes = tuple(range(largest.ndim, init.ndim))
        start = jnp.max(jnp.abs(lax.stop_gradient(init)), axis=axes, initial=0)
        largest = jnp.maximum(largest, start)
    return jnp.where(
        (largest > 1) & jnp.isfinite(largest),
        largest / jnp.frexp(largest)[0],
        jnp.ones_like(largest),
    )


def _outcome(state: _State) -> Outcome:
    residuals, objectives, finite = state.diagnostics
    if objectives is not None:
        last = jnp.take_along_axis(objectives, state.iterations[None] - 1, axis=0)
        counts = jnp.arange(len(residuals)).reshape(-1, *(1,) * state.iterations.ndim)
        objectives = jnp.where(counts < state.iterations[None], objectives, last)
    stuck = jnp.where(state.growing, Status.UNBOUNDED, Status.MAX_ITERS)
    ended = jnp.where(finite, stuck, Status.DIVERGED)
    status = jnp.where(state.converged, Status.CONVERGED, ended)
    diagnostics = Diagnostics(residuals, objectives, finite[None])
    return Outcome(state.value, diagnostics, status.astype(jnp.int32), state.iterations)
