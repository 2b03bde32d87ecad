"""Priors on groups whose domain is bounded: g* is finite everywhere. Simplex, softmax, ball."""

import dataclasses
import math
from typing import ClassVar

import jax.numpy as jnp
from jax.typing import ArrayLike

from stochsolvers import _checks
from stochsolvers._typing import Array, real, static_field, value_object
from stochsolvers.prox import _balls, _simplex
from stochsolvers.prox._axes import canonical_axes, check_axes, reduced_shape
from stochsolvers.prox._base import Prior, finite_where, product


class _Group(Prior):
    """A sum over the groups of entries along one axis, or some."""

    axis: int | tuple[int, ...]
    separable: ClassVar[bool] = False

    def __post_init__(self):
        check_axes(self.axis)

    def _weight_shape(self, like):
        return reduced_shape(like, self.axis)

    def _axes(self, u):
        return canonical_axes(self.axis, u.ndim)


def _on_simplex(u: Array, axes: tuple[int, ...]) -> Array:
    """Whether u ≥ 0 and Σ u = 1, the sum up to round-off."""
    total = jnp.sum(u, axes, keepdims=True)
    size = u.size // max(total.size, 1)
    slack = (16 + size) * float(jnp.finfo(u.dtype).eps)
    return jnp.all(u >= 0) & jnp.all(jnp.abs(total - 1) <= slack)


def _round_off(like: Array) -> float:
    """Relative round-off of g*, in units of the sum of the sizes of its terms."""
    return (32 + 4 * math.log2(max(like.size, 1))) * float(jnp.finfo(like.dtype).eps)


def _largest(array: Array, axes: tuple[int, ...]) -> Array:
    """Σ_G max |entry|, the change of Σ_G <u_G, w_G> for u_G on the simplex."""
    return jnp.sum(jnp.max(jnp.abs(array), axes))


@value_object
class Simplex(_Group):
    r"""g(u) = 0 if u_G ≥ 0 and Σ u_G = 1 for every group G, else ∞: prox projects onto the simplex.

        prox(v)_G = max(v_G − τ, 0),   Σ prox(v)_G = 1

    The sparse kin of softmax. g*(w) = Σ_G max_i w_i. `value` accepts round-off of the sum.

    Args:
      axis: the axis, or axes, along which the entries of one group lie.

    References:
      Michelot, A finite algorithm for finding the projection of a point onto the canonical simplex of
      Rⁿ, JOTA 50, 1986.
    """

    axis: int | tuple[int, ...] = static_field(default=-1)

    def _times(self, factor):
        return self

    def _value(self, u):
        return finite_where(_on_simplex(u, self._axes(u)), 0, u)

    def _prox(self, v, step):
        return _simplex.project(self._axes(v), v)

    def _pre_activation(self, v, step):
        return v

    def _conjugate(self, w):
        return jnp.sum(jnp.max(w, self._axes(w)))

    def _conjugate_rise(self, w, value, error):
        axes = self._axes(w)
        return _largest(error, axes) + _round_off(w) * _largest(w, axes)


@value_object
class Entropy(_Group):
    r"""g(u) = γ Σ_G (Σ u log u − ½||u_G||²) for u_G on the simplex, else ∞: prox_g is softmax for γ = 1.

    At the step η the entries of u = prox(v) in one group are the root of

        (1 − ηγ) u_i + ηγ log u_i = v_i + c,   Σ u_i = 1,

    softmax(v) to the bit for ηγ = 1, softmax(v/ηγ) to first order for large groups, and close to the
    projection onto the simplex for small ηγ. g*(w) = γ Σ_G (−c − ½||u_G||²) at log u_i − u_i = w_i/γ + c.
    `value` accepts round-off of the sum. Entries u_i are right to about 12 ε, and to
    12 ε (1 + (max v − v_i)/ηγ) of themselves, ε = 1.2e-7 in float32.

    Args:
      axis: the axis, or axes, along which the entries of one group lie.
      gamma: γ > 0; an array has size 1 in the axes of a group.

    References:
      Combettes and Pesquet, Deep neural network structures solving variational inequalities, 2020,
      example 2.23, for γ = 1.
    """

    axis: int | tuple[int, ...] = static_field(default=-1)
    gamma: ArrayLike = 1.0

    def __post_init__(self):
        super().__post_init__()
        _checks.positive("gamma", self.gamma, "a number > 0 (Simplex() is the limit)")
        object.__setattr__(self, "gamma", real(self.gamma))

    def _times(self, factor):
        return dataclasses.replace(self, gamma=product(self.gamma, factor))

    def _gamma(self, like):
        return self._weight("gamma", self.gamma, like)

    def _value(self, u):
        axes = self._axes(u)
        terms = u * (jnp.log(jnp.where(u > 0, u, 1)) - 0.5 * u)
        total = jnp.sum(self._gamma(u) * jnp.sum(terms, axes, keepdims=True))
        return finite_where(_on_simplex(u, axes), total, u)

    def _prox(self, v, step):
        weight = jnp.maximum(step * self._gamma(v), jnp.finfo(v.dtype).tiny)
        return _simplex.tempered(self._axes(v), v, 1 - weight, weight)

    def _conjugate(self, w):
        gamma = self._gamma(w)
        return jnp.sum(gamma * _simplex.entropy_conjugate(self._axes(w), w / gamma))

    def _conjugate_rise(self, w, value, error):
        axes, gamma = self._axes(w), self._gamma(w)
        size = w.size // max(gamma.size, 1)
        terms = _largest(w, axes) + (2 + math.log(max(size, 1))) * jnp.sum(gamma)
        return _largest(error, axes) + _round_off(w) * terms


@value_object
class L2Ball(_Group):
    r"""g(u) = 0 if ||u_G||₂ ≤ r for every group G, else ∞: prox(v)_G = v_G min(1, r/||v_G||₂).

    g*(w) = r Σ_G ||w_G||₂. `value` accepts round-off of the norm.

    Args:
      radius: r > 0; an array has size 1 in the axes of a group.
      axis: the axis, or axes, along which the entries of one group lie.
    """

    radius: ArrayLike = 1.0
    axis: int | tuple[int, ...] = static_field(default=-1)

    def __post_init__(self):
        super().__post_init__()
        _checks.positive("radius", self.radius)
        object.__setattr__(self, "radius", real(self.radius))

    def _times(self, factor):
        return self

    def _radius(self, like):
        return self._weight("radius", self.radius, like)

    def _value(self, u):
        radius = self._radius(u)
        slack = 1 + 8 * float(jnp.finfo(u.dtype).eps)
        norms = _balls.weighted_norm(self._axes(u), u, jnp.ones_like(radius))
        return finite_where(norms <= slack * radius, 0, u)

    def _prox(self, v, step):
        return _balls.project(self._axes(v), v, self._radius(v))

    def _pre_activation(self, v, step):
        return v

    def _conjugate(self, w):
        return jnp.sum(_balls.weighted_norm(self._axes(w), w, self._radius(w)))

    def _conjugate_rise(self, w, value, error):
        return self._conjugate(error) + _round_off(w) * value
