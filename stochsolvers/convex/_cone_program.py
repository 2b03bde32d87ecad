"""Convex programs whose weights lie in cones, one for each pattern, with either sign."""

import jax.numpy as jnp

from stochsolvers import _checks
from stochsolvers._typing import Array, Scalar, static_field, value_object
from stochsolvers.convex._cones import ConeGroupL2, Cones
from stochsolvers.convex._duality import DualNorm, euclidean_norm, product_round_off
from stochsolvers.convex._program import Program
from stochsolvers.linear_maps import LinearMap


@value_object
class SignedMap(LinearMap):
    r"""r ↦ (A r, s A r), whose adjoint is (V, W) ↦ A*(V + s W).

    Args:
      base: A.
      sign: s, −1 or 1; with 1 and an A of entries ≥ 0 it has the sizes of the entries of that with −1.
    """

    base: LinearMap
    sign: int = static_field(default=-1, kw_only=True)

    @property
    def in_shape(self) -> tuple[int, ...]:
        """That of A."""
        return self.base.in_shape

    @property
    def out_shape(self) -> tuple[int, ...]:
        """(2, P, d)."""
        return (2, *self.base.out_shape)

    def __call__(self, x: Array) -> Array:
        """(A r, s A r)."""
        image = self.base(x)
        return jnp.stack([image, self.sign * image], axis=-1 - len(self.base.out_shape))

    def adjoint(self, z: Array) -> Array:
        """A*(V + s W)."""
        first, second = jnp.moveaxis(z, -1 - len(self.base.out_shape), 0)
        return self.base.adjoint(first + self.sign * second)

    def restrict(self, indices: Array) -> "SignedMap":
        """That of A on a subset of the data."""
        return SignedMap(self.base.restrict(indices), sign=self.sign)

    def squared_norm_bound(self) -> Array | None:
        """2 ‖A‖²."""
        bound = self.base.squared_norm_bound()
        return None if bound is None else 2 * bound

    def scaled(self, factor: Scalar) -> "SignedMap":
        """That of c A."""
        return SignedMap(self.base.scaled(factor), sign=self.sign)


@value_object
class ConeProgram(Program):
    """A `Program` in U = (V, W) with v_i, w_i ∈ K_i and the norms Σ_i (||v_i||₂ + ||w_i||₂)."""

    def _of_beta(self, beta):
        cones = self.prior.cones.astype(beta.dtype)  # pyright: ignore[reportAttributeAccessIssue]
        return {"beta": beta, "prior": ConeGroupL2(cones, beta), "ridge": 0.0}

    @property
    def cones(self) -> Cones:
        """K_1, …, K_P."""
        assert isinstance(self.prior, ConeGroupL2)
        return self.prior.cones

    @property
    def base_map(self) -> LinearMap:
        """A, of the program without signs and cones."""
        assert isinstance(self.linear_map, SignedMap)
        return self.linear_map.base

    def violation(self, U: Array) -> Array:
        r"""How far U is outside its cones, in units of its largest weight, shape (*batch,); 0 inside.

            max_{i, j} −(G_i u_i)_j / ||(G_i)_j|| / max_i ||u_i||,      of a ReLU network G_i = (2 D_i − I) X

        `objective` is +∞ above 256 units of round-off.
        """
        U = self._variable(U)
        size = self._largest(U)
        worst = jnp.max(
            self.cones.violation(U), axis=tuple(range(len(self.batch_shape), U.ndim - 1))
        )
        return worst / jnp.where(size > 0, size, 1)

    def project(self, U: Array) -> Array:
        """The nearest point inside the cones, shaped as U."""
        return self.cones.project(self._variable(U))[0]

    def num_active(self, U: Array) -> Array:
        """The number of neurons, those with v_i ≠ 0 and those with w_i ≠ 0, for each program of the batch."""
        return self.sum(jnp.any(self._variable(U) != 0, axis=-1))

    def certificate(self, z, *, squared_norm=None, strong_convexity=None, multipliers=None):
        r"""A certified gap of the program over these patterns, shape (*batch,), as of `GatedProblem`.

            R°(A θ) = max_i ||Π_{K_i}(±A_iᵀ θ)|| ≤ max ||±A_iᵀ θ + G_iᵀ a_i||,      A_i = D_i X,

        for any multipliers a ≥ 0. It says nothing of the network unless all patterns are there.

        Args:
          z: U, shaped as the variable; +∞ outside the cones.
          squared_norm: not used.
          strong_convexity: not used.
          multipliers: a, shape (*batch, 2, P, rows of G_i) for θ = −∂ℓ(A* U, y), with + first. By default
            those of the projections.
        """
        return super().certificate(z, multipliers=multipliers)

    def _dual_norm(self, r, error, multipliers):
        cones, W = self.cones, -self.linear_map(r)
        if multipliers is None:
            _, a = cones.project(W)
        else:
            a = jnp.maximum(jnp.asarray(multipliers, self.dtype), 0)
            _checks.trailing("multipliers", a, (*W.shape[:-1], cones.num_rows))
            norms = cones.row_norms()
            a = a * jnp.expand_dims(norms, range(a.ndim - norms.ndim))
        residual = W + cones.combined(a)
        spread = product_round_off(self, 2 * cones.num_rows) * cones.magnitudes(a)
        off = self._image_error(r, error) + spread
        return DualNorm(self._largest(residual), self._largest(off))

    def _largest(self, W: Array) -> Array:
        """The largest norm of a pattern, of each program."""
        norms = euclidean_norm(W, (-1,))
        return jnp.max(norms, axis=tuple(range(len(self.batch_shape), norms.ndim)))
