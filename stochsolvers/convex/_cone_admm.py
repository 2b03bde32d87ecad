"""ADMM for the convex programs of ReLU networks: slacks for the cones, and no inner solver."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from stochsolvers import _checks
from stochsolvers._shards import varying
from stochsolvers._typing import Array, value_object
from stochsolvers.convex import _factor
from stochsolvers.convex._algorithm import Algorithm, Iterate, Progress, kept, report
from stochsolvers.convex._factor import Factor
from stochsolvers.convex._kernel_admm import RELAXATION
from stochsolvers.convex._relu_problem import ReLUProblem
from stochsolvers.convex._terms import Dual, expanded
from stochsolvers.losses import Squares

PENALTY, SLACK_PENALTY = 1.0, 1.0
"""ρ = (β/β_max) λ̄ and ρ_s = (β/β_max) λ̄ / mean_j ||x_j||², with β_max of the program without cones."""


@value_object
class ConeADMM(Algorithm):
    r"""ADMM on U = Z (the norms) and G U = S ≥ 0 (the cones), for squares; G_i = (2 D_i − I) X.

    G_iᵀ G_i = XᵀX for every pattern, so that B = ρI + ρ_s XᵀX serves for all of them, and with F = [A*,
    −A*] the
    quadratic step is exact:

        q = ρ(Z − Λ) + ρ_s Gᵀ(S − N),   r = (I + K_c)⁻¹ (F B⁻¹ q − y),   K_c = 2 (X B⁻¹ Xᵀ) ∘ (D Dᵀ),
        U = B⁻¹ (q − Fᵀ r),   Z⁺ = shrink(Û + Λ, β/ρ),   S⁺ = max(Ĝ + N, 0)

    with over-relaxed Û and Ĝ, and scaled duals Λ and N. a = −ρ_s N ≥ 0 are multipliers of the cones, r a
    dual point: every iteration has a lower bound. Z is moved into the cones along the gates, which are
    inside them, and the best point so far is the result: every iteration has a feasible point as well.

    Some thousand iterations reach gaps of some 1e-4; for 1e-6 and below, on small programs, there is
    `InteriorPoint`.

    Args:
      max_iters: the most iterations, traced.
    """

    def check(self, problem: Any) -> None:
        """Refuse what is no cone program with squares, and patches."""
        if not isinstance(problem, ReLUProblem):
            _checks.fail("problem of ConeADMM", "a ReLUProblem", type(problem).__name__)
        if not isinstance(problem.loss, Squares):
            _checks.fail("loss of ConeADMM", "Squares()", repr(problem.loss))
        if problem.X.ndim == 3:
            _checks.fail("X of ConeADMM", "data of shape (n, d), without patches", problem.X.shape)

    def minimise(
        self, problem: Any, init: Array | None, tol: Array, progress: Progress | None
    ) -> tuple[Iterate, Array]:
        """See the class; also the multipliers a of the best dual point, shape (*batch, 2, P, n)."""
        cones = _Cones.of(problem)
        first, split = _start(problem, cones, init)

        def step(carry):
            k, now, split = carry
            following, split = _step(problem, cones, now, split, tol)
            report(progress, k, following)
            return k + 1, following, split

        def unfinished(carry):
            return (carry[0] < self.max_iters) & ~jnp.all(carry[1].done)

        carry = varying((jnp.zeros((), int), first, split), problem)
        _, last, split = lax.while_loop(unfinished, step, carry)
        return last, split.multipliers


class _Cones(NamedTuple):
    """What does not change: X, the signs 2D − 1, the gates and what they give, B⁻¹, factor of I + K_c."""

    signs: Array  # (P, n)
    gates: Array  # (P, d), unit vectors
    margins: Array  # (P, n): G_i g_i ≥ 0
    inverse: Array  # B⁻¹
    factor: Factor
    rho: Array
    slack_rho: Array

    @classmethod
    def of(cls, problem: Any) -> "_Cones":
        X, mask, dtype = problem.X, problem.patterns.mask, problem.dtype
        signs = jnp.where(mask.T, 1.0, -1.0).astype(dtype)
        gates = problem.patterns.gates.T.astype(dtype)
        norms = jnp.sqrt(jnp.sum(gates**2, -1, keepdims=True))
        gates = gates / jnp.where(norms > 0, norms, 1.0)
        rho, slack_rho = _penalties(problem)
        D = mask.astype(dtype)
        gram = jnp.matmul(X.T, X, precision="highest")
        B = rho * jnp.eye(len(gram), dtype=dtype) + slack_rho * gram
        inverse = jnp.linalg.inv(B)
        K = 2.0 * (X @ inverse @ X.T) * (D @ D.T)
        factor = _factor.factor(0.5 * (K + K.T), 1.0)
        margins = signs * (gates @ X.T)
        return cls(signs, gates, margins, inverse, factor, rho, slack_rho)


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
    """Z, Λ, shape (*batch, 2, P, d); S, N and the best dual multipliers, shape (*batch, 2, P, n)."""

    sparse: Array
    dual: Array
    slack: Array
    slack_dual: Array
    multipliers: Array


def _start(problem: Any, cones: _Cones, init: Array | None) -> tuple[Iterate, _Split]:
    U = jnp.zeros(problem.shape, problem.dtype) if init is None else init
    G = _times(cones.signs, U @ problem.X.T)
    feasible, u, objective = _feasible(problem, cones, U, G)
    none = jnp.zeros(problem.batch_shape, problem.dtype)
    first = Iterate(
        value=feasible,
        prediction=u,
        objective=objective,
        dual=Dual(none - jnp.inf, jnp.zeros_like(problem.inputs)),
        done=none > 0,
        iterations=jnp.zeros(problem.batch_shape, int),
        moved=none,
    )
    slack = jnp.maximum(G, 0.0)
    return first, _Split(U, jnp.zeros_like(U), slack, jnp.zeros_like(slack), jnp.zeros_like(slack))


def _feasible(problem: Any, cones: _Cones, Z: Array, G: Array) -> tuple[Array, Array, Array]:
    """Z moved into the cones along the gates, t_i = max_j −(G z)_ij / (G g)_ij; its A* and its objective."""
    tiny = 1e3 * float(jnp.finfo(problem.dtype).tiny)
    short = jnp.maximum(-G, 0.0)
    steps = jnp.max(_times(1.0 / jnp.maximum(cones.margins, tiny), short), -1)
    active = jnp.any(Z != 0, -1)
    steps = jnp.where(active, steps * (1.0 + 8.0 * float(jnp.finfo(problem.dtype).eps)), 0.0)
    moved = Z + _times(cones.gates, steps[..., None])
    products = G + _times(cones.margins, steps[..., None])
    u = _gated_sum(cones, products)
    norms = jnp.sqrt(jnp.sum(moved**2, -1))
    penalty = problem.beta * problem.sum(norms)
    objective = 0.5 * problem.sum((u - problem.inputs) ** 2) + penalty
    return moved, u, jnp.where(jnp.isfinite(objective), objective, jnp.inf)


def _times(array: Array, other: Array) -> Array:
    """An array (P, n) or (P, d) times one with more axes in front."""
    return jnp.expand_dims(array, tuple(range(other.ndim - array.ndim))) * other


def _gated_sum(cones: _Cones, products: Array) -> Array:
    """A*(V − W) of G V and G W, where D_i X v_i = max(signs, 0) G_i v_i."""
    both = products[..., 0, :, :] - products[..., 1, :, :]
    return jnp.sum(_times(jnp.maximum(cones.signs, 0.0), both), -2)


def _step(
    problem: Any, cones: _Cones, now: Iterate, split: _Split, tol: Array
) -> tuple[Iterate, _Split]:
    X, y, a, signs = problem.X, problem.inputs, RELAXATION, cones.signs
    pulled = _times(signs, split.slack - split.slack_dual) @ X
    q = cones.rho * (split.sparse - split.dual) + cones.slack_rho * pulled
    T = q @ cones.inverse
    GT = _times(signs, T @ X.T)
    residual = cones.factor.solve(_gated_sum(cones, GT) - y)
    image = problem.linear_map.base(residual)
    back = image @ cones.inverse
    U = T - jnp.stack([back, -back], -3)
    GB = _times(signs, back @ X.T)
    GU = GT - jnp.stack([GB, -GB], -3)
    multipliers = jnp.maximum(-cones.slack_rho * split.slack_dual, 0.0)
    dual, scale = _dual(problem, cones, residual, image, multipliers)
    better = dual.value > now.dual.value
    point = a * U + (1.0 - a) * split.sparse + split.dual
    norms = jnp.sqrt(jnp.sum(point**2, -1, keepdims=True))
    left = jnp.maximum(norms - problem.beta / cones.rho, 0.0)
    Z = left / jnp.where(left > 0, norms, 1.0) * point
    reach = a * GU + (1.0 - a) * split.slack + split.slack_dual
    slack = jnp.maximum(reach, 0.0)
    multipliers = expanded(scale, multipliers) * multipliers
    after_split = _Split(
        Z,
        point - Z,
        slack,
        reach - slack,
        jnp.where(expanded(better, multipliers), multipliers, split.multipliers),
    )
    feasible, u, objective = _feasible(problem, cones, Z, _times(signs, Z @ X.T))
    lower = objective < now.objective
    value = jnp.maximum(dual.value, now.dual.value)
    best = jnp.minimum(objective, now.objective)
    after = Iterate(
        value=jnp.where(expanded(lower, feasible), feasible, now.value),
        prediction=jnp.where(expanded(lower, u), u, now.prediction),
        objective=best,
        dual=Dual(value, jnp.where(expanded(better, dual.point), dual.point, now.dual.point)),
        done=best - value <= tol * best,
        iterations=now.iterations + 1,
        moved=problem.norm(Z - split.sparse),
    )
    return kept(now.done, (now, split), (after, after_split))


def _dual(
    problem: Any, cones: _Cones, residual: Array, image: Array, multipliers: Array
) -> tuple[Dual, Array]:
    """D(t r) with the largest useful t for which ||∓A_iᵀ t r + G_iᵀ t a_i|| ≤ β."""
    combined = _times(cones.signs, multipliers) @ problem.X
    sides = jnp.stack([-image, image], -3) + combined
    largest = jnp.sqrt(jnp.max(jnp.sum(sides**2, -1), (-2, -1)))
    limit = problem.beta / jnp.where(largest > 0, largest, 1.0)
    limit = jnp.where(largest > 0, limit, jnp.inf)
    slope = problem.sum(problem.inputs * residual)
    curve = problem.sum(residual**2)
    t = jnp.clip(-slope / jnp.where(curve > 0, curve, 1.0), 0.0, limit)
    return Dual(-t * (slope + 0.5 * t * curve), expanded(t, residual) * residual), t
