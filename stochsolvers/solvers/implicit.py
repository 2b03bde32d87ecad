r"""Derivatives through a solution: the implicit function theorem at a fixed point.

A solution is a fixed point z = T(z, θ) of T(z, θ) = prox_{ηg}(z − η ∇F(z)), whatever the step η, so

    dz = J dz + (∂T/∂θ) dθ,     J = D M,   D = prox′,   M = I − η ∇²F,     ∇²F = A A* + λ I for squares.

D is the second derivative of a convex function, symmetric with 0 ⪯ D ⪯ I for every prior; so is M for
η ≤ 1/L. D M is then self-adjoint in the semi-inner product <a, b>_M = aᵀ M b, and so conjugate
gradients solve

    (I − D M) p = r,        at one product with A A* and one with D in each iteration.

Forward mode needs w = (I − D M)⁻¹ b, reverse mode u = (I − M D)⁻¹ v:

    w = b + D M (b + p), r = D M b;         u = v + M p, r = D v.

For other losses ∇²F = A diag(∂²ℓ) A* + λ I at the solution. In reverse mode p = D u, so the gradient of the
loss with respect to a bias of each example is η p. It is
what a later call at a nearby point can start its linear solve from (`Implicit.guess`).

Where the restricted system is singular (a fixed point that is not unique) it is consistent for losses
that are constant over the solution set; for other right-hand sides the iteration stops at the
directions without curvature, and leaves their part out. The step is half the solver's, so that M ⪰ 0
for all steps with which prox-GD converges, η < 2/L; the derivative does not depend on it.

Of a problem z = h(z) the map is h itself, and the systems are

    (I − J) w = b,     (I − Jᵀ) u = v,     J = h′(z),

solved by conjugate gradients where J is symmetric with 0 ⪯ J ⪯ I, and else as accelerated fixed points
u = v + Jᵀ u, see `solvers._linear`. An example whose system is not solved has derivatives of NaN, unless
`Implicit.unsolved` says otherwise.

References:
  Bai, Kolter and Koltun 2019; Bolte et al. 2021, Nonsmooth implicit differentiation; Blondel et al. 2022.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from stochsolvers import _checks
from stochsolvers._shards import varying
from stochsolvers._typing import Array, value_object
from stochsolvers.estimators.forms import Gradient
from stochsolvers.problems import FixedPointProblem
from stochsolvers.prox import Prior
from stochsolvers.solvers import _linear
from stochsolvers.solvers.derivatives import Implicit


@value_object
class ProxGradientMap:
    """T(z) = prox_{ηg}(z − η ∇F(z))."""

    gradient: Gradient
    prior: Prior
    step: Array

    def point(self, z: Array) -> Array:
        """z − η ∇F(z)."""
        return z - self.step * self.gradient(z)

    def __call__(self, z: Array) -> Array:
        """T(z)."""
        return self.prior.prox(self.point(z), self.step)


@value_object
class LayerMap:
    """T(z) = h(z) of a problem z = h(z)."""

    problem: FixedPointProblem

    @property
    def symmetric(self) -> bool:
        """Whether 0 ⪯ T′ ⪯ I."""
        return self.problem.symmetric

    @property
    def step(self) -> Array:
        """1."""
        return jnp.ones((), self.problem.dtype)

    def point(self, z: Array) -> Array:
        """T(z)."""
        return self.problem.next_point(z)

    def __call__(self, z: Array) -> Array:
        """T(z)."""
        return self.problem.next_point(z)


def halved(step_map: Any) -> Any:
    """The map of half the step, where it has the same fixed points, so that M ⪰ 0."""
    if isinstance(step_map, ProxGradientMap):
        return dataclasses.replace(step_map, step=0.5 * step_map.step)
    return step_map


def repeated(step_map: Any, z: Array, num_iters: int) -> Array:
    """`num_iters` steps z ← T(z) from a constant."""
    z = varying(lax.stop_gradient(z), step_map)
    return lax.scan(lambda z, _: (step_map(z), None), z, length=num_iters)[0]


def fixed_point(step_map: Any, z: Array, options: Implicit, batch_ndim: int) -> Array:
    """z, with the derivative of the fixed point of `step_map` that it is taken for.

    Forward and reverse mode, of every order. Examples, the first `batch_ndim` axes, are solved side
    by side, each until it meets the tolerance.

    Args:
      step_map: a `ProxGradientMap`, or any differentiable map of points as a value, with an attribute
        `symmetric` that says whether its Jacobians J are symmetric with 0 ⪯ J ⪯ I.
      z: the fixed point.
      options: of the linear systems.
      batch_ndim: number of batch axes.
    """
    tol, guess = jnp.asarray(options.tol, z.dtype), options.guess
    if guess is not None:
        if guess.shape != z.shape:
            _checks.fail("guess of Implicit", f"the solution's shape {z.shape}", guess.shape)
        guess = guess.astype(z.dtype)
    is_prox = isinstance(step_map, ProxGradientMap)
    unsolved = options.unsolved or ("keep" if is_prox else "nan")
    settings = _Settings(options.max_iters, batch_ndim, unsolved == "nan")
    step_map, z, tol, guess = varying((step_map, z, tol, guess), (step_map, z, guess))
    return _fixed_point(settings, step_map, *lax.stop_gradient((z, tol, guess)))


class _Settings(NamedTuple):
    """Static options of the linear systems."""

    max_iters: int
    batch_ndim: int
    mark: bool


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _fixed_point(
    settings: _Settings,
    step_map: Any,
    z: Array,
    tol: Array,
    guess: Array | None,
) -> Array:
    return z


@_fixed_point.defjvp
def _fixed_point_jvp(settings: _Settings, primals: Any, tangents: Any) -> tuple[Array, Array]:
    step_map, z, tol, guess = primals
    # the solution itself, not z: derivatives of this derivative pass through it
    solution = _fixed_point(settings, step_map, z, tol, guess)
    _, moved = jax.jvp(lambda m: m(solution), (step_map,), (tangents[0],))
    tangent_of = _prox_tangent if isinstance(step_map, ProxGradientMap) else _plain_tangent
    return solution, tangent_of(settings, step_map, solution, moved, tol, guess)


def _plain_tangent(
    settings: _Settings, step_map: Any, solution: Array, moved: Array, tol: Array, guess: Any
) -> Array:
    """(I − J)⁻¹ ∂T, J = T′."""
    _, jacobian = jax.linearize(step_map, solution)

    def solve(operator, right_side, start=None):
        options = {"symmetric": step_map.symmetric, "mark": settings.mark}
        limits = (settings.max_iters, settings.batch_ndim)
        return _linear.solve(operator, right_side, start, tol, *limits, **options)

    return lax.custom_linear_solve(
        lambda w: w - jacobian(w), moved, solve, functools.partial(solve, start=guess)
    )


def _prox_tangent(
    settings: _Settings,
    step_map: ProxGradientMap,
    solution: Array,
    moved: Array,
    tol: Array,
    guess: Any,
) -> Array:
    """(I − D M)⁻¹ ∂T."""
    start = None if guess is None else guess / step_map.step
    _, D = jax.linearize(lambda v: step_map.prior.prox(v, step_map.step), step_map.point(solution))

    hessian = step_map.gradient.hessian_at(solution)

    def M(a):  # noqa: N802 - a matrix
        return a - step_map.step * hessian(a)

    def conjugate_gradients(right_side, start=None):
        return _conjugate_gradients(D, M, right_side, start, tol, *settings)

    def solve(_, b):
        return b + D(M(b + conjugate_gradients(D(M(b)))))

    def transpose_solve(_, v):
        return v + M(conjugate_gradients(D(v), start))

    return lax.custom_linear_solve(lambda w: w - D(M(w)), moved, solve, transpose_solve)


class _Iterate(NamedTuple):
    """Conjugate gradients: solution, residual, direction, M direction, ||residual||²_M, running."""

    p: Array
    r: Array
    d: Array
    Md: Array
    rho: Array
    running: Array


def _conjugate_gradients(
    D: Any,
    M: Any,
    right_side: Array,
    start: Array | None,
    tol: Array,
    max_iters: int,
    batch_ndim: int,
    mark: bool,
) -> Array:
    """(I − D M)⁻¹ r for each example, in the M semi-inner product, from `start` or zero."""
    axes = tuple(range(batch_ndim, right_side.ndim))
    eps = jnp.finfo(right_side.dtype).eps

    def dot(a, b):
        return jnp.sum(a * b, axis=axes)

    def spread(weights):
        return jnp.expand_dims(weights, axes)

    residual, M_residual = right_side, M(right_side)
    target = tol**2 * dot(residual, M_residual)
    if start is None:
        start = jnp.zeros_like(right_side)
    else:
        residual = right_side - start + D(M(start))
        M_residual = M(residual)
    rho = dot(residual, M_residual)

    def unfinished(carry):
        k, state = carry
        return (k < max_iters) & jnp.any(state.running)

    def step(carry):
        k, s = carry
        Kd = s.d - D(s.Md)
        curvature = dot(s.Md, Kd)
        # no curvature beyond round-off: a direction of the null space, or M is not ⪰ 0
        running = s.running & (curvature > eps * dot(s.d, s.Md))
        alpha = jnp.where(running, s.rho / jnp.where(running, curvature, 1.0), 0.0)
        p, r = s.p + spread(alpha) * s.d, s.r - spread(alpha) * Kd
        Mr = M(r)
        rho = dot(r, Mr)
        beta = jnp.where(running, rho / jnp.where(running, s.rho, 1.0), 0.0)
        d, Md = r + spread(beta) * s.d, Mr + spread(beta) * s.Md
        return k + 1, _Iterate(p, r, d, Md, rho, running & (rho > target))

    first = _Iterate(start, residual, residual, M_residual, rho, rho > target)
    last = lax.while_loop(unfinished, step, (0, first))[1]
    if not mark:
        return last.p
    size = dot(right_side, M(right_side)) + dot(last.p, M(last.p))
    solved = last.rho <= jnp.maximum(target, (_linear.ROUND_OFF * eps) ** 2 * size)
    return jnp.where(spread(solved), last.p, jnp.nan)
