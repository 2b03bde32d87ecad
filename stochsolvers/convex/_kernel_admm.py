"""ADMM for gated programs on the n × n kernel of the data, which is factored once."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from stochsolvers import _checks
from stochsolvers._shards import varying
from stochsolvers._typing import Array, value_object
from stochsolvers.convex import _factor, _terms
from stochsolvers.convex._algorithm import (
    Algorithm,
    Iterate,
    Progress,
    Search,
    advanced,
    is_large,
    kept,
    reached,
    report,
    start,
)
from stochsolvers.convex._problems import GatedProblem
from stochsolvers.losses import Squares
from stochsolvers.solvers import _mixing

RELAXATION = 1.6
PENALTY = 0.09
"""ρ = 0.09 (β/β_max) λ̄, λ̄ = ||K||²_F / tr K, the mean of K's eigenvalues by their own weight."""
MEMORY = 5
"""The most W that are mixed."""
_NOISE = 200.0
"""||T(W) − W|| of so many ε ||W|| is too much round-off for differences of it to say anything."""


@value_object
class KernelADMM(Algorithm):
    r"""ADMM on the split min ½||A* U − y||² + R(V), U = V, for squares and every regulariser.

        r = ρ (K + ρI)⁻¹ (A* V − A* Λ − y),   K = A* A,   W = V − α A r/ρ + (1 − α) Λ,
        V⁺ = prox_{R/ρ}(W),   Λ⁺ = W − V⁺

    r = A* U − y at the minimiser U = V − Λ − A r/ρ of the quadratic step, α = 1.6. A* Λ is carried by
    linearity, so an iteration takes one product with A, one with A* and two triangular solves of size n,
    and its r is a dual point: the duality gap costs nothing more. Round-off in K does not move the fixed
    point.

    Of programs with n P d ≥ 3·10⁷ the next W is a mixture of the last five, by Anderson's update with its
    safeguard, until round-off hides their differences: a third fewer iterations, at no product.

    ρ = 0.09 (β/β_max) λ̄, λ̄ = ||K||²_F / tr K, about 0.03 (β/β_max) λ_max(K). It is not adapted: balancing
    its residuals saved a third of the iterations on some data and took ten times as many on others. All
    programs of a batch, and all outputs of a joint program, share ρ and the factor.

    It also ends, without convergence, after 500 iterations, or a fifth of those done, that made no gap
    smaller.

    Args:
      max_iters: the most iterations, traced.

    References:
      Boyd et al., Distributed optimization and statistical learning via ADMM, 2011, section 3.4;
      Walker and Ni, Anderson acceleration for fixed-point iterations, 2011.
    """

    def check(self, problem: Any) -> None:
        """Refuse what is no gated program with squares."""
        if not isinstance(problem, GatedProblem):
            _checks.fail("problem of KernelADMM", "a GatedProblem", type(problem).__name__)
        if not isinstance(problem.loss, Squares):
            _checks.fail("loss of KernelADMM", "Squares()", repr(problem.loss))

    def minimise(
        self, problem: Any, init: Array | None, tol: Array, progress: Progress | None
    ) -> Iterate:
        """See the class."""
        first, cap = start(problem, init), jnp.asarray(self.max_iters)
        K = problem.linear_map.kernel_matrix()
        trace = jnp.trace(K)
        mean = jnp.sum(K * (K / jnp.where(trace > 0, trace, 1.0)))
        rho = penalty_of(problem, mean)
        factor = _factor.factor(K, rho)

        def solve(right, guess):
            del guess
            return factor.solve(right)

        return run(problem, solve, rho, first, init is None, cap, tol, progress)


class Split(NamedTuple):
    """Λ and A* Λ, and r, from which an iterative solver of K + ρI goes on."""

    scaled: Array
    prediction: Array
    residual: Array


class Past(NamedTuple):
    """The last few W and what they were mapped to, and A* of the latter, shape (m, *batch, n)."""

    history: _mixing.History
    predictions: Array


def penalty_of(problem: Any, mean: Array) -> Array:
    """ρ of all programs, from the geometric mean of their β/β_max and λ̄."""
    slope = problem.loss.derivative(jnp.zeros_like(problem.inputs), problem.inputs)
    peak = _terms.gauge(problem, problem.linear_map(slope))
    share = jnp.exp(jnp.mean(jnp.log(jnp.clip(peak, 1.0, 1e6))))
    floor = 64.0 * float(jnp.finfo(problem.dtype).eps)
    rho = jnp.maximum(PENALTY / share, floor) * mean
    return jnp.where(rho > 0, rho, 1.0)


