r"""(u, w) with u = prox_{ηg}(v) = σ(w), of each exact activation: (1 − η) σ(w) + η w = v.

Each comes with σ′(w), 1 − σ′(w), w − σ(w), for its derivatives; at η = 1, w = v and u is σ(v) of JAX itself.
"""

import jax
import jax.numpy as jnp

from stochsolvers._typing import Array
from stochsolvers.prox import _monotone
from stochsolvers.prox._monotone import bounded, implicit, product_minus, saturating_root
from stochsolvers.prox._rules import hypot, with_partials


def _at_one(step: Array, exact: Array, other: Array) -> Array:
    """The activation itself at η = 1."""
    return jnp.where(step == 1, exact, other)


def _odd_solve(function: _monotone.Saturating, activation):
    """(u, w) for an odd σ that is T on t ≥ 0."""

    def solve(v, step):
        a, one = jnp.abs(v), jnp.ones_like(v)
        excess = (a - function.limit) + function.limit * step
        u, w = saturating_root(function, 1 - step, step, one, a, excess)
        u, w = jnp.where(v < 0, -u, u), jnp.where(v < 0, -w, w)
        return _at_one(step, activation(v), u), _at_one(step, v, w)

    return solve


def _odd_difference(function: _monotone.Saturating):
    """D(w) = w − σ(w), with D′ written out."""

    @with_partials
    def difference(w):
        half = function.half(jnp.abs(bounded(w)))
        return jnp.where(w < 0, -half.below_t, half.below_t), (half.rest,)

    return difference


# --- tanh, arctan, softsign --------------------------------------------------------------------------

_tanh_difference = _odd_difference(_monotone.TANH)
_arctan_difference = _odd_difference(_monotone.ARCTAN)


def _tanh_parts(u, w):
    decay = jnp.exp(-2 * jnp.abs(w))
    return 4 * decay / (1 + decay) ** 2, u * u, _tanh_difference(w)


def _arctan_parts(u, w):
    root = 1 / hypot(jnp.ones_like(w), w)
    slope = root * root
    # far away the root may be too small for a float
    rest = jnp.where(jnp.abs(w) < 1, (w * root) ** 2, 1 - slope)
    return slope, rest, _arctan_difference(w)


tanh_root = implicit(_odd_solve(_monotone.TANH, jnp.tanh), _tanh_parts)
arctan_root = implicit(_odd_solve(_monotone.ARCTAN, jnp.arctan), _arctan_parts)


def _softsign_solve(v, step):
    r"""Of η t² + (1 − |v|) t − |v| = 0: u = 2|v|/(1 + |v| + h), h = √((1 − |v|)² + 4η|v|).

    t = 2|v|/(h + 1 − |v|) = (h − (1 − |v|))/(2η), the one without cancellation.
    """
    a, info = jnp.abs(v), jnp.finfo(v.dtype)
    a = jnp.minimum(a, 0.1 * info.max)
    excess = a - 1
    h = hypot(excess, 2 * jnp.sqrt(step) * jnp.sqrt(jnp.maximum(a, info.tiny)))
    u = 2 * (a / (1 + a + h))
    rising = 2 * a / (h + jnp.abs(excess))
    t = jnp.where(excess < 0, rising, jnp.minimum(0.5 * (h + excess) / step, info.max))
    u, w = jnp.where(v < 0, -u, u), jnp.where(v < 0, -t, t)
    return _at_one(step, jax.nn.soft_sign(v), u), _at_one(step, v, w)


def _softsign_parts(u, w):
    root = 1 / (1 + jnp.abs(w))
    slope = root * root
    rest = jnp.where(jnp.abs(w) < 1, jnp.abs(u) * (1 + root), 1 - slope)
    return slope, rest, w * jnp.abs(u)


softsign_root = implicit(_softsign_solve, _softsign_parts)


# --- sigmoid, softplus -------------------------------------------------------------------------------


def _sigmoid_solve(v, step):
    """With w = 2t: (1 − η)/2 tanh t + 2η t = v − (1 − η)/2; then steps that keep the digits of small u."""
    half = 0.5 * (1 - step)
    c, total = v - half, 0.5 + 1.5 * step
    a, excess = jnp.abs(c), jnp.where(c < 0, -v, (v - 1) + step)
    _, t = saturating_root(_monotone.TANH, half, 2 * step, total, a, excess)

    def miss(w):
        decay = jnp.exp(-jnp.abs(w))
        high, low = 1 / (1 + decay), decay / (1 + decay)
        u, other = jnp.where(w < 0, low, high), jnp.where(w < 0, high, low)
        slope = u * other
        left = (1 - step) * u + product_minus(step, w, v)
        right = ((1 - v) - other) + step * (w - u)
        off = jnp.where(w < 0, left, right) / (slope + step * (1 - slope))
        return u, other, bounded(off)

    w = bounded(jnp.where(c < 0, -2 * t, 2 * t))
    w = _at_one(step, v, w - miss(w)[2])
    u, other, off = miss(w)
    u = jnp.minimum(u * (1 - other * off), 1)
    return _at_one(step, jax.nn.sigmoid(v), u), _at_one(step, v, w - off)


