"""Elementwise functions cut out of a traced program, as values that can be called, compared and stored."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives

from stochsolvers._typing import Array
from stochsolvers.surgery._flatten import Constant, Step

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


def function_of(steps: Mapping[int, Step], argument: int, result: int) -> Function | None:
    """The elementwise function that makes `result` of `argument`; None where it is none.

    Casts between floating-point dtypes, permutations and reshapes of all entries are left out. A function of
    entries at different places, as x + x[::-1], is not elementwise.

    Args:
      steps: the step that writes each array.
      argument: x.
      result: σ(x).
    """
    operations: list[Any] = []
    # of each array its place among the operations, and the order of its entries
    places: dict[Any, tuple[int, tuple[Any, ...]]] = {argument: (ARGUMENT, ())}

    def place(operand: Any) -> tuple[int | float, tuple[Any, ...]] | None:
        if isinstance(operand, Constant):
            return _float(operand.number), ()
        if operand in places:
            return places[operand]
        step = steps.get(operand) if isinstance(operand, int) else None
        if step is None:
            return None
        inputs = [place(one) for one in step.operands]
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


def _rearrangement(step: Step) -> tuple[Any, ...]:
    """How a step changes the order of the entries; () if it does not."""
    names = (*REARRANGEMENTS, "broadcast_in_dim")
    if step.name not in names or step.name.startswith("copy"):
        return ()
    shape = step.equation.invars[0].aval.shape
    return ((step.name, shape, str(sorted(step.equation.params.items()))),)


def _append(step: Step, operands: list[Any], operations: list[Any]) -> int | None:
    if any(one is None for one in operands):
        return None
    if step.name == "convert_element_type":
        if not _is_real(step.equation.outvars[0].aval.dtype):
            return None
        operations.append(("to_float", (), tuple(operands)))
    elif is_elementwise(step):
        parameters = tuple(sorted(step.equation.params.items()))
        operations.append((step.name, parameters, tuple(operands)))
    else:
        return None
    return len(operations) - 1


def is_elementwise(step: Step) -> bool:
    """Whether each entry of the result depends on the same entry of the operands, of real dtypes."""
    if step.name == "broadcast_in_dim":
        return False
    if step.name not in _PRIMITIVES and step.name != "convert_element_type":
        return False
    avals = [atom.aval for atom in step.equation.invars]
    return all(_is_real(aval.dtype) or aval.dtype == np.bool_ for aval in avals)


def is_identity(step: Step) -> bool:
    """Whether its result has the entries of its operand, in whatever order or floating-point dtype."""
    if step.equation is None:
        return False
    if step.name == "convert_element_type":
        dtypes = step.equation.invars[0].aval.dtype, step.equation.outvars[0].aval.dtype
        return all(map(_is_real, dtypes))
    if len(step.operands) != 1:
        return False
    if step.name == "broadcast_in_dim":  # y[None]
        return step.equation.invars[0].aval.size == step.equation.outvars[0].aval.size
    return step.name in _IDENTITIES or (step.name == "name" and step.mark is None)


def _is_real(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, np.floating)


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
    from stochsolvers.surgery._flatten import flatten

    x = jax.ShapeDtypeStruct((2,), jnp.float32)
    program = flatten(jax.make_jaxpr(lambda x: function(x, *numbers))(x))
    steps = {number: step for step in program.steps for number in step.writes}
    (result,) = program.steps[-1].operands
    found = function_of(steps, 0, result)  # pyright: ignore[reportArgumentType]
    assert found is not None
    return found
