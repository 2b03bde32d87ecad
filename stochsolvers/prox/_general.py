"""The exact prior of any non-decreasing elementwise function of slope at most 1."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stochsolvers._typing import Array, static_field, value_object
from stochsolvers.prox import _membership
from stochsolvers.prox._base import Prior, finite_where
from stochsolvers.prox._monotone import implicit, product_minus
from stochsolvers.prox._rules import with_partials

_REACH = 1e12  # how far a function is evaluated for its range
_STEPS = {32: 80, 64: 130}


@value_object
class Activation(Prior):
    r"""The exact prior of any non-decreasing elementwise function σ of slope at most 1: prox_g(v) = σ(v).

        g(u) = S*(u) − ½u² = u p − S(p) − ½u² at σ(p) = u,   S(p) = ∫_0^p σ,
        prox_{ηg}(v) = σ(w) at the root w of (1 − η) σ(w) + η w = v,
        g*(w) = S(p) − ½σ(p)² at p − σ(p) = w.

    A function is the prox of a convex function if and only if it is of this kind (Moreau 1965). Those of JAX
    with a class of their own take its formulas, in which g may differ by a constant: tanh, sigmoid, softplus,
    elu, soft_sign, arctan, relu, relu6, hard_tanh, leaky_relu, identity, also as a `functools.partial` with
    keywords.

    For others w is found by Newton's method between bounds, and S by Gauss's quadrature on panels of ½ up to
    8 and of factor 2 above, with a relative error below 1e-6 (1e-12 in float64) for functions that are smooth
    at the scale 1, or linear with kinks at multiples of ½. `value` and `conjugate` lose what cancels in the
    formulas above, an error of a few round-offs of |u p| + |S|; prox multiplies the round-off of σ by
    up to η − 1 if η > 2. Certificates add these errors of g and g*, and the difference of two quadratures:
    they are upper bounds where this difference is at least the error of S, which holds for usual functions
    and is not proven for all. g* is +∞ where round-off leaves open whether it is finite: in float32 for w
    within 1e-5 of an end of its domain that p − σ(p) only approaches exponentially.

    Args:
      function: σ, an elementwise JAX function without traced values. Two objects are equal if their functions
        are the same object: give a named function rather than a lambda made in a loop.

    Raises:
      ValueError: for functions outside the class. GELU, SiLU (swish), mish and hard SiLU decrease somewhere,
        SELU is too steep; these are known by name, others are checked on a grid of points up to 1e4.
    """

    function: Callable[[Array], Array] = static_field()

    def __post_init__(self):
        _membership.check(self.function)

    @property
    def _known(self) -> Prior | None:
        """The prior with formulas for this function."""
        return _membership.closed_form(self.function)

    def _prox(self, v, step):
        known = self._known
        return known._prox(v, step) if known else _root(self.function)(v, step)[0]

    def _pre_activation(self, v, step):
        known = self._known
        return known._pre_activation(v, step) if known else _root(self.function)(v, step)[1]

    def _value(self, u):
        if self._known:
            return self._known._value(u)
        _, inside = _inverse(self.function, u)
        return finite_where(inside, jnp.sum(_value(self.function)(jnp.where(inside, u, 0))), u)

    def _conjugate(self, w):
        if self._known:
            return self._known._conjugate(w)
        _, inside = _dual_inverse(self.function, w)
        return finite_where(inside, jnp.sum(_conjugate(self.function)(w)), w)

    def _dual_projection(self, w, margin):
        if self._known:
            return self._known._dual_projection(w, margin)
        (_, low), (_, high) = _dual_ends(self.function, w.dtype)
        middle = 0.5 * low + 0.5 * high
        return jnp.clip(w, jnp.minimum(low + margin, middle), jnp.maximum(high - margin, middle))

    @property
    def _moves_duals(self):
        return self._known._moves_duals if self._known else True

    def _term_sizes(self, u, w):
        if self._known:
            return self._known._term_sizes(u, w)
        eps, total = jnp.finfo(u.dtype).eps, jnp.zeros((), u.dtype)
        for p in (_inverse(self.function, u)[0], _dual_inverse(self.function, w)[0]):
            area, error = _integral(self.function, p)
            sizes = jnp.abs(self.function(p) * p) + 2 * jnp.abs(area) + error / eps
            total += jnp.sum(sizes)
        return total + jnp.sum(jnp.abs(w)) + jnp.sum(u * u)


def _slope(function: Callable, w: Array) -> tuple[Array, Array]:
    """σ and σ′, the latter in [0, 1]."""
    value, slope = jax.jvp(function, (w,), (jnp.ones_like(w),))
    return value, jnp.clip(slope, 0, 1)


@functools.lru_cache(maxsize=256)
def _root(function: Callable) -> Callable:
    """(u, w) of a step, with its derivatives."""

    def parts(u, w):
        slope = _slope(function, w)[1]
        return slope, 1 - slope, w - u

    return implicit(functools.partial(_solve, function), parts)


def _solve(function: Callable, v: Array, step: Array) -> tuple[Array, Array]:
    r"""Newton's method for φ(w) = (1 − η) σ(w) + η w = v between bounds, with bisection where it is slow.

    φ(v) − v = (1 − η)(σ(v) − v), and φ has slopes of at least min(1, η): these are the first bounds. The last
    step is not rounded into w, so that small values of σ keep their digits; it stays within the values of σ.
    """
    info = jnp.finfo(v.dtype)
    limit = 0.25 * info.max

    def equation(w):
        value, slope = _slope(function, w)
        terms, below = ((1 - step) * value, step * w), w - value
        # of σ too, in which terms of the size of w may have cancelled
        sizes = jnp.abs(terms[0]) + jnp.abs(terms[1]) + jnp.abs(v) + jnp.abs((1 - step) * w)
        noise = 2 * info.eps * sizes
        # σ(w) near w: η (w − σ(w)) instead, exact where σ is the identity
        near_identity = (step > 1) & (2 * jnp.abs(below) < jnp.abs(w))
        off = jnp.where(near_identity, (value - v) + step * below, terms[0] + (terms[1] - v))
        accurate = jnp.where(near_identity, off, terms[0] + product_minus(step, w, v))
        return (
            value,
            slope,
            off,
            accurate,
            jnp.maximum(slope + step * (1 - slope), info.tiny),
            noise,
        )

    def unfinished(carry):
        return (carry[0] < _STEPS[info.bits]) & ~jnp.all(carry[-1])

    def improve(carry):
        k, w, low, high, before, done = carry
        _, _, off, _, rise, noise = equation(w)
        low, high = jnp.where(off < 0, w, low), jnp.where(off > 0, w, high)
        newton, middle = w - off / rise, 0.5 * low + 0.5 * high
        poor = (newton < low) | (newton > high) | (2 * jnp.abs(newton - w) > before)
        ahead = jnp.where(poor, middle, newton)
        move = jnp.abs(ahead - w)
        near = (move <= 2 * info.eps * jnp.abs(w)) | (jnp.abs(off) <= noise)
        return k + 1, jnp.where(done, w, ahead), low, high, move, done | near

    w = jnp.clip(v, -limit, limit)
    first = (1 - step) * (function(w) - w) / jnp.minimum(step, 1) * (1 + 8 * info.eps)
    low = jnp.clip(w - jnp.maximum(first, 0), -limit, limit)
    high = jnp.clip(w + jnp.maximum(-first, 0), -limit, limit)
    start = 0, w, low, high, jnp.full_like(w, info.max), low >= high
    w = jax.lax.while_loop(unfinished, improve, start)[1]

    value, slope, _, accurate, rise, _ = equation(w)
    off = jnp.where(step == 1, 0, accurate / rise)
    moved = w - off
    toward = jnp.where(off > 0, -jnp.inf, jnp.inf).astype(w.dtype)
    # JAX differentiates this in spite of the rule in derivatives of derivatives of loops
    next_to_w = jnp.nextafter(*jax.lax.stop_gradient((w, toward)))
    beyond = function(jnp.where(moved == w, next_to_w, moved))
    u = value - slope * off
    u = jnp.clip(u, jnp.minimum(value, beyond), jnp.maximum(value, beyond))
    u, fixed = jnp.where(off == 0, value, u), jax.lax.stop_gradient(w)
    for _ in range(2):  # two steps from a constant have the first three derivatives of the root
        _, _, off, _, rise, _ = equation(fixed)
        fixed = fixed - off / rise
    u, moved = jax.lax.stop_gradient((u, moved))
    return u + _change(function(fixed)), moved + _change(fixed)


def _change(smooth: Array) -> Array:
    """Zero, with the derivatives of the argument."""
    change = smooth - jax.lax.stop_gradient(smooth)
    return jnp.where(jnp.isfinite(change), change, 0)


# --- the inverse functions, by bisection -------------------------------------------------------------


def _smallest(reached: Callable[[Array], Array], end: Array, like: Array) -> Array:
    """About the smallest p in 0..end with reached(p), given reached(end); any sign of end."""
    size, sign = jnp.log1p(jnp.abs(end)), jnp.where(end < 0, -1, 1).astype(like.dtype)

    def halve(_, bounds):
        low, high = bounds
        middle = 0.5 * (low + high)
        inside = reached(sign * jnp.expm1(middle))
        return jnp.where(inside, low, middle), jnp.where(inside, middle, high)

    count = 45 if jnp.finfo(like.dtype).bits <= 32 else 75
    zero = jnp.zeros_like(like)
    _, high = jax.lax.fori_loop(0, count, halve, (zero, zero + size))
    return sign * jnp.expm1(high)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _inverse(function: Callable, u: Array) -> tuple[Array, Array]:
    """The p nearest to 0 with σ(p) = u, and whether there is one (or a limit of such p)."""
    sign = jnp.where(u < function(jnp.zeros_like(u)), -1, 1).astype(u.dtype)
    end = sign * jnp.asarray(_REACH, u.dtype)
    inside = sign * (function(end) - u) >= 0
    return _smallest(lambda p: sign * (function(p) - u) >= 0, end, u), inside


def _certain_difference(function: Callable, p: Array) -> Array:
    """p − σ(p), less its round-off: nearer to 0 than the true one or on the side of D(0)."""
    value = function(p)
    noise = 4 * jnp.finfo(p.dtype).eps * (jnp.abs(p) + jnp.abs(value)) * jnp.sign(p)
    return (p - value) - noise


def _dual_ends(function: Callable, dtype: Any) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """The p with the smallest and with the largest p − σ(p) that round-off leaves certain, and these."""
    sizes = np.concatenate([[0.0], np.logspace(-6, np.log10(_REACH), 361)])

    def end(sign):
        points = jnp.asarray(sign * sizes, dtype)
        values = sign * _certain_difference(function, points)
        at = jnp.argmax(jnp.where(jnp.isnan(values), -jnp.inf, values))
        return points[at], sign * values[at]

    return end(-1.0), end(1.0)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _dual_inverse(function: Callable, w: Array) -> tuple[Array, Array]:
    """The p nearest to 0 with p − σ(p) = w, and whether there is one."""
    (first, low), (last, high) = _dual_ends(function, w.dtype)
    centre = -function(jnp.zeros_like(w))
    sign = jnp.where(w < centre, -1, 1).astype(w.dtype)
    end = jnp.where(sign < 0, first, last)
    p = _smallest(lambda p: sign * (_certain_difference(function, p) - w) >= 0, end, w)
    return jnp.where(w == centre, 0, p), (w >= low) & (w <= high)


# --- S by quadrature ---------------------------------------------------------------------------------

_EDGES = np.concatenate([np.arange(0.0, 8.0, 0.5), 2.0 ** np.arange(3, 42)])
_FINE, _COARSE = (np.polynomial.legendre.leggauss(n) for n in (8, 6))
_NODES = 0.5 + 0.5 * np.concatenate([_FINE[0], _COARSE[0]])
_WEIGHTS = 0.5 * _FINE[1], 0.5 * _COARSE[1]


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _integral(function: Callable, p: Array) -> tuple[Array, Array]:
    """S(p) = ∫_0^p σ and the sum of the differences of two quadratures, over panels that end at p."""
    sign, size = jnp.where(p < 0, -1, 1).astype(p.dtype), jnp.abs(p)
    column = (-1, *(1,) * p.ndim)
    nodes, fine, coarse = (jnp.asarray(x, p.dtype).reshape(column) for x in (_NODES, *_WEIGHTS))

    def panel(carry, edges):
        total, error = carry
        low, high = (jnp.minimum(edge, size) for edge in edges)
        width = high - low
        values = function(sign[None] * (low[None] + width[None] * nodes))
        area = width * jnp.sum(fine * values[:8], 0)
        other = width * jnp.sum(coarse * values[8:], 0)
        return (total + area, error + jnp.abs(area - other)), None

    edges = jnp.asarray(_EDGES, p.dtype)
    zero = jnp.zeros_like(p)
    (total, error), _ = jax.lax.scan(panel, (zero, zero), (edges[:-1], edges[1:]))
    return sign * total, error


@functools.lru_cache(maxsize=256)
def _value(function: Callable) -> Callable[[Array], Array]:
    @with_partials
    def value(u):
        p, _ = _inverse(function, u)
        return (u * p - _integral(function, p)[0]) - 0.5 * u * u, (p - u,)

    return value


@functools.lru_cache(maxsize=256)
def _conjugate(function: Callable) -> Callable[[Array], Array]:
    """The conjugate, w u − g(u) at u = σ(p): to first order free of the error of p."""

    @with_partials
    def conjugate(w):
        p, _ = _dual_inverse(function, w)
        u = function(p)
        return u * (w - p) + _integral(function, p)[0] + 0.5 * u * u, (u,)

    return conjugate
