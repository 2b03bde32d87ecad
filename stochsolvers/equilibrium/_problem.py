"""The problem of one equilibrium layer."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from stochsolvers import _checks
from stochsolvers._typing import Array, Scalar, at_least_float32, value_object
from stochsolvers.equilibrium import _round_off
from stochsolvers.equilibrium._certifier import (
    EquilibriumCertifier,
    as_known,
    constants_of,
    over,
)
from stochsolvers.equilibrium._hidden import HiddenProblem
from stochsolvers.linear_maps import LinearMap
from stochsolvers.lipschitz import operator_bracket
from stochsolvers.problems import FixedPointProblem
from stochsolvers.problems._products import Products
from stochsolvers.prox import NonNegative, Prior


@value_object
class EquilibriumProblem(FixedPointProblem):
    r"""The equilibrium z = h(z) of one layer, for a batch of drives.

        h(z) = Wᵀσ(W z + c),     σ = prox_g,     c = U x + b the drive

    h is the gradient of z ↦ S(W z + c), S(v) = <v, p> − ½||p||² − g(p) at p = σ(v) the potential of σ, so
    that equilibria are the minimisers of

        G(z) = ½||z||² − S(W z + c),     ∇G(z) = z − h(z).

    G is convex for ω = ||W|| ≤ 1. For ω < 1 it is (1 − ω²)-strongly convex and has one minimiser; at ω = 1
    there may be none, as of z = max(z + 1, 0).

    Args:
      linear_map: W, from z to the hidden units: a `Dense`, a `Conv` or any other `LinearMap`. `normalized`
        makes one with ω < 1.
      drive: c, shape (*batch, *W.out_shape).
      prior: g, a member of `stochsolvers.prox`, whose prox at step 1 is the activation; ReLU by default.

    Arrays below float32 are computed with in float32.

    Raises:
      ValueError: at trace time, for shapes and dtypes that do not fit, and factors that are no maps and
        priors.

    References:
      Xie et al. 2023, section 3; Moreau 1965 (potentials of proximal operators).
    """

    linear_map: LinearMap
    drive: Array
    _: dataclasses.KW_ONLY
    prior: Prior = NonNegative()

    symmetric: ClassVar[bool] = True

    def __post_init__(self):
        for name, kind in (("linear_map", LinearMap), ("prior", Prior)):
            factor = getattr(self, name)
            wanted = f"an instance of {kind.__name__}"
            _checks.instance(f"{name} of EquilibriumProblem", factor, kind, wanted)
        _checks.floating("drive of EquilibriumProblem", self.drive)
        _checks.trailing("drive of EquilibriumProblem", self.drive, self.linear_map.out_shape)
        dtype = at_least_float32(jnp.result_type(self.drive), self.linear_map.dtype)
        object.__setattr__(self, "drive", jnp.asarray(self.drive, dtype))
        object.__setattr__(self, "linear_map", self.linear_map.astype(dtype))
        check_axes(self.prior, len(self.linear_map.out_shape), bool(self.batch_shape))

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Leading axes of the drive: one problem for each of their entries."""
        return self.drive.shape[: self.drive.ndim - len(self.linear_map.out_shape)]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the variable z, (*batch, *W.in_shape)."""
        return (*self.batch_shape, *self.linear_map.in_shape)

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the variable z."""
        return self.drive.dtype

    def hidden_units(self, z: Array) -> Array:
        """s = σ(W z + c), shaped as the drive."""
        return self.prior.prox(self._point(z), 1.0)

    def layer(self, z: Array) -> Array:
        """h(z) = Wᵀσ(W z + c), shaped as z."""
        return self.linear_map.adjoint(self.hidden_units(z))

    def objective(self, z: Array) -> Array:
        """G(z) = ½||z||² − S(W z + c) for each example, shape (*batch,); finite for every z."""
        v = self._point(z)
        p = self.prior.prox(v, 1.0)
        potential = self.sum((v - 0.5 * p) * p) - self.per_example(self.prior.value)(p)
        half = 0.5 * self.sum(self._variable(z) ** 2)
        return jnp.where(jnp.isinf(half), half, half - potential)  # which overflows with it

    def certificate(self, z: Array, *, squared_norm: Scalar | None = None) -> Array:
        r"""A certified optimality gap: G(z) − min G ≤ certificate(z), for each example.

            G(z) − min G ≤ ||z − h(z)||² / (2 (1 − ω²)),

        ω² the upper end of `operator_bracket`. +∞ where that is not below 1. The round-off of h is added to
        ||z − h(z)||: the value is never below the gap of the arrays as they are.

        Args:
          z: any point, shape (*batch, *W.in_shape).
          squared_norm: an upper bound on ||W||², where it is known. With a number below it nothing is
            promised.

        Returns:
          shape (*batch,), in units of the objective. Not differentiable.
        """
        return self.certifier(squared_norm=squared_norm)(z)

    def distance(self, z: Array, *, squared_norm: Scalar | None = None) -> Array:
        r"""A certified distance: ||z − z*||₂ ≤ distance(z), for each example.

            ||z − z*|| ≤ ||z − h(z)|| / (1 − ω²),

        with ω and round-off as in `certificate`, whose arguments it has.

        Returns:
          shape (*batch,), in units of z. Not differentiable.
        """
        return self.certifier(squared_norm=squared_norm).distance(z)

    def certifier(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, *, squared_norm: Scalar | None = None
    ) -> EquilibriumCertifier:
        """z ↦ certificate(z) and, as its `distance`, distance(z), with ||W||² computed once."""
        known = as_known(squared_norm, self.dtype)
        return EquilibriumCertifier(lax.stop_gradient(self), constants_of(_constants, self, known))

    def hidden(self) -> HiddenProblem:
        r"""The same equilibrium as a composite problem in the hidden units s = σ(W z + c), z = Wᵀs.

            minimise_s  ½||s||² − ½||Wᵀs||² − <c, s> + g(s).

        Its proximal gradient step of size 1 is s ← σ(W Wᵀs + c), h seen from the hidden units: `ProxGD`,
        also with momentum, and its implicit derivative solve it as they are.
        """
        return HiddenProblem(self)

    def largest_entries(self) -> Array:
        """The largest entry of each drive."""
        axes = tuple(range(len(self.batch_shape), self.drive.ndim))
        return jnp.max(jnp.abs(self.drive), axis=axes, initial=0)

    def _evaluate(self, products: Products, z: Array) -> _round_off.Evaluation:
        return _round_off.equilibrium_layer(products, self.drive, self.prior, z)

    def _contraction(self, products: Products) -> Array:
        return products.constant

    def _gap(self, products: Products, step: Array) -> Array:
        slack = 1 - products.constant * (1 + 16 * float(jnp.finfo(step.dtype).eps))
        return over(0.5 * step**2, slack)

    def _point(self, z: Array) -> Array:
        return self.linear_map(self._variable(z)) + self.drive


def products_of(problem: EquilibriumProblem, squared_norm: Array | None) -> Products:
    """Products with W that know their round-off and a bound on ||W||²."""
    known = squared_norm
    if known is None:
        known = operator_bracket(problem.linear_map).upper
    return Products.of(problem.linear_map, len(problem.batch_shape), known)


def check_axes(prior: Prior, event_ndim: int, has_batch: bool) -> None:
    """Require that a prior names axes of an activation, and has no weights for single examples."""
    for leaf in jax.tree.leaves(prior):
        if jnp.ndim(leaf) > event_ndim:
            wanted = f"at most {event_ndim} axes, none of them a batch axis"
            _checks.fail(f"weights of {type(prior).__name__}", wanted, jnp.shape(leaf))
    named = getattr(prior, "axes", getattr(prior, "axis", ()))
    for axis in (named,) if isinstance(named, int) else named:
        if not -event_ndim <= axis < (0 if has_batch else event_ndim):
            wanted = f"an axis of the hidden units counted from the end: {-event_ndim}..-1"
            _checks.fail(f"axis of {type(prior).__name__}", wanted, axis)


_constants = jax.jit(products_of)
