r"""Bounds on the distance of a point from the optimum of its problem, all round-off included.

With u = A* z, a dual point r ∈ dom ℓ* and w = b − λ z − A r, weak duality is

    P(z) − min P ≤ Σ_i [ℓ(u_i) + ℓ*(r_i) − u_i r_i] + [g(z) + g*(w) − <w, z>],

two gaps that are zero at the optimum, where r = ∂ℓ(u). For squares the first is ½ ||r − (u − x)||².
Entrywise error bounds go along with every product; `_Point` holds what the three bounds share.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from stochsolvers import lipschitz
from stochsolvers._shards import varying
from stochsolvers._symmetric import symmetric_product
from stochsolvers._typing import Array
from stochsolvers.linear_maps import Dense, LinearMap
from stochsolvers.losses import Loss
from stochsolvers.problems._objective import Objective
from stochsolvers.problems._products import Products, tree_round_off, two_sum

_REPAIR_STEPS = 300
_REPAIR_MARGIN = 0.05
_REPEATS = 12  # about the iterations of the search
_POOR = 16.0  # times the gap: a bound above it is worth the search for a better one


class _Point(NamedTuple):
    """z with what is computed from it, and entrywise bounds on the errors of that.

    Of squares, the inputs are subtracted from u before it is rounded: they are then those of x = 0.
    """

    z: Array
    value: Array  # g(z)
    u: Array  # A* z
    u_error: Array
    targets: Array  # x
    residual: Array  # r = ∂ℓ/∂u, a dual point
    residual_error: Array  # of ∂ℓ/∂u at the true u
    dual_error: Array  # of a point of dom ℓ*
    image: Array  # A r
    image_error: Array
    offset: Array  # λ z − b
    offset_error: Array
    gradient: Array
    gradient_error: Array
    products: Products


def _point(problem: Objective, products: Products, z: Array) -> _Point:
    """The error of u is that of one product; A r is a product with the dual point as it is."""
    eps, loss = jnp.finfo(problem.dtype).eps, problem.loss
    back, targets = products.backward(z), problem.inputs
    if problem.is_quadratic:
        total, low = two_sum(back.total, -targets)
        u, targets = total + (low + back.rest), jnp.zeros_like(targets)
    else:
        u = back.total + back.rest
    u_error = back.error + eps * jnp.abs(u)
    residual = loss.derivative(u, targets)
    rounding = 0.0 if problem.is_quadratic else 16 * eps * (jnp.abs(residual) + jnp.abs(targets))
    residual_error = loss.derivative_error(u_error) + rounding
    dual_error = loss.dual_error(residual, targets)
    forward = products.forward(residual)
    image, offset = forward.total + forward.rest, problem.with_bias_and_ridge(jnp.zeros_like(z), z)
    image_error = forward.error
    if type(loss).dual_error is not Loss.dual_error:  # zero for most
        image_error += products.spread_error(dual_error)
    image_error += 4.0 * eps * jnp.abs(image)
    pull = jnp.abs(problem.ridge * z)
    offset_error = jnp.where(pull > 0, 2.0 * eps * (pull + jnp.abs(offset)), 0.0)
    gradient_error = image_error + offset_error + 2.0 * eps * (jnp.abs(image) + jnp.abs(offset))
    return _Point(
        z=z,
        value=problem.prior_value(z),
        u=u,
        u_error=u_error,
        targets=targets,
        residual=residual,
        residual_error=residual_error,
        dual_error=dual_error,
        image=image,
        image_error=image_error,
        offset=offset,
        offset_error=offset_error,
        gradient=image + offset,
        gradient_error=gradient_error,
        products=products,
    )


def _spectral_round_off(problem: Objective, array: Array) -> Array:
    """A bound on the norm of the round-off of decompositions, for priors that are not separable."""
    size = 0 if problem.prior.separable else max(problem.linear_map.out_shape)
    return 8.0 * size * jnp.finfo(problem.dtype).eps * problem.norm(array)


def _evaluation(problem: Objective, scale: Array, duals: Array, *variables: Array) -> Array:
    """The round-off of g, g* and sums over an example, from the sum of the sizes of their terms."""
    sizes = problem.per_example(problem.prior._term_sizes)
    terms = functools.reduce(jnp.maximum, [sizes(u, duals) for u in variables])
    return tree_round_off(problem.linear_map.out_shape, duals) * (scale + terms)


def _expanded(problem: Objective, values: Array) -> Array:
    """A number for each example, with an axis for each of the variable's."""
    return jnp.expand_dims(values, tuple(range(values.ndim, len(problem.shape))))


