r"""Estimators of ∇F as values: which features are sampled, and how the sample is weighted.

An estimator of the first kind draws random weights w over the n1 input features with E[w] = 1, and
returns

    ∇Ψ(z) = A(w ⊙ (A* z − x)) − b + λ z,      E[∇Ψ(z)] = ∇F(z).

One proximal step from z = 0 with it is a dropout layer, and the law of w says which one:

| estimator | w_i | one iteration from 0 is |
|---|---|---|
| `Full` | 1 | linear → activation |
| `TauNice` | (n1/τ) 1[i ∈ S], \|S\| = τ | dropout of exactly n1 − τ inputs → linear → activation |
| `Bernoulli` | 1[i ∈ S] / q | ordinary dropout with keep rate q → linear → activation |
| `SerialImportance` | 1[i = j] / p_i | one input kept, P(j = i) = p_i |
| `Importance` | 1[i ∈ S] / p_i, \|S\| = τ | non-uniform dropout with inclusion probabilities p_i |

`VarianceReduced` corrects any of them by its own value at an anchor (additive dropout), and
`OutputCoordinates` samples the n2 outputs of ∇F instead (dropout after the linear map).

Every estimator `e` has `e.draw(key, problem, z)`, `e.gradient(problem, z, draw)`, their composition
`e(key, problem, z)`, and `e.expected_smoothness(problem)`.
"""

import abc
from typing import Any, Literal, TypeAlias

import jax.numpy as jnp

from stochsolvers import _checks, lipschitz, sampling
from stochsolvers._typing import Array, Scalar, count_field, static_field, value_object
from stochsolvers.problems import LayerProblem

