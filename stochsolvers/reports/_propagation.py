r"""A Lipschitz constant of every value of a forward pass, from the input to the output.

Each value v of the program gets ℓ_v with ||v(x) − v(y)|| ≤ ℓ_v ||x − y||, in the order of the operations, by
the rules of `_primitives` and by ℓ ← ℓ_layer ℓ at each marked layer. Several paths need no rule of their own:
x + f(x) has the constant 1 + ℓ_f.

Where the inputs are in a ball, ||x|| ≤ r, values are bounded as well:

    ||v(x)|| ≤ ||v(0)|| + ℓ_v r,     ||f(v)|| ≤ ||f(v(0))|| + ℓ_f (||v|| + ||v(0)||),

and by what is known of single operations, such as |tanh| ≤ 1. Products of two functions of the input have a
constant then.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from stochsolvers.reports._activations import Match, activation_of
from stochsolvers.reports._entries import Entries
from stochsolvers.reports._primitives import constant_of
from stochsolvers.reports._program import Size, Value, is_float, known_number, number_of
from stochsolvers.reports._sizes import size_of
from stochsolvers.reports._softmax import softmax_of
from stochsolvers.reports._trace import Span, Trace, marked

_SHAPE_ONLY = ("reshape", "squeeze", "expand_dims", "transpose", "convert_element_type", "copy")


@dataclasses.dataclass(frozen=True)
class LayerBound:
    """What is known of one call of a marked layer.

    Attributes:
      constant: ℓ, of its input.
      side: ℓ of what it adds to its bias.
      largest: a bound on its largest absolute output, +∞ if not known.
      joined: ℓ of the layer and the one before it as one function; +∞ if not known.
    """

    constant: float = 1.0
    side: float = 1.0
    largest: float = math.inf
    joined: float = math.inf


@dataclasses.dataclass(frozen=True)
class Bound:
    """Of a whole network.

    Attributes:
      constant: a Lipschitz constant; 0 if the output does not depend on the input, +∞ if none is known.
      unknown: names of the operations without a known constant, on a way to the output.
    """

    constant: float
    unknown: tuple[str, ...]


def names_between(trace: Trace) -> tuple[str, ...]:
    """Names of the operations outside the marked layers that compute the output from the input."""
    steps = trace.program.steps
    names = {}  # an ordered set
    for step, within in zip(steps, marked(steps), strict=True):
        depends = not trace.dependent.isdisjoint(step.reads)
        matters = depends and not trace.useful.isdisjoint(step.writes)
        if matters and not within and step.equation.primitive.name not in _SHAPE_ONLY:
            names[step.name] = None
    return tuple(names)


def propagate(
    trace: Trace,
    layers: Sequence[LayerBound],
    entries: Entries,
    radius: float = math.inf,
    at_zero: Mapping[int, Size] | None = None,
) -> Bound:
    """The bound of a network.

    Args:
      trace: of its forward pass.
      layers: of each of its calls.
      entries: of the values that do not depend on the input.
      radius: r ≥ ||x||, of all inputs as one array.
      at_zero: sizes of the values at x = 0, where the radius is finite.
    """
    return _Propagation(trace, layers, entries, radius, at_zero or {}).bound()


class _Propagation:
    """The state of one pass."""

    def __init__(
        self,
        trace: Trace,
        layers: Sequence[LayerBound],
        entries: Entries,
        radius: float,
        at_zero: Mapping[int, Size],
    ):
        self.trace, self.layers, self.entries = trace, layers, entries
        self.radius, self.at_zero = radius, at_zero
        self.values: dict[int, Value] = {}
        self.matches: dict[Value, Match] = {}
        self.sources: dict[Value, tuple[Value, ...]] = {}  # of a layer's output
        self.positions: dict[Value, int] = {}

    def bound(self) -> Bound:
        """Of the results, as one array."""
        program = self.trace.program
        for number in self.trace.inputs:
            size = Size(self.radius, self.radius)
            aval = program.avals[number]
            self.values[number] = Value(aval, 1.0, size=size.norm, largest=size.largest)
        spans = {span.start: (span, i) for i, span in enumerate(self.trace.spans)}
        within = marked(program.steps)
        for position in range(len(program.steps)):
            if position in spans:
                self._layer(*spans[position])
            elif not within[position]:
                self._operation(position)
        results = [self._value(number) for number in program.results]
        total = math.hypot(*(value.constant for value in results))
        return Bound(total, self._unknown(results))

    def _value(self, number: int) -> Value:
        """One that was computed, or does not depend on the input; what leaks from a layer has no ℓ."""
        if number not in self.values:
            program = self.trace.program
            known = number_of(program.known[number]) if number in program.known else None
            constant = math.inf if number in self.trace.dependent else 0.0
            self.values[number] = Value(
                program.avals[number],
                constant,
                known,
                entries=lambda: self.entries(number),
            )
        return self.values[number]

    def _operation(self, position: int) -> None:
        """The results of one operation outside the layers."""
        step = self.trace.program.steps[position]
        operands = tuple(self._value(number) for number in step.reads)
        known = known_number(step.equation, operands)
        for index, number in enumerate(step.writes):
            aval = self.trace.program.avals[number]
            value = Value(aval, 0.0, known, step.equation, operands, index)
            if number not in self.trace.dependent:
                value = dataclasses.replace(
                    value, entries=lambda number=number: self.entries(number)
                )
            else:
                value = self._bounded(value, number)
            self.values[number] = value
            self.positions[value] = position

    def _bounded(self, value: Value, number: int) -> Value:
        """A value with its constant and its size."""
        match, constant = None, 0.0
        if any(operand.constant for operand in value.operands):
            match = softmax_of(value) or activation_of(value)
            constant = constant_of(value)
        if match is not None:
            constant = min(constant, match.constant(value.aval.shape))
        value = dataclasses.replace(value, constant=constant)
        if math.isfinite(self.radius):
            value = self._sized(value, number, size_of(value))
        if match is not None:
            self.matches[value] = match
        return value

    def _sized(self, value: Value, number: int, size: Size) -> Value:
        """A value with a bound on its size for inputs in the ball."""
        if not is_float(value.aval):
            return value
        zero = self.at_zero.get(number, Size(math.inf, math.inf))
        moved = value.constant * self.radius if value.constant else 0.0
        size = size.smaller(Size(zero.norm + moved, zero.largest + moved))
        norm = min(size.norm, size.largest * math.sqrt(value.aval.size))
        return dataclasses.replace(value, size=norm, largest=min(size.largest, norm))

    def _layer(self, span: Span, index: int) -> None:
        """The output of a marked layer."""
        program, layer = self.trace.program, self.layers[index]
        start, stop = program.steps[span.start], program.steps[span.stop]
        read, number = start.reads[0], stop.writes[0]
        x = self._value(read)
        sources = [x]
        constant = _times(layer.constant, x.constant)
        before = self.trace.calls[index].follows
        if before is not None and self._sides(self.trace.spans[before]):
            before = None  # it is not a function of its input alone
        if before is not None and math.isfinite(layer.joined):
            first = self._value(program.steps[self.trace.spans[before].start].reads[0])
            constant = min(constant, _times(layer.joined, first.constant))
        for side in self._sides(span):
            value = None if side is None else self._value(side)
            if value is None:
                constant = math.inf
            else:
                sources.append(value)
                constant += _times(layer.side, value.repeated(program.avals[number].shape))
        output = Value(program.avals[number], constant)
        if math.isfinite(self.radius):
            zero_in, zero = self.at_zero.get(read), self.at_zero.get(number)
            size = Size(math.inf, layer.largest)
            if zero_in is not None and zero is not None and len(sources) == 1:
                moved = _times(layer.constant, x.size + zero_in.norm)
                size = size.smaller(Size(zero.norm + moved, zero.largest + moved))
            output = self._sized(output, number, size)
        self.values[number] = output
        self.sources[output] = tuple(sources)

    def _sides(self, span: Span) -> list[int | None]:
        """What the layer reads of the network's input beside its own; None if not added to its bias."""
        steps, dependent = self.trace.program.steps, self.trace.dependent
        inside = set(steps[span.start].writes)
        sides: list[int | None] = []
        for step in steps[span.start + 1 : span.stop + 1]:
            others = [n for n in step.reads if n in dependent and n not in inside]
            mark = step.mark
            is_side = mark is not None and mark.role == "side" and mark.label == span.label
            sides += others if is_side else [None] * len(others)
            inside.update(step.writes)
        return sides

    def _unknown(self, results: Sequence[Value]) -> tuple[str, ...]:
        """Names of the operations in which an infinite constant of the results begins."""
        todo = [value for value in results if value.constant == math.inf]
        seen, found = set(todo), {}
        while todo:
            value = todo.pop()
            if value in self.matches:
                behind: Sequence[Value] = (self.matches[value].source,)
            elif value in self.sources:
                behind = self.sources[value]
            else:
                behind = value.operands
                if value in self.positions and _begins(value):
                    position = self.positions[value]
                    found[position] = self.trace.program.steps[position].name
            for operand in behind:
                if operand.constant == math.inf and operand not in seen:
                    seen.add(operand)
                    todo.append(operand)
        return tuple(dict.fromkeys(found[position] for position in sorted(found)))


def _begins(value: Value) -> bool:
    """Whether a value would have no constant if its operands had one."""
    operands = tuple(
        dataclasses.replace(operand, constant=1.0) if operand.constant == math.inf else operand
        for operand in value.operands
    )
    return constant_of(dataclasses.replace(value, operands=operands)) == math.inf


def _times(factor: float, ell: float) -> float:
    """The constant of a layer times that of its input; 0 for an input that does not vary."""
    if not ell:
        return 0.0
    return factor * ell if math.isfinite(factor) and math.isfinite(ell) else math.inf
