"""The meaning, checks and dtypes of every prior; its formulas are its subclass's."""

import dataclasses
from abc import ABC, abstractmethod
from typing import ClassVar

import jax.numpy as jnp
from jax.typing import ArrayLike

from stochsolvers import _checks
from stochsolvers._typing import Array, at_least_float32, real, value_object


class Prior(ABC):
    r"""A closed convex function g with a computable proximal operator.

    Subclasses give formulas; this class gives them their meaning, checks and dtypes. Weights may be
    arrays that broadcast against the argument, for the priors on groups or matrices with size 1 in
    the axes of the group or matrix. A weight and a step are cast to the argument's dtype.

    A prior of your own is a subclass under `stochsolvers.value_object` that defines `_value(u)` and
    `_prox(v, step)`, the formulas of the public methods of those names. They get arrays in float32
    or wider, and a step in the dtype and with the shape of v. All solvers then work, and
    `LayerProblem.certificate` is finite where the smooth part is strongly convex, as with a ridge.
    Two more formulas make certificates finite without a ridge, and smaller with one:

    - `_conjugate(w)` gives the duality gap at dual points in the domain of g*. The default is +∞.
    - `_dual_projection(w, margin)` moves other dual points into the domain, for a g* that is infinite
      somewhere. The default returns w, which is right for a g* that is finite everywhere.

    A certificate that needs a missing formula is `inf`. Set `separable = False` if g(u) is not a sum
    of functions of single entries. Then, if g* is neither 0 nor ∞, a third formula makes certificates
    finite without a ridge: `_conjugate_rise(w, value, error)`. Two more methods have defaults that are right
    for most priors:

    - `_pre_activation(v, step)` is v + (1/η − 1)(v − u), u = prox_{ηg}(v). Return v if g is an indicator.
    - `_term_sizes(u, w)` tells certificates of terms that cancel in g or g*; see there.

    For a number c > 0, `c * prior` is the prior c g, with the prox prox_{ηc g}. c may be traced; for priors
    with a weight γ it may also be an array that broadcasts as γ does. An indicator is c times itself.
    """

    __array_ufunc__ = None  # a NumPy array times a prior is the prior's affair

    separable: ClassVar[bool] = True
    """Whether g(u) is a sum of functions of single entries of u."""

    def value(self, u: Array) -> Array:
        """g(u), a scalar summed over the whole array; +∞ outside the domain."""
        return self._value(as_float32_or_wider("u", u))

    def prox(self, v: Array, step_size: ArrayLike) -> Array:
        r"""argmin_u ½||u − v||² + η g(u).

        Args:
          v: any shape, leading axes are a batch.
          step_size: η > 0, traced, a number or an array that broadcasts as the weights do.

        Raises:
          ValueError: at trace time, for dtypes and shapes that do not fit, or a concrete η ≤ 0.
        """
        _checks.positive("step_size", step_size)
        v = as_float32_or_wider("v", v)
        return self._prox(v, self._weight("step_size", step_size, v))

    def pre_activation(self, v: Array, step_size: ArrayLike) -> Array:
        r"""The w with prox_g(w) = prox_{ηg}(v): the argument of the activation σ = prox_g in a step.

            w = v + (1/η − 1)(v − u),  u = prox_{ηg}(v),

        for (v − u)/η is a subgradient of g at u, and w = u + (v − u)/η. At η = 1, w = v. For an indicator
        w is v, the point before the projection, whatever η is.

        Args:
          v: any shape, leading axes are a batch.
          step_size: η > 0, as in `prox`.
        """
        _checks.positive("step_size", step_size)
        v = as_float32_or_wider("v", v)
        step = self._weight("step_size", step_size, v)
        return jnp.where(step == 1, v, self._pre_activation(v, step))

    def conjugate(self, w: Array) -> Array:
        """g*(w) = sup_u <w, u> − g(u), a scalar summed over the array; +∞ outside its domain.

        A prior without a formula for g* returns +∞ everywhere, the bound that always holds.
        Where the domain is a ball of norms or eigenvalues, membership is decided up to round-off.
        """
        return self._conjugate(as_float32_or_wider("w", w))

    def dual_projection(self, w: Array, margin: ArrayLike = 0.0) -> Array:
        r"""argmin_z ||z − w||² over the z in dom g* that are `margin` away from its boundary.

        A prior without a formula for it returns w.

        Args:
          w: any shape, leading axes are a batch.
          margin: absolute, ≥ 0; broadcasts as the weights do. A ball shrinks at most to 0.
        """
        _checks.non_negative("margin", margin)
        w = as_float32_or_wider("w", w)
        return self._dual_projection(w, self._weight("margin", margin, w))

    def __mul__(self, factor: ArrayLike) -> "Prior":
        if not _checks.is_real(factor):
            return NotImplemented
        _checks.positive("factor of a prior", factor)
        return self._times(real(factor))

    __rmul__ = __mul__

    def _times(self, factor: ArrayLike) -> "Prior":
        """The prior c g for c > 0; the prior itself for an indicator."""
        return Scaled(self, factor)

    def _weight(self, what: str, weight: ArrayLike, like: Array) -> Array:
        """A weight in the dtype of `like`, broadcast to `_weight_shape`."""
        shape = self._weight_shape(like)
        _checks.broadcastable(what, weight, shape)
        _checks.held_by(what, weight, like.dtype)
        return jnp.broadcast_to(jnp.asarray(weight, like.dtype), shape)

    def _weight_shape(self, like: Array) -> tuple[int, ...]:
        """The shape of the weights and steps of an argument."""
        return like.shape

    @abstractmethod
    def _value(self, u: Array) -> Array: ...

    @abstractmethod
    def _prox(self, v: Array, step: Array) -> Array: ...

    def _pre_activation(self, v: Array, step: Array) -> Array:
        return v + (1 / step - 1) * (v - self._prox(v, step))

    def _term_sizes(self, u: Array, w: Array) -> Array:
        """The sum of the sizes of all terms that g(u) and g*(w) add up, a scalar, to bound their round-off.

        Certificates add |g(u)| + |g*(w)| + Σ |u w| to it, so that 0 is right where no terms cancel.
        """
        return jnp.zeros((), u.dtype)

    def _conjugate(self, w: Array) -> Array:
        return jnp.full((), jnp.inf, w.dtype)

    def _dual_projection(self, w: Array, margin: Array) -> Array:
        return w

    @property
    def _moves_duals(self) -> bool:
        """Whether `_dual_projection` moves points at all: else no search for a dual point can gain."""
        return type(self)._dual_projection is not Prior._dual_projection

    def _conjugate_rise(self, w: Array, value: Array, error: Array) -> Array:
        r"""An upper bound on g*(w + e) − `value` for all |e| ≤ error, entry by entry, in the domain of g*.

        With the round-off of the computed `value` = g*(w), as far as it is no small multiple of that of
        |value|. Asked of priors that are not separable. It is at most Σ |e| max_u |u| over the domain of g.
        The default holds for indicators, whose g*(w) is homogeneous and 0 where it is finite.
        """
        return jnp.where(value == 0, 0, jnp.inf).astype(w.dtype)


