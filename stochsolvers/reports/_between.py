r"""Lipschitz constants of what lies between the layers of a network, primitive by primitive.

With ℓ_i the constant of operand i as a function of the network's input, in Euclidean norms over whole
arrays (0 for what does not depend on it), the result's is at most

    reshape, relu, tanh, …      ℓ_1                x + y              ℓ_1 + ℓ_2
    c x, x / c                  |c| ℓ_1            max(x, y), concat  (ℓ_1² + ℓ_2²)^{1/2}
    sum over n entries          n^{1/2} ℓ_1        n copies          n^{1/2} ℓ_1

and ∞ for whatever is not known here. Pools count how often windows overlap. Activations of `jax.nn` that
are not made of these are known by their names.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

CALLS = (
    "jit", "pjit", "closed_call", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call",
)  # fmt: skip
_ONE = {
    "abs", "asinh", "atan", "cos", "neg", "sin", "tanh", "reduce_max", "reduce_min", "reshape",
    "squeeze", "expand_dims", "transpose", "rev", "slice", "split", "copy", "copy_p", "name",
    "reduce_precision", "sharding_constraint", "stop_gradient",
}  # fmt: skip
_JOINED = {"max", "min", "concatenate"}
_FIRST_ALONE = {"dynamic_slice", "pad"}  # the other operands must not depend on the input
# of jax.nn: bounds on their slopes
_ACTIVATIONS = {"softplus": 1.0, "soft_sign": 1.0, "log_sigmoid": 1.0, "celu": 1.0, "silu": 1.1}
# of jax.nn, continuous and chosen by the sign of x: a multiple of x, or of expm1 of what is negative
_PIECEWISE = {"leaky_relu", "hard_tanh", "elu", "selu"}


class Value(NamedTuple):
    """One operand: its constant, and the number that it is, where it is a known one."""

    constant: float
    number: float | None = None


def body(parameter: Any) -> Any:
    """The jaxpr of a call, open or closed, or None."""
    inner = getattr(parameter, "jaxpr", parameter)
    return inner if hasattr(inner, "eqns") else None


def operation(equation: Any) -> str:
    """The name of a jitted function or of a primitive; of a call of one operation, the latter's."""
    for inner in filter(None, map(body, equation.params.values())):
        if equation.primitive.name in CALLS[2:] and len(inner.eqns) == 1:
            return operation(inner.eqns[0])
    return str(equation.params.get("name", equation.primitive.name))


def literal(atom: Any) -> Value | None:
    """The value of a literal, None for a variable."""
    if not hasattr(atom, "val"):
        return None
    return Value(0.0, float(atom.val) if np.size(atom.val) == 1 else None)


def amplification(equation: Any, operands: Sequence[Value]) -> float:
    """The largest constant among the results of one equation."""
    return max((v.constant for v in _results(equation, operands, piecewise=False)), default=0.0)


def _results(equation: Any, operands: Sequence[Value], piecewise: bool) -> list[Value]:
    largest = max((operand.constant for operand in operands), default=0.0)
    name, known = equation.primitive.name, operation(equation)
    if name in ("convert_element_type", "broadcast_in_dim") and operands[0].number is not None:
        exact = jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.inexact)
        return [operands[0] if exact else Value(0.0)]
    inner = next(filter(None, map(body, equation.params.values())), None)
    if 0.0 < largest < math.inf and inner is not None and name in CALLS:
        if known in _ACTIVATIONS:
            return [Value(_ACTIVATIONS[known] * largest)]
        return _walk(inner, operands, piecewise or known in _PIECEWISE)
    if 0.0 < largest < math.inf and equation.outvars:
        largest = _rule(equation, operands, piecewise)
    return [Value(largest) for _ in equation.outvars]


def _walk(jaxpr: Any, operands: Sequence[Value], piecewise: bool) -> list[Value]:
    """The results of a jaxpr."""
    values = dict(zip(jaxpr.invars, operands, strict=True))

    def read(atoms):
        return [literal(atom) or values.get(atom, Value(0.0)) for atom in atoms]

    for equation in jaxpr.eqns:
        results = _results(equation, read(equation.invars), piecewise)
        values.update(zip(equation.outvars, results, strict=True))
    return read(jaxpr.outvars)


def _rule(equation: Any, operands: Sequence[Value], piecewise: bool) -> float:
    """The constant of a primitive's result, for operands some of which depend on the input."""
    name, parameters = equation.primitive.name, equation.params
    out = equation.outvars[0].aval
    ells = [  # of the operands, repeated to the shape of the result
        value.constant * math.sqrt(max(1.0, out.size / atom.aval.size if atom.aval.size else 1.0))
        for value, atom in zip(operands, equation.invars, strict=True)
    ]
    if name in _ONE or (piecewise and name == "expm1"):
        return operands[0].constant
    if name == "logistic":
        return 0.25 * operands[0].constant
    if piecewise and name in ("ge", "gt", "le", "lt"):
        return 0.0
    if name == "convert_element_type":
        return ells[0] if jnp.issubdtype(out.dtype, jnp.inexact) else math.inf
    if name == "broadcast_in_dim":
        return ells[0]
    if name in _JOINED:
        return math.hypot(*(ells if name != "concatenate" else (v.constant for v in operands)))
    if name in ("add", "sub", "add_any"):
        return sum(ells)
    if name == "mul":
        return min(_scaled(ells[0], operands[1].number), _scaled(ells[1], operands[0].number))
    if name == "div":
        divisor = operands[1].number
        return _scaled(ells[0], 1.0 / divisor if divisor else None)
    if name == "clamp":
        return ells[1] if operands[0].constant == operands[2].constant == 0 else math.inf
    if name == "select_n":
        cases = ells[1:]
        if piecewise:
            return max(cases)
        return math.inf if operands[0].constant else math.hypot(*cases)
    if name in _FIRST_ALONE:
        return math.inf if any(v.constant for v in operands[1:]) else operands[0].constant
    if name == "reduce_sum":
        entries = math.prod(equation.invars[0].aval.shape[axis] for axis in parameters["axes"])
        return operands[0].constant * math.sqrt(entries)
    if name in ("reduce_window_max", "reduce_window_min", "reduce_window_sum"):
        return operands[0].constant * _pool(parameters, name == "reduce_window_sum")
    return math.inf


def _scaled(constant: float, factor: float | None) -> float:
    return math.inf if factor is None else constant * abs(factor)


def _pool(parameters: Any, sums: bool) -> float:
    """(o n)^{1/2} of windows of n entries for a sum, o^{1/2} for a maximum; each entry is in o at most."""
    windows, strides = parameters["window_dimensions"], parameters["window_strides"]
    dense = all(d == 1 for d in parameters["window_dilation"])
    overlap = math.prod(-(-w // s) if dense else w for w, s in zip(windows, strides, strict=True))
    return math.sqrt(overlap * (math.prod(windows) if sums else 1))
