r"""The cones of activation patterns, K_i = {u : (2 D_i − I) X u ≥ 0}, and the group norm on them."""

import abc
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from stochsolvers import _linalg
from stochsolvers._typing import Array, Scalar, value_object
from stochsolvers.prox import Prior, _balls
from stochsolvers.prox._base import finite_where

_MAX_ITERS = 20_000  # of a projection; some tens are the rule


class Cones(abc.ABC):
    r"""K_i = {u : G_i u ≥ 0} for i = 1, …, P, with unit rows of G_i, or rows of zeros."""

    @property
    @abc.abstractmethod
    def num_rows(self) -> int:
        """The number of rows of each G_i."""

    @abc.abstractmethod
    def products(self, V: Array) -> Array:
        """G_i v_i, shape (..., P, d) to (..., P, rows)."""

    @abc.abstractmethod
    def combined(self, a: Array) -> Array:
        """G_iᵀ a_i, shape (..., P, rows) to (..., P, d)."""

    @abc.abstractmethod
    def magnitudes(self, a: Array) -> Array:
        """|G_i|ᵀ a_i for a ≥ 0."""

    @abc.abstractmethod
    def gram(self, weights: Array) -> Array:
        """G_iᵀ diag(weights) G_i, shape (..., P, rows) to (..., P, d, d)."""

    @abc.abstractmethod
    def squared_norm(self) -> Array:
        """max_i ‖G_i‖²."""

    @abc.abstractmethod
    def row_norms(self) -> Array:
        """The norms by which the rows were divided; they broadcast to (P, rows)."""

    def astype(self, dtype: DTypeLike) -> Self:
        """The cones with numbers of another dtype."""

        def cast(leaf):
            return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

        return jax.tree.map(cast, self)

    def violation(self, V: Array) -> Array:
        """max_j (−G_i v_i)_j, or 0: the distance to the farthest half-space, shape (..., P)."""
        return jnp.maximum(jnp.max(-self.products(V), axis=-1), 0)

    def project(
        self, V: Array, *, tol: Scalar | None = None, max_iters: Any = _MAX_ITERS
    ) -> tuple[Array, Array]:
        r"""Π_K(V) and multipliers a ≥ 0 with Π_K(V)_i = v_i + G_iᵀ a_i.

        min_{a ≥ 0} ½||v_i + G_iᵀ a_i||² by accelerated projected gradient steps that restart where the step
        turns back, until max |min(a, G_i u_i)| ≤ tol ||v_i||. A projection that is zero up to round-off is
        zero. For any a ≥ 0, ||Π_K(v_i)|| ≤ ||v_i + G_iᵀ a_i||.

        Differentiable, also in the rows of G_i, where no row with (G_i u_i)_j = 0 has the multiplier 0;
        multipliers are held.

        Args:
          V: shape (..., P, d).
          tol: 16 units of round-off by default.
          max_iters: of steps, traced.
        """
        eps = float(jnp.finfo(V.dtype).eps)
        accuracy = jnp.asarray(16 * eps if tol is None else tol, V.dtype)
        return _project(self, V, accuracy, jnp.asarray(max_iters))


@jax.custom_jvp
def _projection(cones: Cones, V: Array, accuracy: Array, max_iters: Array) -> tuple[Array, Array]:
    eps = float(jnp.finfo(V.dtype).eps)
    size = _balls.weighted_norm((V.ndim - 1,), V, jnp.ones((1,) * V.ndim, V.dtype))
    unit = V / jnp.where(size > 0, size, 1)
    constant = jnp.maximum(cones.squared_norm() * (1 + 8 * eps), 1)

    def unfinished(carry):
        return (carry[0] < max_iters) & ~jnp.all(carry[-1])

    def step(carry):
        k, a, ahead, t, done = carry
        slope = cones.products(unit + cones.combined(ahead))
        moved = jax.nn.relu(ahead - slope / constant)
        done |= jnp.max(jnp.abs(jnp.minimum(ahead, slope)), -1, keepdims=True) <= accuracy
        back = jnp.sum((ahead - moved) * (moved - a), axis=-1, keepdims=True) > 0
        following = 0.5 * (1 + jnp.sqrt(1 + 4 * t * t))
        momentum = jnp.where(back, 0, (t - 1) / following)
        further = jax.nn.relu(moved + momentum * (moved - a))
        a, ahead = jnp.where(done, ahead, moved), jnp.where(done, ahead, further)
        return k + 1, a, ahead, jnp.where(back, 1, following), done

    start = jnp.zeros((*V.shape[:-1], cones.num_rows), V.dtype)
    ones = jnp.ones_like(size)
    carry = (jnp.zeros((), max_iters.dtype), start, start, ones, ones < 0)
    a = lax.while_loop(unfinished, step, carry)[2]
    u = unit + cones.combined(a)
    small = jnp.sqrt(jnp.sum(u * u, axis=-1, keepdims=True)) <= 4 * accuracy
    return jnp.where(small, 0, u) * size, a * size


