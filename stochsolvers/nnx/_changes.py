"""How much the replaced layers change their outputs and the model's, from one compiled pass of a copy.

In the copy every replaced layer computes three outputs, the plain one, that of one iteration and that of all,
and returns the one that a switch in its state says. With all switches at "plain" the layers see what they see
in the plain model.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import errors, nnx

from stochsolvers import _layers, surgery
from stochsolvers._compilation import jit_once
from stochsolvers._typing import Array, join_static, split_static
from stochsolvers.nnx import _survey
from stochsolvers.nnx._solver_layer import SolverLayer, SolverRecord
from stochsolvers.problems import NormalizedProblem
from stochsolvers.reports import _bounds
from stochsolvers.surgery import _plan

_PLAIN, _ONE, _ALL = 0, 1, 2


class _Measurement(NamedTuple):
    """One call of a replaced layer."""

    lipschitz: Array
    step_size: Array
    change_one: Array
    change: Array


class _Record(NamedTuple):
    """What a call leaves: its numbers, and what its certificate is computed of, outside of the pass."""

    numbers: _Measurement
    problem: Any
    value: Array


class Changes(NamedTuple):
    """Of one replaced layer: its measurements, and how much it alone changes the model's output.

    The entries "(one)" and "(all)" are those of the model with every layer replaced. Of a stack of layers the
    numbers are arrays.
    """

    numbers: dict[str, np.ndarray]
    model: float


def measured(
    model: nnx.Module, found: _plan.Plan, arguments: Any, options: dict[str, Any]
) -> dict[str, Changes]:
    """Run a copy of a model in which layers have been replaced; the model itself is unchanged."""
    graph, state = nnx.split(model)
    copy = nnx.merge(graph, state, copy=True)
    switches = {}
    module: Any
    for path, module in list(nnx.iter_modules(copy)):
        name = _survey.name(path)
        if name in found.replaced and isinstance(module, SolverLayer):
            stack = _survey.stack_shape(module)
            module.surgery_switch = _Switch(jnp.zeros(stack, jnp.int32))
            switches[name] = module.surgery_switch
            object.__setattr__(module, "__class__", _switching(type(module)))
    traced, static = split_static((arguments, options))

    @jit_once
    def run(state: Any, traced: Any) -> Any:
        copy = nnx.merge(graph, state, copy=True)
        copy.eval()
        inputs, options = join_static(traced, static)
        outputs, records = nnx.capture(copy, SolverRecord)(*inputs, **options)
        return outputs, nnx.to_pure_dict(records)

    graph, _ = nnx.split(copy)

    def outputs(**values: int) -> Any:
        for name, switch in switches.items():
            switch[...] = jnp.full_like(switch[...], values.get(name, values.get("", _PLAIN)))
        return run(nnx.state(copy), traced)

    try:
        plain, records = outputs()
        numbers = {name: _numbers(records, name) for name in switches}
    except (errors.TraceContextError, TypeError, ValueError, KeyError) as error:
        known = isinstance(error, errors.TraceContextError | KeyError)
        if not known and "__captures__" not in str(error):
            raise
        return {}
    changes = {
        "(one)": Changes({}, _relative(outputs(**{"": _ONE})[0], plain)),
        "(all)": Changes({}, _relative(outputs(**{"": _ALL})[0], plain)),
    }
    for name in switches:
        alone = _relative(outputs(**{name: _ALL})[0], plain)
        changes[name] = Changes(numbers[name], alone)
    return changes


class _Switch(nnx.Variable):
    """Which output a layer of the measured copy returns."""


@functools.cache
def _switching(cls: Any) -> Any:
    def call(self: Any, inputs: Array, **options: Any) -> Array:
        plain, fold = self._plain_call(inputs), self._fold()
        settings, problem = _layers.Settings.of(self), self._plain_problem(inputs, None)
        kept = self._kept()[0]  # of this very kernel
        with _layers.precision_context(self.precision):
            solved, constant = settings.prepared(
                problem, settings.constant(problem.linear_map) if kept is None else kept
            )
            one, many = (
                solver.solve(
                    None, solved, step_constant=constant, deterministic=True, pre_activation=True
                )
                for solver in (_plan.one_iteration(settings.solver), settings.solver)
            )
        results = [plain, *(jnp.asarray(each.pre_activation, plain.dtype) for each in (one, many))]
        if fold is not None:
            results[1:] = [surgery.unfolded(w, plain, problem, fold) for w in results[1:]]  # pyright: ignore
        step = _bounds.first_step(settings.solver, solved, constant, True)
        numbers = _measure(fold, solved, constant, step, [r.astype(solved.dtype) for r in results])
        self.sow(SolverRecord, "surgery", _Record(numbers, solved, many.value))
        which = self.surgery_switch[...]
        return jnp.where(which == _PLAIN, plain, jnp.where(which == _ONE, *results[1:]))

    return type(cls.__name__, (cls,), {"__call__": call})


def _measure(
    fold: Any, problem: Any, constant: Array | None, step: Array, results: Sequence[Array]
) -> _Measurement:
    """The numbers of a call."""
    scale = problem.scale if isinstance(problem, NormalizedProblem) else constant

    def activated(y: Array) -> Array:
        if fold is not None:
            s, t = (jnp.expand_dims(one.astype(y.dtype), range(y.ndim - 1)) for one in fold)
            y = s * y + t
        return problem.prior.prox(y, 1.0)

    plain, one, many = map(activated, results)
    return _Measurement(
        lipschitz=jnp.asarray(jnp.inf if scale is None else jnp.max(scale)),
        step_size=jnp.max(step),
        change_one=_change(one, plain),
        change=_change(many, plain),
    )


def _change(one: Array, other: Array) -> Array:
    norm = jnp.sqrt(jnp.sum(other * other))
    difference = one - other
    return jnp.sqrt(jnp.sum(difference * difference)) / jnp.where(norm > 0, norm, 1)


def _relative(outputs: Any, plain: Any) -> float:
    """The relative change of all floating-point arrays together."""
    squares = [0.0, 0.0]
    for one, other in zip(jax.tree.leaves(outputs), jax.tree.leaves(plain), strict=True):
        if jnp.issubdtype(jnp.result_type(one), np.inexact):
            a, b = (np.asarray(array).astype(np.complex128) for array in (one, other))
            squares[0] += float(np.sum(np.abs(a - b) ** 2))
            squares[1] += float(np.sum(np.abs(b) ** 2))
    return float(np.sqrt(squares[0] / squares[1])) if squares[1] else float(np.sqrt(squares[0]))


def _numbers(records: Any, path: str) -> dict[str, np.ndarray]:
    """The measurements of a layer, its certified gap and that relative to its objective."""
    for part in path.split(".") if path != "(model)" else ():
        records = records[part] if part in records else records[int(part)]
    (record,) = records["surgery"]
    numbers = {name: np.asarray(array) for name, array in record.numbers._asdict().items()}
    stack = numbers["change"].shape
    gaps, relative = np.zeros(stack), np.zeros(stack)
    for index in np.ndindex(stack):
        problem, value = jax.tree.map(lambda leaf, i=index: leaf[i], (record.problem, record.value))
        gap, objective = (np.asarray(one, np.float64) for one in _certified(problem, value))
        gaps[index] = gap.max()
        relative[index] = np.where(gap > 0, gap / np.where(objective > 0, objective, 1), 0).max()
    return {**numbers, "gap": gaps, "relative_gap": relative}


@jit_once
def _certified(problem: Any, value: Array) -> tuple[Array, Array]:
    value = value.astype(problem.dtype)
    return problem.certificate(value), jnp.abs(problem.objective(value))


def rows(
    found: _plan.Plan, candidates: Mapping[str, Any], changes: Mapping[str, Changes]
) -> tuple[surgery.ReplacedLayer, ...]:
    """The rows of the report."""
    result = []
    for path, one in found.replaced.items():
        own = changes.get(path, Changes({}, np.nan))
        for index in np.ndindex(own.numbers.get("change", np.zeros(())).shape):
            values = {field: float(own.numbers.get(field, _UNKNOWN)[index]) for field in _FIELDS}
            row = surgery.ReplacedLayer(
                name=path + "".join(f"[{i}]" for i in index),
                kind=candidates[path].kind,
                activation=one.activation,
                prior=repr(one.prior),
                num_iters=_iterations(one.solver),
                model_change=own.model,
                normalization=one.normalization or "",
                dropout=one.dropout or "",
                tau=one.tau,
                note=one.note,
                **values,
            )
            if np.isinf(row.gap):
                why = "no curvature and no dual point for its certificate: a ridge gives it one"
                row = dataclasses.replace(row, note="; ".join(filter(None, (row.note, why))))
            result.append(row)
    return tuple(result)


_FIELDS = (*_Measurement._fields, "gap", "relative_gap")
_UNKNOWN = np.full((), np.nan)


def _iterations(solver: Any) -> int:
    if hasattr(solver, "num_iters"):
        return int(solver.num_iters)
    return int(solver.num_outer) * int(solver.num_inner)


def totals(changes: Mapping[str, Changes]) -> tuple[float, float]:
    """How much one iteration and all change the model's output."""
    one, many = (changes.get(name, Changes({}, np.nan)).model for name in ("(one)", "(all)"))
    return one, many
