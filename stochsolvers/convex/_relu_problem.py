"""The convex program of a ReLU network: a gated one with the weights of each pattern in its cone."""

import jax
import jax.numpy as jnp

from stochsolvers import _checks
from stochsolvers._typing import Array, Scalar, value_object
from stochsolvers.convex import _inputs
from stochsolvers.convex._cones import ConeGroupL2, Cones
from stochsolvers.convex._duality import DualNorm, product_round_off
from stochsolvers.convex._gated_map import GatedMap
from stochsolvers.convex._patterns import Patterns
from stochsolvers.convex._program import Program
from stochsolvers.linear_maps import LinearMap
from stochsolvers.losses import Loss, Squares


@value_object
class SignedMap(LinearMap):
    r"""r ↦ (A r, −A r), whose adjoint is (V, W) ↦ A*(V − W).

    Args:
      base: A.
    """

    base: GatedMap

    @property
    def in_shape(self) -> tuple[int, ...]:
        """That of A."""
        return self.base.in_shape

    @property
    def out_shape(self) -> tuple[int, ...]:
        """(2, P, d)."""
        return (2, *self.base.out_shape)

    def __call__(self, x: Array) -> Array:
        """(A r, −A r)."""
        image = self.base(x)
        return jnp.stack([image, -image], axis=-1 - len(self.base.out_shape))

    def adjoint(self, z: Array) -> Array:
        """A*(V − W)."""
        positive, negative = jnp.moveaxis(z, -1 - len(self.base.out_shape), 0)
        return self.base.adjoint(positive - negative)

    def restrict(self, indices: Array) -> "SignedMap":
        """That of A on a subset of the data."""
        return SignedMap(self.base.restrict(indices))

    def squared_norm_bound(self) -> Array:
        """2 ‖A‖²."""
        return 2 * self.base.squared_norm_bound()

    def scaled(self, factor: Scalar) -> "SignedMap":
        """That of c A."""
        return SignedMap(self.base.scaled(factor))


