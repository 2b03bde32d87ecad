r"""Lipschitz constants of JAX primitives.

With ℓ_i the constant of operand i as a function of the network's input, in Euclidean norms over whole
arrays (0 for what does not depend on it), the result's is at most

    reshape, relu, sort, tanh, …  ℓ_1              x + y              ℓ_1 + ℓ_2
    c x, x / c                  max|c| ℓ_1         max(x, y), concat  (ℓ_1² + ℓ_2²)^{1/2}
    sum over n entries          n^{1/2} ℓ_1        n copies          n^{1/2} ℓ_1
    maxima over windows         o^{1/2} ℓ_1        sums over windows  (o n)^{1/2} ℓ_1
    cumulative sum of n         ℓ_1 / (2 sin(π / (4n + 2)))
    x y, of bounded entries     max|y| ℓ_1 + max|x| ℓ_2
    x²                          2 max|x| ℓ_1       exp(x)            exp(max|x|) ℓ_1

for windows of n entries, each entry in o of them at most; those of `_contractions` for products of
matrices, convolutions and gathers; `activation_of` for the activations of `jax.nn` and `softmax_of`; and ∞
for everything else. The entries are bounded where the inputs are, in a ball.

The constants hold in exact arithmetic. Rounding moves a value by up to its relative precision (2⁻⁹ in
bfloat16), so that a cast to bfloat16 is not 1-Lipschitz between points closer than that. Quantisers coarser
than the 16-bit floating-point dtypes have no constant: integers, `reduce_precision`, 8-bit dtypes.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from stochsolvers.reports import _contractions
from stochsolvers.reports._program import Value, is_float, largest_entry, product


def constant_of(result: Value) -> float:
    """ℓ of a primitive's result, for operands some of which depend on the input; ∞ where not known."""
    arrays = (result, *result.operands)
    if any(jnp.issubdtype(array.aval.dtype, np.complexfloating) for array in arrays):
        return math.inf
    rule = _RULES.get(result.operation)
    if rule is None and is_float(result.aval):
        rule = _FLOAT_RULES.get(result.operation)
    constant = math.inf if rule is None else rule(result)
    return constant if constant >= 0 else math.inf  # NaN is no bound


def _same(result: Value) -> float:
    """Of a function of the first operand alone that is 1-Lipschitz."""
    first, *others = result.operands
    return math.inf if any(other.constant for other in others) else first.constant


def _times(factor: float) -> Callable[[Value], float]:
    """Of a function that is `factor`-Lipschitz."""
    return lambda result: product(factor, _same(result))


def _cast(result: Value) -> float:
    real = not jnp.issubdtype(result.operands[0].aval.dtype, np.inexact)
    return _same(result) if real or is_float(result.operands[0].aval) else math.inf


def _rounded(result: Value) -> float:
    """Of `reduce_precision`, where it keeps all digits."""
    kept, has = result.equation.params, jnp.finfo(result.aval.dtype)
    exact = kept["exponent_bits"] >= has.nexp and kept["mantissa_bits"] >= has.nmant
    return _same(result) if exact else math.inf


def _passed(result: Value) -> float:
    """Of one of several results, each equal to the operand in its place."""
    return result.operands[result.index].constant


def _sorted(result: Value) -> float:
    """Of one sorted array: the largest entries, in order, move no further than all of them."""
    return _same(result) if result.index == 0 and len(result.operands) == 1 else math.inf


def _copies(result: Value) -> float:
    return result.operands[0].repeated(result.aval.shape)


def _concatenated(result: Value) -> float:
    return math.hypot(*(operand.constant for operand in result.operands))


def _updated(result: Value) -> float:
    x, update, *indices = result.operands
    if any(index.constant for index in indices):
        return math.inf
    return math.hypot(x.constant, update.constant)


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
    return product(ell_x, lambda: largest_entry(y)) + product(ell_y, lambda: largest_entry(x))


def _quotient(result: Value) -> float:
    ell, by = _ells(result)[0], result.operands[1]
    if by.constant:
        return math.inf
    divisor = by.number if by.number is not None else by.entries()
    if divisor is None or not np.size(divisor) or not np.all(np.abs(divisor) > 0):
        return math.inf
    return product(ell, float(np.max(1.0 / np.abs(divisor))))


def _power(result: Value) -> float:
    exponent = result.equation.params.get("y", 2)
    (x,) = result.operands
    if exponent < 1:
        return math.inf
    slope = exponent * _finite_power(largest_entry(x), exponent - 1)
    return product(x.constant, slope)


def _finite_power(base: float, exponent: int) -> float:
    try:
        return base**exponent
    except OverflowError:
        return math.inf


def _exponential(result: Value) -> float:
    (x,) = result.operands
    largest = largest_entry(x)
    return product(x.constant, math.exp(largest) if largest < 700 else math.inf)


def _sum_of_entries(result: Value) -> float:
    shape = result.operands[0].aval.shape
    entries = math.prod(shape[axis] for axis in result.equation.params["axes"])
    return _same(result) * math.sqrt(max(1, entries))


def _cumulative_sum(result: Value) -> float:
    """By the norm of the triangular matrix of ones."""
    count = max(1, result.aval.shape[result.equation.params["axis"]])
    return _same(result) / (2 * math.sin(math.pi / (4 * count + 2)))


def _cumulative_maximum(result: Value) -> float:
    return _same(result) * math.sqrt(max(1, result.aval.shape[result.equation.params["axis"]]))


def _ells(result: Value) -> list[float]:
    """Of the operands, repeated to the shape of the result."""
    return [operand.repeated(result.aval.shape) for operand in result.operands]


REARRANGED = (
    "reshape", "squeeze", "expand_dims", "transpose", "rev", "slice", "split", "unstack", "dynamic_slice",
    "copy", "copy_p", "name", "sharding_constraint", "stop_gradient", "sort",
)  # fmt: skip
_RULES: dict[str, Callable[[Value], float]] = {  # for integers, too
    **dict.fromkeys((*REARRANGED, "pad", "reduce_max", "reduce_min"), _same),
    "optimization_barrier": _passed,
    **dict.fromkeys(("broadcast_in_dim", "tile"), _copies),
    "concatenate": _concatenated,
    "stack": _concatenated,
    "dynamic_update_slice": _updated,
    "max": _largest,
    "min": _largest,
    "clamp": _clamped,
    "select_n": _chosen,
    "sort": _sorted,
    "reduce_window_max": _window_maxima,
    "reduce_window_min": _window_maxima,
    "cummax": _cumulative_maximum,
    "cummin": _cumulative_maximum,
    "gather": _contractions.gathered,
}
_FLOAT_RULES: dict[
    str, Callable[[Value], float]
] = {  # integers wrap around, and their quotients jump
    **dict.fromkeys(("abs", "asinh", "atan", "cos", "neg", "sin", "tanh"), _same),
    **dict.fromkeys(("erf", "erfc"), _times(2 / math.sqrt(math.pi))),
    "logistic": _times(0.25),
    "convert_element_type": _cast,
    "reduce_precision": _rounded,
    "top_k": _sorted,
    "add": _sum,
    "add_any": _sum,
    "sub": _sum,
    "mul": _product,
    "div": _quotient,
    "square": _power,
    "integer_pow": _power,
    "exp": _exponential,
    "reduce_sum": _sum_of_entries,
    "reduce_window_sum": _window_sums,
    "cumsum": _cumulative_sum,
    "dot_general": _contractions.multiplied,
    "conv_general_dilated": _contractions.convolved,
}
