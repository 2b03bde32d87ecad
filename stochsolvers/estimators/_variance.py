"""Variance reduction by the value at an anchor."""

from typing import Any

from stochsolvers import _checks
from stochsolvers._typing import Array, value_object
from stochsolvers.estimators._base import Estimator, FeatureEstimator
from stochsolvers.problems import LayerProblem


@value_object
class VarianceReduced(Estimator):
    r"""Any feature estimator, corrected by its own value at an anchor y (SVRG, S2GD, mS2GD).

        ∇Ψ(z) = μ + ∇Ψ_S(z) − ∇Ψ_S(y),   μ = ∇F(y),   the same sample S at both points.

    ∂ℓ(A* y, x) is kept where ℓ is not quadratic, so that an estimate still costs two products. From y = 0
    and for squares it adds (I − (n1/τ) Σ_{i∈S} A_i A_i*) z to the plain layer: additive dropout.

    References:
      Konečný et al. 2016; Johnson and Zhang 2013; Bibi et al. 2019, proposition 2, eq. 28–31.
    """

    base: FeatureEstimator
    anchor: Array
    anchor_gradient: Array
    anchor_residual: Array | None = None

    @classmethod
    def at(cls, problem: LayerProblem, anchor: Array, base: FeatureEstimator) -> "VarianceReduced":
        """The estimator with anchor y and μ = ∇F(y)."""
        _checks.instance("problem of VarianceReduced", problem, LayerProblem, "a LayerProblem")
        wanted = "an estimator that samples input features"
        _checks.instance("base of VarianceReduced", base, FeatureEstimator, wanted)
        residual = None if problem.is_quadratic else problem.residual(anchor)
        return cls(base, anchor, problem.gradient(anchor), residual)

    def draw(self, key: Array, problem: LayerProblem, z: Array) -> Any:
        """The base estimator's draw at z."""
        return self.base.draw(key, problem, z)

    def gradient(self, problem: LayerProblem, z: Array, draw: Any) -> Array:
        """μ + A(w ⊙ (∂ℓ(A* z, x) − ∂ℓ(A* y, x))) + λ (z − y)."""
        moved = self.base.difference(problem, z, self.anchor, self.anchor_residual, draw)
        return self.anchor_gradient + moved

    def expected_smoothness(self, problem: LayerProblem) -> Array:
        """The base estimator's constant."""
        return self.base.expected_smoothness(problem)
