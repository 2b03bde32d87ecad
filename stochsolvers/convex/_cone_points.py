"""Points inside the cones of a ReLU program, near any point: a projection and a step along the gates."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from stochsolvers._typing import Array


class Inside(NamedTuple):
    r"""What the cones {u : G_i u ≥ 0} need, G_i = (2 D_i − I) X.

    Attributes:
      signs: 2D − 1, shape (P, n).
      gates: g_i, unit vectors, shape (P, d).
      margins: G_i g_i ≥ 0, shape (P, n).
      rows: Q with X = Q Rᵀ and QᵀQ = I, shape (n, d); 0 where X has no range.
      back: of shape (d, d); Q = X back.
      curvature: ‖Q‖², 1 but for round-off.
    """

    signs: Array
    gates: Array
    margins: Array
    rows: Array
    back: Array
    curvature: Array

    @classmethod
    def of(cls, problem: Any, gram: Array) -> "Inside":
        """Of a `ReLUProblem` and XᵀX."""
        X, mask, dtype = problem.X, problem.patterns.mask, problem.dtype
        signs = jnp.where(mask.T, 1.0, -1.0).astype(dtype)
        gates = problem.patterns.gates.T.astype(dtype)
        norms = jnp.sqrt(jnp.sum(gates**2, -1, keepdims=True))
        gates = gates / jnp.where(norms > 0, norms, 1.0)
        values, vectors = jnp.linalg.eigh(gram)
        least = 64.0 * len(gram) * float(jnp.finfo(dtype).eps) * jnp.max(values)
        kept = values > least
        inverse = jnp.where(kept, 1.0 / jnp.sqrt(jnp.where(kept, values, 1.0)), 0.0)
        back = vectors * inverse[None]
        rows = jnp.matmul(X, back, precision="highest")
        curvature = jnp.linalg.eigvalsh(jnp.matmul(rows.T, rows, precision="highest"))[-1]
        margins = signs * (gates @ X.T)
        return cls(signs, gates, margins, rows, back, jnp.maximum(curvature, 1.0))


def projected(inside: Inside, Z: Array, products: Array, max_steps: Array | int) -> Array:
    r"""About argmin ||X(u_i − z_i)|| subject to G_i u_i ≥ 0, for every pattern.

    With u = z + (XᵀX)⁺ G_iᵀ a it is min_{a ≥ 0} ½ ||Qᵀ X z + Qᵀ (2 D_i − I) a||², whose steps are of length
    1 whatever X: accelerated projected gradient steps, restarted where they turn back.

    Args:
      inside: the cones.
      Z: shape (..., P, d).
      products: X z_i, shape (..., P, n).
      max_steps: traced.
    """
    signs, Q = spread(inside.signs, products.ndim), inside.rows
    accuracy = 16.0 * float(jnp.finfo(Z.dtype).eps)
    accuracy = accuracy * jnp.max(jnp.abs(products), -1, keepdims=True)
    start = jnp.zeros_like(products)

    def unfinished(carry):
        return (carry[0] < max_steps) & ~carry[-1]

    def step(carry):
        k, a, ahead, t, _ = carry
        slope = signs * (products + ((signs * ahead) @ Q) @ Q.T)
        moved = jax.nn.relu(ahead - slope / inside.curvature)
        done = jnp.all(jnp.abs(jnp.minimum(ahead, slope)) <= accuracy)
        turned = jnp.sum((ahead - moved) * (moved - a), -1, keepdims=True) > 0
        following = 0.5 * (1.0 + jnp.sqrt(1.0 + 4.0 * t * t))
        momentum = jnp.where(turned, 0.0, (t - 1.0) / following)
        further = jax.nn.relu(moved + momentum * (moved - a))
        return k + 1, moved, further, jnp.where(turned, 1.0, following), done

    ones = jnp.ones_like(accuracy)
    carry = (jnp.zeros((), int), start, start, ones, jnp.zeros((), bool) & jnp.any(ones < 0))
    a = lax.while_loop(unfinished, step, carry)[1]
    return Z + ((signs * a) @ Q) @ inside.back.T


def feasible(problem: Any, inside: Inside, Z: Array, products: Array) -> tuple[Array, Array, Array]:
    """Z moved into the cones along the gates, t_i = max_j −(G z)_ij / (G g)_ij; its A* and its objective."""
    info = jnp.finfo(problem.dtype)
    signed = spread(inside.signs, products.ndim) * products
    short = jnp.maximum(-signed, 0.0)
    margins = spread(inside.margins, products.ndim)
    steps = jnp.max(short / jnp.maximum(margins, 1e3 * float(info.tiny)), -1)
    active = jnp.any(Z != 0, -1)
    steps = jnp.where(active, steps * (1.0 + 8.0 * float(info.eps)), 0.0)[..., None]
    moved = Z + steps * spread(inside.gates, Z.ndim)
    u = gated_sum(inside.signs, products + steps * (spread(inside.signs, Z.ndim) * margins))
    penalty = problem.beta * problem.sum(jnp.sqrt(jnp.sum(moved**2, -1)))
    objective = 0.5 * problem.sum((u - problem.inputs) ** 2) + penalty
    return moved, u, jnp.where(jnp.isfinite(objective), objective, jnp.inf)


def gated_sum(signs: Array, products: Array) -> Array:
    """A*(V − W) = Σ_i D_i X (v_i − w_i) of X v_i and X w_i, shape (..., 2, P, n)."""
    both = products[..., 0, :, :] - products[..., 1, :, :]
    return jnp.sum(spread(jnp.maximum(signs, 0.0), both.ndim) * both, -2)


def spread(array: Array, ndim: int) -> Array:
    """An array (P, n) or (P, d) with so many axes."""
    return jnp.expand_dims(array, tuple(range(ndim - array.ndim)))
