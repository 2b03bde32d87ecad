"""ADMM for gated programs on the n × n kernel of the data, which is factored once."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from stochsolvers import _checks
from stochsolvers._shards import varying
from stochsolvers._typing import Array, value_object
from stochsolvers.convex import _gauge, _factor, _fista
from stochsolvers.convex._algorithm import Algorithm, Iterate, Progress, advanced, kept, report, start
from stochsolvers.convex._gauge import expanded
from stochsolvers.convex._factor import Factor
from stochsolvers.convex._problems import GatedProblem
from stochsolvers.losses import Squares

RELAXATION = 1.6
PENALTY = 0.02
"""ρ = 0.02 (β/β_max) λ_max(K) to begin with."""
BALANCED = (8, 16, 24)
"""Iterations after which ρ is balanced."""
_WORTH_IT = 1.6


@value_object
class KernelADMM(Algorithm):
    r"""ADMM on the split min ½||A* U − y||² + R(V), U = V, for squares and every regulariser.

        r = ρ (K + ρI)⁻¹ (A* V − A* Λ − y),   K = A* A,   W = V − α A r/ρ + (1 − α) Λ,
        V⁺ = prox_{R/ρ}(W),   Λ⁺ = W − V⁺

    r = A* U − y at the minimiser U = V − Λ − A r/ρ of the quadratic step, α = 1.6. A* Λ is carried by linearity, so
    an iteration takes one product with A, one with A* and two triangular solves of size n, and its r is a dual
    point: the duality gap costs nothing more. Round-off in K does not move the fixed point.

    It begins with FISTA for as many iterations as cost what factoring costs, which suffice where β is large.
    ρ = 0.02 (β/β_max) λ_max(K), multiplied after 8, 16 and 24 iterations by the square root of the relative primal
    over the relative dual residual; K + ρI is factored again where that is off by more than 1.6. All programs of a
    batch, and all outputs of a joint program, share the factor.

    Args:
      max_iters: the most iterations, those of FISTA with them, traced.

    References:
      Boyd et al., Distributed optimization and statistical learning via ADMM, 2011, section 3.4; MATH of this
      library's documentation.
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
        largest = _fista.power_estimate(problem)
        first = start(problem, init)
        count = jnp.minimum(jnp.asarray(self.max_iters), _warm_up(problem))
        begun, _ = _fista.iterate(problem, first, largest, count, tol, progress)
        arguments = problem, begun, largest, jnp.asarray(self.max_iters), tol
        return lax.cond(
            jnp.all(begun.done) | (count >= self.max_iters),
            lambda *arguments: arguments[1],
            lambda *arguments: _iterate(*arguments, progress),
            *arguments,
        )


