"""The duality gap of a gated program in float64 on the host, whatever precision it was solved in."""

import functools
import math
from typing import Any

import jax
import numpy as np

from stochsolvers.convex import _inputs
from stochsolvers.losses import Loss, Squares
from stochsolvers.prox import L1, GroupL2, Zero
from stochsolvers.prox._axes import canonical_axes

_ENTRIES = 2**21


def is_concrete(*tree: Any) -> bool:
    """Whether all arrays are known numbers in this process."""
    return all(_inputs.known(leaf) is not None for leaf in jax.tree.leaves(tree))


def certificate(problem: Any, V: Any, s: Any) -> np.ndarray:
    r"""P(V) − D(t s) ≥ P(V) − min P for each program, t ≤ 1 such that t s is feasible, plus round-off.

    Args:
      problem: a `GatedProblem` whose regulariser is a norm or a ridge.
      V: weights, shaped as the variable.
      s: any dual point, shaped as the targets.
    """
    V, s, y = (np.asarray(a, np.float64) for a in (V, s, problem.inputs))
    s = loss_terms(problem.loss, "dual_projection", s, y)
    inner = problem.linear_map.in_shape
    batch = s.shape[: s.ndim - len(inner)]
    images, u = _products(problem, V, s)
    scale = np.ones(batch)
    limit = np.broadcast_to(_gauge(problem, images, len(batch)), batch)
    scale /= np.maximum(limit, 1.0) * (1.0 + 1e-12)
    s = s * scale.reshape(*batch, *[1] * len(inner))
    primal = loss_terms(problem.loss, "value", u, y)
    dual = loss_terms(problem.loss, "conjugate", s, y)
    ridge, penalty = float(problem.ridge), np.zeros(batch)
    if isinstance(problem.prior, Zero):
        squares = _sum(images**2, batch) * scale**2
        penalty = 0.5 * ridge * _sum(V**2, batch) + squares / (2.0 * ridge)
    else:
        gamma, norms = _norms(problem, V, len(batch))
        terms = np.where(norms > 0, np.broadcast_to(gamma, norms.shape), 0.0) * norms
        penalty = terms.sum(tuple(range(1, terms.ndim))).reshape(batch)
    sizes = _sum(np.abs(primal), batch) + _sum(np.abs(dual), batch) + penalty
    gap = _sum(primal, batch) + _sum(dual, batch) + penalty
    bound = np.maximum(gap, 0.0) + 1e-13 * math.sqrt(s.size + V.size) * sizes
    return np.where(np.isnan(bound), np.inf, bound)


def beta_max(problem: Any) -> np.ndarray:
    """R°(A y), of a `GatedProblem` with a norm and squares."""
    y = np.asarray(problem.inputs, np.float64)
    batch = len(problem.batch_shape)
    images, _ = _products(problem, np.zeros(problem.shape), y)
    _, norms = _norms(problem, images, batch, spectral=True)
    return norms.max(tuple(range(1, norms.ndim))).reshape(images.shape[:batch])


def loss_terms(loss: Loss, what: str, *arguments: np.ndarray) -> np.ndarray:
    """Of ℓ, its `value`, `conjugate` or `dual_projection`, in float64."""
    if isinstance(loss, Squares):  # without compiling anything
        first, y = arguments
        if what == "value":
            return 0.5 * (first - y) ** 2
        return first if what == "dual_projection" else first * (y + 0.5 * first)
    with jax.enable_x64(True):
        return np.asarray(_terms_of(loss, what, *arguments))


@functools.partial(jax.jit, static_argnums=1)
def _terms_of(loss: Loss, what: str, *arguments: Any) -> Any:
    return getattr(loss, what)(*arguments)


def _sum(array: np.ndarray, batch: tuple[int, ...]) -> np.ndarray:
    return array.sum(tuple(range(len(batch), array.ndim)))


