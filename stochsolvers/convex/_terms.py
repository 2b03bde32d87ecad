r"""The duality gap of a gated program from products that its solvers have anyway.

    min_V Σ ℓ(A* V, y) + R(V)  ≥  D(s) = −Σ ℓ*(s, y) − R*(−A s)        for every s

With r = ∂ℓ(u) at any u, g = A r and a norm R, every s = t r with t ≤ 1/gauge(g) is feasible, where gauge is
the dual norm, for R = β Σ_i ||v_i|| the number max_i ||g_i|| / β. With cones, which come with both signs of
A, it is max_i ||Π_{K_i}(g_i)|| / β. With a ridge, R* = ||·||²/(2 λ).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from stochsolvers import _linalg
from stochsolvers._typing import Array
from stochsolvers.convex._cones import ConeGroupL2
from stochsolvers.losses import Squares
from stochsolvers.problems import LayerProblem
from stochsolvers.prox import L1, GroupL2, NuclearNorm, Zero, _balls
from stochsolvers.prox._spectra import scaled


class Dual(NamedTuple):
    """A dual point s, shaped as the targets, and D(s) for each program, shape (*batch,)."""

    value: Array
    point: Array


def expanded(numbers: Array, like: Array) -> Array:
    """A number for each program, with axes of size 1 for the others of an array with the batch axes first."""
    return jnp.expand_dims(numbers, tuple(range(jnp.ndim(numbers), like.ndim)))


def has_gauge(problem: LayerProblem) -> bool:
    """Whether the regulariser is a norm or a ridge, whose D(s) costs nothing beside A s."""
    prior = problem.prior
    if isinstance(prior, NuclearNorm):
        return prior.weights is None
    return isinstance(prior, L1 | GroupL2 | ConeGroupL2 | Zero)


def gauge(problem: LayerProblem, image: Array, error: Array | float = 0.0) -> Array:
    """The least c ≥ 0 with image ∈ c dom R*, for each program; 0 for a ridge.

    Args:
      problem: the program.
      image: shaped as the variable.
      error: by how much the Euclidean norm of a group of the image may be off, shape (*batch,).
    """
    prior: Any = problem.prior
    if isinstance(prior, Zero):
        return jnp.zeros(problem.batch_shape, image.dtype)
    norms, weights = jax.vmap(_norms, (None, 0))(prior, _flat(problem, image))
    error = jnp.broadcast_to(jnp.asarray(error, image.dtype), problem.batch_shape).reshape(-1)
    error = jnp.expand_dims(error, tuple(range(1, norms.ndim)))
    norms = norms + error
    worst = jnp.where(norms > 0, norms / weights, 0.0)
    return jnp.max(worst, axis=tuple(range(1, norms.ndim))).reshape(problem.batch_shape)


def _flat(problem: LayerProblem, array: Array) -> Array:
    return array.reshape(-1, *problem.linear_map.out_shape)


def _norms(prior: Any, image: Array) -> tuple[Array, Array]:
    """Norms of the groups of one program, and γ, of one shape."""
    if isinstance(prior, L1):
        norms, weights = jnp.abs(image), prior._gamma(image)
    elif isinstance(prior, GroupL2):
        norms = _balls.weighted_norm(
            prior._axes(image), image, jnp.ones((1,) * image.ndim, image.dtype)
        )
        weights = prior._gamma(image)
    elif isinstance(prior, ConeGroupL2):
        inside, _ = prior.cones.project(image)
        norms = jnp.sqrt(jnp.sum(inside**2, -1))
        weights = prior._gamma(image)
    else:
        matrices, scale = scaled(_matrices(prior, image))
        eigenvalues = jnp.maximum(_linalg.eigvalsh(gram(matrices))[..., -1], 0.0)
        norms = jnp.sqrt(eigenvalues) * scale[..., 0]
        weights = prior._threshold(prior._gamma(image), image)[..., 0]
    return norms, jnp.broadcast_to(weights, norms.shape)


def _matrices(prior: NuclearNorm, array: Array) -> Array:
    """Matrices (..., m, n) with m ≤ n."""
    matrices = jnp.moveaxis(array, prior.axes, (-2, -1))
    wide = matrices.shape[-2] <= matrices.shape[-1]
    return matrices if wide else jnp.swapaxes(matrices, -2, -1)


def gram(matrices: Array) -> Array:
    """M Mᵀ of matrices (..., m, n)."""
    return jnp.matmul(matrices, jnp.swapaxes(matrices, -2, -1), precision="highest")


def regularizer(problem: LayerProblem, V: Array) -> Array:
    """R(V) for each program, the ridge with it."""
    if isinstance(problem.prior, Zero):
        return 0.5 * problem.sum((problem.ridge * V) * V)
    return problem.prior_value(V)


def prox(problem: LayerProblem, point: Array, step: Array) -> tuple[Array, Array]:
    r"""V = argmin_V ½||V − W||² + η R(V), and R(V) for each program.

    Of a ridge λ it is W / (1 + ηλ).

    Args:
      problem: the program.
      point: W, shaped as the variable.
      step: η > 0 for each program, shape (*batch,).
    """
    step, prior = expanded(step, point), problem.prior
    if isinstance(prior, Zero):  # else there is no ridge
        point = point / (1.0 + step * problem.ridge)
    if isinstance(prior, NuclearNorm) and prior.weights is None:
        V, terms = _shrunk_matrices(prior, point, step)
    elif isinstance(prior, GroupL2):
        V, terms = _shrunk_groups(prior, point, step)
    elif isinstance(prior, ConeGroupL2):
        V = prior.prox(point, step)
        terms = prior._gamma(V) * jnp.sqrt(jnp.sum(V**2, -1))
    elif isinstance(prior, Zero):
        V, terms = point, 0.5 * problem.ridge * point**2
    else:
        V = prior.prox(point, step)
        return V, regularizer(problem, V)
    return V, problem.sum(terms)


def _shrunk_groups(prior: GroupL2, point: Array, step: Array) -> tuple[Array, Array]:
    """max(1 − ηγ/||W_G||, 0) W_G, and γ times the norms that are left."""
    norms = jnp.sqrt(jnp.sum(point**2, prior._axes(point), keepdims=True))
    gamma = jnp.broadcast_to(prior._gamma(point), norms.shape)
    left = jnp.maximum(norms - step * gamma, 0.0)
    unit = point / jnp.where(left > 0, norms, 1.0)
    V = left * unit
    return V, gamma * (V * unit)


def _shrunk_matrices(prior: NuclearNorm, point: Array, step: Array) -> tuple[Array, Array]:
    r"""U max(1 − ηγ/√Λ, 0) Uᵀ W of each W Wᵀ = U Λ Uᵀ, m × m; and γ times its nuclear norm.

    The singular values above the threshold, which are all that is left, come with their accuracy.
    """
    matrices = _matrices(prior, point)
    eigenvalues, U = _linalg.eigh(gram(matrices))
    sigma = jnp.sqrt(jnp.maximum(eigenvalues, 0.0))
    gamma = jnp.broadcast_to(prior._gamma(point), _reduced(point, prior.axes))
    threshold = jnp.moveaxis(jnp.broadcast_to(step * gamma, gamma.shape), prior.axes, (-2, -1))[
        ..., 0
    ]
    left = jnp.maximum(sigma - threshold, 0.0)
    keep = left / jnp.where(left > 0, sigma, 1.0)
    inner = jnp.matmul(jnp.swapaxes(U, -2, -1), matrices, precision="highest")
    result = jnp.matmul(U * keep[..., None, :], inner, precision="highest")
    if point.shape[prior.axes[0]] > point.shape[prior.axes[1]]:
        result = jnp.swapaxes(result, -2, -1)
    values = jnp.moveaxis(gamma, prior.axes, (-2, -1))[..., 0] * left
    return jnp.moveaxis(result, (-2, -1), prior.axes), values


def _reduced(like: Array, axes: tuple[int, int]) -> tuple[int, ...]:
    chosen = {axis % like.ndim for axis in axes}
    return tuple(1 if axis in chosen else n for axis, n in enumerate(like.shape))


def dual(problem: LayerProblem, residual: Array, image: Array) -> Dual:
    """The best D(t r) over t where it is known in closed form, for squares; else that of the largest t ≤ 1.

    Args:
      problem: the program.
      residual: r = ∂ℓ/∂u at any u, shaped as the targets.
      image: A r.
    """
    y = problem.inputs
    limit = gauge(problem, image)
    longest = jnp.where(limit > 0, 1.0 / jnp.where(limit > 0, limit, 1.0), jnp.inf)
    pulled = _ridge_conjugate(problem, image)
    if isinstance(problem.loss, Squares):
        slope, curve = jax.vmap(problem.sum)(jnp.stack([y * residual, residual**2]))
        curve += 2.0 * pulled
        t = jnp.clip(-slope / jnp.where(curve > 0, curve, 1.0), 0.0, longest)
        return Dual(-t * (slope + 0.5 * t * curve), expanded(t, residual) * residual)
    t = jnp.minimum(longest, 1.0)
    point = expanded(t, residual) * residual
    value = -problem.sum(problem.loss.conjugate(point, y)) - t**2 * pulled
    return Dual(jnp.where(jnp.isnan(value), -jnp.inf, value), point)


def _ridge_conjugate(problem: LayerProblem, image: Array) -> Array:
    """||w||²/(2λ) where the ridge is all of the regulariser, else 0."""
    if not isinstance(problem.prior, Zero):
        return jnp.zeros(problem.batch_shape, image.dtype)
    ridge = problem.ridge
    return problem.sum(image**2) / (2.0 * jnp.where(ridge > 0, ridge, 1.0))


def better(problem: LayerProblem, one: Dual, other: Dual) -> Dual:
    """For each program the dual point of the larger D."""
    first = one.value >= other.value
    point = jnp.where(expanded(first, one.point), one.point, other.point)
    return Dual(jnp.maximum(one.value, other.value), point)


def certificate(problem: LayerProblem, V: Array, s: Array) -> Array:
    r"""A bound on P(V) − min P ≤ P(V) − D(t s), t ≤ 1 such that t s is feasible whatever the round-off.

    Products with X are taken to be off by 8 log2(n) ε ‖A‖ ‖·‖, as for large maps elsewhere in this library,
    with ‖D_i X‖ ≤ ‖X‖ and ‖A‖² ≤ ‖X‖² max_j (number of patterns active at x_j).

    Args:
      problem: the program, a `GatedProblem` whose regulariser is a norm or a ridge.
      V: weights, shaped as the variable.
      s: any dual point, shaped as the targets.
    """
    with jax.default_matmul_precision("highest"):
        A, y, loss = problem.linear_map, problem.inputs, problem.loss
        one, all_of_them = _norm_bounds(A)
        unit = 8.0 * float(jnp.finfo(problem.dtype).eps)
        depth = math.log2(2 + math.prod(A.in_shape) + math.prod(A.out_shape))
        s = loss.dual_projection(s, y)
        image, off = A(s), unit * depth * problem.norm(s)
        limit = gauge(problem, image, off * one)
        s = s / expanded(jnp.maximum(limit, 1.0) * (1 + unit), s)
        pulled = _ridge_conjugate(problem, image)
        pulled += problem.norm(image) * off * all_of_them / jnp.maximum(problem.ridge, _tiny(image))
        terms = loss.conjugate(s, y)
        u = A.adjoint(V)
        off_u = unit * depth * all_of_them * problem.norm(V) + unit * problem.norm(u)
        values, penalty = loss.value(u, y), regularizer(problem, V)
        moved = problem.norm(loss.derivative(u, y)) * off_u + 0.5 * loss.smoothness * off_u**2
        gap = problem.sum(values) + penalty + problem.sum(terms)
        sizes = problem.sum(jnp.abs(values)) + penalty + problem.sum(jnp.abs(terms))
        if isinstance(problem.prior, Zero):
            gap, sizes = gap + pulled, sizes + pulled
        bound = jnp.maximum(gap, 0.0) + moved + unit * depth * sizes
    return jnp.where(jnp.isnan(bound), jnp.inf, bound)


def _tiny(like: Array) -> float:
    return float(jnp.finfo(like.dtype).tiny)


def _norm_bounds(A: Any) -> tuple[Array, Array]:
    """Upper bounds on max_i ‖D_i X‖ and on ‖A‖, of patches their sum over them."""
    X, mask = A._rows()
    patches = math.sqrt(A.X.shape[1]) if A.X.ndim == 3 else 1.0
    eps = float(jnp.finfo(X.dtype).eps)
    top = jnp.linalg.eigvalsh(X.T @ X)[-1] * (1 + 8 * len(X) * eps)
    one = patches * jnp.sqrt(jnp.maximum(top, 0.0))
    return one, one * jnp.sqrt(jnp.max(jnp.sum(mask.astype(X.dtype), -1)))