@value_object
class ReLUProblem(Program):
    r"""The convex program of a two-layer ReLU network over patterns D_1, …, D_P.

        minimise_{V, W}  Σ_j ℓ((Σ_i D_i X (v_i − w_i))_j, y_j) + β Σ_i (||v_i||₂ + ||w_i||₂)
        subject to       (2 D_i − I) X v_i ≥ 0,  (2 D_i − I) X w_i ≥ 0

    Over all patterns of X its optimum is that of the network with weight decay,

        min Σ_j ℓ(((X W₁)₊ w₂)_j, y_j) + (β/2) (||W₁||² + ||w₂||²),

    and a solution is a network: neurons v_i/√||v_i|| with output √||v_i||, and w_i/√||w_i|| with
    −√||w_i||. Over fewer patterns it is an upper bound. The variable U = (V, W) has shape (2, P, d); it is a
    `LayerProblem` whose prior is the norm on the cones. For data of K patches the constraints hold for each.

    Args:
      X: data, shape (n, d); (n, K, d) for the sum over K patches.
      y: targets, shape (n,); (C, n) for C programs, one for each output (one-vs-rest).
      patterns: `Patterns` of X.
      beta: β > 0, traced.
      loss: ℓ, of `stochsolvers.losses`.

    Raises:
      ValueError: as of `GatedProblem`, and for losses that couple outputs.

    References:
      Pilanci and Ergen, Neural networks are convex regularizers, 2020, theorem 1; Ergen and Pilanci, Implicit
      convex regularizers of CNN architectures, 2021 (patches).
    """

    def __init__(
        self,
        X: Array,
        y: Array,
        patterns: Patterns,
        beta: Scalar,
        *,
        loss: Loss = Squares(),  # noqa: B008 - immutable
    ):
        _inputs.loss("loss of ReLUProblem", loss)
        if getattr(loss, "axis", -1) != -1:
            _checks.fail("loss of ReLUProblem", "one that couples no outputs", repr(loss))
        X = _inputs.data("X of ReLUProblem", X)
        y = _inputs.targets("y of ReLUProblem", y, X, loss, joint=False)
        linear_map = SignedMap(GatedMap(X, patterns))
        prior = ConeGroupL2(Cones.of(X, patterns.mask), 1.0)
        self._fill(linear_map, y, loss, beta, prior=prior)

    def _of_beta(self, beta):
        return {"beta": beta, "prior": ConeGroupL2(self.cones, beta), "ridge": 0.0}

    @property
    def gated_map(self) -> GatedMap:
        """A, of the program without cones."""
        assert isinstance(self.linear_map, SignedMap)
        return self.linear_map.base

    @property
    def cones(self) -> Cones:
        """K_1, …, K_P."""
        assert isinstance(self.prior, ConeGroupL2)
        return self.prior.cones

    def violation(self, U: Array) -> Array:
        r"""How far U is outside its cones, in units of its largest weight, shape (*batch,); 0 inside.

            max_{i, j} −s_j x_jᵀ u_i / ||x_j|| / max_i ||u_i||,   s_j = ±1 as the pattern has it

        `objective` is +∞ above 256 units of round-off.
        """
        U = self._variable(U)
        size = jnp.max(jnp.sqrt(jnp.sum(U * U, axis=-1)), axis=(-2, -1))
        worst = jnp.max(self.cones.violation(U), axis=(-2, -1))
        return worst / jnp.where(size > 0, size, 1)

    def project(self, U: Array) -> Array:
        """The nearest point inside the cones, shaped as U."""
        return self.cones.project(self._variable(U))[0]

    def predict(self, U: Array, X: Array) -> Array:
        r"""The network's function of new data, Σ_i (x·v_i)₊ − Σ_i (x·w_i)₊, shape (n',) or (C, n').

        Args:
          U: shaped as the variable.
          X: shape (n', d) or (n', K, d), summed over patches.
        """
        X = _inputs.data("data of predict", X).astype(self.dtype)
        if X.ndim != self.X.ndim or X.shape[1:] != self.X.shape[1:]:
            _checks.fail("shape of the data of predict", f"(n, {self.X.shape[1:]})", X.shape)
        U = self._variable(U)
        products = jnp.sum(jax.nn.relu(U @ X.reshape(-1, X.shape[-1]).T), axis=-2)
        values = products[..., 0, :] - products[..., 1, :]
        if X.ndim == 3:
            values = jnp.sum(values.reshape(*values.shape[:-1], *X.shape[:2]), axis=-1)
        return values

    def num_active(self, U: Array) -> Array:
        """The number of neurons, those with v_i ≠ 0 and those with w_i ≠ 0, for each program of the batch."""
        return jnp.sum(jnp.any(self._variable(U) != 0, axis=-1), axis=(-2, -1))

    def certificate(self, z, *, squared_norm=None, strong_convexity=None, multipliers=None):
        r"""A certified gap of the program over these patterns, shape (*batch,), as of `GatedProblem`.

            R°(A θ) = max_i ||Π_{K_i}(±Xᵀ D_i θ)|| ≤ max ||±Xᵀ D_i θ + G_iᵀ a_i||,   G_i = (2 D_i − I) X,

        for any multipliers a ≥ 0. It says nothing of the network unless all patterns are there.

        Args:
          z: U, shaped as the variable; +∞ outside the cones.
          squared_norm: not used.
          strong_convexity: not used.
          multipliers: a, shape (*batch, 2, P, n) for θ = −∂ℓ(A* U, y), with + first; (…, nK) for patches. By
            default those of the projections.
        """
        return super().certificate(z, multipliers=multipliers)

    def _dual_norm(self, r, error, multipliers):
        A, cones = self.linear_map, self.cones
        W = -A(r)
        sizes = self.gated_map.magnitudes()(jnp.abs(r))
        off = product_round_off(self, 2 * self.inputs.shape[-1]) * sizes
        if error is not None:
            off = off + self.gated_map.magnitudes()(error)
        if multipliers is None:
            _, a = cones.project(W)
        else:
            a = jnp.maximum(jnp.asarray(multipliers, self.dtype), 0)
            _checks.trailing("multipliers", a, (2, self.patterns.num, cones.rows.shape[0]))
            norms = jnp.sqrt(jnp.sum(jnp.square(self.X.reshape(-1, self.X.shape[-1])), axis=-1))
            a = a * jnp.expand_dims(norms, range(a.ndim - 1))
        residual = W + cones.combined(a)
        spread = product_round_off(self, 2 * a.shape[-1]) * (a @ jnp.abs(cones.rows))
        off = jnp.expand_dims(off, -3) + spread
        return DualNorm(_largest(residual), _largest(off))

    def _magnitudes(self, V):
        positive, negative = jnp.moveaxis(jnp.abs(V), -3, 0)
        return self.gated_map.magnitudes().adjoint(positive + negative)


def _largest(W: Array) -> Array:
    """The largest norm of a pattern, of each program."""
    return jnp.max(jnp.sqrt(jnp.sum(W * W, axis=-1)), axis=(-2, -1))
