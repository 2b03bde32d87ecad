r"""Values and conjugates of the exact activations, g(u) = u p − S(p) − ½u² at σ(p) = u, without cancellation.

g′(u) = p − u,   g*(w) = sup_u w u − g(u) = S(p) − ½σ(p)² at p − σ(p) = w,   (g*)′(w) = σ(p)
"""

import fractions
import math

import jax
import jax.numpy as jnp

from stochsolvers._typing import Array
from stochsolvers.prox import _monotone
from stochsolvers.prox._monotone import horner, saturating_root, terms
from stochsolvers.prox._rules import ValueAndPartials, with_partials


def _bernoulli(count: int) -> list[fractions.Fraction]:
    """The numbers B₀, B₁ = −½ and on."""
    numbers = [fractions.Fraction(1)]
    for n in range(1, count):
        total = sum((math.comb(n + 1, k) * numbers[k] for k in range(n)), fractions.Fraction(0))
        numbers.append(-total / (n + 1))
    return numbers


_B = _bernoulli(62)


def _below(a: Array, limit: float = 1.0) -> Array:
    """A, at most the float before the limit."""
    return jnp.minimum(a, (limit * (1 - jnp.finfo(a.dtype).epsneg)).astype(a.dtype))


# --- tanh --------------------------------------------------------------------------------------------


@with_partials
def tanh_value(u: Array) -> ValueAndPartials:
    """½ [(1 + u) log(1 + u) + (1 − u) log(1 − u)] − ½u² = Σ_{k≥2} u^{2k}/(2k (2k − 1)), |u| ≤ 1."""
    a = jnp.abs(u)
    small, x = a < 0.5, jnp.minimum(a, 0.5) ** 2
    ks = range(2, terms(u, 14, 28))
    series = x * x * horner([1 / (2 * k * (2 * k - 1)) for k in ks], x)
    inner = _below(a)
    logs = (1 + a) * jnp.log1p(a) + (1 - a) * jnp.log1p(-inner)
    value = jnp.where(small, series, 0.5 * (logs - a * a))
    slopes = a * x * horner([1 / (2 * k - 1) for k in ks], x)
    wide = 0.5 * (jnp.log1p(a) - jnp.log1p(-inner)) - a
    slope = jnp.where(small, slopes, wide)
    return value, (jnp.where(u < 0, -slope, slope),)


@with_partials
def tanh_conjugate(w: Array) -> ValueAndPartials:
    """The conjugate w u − g(u), u = tanh p, at p − tanh p = w."""
    one = jnp.ones_like(w)
    a = jnp.abs(w)
    u, _ = saturating_root(_monotone.TANH, -one, one, 0 * one, a, a + 1)
    return a * u - tanh_value(u), (jnp.where(w < 0, -u, u),)


# --- arctan ------------------------------------------------------------------------------------------


def _to_wall(a: Array) -> Array:
    """π/2 − a, without the rounding of π/2."""
    high = jnp.asarray(0.5 * math.pi, a.dtype)
    low = {32: -4.371139000186241e-08, 64: 6.123233995736766e-17}[jnp.finfo(a.dtype).bits]
    # the barrier: XLA would add the constants first
    return jax.lax.optimization_barrier(high - a) + low


def within_right_angle(u: Array) -> Array:
    """|u| < π/2."""
    return _to_wall(jnp.abs(u)) > 0


@with_partials
def arctan_value(u: Array) -> ValueAndPartials:
    """−log cos u − ½u² = Σ_{k≥2} 2^{2k−1} (2^{2k} − 1) |B_{2k}| u^{2k}/(k (2k)!), |u| < π/2."""
    a = jnp.abs(u)
    small, x = a < 0.75, jnp.minimum(a, 0.75) ** 2
    ks = range(2, terms(u, 13, 27))
    coefficients = [
        float(2 ** (2 * k - 1) * (2 ** (2 * k) - 1) * abs(_B[2 * k]) / (k * math.factorial(2 * k)))
        for k in ks
    ]
    wall = jnp.maximum(_to_wall(a), jnp.finfo(u.dtype).tiny)
    series = x * x * horner(coefficients, x)
    value = jnp.where(small, series, -jnp.log(jnp.sin(wall)) - 0.5 * a * a)
    slopes = a * x * horner([2 * k * c for k, c in zip(ks, coefficients, strict=True)], x)
    slope = jnp.where(small, slopes, jnp.cos(wall) / jnp.sin(wall) - a)
    return value, (jnp.where(u < 0, -slope, slope),)


