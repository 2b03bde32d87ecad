"""Bounds on the values of a network for inputs in a ball."""

import math

from stochsolvers.reports._contractions import matrix_norm
from stochsolvers.reports._primitives import REARRANGED
from stochsolvers.reports._program import Size, Value, largest_entry
from stochsolvers.reports._softmax import softmax_axes

_AT_MOST_ONE = ("tanh", "sin", "cos", "erf", "logistic")
_SELECTING = ("max", "min", "select_n", "concatenate", "stack", "clamp")


UNKNOWN = Size(math.inf, math.inf)


def size_of(value: Value) -> Size:
    """Of the result of an operation, from those of its operands; a bound that needs no ℓ."""
    axes = softmax_axes(value)
    if axes is not None:
        rows = value.aval.size / max(1, math.prod(value.aval.shape[axis] for axis in axes))
        return Size(math.sqrt(rows), 1.0)
    operation, operands = value.operation, value.operands
    if operation in _AT_MOST_ONE:
        return Size(math.sqrt(value.aval.size), 1.0)
    if operation in ("add", "add_any", "sub"):
        sizes = [_repeated(operand, value) for operand in operands]
        return Size(sum(size.norm for size in sizes), sum(size.largest for size in sizes))
    if operation == "mul":
        x, y = (_repeated(operand, value) for operand in operands)
        norm = min(_product(x.norm, y.largest), _product(x.largest, y.norm))
        return Size(norm, _product(x.largest, y.largest))
    if operation in ("square", "integer_pow") and value.equation.params.get("y", 2) == 2:
        (x,) = (_of(operand) for operand in operands)
        return Size(_product(x.norm, x.largest), _product(x.largest, x.largest))
    if operation == "dot_general":
        return _of_product(value)
    if operation in _SELECTING:
        chosen = operands[1:] if operation == "select_n" else operands
        sizes = [_repeated(operand, value) for operand in chosen]
        return Size(math.hypot(*(s.norm for s in sizes)), max(s.largest for s in sizes))
    if operation in (*REARRANGED, "neg", "abs", "convert_element_type", "reduce_max", "reduce_min"):
        return _of(operands[0])
    if operation in ("broadcast_in_dim", "tile"):
        return _repeated(operands[0], value)
    return UNKNOWN


def _of_product(value: Value) -> Size:
    (contracted, batch) = value.equation.params["dimension_numbers"]
    norms = []
    for side, operand in enumerate(value.operands):
        norm = _of(operand).norm
        if not operand.constant:
            norm = min(norm, matrix_norm(operand.entries(), contracted[side], batch[side]))
        norms.append(norm)
    norm = _product(*norms)
    return Size(norm, norm)


def _of(value: Value) -> Size:
    """Of an operand; from its entries if it does not depend on the input."""
    if value.constant:
        return Size(value.size, value.largest)
    largest = largest_entry(value)
    return Size(largest * math.sqrt(value.aval.size), largest)


def _repeated(value: Value, result: Value) -> Size:
    """Of an operand, repeated to the shape of the result."""
    copies = max(1.0, result.aval.size / value.aval.size) if value.aval.size else 1.0
    size = _of(value)
    return Size(size.norm * math.sqrt(copies), size.largest)


def _product(x: float, y: float) -> float:
    return 0.0 if x == 0 or y == 0 else x * y
