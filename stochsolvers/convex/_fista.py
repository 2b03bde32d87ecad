"""FISTA for gated programs and those of three layers: one product with A and one with A* an iteration."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from stochsolvers import _checks
from stochsolvers._shards import varying
from stochsolvers._typing import Array, value_object
from stochsolvers.convex import _metric, _terms
from stochsolvers.convex._algorithm import (
    Algorithm,
    Iterate,
    Progress,
    Search,
    advanced,
    kept,
    report,
    start,
)
from stochsolvers.convex._cone_program import ConeProgram
from stochsolvers.convex._duality import euclidean_norm
from stochsolvers.convex._problems import GatedProblem
from stochsolvers.convex._terms import expanded

_GROW, _SHRINK, _SLACK = 1.25, 0.8, 5.0
_POWER_STEPS = 5


@value_object
class FISTA(Algorithm):
    r"""Accelerated proximal gradient steps with backtracking and restarts, for every loss and regulariser.

        V⁺ = prox_{R/L}(Y − ∇F(Y)/L),   t⁺ = (1 + √(1 + 4 t²))/2,   Y⁺ = V⁺ + (t − 1)/t⁺ (V⁺ − V)

    A* Y is carried by linearity: one product with A and one with A* an iteration, and none for the test of L,
    which is L_ℓ ||A* (V⁺ − Y)||² ≤ L ||V⁺ − Y||². L shrinks where it is more than five times what the last
    step needed. The momentum is restarted where (Y − V⁺)·(V⁺ − V) > 0. Every program of a batch has its own
    L, momentum and end. Of programs with cones a step and its bound each take projections onto the cones.

    For gated programs of single outputs with the group norm and n P d ≥ 3·10⁷ the metric is not L I but
    L I + G of d × d numbers, the curvature of the linear network within the gated one, with which FISTA takes
    half of the iterations; its steps take Newton's method in d numbers. See `convex._metric`.

    It also ends, without convergence, after 500 iterations, or a fifth of those done, that made no gap
    smaller: round-off is all that is left.

    Args:
      max_iters: the most iterations, traced.

    References:
      Beck and Teboulle 2009; O'Donoghue and Candès, Adaptive restart for accelerated gradient schemes, 2015;
      Mishkin, Sahiner and Pilanci 2022, section 5.
    """

    def check(self, problem: Any) -> None:
        """Refuse what is no convex program."""
        if not isinstance(problem, GatedProblem | ConeProgram):
            wanted = "a GatedProblem, a ReLUProblem or a ThreeLayerProblem"
            _checks.fail("problem of FISTA", wanted, type(problem).__name__)

    def minimise(
        self, problem: Any, init: Array | None, tol: Array, progress: Progress | None
    ) -> Iterate:
        """See the class."""
        first = start(problem, init)
        metric = _metric.metric_of(problem)
        largest = power_estimate(problem, metric)
        return iterate(problem, first, largest, self.max_iters, tol, progress, metric)[0]


class Momentum(NamedTuple):
    """What FISTA carries beside the iterate: Y, A* Y, t, L, and p of a metric."""

    point: Array
    prediction: Array
    t: Array
    constant: Array
    coordinates: Array | None


def power_estimate(problem: Any, metric: _metric.Metric | None = None) -> Array:
    """About λ_max(A* A), from below: some power iterations, from a vector of ones.

    With a metric, of A* A on what it leaves.
    """
    A = problem.linear_map

    def step(_, state):
        r, _ = state
        image = A(r)
        image = A.adjoint(image if metric is None else metric.orthogonal(image))
        size = euclidean_norm(image, tuple(range(image.ndim)))
        return image / jnp.where(size > 0, size, 1.0), size

    ones = jnp.ones(A.in_shape, problem.dtype)
    r = ones / jnp.sqrt(jnp.asarray(ones.size, ones.dtype))
    return lax.fori_loop(0, _POWER_STEPS, step, varying((r, jnp.zeros((), r.dtype)), problem))[1]


def iterate(
    problem: Any,
    first: Iterate,
    largest: Array,
    max_iters: Any,
    tol: Array,
    progress: Progress | None = None,
    metric: _metric.Metric | None = None,
) -> tuple[Iterate, Array]:
    """FISTA from an iterate, and L at the end; `largest` is about λ_max(A* A)."""
    smoothness = jnp.asarray(problem.loss.smoothness, problem.dtype)
    floor, p = jnp.asarray(jnp.finfo(problem.dtype).tiny, problem.dtype), None
    if metric is not None:
        floor += 1e-3 * jnp.sum(metric.root**2) / len(metric.root)
        p = jnp.zeros((*problem.batch_shape, len(metric.root)), problem.dtype)
    constant = jnp.maximum(0.3 * smoothness * largest, floor)
    constant = jnp.broadcast_to(constant, problem.batch_shape)
    momentum = Momentum(first.value, first.prediction, jnp.ones_like(constant), constant, p)

    def unfinished(carry):
        k, now, _, search = carry
        return (k < max_iters) & ~search.stalled(k) & ~jnp.all(now.done)

    def step(carry):
        k, now, momentum, search = carry
        following, momentum = _step(problem, metric, now, momentum, smoothness, tol)
        report(progress, k, following)
        return k + 1, following, momentum, search.after(k, following)

    start = jnp.zeros((), int)
    carry = varying((start, first, momentum, Search.begun(problem, start)), problem)
    _, last, momentum, _ = lax.while_loop(unfinished, step, carry)
    return last, momentum.constant


def _step(
    problem: Any,
    metric: _metric.Metric | None,
    now: Iterate,
    momentum: Momentum,
    smoothness: Array,
    tol: Array,
) -> tuple[Iterate, Momentum]:
    A, Y, guess = problem.linear_map, momentum.point, momentum.coordinates
    residual = problem.loss.derivative(momentum.prediction, problem.inputs)
    gradient = A(residual)
    dual = _terms.dual(problem, residual, gradient)
    slack = 1.0 + 8.0 * float(jnp.finfo(problem.dtype).eps) ** 0.5

    def product(V, W, constant):
        """<V, W> in the metric."""
        values = constant * problem.sum(V * W)
        if metric is None:
            return values
        return values + jnp.sum(metric.coordinates(V) * metric.coordinates(W), -1)

    def attempt(constant):
        if metric is None or guess is None:
            point = Y - gradient / expanded(constant, gradient)
            (V, penalty), p = _terms.prox(problem, point, 1.0 / constant), None
        else:
            V, penalty, p = _metric.step(problem, metric, Y, gradient, constant, guess)
        u = A.adjoint(V)
        length = product(V - Y, V - Y, constant)
        bend = smoothness * problem.sum((u - momentum.prediction) ** 2)
        fits = (bend <= slack * length) | now.done | ~jnp.isfinite(bend)
        return V, u, penalty, p, length, bend, fits

    def again(state):
        constant = jnp.where(state[1][-1], state[0], _GROW * state[0])
        return constant, attempt(constant)

    none = jnp.zeros_like(momentum.constant)
    nothing = now.value, now.prediction, none, guess, none, none, jnp.zeros(none.shape, bool)
    state = varying((momentum.constant / _GROW, nothing), problem)
    constant, (V, u, penalty, p, length, bend, _) = lax.while_loop(
        lambda state: ~jnp.all(state[1][-1]), again, state
    )
    moved = problem.norm(V - Y)
    following = advanced(problem, now, V, u, penalty, dual, moved, tol)
    restart = product(Y - V, V - now.value, constant) > 0
    t = jnp.where(restart, 1.0, 0.5 * (1.0 + jnp.sqrt(1.0 + 4.0 * momentum.t**2)))
    weight = jnp.where(restart, 0.0, (momentum.t - 1.0) / t)
    loose = _SLACK * bend < length
    after = Momentum(
        V + expanded(weight, V) * (V - now.value),
        u + expanded(weight, u) * (u - now.prediction),
        t,
        jnp.where(loose, _SHRINK * constant, constant),
        p,
    )
    return following, kept(now.done, momentum, after)
