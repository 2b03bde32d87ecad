"""Priors that are sums over single entries: the elementwise activations."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from stochsolvers import _checks
from stochsolvers._typing import Array, real, value_object
from stochsolvers.prox import _conjugates, _roots
from stochsolvers.prox._base import Prior, Weighted, finite_where


@value_object
class Zero(Prior):
    """g(u) = 0: prox(v) = v, the identity; g* is the indicator of {0}."""

    def _times(self, factor):
        return self

    def _value(self, u):
        return jnp.zeros((), u.dtype)

    def _prox(self, v, step):
        return v

    def _pre_activation(self, v, step):
        return v

    def _conjugate(self, w):
        return finite_where(w == 0, 0, w)

    def _dual_projection(self, w, margin):
        return jnp.zeros_like(w)


@value_object
class NonNegative(Prior):
    """g(u) = 0 if u ≥ 0, else ∞: prox(v) = max(v, 0), ReLU, also in its derivative 0 at v = 0."""

    def _times(self, factor):
        return self

    def _value(self, u):
        return finite_where(u >= 0, 0, u)

    def _prox(self, v, step):
        return jax.nn.relu(v)

    def _pre_activation(self, v, step):
        return v

    def _conjugate(self, w):
        return finite_where(w <= 0, 0, w)

    def _dual_projection(self, w, margin):
        return jnp.minimum(w, -margin)


@value_object
class SquaredHinge(Weighted):
    r"""g(u) = (γ/2) Σ max(−u − s, 0)²: prox(v) = v if v ≥ −s, else (v − ηγs)/(1 + ηγ).

    The leaky ReLU of slope 1/(1 + ηγ) (Bibi et al. 2019, prop. 3, with the sign of γs corrected).
    g*(w) = Σ w²/(2γ) − s w for w ≤ 0.

    Args:
      gamma: γ ≥ 0.
      shift: s.
    """

    shift: ArrayLike = 0.0

    def __post_init__(self):
        super().__post_init__()
        _checks.finite("shift", self.shift)
        object.__setattr__(self, "shift", real(self.shift))

    def _parameters(self, like):
        return self._gamma(like), self._weight("shift", self.shift, like)

    def _value(self, u):
        gamma, shift = self._parameters(u)
        depth = jax.nn.relu(-u - shift)
        return jnp.sum(0.5 * (gamma * depth) * depth)

    def _prox(self, v, step):
        gamma, shift = self._parameters(v)
        below = jnp.where(v >= -shift, -shift, v)
        return jnp.where(v >= -shift, v, _roots.hinge_root(below, shift, step, gamma))

    def _conjugate(self, w):
        gamma, shift = self._parameters(w)
        curved = gamma > 0
        terms = _conjugates.hinge(jnp.where(curved, w, 0), shift, jnp.where(curved, gamma, 1))
        return finite_where((w <= 0) & (curved | (w == 0)), jnp.sum(terms), w)

    def _dual_projection(self, w, margin):
        return jnp.where(self._gamma(w) > 0, jnp.minimum(w, -margin), 0)


def leaky_relu_prior(negative_slope: ArrayLike = 0.01) -> SquaredHinge:
    """The prior whose prox at η = 1 is the leaky ReLU of slope 0 < α ≤ 1: γ = 1/α − 1."""
    wanted = "a number > 0 (NonNegative() is the limit, the ReLU of slope 0)"
    _checks.positive("negative_slope", negative_slope, wanted)
    _checks.non_negative("1 - negative_slope", 1 - negative_slope)  # pyright: ignore[reportOperatorIssue]
    return SquaredHinge(1 / negative_slope - 1)  # pyright: ignore[reportOperatorIssue]


@value_object
class _Barrier(Weighted):
    """A log barrier, whose conjugate is finite everywhere unless a subclass says otherwise.

    γ = 0 is refused: the limit γ → 0 is the indicator of the closed interval, another class.
    """

    _limit: ClassVar[str]

    def __post_init__(self):
        super().__post_init__()
        wanted = f"a number > 0 ({self._limit} is the limit)"
        _checks.positive("gamma", self.gamma, wanted)

    def _term_sizes(self, u, w):
        return jnp.sum(jnp.abs(w) + self._gamma(w))


@value_object
class LogBarrier(_Barrier):
    r"""g(u) = −γ Σ log u, u > 0: prox(v) = v/2 + √(v²/4 + ηγ), close to softplus.

    (Bibi et al. 2019, prop. 4.) g*(w) = γ Σ (log(−γ/w) − 1) for w < 0.

    Args:
      gamma: γ > 0.
    """

    _limit: ClassVar[str] = "NonNegative()"

    def _value(self, u):
        logs = jnp.log(jnp.where(u > 0, u, 1))
        return finite_where(u > 0, -jnp.sum(self._gamma(u) * logs), u)

    def _prox(self, v, step):
        return _roots.positive_root(v, step, self._gamma(v))

    def _conjugate(self, w):
        safe = jnp.where(w < 0, w, -1)
        return finite_where(w < 0, jnp.sum(_conjugates.logarithm(safe, self._gamma(w))), w)

    def _term_sizes(self, u, w):
        return jnp.sum(self._gamma(w))

    def _dual_projection(self, w, margin):
        # The domain is open: stay one (normal) float away from its boundary.
        return jnp.minimum(w, -jnp.maximum(margin, jnp.finfo(w.dtype).tiny))


@value_object
class SymmetricLogBarrier(_Barrier):
    r"""g(u) = −γ Σ log(1 − u²), |u| < 1: prox(v) is the root of a cubic, close to tanh.

        u³ − v u² − (1 + 2ηγ) u + v = 0,  −1 < u < 1     (Bibi et al. 2019, prop. 5, for any γ)

    g*(w) = Σ q − γ log(1 + q/(2γ)) with q = w²/(γ + √(γ² + w²)).

    Args:
      gamma: γ > 0.
    """

    _limit: ClassVar[str] = "Box(-1, 1)"

    def _value(self, u):
        inside = jnp.abs(u) < 1
        safe = jnp.where(inside, u, 0)
        return finite_where(inside, jnp.sum(_conjugates.symmetric_barrier(safe, self._gamma(u))), u)

    def _prox(self, v, step):
        return _roots.symmetric_root(v, step, self._gamma(v))

    def _conjugate(self, w):
        return jnp.sum(_conjugates.symmetric(w, self._gamma(w)))


@value_object
class IntervalLogBarrier(_Barrier):
    r"""g(u) = −γ Σ (log u + log(1 − u)), 0 < u < 1: prox(v) is the root of a cubic, like a sigmoid.

        u − v − ηγ/u + ηγ/(1 − u) = 0,  0 < u < 1         (Bibi et al. 2019, appendix C)

    It is the symmetric barrier of weight 4ηγ in 2u − 1; v = ½ maps to ½, with slope 1/(1 + 8ηγ).

    Args:
      gamma: γ > 0.
    """

    _limit: ClassVar[str] = "Box(0, 1)"

    def _value(self, u):
        inside = (u > 0) & (u < 1)
        safe = jnp.where(inside, u, 0.5)
        logs = jnp.log(safe) + jnp.log1p(-safe)
        return finite_where(inside, -jnp.sum(self._gamma(u) * logs), u)

    def _prox(self, v, step):
        return _roots.interval_root(v, step, self._gamma(v))

    def _conjugate(self, w):
        return jnp.sum(_conjugates.interval(w, self._gamma(w)))


def soft_threshold(v: Array, weight: Array) -> Array:
    """Sign(v) max(|v| − c, 0), v for c = 0, also in its derivative at v = 0."""
    shrunk = jax.nn.relu(v - weight) - jax.nn.relu(-v - weight)
    return jnp.where((weight == 0) & (v == 0), v, shrunk)


@value_object
class L1(Weighted):
    """g(u) = γ ||u||₁: prox(v) = sign(v) max(|v| − ηγ, 0); g* is the indicator of |w| ≤ γ.

    Args:
      gamma: γ ≥ 0.

    Example:
      >>> ss.prox.L1(0.5).prox(jnp.array([-2.0, 0.25, 1.0]), 1.0).tolist()
      [-1.5, 0.0, 0.5]
    """

    def _value(self, u):
        return jnp.sum(self._gamma(u) * jnp.abs(u))

    def _prox(self, v, step):
        return soft_threshold(v, step * self._gamma(v))

    def _pre_activation(self, v, step):
        u = self._prox(v, step)
        return jnp.where(u == 0, v / step, u + jnp.sign(u) * self._gamma(v))

    def _conjugate(self, w):
        return finite_where(jnp.abs(w) <= self._gamma(w), 0, w)

    def _dual_projection(self, w, margin):
        radius = jax.nn.relu(self._gamma(w) - margin)
        return jnp.clip(w, -radius, radius)


@value_object
class Box(Prior):
    """g(u) = 0 if lo ≤ u ≤ hi, else ∞: prox(v) clips; slope 1 on the bounds, as `jax.nn.hard_tanh`.

    g*(w) = Σ hi max(w, 0) + lo min(w, 0). A bound may be infinite: then w has a forbidden sign.

    Args:
      lo: lower bound.
      hi: upper bound, ≥ lo.
    """

    lo: ArrayLike
    hi: ArrayLike

    def __post_init__(self):
        _checks.ordered("bounds of Box", self.lo, self.hi)
        object.__setattr__(self, "lo", real(self.lo))
        object.__setattr__(self, "hi", real(self.hi))

    def _times(self, factor):
        return self

    def _bounds(self, like):
        return self._weight("lo", self.lo, like), self._weight("hi", self.hi, like)

    def _value(self, u):
        lo, hi = self._bounds(u)
        return finite_where((lo <= u) & (u <= hi), 0, u)

    def _prox(self, v, step):
        lo, hi = self._bounds(v)
        return jnp.where(v < lo, lo, jnp.where(v > hi, hi, v))

    def _pre_activation(self, v, step):
        return v

    def _conjugate(self, w):
        lo, hi = self._bounds(w)
        below, above = jnp.isinf(lo), jnp.isinf(hi)
        support = jnp.where(above, 0, hi) * jax.nn.relu(w) - jnp.where(below, 0, lo) * jax.nn.relu(
            -w
        )
        return finite_where(~((above & (w > 0)) | (below & (w < 0))), jnp.sum(support), w)

    def _dual_projection(self, w, margin):
        lo, hi = self._bounds(w)
        below, above = jnp.isinf(lo), jnp.isinf(hi)
        one_sided = jnp.where(above, jnp.minimum(w, -margin), jnp.maximum(w, margin))
        return jnp.where(above & below, 0, jnp.where(above | below, one_sided, w))
