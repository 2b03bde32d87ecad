"""A forward pass as one list of operations, with the marks that a front end has set in it.

The front ends call `mark_input` and `mark_output` around every layer that may be replaced, every Dropout
and every normalisation. The marks are `checkpoint_name`s, identities that JAX's transformations keep, so
that they are found within `jit`, `remat` and `vmap`, and in loops and branches (scan, while, cond).
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.core
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from stochsolvers._typing import Array
from stochsolvers.reports._program import body

Kind = Literal["layer", "dropout", "norm"]
_INPUT, _OUTPUT = "stochsolvers:surgery:in:", "stochsolvers:surgery:out:"


def mark_input(x: Array, kind: Kind, label: str) -> Array:
    """The input of a module, unchanged. The mark contains its shape, as seen within `jax.vmap`."""
    return checkpoint_name(x, f"{_INPUT}{kind}:{'x'.join(map(str, x.shape))}:{label}")


def mark_output(z: Array, kind: Kind, label: str) -> Array:
    """The output of a module, unchanged."""
    return checkpoint_name(z, f"{_OUTPUT}{kind}::{label}")


@dataclasses.dataclass(frozen=True)
class Mark:
    """The start or the end of one call of a marked module."""

    kind: Kind
    label: str
    opens: bool
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Constant:
    """An operand that is one known number, or an array of copies of it."""

    number: Any  # a NumPy scalar


@dataclasses.dataclass(frozen=True)
class Step:
    """One operation.

    Attributes:
      name: of its primitive; "results" for what leaves a loop, a branch or the whole pass.
      equation: of the jaxpr; None for "results".
      operands: a number for each array, `Constant`s, None for other arrays that the program closes over.
      writes: the numbers of its results.
      loops: the loops and branches that it is in, from the outermost: ("scan", 3), …
      calls: the jitted functions that it is in.
      mark: set if it is one.
    """

    name: str
    equation: Any
    operands: tuple[int | Constant | None, ...]
    writes: tuple[int, ...]
    loops: tuple[tuple[str, int], ...]
    calls: tuple[int, ...]
    mark: Mark | None = None

    @property
    def reads(self) -> tuple[int, ...]:
        """The numbers among its operands."""
        return tuple(one for one in self.operands if isinstance(one, int))


@dataclasses.dataclass
class Program:
    """A forward pass.

    Attributes:
      steps: in order.
      results_of: for each array, the jitted functions that return it.
    """

    steps: list[Step]
    results_of: dict[int, set[int]]


def flatten(closed: Any) -> Program:
    """The list of operations of a closed jaxpr."""
    program, numbers = Program([], {}), itertools.count()
    known = {v: _constant(c) for v, c in zip(closed.jaxpr.constvars, closed.consts, strict=True)}
    arguments = [next(numbers) for _ in closed.jaxpr.invars]
    results = _enter(closed.jaxpr, known, arguments, program, numbers, (), ())
    program.steps.append(Step("results", None, tuple(results), (), (), ()))
    return program


def _enter(
    jaxpr: Any,
    known: Mapping[Any, Any],
    arguments: Sequence[Any],
    program: Program,
    numbers: Iterator[int],
    loops: tuple[tuple[str, int], ...],
    calls: tuple[int, ...],
) -> list[Any]:
    values: dict[Any, Any] = {**known, **dict(zip(jaxpr.invars, arguments, strict=True))}

    def read(atoms: Sequence[Any]) -> list[Any]:
        return [_constant(a.val) if hasattr(a, "val") else values.get(a) for a in atoms]

    for equation in jaxpr.eqns:
        inner = body(equation)
        operands = read(equation.invars)
        if inner is not None:
            call = next(numbers)
            results = _enter(
                inner, _constants(equation), operands, program, numbers, loops, (*calls, call)
            )
            for number in results:
                if isinstance(number, int):
                    program.results_of.setdefault(number, set()).add(call)
        else:
            name = equation.primitive.name
            for part, constants in _parts(equation):
                own = (*loops, (name, next(numbers)))
                fresh = [next(numbers) for _ in part.invars]
                leaving = _enter(part, constants, fresh, program, numbers, own, calls)
                program.steps.append(Step("results", None, tuple(leaving), (), own, calls))
            folded = _folded(equation, operands)
            results = [folded]
            if folded is None:
                results = [next(numbers) for _ in equation.outvars]
                writes = tuple(results)
                mark = _mark(equation)
                step = Step(name, equation, tuple(operands), writes, loops, calls, mark)
                program.steps.append(step)
        values.update(zip(equation.outvars, results, strict=True))
    return read(jaxpr.outvars)


def _constants(equation: Any) -> dict[Any, Any]:
    """The known numbers that the body of a call closes over."""
    for parameter in equation.params.values():
        if hasattr(parameter, "consts") and hasattr(parameter, "jaxpr"):
            pairs = zip(parameter.jaxpr.constvars, parameter.consts, strict=True)
            return {variable: _constant(value) for variable, value in pairs}
    return {}


def _parts(equation: Any) -> list[tuple[Any, dict[Any, Any]]]:
    """The bodies of a loop or of branches that have marks."""
    found = []
    for parameter in equation.params.values():
        for part in parameter if isinstance(parameter, tuple | list) else (parameter,):
            jaxpr = getattr(part, "jaxpr", part)
            if hasattr(jaxpr, "eqns") and has_mark(jaxpr):
                consts = getattr(part, "consts", ())
                pairs = zip(jaxpr.constvars, consts, strict=False)
                found.append((jaxpr, {variable: _constant(value) for variable, value in pairs}))
    return found


def has_mark(jaxpr: Any) -> bool:
    """Whether a marked module is called in it, or in what it calls."""
    for equation in jaxpr.eqns:
        if _mark(equation) is not None:
            return True
        for parameter in equation.params.values():
            for part in parameter if isinstance(parameter, tuple | list) else (parameter,):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns") and has_mark(inner):
                    return True
    return False


def _mark(equation: Any) -> Mark | None:
    name = str(equation.params.get("name", ""))
    if equation.primitive.name != "name" or not name.startswith((_INPUT, _OUTPUT)):
        return None
    opens = name.startswith(_INPUT)
    kind, shape, label = name.removeprefix(_INPUT).removeprefix(_OUTPUT).split(":", 2)
    sizes = tuple(int(size) for size in shape.split("x") if size)
    return Mark(kind, label, opens, sizes)  # pyright: ignore[reportArgumentType]


def _constant(value: Any) -> Constant | None:
    """A single number; None for an array of several, and for what is no real number."""
    if isinstance(value, jax.core.Tracer) or np.size(value) != 1:
        return None
    try:
        number = np.asarray(value).reshape(())[()]
    except TypeError:  # a key
        return None
    return Constant(number) if np.isrealobj(number) else None


def _folded(equation: Any, operands: Sequence[Any]) -> Constant | None:
    """The number that an operation on known numbers results in, where that is plain."""
    if not all(isinstance(one, Constant) for one in operands) or len(equation.outvars) != 1:
        return None
    name, numbers = equation.primitive.name, [one.number for one in operands]
    if name in ("broadcast_in_dim", "reshape", "copy", "squeeze", "expand_dims"):
        return operands[0] if len(operands) == 1 else None
    if name == "convert_element_type":
        return _constant(np.asarray(numbers[0]).astype(equation.outvars[0].aval.dtype))
    plain = {"neg": np.negative, "add": np.add, "sub": np.subtract, "mul": np.multiply}
    plain |= {"div": np.divide, "sqrt": np.sqrt, "max": np.maximum, "min": np.minimum}
    floating = all(np.issubdtype(np.asarray(n).dtype, np.floating) for n in numbers)
    return _constant(plain[name](*numbers)) if name in plain and floating else None