def _sigmoid_parts(u, w):
    slope = u * jax.nn.sigmoid(-w)
    return slope, 1 - slope, w - u


sigmoid_root = implicit(_sigmoid_solve, _sigmoid_parts)


def _softplus_solve(v, step):
    r"""Softplus(w) − η softplus(−w) = v. For η > 1 it is the equation of 1/η in −w, with −v/η.

    Halley's method from the root of (1 − η) e^w + η w = v, or from v ≥ 1; then a step that keeps the digits
    of small u.
    """
    info = jnp.finfo(v.dtype)
    flip = step > 1
    eta = jnp.where(flip, 1 / step, step)
    c = jnp.where(flip, -v / step, v)
    k = jnp.log(jnp.maximum(1 - eta, info.tiny)) - jnp.log(eta)

    def improve(_, w):
        decay = jnp.exp(-jnp.abs(w))
        high = jnp.where(w < 0, decay, 1) / (1 + decay)
        value = jnp.maximum(w, 0) + jnp.log1p(decay)
        slope = (1 - eta) * high + eta
        newton = bounded(((1 - eta) * value + (eta * w - c)) / slope)
        bend = jnp.clip(0.5 * newton * ((1 - eta) * (high * (1 - high)) / slope), -1e3, 0.5)
        return bounded(w - newton / (1 - bend))

    start = jnp.where(c < 1, _monotone.log_omega(c / eta + k) - k, c)
    w = _monotone.rounds(improve, start, more=1)
    w = _at_one(step, v, jnp.where(flip, -w, w))
    decay = jnp.exp(-jnp.abs(w))
    logs = jnp.log1p(decay)
    u, below = jnp.maximum(w, 0) + logs, jnp.minimum(w, 0) - logs
    high, low = jnp.where(w < 0, decay, 1) / (1 + decay), jnp.where(w < 0, 1, decay) / (1 + decay)
    left = (1 - step) * u + product_minus(step, w, v)
    off = bounded(jnp.where(w < 0, left, (u - v) + step * below) / (high + step * low))
    u = jnp.maximum(u - high * off, 0)
    return _at_one(step, jax.nn.softplus(v), u), _at_one(step, v, w - off)


def _softplus_parts(u, w):
    return -jnp.expm1(-u), jnp.exp(-u), -jax.nn.softplus(-w)


softplus_root = implicit(_softplus_solve, _softplus_parts)


# --- ELU, leaky ReLU ---------------------------------------------------------------------------------


def _elu_solve(v, step, alpha):
    """For v < 0, with t = −w: (1 − η) α (1 − e^{−t}) + η t = −v."""
    above = (1 - step) * alpha + step
    beyond = alpha + (1 - alpha) * step  # the same sum, of terms that are positive for η > 1
    total = jnp.where(step <= 1, above, beyond)
    c, a = jnp.maximum(-v, 0), (1 - step) * alpha
    t, w = saturating_root(_monotone.EXPONENTIAL, a, step, total, c, (c - alpha) + alpha * step)
    u, w = jnp.where(v < 0, -alpha * t, v), jnp.where(v < 0, -w, v)
    return _at_one(step, jax.nn.elu(v, alpha), u), _at_one(step, v, w)


@with_partials
def _exponential_difference(w):
    """W − (e^w − 1), w ≤ 0."""
    half = _monotone.EXPONENTIAL.half(-w)
    return -half.below_t, (half.value,)


def _elu_parts(u, w, alpha):
    negative = jnp.minimum(w, 0)
    below = (1 - alpha) * negative + alpha * _exponential_difference(negative)
    slope = jnp.where(w > 0, 1, alpha * jnp.exp(negative))
    rest = jnp.where(w > 0, 0, (1 - alpha) - u)
    return slope, rest, below, jnp.expm1(negative)


elu_root = implicit(_elu_solve, _elu_parts)


def leaky_spread(step, alpha):
    """α + η (1 − α), exactly 1 at η = 1."""
    return jnp.where(step < 1, step + alpha * (1 - step), 1 + (step - 1) * (1 - alpha))


@with_partials
def leaky_root(v, step, alpha):
    """V r, r = α/s with s = α + η (1 − α): dr/dη = −r (1 − α)/s, dr/dα = η/s²."""
    spread = leaky_spread(step, alpha)
    ratio = alpha / spread
    u = v * ratio
    return u, (ratio, -u * ((1 - alpha) / spread), v * (step / spread / spread))