ImportanceScore: TypeAlias = Literal["lipschitz", "gradient"]


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

        Proximal stochastic gradient steps up to 1/(2𝓛) are safe (Gower et al. 2019, theorem 3.1).
        """

    def prepare(self, problem: LayerProblem) -> "Estimator":
        """The same estimator with what does not depend on z computed, for use in a loop."""
        return self

    def __call__(self, key: Array, problem: LayerProblem, z: Array) -> Array:
        """An unbiased estimate of ∇F(z)."""
        return self.gradient(problem, z, self.draw(key, problem, z))


class FeatureEstimator(Estimator):
    """An estimator that weights the n1 input features; `draw` returns w, shape (*batch, n1)."""

    def data_gradient(self, problem: LayerProblem, z: Array, draw: Any, *, linear: bool) -> Array:
        """A(w ⊙ (A* z − x)), or its linear part A(w ⊙ A* z)."""
        residual = problem.linear_map.adjoint(z) if linear else problem.residual(z)
        return problem.linear_map(feature_axis(draw, problem) * residual)

    def gradient(self, problem: LayerProblem, z: Array, draw: Any) -> Array:
        """∇Ψ(z) = A(w ⊙ (A* z − x)) − b + λ z."""
        data = self.data_gradient(problem, z, draw, linear=False)
        return problem.with_bias_and_ridge(data, z)

    def curvature(self, problem: LayerProblem, direction: Array, draw: Any) -> Array:
        """∇Ψ(z + d) − ∇Ψ(z) = A(w ⊙ A* d) + λ d, for the same draw at both points."""
        data = self.data_gradient(problem, direction, draw, linear=True)
        return data + problem.ridge * direction


@value_object
class Full(FeatureEstimator):
    """The gradient itself, w = 1."""

    def draw(self, key: Array, problem: LayerProblem, z: Array) -> None:
        """Nothing is drawn."""

    def data_gradient(self, problem: LayerProblem, z: Array, draw: None, *, linear: bool) -> Array:
        """A(A* z − x), or A A* z."""
        residual = problem.linear_map.adjoint(z) if linear else problem.residual(z)
        return problem.linear_map(residual)

    def expected_smoothness(self, problem: LayerProblem) -> Array:
        """𝓛 = L + λ."""
        return _padded_constant(problem) + problem.ridge


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

    def draw(self, key: Array, problem: LayerProblem, z: Array) -> Array:
        """Weights (*batch, n1); for `shared`, the indices (τ,)."""
        n1 = problem.linear_map.in_features
        tau = sampling.num_sampled(self.tau, n1)
        if self.shared:
            return sampling.tau_nice_indices(key, _static(tau), n1)
        mask = sampling.tau_nice_mask(key, tau, n1, problem.batch_shape)
        return mask.astype(problem.dtype) * (n1 / tau)

    def data_gradient(self, problem: LayerProblem, z: Array, draw: Array, *, linear: bool) -> Array:
        """(n1/τ) Σ_{i∈S} A_i (A_i* z − x_i), or its linear part."""
        if not self.shared:
            return super().data_gradient(problem, z, draw, linear=linear)
        part = problem.linear_map.restrict(draw)
        residual = part.adjoint(z)
        if not linear:
            residual = residual - problem.inputs[..., draw]
        return (problem.linear_map.in_features / draw.shape[0]) * part(residual)

    def expected_smoothness(self, problem: LayerProblem) -> Array:
        r"""𝓛 = n1(τ−1)/(τ(n1−1)) L + (n1−τ)/(τ(n1−1)) max_i L_i + λ (Gower et al. 2019, eq. 12)."""
        n1 = problem.linear_map.in_features
        tau = sampling.num_sampled(self.tau, n1)
        largest = jnp.max(_feature_constants(problem))
        if n1 == 1:
            return _padded_constant(problem) + problem.ridge
        joint = n1 * (tau - 1) / (tau * (n1 - 1)) * _padded_constant(problem)
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
        _checks.ordered("keep_probability", self.keep_probability, 1.0)

    def draw(self, key: Array, problem: LayerProblem, z: Array) -> Array:
        """Weights (*batch, n1)."""
        n1 = problem.linear_map.in_features
        mask = sampling.bernoulli_mask(key, self.keep_probability, n1, problem.batch_shape)
        return mask.astype(problem.dtype) / self.keep_probability

    def expected_smoothness(self, problem: LayerProblem) -> Array:
        r"""𝓛 = L + ((1 − q)/q) max_i L_i / n1 + λ."""
        q, n1 = self.keep_probability, problem.linear_map.in_features
        largest = jnp.max(_feature_constants(problem))
        return _padded_constant(problem) + (1.0 - q) / q * largest / n1 + problem.ridge


class _ImportanceScores(FeatureEstimator):
    by: ImportanceScore

    def prepare(self, problem: LayerProblem) -> "FeatureEstimator":
        """The same estimator with the L_i computed, which both scores need."""
        return _Prepared(self, _feature_constants(problem))

    @abc.abstractmethod
    def draw_by(self, key: Array, problem: LayerProblem, z: Array, constants: Array) -> Array:
        """`draw`, given the L_i."""

    def draw(self, key: Array, problem: LayerProblem, z: Array) -> Array:
        """Weights (*batch, n1)."""
        return self.draw_by(key, problem, z, _feature_constants(problem))

    def probabilities(
        self, problem: LayerProblem, z: Array, tau: int | Array, constants: Array
    ) -> Array:
        r"""Inclusion probabilities p_i, shape (*batch, n1), Σ p_i = τ.

        Proportional to L_i, or to ||A_i|| · ||(A* z − x)_i||.

        The second is ||∇f_i(z)|| up to a constant for the terms' data part (their common − b is carried
        exactly and needs no sampling); for a convolution it is its upper bound.
        """
        if self.by == "lipschitz":  # the same for every example
            p = sampling.inclusion_probabilities(constants.astype(problem.dtype), tau)
            return jnp.broadcast_to(p, (*problem.batch_shape, *p.shape))
        squares = problem.residual(z) ** 2
        spatial = tuple(range(len(problem.batch_shape), squares.ndim - 1))
        scores = jnp.sqrt(constants * jnp.sum(squares, axis=spatial)).astype(problem.dtype)
        return sampling.inclusion_probabilities(scores, tau)

    def fixed_size_smoothness(self, problem: LayerProblem, tau: int | Array) -> Array:
        """The smaller of two bounds on 𝓛 for |S| = τ; for "gradient" scores p changes with z.

        With U the features that are not certain, τ_U = Σ_U p_i: the square of a sum of at most τ terms
        gives τ max_i L_i / (n1 p_i), and the mean and the variance apart L + τ_U max_U L_i / (n1 p_i).
        """
        n1, constants = problem.linear_map.in_features, _feature_constants(problem)
        if self.by == "gradient":
            _checks.fail("expected_smoothness", "scores that do not move (by='lipschitz')", self.by)
        p = sampling.inclusion_probabilities(constants, tau)
        ratio = constants / (n1 * p)
        uncertain = p < 1.0
        spread = jnp.sum(jnp.where(uncertain, p, 0.0)) * jnp.max(jnp.where(uncertain, ratio, 0.0))
        together = tau * jnp.max(ratio)
        return jnp.minimum(together, _padded_constant(problem) + spread) + problem.ridge


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


@value_object
class VarianceReduced(Estimator):
    r"""Any feature estimator, corrected by its own value at an anchor y (SVRG, S2GD, mS2GD).

        ∇Ψ(z) = μ + ∇Ψ_S(z) − ∇Ψ_S(y),   μ = ∇F(y),   the same sample S at both points.

    From y = 0 it adds (I − (n1/τ) Σ_{i∈S} A_i A_i*) z to the plain layer: additive dropout.

    References:
      Konečný et al. 2016; Johnson and Zhang 2013; Bibi et al. 2019, proposition 2, eq. 28–31.
    """

    base: FeatureEstimator
    anchor: Array
    anchor_gradient: Array

    @classmethod
    def at(cls, problem: LayerProblem, anchor: Array, base: FeatureEstimator) -> "VarianceReduced":
        """The estimator with anchor y and μ = ∇F(y)."""
        return cls(base, anchor, problem.gradient(anchor))

    def draw(self, key: Array, problem: LayerProblem, z: Array) -> Any:
        """The base estimator's draw at z."""
        return self.base.draw(key, problem, z)

    def gradient(self, problem: LayerProblem, z: Array, draw: Any) -> Array:
        """μ + A(w ⊙ A*(z − y)) + λ (z − y)."""
        return self.anchor_gradient + self.base.curvature(problem, z - self.anchor, draw)

    def expected_smoothness(self, problem: LayerProblem) -> Array:
        """The base estimator's constant."""
        return self.base.expected_smoothness(problem)