def _warm_up(problem: Any) -> int:
    """FISTA iterations that cost as much as K and its factor, at least 10 and at most 100."""
    X, mask = problem.linear_map._rows()
    (n, d), P, programs = X.shape, mask.shape[1], max(1, problem.inputs.size // problem.inputs.shape[-1])
    setup = n**2 * (d + P) + n**3 // 3
    return max(10, min(100, setup // (4 * n * d * P * programs)))


class _Split(NamedTuple):
    """Λ and A* Λ, ρ, and the residuals on which it is balanced."""

    scaled: Array
    prediction: Array
    rho: Array
    primal: Array
    dual: Array


def initial_penalty(problem: Any, largest: Array) -> Array:
    """ρ of all programs, from the geometric mean of their β/β_max."""
    peak = _gauge.gauge(problem, problem.gradient_at_zero())
    floor = 64.0 * float(jnp.finfo(problem.dtype).eps)
    share = jnp.exp(jnp.mean(jnp.log(jnp.clip(peak, 1.0, 1e6))))
    return jnp.maximum(PENALTY / share, floor) * largest


def _iterate(
    problem: Any,
    first: Iterate,
    largest: Array,
    max_iters: Array,
    tol: Array,
    progress: Progress | None,
) -> Iterate:
    """Segments between balancing, each with its factor."""
    K = problem.linear_map.kernel_matrix()
    rho = initial_penalty(problem, largest)
    begin = jnp.max(first.iterations)

    def segment(carry):
        k, now, split, factored = carry
        factored = lax.cond(
            split.rho == factored[0],
            lambda: factored,
            lambda: (split.rho, _factor.factor(K, split.rho)),
        )
        stages = jnp.asarray(BALANCED)
        upcoming = jnp.where(stages > k - begin, stages, jnp.iinfo(stages.dtype).max)
        end = jnp.minimum(jnp.min(upcoming), max_iters - begin) + begin

        def step(carry):
            k, now, split = carry
            following, split = _step(problem, factored[1], now, split, tol)
            report(progress, k, following)
            return k + 1, following, split

        def unfinished(carry):
            return (carry[0] < end) & ~jnp.all(carry[1].done)

        k, now, split = lax.while_loop(unfinished, step, (k, now, split))
        return k, now, _balanced(split), factored

    def unfinished(carry):
        return (carry[0] < max_iters) & ~jnp.all(carry[1].done)

    split = _from_iterate(problem, first, rho)
    nothing = jnp.zeros_like(rho), _factor.empty(len(K), K.dtype)
    carry = varying((begin, first, split, nothing), problem)
    return lax.while_loop(unfinished, segment, carry)[1]


def _from_iterate(problem: Any, now: Iterate, rho: Array) -> _Split:
    """Λ = −A (A* V − y)/ρ, what it is at an optimum, brought into the domain that V's prox has."""
    residual = now.prediction - problem.inputs
    image = problem.linear_map(residual)
    scaled = -image / rho
    programs = jnp.full(problem.batch_shape, 1.0 / rho, image.dtype)
    scaled = scaled - _gauge.prox(problem, scaled, programs)[0]
    none = jnp.ones((), image.dtype)
    return _Split(scaled, problem.linear_map.adjoint(scaled), rho, none, none)


def _step(
    problem: Any, factored: Factor, now: Iterate, split: _Split, tol: Array
) -> tuple[Iterate, _Split]:
    A, y, rho, a = problem.linear_map, problem.inputs, split.rho, RELAXATION
    V, scaled = now.value, split.scaled
    residual = rho * factored.solve(now.prediction - split.prediction - y)
    image = A(residual)
    dual = _gauge.dual(problem, residual, image)
    point = V - a / rho * image + (1.0 - a) * scaled
    programs = jnp.full(problem.batch_shape, 1.0 / rho, image.dtype)
    following, penalty = _gauge.prox(problem, point, programs)
    u = A.adjoint(following)
    prediction = split.prediction + a * (residual + y) + (1.0 - a) * now.prediction - u
    after = advanced(problem, now, following, u, penalty, dual, tol)
    kept_scaled, kept_prediction = kept(
        now.done, (scaled, split.prediction), (point - following, prediction)
    )
    smooth = V - scaled - image / rho
    primal = jnp.sum((smooth - following) ** 2) / _positive(jnp.sum(following**2))
    moved = jnp.sum((following - V) ** 2) / _positive(jnp.sum(scaled**2))
    return after, _Split(kept_scaled, kept_prediction, rho, primal, moved)


def _positive(number: Array) -> Array:
    return jnp.where(number > 0, number, 1.0)


def _balanced(split: _Split) -> _Split:
    """ρ times the square root of the ratio of its relative residuals, if that is far from one."""
    ratio = (split.primal / _positive(split.dual)) ** 0.25
    ratio = jnp.clip(jnp.where(jnp.isfinite(ratio) & (ratio > 0), ratio, 1.0), 0.1, 10.0)
    off = (ratio > _WORTH_IT) | (ratio < 1.0 / _WORTH_IT)
    factor = jnp.where(off, ratio, 1.0)
    return split._replace(
        rho=split.rho * factor,
        scaled=split.scaled / factor,
        prediction=split.prediction / factor,
    )