@with_partials
def arctan_conjugate(w: Array) -> ValueAndPartials:
    """The conjugate w u − g(u), u = arctan p, at p − arctan p = w; −log cos u = ½ log(1 + p²)."""
    a, one = jnp.abs(w), jnp.ones_like(w)
    u, p = saturating_root(_monotone.ARCTAN, -one, one, 0 * one, a, a + 0.5 * math.pi)
    near, far = p < 1, jnp.maximum(p, 1)
    wide = a * u - (jnp.log(far) + 0.5 * jnp.log1p((1 / far) ** 2)) + 0.5 * u * u
    value = jnp.where(near, a * u - arctan_value(jnp.minimum(u, 1)), wide)
    return value, (jnp.where(w < 0, -u, u),)


# --- softsign ----------------------------------------------------------------------------------------


def _log_remainder(a: Array, first: int) -> Array:
    """Σ_{k≥first} a^k/k for 0 ≤ a ≤ ½."""
    last = terms(a, 24, 50)
    return a**first * horner([1 / k for k in range(first, last)], a)


@with_partials
def softsign_value(u: Array) -> ValueAndPartials:
    """−log(1 − a) − a − ½a² = Σ_{k≥3} a^k/k, a = |u| < 1."""
    a = jnp.abs(u)
    small, inner = a < 0.5, _below(a)
    wide = -jnp.log1p(-inner) - a - 0.5 * a * a
    value = jnp.where(small, _log_remainder(jnp.minimum(a, 0.5), 3), wide)
    slope = inner * (inner / (1 - inner))
    return value, (jnp.where(u < 0, -slope, slope),)


@with_partials
def softsign_conjugate(w: Array) -> ValueAndPartials:
    """The conjugate w u − g(u), u = p/(1 + p) = 2|w|/(|w| + h), at p²/(1 + p) = |w|.

    h = √(w² + 4|w|) = √|w| √(|w| + 4), and −log(1 − u) = log(1 + p).
    """
    a = jnp.abs(w)
    h = jnp.sqrt(a) * jnp.sqrt(a + 4)
    p = 0.5 * a + 0.5 * h
    # 2√|w|/(√|w| + √(|w| + 4))
    u = 2 / (1 + jnp.sqrt(1 + 4 / jnp.maximum(a, jnp.finfo(w.dtype).tiny)))
    small = u < 0.5
    wide = a * u - jnp.log1p(p) + u + 0.5 * u * u
    value = jnp.where(small, a * u - softsign_value(jnp.minimum(u, 0.5)), wide)
    return value, (jnp.where(w < 0, -u, u),)


# --- ELU ---------------------------------------------------------------------------------------------


@with_partials
def elu_value(u: Array, alpha: Array) -> ValueAndPartials:
    r"""α [½(1 − α) x² + Σ_{k≥3} x^k/(k (k − 1))], x = −u/α in [0, 1].

    The sum is (1 − x) log(1 − x) + x − ½x²; ∂g/∂u = log(1 − x) + αx and ∂g/∂α = log(1 − x) + x.
    """
    x = -u / alpha
    small, inner, near = x < 0.5, _below(x), jnp.minimum(x, 0.5)
    last = terms(u, 24, 50)
    series = near**3 * horner([1 / (k * (k - 1)) for k in range(3, last)], near)
    wide = (1 - x) * jnp.log1p(-inner) + x - 0.5 * x * x
    curved = jnp.where(small, series, wide)
    logs = jnp.where(small, -_log_remainder(near, 2), jnp.log1p(-inner) + x)
    return alpha * (0.5 * (1 - alpha) * x * x + curved), (logs - (1 - alpha) * x, logs)


