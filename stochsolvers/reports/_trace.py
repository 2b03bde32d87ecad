"""The graph of a forward pass, from its jaxpr: which layers are called, on which shapes, on which paths.

The Flax front ends call `mark_input` and `mark_output` around every layer whose norm they can compute. The
marks are `checkpoint_name`s, which are identities that JAX's transformations keep, so that layers within
`jit`, `remat` and `vmap` are found, also where JAX takes a jitted function from its cache. Loops and
branches (scan, while, cond) are not entered.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from stochsolvers._typing import Array
from stochsolvers.reports._primitives import amplification
from stochsolvers.reports._program import Value, body, display_name, literal

_INPUT, _OUTPUT = "stochsolvers:input:", "stochsolvers:output:"
_SHAPE_ONLY = ("reshape", "squeeze", "expand_dims", "transpose", "convert_element_type", "copy")


def mark_input(x: Array, label: str) -> Array:
    """The input of a layer, unchanged.

    The mark contains its shape: within `jax.vmap`, the array of the jaxpr has one more axis, at any place.
    """
    return checkpoint_name(x, f"{_INPUT}{'x'.join(map(str, x.shape))}:{label}")


def mark_output(z: Array, label: str) -> Array:
    """The output of a layer, unchanged."""
    return checkpoint_name(z, _OUTPUT + label)


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a marked layer.

    Attributes:
      label: the layer's.
      input_shape: as the layer sees it, batch axes included, without those of an enclosing `jax.vmap`.
      position: in the order of the trace.
      on_every_path: whether the network's output sees its input only through this layer.
      parameters: those, by their number, that the layer reads as they are.
      reads_others: whether it reads other arrays that are computed outside of it, beside its input.
    """

    label: str
    input_shape: tuple[int, ...]
    position: int
    on_every_path: bool
    parameters: frozenset[int]
    reads_others: bool


@dataclasses.dataclass(frozen=True)
class Trace:
    """A forward pass.

    Attributes:
      calls: of marked layers, in order.
      strays: parameters, by their number, that are read outside the marked layers and that the output
        depends on, with the position of their first use.
      between: names of the operations outside the marked layers that compute the output from the input.
      factor: a Lipschitz constant of the network if that of every marked layer is 1; 0 if the output
        does not depend on the input, infinite if no constant is known for one of the operations.
      unknown: names of the operations without a known constant.
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
    results = [n for n in _flatten(jaxpr, arguments, values, steps) if n is not None]
    # the first numbers are those of the parameters
    count = len(jax.tree.leaves(parameters))
    weights, inputs = arguments[:count], arguments[count:]

    dependent = _dependent(steps, inputs)
    spans = [span for span in _spans(steps) if dependent.intersection(steps[span.stop].reads)]
    everywhere = _on_every_path(steps, spans, inputs, results)
    calls = []
    for span in sorted(spans, key=lambda span: span.start):
        alone = _reads_its_input_alone(steps, span, dependent)
        read = _outside_reads(steps, span)
        calls.append(
            Call(
                span.label,
                span.input_shape,
                position=span.start,
                on_every_path=span in everywhere and alone,
                parameters=frozenset(read.intersection(weights)),
                reads_others=not read.issubset(weights),
            )
        )
    marked = _marked(steps)
    strays = _strays(steps, marked, weights, results)
    return Trace(tuple(calls), strays, *_constants(steps, marked, inputs, results))


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
    def opens(self) -> bool:
        return self.name.startswith(_INPUT)

    @property
    def closes(self) -> bool:
        return self.name.startswith(_OUTPUT)

    def factor(self, factors: Mapping[int, float]) -> float:
        """The largest constant of its results, given those of the numbered values."""
        operands = [
            literal(atom) or Value(atom.aval, 0.0 if number is None else factors.get(number, 0.0))
            for atom, number in zip(self.equation.invars, self.operands, strict=True)
        ]
        return amplification(self.equation, operands)


@dataclasses.dataclass(frozen=True)
class _Span:
    """The steps of one call of a marked layer, from its input's mark to its output's, by position."""

    label: str
    input_shape: tuple[int, ...]
    start: int
    stop: int


def _flatten(
    jaxpr: Any, arguments: Sequence[Any], values: Iterator[int], steps: list[_Step]
) -> list[Any]:
    """Append the equations of a jaxpr and of the calls within it; the numbers of its results."""
    numbers: dict[Any, Any] = dict(zip(jaxpr.invars, arguments, strict=True))

    def read(atoms: Sequence[Any]) -> list[Any]:
        # literals and constants have no number
        return [None if hasattr(atom, "val") else numbers.get(atom) for atom in atoms]

    for equation in jaxpr.eqns:
        inner = body(equation)
        if inner is not None and _has_mark(inner):
            results = _flatten(inner, read(equation.invars), values, steps)
        else:
            results = [next(values) for _ in equation.outvars]
            operands = tuple(read(equation.invars))
            steps.append(_Step(display_name(equation), equation, operands, tuple(results)))
        numbers.update(zip(equation.outvars, results, strict=True))
    return read(jaxpr.outvars)


def _has_mark(jaxpr: Any) -> bool:
    for equation in jaxpr.eqns:
        inner = body(equation)
        if inner is not None and _has_mark(inner):
            return True
        if str(equation.params.get("name")).startswith((_INPUT, _OUTPUT)):
            return True
    return False


def _spans(steps: Sequence[_Step]) -> list[_Span]:
    """The calls of marked layers, in the order in which they end."""
    spans, opened = [], []
    for position, step in enumerate(steps):
        if step.opens:
            opened.append(position)
        if step.closes:
            start = opened.pop()
            shape, _, label = steps[start].name.removeprefix(_INPUT).partition(":")
            sizes = tuple(int(size) for size in shape.split("x") if size)
            spans.append(_Span(label, sizes, start, position))
    return spans


def _marked(steps: Sequence[_Step]) -> list[bool]:
    """Of each step, whether it is within a call of a marked layer, the marks included."""
    depths = itertools.accumulate(step.opens - step.closes for step in steps)
    return [depth > 0 or step.closes for depth, step in zip(depths, steps, strict=True)]


def _dependent(steps: Iterable[_Step], inputs: Iterable[int]) -> set[int]:
    """The values that depend on the input."""
    dependent = set(inputs)
    for step in steps:
        if dependent.intersection(step.reads):
            dependent.update(step.writes)
    return dependent


def _useful(steps: Sequence[_Step], results: Iterable[int]) -> set[int]:
    """The values on which the results depend."""
    useful = set(results)
    for step in reversed(steps):
        if useful.intersection(step.writes):
            useful.update(step.reads)
    return useful


def _on_every_path(
    steps: Sequence[_Step], spans: Iterable[_Span], inputs: Iterable[int], results: Sequence[int]
) -> frozenset[_Span]:
    """The calls on every path from the input to the results."""
    ends = {span.stop: span for span in spans}
    passed: dict[int, frozenset[_Span]] = dict.fromkeys(inputs, frozenset())

    def common(numbers: Iterable[int]) -> frozenset[_Span]:
        return frozenset.intersection(*(passed[number] for number in numbers))

    for position, step in enumerate(steps):
        seen = [number for number in step.reads if number in passed]
        if seen:
            calls = common(seen)
            if position in ends:
                calls |= {ends[position]}
            passed.update(dict.fromkeys(step.writes, calls))
    seen = [number for number in results if number in passed]
    return common(seen) if seen else frozenset()


def _reads_its_input_alone(steps: Sequence[_Step], span: _Span, dependent: set[int]) -> bool:
    """Whether a call sees the network's input only through its own."""
    inside = set(steps[span.start].writes)
    for step in steps[span.start + 1 : span.stop + 1]:
        if not inside.issuperset(dependent.intersection(step.reads)):
            return False
        inside.update(step.writes)
    return True


