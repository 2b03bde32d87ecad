"""ADMM for gated programs on the n × n kernel of the data, which is factored once."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from stochsolvers import _checks
from stochsolvers._shards import varying
from stochsolvers._symmetric import symmetric_product
from stochsolvers._typing import Array, value_object
from stochsolvers.convex import _factor, _fista, _terms
from stochsolvers.convex._algorithm import (
    Algorithm,
    Iterate,
    Progress,
    Search,
    advanced,
    kept,
    reached,
    report,
    start,
)
from stochsolvers.convex._gated_map import GatedMap
from stochsolvers.convex._problems import GatedProblem
from stochsolvers.losses import Squares

RELAXATION = 1.6
PENALTY = 0.09
"""ρ = 0.09 (β/β_max) λ̄, λ̄ = ||K||²_F / tr K, the mean of K's eigenvalues by their own weight."""
_SMALL = 2048
"""Up to so many data, no FISTA iterations first: compiling them takes longer than all else."""


@value_object
class KernelADMM(Algorithm):
    r"""ADMM on the split min ½||A* U − y||² + R(V), U = V, for squares and every regulariser.

        r = ρ (K + ρI)⁻¹ (A* V − A* Λ − y),   K = A* A,   W = V − α A r/ρ + (1 − α) Λ,
        V⁺ = prox_{R/ρ}(W),   Λ⁺ = W − V⁺

    r = A* U − y at the minimiser U = V − Λ − A r/ρ of the quadratic step, α = 1.6. A* Λ is carried by
    linearity, so an iteration takes one product with A, one with A* and two triangular solves of size n,
    and its r is a dual point: the duality gap costs nothing more. Round-off in K does not move the fixed
    point.

    For more than 2048 data it begins with FISTA for as many iterations as cost a quarter of what factoring
    costs, which suffice near β_max.
    ρ = 0.09 (β/β_max) λ̄, λ̄ = ||K||²_F / tr K, about 0.03 (β/β_max) λ_max(K). It is not adapted: balancing
    its residuals saved a third of the iterations on some data and took ten times as many on others. All
    programs of a batch, and all outputs of a joint program, share ρ and the factor.

    It also ends, without convergence, after 500 iterations, or a fifth of those done, that made no gap
    smaller.

    Args:
      max_iters: the most iterations, those of FISTA with them, traced.

    References:
      Boyd et al., Distributed optimization and statistical learning via ADMM, 2011, section 3.4.
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
        if problem.inputs.shape[-1] <= _SMALL:
            return _iterate(problem, first, init is None, cap, tol, progress)
        largest = _fista.power_estimate(problem)
        count = jnp.minimum(cap, _warm_up(problem))
        begun, _ = _fista.iterate(problem, first, largest, count, tol, progress)

        def go_on(problem, begun, cap, tol):
            return _iterate(problem, begun, False, cap, tol, progress)

        finished = jnp.all(begun.done) | (count >= cap)
        return lax.cond(finished, lambda *known: known[1], go_on, problem, begun, cap, tol)


def _warm_up(problem: Any) -> int:
    """FISTA iterations that cost a quarter of K and its factor, at least 5 and at most 50."""
    X, mask = problem.linear_map._rows()
    (n, d), P, programs = (
        X.shape,
        mask.shape[1],
        max(1, problem.inputs.size // problem.inputs.shape[-1]),
    )
    setup = n**2 * (d + P) + n**3 // 3
    return max(5, min(50, setup // (16 * n * d * P * programs)))


class Split(NamedTuple):
    """Λ and A* Λ, and r, from which an iterative solver of K + ρI goes on."""

    scaled: Array
    prediction: Array
    residual: Array


def penalty_of(problem: Any, mean: Array) -> Array:
    """ρ of all programs, from the geometric mean of their β/β_max and λ̄."""
    slope = problem.loss.derivative(jnp.zeros_like(problem.inputs), problem.inputs)
    peak = _terms.gauge(problem, problem.linear_map(slope))
    share = jnp.exp(jnp.mean(jnp.log(jnp.clip(peak, 1.0, 1e6))))
    floor = 64.0 * float(jnp.finfo(problem.dtype).eps)
    rho = jnp.maximum(PENALTY / share, floor) * mean
    return jnp.where(rho > 0, rho, 1.0)


def _iterate(
    problem: Any,
    first: Iterate,
    from_zero: bool,
    max_iters: Array,
    tol: Array,
    progress: Progress | None,
) -> Iterate:
    K = kernel_matrix(problem.linear_map)
    trace = jnp.trace(K)
    mean = jnp.sum(K * (K / jnp.where(trace > 0, trace, 1.0)))
    rho = penalty_of(problem, mean)
    block = _factor.BLOCK if len(K) > _SMALL else 2 * _factor.BLOCK  # fewer take less compiling
    factor = _factor.factor(K, rho, block)

    def solve(right, guess):
        del guess
        return factor.solve(right)

    return run(problem, solve, rho, first, from_zero, max_iters, tol, progress)


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

    def step(carry):
        k, now, split, search = carry
        at_zero = k < 0 if from_zero else None
        following, split = _step(problem, solve, rho, now, split, tol, at_zero)
        report(progress, k, following)
        return k + 1, following, split, search.after(k, following)

    def unfinished(carry):
        k, now, _, search = carry
        return (k < max_iters) & ~search.stalled(k) & ~jnp.all(now.done)

    carry = varying((k, first, split, Search.begun(problem, k)), problem)
    return lax.while_loop(unfinished, step, carry)[1]


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


def kernel_matrix(A: GatedMap) -> Array:
    """K = (X Xᵀ) ∘ (D Dᵀ), of many data half of it; of patches summed over their pairs."""
    if A.X.ndim == 3 or len(A.X) <= _SMALL:
        return A.kernel_matrix()
    D = A.patterns.mask.astype(A.X.dtype)
    return symmetric_product(A.X.T, "highest") * symmetric_product(D.T, "highest")


def _steps(problem: Any, rho: Array) -> Array:
    return jnp.full(problem.batch_shape, 1.0 / rho, problem.dtype)


def _step(
    problem: Any,
    solve: Any,
    rho: Array,
    now: Iterate,
    split: Split,
    tol: Array,
    at_zero: Array | None,
) -> tuple[Iterate, Split]:
    A, y, a, V = problem.linear_map, problem.inputs, RELAXATION, now.value
    right = now.prediction - split.prediction - y
    residual = rho * solve(right, split.residual / rho)
    if at_zero is not None:
        residual = jnp.where(at_zero, -y, residual)
    image = A(residual)
    dual = _terms.dual(problem, residual, image)
    point = V - (a / rho) * image + (1.0 - a) * split.scaled
    if at_zero is not None:
        point = jnp.where(at_zero, jnp.zeros((), point.dtype), point)
    following, penalty = _terms.prox(problem, point, _steps(problem, rho))
    u = A.adjoint(following)
    prediction = split.prediction + a * (residual + y) + (1.0 - a) * now.prediction - u
    after = advanced(problem, now, following, u, penalty, dual, problem.norm(following - V), tol)
    return after, kept(now.done, split, Split(point - following, prediction, residual))
