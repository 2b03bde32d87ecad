"""What every estimator of ∇F has, and those that sample input features."""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from stochsolvers import _checks, lipschitz
from stochsolvers._typing import Array
from stochsolvers.linear_maps import LinearMap
from stochsolvers.problems import LayerProblem


class Estimator(abc.ABC):
    """An unbiased estimator of ∇F, as a value."""

    @abc.abstractmethod
    def draw(self, key: Array, problem: LayerProblem, z: Array) -> Any:
        """The random part of one estimate: weights, indices, or a mask."""

    @abc.abstractmethod
    def gradient(self, problem: LayerProblem, z: Array, draw: Any) -> Array:
        """The estimate of ∇F(z) that belongs to a draw."""

    @abc.abstractmethod
    def expected_smoothness(self, problem: LayerProblem) -> Array:
        r"""A constant 𝓛 with E||∇Ψ(z) − ∇Ψ(z*)||² ≤ 2 𝓛 (F(z) − F(z*) − <∇F(z*), z − z*>).

        Proximal stochastic gradient steps up to 1/(2𝓛) are safe (Gorbunov, Hanzely and Richtárik 2020,
        theorem 4.1).
        """

    def prepare(self, problem: LayerProblem) -> "Estimator":
        """The same estimator with what does not depend on z computed once."""
        return self

    def check(self, problem: LayerProblem) -> None:  # noqa: B027 - nothing to refuse by default
        """Refuse problems that the sampling is not for, at trace time."""

    def __call__(self, key: Array, problem: LayerProblem, z: Array) -> Array:
        """An unbiased estimate of ∇F(z)."""
        what = f"problem of {type(self).__name__}"
        _checks.instance(what, problem, LayerProblem, "a LayerProblem")
        z = problem._variable(z)
        return self.gradient(problem, z, self.draw(key, problem, z))


class Sample(NamedTuple):
    """What a draw leaves of a problem.

    Attributes:
      linear_map: A, or its restriction to the features that were drawn.
      weights: w, for those features; broadcasts against the inputs.
      select: takes an array shaped as the inputs to the features that were drawn.
    """

    linear_map: LinearMap
    weights: Array | float
    select: Callable[[Array], Array]


class FeatureEstimator(Estimator):
    """An estimator that weights the n1 input features; `draw` returns w, shape (*batch, n1)."""

    def sample(self, problem: LayerProblem, draw: Any) -> Sample:
        """The part of the problem that belongs to a draw: by default all features, weighted by the draw."""
        return Sample(problem.linear_map, feature_axis(draw, problem), lambda array: array)

    def gradient(self, problem: LayerProblem, z: Array, draw: Any) -> Array:
        """∇Ψ(z) = A(w ⊙ ∂ℓ(A* z, x)) − b + λ z."""
        A, weights, select = self.sample(problem, draw)
        residual = problem.loss.derivative(A.adjoint(z), select(problem.inputs))
        return problem.with_bias_and_ridge(A(weights * residual), z)

    def difference(
        self, problem: LayerProblem, z: Array, y: Array, residual: Array | None, draw: Any
    ) -> Array:
        """∇Ψ(z) − ∇Ψ(y) for the same draw at both points, `residual` being ∂ℓ at y (None for squares)."""
        if problem.is_quadratic:
            return self.curvature(problem, z - y, draw)
        A, weights, select = self.sample(problem, draw)
        residual = problem.residual(y) if residual is None else residual
        moved = problem.loss.derivative(A.adjoint(z), select(problem.inputs)) - select(residual)
        return A(weights * moved) + problem.ridge * (z - y)

    def curvature(self, problem: LayerProblem, direction: Array, draw: Any) -> Array:
        """A(w ⊙ A* d) + λ d, by which ∇Ψ changes from z to z + d for squares."""
        A, weights, _ = self.sample(problem, draw)
        return A(weights * A.adjoint(direction)) + problem.ridge * direction


def feature_axis(weights: Array, problem: LayerProblem, *, outputs: bool = False) -> Array:
    """Weights (*batch, n) of inputs or outputs, with the axes before the last put in: (*batch, 1, 1, n)."""
    _checks.instance("problem of feature_axis", problem, LayerProblem, "a LayerProblem")
    features = problem.linear_map.out_features if outputs else problem.linear_map.in_features
    _checks.trailing("weights", weights, (features,))
    ndim = len(problem.shape) if outputs else problem.inputs.ndim
    return jnp.expand_dims(weights, tuple(range(len(problem.batch_shape), ndim - 1)))


def padded_constant(problem: LayerProblem) -> Array:
    """L_ℓ ‖A‖², an upper bound under every padding."""
    squared_norm = lipschitz.lipschitz_constant(problem.linear_map, grid="padded")
    return problem.loss.smoothness * squared_norm


def feature_constants(problem: LayerProblem) -> Array:
    """L_i = L_ℓ n1 ‖A_i‖², upper bounds under every padding, shape (n1,)."""
    constants = lipschitz.feature_lipschitz_constants(problem.linear_map, grid="padded")
    return problem.loss.smoothness * constants
