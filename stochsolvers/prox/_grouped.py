"""Priors on groups and matrices of activations: group lasso, low rank, positive semi-definite."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from stochsolvers import _checks, _linalg
from stochsolvers._typing import Array, static_field, value_object
from stochsolvers.prox import _balls, _sorted, _spectra
from stochsolvers.prox._axes import canonical_axes, check_axes, pair_of_axes, reduced_shape
from stochsolvers.prox._base import Prior, Weighted, finite_where


@value_object
class GroupL2(Weighted):
    r"""g(u) = γ Σ_G ||u_G||₂: prox(v)_G = max(1 − ηγ/||v_G||₂, 0) v_G, the block soft threshold.

    g* is the indicator of ||w_G||₂ ≤ γ.

    Args:
      gamma: γ ≥ 0; an array has size 1 in the axes of a group.
      axis: the axis, or axes, along which the entries of one group lie.
    """

    axis: int | tuple[int, ...] = static_field(default=-1)
    separable: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        check_axes(self.axis)

    def _weight_shape(self, like):
        return reduced_shape(like, self.axis)

    def _axes(self, u):
        return canonical_axes(self.axis, u.ndim)

    def _value(self, u):
        return jnp.sum(_balls.weighted_norm(self._axes(u), u, self._gamma(u)))

    def _prox(self, v, step):
        return _balls.shrink(self._axes(v), v, step * self._gamma(v))

    def _conjugate(self, w):
        slack = 1 + 8 * float(jnp.finfo(w.dtype).eps)
        gamma = self._gamma(w)
        norms = _balls.weighted_norm(self._axes(w), w, jnp.ones_like(gamma))
        return finite_where(norms <= slack * gamma, 0, w)

    def _dual_projection(self, w, margin):
        return _balls.project(self._axes(w), w, jax.nn.relu(self._gamma(w) - margin))


def _round_off(like: Array, axes: tuple[int, int]) -> float:
    """Relative round-off of a spectrum."""
    sizes = [like.shape[axis] for axis in axes]
    return 8 * max(*sizes, 1) * float(jnp.finfo(like.dtype).eps)


@value_object
class NuclearNorm(Weighted):
    r"""g(U) = γ Σ w_i σ_i(U), σ_1 ≥ σ_2 ≥ …; γ ||U||_* without weights w.

    prox(V) = P max(Σ − ηγ, 0) Qᵀ for V = PΣQᵀ, and g* is the indicator of spectral norm ≤ γ. With weights
    Σ − ηγw is replaced by the nearest non-increasing sequence, and g* is the indicator of
    Σ_{i ≤ k} σ_i ≤ γ Σ_{i ≤ k} w_i for all k; `dual_projection` keeps at least its margin.

    g is convex only for non-increasing weights, which penalise large singular values most: (1, …, 1, 0, …, 0)
    is the Ky Fan norm. The derivatives of prox and `dual_projection` are finite
    at repeated and vanishing singular values (Daleckii–Krein formula).

    Args:
      gamma: γ ≥ 0; an array has size 1 in the axes of a matrix.
      axes: the two axes of a matrix.
      weights: w_1 ≥ w_2 ≥ … ≥ 0, one for each of the min(m, n) singular values of an m × n matrix.

    Raises:
      ValueError: for weights that increase, or are not min(m, n).

    References:
      Bogdan et al., SLOPE: adaptive variable selection via convex optimization, 2015, for the weights.
    """

    axes: tuple[int, int] = static_field(default=(-2, -1))
    weights: ArrayLike | None = None
    separable: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "axes", pair_of_axes(self.axes))
        if self.weights is not None:
            _checks.floating("weights", self.weights)
            _checks.rank("weights", self.weights, 1)
            _checks.non_negative("weights", self.weights)
            wanted = "non-increasing numbers (g is not convex for others)"
            _checks.ordered("weights", self.weights[1:], self.weights[:-1], wanted)  # pyright: ignore

    def _weight_shape(self, like):
        return reduced_shape(like, self.axes)

    def _matrices(self, array):
        """Matrices on the last two axes."""
        return jnp.moveaxis(array, self.axes, (-2, -1))

    def _threshold(self, weight, like):
        """A weight for each matrix, or for each singular value, aligned with the vector of them."""
        each = self._matrices(weight)[..., 0]
        if self.weights is None:
            return each
        count = min(like.shape[axis] for axis in self.axes)
        if jnp.shape(self.weights) != (count,):
            _checks.fail("shape of weights", f"({count},)", jnp.shape(self.weights))
        own = jnp.asarray(self.weights, each.dtype)
        return each * jnp.expand_dims(own, range(each.ndim - 1))

    def _apply(self, function, array, threshold):
        kind = _spectra if self.weights is None else _sorted
        result = kind.of_singular_values(function, self._matrices(array), threshold)
        return jnp.moveaxis(result, (-2, -1), self.axes)

    def _value(self, u):
        sigma = _spectra.singular_values(self._matrices(u))
        return jnp.sum(self._threshold(self._gamma(u), u) * sigma)

    def _prox(self, v, step):
        return self._apply(_spectra.EXCESS, v, self._threshold(step * self._gamma(v), v))

    def _pre_activation(self, v, step):
        # u + P(v)/η, P the projection to η dom g*: v − u has no digits of it where η is small
        threshold = self._threshold(step * self._gamma(v), v)
        projected = self._apply(_spectra.CAPPED, v, threshold)
        return self._apply(_spectra.EXCESS, v, threshold) + projected / step

    def _conjugate(self, w):
        radius = self._threshold(self._gamma(w), w) * (1 + _round_off(w, self.axes))
        sigma = _spectra.singular_values(self._matrices(w))
        if self.weights is not None:
            sigma, radius = jnp.cumsum(sigma, -1), jnp.cumsum(radius, -1)
        return finite_where(sigma <= radius, 0, w)

    def _dual_projection(self, w, margin):
        if self.weights is None:
            radius = self._threshold(jax.nn.relu(self._gamma(w) - margin), w)
            return self._apply(_spectra.CAPPED, w, radius)
        # Σ_{i ≤ k} σ_i changes by at most √k times a Frobenius norm
        radius, margin = self._threshold(self._gamma(w), w), self._matrices(margin)[..., 0]
        sums = jnp.cumsum(radius, -1)
        roots = jnp.sqrt(jnp.arange(1, sums.shape[-1] + 1, dtype=sums.dtype))
        roots = jnp.expand_dims(roots, range(sums.ndim - 1))
        share = jnp.where(sums > 0, roots / jnp.where(sums > 0, sums, 1), 0)
        kept = jax.nn.relu(1 - margin * jnp.max(share, -1, keepdims=True, initial=0))
        return self._apply(_spectra.CAPPED, w, radius * kept)


@value_object
class PositiveSemidefinite(Prior):
    r"""g(U) = 0 if U = Uᵀ ⪰ 0, else ∞: prox(V) = Q max(Λ, 0) Qᵀ for (V + Vᵀ)/2 = QΛQᵀ.

    g* is the indicator of (W + Wᵀ)/2 ⪯ 0; the skew part is free. The derivatives of prox and
    `dual_projection` are finite at repeated and vanishing eigenvalues (Daleckii–Krein formula).
    `value` accepts round-off.

    Args:
      axes: the two axes of a square matrix.
    """

    axes: tuple[int, int] = static_field(default=(-2, -1))
    separable: ClassVar[bool] = False

    def __post_init__(self):
        object.__setattr__(self, "axes", pair_of_axes(self.axes))

    def _times(self, factor):
        return self

    def _weight_shape(self, like):
        return reduced_shape(like, self.axes)

    def _matrices(self, array):
        canonical_axes(self.axes, array.ndim)
        matrices = jnp.moveaxis(array, self.axes, (-2, -1))
        if matrices.shape[-2] != matrices.shape[-1]:
            _checks.fail(f"axes {self.axes}", "a square matrix", matrices.shape[-2:])
        return matrices

    def _semidefinite(self, matrices, sign):
        """Whether sign · (symmetric part) ⪰ 0, up to round-off."""
        scaled, _ = _spectra.scaled(matrices)
        values = sign * _linalg.eigvalsh(_spectra.symmetric(scaled))
        # round-off is that of all entries: the skew part may be larger than the symmetric one
        scale = jnp.max(jnp.abs(values), -1, keepdims=True, initial=0)
        scale = jnp.maximum(scale, jnp.max(jnp.abs(scaled), (-2, -1), initial=0)[..., None])
        return values >= -_round_off(matrices, (-2, -1)) * scale

    def _value(self, u):
        u = self._matrices(u)
        symmetric = u == jnp.swapaxes(u, -1, -2)
        return finite_where(jnp.all(symmetric) & jnp.all(self._semidefinite(u, 1)), 0, u)

    def _prox(self, v, step):
        symmetric = _spectra.symmetric(self._matrices(v))
        zero = jnp.zeros_like(symmetric[..., 0])
        positive = _spectra.of_eigenvalues(_spectra.EXCESS, symmetric, zero)
        return jnp.moveaxis(positive, (-2, -1), self.axes)

    def _pre_activation(self, v, step):
        return v

    def _conjugate(self, w):
        return finite_where(self._semidefinite(self._matrices(w), -1), 0, w)

    def _dual_projection(self, w, margin):
        w, bound = self._matrices(w), -jnp.moveaxis(margin, self.axes, (-2, -1))[..., 0]
        symmetric = _spectra.symmetric(w)
        capped = _spectra.of_eigenvalues(_spectra.CAPPED, symmetric, bound)
        return jnp.moveaxis(capped + (w - symmetric), (-2, -1), self.axes)
