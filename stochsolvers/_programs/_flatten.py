"""A jaxpr as one list of operations: calls become their bodies, loops their iterations or one body.

Within the calls of marked modules nothing is replaced but calls that contain marks.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from stochsolvers._programs._calls import body, display_name, parts
from stochsolvers._programs._marks import Mark, has_mark, mark_of

_LONGEST = 20_000  # operations that a loop may be replaced by
_TRANSPARENT = ("closed_call", "remat2", "checkpoint")  # calls without a name of their own


@dataclasses.dataclass(frozen=True)
class Step:
    """One operation: what it reads and writes, by number.

    Attributes:
      name: of the outermost function that it is a part of, or its own.
      equation: of a jaxpr; None for the results of a loop's or a branch's body, or of the whole program.
      reads: its operands.
      writes: its results.
      iteration: of the loops around it that are replaced by their iterations, from the outermost.
      loops: the other loops and branches around it: ("while", 3), …
      calls: the jitted functions that it is in.
      mark: set if it is one.
    """

    name: str
    equation: Any
    reads: tuple[int, ...]
    writes: tuple[int, ...] = ()
    iteration: tuple[int, ...] = ()
    loops: tuple[tuple[str, int], ...] = ()
    calls: tuple[int, ...] = ()
    mark: Mark | None = None

    @property
    def operation(self) -> str:
        """The name of the primitive; "results" for results."""
        return "results" if self.equation is None else self.equation.primitive.name

    @property
    def opens(self) -> bool:
        """Whether a call of a marked module begins here."""
        return self.mark is not None and self.mark.opens

    @property
    def closes(self) -> bool:
        """Whether it ends here."""
        return self.mark is not None and self.mark.closes


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where an array comes from: an argument of the program, or its slices along the first axis.

    Attributes:
      argument: its number.
      path: the indices of the slices, from the outermost.
    """

    argument: int
    path: tuple[int, ...] = ()


@dataclasses.dataclass
class Program:
    """A jaxpr as one list of operations.

    Attributes:
      steps: in order.
      arguments: numbers of the values that it takes.
      results: numbers of those that it returns.
      avals: shapes and dtypes by number.
      known: entries of literals, of arrays that it closes over and of arguments, by number.
      origins: of arguments and their slices, by number.
      results_of: for each value that a jitted function returns, the numbers of these.
    """

    steps: list[Step] = dataclasses.field(default_factory=list)
    arguments: list[int] = dataclasses.field(default_factory=list)
    results: list[int] = dataclasses.field(default_factory=list)
    avals: dict[int, Any] = dataclasses.field(default_factory=dict)
    known: dict[int, Any] = dataclasses.field(default_factory=dict)
    origins: dict[int, Origin] = dataclasses.field(default_factory=dict)
    results_of: dict[int, set[int]] = dataclasses.field(default_factory=dict)


def flatten(closed: Any, arrays: Sequence[Any] = (), *, unroll: bool = True) -> Program:
    """The program of a closed jaxpr.

    Args:
      closed: the jaxpr.
      arrays: its first arguments, whose entries are known.
      unroll: replace loops of known length by their iterations; else the bodies of loops and branches that
        have marks come once, before the loop or the branch itself.
    """
    program = Program()
    flat = _Flattening(program, unroll)
    for variable in closed.jaxpr.invars:
        program.arguments.append(flat.number(variable.aval))
    for argument, array in zip(program.arguments, arrays, strict=False):
        program.known[argument] = array
        program.origins[argument] = Origin(argument)
    program.results = flat.run(closed.jaxpr, program.arguments, closed.consts)
    return program


