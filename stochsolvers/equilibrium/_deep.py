"""Compositions of equilibrium layers, and priors of the equilibrium composed into them."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from stochsolvers import _checks
from stochsolvers._typing import Array, Scalar, static_field, value_object
from stochsolvers.equilibrium import _round_off
from stochsolvers.equilibrium._certifier import (
    EquilibriumCertifier,
    as_known,
    constants_of,
    over,
)
from stochsolvers.equilibrium._problem import EquilibriumProblem, products_of
from stochsolvers.problems import FixedPointProblem
from stochsolvers.prox import Prior


@value_object
class Regularized:
    r"""A prior R of the equilibrium, as a map that is composed into a `DeepProblem`.

        z ↦ prox_{ηR}(z)            of a `Prior`
        z ↦ z − η ∇R(z)             of a gradient, a function of z

    `DeepProblem([layer, Regularized(R, η)])` has the equilibria z = prox_{ηR}(h(z)): those of the layer,
    drawn to the minimisers of R.

    Args:
      prior_or_gradient: R as a `Prior`, or ∇R as a function from z to z, batch axes included. A function
        of your own is compiled once for each function object; arrays that derivatives should reach are
        fields of a value object that is called.
      step: η > 0, traced.
      contraction: κ, a Lipschitz constant of the map; of a prior 1 by default, of a gradient unknown (the
        certified distance is then +∞): max |1 − η λ| over the eigenvalues λ of ∇²R.

    References:
      Xie et al. 2023, section 3.4.
    """

    prior_or_gradient: Any
    step: Scalar
    contraction: Scalar | None = None

    def __post_init__(self):
        given = self.prior_or_gradient
        if isinstance(given, type) or not (isinstance(given, Prior) or callable(given)):
            wanted = "a Prior or a function, the gradient"
            _checks.fail("prior_or_gradient of Regularized", wanted, repr(self.prior_or_gradient))
        _checks.positive("step of Regularized", self.step)
        _checks.rank("step of Regularized", self.step, 0)
        if self.contraction is not None:
            _checks.non_negative("contraction of Regularized", self.contraction)
            _checks.rank("contraction of Regularized", self.contraction, 0)
        gradient = self.prior_or_gradient
        if jax.tree_util.all_leaves([gradient]):  # a plain function
            object.__setattr__(self, "prior_or_gradient", jax.tree_util.Partial(gradient))

    def __call__(self, z: Array) -> Array:
        """The map at z, whose leading axes are a batch."""
        step = jnp.asarray(self.step, z.dtype)
        if isinstance(self.prior_or_gradient, Prior):
            return self.prior_or_gradient.prox(z, step)
        return z - step * self.prior_or_gradient(z)

    def lipschitz_constant(self, dtype: Any) -> Array:
        """κ; +∞ where it is not known."""
        unknown = 1.0 if isinstance(self.prior_or_gradient, Prior) else jnp.inf
        return jnp.asarray(unknown if self.contraction is None else self.contraction, dtype)

    def evaluate(self, z: Array, batch_ndim: int) -> _round_off.Evaluation:
        """The value with its round-off; that of a gradient is taken to be 8 u of ||z|| + ||z′||."""
        if isinstance(self.prior_or_gradient, Prior):
            step = jnp.asarray(self.step, z.dtype)
            return _round_off.proximal_step(self.prior_or_gradient, z, step, batch_ndim)
        value, eps = self(z), float(jnp.finfo(z.dtype).eps)
        return _round_off.Evaluation(
            value, 8 * eps * _round_off.norm(jnp.abs(z) + jnp.abs(value), batch_ndim)
        )


@value_object
class DeepProblem(FixedPointProblem):
    r"""The equilibrium of a composition of layers, z = h_n ∘ … ∘ h_1(z).

    Plain with α = 1; averaged with α < 1, where (1 − α) I + α h_i takes the place of h_i. A `Regularized`
    among the layers is applied as it is.

    - The equilibria of averaged layers tend to argmin Σ_i G_i as α → 0, with an error O(α); an iteration
      then does the α-th part of a plain one.
    - Those of two plain layers minimise one objective that is convex for ω₁ω₂ ≤ 1, s_i the hidden units:

        Σ_i [g_i(s_i) + ½||s_i||² − <c_i, s_i>] − <W₁ᵀs₁, W₂ᵀs₂>

    - Π_i ((1 − α) + α ω_i²) is a Lipschitz constant of the composition; below 1 the equilibrium is unique.

    Args:
      layers: `EquilibriumProblem`s and `Regularized` maps, applied in this order, whose
        variables z have one shape.
      alpha: α in (0, 1]; traced, but for the number 1.

    Raises:
      ValueError: at trace time, for what is no such layer, shapes that differ, or an α outside (0, 1].

    References:
      Xie et al. 2023, section 3.3.
    """

    layers: tuple[EquilibriumProblem | Regularized, ...]
    alpha: Scalar = 1.0
    is_averaged: bool = static_field(init=False, default=False)
    """Whether α is anything but the number 1."""

    def __post_init__(self):
        plain = isinstance(self.alpha, int | float) and self.alpha == 1
        object.__setattr__(self, "is_averaged", not plain)
        layers = self.layers
        if not isinstance(layers, Sequence):
            _checks.fail("layers of DeepProblem", "a sequence of problems", type(layers).__name__)
        object.__setattr__(self, "layers", tuple(layers))
        for layer in self.layers:
            if not isinstance(layer, EquilibriumProblem | Regularized):
                wanted = "EquilibriumProblems and Regularized maps"
                _checks.fail("layers of DeepProblem", wanted, type(layer).__name__)
        if not self.equilibria:
            _checks.fail("layers of DeepProblem", "at least one EquilibriumProblem", "none")
        for layer in self.equilibria:
            if layer.shape != self.shape:
                _checks.fail("shape of z in the layers of DeepProblem", self.shape, layer.shape)
        _checks.rank("alpha of DeepProblem", self.alpha, 0)
        _checks.positive("alpha of DeepProblem", self.alpha, "a number in (0, 1]")
        _checks.at_most("alpha of DeepProblem", self.alpha, 1.0, "a weight of an average")

    @property
    def equilibria(self) -> tuple[EquilibriumProblem, ...]:
        """The equilibrium problems among the layers."""
        return tuple(layer for layer in self.layers if isinstance(layer, EquilibriumProblem))

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Leading axes of the drives: one problem for each of their entries."""
        return self.equilibria[0].batch_shape

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the variable z."""
        return self.equilibria[0].shape

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the variable z."""
        return jnp.result_type(*(layer.dtype for layer in self.equilibria))

    @property
    def has_objective(self) -> bool:
        """Whether it is two plain layers, whose equilibria minimise the joint objective."""
        return len(self.layers) == 2 and len(self.equilibria) == 2 and not self.is_averaged

    def layer(self, z: Array) -> Array:
        """The composition at z, shaped as z."""
        z = self._variable(z)
        for layer in self.layers:
            z = self._one(layer, z)
        return z

    def objective(self, z: Array) -> Array:
        r"""The joint objective of two plain layers at s₁ = σ₁(W₁z + c₁), s₂ = σ₂(W₂W₁ᵀs₁ + c₂).

        Returns:
          shape (*batch,).

        Raises:
          ValueError: at trace time, for other compositions, whose equilibria minimise no such objective.
        """
        first, second = self._two("objective")
        s = first.hidden_units(self._variable(z))
        y = first.linear_map.adjoint(s)
        t = second.hidden_units(y)
        product = self.sum(y * second.linear_map.adjoint(t))
        return _separate(first, s) + _separate(second, t) - product

    def certificate(self, z: Array, *, squared_norms: Sequence[Scalar] | None = None) -> Array:
        r"""A certified optimality gap of two plain layers: objective(z) − min ≤ certificate(z).

            ω₁² ||z − T(z)||² / (2 (1 − ω₁ω₂)),     T the composition

        for W₁(z − T(z)) is a subgradient in s₁ of an objective that is (1 − ω₁ω₂)-strongly convex, and s₂ is
        its minimiser for that s₁. +∞ where ω₁ω₂ is not below 1. Round-off is included.

        Args:
          z: any point, shaped as the variable.
          squared_norms: upper bounds on ||W_i||² for each equilibrium problem, where they are known.

        Raises:
          ValueError: at trace time, for other compositions; `distance` is for all of them.
        """
        self._two("certificate")
        return self.certifier(squared_norms=squared_norms)(z)

    def distance(self, z: Array, *, squared_norms: Sequence[Scalar] | None = None) -> Array:
        r"""A certified distance: ||z − z*||₂ ≤ distance(z), for each example.

            ||z − T(z)|| / (1 − Π_i ((1 − α) + α ω_i²)),     T the composition,

        with round-off, and +∞ where the product is not below 1. A `Regularized` map multiplies the product
        by its `contraction`.

        Args:
          z: any point, shaped as the variable.
          squared_norms: upper bounds on ||W_i||² for each equilibrium problem, where they are known.
        """
        return self.certifier(squared_norms=squared_norms).distance(z)

    def certifier(self, *, squared_norms: Sequence[Scalar] | None = None) -> EquilibriumCertifier:  # pyright: ignore[reportIncompatibleMethodOverride]
        """z ↦ certificate(z) and, as its `distance`, distance(z), with the norms computed once."""
        count = len(self.equilibria)
        given: Sequence[Any] = [None] * count if squared_norms is None else squared_norms
        if len(given) != count:
            _checks.fail("squared_norms of DeepProblem", f"{count} numbers", len(given))
        known = tuple(as_known(number, self.dtype) for number in given)
        constants = constants_of(_constants, self.equilibria, known)
        return EquilibriumCertifier(lax.stop_gradient(self), constants)

    def largest_entries(self) -> Array:
        """The largest entry of each example's drives."""
        return functools.reduce(jnp.maximum, [one.largest_entries() for one in self.equilibria])

    def _one(self, layer: EquilibriumProblem | Regularized, z: Array) -> Array:
        if isinstance(layer, Regularized):
            return layer(z)
        return self._average(z, layer.layer(z))

    def _average(self, z: Array, moved: Array) -> Array:
        if not self.is_averaged:
            return moved
        alpha = jnp.asarray(self.alpha, z.dtype)
        return (1 - alpha) * z + alpha * moved

    def _two(self, what: str) -> tuple[EquilibriumProblem, EquilibriumProblem]:
        if not self.has_objective:
            kinds = ", ".join(type(layer).__name__ for layer in self.layers)
            got = f"{'averaged ' * self.is_averaged}{kinds}"
            _checks.fail(f"{what} of DeepProblem", "two plain EquilibriumProblems", got)
        first, second = self.equilibria
        return first, second

    def _evaluate(self, constants: Any, z: Array) -> _round_off.Evaluation:
        products, ndim = iter(constants), len(self.batch_shape)
        error, eps = jnp.zeros(self.batch_shape, z.dtype), float(jnp.finfo(z.dtype).eps)
        for layer in self.layers:
            if isinstance(layer, Regularized):
                value, own = layer.evaluate(z, ndim)
                # inf · 0 is no number
                known = jnp.where(error > 0, layer.lipschitz_constant(z.dtype), 0)
                z, error = value, known * error + own
                continue
            norms = next(products)
            value, own = layer._evaluate(norms, z)
            before, z = z, self._average(z, value)
            spread = norms.constant
            if self.is_averaged:
                alpha = jnp.asarray(self.alpha, z.dtype)
                sizes = jnp.abs(before) + jnp.abs(value)
                own = alpha * own + 4 * eps * _round_off.norm(sizes, ndim)
                spread = 1 - alpha + alpha * spread
            error = 1.01 * spread * error + own
        return _round_off.Evaluation(z, error)

    def _contraction(self, constants: Any) -> Array:
        """Π_i ((1 − α) + α ω_i²) κ_i."""
        alpha, product = jnp.asarray(self.alpha, self.dtype), jnp.ones((), self.dtype)
        few = 1 + 8 * float(jnp.finfo(self.dtype).eps)
        for products in constants:
            product = few * product * (1 - alpha + alpha * products.constant)
        for layer in self.layers:
            if isinstance(layer, Regularized):
                product = few * product * layer.lipschitz_constant(self.dtype)
        return product

    def _gap(self, constants: Any, step: Array) -> Array:
        self._two("certificate")
        first, second = (products.constant for products in constants)
        few = 1 + 16 * float(jnp.finfo(step.dtype).eps)
        return over(0.5 * few * first * step**2, 1 - few * jnp.sqrt(first * second))


def _separate(problem: EquilibriumProblem, s: Array) -> Array:
    """g(s) + ½||s||² − <c, s> for each example."""
    value = problem.per_example(problem.prior.value)(s)
    return value + problem.sum((0.5 * s - problem.drive) * s)


@jax.jit
def _constants(problems: Any, squared_norms: Any) -> Any:
    return tuple(
        products_of(problem, known) for problem, known in zip(problems, squared_norms, strict=True)
    )