@_projection.defjvp
def _projection_jvp(primals, tangents):
    """With the rows S of positive multipliers, G_S u = 0 and u = v + G_Sᵀ a, differentiated; a is held.

    du = Q (dv + dGᵀ a) − (G_Sᵀ G_S)⁺ G_Sᵀ (dG u)_S,   Q the projection to the null space of G_S
    """
    (cones, V, *_), (moved, direction, *_) = primals, tangents
    u, a = _projection(*primals)
    active = (a > 0).astype(V.dtype)
    _, turned = jax.jvp(lambda c: c.products(u), (cones,), (moved,))
    _, pulled = jax.jvp(lambda c: c.combined(a), (cones,), (moved,))
    values, vectors = _linalg.eigh(cones.gram(active))
    round_off = 64 * values.shape[-1] * float(jnp.finfo(V.dtype).eps)
    spanned = values > round_off * jnp.maximum(values[..., -1:], 1)
    inverse = jnp.where(spanned, 1 / jnp.where(spanned, values, 1), 0)

    def along(kept, w):
        inner = jnp.einsum("...ij,...i->...j", vectors, w, precision="highest")
        return jnp.einsum("...ij,...j->...i", vectors, kept * inner, precision="highest")

    free = along((~spanned).astype(V.dtype), direction + pulled)
    return (u, a), (free - along(inverse, cones.combined(active * turned)), jnp.zeros_like(a))


_project = jax.jit(_projection)


def _unit_rows(rows: Array) -> tuple[Array, Array]:
    """Rows divided by their norms, zeros left, and the norms (..., rows)."""
    scale = lax.stop_gradient(jnp.max(jnp.abs(rows), axis=-1, keepdims=True))
    scaled = rows / jnp.where(scale > 0, scale, 1)
    squares = jnp.sum(scaled * scaled, axis=-1, keepdims=True)
    norms = jnp.sqrt(jnp.where(squares > 0, squares, 1))
    return scaled / norms, jnp.where(squares > 0, scale * norms, 0)[..., 0]


@value_object
class PatternCones(Cones):
    r"""G_i = (2 D_i − I) X, the cones of activation patterns.

    Args:
      rows: X with unit rows, shape (n, d); all patches of convolutional data.
      norms: of the rows of X, shape (n,).
      mask: booleans (n, P).
    """

    rows: Array
    norms: Array
    mask: Array

    @classmethod
    def of(cls, X: Array, mask: Array) -> "PatternCones":
        """The cones of data (n, d) or (n, K, d)."""
        rows, norms = _unit_rows(X.reshape(-1, X.shape[-1]))
        return cls(rows, norms, mask.reshape(-1, mask.shape[-1]))

    @property
    def num_rows(self) -> int:
        """n, or n K for patches."""
        return self.rows.shape[0]

    def products(self, V: Array) -> Array:
        """G_i v_i."""
        products = jnp.matmul(V, self.rows.T, precision="highest")
        return jnp.where(self._lifted(V.ndim), products, -products)

    def combined(self, a: Array) -> Array:
        """G_iᵀ a_i."""
        signed = jnp.where(self._lifted(a.ndim), a, -a)
        return jnp.matmul(signed, self.rows, precision="highest")

    def magnitudes(self, a: Array) -> Array:
        """|G_i|ᵀ a_i."""
        return a @ jnp.abs(self.rows)

    def gram(self, weights: Array) -> Array:
        """Xᵀ diag(weights) X."""
        return jnp.einsum("nd,...n,ne->...de", self.rows, weights, self.rows, precision="highest")

    def squared_norm(self) -> Array:
        """‖X‖², that of every G_i."""
        gram = jnp.matmul(self.rows.T, self.rows, precision="highest")
        return jnp.linalg.eigvalsh(gram)[-1]

    def row_norms(self) -> Array:
        """Those of X."""
        return self.norms

    def _lifted(self, ndim: int) -> Array:
        return jnp.expand_dims(self.mask.T, range(ndim - 2))


