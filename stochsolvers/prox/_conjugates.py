r"""Conjugates of the weighted elementwise priors, and the barrier of tanh, free of overflow.

A conjugate's derivative in w is the maximiser u of w u − γ h(u), that in γ is −h(u).
"""

import jax.numpy as jnp

from stochsolvers._typing import Array
from stochsolvers.prox._rules import ValueAndPartials, hypot, with_partials


def _log_ratio(x: Array, y: Array) -> Array:
    """log(x/y) for x, y > 0, also where x/y overflows or underflows."""
    ratio, info = x / y, jnp.finfo(x.dtype)
    normal = (ratio >= info.tiny) & (ratio <= info.max)
    return jnp.where(normal, jnp.log(jnp.where(normal, ratio, 1)), jnp.log(x) - jnp.log(y))


@with_partials
def hinge(w: Array, shift: Array, gamma: Array) -> ValueAndPartials:
    """w²/(2γ) − s w, w ≤ 0."""
    slope = w / gamma
    return w * (0.5 * slope - shift), (slope - shift, -w, -0.5 * slope * slope)


@with_partials
def logarithm(w: Array, gamma: Array) -> ValueAndPartials:
    """γ (log(−γ/w) − 1), w < 0: the conjugate of −γ log u."""
    logs = _log_ratio(gamma, -w)
    return gamma * (logs - 1), (gamma / -w, logs)


@with_partials
def symmetric_barrier(u: Array, gamma: Array) -> ValueAndPartials:
    """−γ log(1 − u²), |u| < 1."""
    square = u * u
    logs = jnp.where(square < 0.25, jnp.log1p(-square), jnp.log1p(u) + jnp.log1p(-u))
    value = jnp.where(square < jnp.finfo(u.dtype).eps, gamma * u * u, -gamma * logs)
    return value, (2 * gamma * (u / ((1 - u) * (1 + u))), -logs)


def _maximiser(y: Array, gamma: Array) -> tuple[Array, ...]:
    r"""u, 1 − u, y (1 − u) and log(1 − u²) at the maximiser of y u + γ log(1 − u²), y ≥ 0.

    With H = √(γ² + y²): u = y/(γ + H), 1 − u² = 2γ/(γ + H), 1 − u = γ (1 + γ/(H + y))/(γ + H), and
    y u = H − γ, so that −log(1 − u²) = log(1 + y u/(2γ)).
    """
    half_h, half_gamma, half_y = 0.5 * hypot(gamma, y), 0.5 * gamma, 0.5 * y
    u = half_y / (half_gamma + half_h)
    scale = gamma * (1 + half_gamma / (half_h + half_y))
    wall = 0.5 * scale / (half_gamma + half_h)
    growth = half_y / gamma * u
    finite = growth <= jnp.finfo(growth.dtype).max
    logs = -jnp.where(
        finite, jnp.log1p(jnp.where(finite, growth, 0)), _log_ratio(half_gamma + half_h, gamma)
    )
    return u, wall, scale * u, logs


@with_partials
def symmetric(w: Array, gamma: Array) -> ValueAndPartials:
    """q − γ log(1 + q/(2γ)), q = w u with the maximiser u: the conjugate of −γ log(1 − u²)."""
    y = jnp.abs(w)
    u, _, _, logs = _maximiser(y, gamma)
    q = y * u
    # at small w the two terms are in the ratio 2 : 1, and the second may underflow
    value = jnp.where(-logs < jnp.finfo(w.dtype).eps, 0.5 * q, q + gamma * logs)
    return value, (jnp.where(w < 0, -u, u), logs)


@with_partials
def interval(w: Array, gamma: Array) -> ValueAndPartials:
    r"""g*(w) = max(w, 0) + g*(−|w|), the conjugate of −γ (log u + log(1 − u)).

    With y = |w|/2 and the maximiser u at y, g*(−2y) = −y (1 − u) + γ (log(1 − u²) − 2 log 2).
    """
    y = 0.5 * jnp.abs(w)
    u, wall, pull, logs = _maximiser(y, gamma)
    logs = logs - 2 * jnp.log(jnp.asarray(2, w.dtype))
    value = jnp.maximum(w, 0) + (gamma * logs - pull)
    return value, (jnp.where(w < 0, 0.5 * wall, 0.5 + 0.5 * u), logs)
