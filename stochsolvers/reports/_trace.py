"""The graph of a forward pass, read off its jaxpr: which layers are called, on what, and on which path.

A Flax room calls `mark_input` and `mark_output` around every layer that it knows. The marks are
`checkpoint_name`s, identities that survive every transformation, so that layers within `jit` and
`remat` are found, and that nothing depends on what was traced before. Loops and branches (scan, while,
cond) are not entered.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from stochsolvers._typing import Array

_INPUT, _OUTPUT = "stochsolvers:input:", "stochsolvers:output:"
_ENTERED = (
    "jit",
    "pjit",
    "closed_call",
    "remat2",
    "checkpoint",
    "custom_jvp_call",
    "custom_vjp_call",
)
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
    """

    calls: tuple[Call, ...]
    strays: dict[int, int]
    between: tuple[str, ...]


def trace(function: Callable[..., Any], parameters: Any, inputs: Any) -> Trace:
    """Trace `function(parameters, inputs)` without running it; only shapes of `inputs` matter."""
    jaxpr: Any = jax.make_jaxpr(function)(parameters, inputs).jaxpr
    values = itertools.count()
    arguments = [next(values) for _ in jaxpr.invars]
    steps: list[_Step] = []
    results = _flatten(jaxpr, arguments, values, steps)
    count = len(jax.tree.leaves(parameters))
    calls, between = _follow(steps, set(arguments[count:]), results)
    strays = _unmarked(steps, arguments[:count], results)
    return Trace(calls, strays, between)


@dataclasses.dataclass(frozen=True)
class _Step:
    """One equation: what it reads and writes, by number."""

    name: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    shape: tuple[int, ...]


def _flatten(jaxpr: Any, arguments: list[Any], values: Iterator[int], steps: list[_Step]):
    """Append the equations of a jaxpr and of the calls within it; the numbers of its results."""
    numbers: dict[Any, Any] = dict(zip(jaxpr.invars, arguments, strict=True))

    def read(atoms):
        # literals and constants have no number
        return [None if hasattr(atom, "val") else numbers.get(atom) for atom in atoms]

    for equation in jaxpr.eqns:
        name = equation.primitive.name
        inner = next(filter(None, map(_body, equation.params.values())), None)
        if name in _ENTERED and inner is not None and _has_mark(inner):
            results = _flatten(inner, read(equation.invars), values, steps)
        else:
            results = [next(values) for _ in equation.outvars]
            first = equation.invars[0].aval if equation.invars else None
            steps.append(
                _Step(
                    _operation(equation),
                    tuple(number for number in read(equation.invars) if number is not None),
                    tuple(results),
                    tuple(getattr(first, "shape", ())),
                )
            )
        numbers.update(zip(equation.outvars, results, strict=True))
    return read(jaxpr.outvars)


def _operation(equation: Any) -> str:
    """The name of a jitted function or of a primitive; of a call of one operation, the latter's."""
    for body in filter(None, map(_body, equation.params.values())):
        if equation.primitive.name in _ENTERED[2:] and len(body.eqns) == 1:
            return _operation(body.eqns[0])
    return str(equation.params.get("name", equation.primitive.name))


def _body(parameter: Any) -> Any:
    """The jaxpr of a call, open or closed, or None."""
    body = getattr(parameter, "jaxpr", parameter)
    return body if hasattr(body, "eqns") else None


def _has_mark(jaxpr: Any) -> bool:
    for equation in jaxpr.eqns:
        if str(equation.params.get("name")).startswith((_INPUT, _OUTPUT)):
            return True
        bodies = filter(None, map(_body, equation.params.values()))
        if equation.primitive.name in _ENTERED and any(map(_has_mark, bodies)):
            return True
    return False


def _follow(steps: list[_Step], inputs: set[int], results: list[Any]):
    """Calls in order, each with whether it dominates the output; names of what is between them."""
    through = dict.fromkeys(
        inputs, 0
    )  # value -> bits of the calls on every path from the input to it
    opened: list[tuple[str, tuple[int, ...], int]] = []
    closed: list[tuple[str, tuple[int, ...], int]] = []
    useful, between = _reaching(steps, results), {}
    for position, step in enumerate(steps):
        seen = [through[number] for number in step.reads if number in through]
        if step.name.startswith(_INPUT):
            opened.append((step.name.removeprefix(_INPUT), step.shape, position))
        call = opened.pop() if step.name.startswith(_OUTPUT) else None
        if seen:
            bits = _all(seen)
            if call is not None:
                bits |= 1 << len(closed)
                closed.append(call)
            elif not opened and step.name not in _SHAPE_ONLY and useful.intersection(step.writes):
                between[step.name] = None
            through.update(dict.fromkeys(step.writes, bits))
    dominating = _all([through[number] for number in results if number in through] or [0])
    calls = [Call(*call, bool(dominating >> i & 1)) for i, call in enumerate(closed)]
    return tuple(sorted(calls, key=lambda call: call.position)), tuple(between)


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
