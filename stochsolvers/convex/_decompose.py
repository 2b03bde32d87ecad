r"""From a gated network to a ReLU network of the same predictions.

On the cone K_i = {u : G_i u ≥ 0}, G_i = (2D_i − I)X, D_i X u = (X u)₊. So with v_i = a_i − b_i, both in K_i,

    Σ_i D_i X v_i = Σ_i (X a_i)₊ − (X b_i)₊,        which costs  β Σ_i (||a_i|| + ||b_i|| − ||v_i||) ≥ 0.

For weights p, q > 0 the pair of least ||a||²/p + ||b||²/q is a projection to a polyhedron, a = c + (1 − w) v,
b = c − w v, w = q/(p + q),

    c = argmin ||c||²   subject to   G c ≥ (−G v)₊ + w G v,

solved by non-negative least squares; p = ||a||, q = ||b|| in turn lowers ||a|| + ||b||. Before anything is
solved, with g_i* the shortest g for which (G_i g)_j ≥ ||x_j||, b = ||v|| g* is feasible: the cost is at most

    2 β Σ_i ||g_i*|| ||v_i||.

References:
  Mishkin, Sahiner and Pilanci 2022, Fast convex optimization for two-layer ReLU networks, section 4 and
  theorem 3.7; Lawson and Hanson 1974, chapter 23 (least distance programming).
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from stochsolvers import _checks
from stochsolvers._typing import value_object
from stochsolvers.convex import _inputs
from stochsolvers.convex._network import Network, relu_network
from stochsolvers.convex._problems import GatedProblem
from stochsolvers.convex._responses import nnls


@value_object
class Decomposition:
    """What `decompose` returns.

    Attributes:
      network: the ReLU network, of the gated network's predictions on the data.
      cost: β Σ_i (||a_i|| + ||b_i|| − ||v_i||): its objective less that of the gated network with the same
        outputs, each output having neurons of its own.
      cost_bound: 2 β Σ_i ||g_i*|| ||v_i|| ≥ cost.
    """

    network: Network
    cost: float
    cost_bound: float


def decompose(problem: GatedProblem, V: Any, *, num_rounds: int = 4) -> Decomposition:
    r"""The ReLU network of a value of the gated program, v_i = a_i − b_i with a_i and b_i in the cone of D_i.

    The gated optimum over all patterns is a lower bound on that of ReLU networks, so that of an optimal V the
    cost bounds how far the network is from optimal. Over sampled patterns nothing of the kind holds. Not for
    jit: one small program on the host, in float64, for each neuron that is not zero.

    Args:
      problem: on data of shape (n, d); its gates must lie inside the cells of their patterns, as sampled and
        enumerated ones do.
      V: its value, shape (P, d) or (C, P, d).
      num_rounds: of p = ||a||, q = ||b||.

    Raises:
      ValueError: for a value of another shape, patches, and patterns whose cone has no interior.
    """
    if not isinstance(problem, GatedProblem):
        _checks.fail("problem of decompose", "a GatedProblem", type(problem).__name__)
    _checks.real_array("the value V", V)
    if jnp.shape(V) != problem.shape:
        _checks.fail("shape of the value V", problem.shape, jnp.shape(V))
    _inputs.finite("the value V", V)
    _checks.rank("data of decompose", problem.X, 2)
    num_rounds = _checks.count("num_rounds", num_rounds)
    X, mask = np.asarray(problem.X, np.float64), np.asarray(problem.patterns.mask)
    values = np.asarray(V, np.float64).reshape(-1, *np.shape(V)[-2:])
    parts = np.zeros((len(values), 2, *values.shape[1:]))
    factors = np.zeros(values.shape[1])
    for i in np.flatnonzero(np.any(values != 0, axis=(0, 2))):
        G = np.where(mask[:, i], 1.0, -1.0)[:, None] * X
        factors[i] = np.linalg.norm(_shortest(G, np.linalg.norm(X, axis=1)))
        for v, pair in zip(values[:, i], parts[:, :, i], strict=True):
            pair[:] = _pair(G, v, num_rounds)
    norms = np.linalg.norm(values, axis=-1)
    beta = float(problem.beta)
    cost = beta * float(np.sum(np.linalg.norm(parts, axis=-1)) - np.sum(norms))
    bound = 2 * beta * float(np.sum(factors * norms))
    shape = parts.shape if np.ndim(V) == 3 else parts.shape[1:]
    return Decomposition(
        relu_network(jnp.asarray(parts.reshape(shape), problem.dtype)), cost, bound
    )


def _pair(G: np.ndarray, v: np.ndarray, num_rounds: int) -> np.ndarray:
    """(a, b) of small ||a|| + ||b|| with a − b = v, G a ≥ 0 and G b ≥ 0."""
    product = G @ v
    if not np.any(v) or np.all(product >= 0):
        return np.stack([v, np.zeros_like(v)])
    if np.all(product <= 0):
        return np.stack([np.zeros_like(v), -v])
    best, weight = np.full((2, len(v)), np.inf), 0.5
    for _ in range(num_rounds):
        c = _shortest(G, np.maximum(-product, 0) + weight * product)
        pair = np.stack([c + (1 - weight) * v, c - weight * v])
        norms = np.linalg.norm(pair, axis=1)
        if norms.sum() >= np.linalg.norm(best, axis=1).sum():
            break
        best, weight = pair, float(norms[1] / norms.sum())
    return best


def _shortest(G: np.ndarray, least: np.ndarray) -> np.ndarray:
    """argmin ||c|| subject to G c ≥ least: of r = argmin ||Eu − e||, u ≥ 0, E = [Gᵀ; leastᵀ], e = (0, 1)."""
    rows = np.linalg.norm(G, axis=1)
    used = rows > 0
    G, least = G[used] / rows[used, None], least[used] / rows[used]
    scale = np.max(np.abs(least), initial=0.0)
    if scale == 0:
        return np.zeros(G.shape[1])
    E = np.concatenate([G.T, least[None] / scale])
    target = np.zeros(len(E))
    target[-1] = 1
    u, _ = nnls(E, target)
    residual = E @ u - target
    if -residual[-1] < 1e-12:
        _checks.fail("pattern to decompose", "a cone with an interior", "one without")
    return -scale * residual[:-1] / residual[-1]
