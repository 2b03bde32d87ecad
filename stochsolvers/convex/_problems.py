"""The convex program of a gated network, which is a layer's problem as it stands."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike

from stochsolvers import _checks
from stochsolvers._typing import Array, Scalar, static_field, value_object
from stochsolvers.convex import _bound, _inputs
from stochsolvers.convex._duality import DualNorm, euclidean_norm
from stochsolvers.convex._gated_map import GatedMap, OfGatedData
from stochsolvers.convex._patterns import Patterns
from stochsolvers.convex._program import Program
from stochsolvers.losses import Loss, Squares
from stochsolvers.problems import LayerProblem
from stochsolvers.prox import L1, GroupL2, NuclearNorm, Prior, Zero
from stochsolvers.prox._spectra import singular_values

REGULARIZERS = ("group", "feature", "l1", "l2", "nuclear")


@value_object
class GatedProblem(Program, OfGatedData):
    r"""The convex program of a two-layer network with fixed gates, over the weights v_i of its neurons.

        minimise_V  Σ_j ℓ((Σ_i D_i X v_i)_j, y_j) + β R(V),       D_i = diag(1[X g_i ≥ 0])

    It is a `LayerProblem` with the map `GatedMap`: all solvers, samplings of the data, losses and
    certificates of the library are for it. Its optimum with R(V) = Σ_i ||v_i||₂ is that of the gated
    network with weight decay, min Σ_j ℓ(Σ_i (D_i X w_i)_j a_i, y_j) + (β/2) Σ_i (||w_i||² + a_i²).

    | regularizer | R(V) |
    |---|---|
    | "group" | Σ_i ||v_i||₂: few neurons; of joint outputs the norm of the d × C matrix of a neuron |
    | "feature" | Σ_k ||(v_1k, …, v_Pk)||₂: few features |
    | "l1" | Σ_i ||v_i||₁ |
    | "l2" | ½ Σ_i ||v_i||², a ridge |
    | "nuclear" | Σ_i ||V_i||_*, V_i the d × C matrix of neuron i of joint outputs |
    | a `Prior` | its value; its own weights are multiplied by β |

    Args:
      X: data, shape (n, d); (n, K, d) for the sum over K patches.
      y: targets, shape (n,); (C, n) for C outputs.
      patterns: `Patterns` of X.
      beta: β > 0, traced.
      loss: ℓ, of `stochsolvers.losses`.
      regularizer: R, see the table.
      joint: one program for all C outputs, with V of shape (C, P, d), as losses that couple classes need.
        Else each output is a program of its own (one-vs-rest), and V of shape (C, P, d) is their batch.

    Raises:
      ValueError: at trace time, for shapes and dtypes that do not fit and unknown regularizers; where values
        are concrete, for data and targets that are not finite, equal targets, one class, and β ≤ 0.

    References:
      Pilanci and Ergen, Neural networks are convex regularizers, 2020; Mishkin, Sahiner and Pilanci, Fast
      convex optimization for two-layer ReLU networks, 2022 (gated networks); Sahiner, Ergen, Pauly and
      Pilanci, Vector-output ReLU neural network problems are copositive programs, 2021 (nuclear norm).
    """

    _: dataclasses.KW_ONLY
    regularizer: str | None = static_field(init=False)
    penalty: Prior | None = dataclasses.field(init=False)  # R, where it is no name

    def __init__(
        self,
        X: ArrayLike,
        y: ArrayLike,
        patterns: Patterns,
        beta: Scalar,
        *,
        loss: Loss = Squares(),  # noqa: B008 - immutable
        regularizer: str | Prior = "group",
        joint: bool = False,
    ):
        _inputs.loss("loss of GatedProblem", loss)
        if getattr(loss, "axis", -1) != -1 and not joint:
            _checks.fail("joint", "True for a loss that couples outputs", joint)
        X = _inputs.data("X of GatedProblem", X)
        y = _inputs.targets("y of GatedProblem", y, X, loss, joint=joint)
        linear_map = GatedMap(X, patterns, outputs=len(y) if joint else None)
        if isinstance(regularizer, Prior):
            own = {"regularizer": None, "penalty": regularizer}
        else:
            _checks.member("regularizer", regularizer, REGULARIZERS)
            if regularizer == "nuclear" and not joint:
                _checks.fail("joint", "True for the regularizer 'nuclear', of matrices", joint)
            own = {"regularizer": regularizer, "penalty": None}
        self._fill(linear_map, y, loss, beta, **own)

    def _of_beta(self, beta):
        kind, own = self.regularizer, -2 if self.regularizer == "feature" else -1
        if self.penalty is not None:
            prior = beta * self.penalty
        elif kind == "l1":
            prior = L1(beta)
        elif kind == "nuclear":
            prior = NuclearNorm(beta, axes=(-3, -1))
        else:
            groups = GroupL2(beta, axis=(-3, own) if self.joint else own)
            prior = Zero() if kind == "l2" else groups
        return {"beta": beta, "prior": prior, "ridge": beta if kind == "l2" else 0.0}

    @property
    def gated_map(self) -> GatedMap:
        """A."""
        assert isinstance(self.linear_map, GatedMap)
        return self.linear_map

    def predict(self, V: Array, X: ArrayLike | None = None) -> Array:
        """Σ_i 1[x·g_i ≥ 0] x·v_i for new data, shape (n',) or (C, n').

        Args:
          V: weights, shaped as the variable.
          X: shape (n', d) or (n', K, d); None for the data of the problem.
        """
        if X is None:
            return self.gated_map.adjoint(self._variable(V))
        X = _inputs.data_like("data of predict", X, self.X).astype(self.dtype)
        return self.gated_map._with(X, self.patterns.apply(X)).adjoint(self._variable(V))

    def num_active(self, V: Array) -> Array:
        """The number of neurons with v_i ≠ 0, for each program of the batch."""
        axes = (-3, -1) if self.joint else -1
        return jnp.sum(jnp.any(self._variable(V) != 0, axis=axes), axis=-1)

    def beta_max(self) -> Array:
        """The least β for which zero is a solution, shape (*batch,); +∞ for "l2".

        The dual norm of A ∂ℓ(0, y); of "group" and squares max_i ||Xᵀ D_i y||.

        Raises:
          ValueError: for a regularizer that is a `Prior`.
        """
        if self.penalty is not None:
            _checks.fail("regularizer of beta_max", "one of " + ", ".join(REGULARIZERS), "a Prior")
        if self.regularizer == "l2":
            return jnp.full(self.batch_shape, jnp.inf, self.dtype)
        if isinstance(self.loss, Squares) and _bound.is_concrete(self):
            return _inputs.scalar(_bound.beta_max(self), self.dtype)
        return super().beta_max()

    @property
    def _is_norm(self) -> bool:
        return self.penalty is None and self.regularizer != "l2"

    def dual_value(
        self, V: Array | None = None, *, dual: Array | None = None, multipliers: Array | None = None
    ) -> Array:
        """As of every program; for "l2" and a `Prior`, the objective of V less its certificate."""
        if self._is_norm:
            return super().dual_value(V, dual=dual, multipliers=multipliers)
        if V is None:
            _checks.fail("dual_value", "V, for a regularizer that is no norm", "none")
        return self.objective(V) - self.certificate(V)

    def certificate(
        self,
        z: Array,
        *,
        squared_norm: Scalar | None = None,
        strong_convexity: Scalar | None = None,
        multipliers: Array | None = None,
    ) -> Array:
        """P(V) − min P or more: the duality gap at scaled residuals, round-off included, shape (*batch,).

        In float32 at small β it is some 1e-4 of P above the gap, for the bound on the round-off of products.
        For "l2" and a `Prior` it is that of `LayerProblem`.

        Args:
          z: V, shaped as the variable.
          squared_norm: for "l2" and a `Prior`, as of `LayerProblem`.
          strong_convexity: likewise.
          multipliers: not used.
        """
        if self._is_norm:
            return super().certificate(z)
        known = {"squared_norm": squared_norm, "strong_convexity": strong_convexity}
        return LayerProblem.certificate(self, z, **known)

    def certifier(
        self, *, squared_norm: Scalar | None = None, strong_convexity: Scalar | None = None
    ) -> Any:
        """V ↦ certificate(V)."""
        if self._is_norm:
            return super().certifier(squared_norm=squared_norm)
        known = {"squared_norm": squared_norm, "strong_convexity": strong_convexity}
        return LayerProblem.certifier(self, **known)

    def _dual_norm(self, r, error, multipliers):
        image, off = self.linear_map(r), self._image_error(r, error)
        value = self._norms(image)
        return DualNorm(value * (1 + self._decomposition_error(image)), self._norms(off))

    def _magnitudes(self):
        return self.gated_map.magnitudes()

    def _norms(self, W: Array) -> Array:
        """R° of each program."""
        if self.regularizer == "nuclear":
            return jnp.max(singular_values(jnp.moveaxis(W, -3, -1))[..., 0], axis=-1)
        if self.regularizer == "l1":
            return jnp.max(jnp.abs(W), axis=(-3, -2, -1) if self.joint else (-2, -1))
        own = -2 if self.regularizer == "feature" else -1
        return jnp.max(euclidean_norm(W, (-3, own) if self.joint else (own,)), axis=-1)

    def _decomposition_error(self, W: Array) -> float:
        if self.regularizer != "nuclear":
            return 0.0
        return 8 * max(W.shape[-3], W.shape[-1]) * float(jnp.finfo(W.dtype).eps)
