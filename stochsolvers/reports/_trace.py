"""The graph of a forward pass, read off its jaxpr: which layers are called, on what, and on which path.

A Flax room calls `mark_input` and `mark_output` around every layer that it knows. The marks are
`checkpoint_name`s, identities that survive every transformation, so that layers within `jit` and
`remat` are found, and that nothing depends on what was traced before. Loops and branches (scan, while,
cond) are not entered.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from stochsolvers._typing import Array
from stochsolvers.reports._between import CALLS, Value, amplification, body, literal, operation

_INPUT, _OUTPUT = "stochsolvers:input:", "stochsolvers:output:"
_SHAPE_ONLY = ("reshape", "squeeze", "expand_dims", "transpose", "convert_element_type", "copy")


def mark_input(x: Array, label: str) -> Array:
    """The input of a layer, unchanged."""
    return checkpoint_name(x, _INPUT + label)


def mark_output(z: Array, label: str) -> Array:
    """The output of a layer, unchanged."""
    return checkpoint_name(z, _OUTPUT + label)


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a marked layer.

    Attributes:
      label: the layer's.
      input_shape: batch axes included.
      position: in the order of the trace.
      on_every_path: whether the network's output sees its input only through this layer.
    """

    label: str
    input_shape: tuple[int, ...]
    position: int
    on_every_path: bool


@dataclasses.dataclass(frozen=True)
class Trace:
    """A forward pass.

    Attributes:
      calls: of marked layers, in order.
      strays: parameters, by their number, that the output depends on and that are read outside the
        marked layers, with the position of their first use.
      between: names of the operations on the input's way outside the marked layers.
      factor: a Lipschitz constant of the network if every layer's is 1; 0 where the output does not
        depend on the input, infinite where one of the operations has none that is known.
      unknown: names of those.
    """

    calls: tuple[Call, ...]
    strays: dict[int, int]
    between: tuple[str, ...]
    factor: float
    unknown: tuple[str, ...]


def trace(function: Callable[..., Any], parameters: Any, inputs: Any) -> Trace:
    """Trace `function(parameters, inputs)` without running it; only shapes of `inputs` matter."""
    jaxpr: Any = jax.make_jaxpr(function)(parameters, inputs).jaxpr
    values = itertools.count()
    arguments = [next(values) for _ in jaxpr.invars]
    steps: list[_Step] = []
    results = _flatten(jaxpr, arguments, values, steps)
    count = len(jax.tree.leaves(parameters))
    strays = _unmarked(steps, arguments[:count], results)
    calls, between, factor, unknown = _follow(steps, arguments[count:], results)
    return Trace(calls, strays, between, factor, unknown)


@dataclasses.dataclass(frozen=True)
class _Step:
    """One equation: what it reads and writes, by number; None for literals and constants."""

    name: str
    equation: Any
    operands: tuple[int | None, ...]
    writes: tuple[int, ...]

    @property
    def reads(self) -> tuple[int, ...]:
        return tuple(number for number in self.operands if number is not None)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.equation.invars[0].aval.shape)

    def factor(self, factors: Mapping[int, float]) -> float:
        """The largest constant of its results, given those of the numbered values."""
        operands = [
            literal(atom) or Value(0.0 if number is None else factors.get(number, 0.0))
            for atom, number in zip(self.equation.invars, self.operands, strict=True)
        ]
        return amplification(self.equation, operands)


def _flatten(jaxpr: Any, arguments: list[Any], values: Iterator[int], steps: list[_Step]):
    """Append the equations of a jaxpr and of the calls within it; the numbers of its results."""
    numbers: dict[Any, Any] = dict(zip(jaxpr.invars, arguments, strict=True))

    def read(atoms):
        # literals and constants have no number
        return [None if hasattr(atom, "val") else numbers.get(atom) for atom in atoms]

    for equation in jaxpr.eqns:
        name = equation.primitive.name
        inner = next(filter(None, map(body, equation.params.values())), None)
        if name in CALLS and inner is not None and _has_mark(inner):
            results = _flatten(inner, read(equation.invars), values, steps)
        else:
            results = [next(values) for _ in equation.outvars]
            steps.append(
                _Step(operation(equation), equation, tuple(read(equation.invars)), tuple(results))
            )
        numbers.update(zip(equation.outvars, results, strict=True))
    return read(jaxpr.outvars)


