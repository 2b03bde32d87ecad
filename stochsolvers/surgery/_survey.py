r"""What stands around the marked layers of a network, from one trace of its forward pass.

For each call of a marked layer y = A x + b, in `survey`:

- the normalisation directly behind it, if y is read by that alone;
- the activation: the first array σ(y) through which alone the rest of the network sees y, where σ is
  elementwise and the prox of a convex function. It is what a jitted function returns where there is such a
  one (`jax.nn.relu6`), else a single operation (`max`). Between the layer and σ may stand casts, reshapes,
  permutations and maximum pooling, which commute with every non-decreasing function;
- the Dropouts that directly precede it.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax

from stochsolvers import _checks
from stochsolvers._programs import Program, Step, flatten
from stochsolvers.prox import Prior
from stochsolvers.surgery._activations import activation
from stochsolvers.surgery._functions import (
    function_of,
    is_elementwise,
    is_identity,
    is_real,
    known_numbers,
)

_POOLS = ("reduce_window_max", "reduce_max")


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """One call of a marked layer.

    Attributes:
      label: the layer's.
      input_shape: as the layer sees it, without the axes of an enclosing `jax.vmap`.
      activation: the name of what follows in JAX, "custom" for a function that is not known, "" for nothing.
      prior: g with prox_g the activation, or None.
      reason: why there is no prior.
      normalization: the label of the normalisation directly behind the layer, or None.
      loops: the loops and branches that the call is in: ("scan",).
    """

    label: str
    input_shape: tuple[int, ...]
    activation: str
    prior: Prior | None
    reason: str
    normalization: str | None
    loops: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class DropoutCall:
    """One call of a marked Dropout.

    Attributes:
      label: its own.
      readers: the layers that its output goes into, as it is or reshaped.
      others: whether anything else reads it.
    """

    label: str
    readers: tuple[str, ...]
    others: bool


@dataclasses.dataclass(frozen=True)
class Survey:
    """The marked modules of a forward pass, by call.

    Attributes:
      layers: in order.
      dropouts: in order.
      normalizations: the labels of the normalisations, in order.
    """

    layers: tuple[LayerCall, ...]
    dropouts: tuple[DropoutCall, ...]
    normalizations: tuple[str, ...]


def survey(function: Callable[..., Any], *arguments: Any) -> Survey:
    """Trace `function(*arguments)` without running it; only shapes of arguments matter."""
    _checks.function("function of survey", function)
    graph = _Graph(flatten(jax.make_jaxpr(function)(*arguments), unroll=False))
    layers, dropouts, norms = [], [], []
    for position, step in enumerate(graph.steps):
        mark = step.mark
        if mark is None or not mark.opens:
            continue
        if mark.kind == "layer":
            layers.append(_layer_call(graph, position))
        elif mark.kind == "dropout":
            dropouts.append(_dropout_call(graph, position))
        else:
            norms.append(mark.label)
    return Survey(tuple(layers), tuple(dropouts), tuple(norms))


class _Graph:
    """Which operation writes an array, and which read it."""

    def __init__(self, program: Program):
        results = Step("results", None, tuple(program.results))
        self.steps = [*program.steps, results]
        self.results_of = program.results_of
        self.numbers = known_numbers(program)
        self.writer: dict[int, Step] = {}
        self.readers: dict[int, list[int]] = {}
        for position, step in enumerate(self.steps):
            self.writer.update(dict.fromkeys(step.writes, step))
            for number in dict.fromkeys(step.reads):
                self.readers.setdefault(number, []).append(position)
        self._drop_unused()

    def _drop_unused(self) -> None:
        """Forget readers whose results nobody reads."""
        for position in range(len(self.steps) - 1, -1, -1):
            step = self.steps[position]
            if step.operation == "results" or any(self.readers.get(one) for one in step.writes):
                continue
            for number in step.reads:
                self.readers[number] = [p for p in self.readers[number] if p != position]

    def end(self, position: int) -> int:
        """Where the call that opens at a position ends."""
        depth = 0
        for later in range(position, len(self.steps)):
            mark = self.steps[later].mark
            if mark is not None:
                depth += 1 if mark.opens else -1
                if depth == 0:
                    return later
        raise AssertionError("a module without its output's mark")

    def only_reader(self, number: int) -> int | None:
        """The position of the one operation that reads an array, past casts."""
        while True:
            readers = self.readers.get(number, [])
            if len(readers) != 1:
                return None
            step = self.steps[readers[0]]
            if step.operation != "convert_element_type" or not is_identity(step):
                return readers[0]
            (number,) = step.writes


def _layer_call(graph: _Graph, position: int) -> LayerCall:
    mark = graph.steps[position].mark
    assert mark is not None
    last = graph.end(position)
    (output,) = graph.steps[last].writes
    loops = tuple(name for name, _ in graph.steps[position].loops)
    normalization = None
    reader = graph.only_reader(output)
    after = graph.steps[reader].mark if reader is not None else None
    if after is not None and after.opens and after.kind == "norm":
        normalization = after.label
        last = graph.end(reader)  # pyright: ignore[reportArgumentType]
        (output,) = graph.steps[last].writes
    name, prior, reason = _activation_of(graph, output)
    return LayerCall(mark.label, mark.shape, name, prior, reason, normalization, loops)


def _activation_of(graph: _Graph, output: int) -> tuple[str, Prior | None, str]:
    """The activation of an array, with its prior or the reason why there is none."""
    argument, candidates, blocked = _candidates(graph, output)
    chosen, refused, best, settled = None, None, None, False
    for number, is_whole in candidates:
        function = function_of(graph.writer, graph.numbers, argument, number)
        if function is None or function.is_affine:
            continue
        found = activation(function)
        if found.prior is not None:
            if best is None or is_whole:
                best = found
            if is_whole:
                chosen = found
                break
        elif refused is None or (is_whole and not settled):
            refused, settled = found, is_whole
    chosen = chosen or best
    if chosen is not None:
        return chosen
    if refused is not None:
        return refused.name, None, refused.reason
    return "", None, blocked


def _candidates(graph: _Graph, output: int) -> tuple[int, list[tuple[int, bool]], str]:
    """The arrays through which alone the network sees a layer's output, and that are elementwise in it.

    Returns:
      the argument of the elementwise functions; the arrays, each with whether it is inside no jitted function
      that begins behind the layer; what ends the search.
    """
    start = graph.writer[output]
    argument, found = output, []
    waiting = {output: list(graph.readers.get(output, []))}
    affected = {output}
    while True:
        position = min((p for readers in waiting.values() for p in readers), default=None)
        if position is None:
            return argument, found, "nothing reads its output"
        step = graph.steps[position]
        reason = _obstacle(graph, step, affected)
        pools = step.operation in _POOLS and not found and waiting == {argument: [position]}
        if reason and not pools:
            return argument, found, reason
        for readers in waiting.values():
            if position in readers:
                readers.remove(position)
        for number in step.writes:
            affected.add(number)
            waiting[number] = list(graph.readers.get(number, []))
        open_arrays = [number for number, readers in waiting.items() if readers]
        if len(open_arrays) == 1:
            (number,) = open_arrays
            if pools or (is_identity(step) and argument in (set(step.reads) | {number})):
                if not found and function_of(graph.writer, graph.numbers, argument, number) is None:
                    argument, affected, waiting = number, {number}, {number: waiting[number]}
                continue
            if not is_real(graph.writer[number].equation.outvars[0].aval):
                continue  # x > 0
            inside = set(graph.writer[number].calls) - set(start.calls)
            found.append((number, inside <= graph.results_of.get(number, set())))


def _obstacle(graph: _Graph, step: Step, affected: set[int]) -> str:
    """Why an operation ends the elementwise part behind a layer, or ""."""
    if step.operation == "results":
        where = f"a {step.loops[-1][0]}" if step.loops else "the network"
        return f"its output leaves {where} without an activation"
    if step.mark is not None:
        words = {"layer": "layer", "dropout": "Dropout", "norm": "normalisation"}
        what = f"the {words[step.mark.kind]} {step.mark.label!r} follows"
        if step.mark.kind == "norm":
            return f"{what}, which can be folded in only where it alone reads the layer's output, as it is"
        return f"{what}, and no activation"
    if is_identity(step):
        return ""
    if not is_elementwise(step):
        return f"the operation {step.operation} follows, and no elementwise activation"
    if any(one not in affected and one not in graph.numbers for one in step.reads):
        if step.operation == "add":
            return (
                "another array is added to its output before the activation, as the shortcut of a residual "
                "block is: the layer would have to know that array. Build the block as a SolverResNetBlock, "
                "whose second solver takes the shortcut into its bias; the block's other layers can be "
                "replaced"
            )
        return f"the operation {step.operation} with another array follows, and no elementwise activation"
    return ""


def _dropout_call(graph: _Graph, position: int) -> DropoutCall:
    mark = graph.steps[position].mark
    assert mark is not None
    (output,) = graph.steps[graph.end(position)].writes
    readers, others = set(), False
    for step in _readers_past_identities(graph, output):
        if step.mark is not None and step.mark.opens and step.mark.kind == "layer":
            readers.add(step.mark.label)
        else:
            others = True
    return DropoutCall(mark.label, tuple(sorted(readers)), others)


def _readers_past_identities(graph: _Graph, number: int) -> Iterator[Step]:
    for position in graph.readers.get(number, []):
        step = graph.steps[position]
        if is_identity(step):
            yield from _readers_past_identities(graph, step.writes[0])
        else:
            yield step
