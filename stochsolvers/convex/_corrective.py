r"""The best network of given hidden units, and its dual point.

    minimise_c  Σ_k ℓ((H c)_k + offset, y_k) + β Σ_j ||c_j||₂,      H = (X U)₊,  c of shape (S, C)

The dual point Θ = −∂ℓ at its optimum satisfies ||Θ (X u_j)₊|| ≤ β for the given units. It is better than
that of a nearly optimal network, which is off by the square root of what its objective lacks.

References:
  Bach 2017 (fully corrective conditional gradients); Beck and Teboulle 2009; O'Donoghue and Candès 2015.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from stochsolvers._typing import Array
from stochsolvers.losses import Loss

_MULTIPLE = 64


def corrected_gradient(
    X: np.ndarray,
    units: np.ndarray,
    y: np.ndarray,
    offset: np.ndarray,
    beta: float,
    loss: Loss,
    *,
    num_iters: int = 4000,
) -> np.ndarray:
    """∂ℓ at the optimum over the outputs of the units, in float64; y of shape (n,) or (C, n)."""
    norms = np.linalg.norm(units, axis=0)
    H = np.maximum(X @ (units[:, norms > 0] / norms[norms > 0]), 0)
    H = np.pad(H, ((0, 0), (0, -H.shape[1] % _MULTIPLE)))
    with jax.enable_x64(True):
        count = jnp.asarray(num_iters)
        return np.asarray(_corrected(H, y, np.broadcast_to(offset, y.shape), beta, loss, count))


@jax.jit
def _corrected(
    H: Array, y: Array, offset: Array, beta: Array, loss: Loss, num_iters: Array
) -> Array:
    """FISTA with restarts."""
    largest = jnp.linalg.norm(H, 2)
    step = 1 / jnp.maximum(loss.smoothness * largest**2, float(np.finfo(np.float64).tiny))

    def gradient_at(c):
        return loss.derivative((H @ c).T.reshape(y.shape) + offset, y)

    def iteration(_, state):
        c, point, t = state
        slope = H.T @ gradient_at(point).reshape(-1, y.shape[-1]).T
        moved = point - step * slope
        norms = jnp.linalg.norm(moved, axis=1, keepdims=True)
        new = moved * jnp.maximum(1 - step * beta / jnp.where(norms > 0, norms, 1), 0)
        t = jnp.where(jnp.sum((point - new) * (new - c)) > 0, 1.0, t)
        after = 0.5 * (1 + jnp.sqrt(1 + 4 * t**2))
        return new, new + (t - 1) / after * (new - c), after

    c = jnp.zeros((H.shape[1], y.size // y.shape[-1]), H.dtype)
    c, *_ = lax.fori_loop(0, num_iters, iteration, (c, c, jnp.ones((), H.dtype)))
    return loss.dual_projection(gradient_at(c), y)
