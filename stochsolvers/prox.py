r"""Priors g and their proximal operators: the activation functions of a layer read as a solver.

    prox_{ηg}(v) = argmin_u ½||u − v||² + η g(u)          (Bibi et al. 2019, table 1)

| activation                   | prior g(u)                | class                         |
|------------------------------|---------------------------|-------------------------------|
| identity                     | 0                         | `Zero()`                      |
| ReLU                         | 0 if u ≥ 0, else ∞        | `NonNegative()`               |
| leaky ReLU, slope α, at η = 1| (γ/2) Σ max(−u − s, 0)²   | `SquaredHinge(1/α − 1)`       |
| ≈ softplus (within 0.31)     | −γ Σ log u                | `LogBarrier(1.0)`             |
| ≈ tanh (within 0.06)         | −γ Σ log(1 − u²)          | `SymmetricLogBarrier(0.1)`    |
| ≈ sigmoid(v − ½), within 0.05| −γ Σ log u + log(1 − u)   | `IntervalLogBarrier(0.25)`    |
| hard tanh, ReLU6             | 0 if lo ≤ u ≤ hi, else ∞  | `Box(-1, 1)`, `Box(0, 6)`     |
| soft threshold               | γ ||u||₁                  | `L1(gamma)`                   |
| group lasso                  | γ Σ_G ||u_G||₂            | `GroupL2(gamma, axis)`        |
| low rank                     | γ ||U||_*                 | `NuclearNorm(gamma, axes)`    |
| positive semi-definite       | 0 if U = Uᵀ ⪰ 0, else ∞   | `PositiveSemidefinite(axes)`  |

A solver with step η = 1/L applies prox_{g/L}. Indicators (ReLU, box, semi-definite) do not notice;
every other activation changes its shape with η, for instance the leaky slope is 1/(1 + ηγ).

Errata: in table 1 and proposition 3 the branch below the threshold must read (v − γλ)/(1 + γ), as
continuity at v = −λ shows; appendix C is written for γ = 1 only.

Values, derivatives of first order (and, for the barriers, of any order) are finite for |v| up to
1e6 in float32 and ηγ from 1e-8 to 1e3. float16 and bfloat16 are computed and returned in float32.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from stochsolvers import _checks, _cubic
from stochsolvers._typing import Array, static_field, value_object


class Prior(ABC):
    r"""A closed convex function g with a computable proximal operator.

    Subclasses give formulas; this class gives them their meaning, checks and dtypes. Weights may be
    arrays that broadcast against the argument, for the priors on groups or matrices with size 1 in
    the axes of the group or matrix. A weight and a step are cast to the argument's dtype.
    """

    separable: ClassVar[bool] = True
    """Whether g(u) is a sum of functions of single entries of u."""

    def value(self, u: Array) -> Array:
        """g(u), a scalar summed over the whole array; +∞ outside the domain."""
        return self._value(_working("u", u))

    def prox(self, v: Array, step_size: ArrayLike) -> Array:
        r"""argmin_u ½||u − v||² + η g(u).

        Args:
          v: any shape, leading axes are a batch.
          step_size: η > 0, traced, a number or an array that broadcasts as the weights do.

        Raises:
          ValueError: at trace time, for dtypes and shapes that do not fit, or a concrete η ≤ 0.
        """
        _checks.positive("step_size", step_size)
        v = _working("v", v)
        return self._prox(v, self._weight("step_size", step_size, v))

    def conjugate(self, w: Array) -> Array:
        """g*(w) = sup_u <w, u> − g(u), a scalar summed over the array; +∞ outside its domain.

        Where the domain is a ball of norms or eigenvalues, membership is decided up to round-off.
        """
        return self._conjugate(_working("w", w))

    def dual_projection(self, w: Array, margin: ArrayLike = 0.0) -> Array:
        r"""argmin_z ||z − w||² over the z in dom g* that are `margin` away from its boundary.

        Args:
          w: any shape, leading axes are a batch.
          margin: absolute, ≥ 0; broadcasts as the weights do. A ball shrinks at most to 0.
        """
        _checks.non_negative("margin", margin)
        w = _working("w", w)
        return self._dual_projection(w, self._weight("margin", margin, w))

    def _weight(self, what: str, weight: ArrayLike, like: Array) -> Array:
        """A weight in the dtype of `like`, after a check that it broadcasts."""
        _checks.broadcastable(what, weight, self._weight_shape(like))
        return jnp.asarray(weight, like.dtype)

    def _weight_shape(self, like: Array) -> tuple[int, ...]:
        return like.shape

    @abstractmethod
    def _value(self, u: Array) -> Array: ...

    @abstractmethod
    def _prox(self, v: Array, step: Array) -> Array: ...

    @abstractmethod
    def _conjugate(self, w: Array) -> Array: ...

    @abstractmethod
    def _dual_projection(self, w: Array, margin: Array) -> Array: ...


def _working(what: str, array: ArrayLike) -> Array:
    """The array in float32 or wider."""
    _checks.floating(what, array)
    array = jnp.asarray(array)
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def _finite_where(inside: Array, value: ArrayLike, like: Array) -> Array:
    """`value` if all of `inside` holds, else +∞."""
    return jnp.where(jnp.all(inside), jnp.asarray(value, like.dtype), jnp.inf)


@value_object
class Zero(Prior):
    """g(u) = 0: prox(v) = v, the identity; g* is the indicator of {0}."""

    def _value(self, u):
        return jnp.zeros((), u.dtype)

    def _prox(self, v, step):
        return v

    def _conjugate(self, w):
        return _finite_where(w == 0, 0, w)

    def _dual_projection(self, w, margin):
        return jnp.zeros_like(w)


@value_object
class NonNegative(Prior):
    """g(u) = 0 if u ≥ 0, else ∞: prox(v) = max(v, 0), ReLU, also in its derivative 0 at v = 0."""

    def _value(self, u):
        return _finite_where(u >= 0, 0, u)

    def _prox(self, v, step):
        return jax.nn.relu(v)

    def _conjugate(self, w):
        return _finite_where(w <= 0, 0, w)

    def _dual_projection(self, w, margin):
        return jnp.minimum(w, -margin)


@value_object
class _Weighted(Prior):
    """A prior scaled by γ > 0."""

    gamma: ArrayLike = 1.0

    def __post_init__(self):
        _checks.positive("gamma", self.gamma)

    def _gamma(self, like):
        return self._weight("gamma", self.gamma, like)


@value_object
class SquaredHinge(_Weighted):
    r"""g(u) = (γ/2) Σ max(−u − s, 0)²: prox(v) = v if v ≥ −s, else (v − ηγs)/(1 + ηγ).

    The leaky ReLU of slope 1/(1 + ηγ) (Bibi et al. 2019, prop. 3, with the sign of γs corrected).
    g*(w) = Σ w²/(2γ) − s w for w ≤ 0.

    Args:
      gamma: γ > 0.
      shift: s.
    """

    shift: ArrayLike = 0.0

    def _parameters(self, like):
        return self._gamma(like), self._weight("shift", self.shift, like)

    def _value(self, u):
        gamma, shift = self._parameters(u)
        return jnp.sum(0.5 * gamma * jax.nn.relu(-u - shift) ** 2)

    def _prox(self, v, step):
        gamma, shift = self._parameters(v)
        weight = step * gamma
        return jnp.where(v >= -shift, v, (v - weight * shift) / (1 + weight))

    def _conjugate(self, w):
        gamma, shift = self._parameters(w)
        return _finite_where(w <= 0, jnp.sum(w * (w / (2 * gamma) - shift)), w)

    def _dual_projection(self, w, margin):
        return jnp.minimum(w, -margin)


def leaky_relu_prior(negative_slope: ArrayLike = 0.01) -> SquaredHinge:
    """The prior whose prox at η = 1 is the leaky ReLU of slope 0 < α < 1: γ = 1/α − 1."""
    _checks.positive("negative_slope", negative_slope)
    _checks.positive("1 - negative_slope", 1 - negative_slope)  # pyright: ignore[reportOperatorIssue]
    return SquaredHinge(1 / negative_slope - 1)  # pyright: ignore[reportOperatorIssue]


@value_object
class _Barrier(_Weighted):
    """A log barrier, whose conjugate is finite everywhere unless a subclass says otherwise."""

    def _dual_projection(self, w, margin):
        return w


@value_object
class LogBarrier(_Barrier):
    r"""g(u) = −γ Σ log u, u > 0: prox(v) = v/2 + √(v²/4 + ηγ), close to softplus.

    (Bibi et al. 2019, prop. 4.) g*(w) = γ Σ (log(−γ/w) − 1) for w < 0.

    Args:
      gamma: γ > 0.
    """

    def _value(self, u):
        logs = jnp.log(jnp.where(u > 0, u, 1))
        return _finite_where(u > 0, -jnp.sum(self._gamma(u) * logs), u)

    def _prox(self, v, step):
        return _cubic.positive_root(v, step * self._gamma(v))

    def _conjugate(self, w):
        gamma = self._gamma(w)
        ratio = gamma / jnp.where(w < 0, -w, 1)
        return _finite_where(w < 0, jnp.sum(gamma * (jnp.log(ratio) - 1)), w)

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

    def _value(self, u):
        inside = jnp.abs(u) < 1
        safe = jnp.where(inside, u, 0)
        logs = jnp.log1p(safe) + jnp.log1p(-safe)
        return _finite_where(inside, -jnp.sum(self._gamma(u) * logs), u)

    def _prox(self, v, step):
        return _cubic.symmetric_root(v, step * self._gamma(v))

    def _conjugate(self, w):
        return jnp.sum(_symmetric_conjugate(w, self._gamma(w)))


def _symmetric_conjugate(w: Array, gamma: Array) -> Array:
    q = w * w / (gamma + jnp.sqrt(gamma * gamma + w * w))
    return q - gamma * jnp.log1p(q / (2 * gamma))


@value_object
class IntervalLogBarrier(_Barrier):
    r"""g(u) = −γ Σ log u + log(1 − u), 0 < u < 1: prox(v) is the root of a cubic, like a sigmoid.

        u − v − ηγ/u + ηγ/(1 − u) = 0,  0 < u < 1         (Bibi et al. 2019, appendix C)

    It is the symmetric barrier of weight 4ηγ in 2u − 1; v = ½ maps to ½, with slope 1/(1 + 8ηγ).

    Args:
      gamma: γ > 0.
    """

    def _value(self, u):
        inside = (u > 0) & (u < 1)
        safe = jnp.where(inside, u, 0.5)
        logs = jnp.log(safe) + jnp.log1p(-safe)
        return _finite_where(inside, -jnp.sum(self._gamma(u) * logs), u)

    def _prox(self, v, step):
        return _cubic.interval_root(v, step * self._gamma(v))

    def _conjugate(self, w):
        gamma = self._gamma(w)
        return jnp.sum(0.5 * w + _symmetric_conjugate(0.5 * w, gamma) - 2 * gamma * jnp.log(2))


@value_object
class L1(_Weighted):
    """g(u) = γ ||u||₁: prox(v) = sign(v) max(|v| − ηγ, 0); g* is the indicator of |w| ≤ γ.

    Args:
      gamma: γ > 0.
    """

    def _value(self, u):
        return jnp.sum(self._gamma(u) * jnp.abs(u))

    def _prox(self, v, step):
        weight = step * self._gamma(v)
        return jax.nn.relu(v - weight) - jax.nn.relu(-v - weight)

    def _conjugate(self, w):
        return _finite_where(jnp.abs(w) <= self._gamma(w), 0, w)

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

    def _bounds(self, like):
        return self._weight("lo", self.lo, like), self._weight("hi", self.hi, like)

    def _value(self, u):
        lo, hi = self._bounds(u)
        return _finite_where((lo <= u) & (u <= hi), 0, u)

    def _prox(self, v, step):
        lo, hi = self._bounds(v)
        return jnp.where(v < lo, lo, jnp.where(v > hi, hi, v))

    def _conjugate(self, w):
        lo, hi = self._bounds(w)
        below, above = jnp.isinf(lo), jnp.isinf(hi)
        support = jnp.where(above, 0, hi) * jax.nn.relu(w) - jnp.where(below, 0, lo) * jax.nn.relu(
            -w
        )
        return _finite_where(~((above & (w > 0)) | (below & (w < 0))), jnp.sum(support), w)

    def _dual_projection(self, w, margin):
        lo, hi = self._bounds(w)
        below, above = jnp.isinf(lo), jnp.isinf(hi)
        one_sided = jnp.where(above, jnp.minimum(w, -margin), jnp.maximum(w, margin))
        return jnp.where(above & below, 0, jnp.where(above | below, one_sided, w))


@value_object
class GroupL2(_Weighted):
    r"""g(u) = γ Σ_G ||u_G||₂: prox(v)_G = max(1 − ηγ/||v_G||₂, 0) v_G, the block soft threshold.

    g* is the indicator of ||w_G||₂ ≤ γ.

    Args:
      gamma: γ > 0; an array has size 1 in the axes of a group.
      axis: the axis, or axes, along which the entries of one group lie.
    """

    axis: int | tuple[int, ...] = static_field(default=-1)
    separable: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        axes = self.axis if isinstance(self.axis, tuple) else (self.axis,)
        for axis in axes:
            _checks.count("axis", axis, minimum=-(2**31))

    def _weight_shape(self, like):
        return _reduced_shape(like, self.axis)

    def _norms(self, u):
        """||u_G||₂ with kept axes; u is scaled, so that no square overflows or underflows."""
        axes = _canonical_axes(self.axis, u.ndim)
        scale = jax.lax.stop_gradient(jnp.max(jnp.abs(u), axes, keepdims=True, initial=0))
        scale = jnp.where(scale == 0, 1, scale)
        squares = jnp.sum((u / scale) ** 2, axes, keepdims=True)
        return jnp.where(squares == 0, 0, scale * jnp.sqrt(jnp.where(squares == 0, 1, squares)))

    def _value(self, u):
        return jnp.sum(self._gamma(u) * self._norms(u))

    def _prox(self, v, step):
        weight, norms = step * self._gamma(v), self._norms(v)
        zero = norms <= weight
        return jnp.where(zero, 0, v * ((norms - weight) / jnp.where(zero, 1, norms)))

    def _conjugate(self, w):
        slack = 1 + 8 * jnp.finfo(w.dtype).eps
        return _finite_where(self._norms(w) <= slack * self._gamma(w), 0, w)

    def _dual_projection(self, w, margin):
        radius, norms = jax.nn.relu(self._gamma(w) - margin), self._norms(w)
        outside = norms > radius
        return jnp.where(outside, w * (radius / jnp.where(outside, norms, 1)), w)


def _canonical_axes(axes: int | tuple[int, ...], ndim: int) -> tuple[int, ...]:
    """Axes counted from the front, all different and within the array."""
    axes = axes if isinstance(axes, tuple) else (axes,)
    front = tuple(axis + ndim if axis < 0 else axis for axis in axes)
    if len(set(front)) != len(front) or not all(0 <= axis < ndim for axis in front):
        _checks.fail("axes", f"different axes of an array with {ndim} axes", axes)
    return front


def _reduced_shape(like: Array, axes: int | tuple[int, ...]) -> tuple[int, ...]:
    """The shape with 1 in the named axes."""
    front = _canonical_axes(axes, like.ndim)
    return tuple(1 if i in front else n for i, n in enumerate(like.shape))


def _pair_of_axes(axes: tuple[int, int]) -> tuple[int, int]:
    pair = tuple(axes)
    if len(pair) != 2 or pair[0] == pair[1]:
        _checks.fail("axes", "two different integers", axes)
    return _checks.count("axes", pair[0], minimum=-99), _checks.count("axes", pair[1], minimum=-99)


def _round_off(like: Array, axes: tuple[int, int]) -> float:
    """Relative round-off of a spectrum."""
    sizes = [like.shape[axis] for axis in axes]
    return 8 * max(*sizes, 1) * float(jnp.finfo(like.dtype).eps)


@value_object
class NuclearNorm(_Weighted):
    r"""g(U) = γ ||U||_*, the sum of singular values: prox(V) = P max(Σ − ηγ, 0) Qᵀ for V = PΣQᵀ.

    g* is the indicator of spectral norm ≤ γ. The derivative of prox is finite at repeated and
    vanishing singular values (Daleckii–Krein formula); `dual_projection`'s there is not.

    Args:
      gamma: γ > 0; an array has size 1 in the axes of a matrix.
      axes: the two axes of a matrix.
    """

    axes: tuple[int, int] = static_field(default=(-2, -1))
    separable: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "axes", _pair_of_axes(self.axes))

    def _weight_shape(self, like):
        return _reduced_shape(like, self.axes)

    def _matrices(self, array):
        """Matrices on the last two axes; weights of fewer axes broadcast first."""
        return jnp.moveaxis(array, self.axes, (-2, -1))

    def _threshold(self, weight, like):
        """A weight for each matrix, aligned with its vector of singular values."""
        return self._matrices(jnp.broadcast_to(weight, self._weight_shape(like)))[..., 0]

    def _singular_values(self, u):
        return jnp.linalg.svd(self._matrices(u), compute_uv=False)

    def _value(self, u):
        return jnp.sum(self._threshold(self._gamma(u), u) * self._singular_values(u))

    def _prox(self, v, step):
        threshold = self._threshold(step * self._gamma(v), v)
        return jnp.moveaxis(_cubic.shrink(self._matrices(v), threshold), (-2, -1), self.axes)

    def _conjugate(self, w):
        radius = self._threshold(self._gamma(w), w) * (1 + _round_off(w, self.axes))
        return _finite_where(self._singular_values(w) <= radius, 0, w)

    def _dual_projection(self, w, margin):
        radius = self._threshold(jax.nn.relu(self._gamma(w) - margin), w)
        left, sigma, right = jnp.linalg.svd(self._matrices(w), full_matrices=False)
        clipped = _cubic.product(left * jnp.minimum(sigma, radius)[..., None, :], right)
        return jnp.moveaxis(clipped, (-2, -1), self.axes)


@value_object
class PositiveSemidefinite(Prior):
    r"""g(U) = 0 if U = Uᵀ ⪰ 0, else ∞: prox(V) = Q max(Λ, 0) Qᵀ for (V + Vᵀ)/2 = QΛQᵀ.

    g* is the indicator of (W + Wᵀ)/2 ⪯ 0; the skew part is free. The derivative of prox is finite
    at repeated and vanishing eigenvalues (Daleckii–Krein formula). `value` accepts round-off.

    Args:
      axes: the two axes of a square matrix.
    """

    axes: tuple[int, int] = static_field(default=(-2, -1))
    separable: ClassVar[bool] = False

    def __post_init__(self):
        object.__setattr__(self, "axes", _pair_of_axes(self.axes))

    def _weight_shape(self, like):
        return _reduced_shape(like, self.axes)

    def _matrices(self, array):
        _canonical_axes(self.axes, array.ndim)
        matrices = jnp.moveaxis(array, self.axes, (-2, -1))
        if matrices.shape[-2] != matrices.shape[-1]:
            _checks.fail(f"axes {self.axes}", "a square matrix", matrices.shape[-2:])
        return matrices

    def _semidefinite(self, matrices, sign):
        """Whether sign · (symmetric part) ⪰ 0, up to round-off."""
        values = sign * jnp.linalg.eigvalsh(_cubic.symmetric(matrices), symmetrize_input=False)
        scale = jnp.max(jnp.abs(values), -1, keepdims=True, initial=0)
        return values >= -_round_off(matrices, (-2, -1)) * scale

    def _value(self, u):
        u = self._matrices(u)
        symmetric = u == jnp.swapaxes(u, -1, -2)
        return _finite_where(jnp.all(symmetric) & jnp.all(self._semidefinite(u, 1)), 0, u)

    def _prox(self, v, step):
        return jnp.moveaxis(
            _cubic.clip_eigenvalues(_cubic.symmetric(self._matrices(v))), (-2, -1), self.axes
        )

    def _conjugate(self, w):
        return _finite_where(self._semidefinite(self._matrices(w), -1), 0, w)

    def _dual_projection(self, w, margin):
        w, margin = self._matrices(w), jnp.broadcast_to(margin, self._weight_shape(w))
        symmetric = _cubic.symmetric(w)
        values, vectors = jnp.linalg.eigh(symmetric, symmetrize_input=False)
        values = jnp.minimum(values, -self._matrices(margin)[..., 0])
        z = _cubic.product(vectors * values[..., None, :], jnp.swapaxes(vectors, -1, -2))
        return jnp.moveaxis(_cubic.symmetric(z) + (w - symmetric), (-2, -1), self.axes)
