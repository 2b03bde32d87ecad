"""The implicit step of the parameters of a linear map, and the map whose parameters take it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from stochsolvers import _checks
from stochsolvers._shards import automatic, is_explicit, spec_of, varying_axes
from stochsolvers._typing import Array, at_least_float32
from stochsolvers.linear_maps import Conv, Dense, LinearMap
from stochsolvers.proxprop import _columns
from stochsolvers.proxprop._steps import ConjugateGradients, Exact, ImplicitStep, checked_step
from stochsolvers.proxprop._through import implicit_step
from stochsolvers.proxprop._trees import Parameters


def implicit_gradient(
    linear_map: LinearMap,
    inputs: Array,
    cotangent: Array,
    step: ImplicitStep,
    *,
    bias: bool = True,
) -> tuple[Any, Array | None]:
    r"""d = (AᵀA + I/τ)⁻¹ Aᵀ G for the parameters of a linear map and a bias.

    A is here the map from the parameters to the outputs at the given inputs, rows [x 1] of a dense layer,
    and [patch 1] of a convolution.

    Args:
      linear_map: a `Dense` or a `Conv`, or with `ConjugateGradients` any other map; one that is not linear in
        its arrays is linearised in them.
      inputs: x, shape (*batch, *in_shape), at least one batch axis; all of them are one batch.
      cotangent: G, of the outputs, shape (*batch, *out_shape).
      step: `Exact` or `ConjugateGradients`.
      bias: whether the layer has a bias, of shape (n2,).

    Returns:
      The pair of d of the map and d of the bias, or None. The first is an array of its kernel's shape and
      dtype; for maps without a `kernel`, such as transposed convolutions, a map whose arrays are the step of
      its own.

    Raises:
      ValueError: at trace time, for shapes that do not fit, no batch axis, and `Exact` for other maps.
    """
    _check_inputs(linear_map, inputs, step)
    _checks.floating("cotangent", cotangent)
    inputs, cotangent = jnp.asarray(inputs), jnp.asarray(cotangent)
    batch = inputs.shape[: inputs.ndim - len(linear_map.in_shape)]
    if cotangent.shape != (*batch, *linear_map.out_shape):
        expected = f"{(*batch, *linear_map.out_shape)}"
        _checks.fail("shape of the cotangent", expected, cotangent.shape)
    template = jax.ShapeDtypeStruct((linear_map.out_features,), linear_map.dtype) if bias else None
    leaves, d_bias = _on_any_mesh(linear_map, inputs, cotangent, step, template)
    moved = Parameters.of(linear_map).rebuilt(leaves)
    return getattr(moved, "kernel", moved), d_bias


def apply(linear_map: LinearMap, inputs: Array, bias: Array | None, step: ImplicitStep) -> Array:
    r"""A(x) + b, where reverse mode gives the map and the bias their implicit step.

    The cotangent of the inputs is the ordinary one, A*(G); that of τ is zero. Forward mode is refused.

    Args:
      linear_map: A, as in `implicit_gradient`.
      inputs: x, shape (*batch, *in_shape), at least one batch axis.
      bias: b, shape (n2,), or None; for maps that are neither dense nor convolutions, the shape of any last
        axes of an output.
      step: `Exact` or `ConjugateGradients`.

    Returns:
      shape (*batch, *out_shape).

    Raises:
      ValueError: as `implicit_gradient`; also within `shard_map`, for a map that all devices share at inputs
        that they do not: the system would be that of a part of the batch.
    """
    _check_inputs(linear_map, inputs, step)
    inputs = jnp.asarray(inputs)
    if bias is not None:
        _checks.floating("bias of proximal backpropagation", bias)
        bias = jnp.asarray(bias)
        shapes = [linear_map.out_shape[-1:]]
        if not isinstance(linear_map, Dense | Conv):
            shapes = [linear_map.out_shape[-k:] for k in range(1, 1 + len(linear_map.out_shape))]
        if bias.shape not in shapes:
            _checks.fail("shape of the bias", " or ".join(map(str, shapes)), bias.shape)
    unshared = varying_axes(inputs) - varying_axes(linear_map)
    if unshared:
        _checks.fail(
            "parameters of proximal backpropagation within shard_map",
            f"ones that vary over {sorted(unshared)} as the inputs do (the implicit system is that of the "
            "whole batch; leave it to jit on a mesh)",
            "ones that all devices share",
        )
    precision = jax.config.jax_default_matmul_precision  # pyright: ignore
    return _apply(precision, linear_map, inputs, bias, step)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply(
    precision: Any, linear_map: LinearMap, inputs: Array, bias: Array | None, step: ImplicitStep
) -> Array:
    outputs = linear_map(inputs)
    return outputs if bias is None else outputs + _expanded(bias, outputs.ndim)


def _forward(precision: Any, *arguments: Any) -> tuple[Array, Any]:
    return _apply(precision, *arguments), arguments


def _backward(precision: Any, arguments: Any, cotangent: Array) -> tuple[Any, ...]:
    linear_map, inputs, bias, step = arguments
    with jax.default_matmul_precision(precision):
        leaves, d_bias = _on_any_mesh(linear_map, inputs, cotangent, step, bias)
        d_inputs = automatic(_of_inputs, _spec(inputs), linear_map, inputs, cotangent)
    return Parameters.of(linear_map).cotangent(leaves), d_inputs, d_bias, None


_apply.defvjp(_forward, _backward)


def _spec(array: Any) -> PartitionSpec:
    """How an array is split over an explicit mesh; a template is not."""
    if not is_explicit() or isinstance(array, jax.ShapeDtypeStruct):
        return PartitionSpec()
    return PartitionSpec(*spec_of(array))


def _of_inputs(linear_map: LinearMap, inputs: Array, cotangent: Array) -> Array:
    outputs, pull = jax.vjp(linear_map.__call__, inputs)
    return pull(cotangent.astype(outputs.dtype))[0]


def _expanded(bias: Array, ndim: int) -> Array:
    return jnp.expand_dims(bias, tuple(range(ndim - bias.ndim)))


def _check_inputs(linear_map: Any, inputs: Any, step: Any) -> None:
    if not isinstance(linear_map, LinearMap):
        got = type(linear_map).__name__
        _checks.fail("linear_map of proximal backpropagation", "a LinearMap", got)
    if isinstance(checked_step(step), Exact):
        _columns.check_exact(linear_map, step.form)
    _checks.floating("inputs", inputs)
    _checks.trailing("inputs", inputs, linear_map.in_shape)
    if jnp.ndim(inputs) <= len(linear_map.in_shape):
        axes = ", ".join(map(str, linear_map.in_shape))
        _checks.fail(
            "shape of the inputs of proximal backpropagation",
            f"(batch, ..., {axes}): the implicit step is that of a whole batch, and vmap over examples "
            "would take one for each of them",
            jnp.shape(inputs),
        )


def _on_any_mesh(
    linear_map: LinearMap, inputs: Array, cotangent: Array, step: ImplicitStep, bias: Any
) -> tuple[list[Array], Array | None]:
    """The steps of the map's arrays and of the bias, of an array's or a template's shape, in their dtypes."""
    parameters = Parameters.of(linear_map)
    shape = None if bias is None else bias.shape
    specs = [_spec(leaf) for leaf in parameters.leaves], None if bias is None else _spec(bias)
    run = functools.partial(_implicit_gradient, bias_shape=shape)
    step = jax.tree.map(jnp.asarray, step)
    leaves, d_bias = automatic(run, specs, linear_map, inputs, cotangent, step)
    if d_bias is not None and bias is not None:
        d_bias = d_bias.astype(bias.dtype)
    return parameters.like(leaves), d_bias


