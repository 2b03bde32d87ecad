"""ADMM for the convex programs of ReLU networks: slacks for the cones, and no inner solver."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from stochsolvers import _checks
from stochsolvers._shards import varying
from stochsolvers._typing import Array, value_object
from stochsolvers.convex import _factor
from stochsolvers.convex._algorithm import Algorithm, Iterate, Progress, kept, reached, report
from stochsolvers.convex._cone_points import Inside, feasible, projected, spread
from stochsolvers.convex._factor import Factor
from stochsolvers.convex._relu_problem import ReLUProblem
from stochsolvers.convex._terms import Dual, expanded
from stochsolvers.losses import Squares

PENALTY, SLACK_PENALTY = 1.0, 0.3
"""ρ = (β/β_max) λ̄ and ρ_s = 0.3 (β/β_max) λ̄ / mean_j ||x_j||², with β_max of the program without cones."""
_RELAXATION = 1.8
_CHECK = 10
"""Iterations between lower bounds."""
_LEAST, _SHARE = 200, 5
"""Iterations between projections: at least so many, and a fifth of those done."""
_STEPS = 300
"""Of a projection."""


@value_object
class ConeADMM(Algorithm):
    r"""ADMM on U = Z (the norms) and G U = S ≥ 0 (the cones), for squares; G_i = (2 D_i − I) X.

    G_iᵀ G_i = XᵀX for every pattern, so that B = ρI + ρ_s XᵀX serves for all of them, and with F = [A*,
    −A*] the
    quadratic step is exact:

        q = ρ(Z − Λ) + ρ_s Gᵀ(S − N),   r = (I + K_c)⁻¹ (F B⁻¹ q − y),   K_c = 2 (X B⁻¹ Xᵀ) ∘ (D Dᵀ),
        U = B⁻¹ (q − Fᵀ r),   Z⁺ = shrink(Û + Λ, β/ρ),   S⁺ = max(Ĝ + N, 0)

    with Û = αU + (1 − α)Z and Ĝ = αGU + (1 − α)S, α = 1.8, and scaled duals Λ and N. The state is Z + Λ and
    S + N: Z = shrink(Z + Λ), S = max(S + N, 0).

    Every 10 iterations a lower bound and a feasible point are computed. a = −ρ_s N ≥ 0 are multipliers of
    the cones and r a dual point. Z is moved into the cones along the gates, which are inside them. After
    200 iterations, and every 200 or a fifth of those done, it is first moved to about the nearest point
    inside,

        argmin ||X(u_i − z_i)||  subject to  G_i u_i ≥ 0,

    without which the gates, whose margins are small, take it far. The best point so far is the result.

    Some thousand iterations reach gaps of 1e-4; for 1e-6 and below, on small programs, there is
    `InteriorPoint`.

    Args:
      max_iters: the most iterations, traced.
    """

    def check(self, problem: Any) -> None:
        """Refuse what is no `ReLUProblem` with squares, joint outputs, and patches."""
        if not isinstance(problem, ReLUProblem):
            _checks.fail("problem of ConeADMM", "a ReLUProblem", type(problem).__name__)
        if not isinstance(problem.loss, Squares):
            _checks.fail("loss of ConeADMM", "Squares()", repr(problem.loss))
        if problem.joint:
            _checks.fail("problem of ConeADMM", "outputs of programs of their own", "joint ones")
        if problem.X.ndim == 3:
            _checks.fail("X of ConeADMM", "data of shape (n, d), without patches", problem.X.shape)

    def minimise(
        self, problem: Any, init: Array | None, tol: Array, progress: Progress | None
    ) -> tuple[Iterate, Array]:
        """See the class; also the multipliers a of the best dual point, shape (*batch, 2, P, n)."""
        cones = _Cones.of(problem)
        cap = jnp.asarray(self.max_iters)

        def check(carry):
            k, until, now, split = carry
            count = jnp.minimum(_CHECK, cap - k)
            now, split = _block(problem, cones, now, split, count, tol)
            report(progress, k + count - 1, now)
            return k + count, until, now, split

        def unfinished(carry):
            return (carry[0] < jnp.minimum(cap, carry[1])) & ~jnp.all(carry[2].done)

        def stretch(carry):
            k, now, split = carry
            until = k + jnp.maximum(_LEAST, k // _SHARE)
            k, _, now, split = lax.while_loop(unfinished, check, (k, until, now, split))
            return k, _projected(problem, cones, now, split, tol), split

        def to_do(carry):
            return (carry[0] < cap) & ~jnp.all(carry[1].done)

        carry = varying((jnp.zeros((), cap.dtype), *_start(problem, cones, init)), problem)
        _, last, split = lax.while_loop(to_do, stretch, carry)
        return last, split.multipliers


class _Cones(NamedTuple):
    """What does not change: the cones, B⁻¹, the factor of I + K_c, ρ and ρ_s."""

    inside: Inside
    inverse: Array
    factor: Factor
    rho: Array
    slack_rho: Array

    @classmethod
    def of(cls, problem: Any) -> "_Cones":
        X, dtype = problem.X, problem.dtype
        D = problem.patterns.mask.astype(dtype)
        rho, slack_rho = _penalties(problem)
        gram = jnp.matmul(X.T, X, precision="highest")
        inverse = jnp.linalg.inv(rho * jnp.eye(len(gram), dtype=dtype) + slack_rho * gram)
        K = 2.0 * (X @ inverse @ X.T) * (D @ D.T)
        factor = _factor.factor(0.5 * (K + K.T), 1.0)
        return cls(Inside.of(problem, gram), inverse, factor, rho, slack_rho)


def _penalties(problem: Any) -> tuple[Array, Array]:
    K = problem.gated_map.kernel_matrix()
    trace = jnp.trace(K)
    mean = jnp.sum(K**2) / jnp.where(trace > 0, trace, 1.0)
    norms = jnp.sqrt(jnp.max(jnp.sum(problem.gated_map(problem.inputs) ** 2, -1), -1))
    share = jnp.exp(jnp.mean(jnp.log(jnp.clip(problem.beta / norms, 1e-6, 1.0))))
    size = jnp.mean(jnp.sum(problem.X**2, -1))
    scale = share * mean
    return PENALTY * scale, SLACK_PENALTY * scale / jnp.where(size > 0, size, 1.0)


class _Split(NamedTuple):
    """Z + Λ, shape (*batch, 2, P, d); (2D − I)(S + N) and the best multipliers, shape (*batch, 2, P, n)."""

    point: Array
    reach: Array
    multipliers: Array


def _start(problem: Any, cones: _Cones, init: Array | None) -> tuple[Iterate, _Split]:
    """Λ = (β/ρ) z_i/||z_i||, what it is at an optimum, and N = 0."""
    U = jnp.zeros(problem.shape, problem.dtype) if init is None else init
    products = U @ problem.X.T
    value, u, objective = feasible(problem, cones.inside, U, products)
    none = jnp.zeros(problem.batch_shape, problem.dtype)
    first = Iterate(
        value=value,
        prediction=u,
        objective=objective,
        dual=Dual(none - jnp.inf, jnp.zeros_like(problem.inputs)),
        done=none > 0,
        iterations=jnp.zeros(problem.batch_shape, int),
        moved=none,
    )
    norms = jnp.sqrt(jnp.sum(U**2, -1, keepdims=True))
    unit = U / jnp.where(norms > 0, norms, 1.0)
    return first, _Split(U + problem.beta / cones.rho * unit, products, jnp.zeros_like(products))


def _sparse(problem: Any, cones: _Cones, point: Array) -> Array:
    """Z = shrink(Z + Λ, β/ρ)."""
    norms = jnp.sqrt(jnp.sum(point**2, -1, keepdims=True))
    left = jnp.maximum(norms - problem.beta / cones.rho, 0.0)
    return left / jnp.where(left > 0, norms, 1.0) * point


def _step(
    problem: Any, cones: _Cones, point: Array, reach: Array
) -> tuple[Array, Array, Array, Array]:
    """The next state, r and A r. S − N = |S + N|, Z − Λ = 2Z − (Z + Λ)."""
    X, signs = problem.X, spread(cones.inside.signs, reach.ndim)
    Z = _sparse(problem, cones, point)
    pulled = (signs * jnp.abs(reach)) @ X
    T = (cones.rho * (2.0 * Z - point) + cones.slack_rho * pulled) @ cones.inverse
    difference = (T[..., 0, :, :] - T[..., 1, :, :]) @ X.T
    active = jnp.maximum(signs[..., 0, :, :], 0.0)
    residual = cones.factor.solve(jnp.sum(active * difference, -2) - problem.inputs)
    image = problem.linear_map.base(residual)
    back = image @ cones.inverse
    U = T - jnp.stack([back, -back], -3)
    slack = jnp.where(signs * reach > 0, reach, 0.0)
    point = point + _RELAXATION * (U - Z)
    return point, reach + _RELAXATION * (U @ X.T - slack), residual, image


def _block(
    problem: Any, cones: _Cones, now: Iterate, split: _Split, count: Array, tol: Array
) -> tuple[Iterate, _Split]:
    """Some iterations, and what they prove."""

    def step(_, carry):
        point, reach, *_ = carry
        return *_step(problem, cones, point, reach), point

    nothing = jnp.zeros_like(problem.inputs)
    image = jnp.zeros_like(split.point[..., 0, :, :])
    carry = (split.point, split.reach, nothing, image, split.point)
    point, reach, residual, image, last = lax.fori_loop(0, count, step, carry)
    signs = spread(cones.inside.signs, reach.ndim)
    multipliers = cones.slack_rho * jnp.maximum(-signs * reach, 0.0)
    dual, scale = _dual(problem, cones, residual, image, multipliers)
    better = dual.value > now.dual.value
    multipliers = expanded(scale, multipliers) * multipliers
    multipliers = jnp.where(expanded(better, multipliers), multipliers, split.multipliers)
    chosen = jnp.where(expanded(better, dual.point), dual.point, now.dual.point)
    Z = _sparse(problem, cones, point)
    after = now._replace(
        dual=Dual(jnp.maximum(dual.value, now.dual.value), chosen),
        iterations=now.iterations + count,
        moved=problem.norm(Z - _sparse(problem, cones, last)),
    )
    after = _better(problem, after, feasible(problem, cones.inside, Z, Z @ problem.X.T), tol)
    return kept(now.done, (now, split), (after, _Split(point, reach, multipliers)))


def _projected(problem: Any, cones: _Cones, now: Iterate, split: _Split, tol: Array) -> Iterate:
    """With the point near Z and inside the cones, where that is better; no steps where all are done."""
    inside, X = cones.inside, problem.X
    Z = _sparse(problem, cones, split.point)
    steps = jnp.where(jnp.all(now.done), 0, _STEPS)
    Z = projected(inside, Z, Z @ X.T, steps)
    after = _better(problem, now, feasible(problem, inside, Z, Z @ X.T), tol)
    return kept(now.done, now, after)


def _better(problem: Any, now: Iterate, other: tuple[Array, Array, Array], tol: Array) -> Iterate:
    """The iterate with another feasible point, where its objective is less."""
    value, u, objective = other
    lower = objective < now.objective
    best = jnp.minimum(objective, now.objective)
    return now._replace(
        value=jnp.where(expanded(lower, value), value, now.value),
        prediction=jnp.where(expanded(lower, u), u, now.prediction),
        objective=best,
        done=reached(best, now.dual.value, tol),
    )


def _dual(
    problem: Any, cones: _Cones, residual: Array, image: Array, multipliers: Array
) -> tuple[Dual, Array]:
    """D(t r) with the largest useful t for which ||∓A_iᵀ t r + G_iᵀ t a_i|| ≤ β."""
    combined = (spread(cones.inside.signs, multipliers.ndim) * multipliers) @ problem.X
    sides = jnp.stack([-image, image], -3) + combined
    largest = jnp.sqrt(jnp.max(jnp.sum(sides**2, -1), (-2, -1)))
    limit = problem.beta / jnp.where(largest > 0, largest, 1.0)
    limit = jnp.where(largest > 0, limit, jnp.inf)
    slope = problem.sum(problem.inputs * residual)
    curve = problem.sum(residual**2)
    t = jnp.clip(-slope / jnp.where(curve > 0, curve, 1.0), 0.0, limit)
    return Dual(-t * (slope + 0.5 * t * curve), expanded(t, residual) * residual), t
