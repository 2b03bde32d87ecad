"""An equilibrium layer in its hidden units: a composite problem for proximal gradient descent."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from stochsolvers._typing import Array, Scalar, value_object
from stochsolvers.equilibrium._certifier import as_known, constants_of
from stochsolvers.linear_maps import LinearMap
from stochsolvers.lipschitz import operator_bracket
from stochsolvers.losses import Loss
from stochsolvers.problems import LayerProblem, _certificate
from stochsolvers.problems._products import Products
from stochsolvers.prox import Prior


@value_object
class _NegativeSquares(Loss):
    """−½ u²: with the ridge 1 of a hidden problem the sum is convex and 1-smooth for ||W|| ≤ 1."""

    smoothness: ClassVar[float] = 0.0  # pyright: ignore[reportIncompatibleVariableOverride]

    def value(self, u, x):
        """−½ u²."""
        return -0.5 * u**2

    def derivative(self, u, x):
        """−u."""
        return -u

    def derivative_error(self, error):
        """That of u."""
        return error


@value_object
class HiddenProblem(LayerProblem):
    r"""The equilibrium of a layer in its hidden units s = σ(W z + c), z = Wᵀs.

        minimise_s  F(s) + g(s),     F(s) = ½||s||² − ½||Wᵀs||² − <c, s>

    F is 1-smooth and, for ω = ||W|| < 1, (1 − ω²)-strongly convex. The proximal gradient step of size 1 is

        s ← prox_g(s − ∇F(s)) = σ(W Wᵀs + c),

    so that an equilibrium layer is proximal gradient descent run to convergence, and a solver layer in
    normalised units, s ← σ((I − A A*/L) s + A x + b), is an equilibrium layer with W Wᵀ = I − A A*/L.

    It is a `LayerProblem` with the map W, the inputs 0, the bias c, the ridge 1, and −½u² for the loss.
    `EquilibriumProblem.hidden` makes it.

    Args:
      plain: the `EquilibriumProblem`, from which all factors follow.
    """

    linear_map: LinearMap = dataclasses.field(init=False)
    inputs: Array = dataclasses.field(init=False)
    _: dataclasses.KW_ONLY
    loss: Loss = dataclasses.field(init=False)
    bias: Array | None = dataclasses.field(init=False)
    prior: Prior = dataclasses.field(init=False)
    ridge: Scalar = dataclasses.field(init=False)
    plain: Any = dataclasses.field(kw_only=False)

    def __post_init__(self):
        plain = self.plain
        for name, factor in (
            ("linear_map", plain.linear_map),
            ("inputs", jnp.zeros(plain.shape, plain.dtype)),
            ("loss", _NegativeSquares()),
            ("bias", plain.drive),
            ("prior", plain.prior),
            ("ridge", 1.0),
        ):
            object.__setattr__(self, name, factor)
        super().__post_init__()

    def equilibrium(self, s: Array) -> Array:
        """z = Wᵀs, shape (*batch, *W.in_shape); the equilibrium at the minimiser."""
        return self.linear_map.adjoint(self._variable(s))

    def smoothness(self, squared_norm: Array) -> Array:
        return jnp.ones_like(squared_norm)

    def certificate(
        self,
        z: Array,
        *,
        squared_norm: Scalar | None = None,
        strong_convexity: Scalar | None = None,
    ) -> Array:
        r"""A certified optimality gap: P(s) − min P ≤ certificate(s), for each example.

        With μ = 1 − ω² the strong-convexity bound of `LayerProblem.certificate`, round-off included. +∞
        where ω² is not below 1, and where s is outside the domain of g.

        Args:
          z: s, shaped as the drive.
          squared_norm: an upper bound on ||W||², where it is known; else that of `operator_bracket`.
          strong_convexity: μ, where a lower bound on it is known.
        """
        known = self.certifier(squared_norm=squared_norm, strong_convexity=strong_convexity)
        return known(z)

    def certifier(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        *,
        squared_norm: Scalar | None = None,
        strong_convexity: Scalar | None = None,
    ) -> "HiddenCertifier":
        """s ↦ certificate(s), with ||W||² computed once."""
        known = (as_known(number, self.dtype) for number in (squared_norm, strong_convexity))
        return HiddenCertifier(lax.stop_gradient(self), *constants_of(_constants, self, *known))


@value_object
class HiddenCertifier:
    """s ↦ a certified gap of each example, made by `HiddenProblem.certifier`."""

    problem: HiddenProblem
    products: Products
    convexity: Array
    interval: ClassVar[int] = 10

    @property
    def smoothness(self) -> Array:
        """1."""
        return jnp.ones((), self.problem.dtype)

    def __call__(self, s: Array) -> Array:
        """The certificate of s, shape (*batch,)."""
        return self.problem._certified(_bound, self.products, self.convexity, z=s)


@jax.jit
def _constants(
    problem: HiddenProblem, squared_norm: Array | None, convexity: Array | None
) -> tuple[Products, Array]:
    """Products with W that know their round-off, and μ − 1."""
    known = squared_norm
    if known is None:
        known = operator_bracket(problem.linear_map).upper
    products = Products.of(problem.linear_map, len(problem.batch_shape), known)
    return products, -products.constant if convexity is None else convexity - 1


@jax.jit
def _bound(problem: Any, products: Products, convexity: Array, s: Array) -> Array:
    """Nesterov 2018, theorem 2.1.10."""
    with jax.default_matmul_precision("highest"):
        point = _certificate._point(problem, products, s)
        return _certificate._curvature_gap(problem, point, convexity)
