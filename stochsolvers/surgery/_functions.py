"""Elementwise functions cut out of a traced program, as values that can be called, compared and stored."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives

from stochsolvers._programs import Program, Step, flatten
from stochsolvers._typing import Array

_NAMES = (
    "abs", "acos", "acosh", "add", "and", "asin", "asinh", "atan", "atan2", "atanh", "cbrt", "ceil", "clamp",
    "cos", "cosh", "digamma", "div", "eq", "erf", "erfc", "erf_inv", "exp", "exp2", "expm1", "floor",
    "ge", "gt", "integer_pow", "is_finite", "le", "lgamma", "log", "log1p", "logistic", "lt", "max", "min",
    "mul", "ne", "neg", "not", "or", "pow", "rem", "round", "rsqrt", "select_n", "sign", "sin", "sinh",
    "sqrt", "square", "sub", "tan", "tanh", "xor",
)  # fmt: skip
_PRIMITIVES = {name: getattr(primitives, f"{name}_p") for name in _NAMES}
REARRANGEMENTS = ("reshape", "squeeze", "expand_dims", "transpose", "rev", "copy", "copy_p")
_IDENTITIES = (*REARRANGEMENTS, "sharding_constraint", "optimization_barrier")

ARGUMENT = -1


@dataclasses.dataclass(frozen=True)
class Function:
    """An elementwise function x ↦ σ(x), as a list of operations.

    Attributes:
      operations: each the name of a primitive, its parameters, and its operands: `ARGUMENT` for x, the index
        of an earlier operation, or a number as a float.
    """

    operations: tuple[tuple[str, tuple[tuple[str, Any], ...], tuple[int | float, ...]], ...]

    def __call__(self, x: Array) -> Array:
        """σ of each entry, in the dtype of x."""
        values: list[Array] = []
        for name, parameters, operands in self.operations:
            arrays = [
                jnp.full_like(x, one)
                if isinstance(one, float)
                else (x if one == ARGUMENT else values[one])
                for one in operands
            ]
            if name == "to_float":
                values.append(arrays[0].astype(x.dtype))
                continue
            values.append(_PRIMITIVES[name].bind(*arrays, **dict(parameters)))
        return values[-1] if values else x

    @property
    def is_affine(self) -> bool:
        """Whether it consists of sums and of multiples."""
        return all(
            name in ("neg", "add", "sub")
            or (name == "mul" and any(isinstance(one, float) for one in operands))
            or (name == "div" and isinstance(operands[1], float))
            for name, _, operands in self.operations
        )

    def match(self, pattern: "Function", unknowns: Mapping[float, str]) -> dict[str, float] | None:
        """The numbers with which it is a pattern, or None.

        Args:
          pattern: a function in which some numbers stand for any.
          unknowns: their names.
        """
        if len(self.operations) != len(pattern.operations):
            return None
        found: dict[str, float] = {}
        for own, wanted in zip(self.operations, pattern.operations, strict=True):
            if own[:2] != wanted[:2] or len(own[2]) != len(wanted[2]):
                return None
            for mine, theirs in zip(own[2], wanted[2], strict=True):
                if isinstance(theirs, float) and isinstance(mine, float) and theirs in unknowns:
                    if found.setdefault(unknowns[theirs], mine) != mine:
                        return None
                elif type(mine) is not type(theirs) or mine != theirs:
                    return None
        return found


def function_of(
    steps: Mapping[int, Step], numbers: Mapping[int, Any], argument: int, result: int
) -> Function | None:
    """The elementwise function that makes `result` of `argument`; None where it is none.

    Casts between floating-point dtypes, permutations and reshapes of all entries are left out. A function of
    entries at different places, as x + x[::-1], is not elementwise.

    Args:
      steps: the step that writes each array.
      numbers: the arrays that are one known number.
      argument: x.
      result: σ(x).
    """
    operations: list[Any] = []
    # of each array its place among the operations, and the order of its entries
    places: dict[Any, tuple[int, tuple[Any, ...]]] = {argument: (ARGUMENT, ())}

    def place(operand: int) -> tuple[int | float, tuple[Any, ...]] | None:
        if operand in numbers:
            return _float(numbers[operand]), ()
        if operand in places:
            return places[operand]
        step = steps.get(operand)
        if step is None:
            return None
        inputs = [place(one) for one in step.reads]
        known = [one for one in inputs if one is not None]
        if len(known) < len(inputs):
            return None
        if is_identity(step):
            ((index, order),) = known
            order += _rearrangement(step)
        else:
            orders = {order for index, order in known if isinstance(index, int)}
            index = _append(step, [index for index, _ in known], operations)
            if index is None or len(orders) > 1:  # entries of different places meet
                return None
            order = orders.pop() if orders else ()
        if isinstance(index, int):
            places[operand] = index, order
        return index, order

    found = place(result)
    return None if found is None or isinstance(found[0], float) else Function(tuple(operations))


def known_numbers(program: Program) -> dict[int, Any]:
    """The arrays that are one number, or copies of it, as NumPy scalars: given, or plainly computed."""
    numbers = {array: _number(entries) for array, entries in program.known.items()}
    numbers = {array: number for array, number in numbers.items() if number is not None}
    for step in program.steps:
        if step.reads and all(one in numbers for one in step.reads) and len(step.writes) == 1:
            number = _computed(step, [numbers[one] for one in step.reads])
            if number is not None:
                numbers[step.writes[0]] = number
    return numbers


def _number(entries: Any) -> Any:
    """A single number; None for an array of several, and for what is no real number."""
    if isinstance(entries, jax.core.Tracer) or np.size(entries) != 1:
        return None
    try:
        number = np.asarray(entries).reshape(())[()]
    except TypeError:  # a key
        return None
    return number if np.isrealobj(number) else None


def _computed(step: Step, numbers: list[Any]) -> Any:
    """The number that an operation on known numbers results in, where that is plain."""
    if step.operation in ("broadcast_in_dim", "reshape", "copy", "squeeze", "expand_dims"):
        return numbers[0] if len(numbers) == 1 else None
    if step.operation == "convert_element_type":
        return _number(np.asarray(numbers[0]).astype(step.equation.outvars[0].aval.dtype))
    plain = {"neg": np.negative, "add": np.add, "sub": np.subtract, "mul": np.multiply}
    plain |= {"div": np.divide, "sqrt": np.sqrt, "max": np.maximum, "min": np.minimum}
    floating = all(np.issubdtype(np.asarray(n).dtype, np.floating) for n in numbers)
    known = step.operation in plain and floating
    return _number(plain[step.operation](*numbers)) if known else None


def _rearrangement(step: Step) -> tuple[Any, ...]:
    """How a step changes the order of the entries; () if it does not."""
    names = (*REARRANGEMENTS, "broadcast_in_dim")
    if step.operation not in names or step.operation.startswith("copy"):
        return ()
    shape = step.equation.invars[0].aval.shape
    return ((step.operation, shape, str(sorted(step.equation.params.items()))),)


def _append(step: Step, operands: list[Any], operations: list[Any]) -> int | None:
    if any(one is None for one in operands):
        return None
    if step.operation == "convert_element_type":
        if not is_real(step.equation.outvars[0].aval):
            return None
        operations.append(("to_float", (), tuple(operands)))
    elif is_elementwise(step):
        parameters = tuple(sorted(step.equation.params.items()))
        operations.append((step.operation, parameters, tuple(operands)))
    else:
        return None
    return len(operations) - 1


def is_elementwise(step: Step) -> bool:
    """Whether each entry of the result depends on the same entry of the operands, of real dtypes."""
    if step.operation == "broadcast_in_dim":
        return False
    if step.operation not in _PRIMITIVES and step.operation != "convert_element_type":
        return False
    avals = [atom.aval for atom in step.equation.invars]
    return all(is_real(aval) or aval.dtype == np.bool_ for aval in avals)


def is_identity(step: Step) -> bool:
    """Whether its result has the entries of its operand, in whatever order or floating-point dtype."""
    if step.equation is None:
        return False
    if step.operation == "convert_element_type":
        return all(is_real(atom.aval) for atom in (*step.equation.invars, *step.equation.outvars))
    if len(step.reads) != 1:
        return False
    if step.operation == "broadcast_in_dim":  # y[None]
        return step.equation.invars[0].aval.size == step.equation.outvars[0].aval.size
    return step.operation in _IDENTITIES or (step.operation == "name" and step.mark is None)


def is_real(aval: Any) -> bool:
    """Whether an array has a floating-point dtype."""
    return jnp.issubdtype(aval.dtype, np.floating)


def _float(number: Any) -> float:
    """The number, as short as its dtype allows: 0.01 of the float32 0.0099999998."""
    return (
        float(str(number))
        if np.issubdtype(np.asarray(number).dtype, np.floating)
        else float(number)
    )


@functools.cache
def traced(function: Callable[..., Any], *numbers: float) -> Function:
    """A function of JAX as a `Function`, with the numbers as its further arguments."""
    x = jax.ShapeDtypeStruct((2,), jnp.float32)
    program = flatten(jax.make_jaxpr(lambda x: function(x, *numbers))(x))
    steps = {number: step for step in program.steps for number in step.writes}
    found = function_of(steps, known_numbers(program), *program.arguments, *program.results)
    assert found is not None
    return found
