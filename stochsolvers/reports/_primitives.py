r"""Lipschitz constants of JAX primitives.

With ℓ_i the constant of operand i as a function of the network's input, in Euclidean norms over whole
arrays (0 for what does not depend on it), the result's is at most

    reshape, relu, tanh, …      ℓ_1                x + y              ℓ_1 + ℓ_2
    c x, x / c                  |c| ℓ_1            max(x, y), concat  (ℓ_1² + ℓ_2²)^{1/2}
    sum over n entries          n^{1/2} ℓ_1        n copies          n^{1/2} ℓ_1
    maxima over windows         o^{1/2} ℓ_1        sums over windows  (o n)^{1/2} ℓ_1

for windows of n entries, each entry in o of them at most; `activation_constant` for the activations of
`jax.nn`; and ∞ for everything else.

The constants hold in exact arithmetic. Rounding moves a value by up to its relative precision (2⁻⁹ in
bfloat16), so that a cast to bfloat16 is not 1-Lipschitz between points closer than that. Quantisers coarser
than the 16-bit floating-point dtypes have no constant: integers, `reduce_precision`, 8-bit dtypes.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from stochsolvers.reports._activations import activation_constant
from stochsolvers.reports._program import Value, evaluate, is_float


def amplification(equation: Any, operands: Sequence[Value]) -> float:
    """The largest constant among the results of one equation, ∞ where one is not known."""
    results = evaluate(equation, operands, _constant)
    return max((value.constant for value in results), default=0.0)


def _constant(result: Value) -> float:
    return min(_rule(result), activation_constant(result))


def _rule(result: Value) -> float:
    """ℓ of a primitive's result, for operands some of which depend on the input."""
    arrays = (result, *result.operands)
    if any(jnp.issubdtype(array.aval.dtype, np.complexfloating) for array in arrays):
        return math.inf
    rule = _RULES.get(result.operation)
    if rule is None and is_float(result.aval):
        rule = _FLOAT_RULES.get(result.operation)
    return math.inf if rule is None else rule(result)


def _same(result: Value) -> float:
    """Of a function of the first operand alone that is 1-Lipschitz."""
    first, *others = result.operands
    return math.inf if any(other.constant for other in others) else first.constant


def _cast(result: Value) -> float:
    real = not jnp.issubdtype(result.operands[0].aval.dtype, np.inexact)
    return _same(result) if real or is_float(result.operands[0].aval) else math.inf


def _rounded(result: Value) -> float:
    """Of `reduce_precision`, where it keeps all digits."""
    kept, has = result.equation.params, jnp.finfo(result.aval.dtype)
    exact = kept["exponent_bits"] >= has.nexp and kept["mantissa_bits"] >= has.nmant
    return _same(result) if exact else math.inf


def _copies(result: Value) -> float:
    return result.operands[0].repeated(result.aval.shape)


def _concatenated(result: Value) -> float:
    return math.hypot(*(operand.constant for operand in result.operands))


def _largest(result: Value) -> float:
    return math.hypot(*_ells(result))


def _clamped(result: Value) -> float:
    low, x, high = result.operands
    return x.repeated(result.aval.shape) if low.constant == high.constant == 0 else math.inf


def _chosen(result: Value) -> float:
    """Of one of the cases, by a choice that does not depend on the input."""
    which, *cases = _ells(result)
    return math.inf if which else math.hypot(*cases)


def _window_maxima(result: Value) -> float:
    return _same(result) * math.sqrt(_overlap(result))


def _window_sums(result: Value) -> float:
    entries = math.prod(result.equation.params["window_dimensions"])
    return _window_maxima(result) * math.sqrt(entries)


def _overlap(result: Value) -> int:
    """In how many windows an entry is, at most."""
    parameters = result.equation.params
    dense = all(step == 1 for step in parameters["window_dilation"])
    windows, strides = parameters["window_dimensions"], parameters["window_strides"]
    return math.prod(-(-w // s) if dense else w for w, s in zip(windows, strides, strict=True))


def _sum(result: Value) -> float:
    return math.fsum(_ells(result))


def _product(result: Value) -> float:
    x, y = result.operands
    ell_x, ell_y = _ells(result)
    return min(_scaled(ell_x, y.number), _scaled(ell_y, x.number))


def _quotient(result: Value) -> float:
    divisor = result.operands[1].number
    return _scaled(_ells(result)[0], 1.0 / divisor if divisor else None)


def _logistic(result: Value) -> float:
    return 0.25 * _same(result)


def _sum_of_entries(result: Value) -> float:
    shape = result.operands[0].aval.shape
    entries = math.prod(shape[axis] for axis in result.equation.params["axes"])
    return _same(result) * math.sqrt(max(1, entries))


def _ells(result: Value) -> list[float]:
    """Of the operands, repeated to the shape of the result."""
    return [operand.repeated(result.aval.shape) for operand in result.operands]


def _scaled(ell: float, factor: float | None) -> float:
    if factor is None or not math.isfinite(factor) or not math.isfinite(ell):
        return math.inf
    return ell * abs(factor)


_RULES: dict[str, Callable[[Value], float]] = {  # for integers, too
    **dict.fromkeys(
        (
            "reshape", "squeeze", "expand_dims", "transpose", "rev", "slice", "split", "dynamic_slice",
            "pad", "copy", "copy_p", "name", "sharding_constraint", "stop_gradient", "reduce_max",
            "reduce_min",
        ),
        _same,
    ),
    "broadcast_in_dim": _copies,
    "concatenate": _concatenated,
    "max": _largest,
    "min": _largest,
    "clamp": _clamped,
    "select_n": _chosen,
    "reduce_window_max": _window_maxima,
    "reduce_window_min": _window_maxima,
}  # fmt: skip
_FLOAT_RULES: dict[str, Callable[[Value], float]] = {  # integers wrap around, and their quotients jump
    **dict.fromkeys(("abs", "asinh", "atan", "cos", "neg", "sin", "tanh"), _same),
    "convert_element_type": _cast,
    "reduce_precision": _rounded,
    "logistic": _logistic,
    "add": _sum,
    "add_any": _sum,
    "sub": _sum,
    "mul": _product,
    "div": _quotient,
    "reduce_sum": _sum_of_entries,
    "reduce_window_sum": _window_sums,
}  # fmt: skip
