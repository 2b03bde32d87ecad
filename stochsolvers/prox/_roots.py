r"""The scalar equations of the barriers' proximal operators: a quadratic and a cubic.

The closed forms of Bibi et al. 2019, appendices B and C (v/2 + √(v²/4 + γ), and the cosine formula
for the cubic, printed there for γ = 1 only), cancel for large |v|. The roots here do not, and their
derivatives come from the implicit function theorem, so they cost no iterations.
"""

import jax
import jax.numpy as jnp

from stochsolvers._typing import Array


@jax.custom_jvp
def positive_root(v: Array, weight: Array) -> Array:
    r"""The root u > 0 of u − v − c/u = 0, that is of u² − v u − c = 0.

    The two roots have product −c, so the small one is c over the large one.

    Args:
      v: any shape.
      weight: c = ηγ > 0, broadcasts against v.
    """
    large = 0.5 * (jnp.abs(v) + jnp.sqrt(v * v + 4 * weight))
    return jnp.maximum(jnp.where(v >= 0, large, weight / large), jnp.finfo(large.dtype).tiny)


@positive_root.defjvp
def _positive_root_jvp(primals, tangents):
    (v, weight), (dv, dweight) = primals, tangents
    u = positive_root(v, weight)
    return u, (u * dv + dweight) / (u + weight / u)


@jax.custom_jvp
def barrier_odds(a: Array, excess: Array, weight: Array) -> Array:
    r"""The odds t = u/(1 − u) of the root 0 ≤ u < 1 of u − a + 2cu/(1 − u²) = 0.

    In t the equation is φ(t) = a with

        φ(t) = t/(1 + t) + c (t + t/(1 + 2t)),   φ'(t) = 1/(1 + t)² + c (1 + 1/(1 + 2t)²) > 0,

    and t holds u (near 0) and the distance to the wall 1 − u = 1/(1 + t) (near 1) to full relative
    accuracy. The start solves the equation with c/(1 + u) replaced by its tangent c(1 − u),

        (1 + c) d² + (a − 1) d − c = 0,   d = 1 − u,

    which errs in t by less than 14 %, and never upwards. φ is concave and increasing, so from there
    Newton's iterates rise to the root without overshooting: no bracket is needed.

    Args:
      a: ≥ 0, any shape.
      excess: a − 1, passed separately because the caller can compute it without rounding.
      weight: c = ηγ > 0, broadcasts against a.
    """
    root = jnp.sqrt(excess * excess + 4 * weight * (1 + weight))
    large = root + jnp.abs(excess)
    distance = jnp.where(excess > 0, 2 * weight / large, large / (2 * (1 + weight)))
    t = 2 * a / ((1 + a + 2 * weight + root) * distance)
    for _ in range(3 if jnp.finfo(t.dtype).bits <= 32 else 4):
        wall, q = 1 / (1 + t), 1 / (1 + 2 * t)
        miss = jnp.where(t < 1, t * wall - a, -wall - excess) + weight * t * (1 + q)
        t = t - miss / (wall * wall + weight * (1 + q * q))
    return t


@barrier_odds.defjvp
def _barrier_odds_jvp(primals, tangents):
    a, excess, weight = primals
    da, _, dweight = tangents  # the tangent of the excess is that of a
    t = barrier_odds(a, excess, weight)
    wall, q = 1 / (1 + t), 1 / (1 + 2 * t)
    return t, (da - t * (1 + q) * dweight) / (wall * wall + weight * (1 + q * q))


def inside(u: Array, lower: float | None, upper: float) -> Array:
    """U, with a value rounded onto a wall moved to the next float inside; derivatives stay."""
    info = jnp.finfo(u.dtype)
    still = u - jax.lax.stop_gradient(u)  # zero, with u's derivative
    u = jnp.where(u >= upper, still + upper * (1 - info.epsneg).astype(u.dtype), u)
    return u if lower is None else jnp.where(u <= lower, still + lower + info.tiny, u)


def symmetric_root(v: Array, weight: Array) -> Array:
    """The root in (−1, 1) of u³ − v u² − (1 + 2c) u + v = 0 (Bibi et al. 2019, appendix C)."""
    a = jnp.where(v < 0, -v, v)
    t = barrier_odds(a, a - 1, weight)
    # Two forms of u = t/(1 + t), for the digits of u and of its derivative 1/(1 + t)².
    u = inside(jnp.where(t < 1, t / (1 + t), 1 - 1 / (1 + t)), None, 1.0)
    return jnp.where(v < 0, -u, u)


def interval_root(v: Array, weight: Array) -> Array:
    """The root in (0, 1) of u − v − c/u + c/(1 − u) = 0.

    With u = (1 + w)/2 it is the symmetric equation for w, at 2v − 1 and with weight 4c.
    """
    left = v < 0.5
    a = jnp.where(left, 1 - 2 * v, 2 * v - 1)
    excess = jnp.where(left, -2 * v, 2 * v - 2)
    half_wall = 0.5 / (1 + barrier_odds(a, excess, 4 * weight))
    return inside(jnp.where(left, half_wall, 1 - half_wall), 0.0, 1.0)
