"""The objective of a layer, its terms and its gradient."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from stochsolvers import _checks, losses, prox
from stochsolvers._shards import spec_of
from stochsolvers._typing import Array, Scalar, at_least_float32, value_object
from stochsolvers.linear_maps import LinearMap
from stochsolvers.problems._base import Problem

_EXAMPLES = {
    "linear_map": ", such as Dense(W) or Conv(W, shape)",
    "prior": ", such as prox.NonNegative() (of an activation: prox.Activation(function))",
}


@value_object
class Objective(Problem):
    """The formula of `LayerProblem`: values and gradients, without certificates; see there."""

    linear_map: LinearMap
    inputs: Array
    _: dataclasses.KW_ONLY
    loss: losses.Loss = losses.Squares()
    bias: Array | None = None
    prior: prox.Prior = prox.NonNegative()
    ridge: Scalar = 0.0

    def __post_init__(self):
        for name, kind in (
            ("linear_map", LinearMap), ("loss", losses.Loss), ("prior", prox.Prior),
        ):  # fmt: skip
            factor = getattr(self, name)
            wanted = f"an instance of {kind.__name__}" + _EXAMPLES.get(name, "")
            _checks.instance(f"{name} of LayerProblem", factor, kind, wanted)
            if jax.tree_util.all_leaves([factor]):
                wanted = "a class under the decorator stochsolvers.value_object"
                _checks.fail(f"{name} of LayerProblem", wanted, type(factor).__name__)
        _checks.floating("inputs of LayerProblem", self.inputs)
        _checks.trailing("inputs of LayerProblem", self.inputs, self.linear_map.in_shape)
        _checks.non_negative("ridge", self.ridge)
        _checks.rank("ridge", self.ridge, 0)
        dtype = at_least_float32(jnp.result_type(self.inputs), self.linear_map.dtype)
        object.__setattr__(self, "ridge", jnp.asarray(self.ridge, dtype))
        if self.bias is not None:
            _checks.floating("bias of LayerProblem", self.bias)
            _checks.broadcastable("bias of LayerProblem", self.bias, self.shape)
            object.__setattr__(self, "bias", jnp.asarray(self.bias, dtype))
        object.__setattr__(self, "inputs", jnp.asarray(self.inputs, dtype))
        object.__setattr__(self, "linear_map", self.linear_map.astype(dtype))
        self._check_axes()

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

    @property
    def proximal_term(self) -> prox.Prior:
        """The prior."""
        return self.prior

    @property
    def is_quadratic(self) -> bool:
        """Whether ℓ is half the squared distance, so that ∇F is affine."""
        return type(self.loss) is losses.Squares

    def residual(self, z: Array) -> Array:
        """∂ℓ/∂u at u = A* z, shaped as the inputs; A* z − x for squares."""
        return self.loss.derivative(self.linear_map.adjoint(self._variable(z)), self.inputs)

    def terms(self, z: Array) -> Array:
        r"""The n1 terms f_i(z) = n1 ℓ((A* z)_i, x_i) − <b, z>, shape (*batch, n1).

        For a convolution, i runs over whole input feature maps. F is their mean, plus the ridge.
        """
        values = self._losses(z)
        spatial = tuple(range(len(self.batch_shape), values.ndim - 1))
        fit = self.linear_map.in_features * jnp.sum(values, axis=spatial)
        return fit - self._bias_product(z)[..., None]

    def smooth(self, z: Array) -> Array:
        """F(z) for each example, shape (*batch,)."""
        z = self._variable(z)
        # the ridge first, so that none is none where a square overflows
        pull = 0.5 * self.sum((self.ridge * z) * z)
        return self.sum(self._losses(z)) - self._bias_product(z) + pull

    def objective(self, z: Array) -> Array:
        """P(z) = F(z) + g(z) for each example, shape (*batch,); +inf outside the domain of g."""
        return self.smooth(z) + self.prior_value(z)

    def gradient(self, z: Array) -> Array:
        r"""∇F(z) = A ∂ℓ(A* z, x) − b + λ z, shaped as z; A(A* z − x) − b + λ z for squares."""
        return self.with_bias_and_ridge(self.linear_map(self.residual(z)), z)

    def data_gradient_at_zero(self) -> Array:
        r"""A ∂ℓ(0, x), at the price of the plain layer; −A x for squares."""
        x = self.inputs
        if self.is_quadratic:
            return -self.linear_map(x)
        return self.linear_map(self.loss.derivative(jnp.zeros_like(x), x))

    def gradient_at_zero(self) -> Array:
        """∇F(0) = A ∂ℓ(0, x) − b; −A x − b for squares."""
        slope = self.data_gradient_at_zero()
        return self.with_bias_and_ridge(slope, jnp.zeros_like(slope))

    def with_bias_and_ridge(self, data_gradient: Array, z: Array) -> Array:
        """The gradient of the losses, or an estimate of it, completed by − b + λ z."""
        if self.bias is not None:
            data_gradient = data_gradient - self.expanded_bias()
        return data_gradient + self.ridge * z

    def prior_value(self, z: Array) -> Array:
        """g(z) for each example, shape (*batch,)."""
        value = self.per_example(self.prior.value)(self._variable(z))
        if jnp.shape(value) != self.batch_shape:
            name, got = type(self.prior).__name__, jnp.shape(value)[len(self.batch_shape) :]
            _checks.fail(f"shape of {name}._value(u)", "(), a sum over all entries of u", got)
        return value

    def smoothness(self, squared_norm: Array) -> Array:
        """L_F = L_ℓ ‖A‖² + λ, a Lipschitz constant of ∇F, given ‖A‖²."""
        return self.loss.smoothness * squared_norm + self.ridge

    def largest_entries(self) -> Array:
        """The largest of |x| and |b| for each example, shape (*batch,)."""
        arrays = [self.inputs]
        if self.bias is not None:
            arrays.append(jnp.broadcast_to(self.expanded_bias(), self.shape))
        batch = len(self.batch_shape)
        sizes = [
            jnp.max(jnp.abs(a), axis=tuple(range(batch, a.ndim)), initial=0)
            for a in lax.stop_gradient(arrays)
        ]
        return functools.reduce(jnp.maximum, sizes)

    def value_spec(self) -> tuple[Any, ...]:
        """As the plain layer's output is split."""
        return spec_of(jax.eval_shape(lambda A, x: A(x), self.linear_map, self.inputs))

    def _check_axes(self) -> None:
        named = getattr(self.prior, "axes", getattr(self.prior, "axis", ()))
        event_ndim = len(self.linear_map.out_shape)
        classes, least = getattr(self.loss, "axis", -1), -len(self.linear_map.in_shape)
        if classes < least:
            _checks.fail(
                f"axis of {type(self.loss).__name__}",
                f"an axis of the inputs, {least}..-2",
                classes,
            )
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

    def _losses(self, z: Array) -> Array:
        return self.loss.value(self.linear_map.adjoint(self._variable(z)), self.inputs)

    def _bias_product(self, z: Array) -> Array:
        if self.bias is None:
            return jnp.zeros(self.batch_shape, self.dtype)
        return self.sum(self.expanded_bias() * z)

    def expanded_bias(self) -> Array:
        """b with all axes of z, so that ranks are promoted once."""
        bias = jnp.asarray(self.bias)
        return jnp.expand_dims(bias, range(len(self.shape) - bias.ndim))
