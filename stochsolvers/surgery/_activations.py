"""The prior of an activation, from its traced operations."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from stochsolvers import prox
from stochsolvers.prox import Prior
from stochsolvers.surgery._functions import Function, traced

_A, _B = 0.1171875, 0.2265625  # stand for any number; exact in float32


class _Known(NamedTuple):
    name: str
    function: Callable[..., Any]
    prior: Callable[..., Prior] | None
    numbers: dict[float, str] = {}  # noqa: RUF012


def _relu_by_where(x: Any) -> Any:
    return jnp.where(x > 0, x, 0)


def _relu_by_where_not(x: Any) -> Any:
    return jnp.where(x < 0, 0, x)


_KNOWN = (
    _Known("relu", jax.nn.relu, prox.NonNegative),
    _Known("relu", lambda x: jnp.maximum(0.0, x), prox.NonNegative),
    _Known("relu", lambda x: jnp.clip(x, 0.0), prox.NonNegative),
    _Known("relu", _relu_by_where, prox.NonNegative),
    _Known("relu", _relu_by_where_not, prox.NonNegative),
    _Known("relu6", jax.nn.relu6, lambda: prox.Box(0.0, 6.0)),
    _Known("hard_tanh", jax.nn.hard_tanh, lambda: prox.Box(-1.0, 1.0)),
    _Known("clip", lambda x: jnp.clip(x, _A, _B), prox.Box, {_A: "lo", _B: "hi"}),
    _Known("tanh", jnp.tanh, prox.Tanh),
    _Known("sigmoid", jax.nn.sigmoid, prox.Sigmoid),
    _Known("softplus", jax.nn.softplus, prox.Softplus),
    _Known("soft_sign", jax.nn.soft_sign, prox.Softsign),
    _Known("arctan", jnp.arctan, prox.Arctan),
    _Known("elu", lambda x: jax.nn.elu(x, _A), prox.ELU, {_A: "alpha"}),
    _Known(
        "leaky_relu", lambda x: jax.nn.leaky_relu(x, _A), prox.LeakyReLU, {_A: "negative_slope"}
    ),
    _Known("log_sigmoid", jax.nn.log_sigmoid, None),
    _Known("hard_sigmoid", jax.nn.hard_sigmoid, None),
    _Known("squareplus", jax.nn.squareplus, None),
    _Known("celu", lambda x: jax.nn.celu(x, _A), None, {_A: "alpha"}),
    _Known("gelu", lambda x: jax.nn.gelu(x, approximate=True), None),
    _Known("gelu", lambda x: jax.nn.gelu(x, approximate=False), None),
    _Known("silu", jax.nn.silu, None),
    _Known("silu", lambda x: x * jax.nn.sigmoid(_A * x), None, {_A: "beta"}),
    _Known("mish", jax.nn.mish, None),
    _Known("hard_silu", jax.nn.hard_silu, None),
    _Known("selu", jax.nn.selu, None),
)
_NO_PROX = "so that it is the prox of no convex function; ReLU and softplus are"
_OUTSIDE = {
    "gelu": f"GELU decreases on (−∞, −0.75), {_NO_PROX}",
    "silu": f"SiLU (swish) decreases on (−∞, −1.28), {_NO_PROX}",
    "mish": f"mish decreases on (−∞, −1.19), {_NO_PROX}",
    "hard_silu": f"hard SiLU decreases between −3 and −1.5, {_NO_PROX}",
    "selu": "SELU has slopes up to 1.758, where a prox has at most 1; ELU is one",
}


class Activation(NamedTuple):
    """What an elementwise function is as a prior.

    Attributes:
      name: of the function in JAX, "custom" for one that is not known.
      prior: g with prox_g the function; None where it is the prox of no convex function.
      reason: why there is no prior.
    """

    name: str
    prior: Prior | None
    reason: str = ""


@functools.lru_cache(maxsize=512)
def activation(function: Function) -> Activation:
    """Recognise the function of JAX with the same operations; else check the function on a grid.

    A function without a class in `stochsolvers.prox` becomes `prox.Activation(function)`, if it is finite,
    non-decreasing and of slope at most 1 on 3,200 points between −1e4 and 1e4.
    """
    for known in _KNOWN:
        numbers = function.match(traced(known.function), known.numbers)
        if numbers is None:
            continue
        if known.name in _OUTSIDE:
            return Activation(known.name, None, _OUTSIDE[known.name])
        if known.prior is None:
            return _general(known.name, function)
        try:
            return Activation(known.name, known.prior(**numbers))
        except ValueError as error:  # a slope outside the prior's range
            return Activation(known.name, None, str(error).rstrip("."))
    return _general("custom", function)


def _general(name: str, function: Function) -> Activation:
    try:
        return Activation(name, prox.Activation(function))
    except ValueError as error:
        got = str(error).rpartition(", got ")[2].rstrip(".")
        return Activation(name, None, f"its activation is the prox of no convex function: {got}")
