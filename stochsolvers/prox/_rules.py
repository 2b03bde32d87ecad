"""Elementwise functions with their derivatives written out, so that these neither overflow nor cancel."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from stochsolvers._typing import Array

ValueAndPartials = tuple[Array, tuple[Array, ...]]


def with_partials(function: Callable[..., ValueAndPartials]) -> Callable[..., Array]:
    """f, of a function of arrays of one shape that returns f and its partial derivatives in all of them.

    Automatic differentiation of a formula passes through factors that may overflow where their
    product does not (γ/u² · u at u = 1e-30). Partials that multiply no tangent are left out, for
    they may be infinite.
    """

    @jax.custom_jvp
    def value(*arguments):
        return function(*arguments)[0]

    def jvp(primals, tangents):
        pairs = [
            (partial, direction)
            for partial, direction in zip(function(*primals)[1], tangents, strict=True)
            if not isinstance(direction, SymbolicZero)
        ]
        # the barrier: else XLA computes the partials again in every sum over a broadcast weight
        partials = jax.lax.optimization_barrier([partial for partial, _ in pairs])
        result, tangent = value(*primals), jnp.zeros_like(primals[0])
        for partial, (_, direction) in zip(partials, pairs, strict=True):
            tangent = tangent + partial * direction
        return result, tangent

    value.defjvp(jvp, symbolic_zeros=True)
    return value


@jax.custom_jvp
def hypot(x: Array, y: Array) -> Array:
    """√(x² + y²) without squares that overflow; not for x = y = 0."""
    high, low = jnp.maximum(jnp.abs(x), jnp.abs(y)), jnp.minimum(jnp.abs(x), jnp.abs(y))
    ratio = low / high
    return high * jnp.sqrt(1 + ratio * ratio)


@hypot.defjvp
def _hypot_jvp(primals, tangents):
    (x, y), (dx, dy) = primals, tangents
    h = hypot(x, y)
    return h, x / h * dx + y / h * dy