def constants(
    problem: Objective, squared_norm: Array | None, convexity: Array | None
) -> tuple[Products, Array | None]:
    """What all certificates of a problem share: products that know their round-off, and m λ_min(A A*)."""
    products = Products.of(problem.linear_map, len(problem.batch_shape), squared_norm)
    modulus = problem.loss.strong_convexity
    if isinstance(modulus, int | float) and modulus == 0:
        return products, None
    known = convexity
    if known is None:
        known = lipschitz.strong_convexity(products.linear_map, upper=products.constant)
    return products, modulus * known


def bound(problem: Objective, products: Products, convexity: Array | None, z: Array) -> Array:
    """The smallest of the three bounds, for each example; see `LayerProblem.certificate`."""
    with jax.default_matmul_precision("highest"):
        point = _point(problem, products, z)
        bound = _curvature_gap(problem, point, convexity)
        bound = jnp.minimum(bound, _scaled_gap(problem, point))
        if not problem.prior._moves_duals:  # the search would stay at r, which δ = 0 was
            return bound
        reach = _reach(problem, point)
        poor = _is_poor(problem, point, reach, bound)
        return lax.cond(
            jnp.any(poor),
            lambda: jnp.minimum(bound, _repaired_gap(problem, point, reach, poor)),
            lambda: bound,
        )


def _or_infinite(bound: Array) -> Array:
    """+∞ where a bound is no number."""
    return jnp.where(jnp.isnan(bound), jnp.inf, bound)


def _curvature_gap(problem: Objective, point: _Point, convexity: Array | None) -> Array:
    """The strong-convexity bound, +inf for μ = 0."""
    z, gradient, eps = point.z, point.gradient, jnp.finfo(problem.dtype).eps
    products = point.products
    mu = problem.ridge if convexity is None else problem.ridge + convexity
    mu = mu * (1.0 - 4.0 * eps)
    safe_mu = jnp.where(mu > 0, mu, 1.0)
    # the barrier: XLA takes seconds to fold "max(v, 0) >= 0 everywhere" into a constant
    u = lax.optimization_barrier(problem.prior.prox(z - gradient / safe_mu, 1.0 / safe_mu))
    move, value = u - z, problem.prior_value(u)
    terms, curve = gradient * move, 0.5 * safe_mu * problem.sum(move**2)
    gap = jnp.maximum(point.value - value - problem.sum(terms) - curve, 0.0)
    # u is the point of a gradient that is off by the errors of ∇F and, in units of it, of the prox
    sizes = jnp.abs(gradient) + safe_mu * (jnp.abs(z) + jnp.abs(u))
    noise = 8.0 * eps * problem.norm(sizes) + _spectral_round_off(problem, sizes)
    noise += problem.norm(point.gradient_error - point.image_error)
    # the error of A r, r at the true u: that of the product, and ||A|| ||error of r||
    rounding = products.norm_of_round_off(point.residual)
    noise += jnp.minimum(rounding, problem.norm(point.image_error))
    noise += products.norm_of_error(point.residual_error)
    slack = noise * problem.norm(move) + noise**2 / (2.0 * safe_mu)
    # u itself is rounded, along a subgradient if on a curved edge of the domain
    edge = problem.norm(gradient + safe_mu * move)
    slack += edge * _spectral_round_off(problem, u)
    scale = jnp.abs(point.value) + jnp.abs(value) + problem.sum(jnp.abs(terms)) + curve
    slack += _evaluation(problem, scale, gradient, z, u)
    return _or_infinite(jnp.where(mu > 0, gap + slack, jnp.inf))


