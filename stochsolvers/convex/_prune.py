r"""Fewest neurons: an optimal network in which no contribution to the predictions depends on the others.

With z_j the predictions of neuron j and c_j its penalty, all f ≥ 0 with Σ f_j z_j = Σ z_j are networks of the
same predictions and penalty Σ f_j c_j, linear in f. Along α with Σ α_j z_j = 0, signed so that cᵀα ≥ 0,

    f ← f − t α,   t = min {f_j/α_j : α_j > 0},

the penalty does not rise and a neuron vanishes: at most rank [z_1, …, z_m] ≤ n C remain (Carathéodory).

References:
  Pilanci and Ergen 2020 (m* ≤ n + 1); Mishkin and Pilanci 2023, Optimal sets and solution paths of ReLU
  networks, algorithm 1.
"""

from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np

from stochsolvers import _checks
from stochsolvers.convex import _inputs
from stochsolvers.convex._network import TwoLayer

_Network = TypeVar("_Network", bound=TwoLayer)


def prune(network: _Network, X: Any, *, tol: float = 1e-9) -> _Network:
    """A network of the same predictions on X and no larger penalty, with linearly independent neurons.

    Of an optimal network it is an optimal one of fewest neurons in this sense: none can be left out with the
    others rescaled. New data may be predicted otherwise, as optimal networks do. Not for jit.

    Args:
      network: ReLU or gated, at any scaling of its neurons; the result is balanced.
      X: data, shape (n, d).
      tol: singular values below tol times the largest count as zero.

    Raises:
      ValueError: for data that do not fit, and numbers that are not finite.
    """
    if not isinstance(network, TwoLayer):
        _checks.fail("network to prune", "a Network or a GatedNetwork", type(network).__name__)
    _checks.real_array("X", X)
    _checks.rank("X", X, 2)
    _inputs.finite("X", X)
    _checks.non_negative("tol", tol)
    _checks.rank("tol", tol, 0)
    _inputs.finite_fields("the network to prune", network)
    network = network.balanced().compact()
    if network.width == 0:
        return network
    inner, outer = (np.asarray(size, np.float64) for size in network.sizes())
    hidden = np.asarray(network.neurons(X), np.float64)
    output = np.asarray(network.output, np.float64).reshape(network.width, -1)
    columns = np.einsum("nj,jc->ncj", hidden, output).reshape(-1, network.width)
    _inputs.finite("predictions of the network to prune", columns)
    factors = _fewest(columns, inner * outer, tol)
    root = jnp.asarray(np.sqrt(factors), network.hidden.dtype)
    return network._scaled(root, root).compact()


def _fewest(columns: np.ndarray, costs: np.ndarray, tol: float) -> np.ndarray:
    """f ≥ 0 with columns @ f = Σ columns, cost no larger than Σ costs, and independent active columns."""
    scale = np.linalg.norm(columns, axis=0)
    factors = np.where(scale > 0, 1.0, 0.0)
    used = np.flatnonzero(scale)
    if not used.size:
        return factors
    columns, costs, scale = columns[:, used], costs[used], scale[used]
    f = np.ones(len(used))
    null = _null_space(columns / scale, tol) / scale[:, None]
    while null.shape[1]:
        direction = null[:, 0] / np.max(np.abs(null[:, 0]))
        if costs @ direction < 0 or not np.any(direction > 0):
            direction = -direction
        positive = direction > 1e-12
        ratios = np.full(len(f), np.inf)
        ratios[positive] = f[positive] / direction[positive]
        j = int(np.argmin(ratios))
        f = np.maximum(f - ratios[j] * direction, 0)
        f[j] = 0
        # the other directions without neuron j, so that it stays away
        null = null[:, 1:] - np.outer(direction, null[j, 1:] / direction[j])
        null[j] = 0
        null = null[:, np.max(np.abs(null), axis=0, initial=0) > 0]
    factors[used] = _refined(columns, f)
    return factors


def _null_space(columns: np.ndarray, tol: float) -> np.ndarray:
    _, values, rows = np.linalg.svd(columns, full_matrices=True)
    rank = int(np.sum(values > tol * values[0]))
    return rows[rank:].T


def _refined(columns: np.ndarray, f: np.ndarray) -> np.ndarray:
    """The factors of the active columns by least squares, where that keeps their signs."""
    active = f > 0
    solved, *_ = np.linalg.lstsq(columns[:, active], columns.sum(axis=1), rcond=None)
    if np.all(solved > 0):
        f[active] = solved
    return f