@value_object
class OutputCoordinates(Estimator):
    r"""τ-nice sampling of the n2 outputs: (n2/τ) m ⊙ ∇F(z), whole feature maps for a convolution.

    `nsync` uses the mask without the factor, as the paper's proposition 6 does.

    Args:
      tau: a count (int, may be traced) or a fraction of n2 (float).
    """

    tau: int | float | Array = count_field()

    def draw(self, key: Array, problem: LayerProblem, z: Array) -> Array:
        """Mask (*batch, n2) with exactly τ ones."""
        n2 = problem.linear_map.out_features
        tau = sampling.num_sampled(self.tau, n2)
        return sampling.tau_nice_mask(key, tau, n2, problem.batch_shape)

    def gradient(self, problem: LayerProblem, z: Array, draw: Array) -> Array:
        """(n2/τ) m ⊙ ∇F(z)."""
        n2 = problem.linear_map.out_features
        scale = n2 / sampling.num_sampled(self.tau, n2)
        return scale * feature_axis(draw, problem).astype(problem.dtype) * problem.gradient(z)

    def expected_smoothness(self, problem: LayerProblem) -> Array:
        """𝓛 = (n2/τ)(L + λ)."""
        n2 = problem.linear_map.out_features
        scale = n2 / sampling.num_sampled(self.tau, n2)
        return scale * (_padded_constant(problem) + problem.ridge)

    def separable_constants(self, problem: LayerProblem) -> Array:
        r"""v_j = β L + (1 − β) M_j + λ, β = (τ−1)/(n2−1): the ESO of this sampling, shape (n2,).

        M_j = ||(A A*)_jj||. With them E[F(z + h_S)] ≤ F(z) + (τ/n2)(<∇F(z), h> + ½ Σ v_j ||h_j||²).

        References:
          Richtárik and Takáč 2016, On optimal probabilities in stochastic coordinate descent methods.
        """
        n2 = problem.linear_map.out_features
        beta = (sampling.num_sampled(self.tau, n2) - 1) / max(n2 - 1, 1)
        blocks = lipschitz.output_lipschitz_constants(problem.linear_map, grid="padded")
        return beta * _padded_constant(problem) + (1.0 - beta) * blocks + problem.ridge


def feature_axis(weights: Array, problem: LayerProblem) -> Array:
    """Weights (*batch, n) with the spatial axes of a convolution put in: (*batch, 1, 1, n)."""
    spatial = range(len(problem.batch_shape), problem.inputs.ndim - 1)
    return jnp.expand_dims(weights, tuple(spatial))


def _static(tau: int | Array) -> int:
    if not isinstance(tau, int):
        _checks.fail("tau of shared sampling", "a static count or fraction", "a traced value")
    return tau


def _padded_constant(problem: LayerProblem) -> Array:
    return lipschitz.lipschitz_constant(problem.linear_map, grid="padded")


def _feature_constants(problem: LayerProblem) -> Array:
    return lipschitz.feature_lipschitz_constants(problem.linear_map, grid="padded")
