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

References:
  Bai, Kolter and Koltun 2019; Bolte et al. 2021, Nonsmooth implicit differentiation; Blondel et al. 2022.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from stochsolvers import _checks
from stochsolvers._shards import varying
from stochsolvers._typing import Array, value_object
from stochsolvers.estimators.forms import Gradient
from stochsolvers.prox import Prior
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


def fixed_point(step_map: ProxGradientMap, z: Array, options: Implicit, batch_ndim: int) -> Array:
    """z, with the derivative of the fixed point of `step_map` that it is taken for.

    Forward and reverse mode, of every order. Examples, the first `batch_ndim` axes, are solved side
    by side, each until it meets the tolerance.
    """
    tol, guess = jnp.asarray(options.tol, z.dtype), options.guess
    if guess is not None:
        if guess.shape != z.shape:
            _checks.fail("guess of Implicit", f"the solution's shape {z.shape}", guess.shape)
        guess = guess.astype(z.dtype)
    settings = (options.max_iters, batch_ndim)
    step_map, z, tol, guess = varying((step_map, z, tol, guess), (step_map, z, guess))
    return _fixed_point(settings, step_map, *lax.stop_gradient((z, tol, guess)))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _fixed_point(
    settings: tuple[int, int],
    step_map: ProxGradientMap,
    z: Array,
    tol: Array,
    guess: Array | None,
) -> Array:
    return z


@_fixed_point.defjvp
def _fixed_point_jvp(settings: tuple[int, int], primals: Any, tangents: Any) -> tuple[Array, Array]:
    step_map, z, tol, guess = primals
    start = None if guess is None else guess / step_map.step
    # the solution itself, not z: derivatives of this derivative pass through it
    solution = _fixed_point(settings, step_map, z, tol, guess)
    _, moved = jax.jvp(lambda m: m(solution), (step_map,), (tangents[0],))
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

    tangent = lax.custom_linear_solve(lambda w: w - D(M(w)), moved, solve, transpose_solve)
    return solution, tangent


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
    return lax.while_loop(unfinished, step, (0, first))[1].p
