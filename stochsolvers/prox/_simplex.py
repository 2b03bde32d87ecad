r"""The simplex {u ≥ 0, Σ u = 1}: the projection onto it, and softmax with a quadratic term.

Both are taken along axes of an array, whose sizes are 1 in the weights. Derivatives come from the
optimality conditions, so that no iteration is differentiated:

    u_i = max(v_i − τ, 0):               du = dv − mean of dv, over the entries u_i > 0
    α u_i + β log u_i = v_i + c:         du_i = p_i (dx_i − Σ p dx/Σ p),   p_i = u_i/(α u_i + β),
                                         dx_i = dv_i − u_i dα − log u_i dβ
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from stochsolvers._typing import Array

Axes = tuple[int, ...]

_NEWTON_STEPS = 40


def _below_top(axes: Axes, v: Array) -> Array:
    """max v − v ≥ 0; 0 where v is the maximum, which may be infinite."""
    top = jnp.max(v, axes, keepdims=True)
    return jnp.where(v == top, 0, top - v)


@functools.partial(jax.jit, static_argnums=0)
def _support(axes: Axes, x: Array) -> Array:
    r"""Whether max(x_i − τ, 0) > 0 at the root of Σ max(x_i − τ, 0) = 1, for −1 ≤ x ≤ max x = 0.

    Newton's method on this convex, piecewise linear equation, from a τ below the root: the iterates
    rise to it and end there, since each one drops entries from the support (Michelot 1986). The
    residual or the support at least halves in every step, so that about log2(n²/ε) suffice.
    """

    def threshold(support):
        count = jnp.sum(support, axes, keepdims=True, dtype=x.dtype)
        return count, (jnp.sum(jnp.where(support, x, 0), axes, keepdims=True) - 1) / count

    def unfinished(carry):
        before, count, _ = carry
        return jnp.any(count < before)

    def rise(carry):
        _, before, tau = carry
        count, following = threshold(x > tau)
        return before, count, jnp.maximum(tau, following)

    count, tau = threshold(x > -1)
    return x > lax.while_loop(unfinished, rise, (count + 1, count, tau))[-1]


def project(axes: Axes, v: Array) -> Array:
    """The nearest point of the simplex, max(v − τ, 0); the support is no function to differentiate."""
    # entries further than 1 below the top are zero
    x = jnp.maximum(-_below_top(axes, lax.stop_gradient(v)), -1)
    x = _explicit(x, jnp.where(x > -1, v, 0))
    support = _support(axes, lax.stop_gradient(x))

    def centred(u):
        """With sum 1, by one number for all of the support."""
        count = jnp.sum(support, axes, keepdims=True, dtype=u.dtype)
        excess = jnp.sum(jnp.where(support, u, 0), axes, keepdims=True) - 1
        return jax.nn.relu(jnp.where(support, u - excess / count, 0))

    # twice: what the first τ lost is common to the support, and small entries can hold it
    lost = jnp.any(jnp.isnan(v), axes, keepdims=True)
    return jnp.where(lost, jnp.nan, centred(centred(x)))


def _ratios(kappa: Array, delta: Array) -> Array:
    r"""ρ with log ρ + κρ = κ − δ, for δ > 0 and κ > −1: 0 < ρ < 1; with s = κρ, s + log s = κ − δ + log κ.

    That is Wright's omega function, for κ < 0 Lambert's W on its principal branch. From starts that are
    right within 20 %, two iterations of fourth order (Fritsch, Shafer and Crowley 1973) give all digits.
    """
    tiny = jnp.finfo(kappa.dtype).tiny
    y, size = kappa - delta, jnp.maximum(jnp.abs(kappa), tiny)
    small = jnp.exp(jnp.minimum(y, 1))
    z = jnp.maximum(-kappa * small, 0)
    p = jnp.sqrt(jnp.maximum(2 - 2 * jnp.e * z, 0))
    branch = (1 - p + p * p * (1 / 3 - 11 / 72 * p)) / size
    below = jnp.where(z > 0.25, branch, small * (1 + z * (1 + 1.5 * z)))
    x = y + jnp.log(size)
    large = jnp.maximum(x, 1)
    logs = jnp.log(large)
    middle = jnp.exp((2 / 3) * (jnp.minimum(x, 1) - 1))
    above = jnp.where(x < 1, middle, large - logs + logs / large) / size
    rho = jnp.where(kappa > 0, jnp.where(x < -2, small, above), below)
    for _ in range(2):
        rho = jnp.clip(rho, tiny, 1)
        slope = 1 + kappa * rho
        miss = (kappa * (1 - rho) - delta - jnp.log(rho)) / slope
        newton, curve = 2 + (4 / 3) * miss, miss / slope
        rho = rho * (1 + miss * (newton - curve) / (newton - 2 * curve))
    return jnp.minimum(rho, 1)


@functools.partial(jax.jit, static_argnums=0)
def _shares(axes: Axes, v: Array, alpha: Array, beta: Array) -> tuple[Array, Array]:
    r"""The largest entry a of the root u of `tempered`, and ρ = u/a.

    With κ = α a/β and δ_i = (max v − v_i)/β, log ρ_i + κ ρ_i = κ − δ_i: the constant c is gone, and with
    it the digits that it would cost. The sum a Σ ρ_i(a) = 1 is increasing in a, convex for α ≥ 0 and
    concave for α ≤ 0, so that Newton's method from the largest entry of softmax(v/β), which lies on the
    right side, cannot overshoot. For α = 0 it is there at once; for α = 1 − β, β from 1e-6 to 1e6, and
    up to 1,000 entries it took at most 9 steps, mostly 3.
    """
    info, size = jnp.finfo(v.dtype), math.prod(v.shape[axis] for axis in axes)
    delta = _below_top(axes, v) / beta
    top = delta == 0

    def ratios(a):
        kappa = alpha * (a / beta)
        lost = kappa - delta < jnp.log(info.tiny) + 1
        rho = _ratios(kappa, jnp.where(lost | top, 1, delta))
        return kappa, jnp.where(top, 1, jnp.where(lost, 0, rho))

    def newton(carry):
        k, _, a = carry
        kappa, rho = ratios(a)
        slope = jnp.where(top, 1, (1 + kappa) * rho / jnp.where(top, 1, 1 + kappa * rho))
        total, slope = (jnp.sum(x, axes, keepdims=True) for x in (rho, slope))
        return k + 1, a, jnp.clip(a - (a * total - 1) / slope, 1 / size, 1)

    def unfinished(carry):
        k, before, a = carry
        return (k < _NEWTON_STEPS) & jnp.any(jnp.abs(a - before) > info.eps**0.75 * a)

    start = 1 / jnp.sum(jnp.exp(-delta), axes, keepdims=True)
    _, _, a = lax.while_loop(unfinished, newton, (0, 2 * start, start))
    _, rho = ratios(a)
    return 1 / jnp.sum(rho, axes, keepdims=True), rho


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def tempered(axes: Axes, v: Array, alpha: Array, beta: Array) -> Array:
    """The u with α u_i + β log u_i = v_i + c, Σ u_i = 1; softmax(v) to the bit for α = 0, β = 1.

    In nested derivatives JAX may differentiate the body in place of the rule: `_explicit` is for that.

    Args:
      axes: those of a group.
      v: any shape.
      alpha: α > −β, or α = −β: then u has one fixed point more at u_i = 1, which is no problem.
      beta: β > 0; as α of size 1 in the axes.
    """
    fixed = lax.stop_gradient((v, alpha, beta))
    a, rho = _shares(axes, *fixed)
    softmax = jax.nn.softmax(fixed[0], axes)
    u = jnp.where((fixed[1] == 0) & (fixed[2] == 1), softmax, a * rho)
    near = v - jnp.max(fixed[0], axes, keepdims=True)  # where u > 0, no large number
    return _explicit(u, _derivative(axes, u, *fixed, near, alpha, beta))


@tempered.defjvp
def _tempered_jvp(axes, primals, tangents):
    u = tempered(axes, *primals)
    return u, _derivative(axes, u, *primals, *tangents)


def _derivative(axes, u, v, alpha, beta, dv, dalpha, dbeta):
    logs = jnp.log(jnp.where(u > 0, u, 1))
    share = u / (alpha * u + beta)
    moved = jnp.where(share > 0, dv - u * dalpha - logs * dbeta, 0)
    mean = jnp.sum(share * moved, axes, keepdims=True) / jnp.sum(share, axes, keepdims=True)
    return share * (moved - mean)


def _explicit(value: Array, derivative: Array) -> Array:
    """The value, with the derivative of a linear form."""
    return value + (derivative - lax.stop_gradient(derivative))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def entropy_conjugate(axes: Axes, w: Array) -> Array:
    r"""max_u <w, u> − Σ u log u + ½||u||² over the simplex, of size 1 in the axes.

    At the maximiser log u_i − u_i = w_i + c, so that the value is −c − ½ ||u||², c from the largest entry.
    """
    fixed = lax.stop_gradient(w)
    one = jnp.ones_like(jnp.sum(w, axes, keepdims=True))
    a, rho = _shares(axes, fixed, -one, one)
    squares = jnp.sum(rho * rho, axes, keepdims=True)
    value = jnp.max(fixed, axes, keepdims=True) - jnp.log(a) + a * (1 - 0.5 * a * squares)
    near = jnp.where(rho > 0, w - jnp.max(fixed, axes, keepdims=True), 0)
    return _explicit(value, jnp.sum(a * rho * near, axes, keepdims=True))


@entropy_conjugate.defjvp
def _entropy_conjugate_jvp(axes, primals, tangents):
    (w,), (dw,) = primals, tangents
    one = jnp.ones_like(jnp.sum(w, axes, keepdims=True))
    u = tempered(axes, w, -one, one)
    return entropy_conjugate(axes, w), jnp.sum(u * dw, axes, keepdims=True)
