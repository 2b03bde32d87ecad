r"""The graph of a forward pass, from its jaxpr: which layers are called, on which shapes, on which paths.

The Flax front ends mark the input and output of every layer whose norm they can compute, by `_programs`.
Branches and loops of unknown length (cond, while) are not entered.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from stochsolvers._programs import Origin, Program, Step, flatten


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a marked layer.

    Attributes:
      label: the layer's.
      input_shape: as the layer sees it, batch axes included, without those of an enclosing `jax.vmap`.
      position: in the order of the trace.
      on_every_path: whether the network's output sees its input only through this layer.
      is_used: whether the network's output depends on this layer's.
      parameters: those, by their number, that the layer reads as they are.
      reads_others: whether it reads other arrays that are computed outside of it, beside its input.
      slices: those, by their number, of which it reads a slice, as in a scan over a stack of layers, with
        the indices.
      constants: entries of the arrays that it reads and that are no parameters.
      iteration: of the loops around it.
      follows: the call, by its index, whose output is its input; None if it is another operation's.
    """

    label: str
    input_shape: tuple[int, ...]
    position: int
    on_every_path: bool
    is_used: bool
    parameters: frozenset[int]
    reads_others: bool
    slices: Mapping[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    constants: tuple[Any, ...] = ()
    iteration: tuple[int, ...] = ()
    follows: int | None = None

    @property
    def name(self) -> str:
        """The label, with the iterations that it is called in."""
        return self.label + "".join(f"[{i}]" for i in self.iteration)

    def slice_of(self, weights: Iterable[Iterable[int]]) -> tuple[int, ...] | None:
        """The indices of the slices of some arrays that it reads, () for arrays as they are.

        Each is given by the numbers of the parameters that it is. None if it reads not all of them so.
        """
        paths = set()
        for numbers in weights:
            read = {() if n in self.parameters else self.slices.get(n) for n in numbers} - {None}
            if len(read) != 1:
                return None
            paths |= read
        return paths.pop() if len(paths) == 1 else None if paths else ()

    def reads(self, array: Any) -> bool:
        """Whether these entries are among the arrays that it reads and that are no parameters."""
        array = np.asarray(array)
        return any(
            np.shape(one) == array.shape and np.array_equal(np.asarray(one), array)
            for one in self.constants
        )


@dataclasses.dataclass(frozen=True)
class Span:
    """The steps of one call of a marked layer, from its input's mark to its output's, by position."""

    label: str
    input_shape: tuple[int, ...]
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Trace:
    """A forward pass.

    Attributes:
      calls: of marked layers, in order.
      spans: of each call.
      strays: parameters, by their number, that are read outside the marked layers and that the output
        depends on, with the position of their first use.
      program: all operations.
      inputs: numbers of the network's inputs.
      dependent: of the values that depend on the input.
      useful: of the values on which the results depend.
    """

    calls: tuple[Call, ...]
    spans: tuple[Span, ...]
    strays: dict[int, int]
    program: Program
    inputs: tuple[int, ...]
    dependent: frozenset[int]
    useful: frozenset[int]


def trace(function: Callable[..., Any], parameters: Any, inputs: Any) -> Trace:
    """Trace `function(parameters, inputs)` without running it; only shapes of `inputs` matter."""
    closed: Any = jax.make_jaxpr(function)(parameters, inputs)
    arrays = jax.tree.leaves(parameters)
    program = flatten(closed, arrays)
    steps, results = program.steps, program.results
    weights, inputs = program.arguments[: len(arrays)], program.arguments[len(arrays) :]

    dependent, useful = _dependent(steps, inputs), _useful(steps, results)
    spans = [span for span in _spans(steps) if dependent.intersection(steps[span.stop].reads)]
    everywhere = _on_every_path(steps, spans, inputs, results)
    spans.sort(key=lambda span: span.start)
    outputs = {steps[span.stop].writes[0]: index for index, span in enumerate(spans)}
    calls = []
    for span in spans:
        alone = _reads_its_input_alone(steps, span, dependent)
        on_every_path = span in everywhere and alone
        follows = outputs.get(steps[span.start].reads[0])
        is_used = not useful.isdisjoint(steps[span.stop].writes)
        calls.append(_call(program, span, on_every_path, is_used, follows))
    strays = _strays(program, marked(steps), weights)
    return Trace(
        tuple(calls), tuple(spans), strays, program, tuple(inputs), frozenset(dependent),
        frozenset(useful),
    )  # fmt: skip


def _call(
    program: Program, span: Span, on_every_path: bool, is_used: bool, follows: int | None
) -> Call:
    """One call of a marked layer, and where what it reads comes from."""
    parameters, slices, constants, others = set(), {}, [], False
    for number in _outside_reads(program.steps, span):
        origin: Origin | None = program.origins.get(number)
        if origin is not None and origin.path:
            others |= slices.setdefault(origin.argument, origin.path) != origin.path
        elif origin is not None:
            parameters.add(number)
        elif number in program.known:
            constants.append(program.known[number])
        else:
            others = True
    return Call(
        span.label,
        span.input_shape,
        position=span.start,
        on_every_path=on_every_path,
        is_used=is_used,
        parameters=frozenset(parameters),
        reads_others=others,
        slices={} if others else slices,
        constants=tuple(array for array in constants if np.ndim(array)),
        iteration=program.steps[span.start].iteration,
        follows=follows,
    )


def _spans(steps: Sequence[Step]) -> list[Span]:
    """The calls of marked layers, in the order in which they end."""
    spans, opened = [], []
    for position, step in enumerate(steps):
        if step.opens:
            opened.append(position)
        if step.closes:
            start = opened.pop()
            mark: Any = steps[start].mark
            spans.append(Span(mark.label, mark.shape, start, position))
    return spans


def marked(steps: Sequence[Step]) -> list[bool]:
    """Of each step, whether it is within a call of a marked layer, the marks included."""
    depths = itertools.accumulate(step.opens - step.closes for step in steps)
    return [depth > 0 or step.closes for depth, step in zip(depths, steps, strict=True)]


def _dependent(steps: Iterable[Step], inputs: Iterable[int]) -> set[int]:
    """The values that depend on the input."""
    dependent = set(inputs)
    for step in steps:
        if dependent.intersection(step.reads):
            dependent.update(step.writes)
    return dependent


def _useful(steps: Sequence[Step], results: Iterable[int]) -> set[int]:
    """The values on which the results depend."""
    useful = set(results)
    for step in reversed(steps):
        if useful.intersection(step.writes):
            useful.update(step.reads)
    return useful


def _on_every_path(
    steps: Sequence[Step], spans: Iterable[Span], inputs: Iterable[int], results: Sequence[int]
) -> frozenset[Span]:
    """The calls on every path from the input to the results."""
    ends = {span.stop: span for span in spans}
    passed: dict[int, frozenset[Span]] = dict.fromkeys(inputs, frozenset())

    def common(numbers: Iterable[int]) -> frozenset[Span]:
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


def _reads_its_input_alone(steps: Sequence[Step], span: Span, dependent: set[int]) -> bool:
    """Whether a call sees the network's input only through its own."""
    inside = set(steps[span.start].writes)
    for step in steps[span.start + 1 : span.stop + 1]:
        if not inside.issuperset(dependent.intersection(step.reads)):
            return False
        inside.update(step.writes)
    return True


def _outside_reads(steps: Sequence[Step], span: Span) -> set[int]:
    """What a call reads from outside, beside its input."""
    read = {number for step in steps[span.start + 1 : span.stop + 1] for number in step.reads}
    return read.difference(*(step.writes for step in steps[span.start : span.stop]))


def _strays(
    program: Program, is_marked: Sequence[bool], parameters: Iterable[int]
) -> dict[int, int]:
    """Parameters, by index, that are read outside the marked layers on the way to the results."""
    steps, results = program.steps, program.results
    useful = _useful(steps, results)
    first: dict[int, int] = {}

    def note(number: int, position: int) -> None:
        number = program.origins[number].argument if number in program.origins else number
        first[number] = min(position, first.get(number, position))

    for position, (step, within) in enumerate(zip(steps, is_marked, strict=True)):
        if not within and useful.intersection(step.writes):
            for number in step.reads:
                note(number, position)
    for number in results:
        note(number, len(steps))
    return {index: first[number] for index, number in enumerate(parameters) if number in first}