class _Flattening:
    """The state of one walk."""

    def __init__(self, program: Program, unroll: bool):
        self.program = program
        self.unroll = unroll
        self.numbers = itertools.count()
        self.depth = 0  # of marked calls
        self.iteration: tuple[int, ...] = ()
        self.loops: tuple[tuple[str, int], ...] = ()
        self.calls: tuple[int, ...] = ()

    def number(self, aval: Any, entries: Any = None) -> int:
        """That of a new value."""
        number = next(self.numbers)
        self.program.avals[number] = aval
        if entries is not None:
            self.program.known[number] = entries
        return number

    def run(
        self, jaxpr: Any, arguments: Sequence[int], consts: Sequence[Any] = (), name: str = ""
    ) -> list[int]:
        """The numbers of its results."""
        numbers: dict[Any, int] = dict(zip(jaxpr.invars, arguments, strict=True))
        for variable, array in zip(jaxpr.constvars, consts, strict=False):
            numbers[variable] = self.number(variable.aval, array)

        def read(atoms: Sequence[Any]) -> list[int]:
            return [
                self.number(atom.aval, atom.val)
                if hasattr(atom, "val")
                else numbers[atom]
                if atom in numbers
                else self.number(atom.aval)
                for atom in atoms
            ]

        for equation in jaxpr.eqns:
            results = self.equation(equation, read(equation.invars), name)
            numbers.update(zip(equation.outvars, results, strict=True))
        return read(jaxpr.outvars)

    def equation(self, equation: Any, operands: Sequence[int], name: str) -> list[int]:
        """The numbers of its results, appended or replaced by what it consists of."""
        inner = body(equation)
        if inner is not None and (self.depth == 0 or has_mark(inner)):
            if not name and equation.primitive.name not in _TRANSPARENT:
                name = display_name(equation)
            name = "" if has_mark(inner) else name
            return self._call(equation, operands, name)
        if self.unroll and equation.primitive.name == "scan" and self._is_entered(equation):
            return self._loop(equation, operands, name)
        if not self.unroll:
            self._enter(equation)
        results = [self.number(variable.aval) for variable in equation.outvars]
        name = name or display_name(equation)
        step = self.step(name, equation, operands, results, mark_of(equation))
        self.depth += step.opens - step.closes
        return results

    def step(
        self,
        name: str,
        equation: Any,
        reads: Sequence[int],
        writes: Sequence[int] = (),
        mark: Mark | None = None,
    ) -> Step:
        """One that is appended."""
        around = self.iteration, self.loops, self.calls
        step = Step(name, equation, tuple(reads), tuple(writes), *around, mark)
        self.program.steps.append(step)
        return step

    def _call(self, equation: Any, operands: Sequence[int], name: str) -> list[int]:
        """The body of a call in its place."""
        ((jaxpr, consts),) = itertools.islice(parts(equation), 1)
        call, calls = next(self.numbers), self.calls
        self.calls = (*calls, call)
        results = self.run(jaxpr, operands, consts, name)
        self.calls = calls
        for number in results:
            self.program.results_of.setdefault(number, set()).add(call)
        return results

    def _enter(self, equation: Any) -> None:
        """The bodies with marks of a loop or a branch, of arguments that nothing is known of."""
        loops = self.loops
        for jaxpr, consts in parts(equation):
            if has_mark(jaxpr):
                self.loops = (*loops, (equation.primitive.name, next(self.numbers)))
                arguments = [self.number(variable.aval) for variable in jaxpr.invars]
                self.step("results", None, self.run(jaxpr, arguments, consts))
        self.loops = loops

    def _is_entered(self, equation: Any) -> bool:
        inner = equation.params["jaxpr"].jaxpr
        small = equation.params["length"] * _count(inner) <= _LONGEST
        return small and (self.depth == 0 or has_mark(inner))

    def _loop(self, equation: Any, operands: Sequence[int], name: str) -> list[int]:
        """All iterations of a scan, one after the other."""
        options, closed = equation.params, equation.params["jaxpr"]
        first, length = options["num_consts"], options["length"]
        end = first + options["num_carry"]
        shared, carry, stacked = operands[:first], operands[first:end], operands[end:]
        outputs: dict[int, list[int]] = {}
        for i in range(length)[:: -1 if options["reverse"] else 1]:
            slices = [self._slice(number, i) for number in stacked]
            self.iteration += (i,)
            results = self.run(closed.jaxpr, [*shared, *carry, *slices], closed.consts, name)
            self.iteration = self.iteration[:-1]
            carry, outputs[i] = results[: len(carry)], results[len(carry) :]
        results = [*carry]
        for place, variable in enumerate(equation.outvars[len(carry) :]):
            parts = [outputs[i][place] for i in range(length)]
            results.append(self._stack(parts, variable.aval))
        return results

    def _slice(self, number: int, i: int) -> int:
        """The i-th slice of a stacked array, by its entries where they are known."""
        known, origin = self.program.known.get(number), self.program.origins.get(number)
        if known is None:
            (result,) = self._traced(lambda x: lax.index_in_dim(x, i, keepdims=False), [number])
        else:
            part = known[i]
            result = self.number(jax.typeof(part), part)
        if origin is not None:
            self.program.origins[result] = Origin(origin.argument, (*origin.path, i))
        return result

    def _stack(self, numbers: Sequence[int], aval: Any) -> int:
        if not numbers:
            return self.number(aval, np.zeros(aval.shape, aval.dtype))
        (result,) = self._traced(lambda *parts: jnp.stack(parts), numbers)
        return result

    def _traced(self, function: Callable[..., Any], numbers: Sequence[int]) -> list[int]:
        """Append a function of some values."""
        avals = [self.program.avals[number] for number in numbers]
        shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
        closed: Any = jax.make_jaxpr(function)(*shapes)
        return self.run(closed.jaxpr, numbers, closed.consts)


def _count(jaxpr: Any) -> int:
    """The number of operations in a jaxpr and in those that it calls."""
    total = len(jaxpr.eqns)
    for equation in jaxpr.eqns:
        inner = body(equation)
        if inner is not None:
            total += _count(inner)
        elif equation.primitive.name == "scan":
            total += equation.params["length"] * _count(equation.params["jaxpr"].jaxpr)
    return total