def _implicit_gradient(
    linear_map: LinearMap,
    inputs: Array,
    cotangent: Array,
    step: ImplicitStep,
    *,
    bias_shape: tuple[int, ...] | None,
) -> tuple[list[Array], Array | None]:
    """The one border to at least float32."""
    dtype = at_least_float32(linear_map.dtype, inputs.dtype, cotangent.dtype)
    linear_map = linear_map.astype(dtype)
    inputs, cotangent = inputs.astype(dtype), cotangent.astype(dtype)
    tau, parameters = jnp.asarray(step.tau, dtype), Parameters.of(linear_map)
    bias = None if bias_shape is None else jnp.zeros(bias_shape, dtype)
    if not cotangent.size:
        return [jnp.zeros_like(leaf) for leaf in parameters.leaves], bias
    if isinstance(linear_map, Dense | Conv):
        rows = _columns.of(linear_map, inputs, cotangent, bias=bias_shape is not None)
        return rows.kernel_and_bias(rows.step(step, tau))

    def outputs(both: Any) -> Array:
        leaves, bias = both
        value = parameters.rebuilt(leaves)(inputs)
        return value if bias is None else value + _expanded(bias, value.ndim)

    assert isinstance(step, ConjugateGradients)  # `_check_inputs`
    return implicit_step(outputs, (parameters.leaves, bias), cotangent, tau, step.num_iters)