def _outside_reads(steps: Sequence[_Step], span: _Span) -> set[int]:
    """What a call reads from outside, beside its input."""
    read = {number for step in steps[span.start + 1 : span.stop + 1] for number in step.reads}
    return read.difference(*(step.writes for step in steps[span.start : span.stop]))


def _constants(
    steps: Sequence[_Step], marked: Sequence[bool], inputs: Iterable[int], results: Iterable[int]
) -> tuple[tuple[str, ...], float, tuple[str, ...]]:
    """`between`, `factor` and `unknown` of the trace."""
    factors = dict.fromkeys(inputs, 1.0)  # a constant of each value, if every layer's is 1
    useful = _useful(steps, results)
    between, unknown = {}, {}  # ordered sets
    for step, is_marked in zip(steps, marked, strict=True):
        seen = [factors[number] for number in step.reads if number in factors]
        if not seen:
            continue
        factor = max(seen) if is_marked else step.factor(factors)
        is_useful = not useful.isdisjoint(step.writes)
        if is_useful and not is_marked and step.name not in _SHAPE_ONLY:
            between[step.name] = None
        if is_useful and factor == math.inf:
            unknown[step.name] = None
        factor = 1.0 if factor == math.inf else factor  # to find all that is unknown
        factors.update(dict.fromkeys(step.writes, factor))
    total = math.hypot(*(factors.get(number, 0.0) for number in results))
    return tuple(between), math.inf if unknown else total, tuple(unknown)


def _strays(
    steps: Sequence[_Step],
    marked: Sequence[bool],
    parameters: Iterable[int],
    results: Iterable[int],
) -> dict[int, int]:
    """Parameters, by index, that are read outside the marked layers on the way to the results."""
    useful = _useful(steps, results)
    first = dict.fromkeys(results, len(steps))
    for position, (step, is_marked) in enumerate(zip(steps, marked, strict=True)):
        if not is_marked and useful.intersection(step.writes):
            for number in step.reads:
                first[number] = min(position, first.get(number, position))
    return {index: first[number] for index, number in enumerate(parameters) if number in first}
