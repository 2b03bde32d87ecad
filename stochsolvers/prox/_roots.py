r"""The scalar equations of the barriers' proximal operators: a quadratic and a cubic, c = ηγ.

The closed forms of Bibi et al. 2019, appendices B and C (v/2 + √(v²/4 + γ), and the cosine formula
for the cubic, printed there for γ = 1 only), cancel for large |v|. The roots here do not, and their
derivatives come from the implicit function theorem, so they cost no iterations. Where a formula
halves its terms, their sum would overflow.
"""

import jax
import jax.numpy as jnp

from stochsolvers._typing import Array
from stochsolvers.prox._rules import ValueAndPartials, hypot, with_partials


def _weight(step: Array, gamma: Array) -> Array:
    """c = ηγ, at least the smallest normal number."""
    return jnp.maximum(step * gamma, jnp.finfo(step.dtype).tiny)


@with_partials
def positive_root(v: Array, step: Array, gamma: Array) -> ValueAndPartials:
    r"""The root u > 0 of u − v − c/u = 0, that is of u² − v u − c = 0.

    The two roots have product −c, so the small one is c over the large one. They are v/2 ± h,
    h = √(v²/4 + c), and du/dv = u/(2h), du/dc = 1/(2h).
    """
    weight = _weight(step, gamma)
    half = hypot(0.5 * v, jnp.sqrt(weight))
    large = 0.5 * jnp.abs(v) + half
    u = jnp.maximum(jnp.where(v >= 0, large, weight / large), jnp.finfo(v.dtype).tiny)
    return u, (0.5 * u / half, 0.5 * gamma / half, 0.5 * step / half)


@jax.custom_jvp
def barrier_odds(half_a: Array, half_excess: Array, half_weight: Array) -> Array:
    r"""The odds t = u/(1 − u) of the root 0 ≤ u < 1 of u − a + 2cu/(1 − u²) = 0.

    In t the equation is φ(t) = a with

        φ(t) = t/(1 + t) + c (t + t/(1 + 2t)),   φ'(t) = 1/(1 + t)² + c (1 + 1/(1 + 2t)²) > 0,

    and t holds u (near 0) and the distance to the wall 1 − u = 1/(1 + t) (near 1) to full relative
    accuracy. The start solves the equation with c/(1 + u) replaced by its tangent c(1 − u),

        (1 + c) d² + (a − 1) d − c = 0,   d = 1 − u,

    which errs in t by less than 14 %, and never upwards. φ is concave and increasing, so from there
    Newton's iterates rise to the root without overshooting: no bracket is needed. Odds above the
    largest of which the inverse is a normal number are set to that.

    Args:
      half_a: a/2 ≥ 0, any shape.
      half_excess: (a − 1)/2, passed separately because the caller can compute it without rounding.
      half_weight: c/2 > 0.
    """
    b, e, k = half_a, half_excess, half_weight
    tiny = jnp.finfo(b.dtype).tiny
    # a quarter of the root: XLA turns x/2 + y/2 into (x + y)/2, but does not look into hypot
    root = hypot(0.25 * e, 0.5 * jnp.sqrt(k) * jnp.sqrt(0.5 + k))
    large = root + 0.25 * jnp.abs(e)
    distance = jnp.where(e > 0, 0.5 * k / large, 4 * large / (1 + 2 * k))
    t = b / ((0.25 + 0.5 * b + k + 2 * root) * jnp.maximum(distance, 2 * tiny))
    for _ in range(3 if jnp.finfo(t.dtype).bits <= 32 else 4):
        wall, q = 1 / (1 + t), 1 / (1 + 2 * t)
        miss = jnp.where(t < 1, 0.5 * t * wall - b, -0.5 * wall - e) + k * t * (1 + q)
        t = jnp.minimum(t - miss / (0.5 * wall * wall + k * (1 + q * q)), 0.5 / tiny)
    return t