def _prior_gap(problem: Objective, point: _Point, w: Array, error: Array) -> Array:
    r"""Φ(w) = g(z) + g*(w) − <w, z> for any w within `error` of the one given, round-off included.

    Convexity gives Φ(w + e) ≤ Φ(w) + Σ |e| max |∇Φ(w ± error)| for separable g*. For the others
    Φ(w + e) ≤ Φ(w) + Σ |e| |z| + the rise of g*, which is the prior's to bound.
    """
    z, conjugate = point.z, problem.per_example(problem.prior.conjugate)
    if problem.prior.separable:
        values, pull = jax.vjp(jax.vmap(conjugate), jnp.stack([w - error, w, w + error]))
        (derivatives,) = pull(jnp.ones_like(values))
        slope = jnp.max(jnp.abs(derivatives - z[None]), axis=0)
        value, inside = values[1], jnp.isfinite(values[0]) & jnp.isfinite(values[2])
        rise = 0.0
    else:
        slope, value = jnp.abs(z), conjugate(w)
        inside = _in_domain(problem, w, error)
        rise = problem.per_example(problem.prior._conjugate_rise)(w, value, error)
    gap = jnp.maximum(point.value + value - problem.sum(w * z), 0.0)
    scale = jnp.abs(point.value) + jnp.abs(value) + problem.sum(jnp.abs(w) * (jnp.abs(z) + slope))
    slack = problem.sum(error * slope) + rise + _evaluation(problem, scale, w, z)
    return jnp.where(inside, gap + slack, jnp.inf)


def _loss_gap(problem: Objective, point: _Point, r: Array, move: Array) -> Array:
    r"""V(u, r) = Σ [ℓ(u) + ℓ*(r) − u r] at the dual point r = ∂ℓ(û) + move and the true u, |u − û| ≤ e.

    At most V(û, r) + Σ |∂ℓ(û) − r| e + (L_ℓ/2) ||e||²; for squares ½ || |move| + e ||².
    """
    error, loss = point.u_error, problem.loss
    if problem.is_quadratic:
        squares = problem.sum((jnp.abs(move) + error) ** 2)
        return 0.5 * (1.0 + tree_round_off(problem.linear_map.in_shape, error)) * squares
    terms, sizes, own = loss.gap(point.u, r, point.targets)
    distance = jnp.abs(loss.derivative(point.u, point.targets) - r)
    gap = problem.sum(jnp.maximum(terms, 0.0) + own)
    gap += problem.sum(distance * error) + 0.5 * loss.smoothness * problem.sum(error**2)
    return gap + tree_round_off(problem.linear_map.in_shape, r) * problem.sum(sizes)


def _in_domain(problem: Objective, w: Array, error: Array) -> Array:
    """Whether g* is finite at all points within `error` of w, for each example."""
    conjugates = jax.vmap(problem.per_example(problem.prior.conjugate))
    if problem.prior.separable:
        return jnp.all(jnp.isfinite(conjugates(jnp.stack([w - error, w + error]))), axis=0)
    radius = problem.norm(error) + _spectral_round_off(problem, w)
    # a ball that is smaller than the margin has no point that far inside
    ball = jnp.broadcast_to(1.25 * _expanded(problem, radius), w.shape)
    exists = jnp.any(jnp.isfinite(conjugates(jnp.stack([ball, -ball]))), axis=0)
    return _near(problem, w, radius) & exists


def _near(problem: Objective, w: Array, radius: Array) -> Array:
    """Whether w is within a quarter of the radius of a point that is 1.25 of it inside dom g*."""
    inner = problem.prior.dual_projection(w, 1.25 * _expanded(problem, radius))
    return problem.norm(w - inner) <= 0.25 * radius


def _scaled_gap(problem: Objective, point: _Point) -> Array:
    """The least gap at the dual points (1 − δ) r over δ = 0, …, 2⁻⁴, 2⁻², 1."""
    floats = jnp.finfo(problem.dtype)
    # at δ = 1 the point is b − λ z, free of the round-off that A r carries
    sum_error = 2.0 * floats.eps * jnp.abs(point.offset)

    def gap(shrink):
        s = 1.0 - shrink
        error = s * point.image_error + jnp.sign(s) * sum_error + point.offset_error
        w = -point.offset - s * point.image
        loss = _loss_gap(problem, point, s * point.residual, shrink * point.residual)
        return _or_infinite(_prior_gap(problem, point, w, error) + loss)

    shrinks = [2.0**-k for k in range(0, floats.nmant + 1, 2)]
    return jnp.min(lax.map(gap, jnp.asarray([*shrinks, 0.0], problem.dtype)), axis=0)


def _noise(problem: Objective, point: _Point) -> Array:
    """A bound on the norm of the error of ∇F, that of decompositions included."""
    noise = 1.2 * problem.norm(point.gradient_error)
    return noise + _spectral_round_off(problem, point.gradient)


def _reach(problem: Objective, point: _Point) -> Array:
    """By how much a dual point has to be inside the domain, in the margins of `Prior.dual_projection`."""
    if problem.prior.separable:
        return 1.2 * point.gradient_error
    return _expanded(problem, _noise(problem, point))


