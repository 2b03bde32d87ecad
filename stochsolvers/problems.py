r"""A block of a network as a convex problem: its objective, gradient, terms and certificate.

    minimise_z  P(z) = F(z) + g(z),
    F(z) = (1/n1) Σ_{i=1..n1} f_i(z) + (λ/2) ||z||²
         = ½ ||A* z − x||² − <b, z> + (λ/2) ||z||²                         (Bibi et al. 2019, eq. 5)

x is the block's input, A its linear map, b its bias, g the prior whose proximal operator is the
activation. Leading axes of x are batch axes: one problem for each example.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from stochsolvers import _checks, lipschitz, prox
from stochsolvers._typing import Array, Scalar, real, value_object
from stochsolvers.linear_maps import LinearMap

_REPAIR_STEPS = 300
_REPAIR_MARGIN = 0.1
_POOR = 16.0  # times the gap: a bound above it is worth the search for a better one


@value_object
class LayerProblem:
    r"""The convex problem of one layer, for a batch of inputs.

    Args:
      linear_map: A, a `Dense` or a `Conv`.
      inputs: x, shape (*batch, n1) for `Dense`, (*batch, H, W, n1) for `Conv`.
      bias: b, anything that broadcasts to the outputs: (n2,) for a layer's bias, a whole activation
        for a skip connection. None is zero.
      prior: g, a member of `stochsolvers.prox`.
      ridge: λ ≥ 0.

    Arrays below float32 are computed with in float32.

    Raises:
      ValueError: at trace time, for shapes and dtypes that do not fit, or a negative ridge.
    """

    linear_map: LinearMap
    inputs: Array
    _: dataclasses.KW_ONLY
    bias: Array | None = None
    prior: prox.Prior = prox.NonNegative()
    ridge: Scalar = 0.0

    def __post_init__(self):
        _checks.floating("inputs of LayerProblem", self.inputs)
        _checks.trailing("inputs of LayerProblem", self.inputs, self.linear_map.in_shape)
        _checks.non_negative("ridge", self.ridge)
        _checks.rank("ridge", self.ridge, 0)
        object.__setattr__(self, "ridge", real(self.ridge))
        dtype = jnp.promote_types(self.inputs.dtype, self.linear_map.kernel.dtype)
        dtype = jax.dtypes.canonicalize_dtype(jnp.promote_types(dtype, jnp.float32))
        if self.bias is not None:
            _checks.floating("bias of LayerProblem", self.bias)
            _checks.broadcastable("bias of LayerProblem", self.bias, self.shape)
            object.__setattr__(self, "bias", jnp.asarray(self.bias, dtype))
        object.__setattr__(self, "inputs", jnp.asarray(self.inputs, dtype))
        kernel_to_dtype = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), self.linear_map)
        object.__setattr__(self, "linear_map", kernel_to_dtype)
        self._check_prior_axes()

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Leading axes of the inputs: one problem for each of their entries."""
        return self.inputs.shape[: self.inputs.ndim - len(self.linear_map.in_shape)]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the variable z: (*batch, n2) or (*batch, H', W', n2)."""
        return (*self.batch_shape, *self.linear_map.out_shape)

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the variable z."""
        return self.inputs.dtype

    def residual(self, z: Array) -> Array:
        """A* z − x, what the solution leaves unexplained of the input, shaped as the inputs."""
        return self.linear_map.adjoint(self._variable(z)) - self.inputs

    def terms(self, z: Array) -> Array:
        r"""The n1 terms f_i(z) = (n1/2) ||(A* z)_i − x_i||² − <b, z>, shape (*batch, n1).

        For a convolution, i runs over whole input feature maps. F is their mean, plus the ridge.
        """
        squares = self.residual(z) ** 2
        spatial = tuple(range(len(self.batch_shape), squares.ndim - 1))
        fit = 0.5 * self.linear_map.in_features * jnp.sum(squares, axis=spatial)
        return fit - self._bias_product(z)[..., None]

    def smooth(self, z: Array) -> Array:
        """F(z) for each example, shape (*batch,)."""
        z = self._variable(z)
        fit = 0.5 * self.sum(self.residual(z) ** 2)
        return fit - self._bias_product(z) + 0.5 * self.ridge * self.sum(z**2)

    def objective(self, z: Array) -> Array:
        """P(z) = F(z) + g(z) for each example, shape (*batch,); +inf outside the domain of g."""
        return self.smooth(z) + self.prior_value(z)

    def gradient(self, z: Array) -> Array:
        r"""∇F(z) = A(A* z − x) − b + λ z, shaped as z."""
        return self.with_bias_and_ridge(self.linear_map(self.residual(z)), z)

    def with_bias_and_ridge(self, data_gradient: Array, z: Array) -> Array:
        """A gradient estimate of the n1 terms' quadratic part, completed by − b + λ z."""
        bias = 0.0 if self.bias is None else self.bias
        return data_gradient - bias + self.ridge * z

    def prior_value(self, z: Array) -> Array:
        """g(z) for each example, shape (*batch,)."""
        return self.per_example(self.prior.value)(self._variable(z))

    def per_example(self, function: Callable[..., Array]) -> Callable[..., Array]:
        """`function` of unbatched variables, mapped over the batch axes."""
        for _ in self.batch_shape:
            function = jax.vmap(function)
        return function

    def sum(self, array: Array) -> Array:
        """Sum of an array shaped as z or as x over everything but the batch axes."""
        return jnp.sum(array, axis=tuple(range(len(self.batch_shape), array.ndim)))

    def norm(self, array: Array) -> Array:
        """Euclidean norm of an array shaped as z or as x, for each example."""
        return jnp.sqrt(self.sum(array**2))

    def certificate(self, z: Array) -> Array:
        r"""A certified optimality gap: P(z) − min P ≤ certificate(z), for each example.

        The smallest of three bounds. With μ = λ + λ_min(A A*) > 0, F lies above a paraboloid of curvature
        μ, whose sum with g is least at one proximal step u:

            g(z) − g(u) + <∇F(z), z − u> − (μ/2) ||u − z||²,       u = prox_{g/μ}(z − ∇F(z)/μ).

        The others need no curvature. They are Fenchel gaps at dual points r + d, r = A* z − x,

            g(z) + g*(w) − <w, z> + ½ ||d||²,      w = −∇F(z) − A d ∈ dom g*,

        once at shrunken residuals, d = −δ r, and, where the bounds so far may be far above the gap, with
        a small d found by accelerated gradient steps. All go to zero with the gap, to the round-off
        ε |A| |A*| |z| of ∇F times the size of z, which is added to them: the value is never below the gap
        of the arrays as they are. It is +inf where z is infeasible, and where no dual point was found,
        as when the problem is unbounded below.

        Returns:
          shape (*batch,), in units of the objective. Not differentiable.

        References:
          Nesterov 2018, theorem 2.1.10 (first bound); Rockafellar 1970, section 31 (the others).
        """
        return _certificate(*jax.tree.map(lax.stop_gradient, (self, self._variable(z))))

    def _check_prior_axes(self) -> None:
        named = getattr(self.prior, "axes", getattr(self.prior, "axis", ()))
        event_ndim = len(self.linear_map.out_shape)
        for leaf in jax.tree.leaves(self.prior):
            if jnp.ndim(leaf) > event_ndim:
                _checks.fail(
                    f"weights of {type(self.prior).__name__}",
                    f"at most {event_ndim} axes, none of them a batch axis",
                    jnp.shape(leaf),
                )
        for axis in (named,) if isinstance(named, int) else named:
            if not -event_ndim <= axis < (0 if self.batch_shape else event_ndim):
                _checks.fail(
                    f"axis of {type(self.prior).__name__}",
                    f"one of the layer's own axes, counted from the end: {-event_ndim}..-1",
                    axis,
                )

    def _bias_product(self, z: Array) -> Array:
        if self.bias is None:
            return jnp.zeros(self.batch_shape, self.dtype)
        return self.sum(self.bias * z)

    def _variable(self, z: Array) -> Array:
        if jnp.shape(z) != self.shape:
            _checks.fail("shape of the variable z", f"{self.shape}", jnp.shape(z))
        return jnp.asarray(z, self.dtype)


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
    round_off: float  # ε of an entry of A x


