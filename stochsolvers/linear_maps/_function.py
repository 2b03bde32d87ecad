"""A linear map given by a function, matrix-free."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from stochsolvers import _checks
from stochsolvers._typing import Array, static_field, value_object
from stochsolvers.linear_maps._base import LinearMap

_WHAT = "function of linear_map"


def linear_map(
    function: Callable[..., Array],
    in_shape: tuple[int, ...],
    *operands: Any,
    dtype: DTypeLike = jnp.float32,
) -> LinearMap:
    r"""The map A(x) = function(*operands, x) of any function of one example that is linear in x.

    The function is mapped over batch axes; the adjoint is the transpose that JAX derives. The matrix is
    never formed.

    `operands` are arrays, or pytrees of arrays, on which the function depends: derivatives reach them, and
    a map with other operands of the same shapes does not compile again. An array that the function closes
    over is a constant instead. The function itself is structure: solvers compile once for each function
    object, so define it once, not a new lambda for each map. A function that is a pytree
    (`jax.tree_util.Partial`, a module of arrays) becomes an operand.

    Args:
      function: takes `(*operands, x)` with x of shape `in_shape` to one real array with at least one axis.
      in_shape: of one input, without batch axes, the features last.
      *operands: what the function depends on besides x.
      dtype: of x, unless x or an operand has a wider one.

    Raises:
      ValueError: at trace time, if the function does not return one real floating-point array, or is not
        linear: JAX cannot transpose it, or its value at zero is not zero. The value is computed once for
        each map, and not checked where the operands are traced.
    """
    if not callable(function):
        _checks.fail(_WHAT, "a function", type(function).__name__)
    if not jax.tree_util.all_leaves([function]):
        function, operands = _call, (function, *operands)
    if not isinstance(in_shape, tuple | list) or not in_shape:
        _checks.fail("in_shape of linear_map", "at least one axis", repr(in_shape))
    in_shape = _checks.counts("in_shape of linear_map", in_shape, len(in_shape))
    if not jnp.issubdtype(dtype, jnp.floating):
        _checks.fail("dtype of linear_map", "a real floating-point dtype", dtype)
    operands = jax.tree.map(jnp.asarray, operands)
    unchecked = _FunctionMap(function, operands, in_shape, in_shape, jnp.dtype(dtype))
    return dataclasses.replace(unchecked, out_shape=_checked_out_shape(unchecked))


def _call(function: Callable[..., Array], *arguments: Any) -> Array:
    return function(*arguments)


def _checked_out_shape(linear_map: "_FunctionMap") -> tuple[int, ...]:
    """The shape of an output, if the function is linear."""
    x = jax.ShapeDtypeStruct(linear_map.in_shape, linear_map.dtype)
    closed, out = jax.make_jaxpr(linear_map.of_one, return_shape=True)(x)
    if not isinstance(out, jax.ShapeDtypeStruct) or not jnp.issubdtype(out.dtype, jnp.floating):
        _checks.fail(f"output of {_WHAT}", "one real floating-point array", _describe(out))
    if not out.shape:
        _checks.fail(f"output of {_WHAT}", "at least one axis", "a scalar")
    try:
        jax.eval_shape(jax.linear_transpose(linear_map.of_one, x), out)
    except Exception as error:  # what JAX raises depends on the operation that has no transpose
        reason = str(error).partition("\n")[0] or type(error).__name__
        _checks.fail(_WHAT, "one that is linear in x", f"one that JAX cannot transpose ({reason})")
    if not any(isinstance(constant, jax.core.Tracer) for constant in closed.consts):
        with jax.ensure_compile_time_eval():
            at_zero = jax.core.eval_jaxpr(closed.jaxpr, closed.consts, jnp.zeros(x.shape, x.dtype))
        largest = np.max(np.abs(np.asarray(at_zero[0], np.float64)), initial=0.0)
        if math.isfinite(largest) and largest > 0:  # operands that are not finite do not raise
            _checks.fail(_WHAT, "one that is zero at x = 0", f"an entry of {largest:.3g} there")
    return out.shape


def _describe(out: Any) -> str:
    return str(jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", out))


@value_object
class _FunctionMap(LinearMap):
    """x ↦ function(*operands, x), for each example of a batch."""

    function: Callable[..., Array] = static_field()
    operands: tuple[Any, ...]
    in_shape: tuple[int, ...] = static_field()
    out_shape: tuple[int, ...] = static_field()
    own_dtype: jnp.dtype = static_field()

    @property
    def dtype(self) -> jnp.dtype:
        if not jax.tree.leaves(self.operands):
            return self.own_dtype
        return jnp.promote_types(self.own_dtype, super().dtype)

    def astype(self, dtype: DTypeLike) -> "_FunctionMap":
        return dataclasses.replace(super().astype(dtype), own_dtype=jnp.dtype(dtype))

    def of_one(self, x: Array) -> Array:
        return self.function(*self.operands, x)

    def __call__(self, x: Array) -> Array:
        _checks.trailing("argument of a linear_map", x, self.in_shape)
        x = jnp.asarray(x)
        batch = x.shape[: x.ndim - len(self.in_shape)]
        x = x.astype(jnp.promote_types(x.dtype, self.dtype))
        if not batch:
            return self.of_one(x)
        images = jax.vmap(self.of_one)(x.reshape(-1, *self.in_shape))
        return images.reshape(*batch, *self.out_shape)
