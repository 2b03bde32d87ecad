r"""Losses ℓ(u, x) between A* z and the input x: the second factor of a layer's problem.

    F(z) = Σ_i ℓ((A* z)_i, x_i) − <b, z> + (λ/2) ||z||²

| loss | ℓ(u, x) | ∂ℓ/∂u | L_ℓ | ℓ*(r, x) |
|---|---|---|---|---|
| `Squares()` | ½ (u − x)² | u − x | 1 | r x + ½ r² |
| `Huber(δ)` | ½ t², \|t\| ≤ δ, else δ\|t\| − ½ δ²; t = u − x | clip(t, −δ, δ) | 1 | r x + ½ r², \|r\| ≤ δ |
| `Logistic()` | log(1 + exp(−x u)) | −x s, s = 1/(1 + exp(x u)) | ¼ | s log s + (1−s) log(1−s), s = −x r |
| `CrossEntropy()` | log Σ_c exp u_c − Σ_c x_c u_c | softmax(u) − x | ½ | Σ_c p_c log p_c, p = r + x |
| `c * loss` | c ℓ(u, x) | c ∂ℓ/∂u | c L_ℓ | c ℓ*(r/c, x) |

`Squares` is the paper's layer and the default. i runs over the features, the last axis, which the
estimators sample. `CrossEntropy` couples another axis, the classes.

References:
  Bibi et al. 2019, eq. 1 and 5; Rockafellar, Convex Analysis, 1970, section 12 (conjugates).
"""

import abc
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from stochsolvers import _checks
from stochsolvers._typing import Array, Scalar, real, static_field, value_object


class Loss(abc.ABC):
    r"""A convex loss ℓ(u, x) with an L_ℓ-Lipschitz derivative in u.

    A loss of your own is a subclass under `stochsolvers.value_object` with a method `value` and an
    attribute `smoothness`. The derivative is then that of JAX. With `conjugate` (and, where its domain
    is not the whole line, `dual_projection`) certificates need no curvature.

    `value` and `conjugate` return terms whose sum is the loss of an example: arrays of x's shape, with
    size 1 in an axis that the loss couples. Certificates take the round-off of each term to be a few units of
    its own size: write log cosh t as log1p(expm1(t)² exp(−t)/2), not as a difference of numbers near 1. A
    loss that
    couples entries overrides `derivative_error` as well. Weights that differ between features are not for
    samplings that gather features (`shared=True`).
    """

    smoothness: float = 1.0
    """L_ℓ, a Lipschitz constant of ∂ℓ/∂u."""
    strong_convexity: ClassVar[float] = 0.0
    """m with ℓ(·, x) − (m/2)||·||² convex."""

    @abc.abstractmethod
    def value(self, u: Array, x: Array) -> Array:
        """Terms of ℓ(u, x)."""

    def __mul__(self, factor: Scalar) -> "Loss":
        return Scaled(self, factor) if _checks.is_real(factor) else NotImplemented

    __rmul__ = __mul__
    __array_ufunc__ = None  # numpy's numbers leave the product to the loss

    def derivative(self, u: Array, x: Array) -> Array:
        """∂ℓ/∂u, shaped as x."""
        return jax.grad(lambda u: jnp.sum(self.value(u, x)))(u)

    def conjugate(self, r: Array, x: Array) -> Array:
        """Terms of ℓ*(r, x) = sup_u <r, u> − ℓ(u, x); +∞ outside its domain, and where it is not known."""
        return jnp.full(x.shape, jnp.inf, x.dtype)

    def dual_projection(self, r: Array, x: Array) -> Array:
        """argmin ||s − r||² over the s with ℓ*(s, x) < ∞."""
        return r

    def dual_error(self, r: Array, x: Array) -> Array:
        """Entrywise distance of a computed derivative or projection r from dom ℓ*."""
        return jnp.zeros_like(r)

    def derivative_error(self, error: Array) -> Array:
        """Entrywise bound on |∂ℓ/∂u(u + e) − ∂ℓ/∂u(u)| for |e| ≤ error."""
        return self.smoothness * error

    def gap(self, u: Array, r: Array, x: Array) -> tuple[Array, Array, Array]:
        """Terms of ℓ(u, x) + ℓ*(r, x) − <u, r> ≥ 0, the sizes of their summands, and an error of their own.

        The last is by how much they are off at the point of dom ℓ* within `dual_error` of r.
        """
        value, conjugate = self.value(u, x), self.conjugate(r, x)
        coupled = tuple(i for i, n in enumerate(value.shape) if n != x.shape[i])
        product = jnp.sum(u * r, coupled, keepdims=True)
        sizes = jnp.sum(jnp.abs(u * r), coupled, keepdims=True)
        sizes = jnp.abs(value) + jnp.abs(conjugate) + sizes
        return value + conjugate - product, sizes, jnp.zeros_like(sizes)


