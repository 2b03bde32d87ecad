"""Sparse priors with curvature or a sign: the elastic net, and L1 on non-negative entries."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from stochsolvers import _checks
from stochsolvers._typing import real, value_object
from stochsolvers.prox._base import Weighted, finite_where, product
from stochsolvers.prox._elementwise import soft_threshold


@value_object
class ElasticNet(Weighted):
    r"""g(u) = γ||u||₁ + (ρ/2)||u||²: prox(v) = sign(v) max(|v| − ηγ, 0)/(1 + ηρ).

    g*(w) = Σ max(|w| − γ, 0)²/(2ρ); for ρ = 0, the indicator of |w| ≤ γ.

    Args:
      gamma: γ ≥ 0.
      ridge: ρ ≥ 0.

    References:
      Parikh and Boyd, Proximal Algorithms, 2014, section 6.5.3.
    """

    ridge: ArrayLike = 1.0

    def __post_init__(self):
        super().__post_init__()
        _checks.non_negative("ridge", self.ridge)
        object.__setattr__(self, "ridge", real(self.ridge))

    def _times(self, factor):
        ridge = product(self.ridge, factor)
        return dataclasses.replace(self, gamma=product(self.gamma, factor), ridge=ridge)

    def _ridge(self, like):
        return self._weight("ridge", self.ridge, like)

    def _value(self, u):
        return jnp.sum(jnp.abs(u) * (self._gamma(u) + 0.5 * self._ridge(u) * jnp.abs(u)))

    def _prox(self, v, step):
        return soft_threshold(v, step * self._gamma(v)) / (1 + step * self._ridge(v))

    def _pre_activation(self, v, step):
        u = self._prox(v, step)
        return jnp.where(u == 0, v / step, u + jnp.sign(u) * self._gamma(v) + self._ridge(v) * u)

    def _conjugate(self, w):
        excess, ridge = jax.nn.relu(jnp.abs(w) - self._gamma(w)), self._ridge(w)
        curved = ridge > 0
        terms = 0.5 * excess * (excess / jnp.where(curved, ridge, 1))
        return finite_where(curved | (excess == 0), jnp.sum(terms), w)

    def _dual_projection(self, w, margin):
        radius = jax.nn.relu(self._gamma(w) - margin)
        return jnp.where(self._ridge(w) > 0, w, jnp.clip(w, -radius, radius))


@value_object
class NonNegativeL1(Weighted):
    """g(u) = γ Σ u if u ≥ 0, else ∞: prox(v) = max(v − ηγ, 0); g* is the indicator of w ≤ γ.

    A ReLU with a threshold.

    Args:
      gamma: γ ≥ 0.
    """

    def _value(self, u):
        return finite_where(u >= 0, jnp.sum(self._gamma(u) * u), u)

    def _prox(self, v, step):
        return jax.nn.relu(v - step * self._gamma(v))

    def _pre_activation(self, v, step):
        u = self._prox(v, step)
        return jnp.where(u == 0, v / step, u + self._gamma(v))

    def _conjugate(self, w):
        return finite_where(w <= self._gamma(w), 0, w)

    def _dual_projection(self, w, margin):
        return jnp.minimum(w, self._gamma(w) - margin)
