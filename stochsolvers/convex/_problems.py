"""The convex program of a gated network, which is a layer's problem as it stands."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from stochsolvers import _checks
from stochsolvers._typing import Array, Scalar, static_field, value_object
from stochsolvers.convex import _inputs
from stochsolvers.convex._gated_map import GatedMap
from stochsolvers.convex._patterns import Patterns
from stochsolvers.linear_maps import LinearMap
from stochsolvers.losses import Loss, Squares
from stochsolvers.problems import LayerProblem
from stochsolvers.prox import L1, GroupL2, NuclearNorm, Prior, Zero

REGULARIZERS = ("group", "feature", "l1", "l2", "nuclear")


@value_object
class GatedProblem(LayerProblem):
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

    linear_map: LinearMap = dataclasses.field(init=False)
    inputs: Array = dataclasses.field(init=False)
    _: dataclasses.KW_ONLY
    loss: Loss = dataclasses.field(init=False)
    bias: Array | None = dataclasses.field(init=False)
    prior: Prior = dataclasses.field(init=False)
    ridge: Scalar = dataclasses.field(init=False)
    beta: Array = dataclasses.field(init=False)
    regularizer: Any = static_field(init=False)  # a name; of a prior, the one for β = 1

    def __init__(
        self,
        X: Array,
        y: Array,
        patterns: Patterns,
        beta: Scalar,
        *,
        loss: Loss = Squares(),  # noqa: B008 - immutable
        regularizer: str | Prior = "group",
        joint: bool = False,
    ):
        if not isinstance(loss, Loss):
            _checks.fail("loss of GatedProblem", "an instance of Loss", repr(loss))
        X = _inputs.data("X of GatedProblem", X)
        y = _inputs.targets("y of GatedProblem", y, X, loss, joint=joint)
        _checks.rank("beta", beta, 0)
        _checks.positive("beta", beta)
        linear_map = GatedMap(X, patterns, outputs=len(y) if joint else None)
        prior, ridge = _regularizer(regularizer, beta, joint=joint)
        fields = {
            "linear_map": linear_map,
            "inputs": y,
            "loss": loss,
            "bias": None,
            "prior": prior,
            "ridge": ridge,
            "beta": beta,
            "regularizer": regularizer if isinstance(regularizer, str) else None,
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        self.__post_init__()
        object.__setattr__(self, "beta", jnp.asarray(beta, self.dtype))

    @property
    def X(self) -> Array:  # noqa: N802 - as in the formula
        """The data, shape (n, d) or (n, K, d)."""
        return self.gated_map.X

    @property
    def y(self) -> Array:
        """The targets, shape (n,) or (C, n)."""
        return self.inputs

    @property
    def patterns(self) -> Patterns:
        """The patterns of the data and their gates."""
        return self.gated_map.patterns

    @property
    def gated_map(self) -> GatedMap:
        """A."""
        assert isinstance(self.linear_map, GatedMap)
        return self.linear_map

    @property
    def joint(self) -> bool:
        """Whether all outputs are of one program."""
        return self.gated_map.outputs is not None

    def with_beta(self, beta: Scalar) -> "GatedProblem":
        """The same with another β, of the same structure: nothing is compiled again."""
        _checks.rank("beta", beta, 0)
        _checks.positive("beta", beta)
        beta = jnp.asarray(beta, self.dtype)
        if self.regularizer is None:
            prior, ridge = (beta / self.beta) * self.prior, self.ridge
        else:
            prior, ridge = _regularizer(self.regularizer, beta, joint=self.joint)
        return self._with(beta=beta, prior=prior, ridge=jnp.asarray(ridge, self.dtype))

    def _with(self, **fields: Any) -> "GatedProblem":
        """A copy with other values of some fields."""
        copy = jax.tree.unflatten(jax.tree.structure(self), jax.tree.leaves(self))
        for name, value in fields.items():
            object.__setattr__(copy, name, value)
        return copy

    def predict(self, V: Array, X: Array) -> Array:
        """Σ_i 1[x·g_i ≥ 0] x·v_i for new data, shape (n',) or (C, n').

        Args:
          V: weights, shaped as the variable.
          X: shape (n', d) or (n', K, d).
        """
        X = _inputs.data("data of predict", X).astype(self.dtype)
        return self.gated_map._with(X, self.patterns.apply(X)).adjoint(self._variable(V))

    def num_active(self, V: Array) -> Array:
        """The number of neurons with v_i ≠ 0, for each program of the batch."""
        axes = (-3, -1) if self.joint else -1
        return jnp.sum(jnp.any(self._variable(V) != 0, axis=axes), axis=-1)


def _regularizer(kind: Any, beta: Scalar, *, joint: bool) -> tuple[Prior, Scalar]:
    """β R as a prior and a ridge."""
    if isinstance(kind, Prior):
        return beta * kind, 0.0
    _checks.member("regularizer", kind, REGULARIZERS)
    if kind == "nuclear":
        if not joint:
            _checks.fail("regularizer", "joint=True for 'nuclear', a norm of matrices", joint)
        return NuclearNorm(beta, axes=(-3, -1)), 0.0
    if kind == "l2":
        return Zero(), beta
    if kind == "l1":
        return L1(beta), 0.0
    own = -1 if kind == "group" else -2
    return GroupL2(beta, axis=(-3, own) if joint else own), 0.0