@with_partials
def elu_conjugate(w: Array, alpha: Array) -> ValueAndPartials:
    """The conjugate w u − g(u), u = α (e^p − 1), at p − u = w ≤ 0."""
    one = jnp.ones_like(w)
    t, _ = saturating_root(_monotone.EXPONENTIAL, -alpha, one, 1 - alpha, -w, alpha - w)
    u = -alpha * t
    logs = _elu_by_alpha(t)
    return w * u - elu_value(u, alpha), (u, -logs)


def _elu_by_alpha(x: Array) -> Array:
    """log(1 − x) + x."""
    return jnp.where(x < 0.5, -_log_remainder(jnp.minimum(x, 0.5), 2), jnp.log1p(-_below(x)) + x)


# --- sigmoid -----------------------------------------------------------------------------------------


@with_partials
def sigmoid_value(u: Array) -> ValueAndPartials:
    """U log u + (1 − u) log(1 − u) − ½u², 0 ≤ u ≤ 1."""
    log_u, log_rest = jnp.log(jnp.maximum(u, jnp.finfo(u.dtype).tiny)), jnp.log1p(-_below(u))
    return u * log_u + (1 - u) * log_rest - 0.5 * u * u, (log_u - log_rest - u,)


@with_partials
def sigmoid_conjugate(w: Array) -> ValueAndPartials:
    """log(1 + e^p) − ½σ(p)² at p − σ(p) = w: 2t − ½ tanh t = w + ½ with p = 2t."""
    c, half = w + 0.5, jnp.full_like(w, 0.5)
    a = jnp.abs(c)
    _, point = saturating_root(_monotone.TANH, -half, 4 * half, 3 * half, a, a + half)
    p = jnp.where(c < 0, -2 * point, 2 * point)
    decay = jnp.exp(-jnp.abs(p))
    u = jnp.where(p < 0, decay, 1) / (1 + decay)
    return jnp.maximum(p, 0) + jnp.log1p(decay) - 0.5 * u * u, (u,)


# --- softplus ----------------------------------------------------------------------------------------


def _log_integral(t: Array) -> Array:
    r"""∫_0^t log(1 − e^{−s}) ds = Li₂(e^{−t}) − π²/6, t ≥ 0.

    t log t − t − t²/4 + Σ_{k≥1} B_{2k} t^{2k+1}/(2k (2k + 1) (2k)!) below 2, Σ_k e^{−kt}/k² − π²/6 above.
    """
    near = jnp.minimum(t, 2)
    coefficients = [
        float(_B[2 * k] / (2 * k * (2 * k + 1) * math.factorial(2 * k)))
        for k in range(1, terms(t, 8, 17))
    ]
    logs = jnp.log(jnp.maximum(near, jnp.finfo(t.dtype).tiny))
    series = near * ((logs - 1) + near * (-0.25 + near * horner(coefficients, near * near)))
    return jnp.where(t < 2, series, _dilogarithm(t) - math.pi**2 / 6)


def _dilogarithm(t: Array) -> Array:
    """Li₂(e^{−t}), t ≥ 2."""
    decay = jnp.exp(-jnp.maximum(t, 2))
    return decay * horner([1 / k**2 for k in range(1, terms(t, 9, 19))], decay)


def _log_one_minus(t: Array) -> Array:
    """log(1 − e^{−t}), t > 0; at t = 0 that of the smallest normal number."""
    t = jnp.maximum(t, jnp.finfo(t.dtype).tiny)
    return jnp.where(t < 0.7, jnp.log(-jnp.expm1(-t)), jnp.log1p(-jnp.exp(-t)))


@with_partials
def softplus_value(u: Array) -> ValueAndPartials:
    """Li₂(e^{−u}) − π²/6, u ≥ 0; its derivative is log(1 − e^{−u})."""
    return _log_integral(u), (_log_one_minus(u),)


@with_partials
def softplus_conjugate(w: Array) -> ValueAndPartials:
    """Li₂(e^w), w ≤ 0; its derivative is −log(1 − e^w)."""
    value = jnp.where(w > -2, _log_integral(-w) + math.pi**2 / 6, _dilogarithm(-w))
    return value, (-_log_one_minus(-w),)
