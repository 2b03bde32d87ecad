"""Objective (5) of a layer, its terms and its gradient."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from stochsolvers import _checks, prox
from stochsolvers._typing import Array, Scalar, real, value_object
from stochsolvers.linear_maps import LinearMap
from stochsolvers.problems import _certificate


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
        of ∇F times the size of z, which is added to them: the value is never below the gap of the arrays
        as they are. A* z and A r are summed in blocks of some 32 products, whose sums go on in twice the
        precision, so that the round-off is that of a block. The value is +inf where z is infeasible, and
        where no dual point was found, as when the problem is unbounded below.

        Returns:
          shape (*batch,), in units of the objective. Not differentiable.

        References:
          Nesterov 2018, theorem 2.1.10 (first bound); Rockafellar 1970, section 31 (the others).
        """
        return _certificate.certificate(*jax.tree.map(lax.stop_gradient, (self, self._variable(z))))

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