def run(
    problem: Any,
    solve: Any,
    rho: Array,
    first: Iterate,
    from_zero: bool,
    max_iters: Array,
    tol: Array,
    progress: Progress | None,
) -> Iterate:
    """The iterations, given (right, guess) ↦ (K + ρI)⁻¹ right."""
    if from_zero:
        k, first, split = _before_zero(problem, first)
    else:
        residual = first.prediction - problem.inputs
        image = problem.linear_map(residual)
        dual = _terms.better(problem, first.dual, _terms.dual(problem, residual, image))
        done = reached(first.objective, dual.value, tol)
        first = first._replace(dual=dual, done=done)
        split = _from_image(problem, residual, image, rho)
        k = jnp.max(first.iterations)
    past = _no_past(problem, rho)

    def step(carry):
        k, now, split, past, search = carry
        following, split, past = _step(problem, solve, rho, k, now, split, past, tol, from_zero)
        report(progress, k, following)
        return k + 1, following, split, past, search.after(k, following)

    def unfinished(carry):
        k, now, _, _, search = carry
        return (k < max_iters) & ~search.stalled(k) & ~jnp.all(now.done)

    carry = varying((k, first, split, past, Search.begun(problem, k)), problem)
    return lax.while_loop(unfinished, step, carry)[1]


def _no_past(problem: Any, rho: Array) -> Past | None:
    """Before the first iteration; None for small programs, whose compilation it would lengthen."""
    if not is_large(problem):
        return None
    y = problem.inputs
    largest = jnp.max(jnp.abs(y), axis=tuple(range(len(problem.batch_shape), y.ndim)))
    unit = jnp.where(largest > 0, largest, 1.0) / jnp.sqrt(rho)
    V = jnp.zeros(problem.shape, problem.dtype)
    history = _mixing.no_history(V, unit, MEMORY)
    return Past(history, jnp.zeros((MEMORY, *y.shape), y.dtype))


def _before_zero(problem: Any, first: Iterate) -> tuple[Array, Iterate, Split]:
    """Iteration −1, which evaluates V_0 = 0 within the loop: what is there twice is compiled twice."""
    nothing = first.prediction
    split = Split(jnp.zeros_like(first.value), nothing, nothing)
    iterations = first.iterations - 1
    return -jnp.ones((), int), first._replace(iterations=iterations), split


def _from_image(problem: Any, residual: Array, image: Array, rho: Array) -> Split:
    """Λ = −A (A* V − y)/ρ, what it is at an optimum, brought into the domain that V's prox has."""
    scaled = -image / rho
    scaled = scaled - _terms.prox(problem, scaled, _steps(problem, rho))[0]
    return Split(scaled, problem.linear_map.adjoint(scaled), residual)


def _steps(problem: Any, rho: Array) -> Array:
    return jnp.full(problem.batch_shape, 1.0 / rho, problem.dtype)


def _step(
    problem: Any,
    solve: Any,
    rho: Array,
    k: Array,
    now: Iterate,
    split: Split,
    past: Past | None,
    tol: Array,
    from_zero: bool,
) -> tuple[Iterate, Split, Past | None]:
    A, y, a, V = problem.linear_map, problem.inputs, RELAXATION, now.value
    right = now.prediction - split.prediction - y
    residual = rho * solve(right, split.residual / rho)
    if from_zero:
        residual = jnp.where(k < 0, -y, residual)
    image = A(residual)
    dual = _terms.dual(problem, residual, image)
    point = V - (a / rho) * image + (1.0 - a) * split.scaled
    reach = split.prediction + a * (residual + y) + (1.0 - a) * now.prediction  # A* of the point
    if past is not None:
        past, point, reach = _mixed(problem, past, k, V + split.scaled, point, reach)
    if from_zero:
        point = jnp.where(k < 0, jnp.zeros((), point.dtype), point)
        reach = jnp.where(k < 0, jnp.zeros((), reach.dtype), reach)
    following, penalty = _terms.prox(problem, point, _steps(problem, rho))
    u = A.adjoint(following)
    after = advanced(problem, now, following, u, penalty, dual, problem.norm(following - V), tol)
    split = kept(now.done, split, Split(point - following, reach - u, residual))
    return after, split, past


def _mixed(
    problem: Any, past: Past, k: Array, W: Array, point: Array, reach: Array
) -> tuple[Past, Array, Array]:
    """The next W and A* of it, by Anderson's update; at k = −1 of nothing that is kept."""
    moved = problem.norm(point - W)
    clear = moved > _NOISE * float(jnp.finfo(W.dtype).eps) * problem.norm(W)
    history, weights = _mixing.weigh(past.history, k, W, point)
    history = history._replace(valid=history.valid & (clear & (k >= 0))[None])
    predictions = past.predictions.at[k % MEMORY].set(reach)
    point = _mixing.combine(weights, history.values)
    return Past(history, predictions), point, _mixing.combine(weights, predictions)
