r"""Lipschitz constants of the activations of `jax.nn`, recognised by their programs.

A computation is taken for an activation φ(x), entry by entry, if its graph of operations equals that of the
function in `jax.nn`, traced by the installed JAX: the same primitives and the same constants. Casts between
floating-point dtypes, and permutations and reshapes of all entries, are ignored. Names of functions are not
used. Lipschitz constants of φ:

    softplus, soft_sign, hard_tanh, sparse_plus     1          silu, mish      1.1
    gelu, exact and by tanh                         1.129
    squareplus(b), b ≥ 0                            1          hard_silu       1.5
    elu(α), leaky_relu(α)                           max(1, |α|)
    celu(α), α > 0                                  1
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from stochsolvers.reports._program import Value, is_float, run

_REARRANGEMENTS = ("reshape", "squeeze", "expand_dims", "transpose", "rev", "copy", "copy_p")


class _Activation(NamedTuple):
    function: Callable[..., Any]
    slope: Callable[..., float]  # of the function's parameters
    parameters: int = 0


_ACTIVATIONS = (
    _Activation(jax.nn.softplus, lambda: 1.0),
    _Activation(jax.nn.soft_sign, lambda: 1.0),
    _Activation(jax.nn.hard_tanh, lambda: 1.0),
    _Activation(jax.nn.sparse_plus, lambda: 1.0),
    _Activation(jax.nn.silu, lambda: 1.1),
    _Activation(jax.nn.mish, lambda: 1.1),
    _Activation(jax.nn.hard_silu, lambda: 1.5),
    _Activation(functools.partial(jax.nn.gelu, approximate=True), lambda: 1.129),
    _Activation(functools.partial(jax.nn.gelu, approximate=False), lambda: 1.129),
    _Activation(jax.nn.squareplus, lambda b: 1.0 if b >= 0 else math.inf, 1),
    _Activation(jax.nn.elu, lambda alpha: max(1.0, abs(alpha)), 1),
    _Activation(jax.nn.leaky_relu, lambda alpha: max(1.0, abs(alpha)), 1),
    _Activation(jax.nn.celu, lambda alpha: 1.0 if alpha > 0 else math.inf, 1),
)


class Match(NamedTuple):
    """A value that is an activation of an earlier one.

    Attributes:
      slope: ℓ of the activation.
      source: the earlier value.
    """

    slope: float
    source: Value

    def constant(self, shape: tuple[int, ...]) -> float:
        """ℓ of the value, of this shape; an activation of slope 0 or of ℓ = 0 is constant."""
        return self.slope * self.source.repeated(shape)


def activation_of(value: Value) -> Match | None:
    """What a value is an activation of; the one with the smallest constant, None if it is none."""
    if not is_float(value.aval):
        return None
    return min(_matching(value), key=lambda match: match.slope, default=None)


def _matching(value: Value) -> Iterator[Match]:
    for activation in _ACTIVATIONS:
        program = _program(activation, value.aval.dtype, jnp.result_type(float))
        found: dict[Value, Any] = {}
        if program.result.operation == value.operation and _matches(
            program.result, value, program.arguments, found
        ):
            x, *parameters = (found[argument] for argument in program.arguments)
            slope = (
                activation.slope(*parameters) if all(map(math.isfinite, parameters)) else math.inf
            )
            if math.isfinite(slope):
                yield Match(slope, x[0])


class _Program(NamedTuple):
    arguments: tuple[Value, ...]  # x, and the parameters
    result: Value


@functools.cache
def _program(activation: _Activation, dtype: Any, default: Any) -> _Program:
    """The graph of an activation for scalars of a dtype, traced while JAX's default dtype is `default`."""
    scalars = [jax.ShapeDtypeStruct((), dtype)] * (1 + activation.parameters)
    jaxpr: Any = jax.make_jaxpr(activation.function)(*scalars).jaxpr
    arguments = tuple(Value(variable.aval, 0.0) for variable in jaxpr.invars)
    (result,) = run(jaxpr, arguments)
    return _Program(arguments, result)


def _matches(
    pattern: Value,
    value: Value,
    arguments: tuple[Value, ...],
    found: dict[Value, Any],
    moves: tuple[Any, ...] = (),
) -> bool:
    """Whether a value is a pattern with its arguments replaced, each by the same wherever it occurs.

    Args:
      pattern: a value in the graph of an activation.
      value: is compared with it.
      arguments: x, for any array, and the parameters, for any known numbers.
      found: what replaces the arguments, which is filled in: for x an array and the permutation or
        reshape of its entries.
      moves: permutations and reshapes of `value`.
    """
    pattern, _ = _source(pattern)
    if pattern.number is not None or pattern in arguments[1:]:
        wanted = (
            found.setdefault(pattern, value.number) if pattern.number is None else pattern.number
        )
        return wanted is not None and wanted == value.number
    value, own = _source(value)
    moves += own
    if pattern is arguments[0]:
        return found.setdefault(pattern, (value, moves)) == (value, moves)
    return (
        pattern.operation == value.operation != ""
        and pattern.equation.params == value.equation.params
        and len(pattern.operands) == len(value.operands)
        and all(
            _matches(inner, operand, arguments, found, moves)
            for inner, operand in zip(pattern.operands, value.operands, strict=True)
        )
    )


def _source(value: Value) -> tuple[Value, tuple[Any, ...]]:
    """What a value is a cast, permutation or reshape of, with the latter two."""
    moves = []
    while value.operands:
        source = value.operands[0]
        if value.operation in _REARRANGEMENTS:
            moves.append((value.operation, value.equation.params, source.aval.shape))
        elif value.operation != "convert_element_type" or not (
            is_float(value.aval) and is_float(source.aval)
        ):
            break
        value = source
    return value, tuple(moves)
