"""Sampling of the outputs."""

from stochsolvers import lipschitz, sampling
from stochsolvers._typing import Array, count_field, value_object
from stochsolvers.estimators._base import Estimator, feature_axis, padded_constant
from stochsolvers.problems import LayerProblem


@value_object
class OutputCoordinates(Estimator):
    r"""τ-nice sampling of the n2 outputs: (n2/τ) m ⊙ ∇F(z), whole feature maps for a convolution.

    `nsync` uses the mask without the factor, as the paper's proposition 6 does.

    Args:
      tau: a count (int, may be traced) or a fraction of n2 (float).
    """

    tau: int | float | Array = count_field()

    def __post_init__(self):
        object.__setattr__(self, "tau", sampling.canonical_tau(self.tau))

    def check(self, problem: LayerProblem) -> None:
        """Refuse counts that the problem does not have."""
        sampling.num_sampled(self.tau, problem.linear_map.out_features)

    def draw(self, key: Array, problem: LayerProblem, z: Array) -> Array:
        """Mask (*batch, n2) with exactly τ ones."""
        n2 = problem.linear_map.out_features
        tau = sampling.num_sampled(self.tau, n2)
        return sampling.tau_nice_mask(key, tau, n2, problem.batch_shape)

    def gradient(self, problem: LayerProblem, z: Array, draw: Array) -> Array:
        """(n2/τ) m ⊙ ∇F(z)."""
        n2 = problem.linear_map.out_features
        scale = n2 / sampling.num_sampled(self.tau, n2)
        mask = feature_axis(draw, problem, outputs=True).astype(problem.dtype)
        return scale * mask * problem.gradient(z)

    def expected_smoothness(self, problem: LayerProblem) -> Array:
        """𝓛 = (n2/τ)(L + λ)."""
        n2 = problem.linear_map.out_features
        scale = n2 / sampling.num_sampled(self.tau, n2)
        return scale * (padded_constant(problem) + problem.ridge)

    def separable_constants(self, problem: LayerProblem) -> Array:
        r"""v_j = β L + (1 − β) M_j + λ, β = (τ−1)/(n2−1): the ESO of this sampling, shape (n2,).

        M_j = ||(A A*)_jj||. With them E[F(z + h_S)] ≤ F(z) + (τ/n2)(<∇F(z), h> + ½ Σ v_j ||h_j||²).

        References:
          Richtárik and Takáč 2016, On optimal probabilities in stochastic coordinate descent methods.
        """
        n2 = problem.linear_map.out_features
        beta = (sampling.num_sampled(self.tau, n2) - 1) / max(n2 - 1, 1)
        blocks = lipschitz.output_lipschitz_constants(problem.linear_map, grid="padded")
        blocks = problem.loss.smoothness * blocks
        return beta * padded_constant(problem) + (1.0 - beta) * blocks + problem.ridge
