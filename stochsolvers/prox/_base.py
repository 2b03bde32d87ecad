"""The meaning, checks and dtypes of every prior; its formulas are its subclass's."""

from abc import ABC, abstractmethod
from typing import ClassVar

import jax.numpy as jnp
from jax.typing import ArrayLike

from stochsolvers import _checks
from stochsolvers._typing import Array, real, value_object


class Prior(ABC):
    r"""A closed convex function g with a computable proximal operator.

    Subclasses give formulas; this class gives them their meaning, checks and dtypes. Weights may be
    arrays that broadcast against the argument, for the priors on groups or matrices with size 1 in
    the axes of the group or matrix. A weight and a step are cast to the argument's dtype.

    A prior of your own is a subclass under `stochsolvers.value_object` that defines `_value`, `_prox`,
    `_conjugate` and `_dual_projection`, the formulas of the public methods of those names.
    """

    separable: ClassVar[bool] = True
    """Whether g(u) is a sum of functions of single entries of u."""

    def value(self, u: Array) -> Array:
        """g(u), a scalar summed over the whole array; +∞ outside the domain."""
        return self._value(working("u", u))

    def prox(self, v: Array, step_size: ArrayLike) -> Array:
        r"""argmin_u ½||u − v||² + η g(u).

        Args:
          v: any shape, leading axes are a batch.
          step_size: η > 0, traced, a number or an array that broadcasts as the weights do.

        Raises:
          ValueError: at trace time, for dtypes and shapes that do not fit, or a concrete η ≤ 0.
        """
        _checks.positive("step_size", step_size)
        v = working("v", v)
        return self._prox(v, self._weight("step_size", step_size, v))

    def conjugate(self, w: Array) -> Array:
        """g*(w) = sup_u <w, u> − g(u), a scalar summed over the array; +∞ outside its domain.

        Where the domain is a ball of norms or eigenvalues, membership is decided up to round-off.
        """
        return self._conjugate(working("w", w))

    def dual_projection(self, w: Array, margin: ArrayLike = 0.0) -> Array:
        r"""argmin_z ||z − w||² over the z in dom g* that are `margin` away from its boundary.

        Args:
          w: any shape, leading axes are a batch.
          margin: absolute, ≥ 0; broadcasts as the weights do. A ball shrinks at most to 0.
        """
        _checks.non_negative("margin", margin)
        w = working("w", w)
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


def working(what: str, array: ArrayLike) -> Array:
    """The array in float32 or wider."""
    _checks.floating(what, array)
    array = jnp.asarray(array)
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def finite_where(inside: Array, value: ArrayLike, like: Array) -> Array:
    """`value` if all of `inside` holds, else +∞."""
    return jnp.where(jnp.all(inside), jnp.asarray(value, like.dtype), jnp.inf)


@value_object
class Weighted(Prior):
    """A prior scaled by γ > 0."""

    gamma: ArrayLike = 1.0

    def __post_init__(self):
        _checks.positive("gamma", self.gamma)
        object.__setattr__(self, "gamma", real(self.gamma))

    def _gamma(self, like):
        return self._weight("gamma", self.gamma, like)
