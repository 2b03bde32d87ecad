r"""Scalar equations of exact activations: σ non-decreasing, 1-Lipschitz, D(w) = w − σ(w).

    u = prox_{ηg}(v) = σ(w) at the root w of σ(w) + η D(w) = (1 − η) σ(w) + η w = v.

The left side has the slope σ′ + η D′ = (1 − η) σ′ + η > 0. By the theorem on implicit functions

    dw = (dv − D dη − (1 − η) dσ) / (σ′ + η D′),   du = σ′ dw + dσ,

dσ the change of σ(w) with its own parameters, at w as it is.

The roots of saturating activations are those of a T(t) + b t = c, t ≥ 0, for a T with T(0) = 0, T′(0) = 1
that rises to a limit. Small differences (t − T(t) near 0, limit − T(t) far away) do not cancel.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from stochsolvers._typing import Array
from stochsolvers.prox._rules import hypot

ROUNDS = 2
"""Steps of Halley's method in float32; the last evaluation is one more step."""


def implicit(solve: Callable[..., tuple[Array, Array]], parts: Callable[..., tuple]) -> Callable:
    """(u, w) of `solve(v, η, *parameters)`, with the derivatives of the implicit equation.

    `parts(u, w, *parameters)` returns σ′(w), D′(w), D(w) and the derivatives of σ(w) by the parameters.
    """
    solve = jax.jit(solve, inline=True)  # without jit around it, loops would be compiled again

    @jax.custom_jvp
    def root(v, step, *parameters):
        return solve(v, step, *parameters)

    def jvp(primals, tangents):
        v, step, *parameters = primals
        u, w = root(*primals)
        slope, rest, difference, *partials = parts(u, w, *parameters)
        scale = slope + step * rest
        moved = by_parameters = jnp.zeros_like(v)
        for partial, tangent in zip(partials, tangents[2:], strict=True):
            if not isinstance(tangent, SymbolicZero):
                by_parameters = by_parameters + partial * tangent
        if not isinstance(tangents[0], SymbolicZero):
            moved = moved + tangents[0]
        if not isinstance(tangents[1], SymbolicZero):
            moved = moved - difference * tangents[1]
        if partials:
            moved = moved - (1 - step) * by_parameters
        return (u, w), (slope / scale * moved + by_parameters, moved / scale)

    root.defjvp(jvp, symbolic_zeros=True)
    return root


def horner(coefficients: Sequence[float], x: Array) -> Array:
    """Σ c_k x^k."""
    total = jnp.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total = total * x + coefficient
    return total


def bounded(x: Array) -> Array:
    """The argument, at most a quarter of the largest float: sums with it do not overflow."""
    limit = 0.25 * jnp.finfo(x.dtype).max
    return jnp.clip(x, -limit, limit)


def rounds(improve: Callable[[int, Array], Array], start: Array, more: int = 0) -> Array:
    """`ROUNDS` steps, one more in float64; a loop, for it compiles in half the time."""
    count = ROUNDS + more + (jnp.finfo(start.dtype).bits > 32)
    return jax.lax.fori_loop(0, count, improve, start)


def terms(like: Array, single: int, double: int) -> int:
    """How many terms of a series a dtype needs."""
    return single if jnp.finfo(like.dtype).bits <= 32 else double


def product_minus(x: Array, y: Array, z: Array) -> Array:
    """x y − z with the rounding of a float of twice the length, for x y near z."""
    bits = {
        "exponent_bits": jnp.finfo(x.dtype).nexp,
        "mantissa_bits": jnp.finfo(x.dtype).nmant // 2 - 1,
    }
    x_high, y_high = (jax.lax.reduce_precision(a, **bits) for a in (x, y))
    x_low, y_low = x - x_high, y - y_high
    return ((x_high * y_high - z) + (x_high * y_low + x_low * y_high)) + x_low * y_low


# --- saturating functions ---------------------------------------------------------------------------