@value_object
class Squares(Loss):
    """ℓ(u, x) = ½ (u − x)², the paper's layer."""

    strong_convexity: ClassVar[float] = 1.0

    def __init_subclass__(cls) -> None:
        """Refuse subclasses: what is known of squares need not hold for them."""
        raise TypeError("a loss of your own is a subclass of Loss, not of Squares")

    def value(self, u, x):
        """½ (u − x)²."""
        return 0.5 * (u - x) ** 2

    def derivative(self, u, x):
        """The residual u − x."""
        return u - x

    def conjugate(self, r, x):
        """r x + ½ r²."""
        return r * (x + 0.5 * r)

    def gap(self, u, r, x):
        """½ (r − (u − x))²."""
        terms = 0.5 * (r - (u - x)) ** 2
        return terms, terms, jnp.zeros_like(terms)


@value_object
class Huber(Loss):
    r"""ℓ(u, x) = ½ t² for |t| ≤ δ, else δ|t| − ½ δ², t = u − x: squares that outliers do not dominate.

    Args:
      delta: δ > 0, traced.

    References:
      Huber 1964.
    """

    delta: Scalar = 1.0

    def __post_init__(self):
        _checks.positive("delta", self.delta)
        _checks.rank("delta", self.delta, 0)
        object.__setattr__(self, "delta", real(self.delta))

    def value(self, u, x):
        """½ c² + δ (|t| − |c|), c = clip(t, −δ, δ)."""
        delta = jnp.asarray(self.delta, x.dtype)
        size = jnp.abs(u - x)
        inner = jnp.minimum(size, delta)
        return 0.5 * inner**2 + delta * (size - inner)

    def derivative(self, u, x):
        """clip(u − x, −δ, δ)."""
        delta = jnp.asarray(self.delta, x.dtype)
        return jnp.clip(u - x, -delta, delta)

    def conjugate(self, r, x):
        """r x + ½ r² for |r| ≤ δ."""
        inside = jnp.abs(r) <= jnp.asarray(self.delta, x.dtype)
        return jnp.where(inside, r * (x + 0.5 * r), jnp.inf)

    def dual_projection(self, r, x):
        """clip(r, −δ, δ)."""
        delta = jnp.asarray(self.delta, x.dtype)
        return jnp.clip(r, -delta, delta)


@value_object
class Logistic(Loss):
    """ℓ(u, x) = log(1 + exp(−x u)) for labels x = ±1."""

    smoothness = 0.25

    def value(self, u, x):
        """softplus(−x u)."""
        return jnp.logaddexp(-x * u, jnp.zeros((), x.dtype))

    def derivative(self, u, x):
        """−x / (1 + exp(x u))."""
        return -x * jax.nn.sigmoid(-x * u)

    def conjugate(self, r, x):
        """s log s + (1 − s) log(1 − s), s = −x r ∈ [0, 1]."""
        s = -x * r
        inside = (s >= 0) & (s <= 1)
        return jnp.where(inside, _x_log_x(s) + _x_log_x(1 - s), jnp.inf)

    def dual_projection(self, r, x):
        """−x clip(−x r, 0, 1)."""
        return -x * jnp.clip(-x * r, 0, 1)


