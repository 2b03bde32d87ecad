"""What the convex programs of gated and of ReLU networks share: data, β, dual values and certificates."""

import abc
import dataclasses
import math
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax import lax

from stochsolvers import _checks
from stochsolvers._shards import replicated
from stochsolvers._typing import Array, Scalar, at_least_float32, value_object
from stochsolvers.convex import _inputs
from stochsolvers.convex._duality import DualNorm, certified_gap, product_round_off, scaled_dual
from stochsolvers.linear_maps import LinearMap
from stochsolvers.losses import Loss
from stochsolvers.problems import LayerProblem
from stochsolvers.prox import Prior


@value_object
class Program(LayerProblem):
    """A `LayerProblem` over the weights of a network with patterns, with a norm times β as its prior.

    Subclasses have a constructor of their own, which calls `_fill`.
    """

    linear_map: LinearMap = dataclasses.field(init=False)
    inputs: Array = dataclasses.field(init=False)
    _: dataclasses.KW_ONLY
    loss: Loss = dataclasses.field(init=False)
    bias: Array | None = dataclasses.field(init=False)
    prior: Prior = dataclasses.field(init=False)
    ridge: Scalar = dataclasses.field(init=False)
    beta: Array = dataclasses.field(init=False)

    def _fill(self, linear_map: LinearMap, y: Array, loss: Loss, beta: Scalar, **own: Any) -> None:
        """Set the fields, derive prior and ridge from β, and check them all."""
        _inputs.positive_number("beta", beta)
        fields = {"linear_map": linear_map, "inputs": y, "loss": loss, "bias": None, **own}
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        dtype = at_least_float32(jnp.result_type(y), linear_map.dtype)
        for name, value in self._of_beta(_inputs.scalar(beta, dtype)).items():
            object.__setattr__(self, name, value)
        self.__post_init__()

    @abc.abstractmethod
    def _of_beta(self, beta: Array) -> dict[str, Any]:
        """The fields that depend on β: beta, prior and ridge."""

    @property
    def y(self) -> Array:
        """The targets, shape (n,) or (C, n)."""
        return self.inputs

    def with_beta(self, beta: Scalar) -> Self:
        """The same with another β, of the same structure: nothing is compiled again.

        Args:
          beta: β > 0, traced.
        """
        copy = jax.tree.unflatten(jax.tree.structure(self), jax.tree.leaves(self))
        _inputs.positive_number("beta", beta)
        for name, value in self._of_beta(_inputs.scalar(beta, self.dtype)).items():
            object.__setattr__(
                copy, name, jnp.asarray(value, self.dtype) if name == "ridge" else value
            )
        return copy

    @abc.abstractmethod
    def _dual_norm(self, r: Array, error: Array | None, multipliers: Array | None) -> DualNorm:
        """R°(−A r), of each program of the batch, for r up to an entrywise error."""

    def beta_max(self) -> Array:
        """The least β for which zero is a solution, R°(A ∂ℓ(0, y)), shape (*batch,)."""
        return _beta_max(self)

    def dual_value(
        self, V: Array | None = None, *, dual: Array | None = None, multipliers: Array | None = None
    ) -> Array:
        r"""A lower bound on the minimum, shape (*batch,): D(s θ) with 0 ≤ s ≤ β / R°(A θ).

            D(θ) = −Σ_j ℓ*(−θ_j, y_j),       of squares θ·y − ½ ||θ||²

        It holds up to round-off, which `certificate` counts. It goes to the minimum as V goes to a solution.

        Args:
          V: shaped as the variable; then θ = −∂ℓ(A* V, y).
          dual: θ itself, shaped as the targets, in place of V.
          multipliers: of the cones of a `ReLUProblem`; see there.
        """
        if (V is None) == (dual is None):
            _checks.fail("dual_value", "one of V and dual", "both" if dual is not None else "none")
        if dual is not None:
            dual = jnp.asarray(dual, self.dtype)
            if dual.shape != self.inputs.shape:
                _checks.fail("shape of dual", f"{self.inputs.shape}", dual.shape)
        return _dual_value(self, V, dual, multipliers)

    def certificate(
        self,
        z: Array,
        *,
        squared_norm: Scalar | None = None,
        strong_convexity: Scalar | None = None,
        multipliers: Array | None = None,
    ) -> Array:
        r"""P(V) − min P ≤ certificate(V), shape (*batch,): the duality gap at scaled residuals.

            P(V) − D(s θ),      θ = −∂ℓ(A* V, y),   0 ≤ s ≤ β / R°(A θ)

        Round-off is included, where a sum of n products is taken to be within 4 log2(2 n) eps of that of
        their absolute values. It costs two products with A and two with A*.

        Args:
          z: V, shaped as the variable.
          squared_norm: not used.
          strong_convexity: not used.
          multipliers: of the cones of a `ReLUProblem`; see there.
        """
        del squared_norm, strong_convexity
        problem = lax.stop_gradient(self)
        return _gap(problem, lax.stop_gradient(self._variable(z)), multipliers)

    def certifier(
        self, *, squared_norm: Scalar | None = None, strong_convexity: Scalar | None = None
    ) -> Any:
        """V ↦ certificate(V), and the Lipschitz constant of ∇F that solvers compare it with."""
        del strong_convexity
        if squared_norm is None:
            squared_norm = self.linear_map.squared_norm_bound()
        smoothness = self.smoothness(jnp.asarray(squared_norm, self.dtype))
        return GapCertifier(lax.stop_gradient(self), lax.stop_gradient(smoothness))

    def _products(self, V: Array) -> tuple[Array, Array]:
        """A* V and an entrywise bound on its error."""
        image = self.linear_map.adjoint(V)
        sizes = self._magnitudes().adjoint(jnp.abs(V))
        terms = math.prod(self.linear_map.out_shape)
        return image, product_round_off(self, terms) * sizes

    def _image_error(self, r: Array, error: Array | None) -> Array:
        """An entrywise bound on the error of A r, for r up to an error."""
        sizes = product_round_off(self, 2 * self.inputs.shape[-1]) * jnp.abs(r)
        return self._magnitudes()(sizes if error is None else sizes + error)

    @abc.abstractmethod
    def _magnitudes(self) -> LinearMap:
        """A map whose matrix has entries of at least the sizes of those of A."""


@replicated
@jax.jit
def _beta_max(problem: Program) -> Array:
    slope = problem.loss.derivative(jnp.zeros_like(problem.inputs), problem.inputs)
    return problem._dual_norm(slope, None, None).value


@replicated
@jax.jit
def _dual_value(
    problem: Program, V: Array | None, dual: Array | None, multipliers: Array | None
) -> Array:
    r = problem.residual(V) if dual is None else -dual  # pyright: ignore[reportArgumentType]
    norm = problem._dual_norm(r, None, multipliers).value
    return scaled_dual(problem, r, norm, problem.beta)[0]


@replicated
@jax.jit
def _gap(problem: Program, V: Array, multipliers: Array | None) -> Array:
    with jax.default_matmul_precision("highest"):
        u, error = problem._products(V)

        def norm(r, own):
            return problem._dual_norm(r, own, multipliers)

        return certified_gap(problem, V, u, error, norm)


@value_object
class GapCertifier:
    """V ↦ a certified gap, made by `certifier`.

    Attributes:
      problem: of the network.
      smoothness: a Lipschitz constant of ∇F.
    """

    problem: Program
    smoothness: Array
    interval: ClassVar[int] = 10

    def __call__(self, z: Array) -> Array:
        """The certificate, shape (*batch,)."""
        return self.problem.certificate(z)