def _has_mark(jaxpr: Any) -> bool:
    for equation in jaxpr.eqns:
        if str(equation.params.get("name")).startswith((_INPUT, _OUTPUT)):
            return True
        bodies = filter(None, map(body, equation.params.values()))
        if equation.primitive.name in CALLS and any(map(_has_mark, bodies)):
            return True
    return False


def _follow(steps: list[_Step], inputs: list[int], results: list[Any]):
    """Calls in order, each with whether it dominates the output; what is between them."""
    # value -> bits of the calls on every path from the input to it; its constant if theirs are 1
    through, factors = dict.fromkeys(inputs, 0), dict.fromkeys(inputs, 1.0)
    opened: list[tuple[str, tuple[int, ...], int]] = []
    closed: list[tuple[str, tuple[int, ...], int]] = []
    inside: set[int] = set()  # what the open call has made of its input
    entered = 0  # bits of the calls that the input enters another way, too
    reaching, between, unknown = _reaching(steps, results), {}, {}
    for position, step in enumerate(steps):
        seen = [number for number in step.reads if number in through]
        if opened and not inside.issuperset(seen):
            entered |= 1 << len(closed)
        if step.name.startswith(_INPUT):
            inside = inside if opened else set()
            opened.append((step.name.removeprefix(_INPUT), step.shape, position))
        inside.update(step.writes)
        call = opened.pop() if step.name.startswith(_OUTPUT) else None
        if not seen:
            continue
        bits, factor = _all([through[n] for n in seen]), max(factors[n] for n in seen)
        if call is not None:
            bits |= 1 << len(closed)
            closed.append(call)
        elif not opened:
            factor, useful = step.factor(factors), not reaching.isdisjoint(step.writes)
            if useful and step.name not in _SHAPE_ONLY:
                between[step.name] = None
            if useful and factor == math.inf:
                unknown[step.name] = None
            factor = 1.0 if factor == math.inf else factor  # to find all that is unknown
        through.update(dict.fromkeys(step.writes, bits))
        factors.update(dict.fromkeys(step.writes, factor))
    ends = [number for number in results if number in through]
    dominating = _all([through[number] for number in ends] or [0]) & ~entered
    calls = [Call(*call, bool(dominating >> i & 1)) for i, call in enumerate(closed)]
    factor = math.inf if unknown else math.hypot(*(factors[number] for number in ends))
    return (
        tuple(sorted(calls, key=lambda call: call.position)),
        tuple(between),
        factor,
        tuple(unknown),
    )


def _all(bits: list[int]) -> int:
    common = bits[0]
    for other in bits[1:]:
        common &= other
    return common


def _unmarked(steps: list[_Step], parameters: list[int], results: list[Any]) -> dict[int, int]:
    """Parameters that are read outside the marked layers, on the way to the results."""
    useful, depth = _reaching(steps, results), 0
    first: dict[int, int] = {number: len(steps) for number in results if number is not None}
    for position, step in enumerate(steps):
        depth += step.name.startswith(_INPUT) - step.name.startswith(_OUTPUT)
        if depth == 0 and useful.intersection(step.writes):
            for number in step.reads:
                first[number] = min(position, first.get(number, position))
    return {index: first[number] for index, number in enumerate(parameters) if number in first}


def _reaching(steps: list[_Step], results: list[Any]) -> set[int]:
    """The values on which the results depend."""
    reached = {number for number in results if number is not None}
    for step in reversed(steps):
        if reached.intersection(step.writes):
            reached.update(step.reads)
    return reached
