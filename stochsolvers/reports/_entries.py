"""Entries of the values in a program that do not depend on the network's input."""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stochsolvers._programs import Program, Step
from stochsolvers._typing import at_least_float32
from stochsolvers.reports._program import Size, is_float

_SLACK = 1 + 1e-4  # for the round-off of the values at 0
_FEW = 3  # operations that are run one by one; more are compiled together
_ENTRIES = 2**24  # of the largest array that is computed


class Entries:
    """Computes them where they are asked for, and remembers them."""

    def __init__(self, program: Program, unknown: Collection[int]):
        """`unknown`: numbers of the values that depend on the input."""
        self.program = program
        self.unknown = frozenset(unknown)
        self.origin = {number: step for step in program.steps for number in step.writes}
        self.found: dict[int, np.ndarray | None] = {}

    def __call__(self, number: int) -> np.ndarray | None:
        """The entries of one value; None where they are not known, or of another kind than numbers."""
        if number not in self.found:
            self.found[number] = self._computed(number)
        return self.found[number]

    def _computed(self, number: int) -> np.ndarray | None:
        known = self.program.known
        if number in known:
            return _as_numbers(known[number])
        if number in self.unknown or number not in self.origin:
            return None
        steps = self._needed(number)
        if steps is None:
            return None
        inputs = {n: known[n] for step in steps for n in step.reads if n in known}

        def run(inputs: dict[int, Any]) -> Any:
            return evaluate(steps, dict(inputs))[number]

        with jax.debug_nans(False):
            return _as_numbers((run if len(steps) <= _FEW else jax.jit(run))(inputs))

    def _needed(self, number: int) -> list[Step] | None:
        """The operations that compute a value, in order."""
        needed, todo = {}, [number]
        while todo:
            at = todo.pop()
            if at in self.program.known:
                continue
            if at in self.unknown or at not in self.origin:
                return None
            step = self.origin[at]
            if any(self.program.avals[n].size > _ENTRIES for n in step.writes):
                return None
            if step.writes not in needed:
                needed[step.writes] = step
                todo += step.reads
        order = {step.writes: place for place, step in enumerate(self.program.steps)}
        return sorted(needed.values(), key=lambda step: order[step.writes])


def evaluate(steps: Collection[Step], values: dict[int, Any]) -> dict[int, Any]:
    """Run some operations; adds their results to the values, by number."""
    for step in steps:
        results = apply(step.equation, [values[number] for number in step.reads])
        values.update(zip(step.writes, results, strict=True))
    return values


def apply(equation: Any, operands: Collection[Any], **changed: Any) -> list[Any]:
    """The results of one equation of a jaxpr, with some of its parameters changed."""
    options = equation.primitive.get_bind_params(equation.params) | changed
    results = equation.primitive.bind(*operands, **options)
    return list(results) if equation.primitive.multiple_results else [results]


def _as_numbers(array: Any) -> np.ndarray | None:
    """In float64 where they are real floating-point numbers; None for keys and complex numbers."""
    dtype = jnp.result_type(array)
    if jnp.issubdtype(dtype, np.floating):
        return np.asarray(array).astype(np.float64)
    real = jnp.issubdtype(dtype, np.integer) or jnp.issubdtype(dtype, np.bool_)
    return np.asarray(array) if real else None


def sizes_at_zero(trace: Any) -> dict[int, Size]:
    """Norms and largest entries of the real values that depend on the input, at the input 0."""
    program = trace.program
    avals = {n: program.avals[n] for n in trace.dependent if is_float(program.avals[n])}
    zeros = {n: jnp.zeros(program.avals[n].shape, program.avals[n].dtype) for n in trace.inputs}

    @jax.jit
    def run(known: dict[int, Any]) -> dict[int, Any]:
        values = evaluate(program.steps, {**known, **zeros})
        wide = {n: values[n].astype(at_least_float32(avals[n].dtype)).ravel() for n in avals}
        return {n: (jnp.linalg.norm(x), jnp.max(jnp.abs(x), initial=0.0)) for n, x in wide.items()}

    with jax.debug_nans(False):
        sizes = jax.device_get(run(program.known))
    return {n: Size(*(_SLACK * float(end) for end in ends)) for n, ends in sizes.items()}