@value_object
class CrossEntropy(Loss):
    r"""ℓ(u, x) = log Σ_c exp u_c − Σ_c x_c u_c, with classes c along one axis and Σ_c x_c = 1.

    Args:
      axis: the axis of the classes, counted from the end, not the last one: that is of the features. A
        classifier's x is one-hot, of shape (..., classes, n) for n data.
    """

    axis: int = static_field(default=-2)
    smoothness = 0.5

    def __post_init__(self):
        axis = _checks.count("axis of CrossEntropy", self.axis, minimum=-(2**31), maximum=-2)
        object.__setattr__(self, "axis", axis)

    def value(self, u, x):
        """Log Σ_c exp u_c − Σ_c x_c u_c, size 1 along the classes."""
        total = jax.nn.logsumexp(u, axis=self.axis, keepdims=True)
        return total - jnp.sum(x * u, axis=self.axis, keepdims=True)

    def derivative(self, u, x):
        """softmax(u) − x."""
        return jax.nn.softmax(u, axis=self.axis) - x

    def conjugate(self, r, x):
        """Σ_c p_c log p_c for p = r + x in the simplex, up to the round-off that `dual_error` bounds."""
        p = r + x
        slack = self._round_off(x)
        total = jnp.sum(p, axis=self.axis, keepdims=True)
        inside = jnp.all(p >= -slack, axis=self.axis, keepdims=True) & (jnp.abs(total - 1) <= slack)
        entropy = jnp.sum(_x_log_x(jnp.maximum(p, 0)), axis=self.axis, keepdims=True)
        return jnp.where(inside, entropy, jnp.inf)

    def dual_projection(self, r, x):
        """p − x, p the projection of r + x to the simplex (Held, Wolfe and Crowder 1974)."""
        p = jnp.moveaxis(r + x, self.axis, -1)
        descending = -jnp.sort(-p, axis=-1)
        counts = jnp.arange(1, p.shape[-1] + 1, dtype=p.dtype)
        excess = (jnp.cumsum(descending, axis=-1) - 1) / jnp.expand_dims(counts, range(p.ndim - 1))
        support = jnp.sum(descending > excess, axis=-1, keepdims=True)
        threshold = jnp.take_along_axis(excess, support - 1, axis=-1)
        return jnp.moveaxis(jnp.maximum(p - threshold, 0), -1, self.axis) - x

    def dual_error(self, r, x):
        """Distance of r from p/Σp − x, where p = max(r + x, 0)."""
        p, eps = r + x, float(jnp.finfo(x.dtype).eps)
        rounding = 2 * eps * (jnp.abs(r) + jnp.abs(x))
        return (x.shape[self.axis] + 4) * eps * jnp.abs(p) + rounding + jnp.maximum(-p, 0)

    def gap(self, u, r, x):
        """As for every loss; an entropy at p ± e is off by e (1 + min(log 1/e, log 1/(p − e))) at most."""
        terms, sizes, _ = super().gap(u, r, x)
        error, tiny = self.dual_error(r, x), jnp.finfo(x.dtype).tiny
        slope = 1 - jnp.log(jnp.maximum(jnp.maximum(error, r + x - error), tiny))
        error = error * (jnp.maximum(slope, 1) + jnp.abs(u))
        return terms, sizes, jnp.sum(error, axis=self.axis, keepdims=True)

    def derivative_error(self, error):
        """The largest error among the classes, halved: |∂p_c| ≤ 2 p_c (1 − p_c) max |e|."""
        return jnp.broadcast_to(0.5 * jnp.max(error, axis=self.axis, keepdims=True), error.shape)

    def _round_off(self, x: Array) -> float:
        return 8 * x.shape[self.axis] * float(jnp.finfo(x.dtype).eps)


@value_object
class Scaled(Loss):
    """c ℓ(u, x), also written c * loss: ℓ* becomes c ℓ*(r/c, x).

    Args:
      loss: ℓ.
      factor: c > 0, traced.
    """

    loss: Loss
    factor: Scalar

    def __post_init__(self):
        if not isinstance(self.loss, Loss):
            _checks.fail("loss of Scaled", "a Loss", repr(self.loss))
        _checks.positive("factor of Scaled", self.factor)
        _checks.rank("factor of Scaled", self.factor, 0)
        object.__setattr__(self, "factor", real(self.factor))

    @property
    def smoothness(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """c L_ℓ."""
        return self.factor * self.loss.smoothness

    @property
    def strong_convexity(self) -> Any:  # pyright: ignore
        """c m."""
        modulus = self.loss.strong_convexity
        return (
            modulus if isinstance(modulus, int | float) and modulus == 0 else self.factor * modulus
        )

    @property
    def axis(self) -> int:
        """The axis that ℓ couples, -1 for none."""
        return getattr(self.loss, "axis", -1)

    def value(self, u, x):
        """c ℓ(u, x)."""
        return self._factor(x) * self.loss.value(u, x)

    def derivative(self, u, x):
        """c ∂ℓ/∂u."""
        return self._factor(x) * self.loss.derivative(u, x)

    def conjugate(self, r, x):
        """c ℓ*(r/c, x)."""
        return self._factor(x) * self.loss.conjugate(r / self._factor(x), x)

    def dual_projection(self, r, x):
        """c P(r/c), P the projection to dom ℓ*."""
        return self._factor(x) * self.loss.dual_projection(r / self._factor(x), x)

    def dual_error(self, r, x):
        """That of r/c, times c, and the rounding of c (r/c)."""
        own = self._factor(x) * self.loss.dual_error(r / self._factor(x), x)
        return own + 2 * float(jnp.finfo(x.dtype).eps) * jnp.abs(r)

    def derivative_error(self, error):
        """That of ℓ, times c."""
        return self._factor(error) * self.loss.derivative_error(error)

    def gap(self, u, r, x):
        """That of ℓ at r/c, times c; r/c is rounded."""
        dual = r / self._factor(x)
        terms, sizes, own = self.loss.gap(u, dual, x)
        c = self._factor(x)
        return c * terms, c * sizes, c * own

    def _factor(self, like: Array) -> Array:
        return jnp.asarray(self.factor, like.dtype)


def _x_log_x(x: Array) -> Array:
    return jnp.where(x > 0, x * jnp.log(jnp.where(x > 0, x, 1)), 0)