def as_float32_or_wider(what: str, array: ArrayLike) -> Array:
    """A real floating-point array; float16 and bfloat16 become float32."""
    _checks.floating(what, array)
    array = jnp.asarray(array)
    return array.astype(at_least_float32(array.dtype))


def finite_where(inside: Array, value: ArrayLike, like: Array) -> Array:
    """`value` if all of `inside` holds, else +∞."""
    return jnp.where(jnp.all(inside), jnp.asarray(value, like.dtype), jnp.inf)


def product(x: ArrayLike, y: ArrayLike) -> ArrayLike:
    """The product x y of numbers, or of arrays that broadcast from their last axes."""
    rank = max(jnp.ndim(x), jnp.ndim(y))
    x, y = (jnp.expand_dims(a, range(rank - jnp.ndim(a))) if jnp.ndim(a) else a for a in (x, y))  # pyright: ignore
    return x * y  # pyright: ignore[reportOperatorIssue]


@value_object
class Weighted(Prior):
    """A prior scaled by γ ≥ 0; γ = 0 is the limit γ → 0.

    Attributes:
      gamma: γ.
    """

    gamma: ArrayLike = 1.0

    def __post_init__(self):
        _checks.non_negative("gamma", self.gamma)
        object.__setattr__(self, "gamma", real(self.gamma))

    def _times(self, factor):
        return dataclasses.replace(self, gamma=product(self.gamma, factor))

    def _gamma(self, like):
        return self._weight("gamma", self.gamma, like)


@value_object
class Scaled(Prior):
    r"""c g for a prior g and c > 0: prox_{η c g}, (c g)*(w) = c g*(w/c). It is what `c * prior` returns.

    Priors with a weight γ, and indicators, have a simpler equal of their own class, which `c * prior` is.

    Args:
      prior: g.
      factor: c > 0, a number, traced.
    """

    prior: Prior
    factor: ArrayLike = 1.0

    def __post_init__(self):
        if not isinstance(self.prior, Prior):
            _checks.fail("prior of Scaled", "a Prior", repr(self.prior))
        _checks.positive("factor of a prior", self.factor)
        if jnp.ndim(self.factor):
            name = type(self.prior).__name__
            wanted = f"a number for {name}, which has no weights of its own"
            _checks.fail("factor of a prior", wanted, f"shape {jnp.shape(self.factor)}")
        object.__setattr__(self, "factor", real(self.factor))

    @property
    def separable(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """That of g."""
        return self.prior.separable

    @property
    def axes(self) -> int | tuple[int, ...]:
        """The axes of a group or matrix of g, () if it names none."""
        return getattr(self.prior, "axes", getattr(self.prior, "axis", ()))

    def _times(self, factor):
        return Scaled(self.prior, product(self.factor, factor))

    def _weight_shape(self, like):
        return self.prior._weight_shape(like)

    def _factor(self, like):
        _checks.held_by("factor of a prior", self.factor, like.dtype)
        return jnp.asarray(self.factor, like.dtype)

    def _value(self, u):
        return self._factor(u) * self.prior._value(u)

    def _prox(self, v, step):
        return self.prior._prox(v, self._factor(v) * step)

    def _conjugate(self, w):
        factor = self._factor(w)
        return factor * self.prior._conjugate(w / factor)

    def _dual_projection(self, w, margin):
        factor = self._factor(w)
        scaled, margin = w / factor, margin / factor
        inner = self.prior._dual_projection(scaled, margin)
        if self.separable:  # c (w/c) may be rounded out of the domain: aim two floats inside
            margin = margin + 2 * float(jnp.finfo(w.dtype).eps) * jnp.abs(inner)
            inner = self.prior._dual_projection(scaled, margin)
        return factor * inner

    @property
    def _moves_duals(self):
        return self.prior._moves_duals

    def _conjugate_rise(self, w, value, error):
        factor = self._factor(w)
        return factor * self.prior._conjugate_rise(w / factor, value / factor, error / factor)

    def _pre_activation(self, v, step):
        factor = self._factor(v)
        u, inner = self._prox(v, step), self.prior._pre_activation(v, factor * step)
        return u + factor * (inner - u)

    def _term_sizes(self, u, w):
        factor = self._factor(u)
        return factor * self.prior._term_sizes(u, w / factor)
