"""Samplings that prefer the features that matter more."""

import abc
from typing import Literal, TypeAlias

import jax.numpy as jnp
from jax import lax

from stochsolvers import _checks, sampling
from stochsolvers._typing import Array, count_field, static_field, value_object
from stochsolvers.estimators._base import FeatureEstimator, feature_constants, padded_constant
from stochsolvers.problems import LayerProblem

ImportanceScore: TypeAlias = Literal["lipschitz", "gradient"]


class _ImportanceScores(FeatureEstimator):
    by: ImportanceScore

    def prepare(self, problem: LayerProblem) -> "FeatureEstimator":
        """The same estimator with the L_i computed, which both scores need."""
        return _Prepared(self, feature_constants(problem))

    @abc.abstractmethod
    def draw_by(self, key: Array, problem: LayerProblem, z: Array, constants: Array) -> Array:
        """`draw`, given the L_i."""

    def draw(self, key: Array, problem: LayerProblem, z: Array) -> Array:
        """Weights (*batch, n1)."""
        return self.draw_by(key, problem, z, feature_constants(problem))

    def probabilities(
        self, problem: LayerProblem, z: Array, tau: int | Array, constants: Array
    ) -> Array:
        r"""Inclusion probabilities p_i, shape (*batch, n1), Σ p_i = τ.

        Proportional to L_i, or to ||A_i|| · ||∂ℓ(A* z, x)_i||.

        The second is ||∇f_i(z)|| up to a constant for the terms' data part (their common − b is carried
        exactly and needs no sampling); for a convolution it is its upper bound.
        """
        if self.by == "lipschitz":  # the same for every example
            p = sampling.inclusion_probabilities(constants.astype(problem.dtype), tau)
            return jnp.broadcast_to(p, (*problem.batch_shape, *p.shape))
        residual = problem.residual(z)
        axes = tuple(range(len(problem.batch_shape), residual.ndim))
        # the scores' unit is their own, and no square overflows
        unit = jnp.max(jnp.abs(lax.stop_gradient(residual)), axes, keepdims=True, initial=0.0)
        squares, spatial = (residual / jnp.where(unit > 0, unit, 1.0)) ** 2, axes[:-1]
        constants = jnp.expand_dims(constants, range(len(problem.batch_shape)))
        scores = jnp.sqrt(constants * jnp.sum(squares, axis=spatial)).astype(problem.dtype)
        return sampling.inclusion_probabilities(scores, tau)

    def fixed_size_smoothness(self, problem: LayerProblem, tau: int | Array) -> Array:
        """The smaller of two bounds on 𝓛 for |S| = τ; for "gradient" scores p changes with z.

        With U the features that are not certain, τ_U = Σ_U p_i: the square of a sum of at most τ terms
        gives τ max_i L_i / (n1 p_i), and the mean and the variance apart L + τ_U max_U L_i / (n1 p_i).
        """
        n1, constants = problem.linear_map.in_features, feature_constants(problem)
        if self.by == "gradient":
            _checks.fail("expected_smoothness", "scores that do not move (by='lipschitz')", self.by)
        p = sampling.inclusion_probabilities(constants, tau)
        ratio = constants / (n1 * p)
        uncertain = p < 1.0
        spread = jnp.sum(jnp.where(uncertain, p, 0.0)) * jnp.max(jnp.where(uncertain, ratio, 0.0))
        together = tau * jnp.max(ratio)
        return jnp.minimum(together, padded_constant(problem) + spread) + problem.ridge


@value_object
class SerialImportance(_ImportanceScores):
    r"""Serial importance sampling: one feature i, with P(i) = p_i ∝ its importance, w_i = 1/p_i.

    Args:
      by: "lipschitz" for p_i ∝ L_i, "gradient" for p_i ∝ ||A_i|| ||(A* z − x)_i||.

    References:
      Zhao and Zhang 2015; Bibi et al. 2019, section 5.
    """

    by: ImportanceScore = static_field(default="lipschitz")

    def __post_init__(self):
        _checks.member("by", self.by, ("lipschitz", "gradient"))

    def draw_by(self, key: Array, problem: LayerProblem, z: Array, constants: Array) -> Array:
        """Weights (*batch, n1)."""
        p = self.probabilities(problem, z, 1, constants)
        return sampling.serial_mask(key, p).astype(problem.dtype) / p

    def expected_smoothness(self, problem: LayerProblem) -> Array:
        """𝓛 = max_i L_i / (n1 p_i) + λ, the mean of the L_i / n1 for p_i ∝ L_i."""
        return self.fixed_size_smoothness(problem, 1)


@value_object
class Importance(_ImportanceScores):
    r"""Non-serial importance sampling: |S| = τ, P(i ∈ S) = p_i = min(1, c s_i), w_i = 1[i ∈ S] / p_i.

    Args:
      tau: a count (int) or a fraction of n1 (float).
      by: "lipschitz" for scores s_i = L_i, "gradient" for ||A_i|| ||(A* z − x)_i||.

    References:
      Bibi et al. 2019, section 5; the sampling is systematic in random order (Madow 1949).
    """

    tau: int | float | Array = count_field()
    by: ImportanceScore = static_field(default="lipschitz", kw_only=True)

    def __post_init__(self):
        _checks.member("by", self.by, ("lipschitz", "gradient"))
        object.__setattr__(self, "tau", sampling.canonical_tau(self.tau))

    def check(self, problem: LayerProblem) -> None:
        """Refuse counts that the problem does not have."""
        sampling.num_sampled(self.tau, problem.linear_map.in_features)

    def draw_by(self, key: Array, problem: LayerProblem, z: Array, constants: Array) -> Array:
        """Weights (*batch, n1)."""
        tau = sampling.num_sampled(self.tau, problem.linear_map.in_features)
        p = self.probabilities(problem, z, tau, constants)
        return sampling.fixed_size_mask(key, p).astype(problem.dtype) / p

    def expected_smoothness(self, problem: LayerProblem) -> Array:
        """A bound that is valid for every sampling of size τ, and L + λ at τ = n1."""
        tau = sampling.num_sampled(self.tau, problem.linear_map.in_features)
        return self.fixed_size_smoothness(problem, tau)


@value_object
class _Prepared(FeatureEstimator):
    """An importance sampling with its L_i at hand."""

    base: _ImportanceScores
    constants: Array

    def draw(self, key: Array, problem: LayerProblem, z: Array) -> Array:
        """Weights (*batch, n1)."""
        return self.base.draw_by(key, problem, z, self.constants)

    def expected_smoothness(self, problem: LayerProblem) -> Array:
        """The base estimator's constant."""
        return self.base.expected_smoothness(problem)