class Half(NamedTuple):
    """T at t ≥ 0: T, t − T, limit − T, T′, 1 − T′, T″, each with its own relative accuracy."""

    value: Array
    below_t: Array
    below_limit: Array
    slope: Array
    rest: Array
    bend: Array


class Saturating(NamedTuple):
    """A function T(t), t ≥ 0, its limit and a start for the equation a T(t) + b t = c."""

    half: Callable[[Array], Half]
    limit: float
    start: Callable[[Array, Array, Array, Array], Array]


def _fraction(numerators: Sequence[float]) -> tuple[list[float], list[float]]:
    """Polynomials P, Q in x with P/Q = n₀x/(3 + n₁x/(5 + n₂x/(7 + …)))."""
    top, bottom = [0.0], [1.0]
    for k in range(len(numerators) - 1, -1, -1):
        # the next outer level: n_k x / (2k + 3 + top/bottom)
        odd = 2 * k + 3
        size = max(len(top), len(bottom))
        lower = [
            odd * (bottom[i] if i < len(bottom) else 0.0) + (top[i] if i < len(top) else 0.0)
            for i in range(size)
        ]
        top, bottom = [0.0, *(numerators[k] * b for b in bottom)], lower
    return top, bottom


def _below(numerators: Sequence[float], t: Array) -> Array:
    """t − t/(1 + q) = t q/(1 + q) with the continued fraction q(t²) of `_fraction`."""
    top, bottom = _fraction(numerators)
    scale = bottom[0]
    size = max(len(top), len(bottom))
    both = [
        ((top[i] if i < len(top) else 0.0) + (bottom[i] if i < len(bottom) else 0.0)) / scale
        for i in range(size)
    ]
    x = t * t
    return t * x * horner([c / scale for c in top[1:]], x) / horner(both, x)


def _tanh_half(t: Array) -> Half:
    near, decay = t < 1, jnp.exp(-2 * t)
    below_limit = 2 * decay / (1 + decay)
    below_t = _below([1.0] * terms(t, 5, 8), jnp.minimum(t, 1))
    value = jnp.where(near, t - below_t, 1 - below_limit)
    slope = below_limit * (2 - below_limit)
    below_t = jnp.where(near, below_t, t - value)
    return Half(value, below_t, below_limit, slope, value * value, -2 * value * slope)


def _exponential_half(t: Array) -> Half:
    """1 − e^(−t)."""
    near, decay = t < 1, jnp.exp(-t)
    inner = jnp.minimum(t, 1)
    series = [(-1.0) ** k / math.factorial(k + 2) for k in range(terms(t, 10, 17))]
    below_t = inner * inner * horner(series, inner)
    value = jnp.where(near, t - below_t, 1 - decay)
    below_t = jnp.where(near, below_t, t - value)
    return Half(value, below_t, decay, decay, value, -decay)


def _arctan_half(t: Array) -> Half:
    near, root = t < 1, 1 / hypot(jnp.ones_like(t), t)
    inner = jnp.where(near, t, 1 / jnp.maximum(t, 1))
    below = _below([float((k + 1) ** 2) for k in range(terms(t, 10, 22))], inner)
    angle = inner - below
    value = jnp.where(near, angle, 0.5 * math.pi - angle)
    slope = root * root
    below_limit = jnp.where(near, 0.5 * math.pi - angle, angle)
    below_t, rest = jnp.where(near, below, t - value), (t * root) ** 2
    return Half(value, below_t, below_limit, slope, rest, -2 * (t * slope) * slope)


def _linear_start(a: Array, b: Array, total: Array, c: Array) -> Array:
    """The lower bounds for a ≥ 0, from T(t) ≤ t and T(t) ≤ 1: exact for small and large c."""
    return jnp.maximum(c / total, (c - a) / b)


def _convex_start(a: Array, b: Array, total: Array, c: Array, bent: Array) -> Array:
    """For a < 0: the smallest of the roots of the slopes at 0 and at infinity, and of a power of t."""
    tiny = jnp.finfo(c.dtype).tiny
    return jnp.minimum(jnp.minimum(c / jnp.maximum(total, tiny), (c - a) / b), bent)


