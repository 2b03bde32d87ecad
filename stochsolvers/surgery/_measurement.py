"""How much a solver in a layer's place changes its output and the model's: the arithmetic of the report."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stochsolvers import _layers
from stochsolvers._compilation import jit_once
from stochsolvers._typing import Array
from stochsolvers.problems import LayerProblem, NormalizedProblem
from stochsolvers.reports import _bounds
from stochsolvers.solvers import Solution, Solver
from stochsolvers.surgery._fold import unfolded
from stochsolvers.surgery._plan import Replacement, one_iteration
from stochsolvers.surgery._report import ReplacedLayer

PLAIN, ONE, ALL = range(3)
"""What a replaced layer returns in a measured pass: its plain output, that of one iteration, that of all."""


class Measurement(NamedTuple):
    """One call of a replaced layer, or the part of it that `jax.vmap` makes of one example.

    Attributes:
      lipschitz: as in `ReplacedLayer`.
      step_size: likewise.
      squares: ‖σ(w₁) − σ(y)‖², ‖σ(w_K) − σ(y)‖² and ‖σ(y)‖².
      problem: that was solved.
      value: z_K; `numbers` certifies it, outside of the pass, where layers of one shape share a program.
    """

    lipschitz: Array
    step_size: Array
    squares: Array
    problem: LayerProblem
    value: Array


class Outputs(NamedTuple):
    """What a layer may return: its own output, that of one iteration, that of all."""

    plain: Array
    one: Array
    all: Array

    def chosen(self, which: Array) -> Array:
        """The one that PLAIN, ONE or ALL says."""
        return jnp.where(which == PLAIN, self.plain, jnp.where(which == ONE, self.one, self.all))


class Recorder:
    """Takes measurements while a compiled pass runs, whatever transformations are around a layer.

    Attributes:
      seen: by the layer's path and its index in a stack, in the order of the calls.
    """

    def __init__(self):
        self.seen: dict[str, dict[tuple[int, ...], list[Measurement]]] = {}

    def __call__(self, path: str, values: Measurement, index: Any = ()) -> None:
        """Record a measurement; within a traced function."""
        leaves, structure = jax.tree.flatten(values)
        jax.debug.callback(functools.partial(self._store, path, structure), index, *leaves)

    def _store(self, path: str, structure: Any, index: Any, *leaves: Any) -> None:
        copies = [np.array(leaf) for leaf in leaves]
        calls = self.seen.setdefault(path, {}).setdefault(tuple(map(int, index)), [])
        calls.append(jax.tree.unflatten(structure, copies))


class Changes(NamedTuple):
    """Relative changes of a model's output.

    Attributes:
      alone: with one layer replaced, by its path.
      one: with one iteration in all replaced layers.
      all: with all iterations.
      numbers: of each layer by path, what `numbers` returns, by the index in a stack.
    """

    alone: Mapping[str, float]
    one: float
    all: float
    numbers: Mapping[str, Mapping[tuple[int, ...], Mapping[str, float]]]


NOT_MEASURED = Changes({}, np.nan, np.nan, {})


def measured_changes(
    paths: Sequence[str], outputs: Callable[[Sequence[int]], Any], recorder: Recorder
) -> Changes:
    """Run a model with its layers switched in turn.

    Args:
      paths: of the replaced layers.
      outputs: of the model, given PLAIN, ONE or ALL for each of them.
      recorder: takes the layers' measurements; those in the plain model are kept.
    """

    def run(switches: Sequence[int]) -> Any:
        result = jax.block_until_ready(outputs(switches))
        jax.effects_barrier()
        return result

    plain = run([PLAIN] * len(paths))
    seen, recorder.seen = recorder.seen, {}

    def change(switches: Sequence[int]) -> float:
        found = relative_change(run(switches), plain)
        recorder.seen = {}
        return found

    alone = {path: change([ALL * (path == other) for other in paths]) for path in paths}
    one, many = (change([which] * len(paths)) for which in (ONE, ALL))
    of_each = {
        path: {index: numbers(calls) for index, calls in sorted(stack.items())}
        for path, stack in seen.items()
    }
    return Changes(alone, one, many, of_each)


def outputs_and_measurement(
    settings: _layers.Settings,
    problem: LayerProblem,
    plain: Array,
    *,
    fold: tuple[Array, Array] | None,
    kept: tuple[Array | None, Array | None],
    precision: Any,
) -> tuple[Outputs, Measurement]:
    """The three outputs of a layer and what the report says of it; nothing is sampled.

    Args:
      settings: of the solver layer.
      problem: before it is normalised, with the normalisation folded in.
      plain: y = A x + b, as the plain layer computes it.
      fold: (s, t) of the normalisation behind the layer.
      kept: the constant of the kernel at hand and its fingerprint, or twice None.
      precision: of the layer's matrix products.
    """
    constant = kept[0]
    if constant is None:
        constant = _layers.current_constant(settings, problem.linear_map, *kept)
    with _layers.precision_context(precision):
        solved, constant = settings.prepared(problem, constant)

        def solve(solver: Solver) -> tuple[Solution, Array]:
            solution = solver.solve(
                None, solved, step_constant=constant, deterministic=True, pre_activation=True
            )
            w = jnp.asarray(solution.pre_activation, plain.dtype)
            return solution, w if fold is None else unfolded(w, plain, problem, fold)

        _, one = solve(one_iteration(settings.solver))
        solution, many = solve(settings.solver)
        outputs = Outputs(plain, one, many)
        return outputs, _measurement(settings, solved, constant, outputs, solution, fold)


def _measurement(
    settings: _layers.Settings,
    problem: LayerProblem,
    constant: Array | None,
    outputs: Outputs,
    solution: Solution,
    fold: tuple[Array, Array] | None,
) -> Measurement:
    step = _bounds.first_step(settings.solver, problem, constant, True)
    scale = problem.scale if isinstance(problem, NormalizedProblem) else constant

    def activated(y: Array) -> Array:
        y = y.astype(problem.dtype)
        if fold is not None:
            s, t = (jnp.expand_dims(one.astype(y.dtype), range(y.ndim - 1)) for one in fold)
            y = s * y + t
        return settings.prior.prox(y, 1.0)

    plain, one, many = map(activated, outputs)
    differences = one - plain, many - plain, plain
    return Measurement(
        lipschitz=jnp.asarray(jnp.nan if scale is None else jnp.max(scale)),
        step_size=jnp.max(step),
        squares=jnp.stack([jnp.sum(array**2) for array in differences]),
        problem=problem,
        value=solution.value,
    )


MEASURED = ("lipschitz", "step_size", "change_one", "change", "gap", "relative_gap")


def numbers(calls: Sequence[Measurement]) -> dict[str, float]:
    """The measured columns of the report: changes of all calls together, the largest of the others."""
    squares = np.sum([np.asarray(one.squares, np.float64) for one in calls], axis=0)
    change_one, change = np.sqrt(squares[:2] / (squares[2] if squares[2] > 0 else 1))
    ends = [(one.lipschitz, one.step_size, *_gaps(one)) for one in calls]
    largest = np.max(np.asarray(ends, np.float64), axis=0)
    return dict(
        zip(MEASURED, map(float, (*largest[:2], change_one, change, *largest[2:])), strict=True)
    )


def _gaps(one: Measurement) -> tuple[float, float]:
    """The largest certified gap of an example, and the largest relative one."""

    def as_solved(leaf: Any) -> Any:
        is_real = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        return jnp.asarray(leaf, one.value.dtype) if is_real else leaf

    problem = jax.tree.map(as_solved, one.problem)
    gap, objective = (np.asarray(array, np.float64) for array in _certified(problem, one.value))
    relative = np.where(gap > 0, gap / np.where(objective > 0, objective, 1), 0)
    return float(gap.max()), float(relative.max())


@jit_once
def _certified(problem: LayerProblem, value: Array) -> tuple[Array, Array]:
    value = value.astype(problem.dtype)
    return problem.certificate(value), jnp.abs(problem.objective(value))


def relative_change(outputs: Any, plain: Any) -> float:
    """‖f₁ − f‖/‖f‖ of all floating-point arrays of two outputs together."""
    squares = [0.0, 0.0]
    for one, other in zip(jax.tree.leaves(outputs), jax.tree.leaves(plain), strict=True):
        if jnp.issubdtype(jnp.result_type(one), np.inexact):
            a, b = (np.asarray(array).astype(np.complex128) for array in (one, other))
            squares[0] += float(np.sum(np.abs(a - b) ** 2))
            squares[1] += float(np.sum(np.abs(b) ** 2))
    return float(np.sqrt(squares[0] / squares[1])) if squares[1] else float(np.sqrt(squares[0]))


def rows(
    replaced: Mapping[str, Replacement], kinds: Mapping[str, str], changes: Changes
) -> tuple[ReplacedLayer, ...]:
    """The rows of the report, of a stack of layers one for each of the stack.

    Args:
      replaced: the layers that are, by path.
      kinds: their classes.
      changes: measured, or `NOT_MEASURED`.
    """
    found = []
    for path, one in replaced.items():
        stack = changes.numbers.get(path, {})
        skipped = (
            "it was not run at these inputs, as in the branch not taken" if changes.alone else ""
        )
        for index, measured in (stack or {(): {}}).items():
            values = {name: measured.get(name, np.nan) for name in MEASURED}
            notes = one.note, _of_gap(values["gap"]), "" if stack else skipped
            row = ReplacedLayer(
                name=path + "".join(f"[{i}]" for i in index),
                kind=kinds[path],
                activation=one.activation,
                prior=repr(one.prior),
                num_iters=iterations(one.solver),
                model_change=changes.alone.get(path, np.nan),
                normalization=one.normalization or "",
                dropout=one.dropout or "",
                tau=one.tau,
                note="; ".join(filter(None, notes)),
                **values,
            )
            found.append(row)
    return tuple(found)


def _of_gap(gap: float) -> str:
    if not np.isinf(gap):
        return ""
    return "no curvature and no dual point for its certificate: a ridge gives it one"


def iterations(solver: Any) -> int:
    """K; for nested loops the inner iterations of all outer ones."""
    if hasattr(solver, "num_iters"):
        return int(solver.num_iters)
    return int(solver.num_outer) * int(solver.num_inner)
