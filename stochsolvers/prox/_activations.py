r"""Exact priors of activations: prox_g = σ for σ non-decreasing and 1-Lipschitz, with S′ = σ.

    g(u) = S*(u) − ½u²,    prox_{ηg}(v) = σ(w) at the root w of (1 − η) σ(w) + η w = v

(Moreau 1965; Combettes and Pesquet, SIAM J. Math. Data Science 2(2), 2020, list activations of this class.)
"""

import abc

import jax.numpy as jnp
from jax.typing import ArrayLike

from stochsolvers import _checks
from stochsolvers._typing import Array, real, value_object
from stochsolvers.prox import _activation_roots, _potentials
from stochsolvers.prox._base import Prior, finite_where


class _Exact(Prior):
    """An exact activation: subclasses give `_root(v, step)`, (u, w), and the other formulas."""

    def _prox(self, v, step):
        return self._root(v, step)[0]

    def _pre_activation(self, v, step):
        return self._root(v, step)[1]

    @abc.abstractmethod
    def _root(self, v: Array, step: Array) -> tuple[Array, Array]:
        """u = prox_{ηg}(v), and the w with σ(w) = u."""

    def _term_sizes(self, u, w):
        return jnp.sum(u * u) + jnp.sum(jnp.abs(w))


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
        return _activation_roots.tanh_root(v, step)

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
        return _activation_roots.arctan_root(v, step)

    def _conjugate(self, w):
        return jnp.sum(_potentials.arctan_conjugate(w))


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
        return _activation_roots.softsign_root(v, step)

    def _conjugate(self, w):
        return jnp.sum(_potentials.softsign_conjugate(w))


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
        return _activation_roots.sigmoid_root(v, step)

    def _conjugate(self, w):
        return jnp.sum(_potentials.sigmoid_conjugate(w))


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
        return _activation_roots.softplus_root(v, step)

    def _conjugate(self, w):
        return finite_where(w <= 0, jnp.sum(_potentials.softplus_conjugate(jnp.minimum(w, 0))), w)

    def _dual_projection(self, w, margin):
        return jnp.minimum(w, -margin)


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
        return _activation_roots.elu_root(v, step, self._alpha(v))

    def _conjugate(self, w):
        values = _potentials.elu_conjugate(jnp.minimum(w, 0), self._alpha(w))
        return finite_where(w <= 0, jnp.sum(values), w)

    def _dual_projection(self, w, margin):
        return jnp.minimum(w, -margin)


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
        return jnp.where(v >= 0, v, _activation_roots.leaky_root(below, step, self._slope(v)))

    def _pre_activation(self, v, step):
        return jnp.where(v >= 0, v, v / _activation_roots.leaky_spread(step, self._slope(v)))

    def _conjugate(self, w):
        alpha = self._slope(w)
        inside = (w <= 0) & ((alpha < 1) | (w == 0))
        slope = jnp.where(inside, w, 0) / jnp.where(alpha < 1, 1 - alpha, 1)
        return finite_where(inside, jnp.sum(0.5 * (alpha * slope) * jnp.where(inside, w, 0)), w)

    def _dual_projection(self, w, margin):
        return jnp.where(self._slope(w) < 1, jnp.minimum(w, -margin), 0)