def _point(problem: LayerProblem, z: Array) -> _Point:
    """|error of r| ≤ ε |A*| |z|, |error of A r| ≤ |A| (|error of r| + ε |r|): the sums may cancel."""
    A, eps = problem.linear_map, jnp.finfo(problem.dtype).eps
    residual = problem.residual(z)
    image, offset = A(residual), problem.with_bias_and_ridge(jnp.zeros_like(z), z)
    absolute = dataclasses.replace(A, kernel=jnp.abs(A.kernel))
    forward, back = (_round_off(A.kernel.size // n, z) for n in (A.out_features, A.in_features))
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


def _round_off(count: int, like: Array) -> float:
    """ε with |error| ≤ ε Σ|t| for a sum of `count` products t, added one after another.

    n u up to 64 products, and 8 √n u above, which independent roundings exceed with a probability
    below 1e-13 (Higham and Mary 2019, theorem 2.4).
    """
    return (2.1 + min(0.525 * count, 4.2 * math.sqrt(count))) * float(jnp.finfo(like.dtype).eps)


def _tree_round_off(shape: tuple[int, ...], like: Array) -> float:
    """The same for a sum over an array of that shape, in the trees that XLA's reductions are."""
    return (8.0 + 4.0 * math.log2(max(math.prod(shape), 1))) * float(jnp.finfo(like.dtype).eps)


def _spectral_round_off(problem: LayerProblem, array: Array) -> Array:
    """A bound on the norm of the round-off of decompositions, for priors that are not separable."""
    size = 0 if problem.prior.separable else max(problem.linear_map.out_shape)
    return 8.0 * size * jnp.finfo(problem.dtype).eps * problem.norm(array)


def _evaluation(problem: LayerProblem, scale: Array, duals: Array) -> Array:
    """The round-off of g, g* and sums over an example, from the sum of the sizes of their terms.

    Logarithms have terms of both signs, with a unit of their own: they are added here.
    """
    if isinstance(problem.prior, prox.LogBarrier):
        scale += problem.sum(jnp.broadcast_to(problem.prior.gamma, duals.shape))
    if isinstance(problem.prior, prox.SymmetricLogBarrier | prox.IntervalLogBarrier):
        scale += problem.sum(jnp.abs(duals) + problem.prior.gamma)
    return _tree_round_off(problem.linear_map.out_shape, duals) * scale


def _spread(problem: LayerProblem, values: Array) -> Array:
    """A number for each example, with an axis for each of the variable's."""
    return jnp.expand_dims(values, tuple(range(values.ndim, len(problem.shape))))


@jax.jit
def _certificate(problem: LayerProblem, z: Array) -> Array:
    with jax.default_matmul_precision("highest"):
        point = _point(problem, z)
        bound = jnp.fmin(_curvature_gap(problem, point), _scaled_gap(problem, point))
        bound = jnp.fmin(bound, _repaired_gap(problem, point, bound))
    return jnp.where(jnp.isnan(bound), jnp.inf, bound)


def _curvature_gap(problem: LayerProblem, point: _Point) -> Array:
    """The strong-convexity bound, +inf for μ = 0."""
    A, z, gradient, eps = problem.linear_map, point.z, point.gradient, jnp.finfo(problem.dtype).eps
    mu = (problem.ridge + lipschitz.strong_convexity(A)) * (1.0 - 4.0 * eps)
    safe_mu = jnp.where(mu > 0, mu, 1.0)
    u = problem.prior.prox(z - gradient / safe_mu, 1.0 / safe_mu)
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


def _fenchel_gap(problem: LayerProblem, point: _Point, w: Array, error: Array) -> Array:
    r"""Φ(w) = g(z) + g*(w) − <w, z> for any w within `error` of the one given, round-off included.

    Convexity gives Φ(w + e) ≤ Φ(w) + Σ |e| max |∇Φ(w ± error)| for separable g*. For the others, which
    are indicators, ∇Φ = −z.
    """
    z, conjugate = point.z, problem.per_example(problem.prior.conjugate)
    derivative = jax.grad(lambda w: jnp.sum(conjugate(w)))
    slope = jnp.maximum(*(jnp.abs(derivative(end) - z) for end in (w - error, w + error)))
    value = conjugate(w)
    gap = jnp.maximum(point.value + value - problem.sum(w * z), 0.0)
    scale = jnp.abs(point.value) + jnp.abs(value) + problem.sum(jnp.abs(w) * (jnp.abs(z) + slope))
    slack = problem.sum(error * slope) + _evaluation(problem, scale, w)
    return jnp.where(_in_domain(problem, w, error), gap + slack, jnp.inf)


def _in_domain(problem: LayerProblem, w: Array, error: Array) -> Array:
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


def _near(problem: LayerProblem, w: Array, radius: Array) -> Array:
    """Whether w is within a quarter of the radius of a point that is 1.25 of it inside dom g*."""
    inner = problem.prior.dual_projection(w, 1.25 * _spread(problem, radius))
    return problem.norm(w - inner) <= 0.25 * radius


def _scaled_gap(problem: LayerProblem, point: _Point) -> Array:
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


def _repaired_gap(problem: LayerProblem, point: _Point, bound: Array) -> Array:
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
    start = (0, zero, zero, jnp.ones((), problem.dtype), done)
    d = lax.while_loop(unfinished, repair, start)[2]
    shift, eps = A(d), jnp.finfo(problem.dtype).eps
    error = point.gradient_error + point.round_off * point.absolute(jnp.abs(d))
    error += 2.0 * eps * (jnp.abs(gradient) + jnp.abs(shift))
    squares = (1.0 + _tree_round_off(A.in_shape, d)) * problem.sum(d**2)
    return _fenchel_gap(problem, point, -gradient - shift, error) + 0.5 * squares


def _is_poor(problem: LayerProblem, point: _Point, reach: Array, bound: Array) -> Array:
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
