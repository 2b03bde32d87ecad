"""Bounds on the distance of a point from the optimum of its problem, all round-off included.

Entrywise error bounds go along with every product; `_Point` holds what the three bounds share.
"""

import dataclasses
import math
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from stochsolvers import lipschitz, prox
from stochsolvers._shards import varying
from stochsolvers._typing import Array
from stochsolvers.linear_maps import LinearMap

if TYPE_CHECKING:
    from stochsolvers.problems._layer_problem import LayerProblem

_REPAIR_STEPS = 300
_REPAIR_MARGIN = 0.1
_BLOCK = 32  # products that are added up before their sum goes on in twice the precision
_POOR = 16.0  # times the gap: a bound above it is worth the search for a better one


class _Point(NamedTuple):
    """z with what is computed from it, and entrywise bounds on the errors of that."""

    z: Array
    value: Array  # g(z)
    residual: Array  # r = A* z − x
    residual_error: Array
    image: Array  # A r
    image_error: Array
    offset: Array  # λ z − b
    offset_error: Array
    gradient: Array
    gradient_error: Array
    constant: Array  # L, at least ||A||²
    absolute: LinearMap  # |A|
    round_off: float  # ε of an entry of A x, summed in blocks


def _point(problem: "LayerProblem", z: Array) -> _Point:
    """|error of r| ≤ ε |A*| |z|, |error of A r| ≤ |A| (|error of r| + ε |r|): the sums may cancel."""
    A, eps = problem.linear_map, jnp.finfo(problem.dtype).eps
    (total, rest), back = _in_blocks(A, z, adjoint=True)
    total, low = _two_sum(total, -problem.inputs)
    residual = total + (low + rest)
    (total, rest), forward = _in_blocks(A, residual)
    image, offset = total + rest, problem.with_bias_and_ridge(jnp.zeros_like(z), z)
    absolute = dataclasses.replace(A, kernel=jnp.abs(A.kernel))
    residual_error = back * absolute.adjoint(jnp.abs(z)) + eps * jnp.abs(residual)
    image_error = absolute(residual_error + forward * jnp.abs(residual))
    pull = jnp.abs(problem.ridge * z)
    offset_error = jnp.where(pull > 0, 2.0 * eps * (pull + jnp.abs(offset)), 0.0)
    gradient_error = image_error + offset_error + 2.0 * eps * (jnp.abs(image) + jnp.abs(offset))
    return _Point(
        *(z, problem.prior_value(z), residual, residual_error, image, image_error),
        *(offset, offset_error, image + offset, gradient_error),
        jnp.maximum(lipschitz.lipschitz_constant(A, grid="padded"), 1e-30),
        *(absolute, forward),
    )