@value_object
class PolyhedralCones(Cones):
    """Cones of any matrices.

    Args:
      matrices: G_i with unit rows, shape (P, rows, d).
      norms: by which the rows were divided, shape (P, rows).
    """

    matrices: Array
    norms: Array

    @classmethod
    def of(cls, matrices: Array) -> "PolyhedralCones":
        """The cones of matrices with rows of any norm."""
        return cls(*_unit_rows(matrices))

    @property
    def num_rows(self) -> int:
        """Of each matrix."""
        return self.matrices.shape[1]

    def products(self, V: Array) -> Array:
        """G_i v_i."""
        return jnp.einsum("pnd,...pd->...pn", self.matrices, V, precision="highest")

    def combined(self, a: Array) -> Array:
        """G_iᵀ a_i."""
        return jnp.einsum("pnd,...pn->...pd", self.matrices, a, precision="highest")

    def magnitudes(self, a: Array) -> Array:
        """|G_i|ᵀ a_i."""
        return jnp.einsum("pnd,...pn->...pd", jnp.abs(self.matrices), a)

    def gram(self, weights: Array) -> Array:
        """G_iᵀ diag(weights) G_i."""
        G = self.matrices
        return jnp.einsum("pnd,...pn,pne->...pde", G, weights, G, precision="highest")

    def squared_norm(self) -> Array:
        """max_i ‖G_i‖², or more: the largest number of rows, each a unit vector."""
        return jnp.asarray(self.num_rows, self.matrices.dtype)

    def row_norms(self) -> Array:
        """Those that the rows had."""
        return self.norms


@value_object
class ConeGroupL2(Prior):
    r"""g(U) = γ Σ_i ||u_i||₂ if u_i ∈ K_i for all i, else ∞: prox(V)_i = shrink(Π_{K_i}(v_i), ηγ).

    g* is the indicator of ||Π_{K_i}(w_i)|| ≤ γ. Points are inside the cones up to 256 units of round-off of
    the largest ||u_i||. The projection is iterative (see `Cones.project`).

    Args:
      cones: K_1, …, K_P of variables (..., P, d).
      gamma: γ ≥ 0, a number, traced.
    """

    cones: Cones
    gamma: ArrayLike = 1.0
    separable: ClassVar[bool] = False

    def _times(self, factor):
        return ConeGroupL2(self.cones, self.gamma * factor)

    def _gamma(self, like):
        return jnp.asarray(self.gamma, like.dtype)

    def _weight_shape(self, like):
        return (*like.shape[:-1], 1)

    def _value(self, u):
        tolerance = 256 * float(jnp.finfo(u.dtype).eps)
        gamma = jnp.broadcast_to(self._gamma(u), self._weight_shape(u))
        norms = _balls.weighted_norm((u.ndim - 1,), u, jnp.ones_like(gamma))
        worst = self.cones.astype(u.dtype).violation(u)
        inside = jnp.max(worst) <= tolerance * jnp.max(norms)
        return jnp.where(inside, jnp.sum(gamma * norms), jnp.inf)

    def _prox(self, v, step):
        u, _ = self.cones.astype(v.dtype).project(v)
        return _balls.shrink((v.ndim - 1,), u, step * self._gamma(v))

    def _conjugate(self, w):
        slack = 1 + 256 * float(jnp.finfo(w.dtype).eps)
        u, _ = self.cones.astype(w.dtype).project(w)
        norms = jnp.sqrt(jnp.sum(u * u, axis=-1))
        return finite_where(norms <= slack * self._gamma(w), 0, w)

    def _dual_projection(self, w, margin):
        u, _ = self.cones.astype(w.dtype).project(w)
        radius = jax.nn.relu(self._gamma(w) - margin)
        return (w - u) + _balls.project((w.ndim - 1,), u, radius)