def _repaired_gap(problem: Objective, point: _Point, reach: Array, poor: Array) -> Array:
    """The gap at r + d, d = 0 for examples whose bound is not poor."""
    products, prior, gradient = point.products, problem.prior, point.gradient
    A, noise = products.linear_map, _noise(problem, point)
    outside = problem.norm(gradient + prior.dual_projection(-gradient, 1.5 * reach))
    # aim a little inside the domain, in proportion to how far outside the point is
    margin = 1.5 * reach + _REPAIR_MARGIN * _expanded(problem, outside)

    def unfinished(carry):
        return (carry[0] < _REPAIR_STEPS) & ~jnp.all(carry[-1])

    forward, backward, finish, zero = _directions(problem, A)

    def repair(carry):
        k, d, ahead, t, done = carry
        w = -gradient - forward(ahead)
        pull = w - prior.dual_projection(w, margin)
        done |= _in_domain(problem, w, reach) if prior.separable else _near(problem, w, noise)
        moved = _feasible(problem, point, ahead + backward(pull) / products.constant)
        t_next = 0.5 * (1.0 + jnp.sqrt(1.0 + 4.0 * t**2))
        following = _feasible(problem, point, moved + (t - 1.0) / t_next * (moved - d))
        keep = jnp.expand_dims(done, tuple(range(done.ndim, zero.ndim)))
        return k + 1, jnp.where(keep, d, moved), jnp.where(keep, ahead, following), t_next, done

    start = varying((0, zero, zero, jnp.ones((), problem.dtype), ~poor), (problem, point))
    d = finish(lax.while_loop(unfinished, repair, start)[2])
    dual, eps = point.residual + d, jnp.finfo(problem.dtype).eps
    product = products.forward(d)
    shift = product.total + product.rest
    error = point.gradient_error + product.error
    if not problem.is_quadratic:  # the dual point is the rounded one
        rounding = problem.loss.dual_error(dual, point.targets) + eps * jnp.abs(dual)
        error += products.spread_error(rounding)
    error += 2.0 * eps * (jnp.abs(gradient) + jnp.abs(shift))
    loss = _loss_gap(problem, point, dual, d)
    return _or_infinite(_prior_gap(problem, point, -gradient - shift, error) + loss)


def _directions(problem: Objective, A: LinearMap) -> tuple[Any, Any, Any, Array]:
    """A and A* as the search applies them, what makes d of its variable, and zero.

    For squares and a dense map it searches for c with d = A* c: one product with the Gram matrix an
    iteration, where the batch is worth forming it.
    """
    known = all(isinstance(n, int) for n in problem.batch_shape)  # none of them symbolic
    batch = math.prod(problem.batch_shape) if known else 0
    pays = isinstance(A, Dense) and A.out_features <= _REPEATS * batch
    if not (problem.is_quadratic and pays):
        return A, A.adjoint, lambda d: d, jnp.zeros_like(problem.inputs)
    gram = symmetric_product(A.kernel, "highest")  # pyright: ignore[reportAttributeAccessIssue]
    return lambda c: c @ gram, lambda w: w, A.adjoint, jnp.zeros(problem.shape, problem.dtype)


def _feasible(problem: Objective, point: _Point, d: Array) -> Array:
    """The nearest d with r + d ∈ dom ℓ*."""
    if problem.is_quadratic:
        return d
    return problem.loss.dual_projection(point.residual + d, point.targets) - point.residual


def _is_poor(problem: Objective, point: _Point, reach: Array, bound: Array) -> Array:
    """Whether a bound is far above the gap and the round-off, and a dual point has room for it.

    The gap is at least what a proximal step of size 1/L gains, (L/2) ||u − z||².
    """
    prior, z, gradient = problem.prior, point.z, point.gradient
    smoothness = problem.smoothness(point.products.constant)
    move = prior.prox(z - gradient / smoothness, 1.0 / smoothness) - z
    gain = 0.5 * smoothness * problem.sum(move**2)
    scale = jnp.abs(point.value) + problem.sum(jnp.abs(gradient * z))
    floor = problem.sum(reach * jnp.abs(z)) + _evaluation(problem, scale, gradient, z)
    inner = prior.dual_projection(-gradient, 1.5 * reach)
    room = _in_domain(problem, inner, reach) if prior.separable else True
    return jnp.isfinite(floor) & room & ~(bound <= _POOR * (gain + floor))
