r"""Exact priors of activations: prox_g = σ for σ non-decreasing and 1-Lipschitz, with S′ = σ.

    g(u) = S*(u) − ½u²,    prox_{ηg}(v) = σ(w) at the root w of (1 − η) σ(w) + η w = v

(Moreau 1965; Combettes and Pesquet, SIAM J. Math. Data Science 2(2), 2020, list activations of this class.)
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from stochsolvers import _checks
from stochsolvers._typing import Array, real, value_object
from stochsolvers.prox import _monotone, _potentials
from stochsolvers.prox._base import Prior, finite_where
from stochsolvers.prox._monotone import bounded, implicit, product_minus, saturating_root
from stochsolvers.prox._rules import with_partials


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


class _Exact(Prior):
    """An exact activation: subclasses give `_root(v, step)`, (u, w), and the other formulas."""

    def _prox(self, v, step):
        return self._root(v, step)[0]

    def _pre_activation(self, v, step):
        return self._root(v, step)[1]

    def _root(self, v: Array, step: Array) -> tuple[Array, Array]:
        raise NotImplementedError

    def _dual_projection(self, w, margin):
        return w

    def _term_sizes(self, u, w):
        return jnp.sum(u * u) + jnp.sum(jnp.abs(w))


# --- tanh, arctan, softsign --------------------------------------------------------------------------

_tanh_difference = _odd_difference(_monotone.TANH)
_arctan_difference = _odd_difference(_monotone.ARCTAN)


def _tanh_parts(u, w):
    decay = jnp.exp(-2 * jnp.abs(w))
    return 4 * decay / (1 + decay) ** 2, u * u, _tanh_difference(w)


def _arctan_parts(u, w):
    root = 1 / _monotone.hypot(jnp.ones_like(w), w)
    slope = root * root
    # far away the root may be too small for a float
    rest = jnp.where(jnp.abs(w) < 1, (w * root) ** 2, 1 - slope)
    return slope, rest, _arctan_difference(w)


_tanh_root = implicit(_odd_solve(_monotone.TANH, jnp.tanh), _tanh_parts)
_arctan_root = implicit(_odd_solve(_monotone.ARCTAN, jnp.arctan), _arctan_parts)


@value_object
class Tanh(_Exact):
    r"""The exact prior of tanh: prox_g(v) = tanh(v).

        g(u) = Σ ½ [(1 + u) log(1 + u) + (1 − u) log(1 − u)] − ½u²,  |u| ≤ 1,

    prox_{ηg}(v) = tanh(w) at the root of (1 − η) tanh(w) + η w = v.
    g*(w) = Σ log cosh p − ½ tanh²p at p − tanh p = w, finite everywhere.
    """

    def _value(self, u):
        inside = jnp.abs(u) <= 1
        return finite_where(inside, jnp.sum(_potentials.tanh_value(jnp.where(inside, u, 0))), u)

    def _root(self, v, step):
        return _tanh_root(v, step)

    def _conjugate(self, w):
        return jnp.sum(_potentials.tanh_conjugate(w))


@value_object
class Arctan(_Exact):
    r"""The exact prior of the arc tangent: prox_g(v) = arctan(v).

        g(u) = Σ −log cos u − ½u²,  |u| < π/2,

    prox_{ηg}(v) = arctan(w) at the root of (1 − η) arctan(w) + η w = v.
    g*(w) = Σ p arctan p − ½ log(1 + p²) − ½ arctan²p at p − arctan p = w, finite everywhere.

    Where arctan rounds to the float nearest π/2 (|w| above 1e7 in float32), that may lie outside the domain.
    """

    def _value(self, u):
        inside = _potentials.within_right_angle(u)
        return finite_where(inside, jnp.sum(_potentials.arctan_value(jnp.where(inside, u, 0))), u)

    def _root(self, v, step):
        return _arctan_root(v, step)

    def _conjugate(self, w):
        return jnp.sum(_potentials.arctan_conjugate(w))


def _softsign_solve(v, step):
    r"""Of η t² + (1 − |v|) t − |v| = 0: u = 2|v|/(1 + |v| + h), h = √((1 − |v|)² + 4η|v|).

    t = 2|v|/(h + 1 − |v|) = (h − (1 − |v|))/(2η), the one without cancellation.
    """
    a, info = jnp.abs(v), jnp.finfo(v.dtype)
    a = jnp.minimum(a, 0.1 * info.max)
    excess = a - 1
    h = _monotone.hypot(excess, 2 * jnp.sqrt(step) * jnp.sqrt(jnp.maximum(a, info.tiny)))
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


_softsign_root = implicit(_softsign_solve, _softsign_parts)


@value_object
class Softsign(_Exact):
    r"""The exact prior of softsign: prox_g(v) = v/(1 + |v|).

        g(u) = Σ −log(1 − |u|) − |u| − ½u²,  |u| < 1,

    prox_{ηg}(v) = 2v/(1 + |v| + √((1 − |v|)² + 4η|v|)).
    g*(w) = Σ p − log(1 + p) − ½ (p/(1 + p))² at p²/(1 + p) = |w|, finite everywhere.

    Where softsign rounds to ±1 (|w| above 1e7 in float32), that lies outside the domain.
    """

    def _value(self, u):
        inside = jnp.abs(u) < 1
        return finite_where(inside, jnp.sum(_potentials.softsign_value(jnp.where(inside, u, 0))), u)

    def _root(self, v, step):
        return _softsign_root(v, step)

    def _conjugate(self, w):
        return jnp.sum(_potentials.softsign_conjugate(w))


# --- sigmoid, softplus -------------------------------------------------------------------------------


def _sigmoid_solve(v, step):
    """With w = 2t: (1 − η)/2 tanh t + 2η t = v − (1 − η)/2; then steps that keep the digits of small u."""
    half = 0.5 * (1 - step)
    c, total = v - half, 0.5 + 1.5 * step
    a, excess = jnp.abs(c), jnp.where(c < 0, -v, (v - 1) + step)
    _, t = saturating_root(_monotone.TANH, half, 2 * step, total, a, excess)
    w, off = bounded(jnp.where(c < 0, -2 * t, 2 * t)), jnp.zeros_like(t)
    for _ in range(2):
        w = _at_one(step, v, w - off)
        decay = jnp.exp(-jnp.abs(w))
        high, low = 1 / (1 + decay), decay / (1 + decay)
        u, other = jnp.where(w < 0, low, high), jnp.where(w < 0, high, low)
        slope = u * other
        left = (1 - step) * u + product_minus(step, w, v)
        right = ((1 - v) - other) + step * (w - u)
        off = bounded(jnp.where(w < 0, left, right) / (slope + step * (1 - slope)))
    u = jnp.minimum(u * (1 - other * off), 1)
    return _at_one(step, jax.nn.sigmoid(v), u), _at_one(step, v, w - off)


def _sigmoid_parts(u, w):
    slope = u * jax.nn.sigmoid(-w)
    return slope, 1 - slope, w - u


_sigmoid_root = implicit(_sigmoid_solve, _sigmoid_parts)


@value_object
class Sigmoid(_Exact):
    r"""The exact prior of the logistic sigmoid: prox_g(v) = 1/(1 + e^{−v}).

        g(u) = Σ u log u + (1 − u) log(1 − u) − ½u²,  0 ≤ u ≤ 1,

    prox_{ηg}(v) = sigmoid(w) at the root of (1 − η) sigmoid(w) + η w = v.
    g*(w) = Σ softplus(p) − ½ sigmoid(p)² at p − sigmoid(p) = w, finite everywhere.
    """

    def _value(self, u):
        inside = (u >= 0) & (u <= 1)
        return finite_where(inside, jnp.sum(_potentials.sigmoid_value(jnp.where(inside, u, 0))), u)

    def _root(self, v, step):
        return _sigmoid_root(v, step)

    def _conjugate(self, w):
        return jnp.sum(_potentials.sigmoid_conjugate(w))


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


_softplus_root = implicit(_softplus_solve, _softplus_parts)


@value_object
class Softplus(_Exact):
    r"""The exact prior of softplus: prox_g(v) = log(1 + e^v).

        g(u) = Σ Li₂(e^{−u}) − π²/6,  u ≥ 0,    g′(u) = log(1 − e^{−u}),

    prox_{ηg}(v) = softplus(w) at the root of (1 − η) softplus(w) + η w = v.
    g*(w) = Σ Li₂(e^w) for w ≤ 0.
    """

    def _value(self, u):
        return finite_where(u >= 0, jnp.sum(_potentials.softplus_value(jnp.maximum(u, 0))), u)

    def _root(self, v, step):
        return _softplus_root(v, step)

    def _conjugate(self, w):
        return finite_where(w <= 0, jnp.sum(_potentials.softplus_conjugate(jnp.minimum(w, 0))), w)

    def _dual_projection(self, w, margin):
        return jnp.minimum(w, -margin)


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


_elu_root = implicit(_elu_solve, _elu_parts)


@value_object
class ELU(_Exact):
    r"""The exact prior of the ELU: prox_g(v) = v for v ≥ 0, α (e^v − 1) below.

        g(u) = Σ_{u<0} (u + α) log(1 + u/α) − u − ½u²,  u ≥ −α,

    prox_{ηg}(v) = α (e^w − 1) at the root w < 0 of (1 − η) α (e^w − 1) + η w = v.
    g*(w) = Σ w u − g(u), u = α (e^p − 1) at p − u = w, for w ≤ 0.

    Args:
      alpha: 0 < α ≤ 1; above 1 the slope at 0 is above 1, and ELU is the prox of no convex function.
    """

    alpha: ArrayLike = 1.0

    def __post_init__(self):
        _checks.positive("alpha of ELU", self.alpha)
        _checks.at_most("alpha of ELU", self.alpha, 1.0, "the slope of a prox")
        object.__setattr__(self, "alpha", real(self.alpha))

    def _alpha(self, like):
        return self._weight("alpha", self.alpha, like)

    def _value(self, u):
        alpha = self._alpha(u)
        inside = u >= -alpha
        values = _potentials.elu_value(jnp.where(inside, jnp.minimum(u, 0), 0), alpha)
        return finite_where(inside, jnp.sum(values), u)

    def _root(self, v, step):
        return _elu_root(v, step, self._alpha(v))

    def _conjugate(self, w):
        values = _potentials.elu_conjugate(jnp.minimum(w, 0), self._alpha(w))
        return finite_where(w <= 0, jnp.sum(values), w)

    def _dual_projection(self, w, margin):
        return jnp.minimum(w, -margin)


def _leaky_spread(step, alpha):
    """α + η (1 − α), exactly 1 at η = 1."""
    return jnp.where(step < 1, step + alpha * (1 - step), 1 + (step - 1) * (1 - alpha))


@with_partials
def _leaky_root(v, step, alpha):
    """V r, r = α/s with s = α + η (1 − α): dr/dη = −r (1 − α)/s, dr/dα = η/s²."""
    spread = _leaky_spread(step, alpha)
    ratio = alpha / spread
    u = v * ratio
    return u, (ratio, -u * ((1 - alpha) / spread), v * (step / spread / spread))


@value_object
class LeakyReLU(Prior):
    r"""The exact prior of the leaky ReLU: prox_g(v) = v for v ≥ 0, αv below.

        g(u) = ½ (1/α − 1) Σ min(u, 0)²,    prox_{ηg}(v) = α v/(α + η (1 − α)) for v < 0.

    It is `leaky_relu_prior(α)`, and also its limits: `NonNegative` at α = 0, `Zero` at α = 1.
    g*(w) = Σ α w²/(2 (1 − α)) for w ≤ 0.

    Args:
      negative_slope: 0 ≤ α ≤ 1.
    """

    negative_slope: ArrayLike = 0.01

    def __post_init__(self):
        _checks.non_negative("negative_slope", self.negative_slope)
        _checks.at_most("negative_slope", self.negative_slope, 1.0, "the slope of a prox")
        object.__setattr__(self, "negative_slope", real(self.negative_slope))

    def _slope(self, like):
        return self._weight("negative_slope", self.negative_slope, like)

    def _value(self, u):
        alpha, below = self._slope(u), jnp.minimum(u, 0)
        weight = (1 - alpha) / jnp.where(alpha > 0, alpha, 1)
        inside = (u >= 0) | (alpha > 0)
        return finite_where(inside, jnp.sum(0.5 * (weight * below) * below), u)

    def _prox(self, v, step):
        below = jnp.minimum(v, 0)
        return jnp.where(v >= 0, v, _leaky_root(below, step, self._slope(v)))

    def _pre_activation(self, v, step):
        return jnp.where(v >= 0, v, v / _leaky_spread(step, self._slope(v)))

    def _conjugate(self, w):
        alpha = self._slope(w)
        inside = (w <= 0) & ((alpha < 1) | (w == 0))
        slope = jnp.where(inside, w, 0) / jnp.where(alpha < 1, 1 - alpha, 1)
        return finite_where(inside, jnp.sum(0.5 * (alpha * slope) * jnp.where(inside, w, 0)), w)

    def _dual_projection(self, w, margin):
        return jnp.where(self._slope(w) < 1, jnp.minimum(w, -margin), 0)
