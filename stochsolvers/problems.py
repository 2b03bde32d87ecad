r"""A block of a network as a convex problem: its objective, gradient, terms and certificate.

    minimise_z  P(z) = F(z) + g(z),
    F(z) = (1/n1) Σ_{i=1..n1} f_i(z) + (λ/2) ||z||²
         = ½ ||A* z − x||² − <b, z> + (λ/2) ||z||²                         (Bibi et al. 2019, eq. 5)

x is the block's input, A its linear map, b its bias, g the prior whose proximal operator is the
activation. Leading axes of x are batch axes: one problem for each example.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from stochsolvers import _checks, lipschitz
from stochsolvers._typing import Array, Scalar, real, value_object
from stochsolvers.linear_maps import LinearMap
from stochsolvers.prox import NonNegative, Prior

_REPAIR_STEPS = 300
_REPAIR_MARGIN = 0.1
_POOR = 1e-3  # of the objective: a bound above it is worth the search for a better one


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
    prior: Prior = NonNegative()
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

        The smallest of three bounds, each zero at the optimum of the problems it is made for. With
        μ = λ + λ_min(A A*) > 0, F lies above a paraboloid of curvature μ, whose sum with g is least at
        one proximal step u:

            g(z) − g(u) + <∇F(z), z − u> − (μ/2) ||u − z||²,       u = prox_{g/μ}(z − ∇F(z)/μ).

        The others need no curvature. They are Fenchel gaps at dual points ν, r = A* z − x the residual,

            g(z) + g*(w) − <b, z> + λ ||z||² + ½ ||r||² + ½ ||ν||² + <ν, x>,    w = b − λ z − A ν,

        once at shrunken residuals ν = s r, 0 ≤ s ≤ 1, and, where the bounds so far are poor, at ν = r + d
        with a small d, found by accelerated gradient steps, that brings w into the domain of g*.
        Round-off of ∇F is added to the bounds. The value is +inf where z is infeasible, and where no
        dual point was found, as when the problem is unbounded below.

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

    def _gradient_round_off(self, z: Array) -> Array:
        """A bound on the norm of the rounding error of ∇F(z), from the sizes of what it adds up."""
        A, eps = self.linear_map, jnp.finfo(self.dtype).eps
        bias = jnp.zeros(self.shape, self.dtype) if self.bias is None else self.bias
        bias = jnp.broadcast_to(bias, self.shape)
        size = self.norm(A(A.adjoint(z))) + self.norm(A(self.inputs))
        return 16.0 * eps * (size + self.norm(bias) + self.ridge * self.norm(z))

    def _bias_product(self, z: Array) -> Array:
        if self.bias is None:
            return jnp.zeros(self.batch_shape, self.dtype)
        return self.sum(self.bias * z)

    def _variable(self, z: Array) -> Array:
        if jnp.shape(z) != self.shape:
            _checks.fail("shape of the variable z", f"{self.shape}", jnp.shape(z))
        return jnp.asarray(z, self.dtype)


@jax.jit
def _certificate(problem: LayerProblem, z: Array) -> Array:
    with jax.default_matmul_precision("highest"):
        gradient, noise = problem.gradient(z), problem._gradient_round_off(z)
        bound = jnp.fmin(
            _curvature_gap(problem, z, gradient, noise), _scaled_gap(problem, z, noise)
        )
        poor = jnp.any(~(bound <= _POOR * jnp.abs(problem.objective(z))))
        return jnp.fmin(bound, _repaired_gap(problem, z, gradient, noise, wanted=poor))


def _curvature_gap(problem: LayerProblem, z: Array, gradient: Array, noise: Array) -> Array:
    """The strong-convexity bound, +inf for μ = 0."""
    mu = problem.ridge + lipschitz.strong_convexity(problem.linear_map)
    safe_mu = jnp.where(mu > 0, mu, 1.0)
    u = problem.prior.prox(z - gradient / safe_mu, 1.0 / safe_mu)
    move = u - z
    descent = problem.sum(gradient * move) + 0.5 * safe_mu * problem.sum(move**2)
    prior_gain = problem.prior_value(z) - problem.prior_value(u)
    gap = jnp.maximum(prior_gain - descent, 0.0)
    eps = jnp.finfo(problem.dtype).eps
    slack = noise * problem.norm(move) + noise**2 / (2.0 * safe_mu)
    slack += 16.0 * eps * (jnp.abs(problem.prior_value(u)) + problem.sum(jnp.abs(gradient * move)))
    return jnp.where(mu > 0, gap + slack, jnp.inf)


def _scaled_gap(problem: LayerProblem, z: Array, noise: Array) -> Array:
    """The least Fenchel gap at ν = s r, r = A* z − x, over a few s in [0, 1]."""
    A, prior, eps = problem.linear_map, problem.prior, jnp.finfo(problem.dtype).eps
    residual = problem.residual(z)
    image = A(residual)
    offset = problem.with_bias_and_ridge(jnp.zeros_like(z), z)  # λ z − b
    squares, fit = problem.sum(residual**2), problem.sum(residual * problem.inputs)
    common = problem.prior_value(z) + problem.sum(offset * z) + 0.5 * squares
    axes = tuple(range(len(problem.batch_shape), z.ndim))

    def gap(s):
        # at s = 0 the point is b − λ z, free of the round-off that A r carries
        w, tolerance = -offset - s * image, 2.0 * jnp.sign(s) * noise
        inside = prior.dual_projection(w, jnp.expand_dims(tolerance, axes))
        conjugate = problem.per_example(prior.conjugate)(w)
        bound = common + conjugate + 0.5 * s**2 * squares + s * fit
        scale = problem.sum(jnp.abs(offset * z)) + squares + jnp.abs(s * fit) + jnp.abs(conjugate)
        slack = s * noise * problem.norm(z) + 16.0 * eps * jnp.where(conjugate < jnp.inf, scale, 0)
        allowed = problem.norm(w - inside) <= 0.5 * tolerance
        return jnp.where(allowed, jnp.maximum(bound, 0.0) + slack, jnp.inf)

    shrink = jnp.concatenate([1.0 - 0.5 ** jnp.arange(0.0, 24.0, 2.0), jnp.ones(1)])
    return jnp.min(lax.map(gap, shrink.astype(problem.dtype)), axis=0)


def _repaired_gap(
    problem: LayerProblem, z: Array, gradient: Array, noise: Array, *, wanted: Array
) -> Array:
    """The Fenchel gap at ν = r + d; +inf for the examples for which no d was found."""
    A, prior = problem.linear_map, problem.prior
    extra_axes = tuple(range(len(problem.batch_shape), z.ndim))
    tolerance = jnp.expand_dims(noise, extra_axes)
    violation = problem.norm(gradient + prior.dual_projection(-gradient, 2.0 * tolerance))
    # aim a little inside the domain, in proportion to how far outside the point is
    margin = 2.0 * tolerance + _REPAIR_MARGIN * jnp.expand_dims(violation, extra_axes)
    step = 1.0 / jnp.maximum(lipschitz.lipschitz_constant(A, grid="padded"), 1e-30)

    def dual_point(d):
        return -gradient - A(d)

    def inside(d):
        w = dual_point(d)
        return problem.norm(w - prior.dual_projection(w, 2.0 * tolerance)) <= noise

    def unfinished(carry):
        k, _, _, _, done = carry
        return wanted & (k < _REPAIR_STEPS) & ~jnp.all(done)

    def repair(carry):
        k, d, ahead, t, done = carry
        w = dual_point(ahead)
        moved = ahead + step * A.adjoint(w - prior.dual_projection(w, margin))
        moved = jnp.where(jnp.expand_dims(done, x_axes), d, moved)
        t_next = 0.5 * (1.0 + jnp.sqrt(1.0 + 4.0 * t**2))
        return k + 1, moved, moved + (t - 1.0) / t_next * (moved - d), t_next, done | inside(moved)

    x_axes = tuple(range(len(problem.batch_shape), problem.inputs.ndim))
    zero = jnp.zeros_like(problem.inputs)
    start = (0, zero, zero, jnp.ones((), problem.dtype), inside(zero))
    _, d, _, _, done = lax.while_loop(unfinished, repair, start)
    conjugate = problem.per_example(prior.conjugate)(dual_point(d))
    gap = problem.prior_value(z) + conjugate + problem.sum(gradient * z)
    gap += problem.sum(A.adjoint(z) * d) + 0.5 * problem.sum(d**2)
    eps = jnp.finfo(problem.dtype).eps
    scale = problem.sum(jnp.abs(gradient * z)) + jnp.where(done, jnp.abs(conjugate), 0.0)
    slack = noise * problem.norm(z) + 16.0 * eps * scale
    return jnp.where(done, jnp.maximum(gap, 0.0) + slack, jnp.inf)
