"""Batch normalisation in a convex program: data replaced by an orthonormal basis of their centred columns."""

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from stochsolvers import _checks
from stochsolvers._typing import Array, value_object
from stochsolvers.convex import _inputs


@value_object
class Whitened:
    r"""Data X̃ = [U, 1] on which a network is one with batch normalisation on X.

    With X − 1 mᵀ = U Σ Qᵀ, Uᵀ U = I, and any weights w of a neuron,

        γ (X − 1 mᵀ) w / ||(X − 1 mᵀ) w|| + α 1 = X̃ v,     v = (γ Σ Qᵀ w / ||Σ Qᵀ w||, α),   ||v||² = γ² + α²:

    the programs of X̃ are those of the network with weight decay on γ, α and the output weights.

    Args:
      data: X̃, shape (n, r + 1).
      mean: m, shape (d,).
      transform: Q Σ⁻¹, shape (d, r).

    References:
      Ergen, Sahiner, Ozturkler, Pauly, Mardani and Pilanci, Demystifying batch normalization in ReLU
      networks, 2022.
    """

    data: Array
    mean: Array
    transform: Array

    def apply(self, X: ArrayLike) -> Array:
        """X̃ of other data, normalised as those of training are, shape (n', r + 1)."""
        _checks.trailing("data of Whitened", X, self.mean.shape)
        centred = jnp.asarray(X, self.data.dtype) - self.mean[None]
        ones = jnp.ones((len(centred), 1), centred.dtype)
        return jnp.concatenate([centred @ self.transform, ones], axis=1)

    def batch_norm(self, v: ArrayLike) -> tuple[Array, Array, Array]:
        """The weights w, scale γ ≥ 0 and shift α of a neuron's batch normalisation.

        A scale γ for unit norms is γ/√n for unit variances. w is Q Σ⁻¹ v₁ of norm one in the fit:
        ||(X − 1 mᵀ) w|| = 1.

        Args:
          v: shape (..., r + 1).

        Returns:
          shapes (..., d), (...) and (...).
        """
        v = jnp.asarray(v, self.data.dtype)
        _checks.trailing("weights of Whitened", v, self.data.shape[1:])
        own, shift = v[..., :-1], v[..., -1]
        scale = jnp.sqrt(jnp.sum(own * own, axis=-1))
        unit = own / jnp.where(scale > 0, scale, 1)[..., None]
        return unit @ self.transform.T, scale, shift


def whitened(X: ArrayLike) -> Whitened:
    """The `Whitened` of data (n, d), which are not traced: their rank is a shape.

    Raises:
      ValueError: for data that do not fit (see `Patterns`), or are all equal.
    """
    X = _inputs.data("data of whitened", X)
    _checks.rank("data of whitened", X, 2)
    values = _inputs.known(X)
    if values is None:
        _checks.fail("data of whitened", "known numbers", "a traced array")
    values = values.astype(np.float64)
    mean = values.mean(axis=0)
    left, sigma, right = np.linalg.svd(values - mean, full_matrices=False)
    round_off = max(X.shape) * float(jnp.finfo(X.dtype).eps) * np.linalg.norm(values, 2)
    rank = int(np.sum(sigma > round_off))
    if rank == 0:
        _checks.fail("data of whitened", "rows that are not all equal", f"{len(values)} equal ones")
    data = np.concatenate([left[:, :rank], np.ones((len(values), 1))], axis=1)
    transform = right[:rank].T / sigma[:rank]
    return Whitened(*(jnp.asarray(a, X.dtype) for a in (data, mean, transform)))