def log_omega(c: Array) -> Array:
    """About log y at the root of y + log y = c: within 0.3."""
    return jnp.minimum(c, jnp.log(jnp.maximum(c, 1))) - 0.25


def _exponential_start(scale: float, rate: float, order: int) -> Callable:
    """For T ≈ 1 − m e^(−rt): y + log y = (a − c)/β + k, t = (k − log y)/r with β = b/r, k = log(a m/β)."""

    def start(a, b, total, c):
        tiny = jnp.finfo(c.dtype).tiny
        bent = _power(c / jnp.maximum(-a, tiny), order)
        positive = jnp.maximum(a, tiny)
        beta = b / rate
        k = jnp.log(positive) - jnp.log(beta / scale)
        knee = (k - log_omega((a - c) / beta + k)) / rate
        simple = (c < 0.5 * a) | (b > a)
        saturated = jnp.where(simple, _linear_start(positive, b, total, c), knee)
        return jnp.where(a > 0, jnp.maximum(saturated, 0), _convex_start(a, b, total, c, bent))

    return start


def _power(ratio: Array, order: int) -> Array:
    """The root t of tⁿ/n = ratio, n = 2 or 3: t − T(t) is about tⁿ/n near 0."""
    return jnp.sqrt(2 * ratio) if order == 2 else jnp.cbrt(3 * ratio)


def _arctan_start(a: Array, b: Array, total: Array, c: Array) -> Array:
    """For T ≈ π/2 − 1/t: the root of b t² − (c − aπ/2) t − a = 0."""
    tiny = jnp.finfo(c.dtype).tiny
    excess, positive = 0.5 * c - 0.25 * math.pi * a, jnp.maximum(a, tiny)
    root = hypot(excess, jnp.sqrt(positive) * jnp.sqrt(b)) + jnp.abs(excess)
    far = jnp.where(excess > 0, root / b, positive / root)
    limited = jnp.where(c < a, c / jnp.maximum(total, tiny), far)
    bent = _power(c / jnp.maximum(-a, tiny), 3)
    return jnp.where(a > 0, limited, _convex_start(a, b, total, c, bent))


TANH = Saturating(_tanh_half, 1.0, _exponential_start(2.0, 2.0, 3))
EXPONENTIAL = Saturating(_exponential_half, 1.0, _exponential_start(1.0, 1.0, 2))
ARCTAN = Saturating(_arctan_half, 0.5 * math.pi, _arctan_start)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def saturating_root(
    function: Saturating, a: Array, b: Array, total: Array, c: Array, excess: Array
) -> tuple[Array, Array]:
    r"""T(t) and t at the root t ≥ 0 of a T(t) + b t = c, by Halley's method.

    Near zero the equation is (a + b) t − a (t − T) = c, far away b t − a (limit − T) = c − a limit.

    Args:
      function: T.
      a: any sign, > −b or with a + b = 0.
      b: > 0.
      total: a + b ≥ 0; it and `excess` come from the caller, who can compute them without cancellation.
      c: ≥ 0.
      excess: c − a limit.
    """
    info = jnp.finfo(c.dtype)

    def miss(t):
        half = function.half(t)
        near = total * t - a * half.below_t - c
        far = (b * t - excess) - a * half.below_limit
        slope = jnp.where(t < 1, total - a * half.rest, b + a * half.slope)
        return half, jnp.where(t < 1, near, far), jnp.maximum(slope, info.tiny)

    def improve(_, t):
        half, off, slope = miss(t)
        newton = bounded(off / slope)
        bend = jnp.clip(0.5 * newton * (a * half.bend / slope), -1e3, 0.5)
        return jnp.maximum(bounded(t - newton / (1 - bend)), 0)

    start = jnp.maximum(bounded(function.start(a, b, total, c)), 0)
    t = rounds(improve, start)
    half, off, slope = miss(t)
    newton = bounded(off / slope)
    value = jnp.clip(half.value - half.slope * newton, 0, function.limit)
    return value, jnp.maximum(bounded(t - newton), 0)
