"""The full gradient, and samplings that treat all features alike."""

import jax.numpy as jnp

from stochsolvers import _checks, sampling
from stochsolvers._typing import (
    Array,
    Scalar,
    as_float,
    count_field,
    static_field,
    value_object,
)
from stochsolvers.estimators._base import (
    FeatureEstimator,
    Sample,
    feature_constants,
    padded_constant,
)
from stochsolvers.problems import LayerProblem


@value_object
class Full(FeatureEstimator):
    """The gradient itself, w = 1."""

    def draw(self, key: Array, problem: LayerProblem, z: Array) -> None:
        """Nothing is drawn."""

    def sample(self, problem: LayerProblem, draw: None) -> Sample:
        """All features, unweighted."""
        return Sample(problem.linear_map, 1.0, lambda array: array)

    def expected_smoothness(self, problem: LayerProblem) -> Array:
        """𝓛 = L + λ."""
        return padded_constant(problem) + problem.ridge


@value_object
class TauNice(FeatureEstimator):
    r"""τ-nice sampling: |S| = τ exactly, all subsets equally likely, w_i = (n1/τ) 1[i ∈ S].

    Args:
      tau: a count (int, may be traced) or a fraction of n1 (float).
      shared: one subset for the whole batch instead of one an example. The τ columns are then
        gathered, and the cost falls with τ/n1.

    References:
      Bibi et al. 2019, definition 3.1 and proposition 1.
    """

    tau: int | float | Array = count_field()
    shared: bool = static_field(default=False, kw_only=True)

    def __post_init__(self):
        object.__setattr__(self, "tau", sampling.canonical_tau(self.tau))

    def check(self, problem: LayerProblem) -> None:
        """Refuse counts that the problem does not have."""
        sampling.num_sampled(self.tau, problem.linear_map.in_features)

    def draw(self, key: Array, problem: LayerProblem, z: Array) -> Array:
        """Weights (*batch, n1); for `shared`, the indices (τ,)."""
        n1 = problem.linear_map.in_features
        tau = sampling.num_sampled(self.tau, n1)
        if self.shared:
            return sampling.tau_nice_indices(key, _static(tau), n1)
        mask = sampling.tau_nice_mask(key, tau, n1, problem.batch_shape)
        return mask.astype(problem.dtype) * (n1 / tau)

    def sample(self, problem: LayerProblem, draw: Array) -> Sample:
        """For `shared`, the restriction to S."""
        if not self.shared:
            return super().sample(problem, draw)
        A = problem.linear_map
        scale = A.in_features / draw.shape[0]
        return Sample(A.restrict(draw), scale, lambda array: array[..., draw])

    def expected_smoothness(self, problem: LayerProblem) -> Array:
        r"""𝓛 = n1(τ−1)/(τ(n1−1)) L + (n1−τ)/(τ(n1−1)) max_i L_i + λ (Gower et al. 2019, eq. 12)."""
        n1 = problem.linear_map.in_features
        tau = sampling.num_sampled(self.tau, n1)
        largest = jnp.max(feature_constants(problem))
        if n1 == 1:
            return padded_constant(problem) + problem.ridge
        joint = n1 * (tau - 1) / (tau * (n1 - 1)) * padded_constant(problem)
        return joint + (n1 - tau) / (tau * (n1 - 1)) * largest + problem.ridge


@value_object
class Bernoulli(FeatureEstimator):
    r"""Independent coins: every feature is kept with probability q, w_i = 1[i ∈ S] / q.

    Args:
      keep_probability: q in (0, 1]; dropout's 1 − p.
    """

    keep_probability: Scalar

    def __post_init__(self):
        _checks.positive("keep_probability", self.keep_probability)
        _checks.rank("keep_probability", self.keep_probability, 0)
        _checks.held_by("keep_probability", self.keep_probability, jnp.float32)
        _checks.ordered("keep_probability", self.keep_probability, 1.0)
        object.__setattr__(self, "keep_probability", as_float(self.keep_probability))

    def draw(self, key: Array, problem: LayerProblem, z: Array) -> Array:
        """Weights (*batch, n1)."""
        n1 = problem.linear_map.in_features
        mask = sampling.bernoulli_mask(key, self.keep_probability, n1, problem.batch_shape)
        return mask.astype(problem.dtype) / self.keep_probability

    def expected_smoothness(self, problem: LayerProblem) -> Array:
        r"""𝓛 = L + ((1 − q)/q) max_i L_i / n1 + λ."""
        q, n1 = self.keep_probability, problem.linear_map.in_features
        largest = jnp.max(feature_constants(problem))
        return padded_constant(problem) + (1.0 - q) / q * largest / n1 + problem.ridge


def _static(tau: int | Array) -> int:
    if not isinstance(tau, int):
        _checks.fail("tau of shared sampling", "a static count or fraction", "a traced value")
    return tau