def _products(problem: Any, V: np.ndarray, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A s and A* V, in blocks of data."""
    X, mask = (np.asarray(a) for a in problem.linear_map._rows())
    patches = problem.X.shape[1] if problem.X.ndim == 3 else 1
    weights = V.reshape(-1, *V.shape[-2:])
    duals = np.repeat(s.reshape(-1, s.shape[-1]), patches, -1)
    images, u = np.zeros(weights.shape), np.zeros(duals.shape)
    size = max(1, _ENTRIES // mask.shape[1])
    for start in range(0, len(X), size):
        rows = slice(start, start + size)
        data, active = X[rows].astype(np.float64), mask[rows].T
        for c, weight in enumerate(weights):
            u[c, rows] = np.where(active, weight @ data.T, 0.0).sum(0)
            images[c] += np.where(active, duals[c, rows], 0.0) @ data
    u = u.reshape(*s.shape, patches).sum(-1)
    return images.reshape(V.shape), u


def _gauge(problem: Any, images: np.ndarray, batch: int) -> np.ndarray:
    """The least c with the image in c dom R*, see `_terms.gauge`."""
    if isinstance(problem.prior, Zero):
        return np.zeros(images.shape[:batch])
    gamma, norms = _norms(problem, images, batch, spectral=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(norms > 0, norms / np.broadcast_to(gamma, norms.shape), 0.0)
    return ratios.max(tuple(range(1, ratios.ndim))).reshape(images.shape[:batch])


def _norms(
    problem: Any, array: np.ndarray, batch: int, spectral: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """γ, and the norms of the groups of each program; of matrices the nuclear or the spectral norm."""
    prior: Any = problem.prior
    flat, gamma = array.reshape(-1, *array.shape[batch:]), np.asarray(prior.gamma, np.float64)
    if isinstance(prior, L1):
        return gamma, np.abs(flat)
    if isinstance(prior, GroupL2):
        axes = canonical_axes(prior.axis, flat.ndim - 1)
        return gamma, np.sqrt((flat**2).sum(tuple(1 + axis for axis in axes), keepdims=True))
    axes = tuple(axis + (axis >= 0) for axis in prior.axes)
    matrices, kind = np.moveaxis(flat, axes, (-2, -1)), 2 if spectral else "nuc"
    norms = np.linalg.norm(matrices, kind, axis=(-2, -1), keepdims=True)
    return gamma, np.moveaxis(norms, (-2, -1), axes)


def cone_certificate(problem: Any, U: Any, s: Any, multipliers: Any) -> np.ndarray:
    r"""The same of a `ReLUProblem`: t ≤ 1 such that ||∓A_iᵀ t s + G_iᵀ t a_i|| ≤ β."""
    U, s, a, X, y = (
        np.asarray(v, np.float64) for v in (U, s, multipliers, problem.X, problem.inputs)
    )
    loss, beta = problem.loss, float(problem.beta)
    patches = X.shape[1] if X.ndim == 3 else 1
    X, mask = X.reshape(-1, X.shape[-1]), np.asarray(problem.patterns.mask)
    mask = mask.reshape(len(X), -1).T
    s = loss_terms(loss, "dual_projection", s, y)
    images = np.where(mask, np.repeat(s, patches, -1)[..., None, :], 0.0) @ X
    sides = np.stack([-images, images], -3) + (np.where(mask, 1.0, -1.0) * np.maximum(a, 0.0)) @ X
    largest = np.linalg.norm(sides, axis=-1).max((-2, -1)) / beta
    s = s / (np.maximum(largest, 1.0) * (1.0 + 1e-12))[..., None]
    products = U @ X.T
    u = np.where(mask, products[..., 0, :, :] - products[..., 1, :, :], 0.0).sum(-2)
    u = u.reshape(*y.shape, patches).sum(-1)
    primal, dual = loss_terms(loss, "value", u, y), loss_terms(loss, "conjugate", s, y)
    penalty = beta * np.linalg.norm(U, axis=-1).sum((-2, -1))
    gap = primal.sum(-1) + penalty + dual.sum(-1)
    sizes = primal.sum(-1) + penalty + np.abs(dual).sum(-1)
    bound = np.maximum(gap, 0.0) + 1e-13 * math.sqrt(U.size + a.size) * sizes
    return np.where(np.isnan(bound), np.inf, bound)