@barrier_odds.defjvp
def _barrier_odds_jvp(primals, tangents):
    _, _, half_weight = primals
    da, _, dweight = tangents  # the tangent of the excess is that of a
    t = barrier_odds(*primals)
    wall, q = 1 / (1 + t), 1 / (1 + 2 * t)
    return t, (da - t * (1 + q) * dweight) / (0.5 * wall * wall + half_weight * (1 + q * q))


def _barrier_root(half_a: Array, half_excess: Array, half_weight: Array) -> tuple[Array, ...]:
    r"""u, 1 − u, du/da, and C, s with du/dc = −s/C, at the root of `barrier_odds`.

    With w = 1 − u, q = 1/(1 + 2t) and r = a − u = c t (1 + q), the theorem on implicit functions gives

        du/da = w/(2C),   du/dc = −u (1 + q)/(2C),   2C = w + (r/(1 + q) + c)(1 + q²).
    """
    t = barrier_odds(half_a, half_excess, half_weight)
    wall, q = 1 / (1 + t), 1 / (1 + 2 * t)
    u = t * wall
    # no difference of near numbers, no overflow
    half_rise = jnp.where(half_excess > 0, half_excess + 0.5 * wall, half_weight * t * (1 + q))
    curve = 0.5 * wall + (half_rise / (1 + q) + half_weight) * (1 + q * q)
    u = jnp.where(t < 1, u, 1 - wall)
    return u, wall, 0.5 * wall / curve, curve, 0.5 * u * (1 + q)


@with_partials
def symmetric_root(v: Array, step: Array, gamma: Array) -> ValueAndPartials:
    """The root in (−1, 1) of u³ − v u² − (1 + 2c) u + v = 0 (Bibi et al. 2019, appendix C)."""
    a, sign = jnp.where(v < 0, -v, v), jnp.where(v < 0, -1, 1).astype(v.dtype)
    a = jnp.minimum(a, jnp.finfo(v.dtype).max)
    u, _, slope, curve, drop = _barrier_root(0.5 * a, 0.5 * a - 0.5, 0.5 * _weight(step, gamma))
    drop = -sign * drop
    return sign * _below_one(u), (slope, gamma / curve * drop, step / curve * drop)


@with_partials
def interval_root(v: Array, step: Array, gamma: Array) -> ValueAndPartials:
    """The root in (0, 1) of u − v − c/u + c/(1 − u) = 0.

    With u = (1 + w)/2 it is the symmetric equation for w, at a = 2v − 1 and with weight 4c.
    """
    largest = jnp.finfo(v.dtype).max
    v = jnp.clip(v, -largest, largest)
    left = v < 0.5
    half_a = jnp.where(left, 0.5 - v, v - 0.5)
    half_excess = jnp.where(left, -v, v - 1)
    _, wall, slope, curve, drop = _barrier_root(half_a, half_excess, 2 * _weight(step, gamma))
    u = jnp.where(left, 0.5 * wall, _below_one(1 - 0.5 * wall))
    drop = jnp.where(left, 2 * drop, -2 * drop)
    return u, (slope, gamma / curve * drop, step / curve * drop)


def _below_one(u: Array) -> Array:
    """U, with a value rounded onto 1 moved to the float before it."""
    return jnp.minimum(u, (1 - jnp.finfo(u.dtype).epsneg).astype(u.dtype))


@with_partials
def hinge_root(v: Array, shift: Array, step: Array, gamma: Array) -> ValueAndPartials:
    r"""The root u = (v − c s)/(1 + c) = −s + (v + s)/(1 + c) of u − v + c (u + s) = 0.

    It is computed as the mean of v and −s of weights 1/(1 + c) and c/(1 + c), whose terms do not
    overflow; du/dc = −(v + s)/(1 + c)².
    """
    weight = step * gamma
    near, far = 1 / (1 + weight), weight / (1 + weight)
    drop = -(v + shift) * near
    return v * near - shift * far, (near, -far, drop * (gamma * near), drop * (step * near))