def _in_blocks(
    A: LinearMap,
    operand: Array,
    *,
    adjoint: bool = False,
) -> tuple[tuple[Array, Array], float]:
    r"""A x or A* z as the sum of two floats, and ε with |error| ≤ ε |A| |x|: that of a block of the sum.

    Blocks are of some features, within each group of a convolution.
    """
    kernel, groups = A.kernel, getattr(A, "feature_group_count", 1)
    axis, count = (-1, kernel.shape[-1] // groups) if adjoint else (-2, kernel.shape[-2])
    taps = kernel[..., 0, 0].size
    size = min(count, max(1, _BLOCK // taps))
    number = -(-count // size)

    def blocks(array, axis, groups):
        axis %= array.ndim
        before, after = array.shape[:axis], array.shape[axis + 1 :]
        array = array.reshape(*before, groups, count, *after)
        missing = [(0, 0)] * array.ndim
        missing[axis + 1] = (0, number * size - count)
        array = jnp.pad(array, missing).reshape(*before, groups, number, size, *after)
        return jnp.moveaxis(array, axis + 1, 0).reshape(number, *before, groups * size, *after)

    def product(block):
        part = dataclasses.replace(A, kernel=block[0])
        return part.adjoint(block[1]) if adjoint else part(block[1])

    def add(pair, block):
        total, low = _two_sum(pair[0], product(block))
        return (total, pair[1] + low), None

    round_off = _round_off(size * taps + 1, operand)
    if number == 1:
        total = product((kernel, operand))
        return (total, jnp.zeros_like(total)), round_off
    whole = blocks(kernel, axis, groups if adjoint else 1), blocks(operand, -1, groups)
    total = product(jax.tree.map(lambda leaf: leaf[0], whole))
    others = jax.tree.map(lambda leaf: leaf[1:], whole)
    pair, _ = lax.scan(add, varying((total, jnp.zeros_like(total)), total), others)
    return pair, round_off


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """The rounded sum of two floats, and what the rounding took away (Knuth)."""
    total = a + b
    moved = total - a
    return total, (a - (total - moved)) + (b - moved)


def _round_off(count: int, like: Array) -> float:
    """ε with |error| ≤ ε Σ|t| for a sum of `count` products t in any order: n u (Higham 2002, eq. 3.5)."""
    return (2.1 + 0.525 * count) * float(jnp.finfo(like.dtype).eps)


def _tree_round_off(shape: tuple[int, ...], like: Array) -> float:
    """The same for a sum over an array of that shape, in the trees that XLA's reductions are."""
    return (8.0 + 4.0 * math.log2(max(math.prod(shape), 1))) * float(jnp.finfo(like.dtype).eps)


def _spectral_round_off(problem: "LayerProblem", array: Array) -> Array:
    """A bound on the norm of the round-off of decompositions, for priors that are not separable."""
    size = 0 if problem.prior.separable else max(problem.linear_map.out_shape)
    return 8.0 * size * jnp.finfo(problem.dtype).eps * problem.norm(array)


def _evaluation(problem: "LayerProblem", scale: Array, duals: Array) -> Array:
    """The round-off of g, g* and sums over an example, from the sum of the sizes of their terms.

    Logarithms have terms of both signs, with a unit of their own: they are added here.
    """
    if isinstance(problem.prior, prox.LogBarrier):
        scale += problem.sum(jnp.broadcast_to(problem.prior.gamma, duals.shape))
    if isinstance(problem.prior, prox.SymmetricLogBarrier | prox.IntervalLogBarrier):
        scale += problem.sum(jnp.abs(duals) + problem.prior.gamma)
    return _tree_round_off(problem.linear_map.out_shape, duals) * scale


def _spread(problem: "LayerProblem", values: Array) -> Array:
    """A number for each example, with an axis for each of the variable's."""
    return jnp.expand_dims(values, tuple(range(values.ndim, len(problem.shape))))


@jax.jit
def certificate(problem: "LayerProblem", z: Array) -> Array:
    """The smallest of the three bounds, for each example; see `LayerProblem.certificate`."""
    with jax.default_matmul_precision("highest"):
        point = _point(problem, z)
        bound = jnp.fmin(_curvature_gap(problem, point), _scaled_gap(problem, point))
        bound = jnp.fmin(bound, _repaired_gap(problem, point, bound))
    return jnp.where(jnp.isnan(bound), jnp.inf, bound)


def _curvature_gap(problem: "LayerProblem", point: _Point) -> Array:
    """The strong-convexity bound, +inf for μ = 0."""
    A, z, gradient, eps = problem.linear_map, point.z, point.gradient, jnp.finfo(problem.dtype).eps
    mu = (problem.ridge + lipschitz.strong_convexity(A, upper=point.constant)) * (1.0 - 4.0 * eps)
    safe_mu = jnp.where(mu > 0, mu, 1.0)
    # the barrier: XLA takes seconds to fold "max(v, 0) >= 0 everywhere" into a constant
    u = lax.optimization_barrier(problem.prior.prox(z - gradient / safe_mu, 1.0 / safe_mu))
    move, value = u - z, problem.prior_value(u)
    products, curve = gradient * move, 0.5 * safe_mu * problem.sum(move**2)
    gap = jnp.maximum(point.value - value - problem.sum(products) - curve, 0.0)
    # u is the point of a gradient that is off by the errors of ∇F and, in units of it, of the prox
    sizes = jnp.abs(gradient) + safe_mu * (jnp.abs(z) + jnp.abs(u))
    noise = 8.0 * eps * problem.norm(sizes) + _spectral_round_off(problem, sizes)
    noise += problem.norm(point.gradient_error - point.image_error)
    # the error of A r is |A| |error of r|, or ||A|| ||error of r||, whichever is smaller
    frobenius = jnp.sqrt(math.prod(A.out_shape[:-1]) * jnp.sum(A.kernel**2))
    through = jnp.sqrt(point.constant) * problem.norm(point.residual_error)
    through += point.round_off * frobenius * problem.norm(point.residual)
    noise += jnp.minimum(1.01 * through, problem.norm(point.image_error))
    slack = noise * problem.norm(move) + noise**2 / (2.0 * safe_mu)
    scale = jnp.abs(point.value) + jnp.abs(value) + problem.sum(jnp.abs(products)) + curve
    slack += _evaluation(problem, scale, gradient)
    return jnp.where(mu > 0, gap + slack, jnp.inf)


def _fenchel_gap(problem: "LayerProblem", point: _Point, w: Array, error: Array) -> Array:
    r"""Φ(w) = g(z) + g*(w) − <w, z> for any w within `error` of the one given, round-off included.

    Convexity gives Φ(w + e) ≤ Φ(w) + Σ |e| max |∇Φ(w ± error)| for separable g*. For the others, which
    are indicators, ∇Φ = −z.
    """
    z, conjugate = point.z, problem.per_example(problem.prior.conjugate)
    if problem.prior.separable:
        values, pull = jax.vjp(jax.vmap(conjugate), jnp.stack([w - error, w, w + error]))
        (derivatives,) = pull(jnp.ones_like(values))
        slope = jnp.max(jnp.abs(derivatives - z), axis=0)
        value, inside = values[1], jnp.isfinite(values[0]) & jnp.isfinite(values[2])
    else:
        slope, value, inside = jnp.abs(z), conjugate(w), _in_domain(problem, w, error)
    gap = jnp.maximum(point.value + value - problem.sum(w * z), 0.0)
    scale = jnp.abs(point.value) + jnp.abs(value) + problem.sum(jnp.abs(w) * (jnp.abs(z) + slope))
    slack = problem.sum(error * slope) + _evaluation(problem, scale, w)
    return jnp.where(inside, gap + slack, jnp.inf)


def _in_domain(problem: "LayerProblem", w: Array, error: Array) -> Array:
    """Whether g* is finite at all points within `error` of w, for each example."""
    prior, conjugate = problem.prior, problem.per_example(problem.prior.conjugate)
    if prior.separable:
        return jnp.isfinite(conjugate(w - error)) & jnp.isfinite(conjugate(w + error))
    radius = problem.norm(error) + _spectral_round_off(problem, w)
    # a ball that is smaller than the margin has no point that far inside
    ball = jnp.broadcast_to(1.25 * _spread(problem, radius), w.shape)
    return _near(problem, w, radius) & (
        jnp.isfinite(conjugate(ball)) | jnp.isfinite(conjugate(-ball))
    )


def _near(problem: "LayerProblem", w: Array, radius: Array) -> Array:
    """Whether w is within a quarter of the radius of a point that is 1.25 of it inside dom g*."""
    inner = problem.prior.dual_projection(w, 1.25 * _spread(problem, radius))
    return problem.norm(w - inner) <= 0.25 * radius


def _scaled_gap(problem: "LayerProblem", point: _Point) -> Array:
    """The least Fenchel gap at ν = (1 − δ) r over δ = 0, …, 2⁻⁴, 2⁻², 1."""
    floats = jnp.finfo(problem.dtype)
    image_error = point.image_error + 4.0 * floats.eps * jnp.abs(point.image)
    # at δ = 1 the point is b − λ z, free of the round-off that A r carries
    sum_error = 2.0 * floats.eps * jnp.abs(point.offset)
    squares = problem.sum((jnp.abs(point.residual) + point.residual_error) ** 2)
    squares *= 0.5 * (1.0 + _tree_round_off(problem.linear_map.in_shape, point.z))

    def gap(shrink):
        s = 1.0 - shrink
        error = s * image_error + jnp.sign(s) * sum_error + point.offset_error
        w = -point.offset - s * point.image
        return _fenchel_gap(problem, point, w, error) + shrink**2 * squares

    shrinks = [2.0**-k for k in range(0, floats.nmant + 1, 2)]
    return jnp.min(lax.map(gap, jnp.asarray([*shrinks, 0.0], problem.dtype)), axis=0)


def _repaired_gap(problem: "LayerProblem", point: _Point, bound: Array) -> Array:
    """The Fenchel gap at ν = r + d, d = 0 where `bound` is of the order of the gap or of round-off."""
    A, prior, gradient = problem.linear_map, problem.prior, point.gradient
    noise = 1.2 * problem.norm(point.gradient_error) + _spectral_round_off(problem, gradient)
    reach = 1.2 * point.gradient_error if prior.separable else _spread(problem, noise)
    outside = problem.norm(gradient + prior.dual_projection(-gradient, 1.5 * reach))
    # aim a little inside the domain, in proportion to how far outside the point is
    margin = 1.5 * reach + _REPAIR_MARGIN * _spread(problem, outside)

    def unfinished(carry):
        return (carry[0] < _REPAIR_STEPS) & ~jnp.all(carry[-1])

    def repair(carry):
        k, d, ahead, t, done = carry
        w = -gradient - A(ahead)
        pull = w - prior.dual_projection(w, margin)
        done |= _in_domain(problem, w, reach) if prior.separable else _near(problem, w, noise)
        moved = ahead + A.adjoint(pull) / point.constant
        t_next = 0.5 * (1.0 + jnp.sqrt(1.0 + 4.0 * t**2))
        following = moved + (t - 1.0) / t_next * (moved - d)
        keep = _spread(problem, done)  # x has as many axes as z
        return k + 1, jnp.where(keep, d, moved), jnp.where(keep, ahead, following), t_next, done

    zero, done = jnp.zeros_like(problem.inputs), ~_is_poor(problem, point, reach, bound)
    start = varying((0, zero, zero, jnp.ones((), problem.dtype), done), (problem, point))
    d = lax.while_loop(unfinished, repair, start)[2]
    (total, rest), _ = _in_blocks(A, d)
    shift, eps = total + rest, jnp.finfo(problem.dtype).eps
    error = point.gradient_error + point.round_off * point.absolute(jnp.abs(d))
    error += 2.0 * eps * (jnp.abs(gradient) + jnp.abs(shift))
    squares = (1.0 + _tree_round_off(A.in_shape, d)) * problem.sum(d**2)
    return _fenchel_gap(problem, point, -gradient - shift, error) + 0.5 * squares


def _is_poor(problem: "LayerProblem", point: _Point, reach: Array, bound: Array) -> Array:
    """Whether a bound is far above the gap and the round-off, and a dual point has room for it.

    The gap is at least what a proximal step of size 1/L gains, (L/2) ||u − z||².
    """
    prior, z, gradient = problem.prior, point.z, point.gradient
    smoothness = point.constant + problem.ridge
    move = prior.prox(z - gradient / smoothness, 1.0 / smoothness) - z
    gain = 0.5 * smoothness * problem.sum(move**2)
    scale = jnp.abs(point.value) + problem.sum(jnp.abs(gradient * z))
    floor = problem.sum(reach * jnp.abs(z)) + _evaluation(problem, scale, gradient)
    inner = prior.dual_projection(-gradient, 1.5 * reach)
    room = _in_domain(problem, inner, reach) if prior.separable else True
    return jnp.isfinite(floor) & room & ~(bound <= _POOR * (gain + floor))
