"""The values that a jaxpr computes, each with the operation and the operands that it results from.

Calls of `jit`, `remat` and functions with custom derivatives are replaced by their bodies. Loops and branches
(scan, while, cond) are operations like any other.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from stochsolvers._programs import body


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """One array; compared by identity.

    Attributes:
      aval: its shape and dtype.
      constant: ℓ, a Lipschitz constant of it as a function of the network's input; 0 for what does not
        depend on it.
      number: the number that all of its entries are, where it is known.
      equation: the operation that computes it; None for an argument.
      operands: of the operation.
      index: among the results of the operation.
      entries: returns its entries if it does not depend on the input and they are known, else None.
      size: its Euclidean norm is at most this for all inputs of the network, or all within a radius.
      largest: the same for its largest absolute entry.
    """

    aval: Any
    constant: float
    number: float | None = None
    equation: Any = None
    operands: tuple["Value", ...] = ()
    index: int = 0
    entries: Callable[[], np.ndarray | None] = lambda: None
    size: float = math.inf
    largest: float = math.inf

    @property
    def operation(self) -> str:
        """The name of the primitive; "" for an argument."""
        return "" if self.equation is None else self.equation.primitive.name

    def repeated(self, shape: tuple[int, ...]) -> float:
        """The constant of its broadcast to a shape, n^{1/2} ℓ for n copies."""
        copies = math.prod(shape) / self.aval.size if self.aval.size else 1.0
        return self.constant * math.sqrt(max(1.0, copies))


class Size(NamedTuple):
    """Of one array: bounds on its Euclidean norm and on its largest absolute entry."""

    norm: float
    largest: float

    def smaller(self, other: "Size") -> "Size":
        """The better of two bounds."""
        return Size(min(self.norm, other.norm), min(self.largest, other.largest))


def literal(atom: Any) -> Value | None:
    """The value of a literal, None for a variable."""
    if not hasattr(atom, "val"):
        return None
    real = jnp.issubdtype(atom.aval.dtype, np.number) or jnp.issubdtype(atom.aval.dtype, np.bool_)
    real = real and not jnp.issubdtype(atom.aval.dtype, np.complexfloating)
    return Value(atom.aval, 0.0, float(atom.val) if real and np.size(atom.val) == 1 else None)


def is_float(aval: Any) -> bool:
    """Whether an array is real, of 16 bits at least. Casts between such dtypes count as exact."""
    return jnp.issubdtype(aval.dtype, np.floating) and jnp.finfo(aval.dtype).bits >= 16


def evaluate(equation: Any, operands: Sequence[Value]) -> list[Value]:
    """The results of one equation, without their constants."""
    inner = body(equation)
    if inner is not None:
        return run(inner, operands)
    number = known_number(equation, operands)
    return [
        Value(variable.aval, 0.0, number, equation, tuple(operands), index)
        for index, variable in enumerate(equation.outvars)
    ]


def run(jaxpr: Any, arguments: Sequence[Value]) -> list[Value]:
    """The results of a jaxpr, without their constants."""
    values = dict(zip(jaxpr.invars, arguments, strict=True))

    def read(atoms: Sequence[Any]) -> list[Value]:
        # arrays that the program closes over are constant
        return [literal(atom) or values.get(atom) or Value(atom.aval, 0.0) for atom in atoms]

    for equation in jaxpr.eqns:
        results = evaluate(equation, read(equation.invars))
        values.update(zip(equation.outvars, results, strict=True))
    return read(jaxpr.outvars)


def known_number(equation: Any, operands: Sequence[Value]) -> float | None:
    """The number that a cast or a broadcast makes of a number."""
    name = equation.primitive.name
    if name not in ("convert_element_type", "broadcast_in_dim") or operands[0].number is None:
        return None
    dtype = equation.outvars[0].aval.dtype
    if not jnp.issubdtype(dtype, np.floating):
        return operands[0].number if name == "broadcast_in_dim" else None
    with np.errstate(over="ignore"):
        return float(np.asarray(operands[0].number).astype(dtype))


def number_of(entries: Any) -> float | None:
    """The number that an array without axes is."""
    real = hasattr(entries, "dtype") or isinstance(entries, bool | int | float)
    if not real or np.ndim(entries):
        return None
    dtype = jnp.result_type(entries)
    numeric = jnp.issubdtype(dtype, np.number) or jnp.issubdtype(dtype, np.bool_)
    numeric = numeric and not jnp.issubdtype(dtype, np.complexfloating)
    return float(entries) if numeric else None


def largest_entry(value: Value) -> float:
    """A bound on max |entry|: from its entries, or for inputs in a ball; ∞ if there is none."""
    if value.number is not None:
        return abs(value.number) if math.isfinite(value.number) else math.inf
    if value.constant:
        return value.largest
    entries = value.entries()
    if entries is None:
        return value.largest
    largest = float(np.max(np.abs(entries), initial=0.0))
    return largest if math.isfinite(largest) else math.inf


def product(ell: float, factor: float | Callable[[], float]) -> float:
    """ℓ times a factor, which is not computed for ℓ = 0; ∞ where either is not known, also for a factor 0."""
    if ell == 0:
        return 0.0
    factor = factor() if callable(factor) else factor
    return ell * factor if math.isfinite(ell) and math.isfinite(factor) else math.inf
