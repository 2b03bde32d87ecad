"""How much a solver in a layer's place changes its output and the model's: the arithmetic of the report."""

from collections.abc import Mapping, Sequence
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


class Measurement(NamedTuple):
    """One call of a replaced layer; fields as in `ReplacedLayer`.

    Attributes:
      problem: that was solved.
      value: z_K; `gaps` certifies it, outside of the pass, where layers of one shape share a program.
    """

    lipschitz: Array
    step_size: Array
    change_one: Array
    change: Array
    problem: LayerProblem
    value: Array


class Outputs(NamedTuple):
    """What a layer may return: its own output, that of one iteration, that of all."""

    plain: Array
    one: Array
    all: Array


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
    return Measurement(
        lipschitz=jnp.asarray(jnp.nan if scale is None else jnp.max(scale)),
        step_size=jnp.max(step),
        change_one=_change(one, plain),
        change=_change(many, plain),
        problem=problem,
        value=solution.value,
    )


def numbers(measurement: Measurement) -> dict[str, float]:
    """The columns of the report that are measured."""
    value = measurement.value

    def as_solved(leaf: Any) -> Any:
        is_real = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        return jnp.asarray(leaf, value.dtype) if is_real else leaf

    problem = jax.tree.map(as_solved, measurement.problem)
    gap, objective = (np.asarray(one, np.float64) for one in _certified(problem, value))
    relative = np.where(gap > 0, gap / np.where(objective > 0, objective, 1), 0)
    found = {name: float(getattr(measurement, name)) for name in MEASURED[:4]}
    return {**found, "gap": float(gap.max()), "relative_gap": float(relative.max())}


MEASURED = ("lipschitz", "step_size", "change_one", "change", "gap", "relative_gap")


@jit_once
def _certified(problem: LayerProblem, value: Array) -> tuple[Array, Array]:
    value = value.astype(problem.dtype)
    return problem.certificate(value), jnp.abs(problem.objective(value))


def _change(one: Array, other: Array) -> Array:
    norm = jnp.sqrt(jnp.sum(other * other))
    difference = one - other
    return jnp.sqrt(jnp.sum(difference * difference)) / jnp.where(norm > 0, norm, 1)


def relative_change(outputs: Any, plain: Any) -> float:
    """‖f₁ − f‖/‖f‖ of all floating-point arrays of two outputs together."""
    squares = [0.0, 0.0]
    for one, other in zip(jax.tree.leaves(outputs), jax.tree.leaves(plain), strict=True):
        if jnp.issubdtype(jnp.result_type(one), np.inexact):
            a, b = (np.asarray(array).astype(np.complex128) for array in (one, other))
            squares[0] += float(np.sum(np.abs(a - b) ** 2))
            squares[1] += float(np.sum(np.abs(b) ** 2))
    return float(np.sqrt(squares[0] / squares[1])) if squares[1] else float(np.sqrt(squares[0]))


def row(
    path: str,
    index: tuple[int, ...],
    kind: str,
    one: Replacement,
    measured: Mapping[str, float],
    model: float,
) -> ReplacedLayer:
    """The row of a layer, or of one of a stack of layers.

    Args:
      path: of the layer.
      index: in the stack, () of a layer by itself.
      kind: its class.
      one: what replaces it.
      measured: what `numbers` returns; empty if nothing was measured.
      model: how much it alone changes the model's output.
    """
    values = {name: measured.get(name, np.nan) for name in MEASURED}
    return ReplacedLayer(
        name=path + "".join(f"[{i}]" for i in index),
        kind=kind,
        activation=one.activation,
        prior=repr(one.prior),
        num_iters=iterations(one.solver),
        model_change=model,
        normalization=one.normalization or "",
        dropout=one.dropout or "",
        tau=one.tau,
        note="; ".join(filter(None, (one.note, _of_gap(values["gap"])))),
        **values,
    )


def rows_of(
    path: str, kind: str, one: Replacement, measured: Sequence[Mapping[str, float]], model: float
) -> list[ReplacedLayer]:
    """The rows of a layer: one for each measurement, of a stack of layers one for each of the stack."""
    indices = [(i,) for i in range(len(measured))] if len(measured) > 1 else [()]
    return [
        row(path, index, kind, one, values, model)
        for index, values in zip(indices, measured or [{}], strict=True)
    ]


def _of_gap(gap: float) -> str:
    if not np.isinf(gap):
        return ""
    return "no curvature and no dual point for its certificate: a ridge gives it one"


def iterations(solver: Any) -> int:
    """K; for nested loops the inner iterations of all outer ones."""
    if hasattr(solver, "num_iters"):
        return int(solver.num_iters)
    return int(solver.num_outer) * int(solver.num_inner)
