"""How much the replaced layers change their outputs and the model's, from one compiled pass of a copy.

In the copy every replaced layer computes three outputs, the plain one, that of one iteration and that of all,
and returns the one that a switch in its state says. With all switches at "plain" the layers see what they see
in the plain model.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import errors, nnx

from stochsolvers import _layers, surgery
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
    gap: Array
    relative_gap: Array


class Changes(NamedTuple):
    """Of one replaced layer: its measurements, and how much it alone changes the model's output.

    The entries "(one)" and "(all)" are those of the model with every layer replaced.
    """

    measured: Any
    model: float


def measured(
    model: nnx.Module, found: _plan.Plan, arguments: Any, options: dict[str, Any]
) -> dict[str, Changes]:
    """Run a copy of a model in which layers have been replaced; the model itself is unchanged."""
    graph, state = nnx.split(model)
    copy = nnx.merge(graph, state, copy=True)
    switches = {}
    for path, module in list(nnx.iter_modules(copy)):
        name = _survey.name(path)
        if name in found.replaced and isinstance(module, SolverLayer):
            stack = _survey.stack_shape(module)
            module.surgery_switch = SolverRecordSwitch(jnp.zeros(stack, jnp.int32))
            switches[name] = module.surgery_switch
            object.__setattr__(module, "__class__", _switching(type(module)))
    traced, static = split_static((arguments, options))

    @jax.jit
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
    except (errors.TraceContextError, TypeError, ValueError) as error:
        if "__captures__" not in str(error) and not isinstance(error, errors.TraceContextError):
            raise
        return {}
    changes = {
        "(one)": Changes(None, _relative(outputs(**{"": _ONE})[0], plain)),
        "(all)": Changes(None, _relative(outputs(**{"": _ALL})[0], plain)),
    }
    for name in switches:
        changes[name] = Changes(
            _record(records, name), _relative(outputs(**{name: _ALL})[0], plain)
        )
    return changes


class SolverRecordSwitch(nnx.Variable):
    """Which output a layer of the measured copy returns."""


@functools.cache
def _switching(cls: Any) -> Any:
    def call(self: Any, inputs: Array, **options: Any) -> Array:
        plain = self._plain_call(inputs)
        settings = _layers.Settings.of(self)
        fold = self._fold()
        reached, results = {}, {_PLAIN: plain}
        for switch, solver in (
            (_ONE, _plan.one_iteration(settings.solver)),
            (_ALL, settings.solver),
        ):
            solved = _solve(self, inputs, solver, certify=switch == _ALL)
            reached[switch] = solved
            w = jnp.asarray(solved.pre_activation, plain.dtype)
            if fold is not None:
                w = surgery.unfolded(w, plain, self._plain_problem(inputs, None), fold)
            results[switch] = w
        self.sow(SolverRecord, "surgery", _measure(self, inputs, results, reached[_ALL]))
        which = self.surgery_switch[...]
        return jnp.where(
            which == _PLAIN, plain, jnp.where(which == _ONE, results[_ONE], results[_ALL])
        )

    return type(cls.__name__, (cls,), {"__call__": call})


def _solve(layer: Any, inputs: Array, solver: Any, *, certify: bool) -> Any:
    given = layer.solver
    layer_solver = solver if solver is not given else given
    settings = _layers.Settings.of(layer)
    settings = _layers.Settings(
        layer_solver,
        settings.prior,
        settings.ridge,
        settings.loss,
        settings.normalize,
        settings.output,
    )
    return _layers.run(
        settings,
        None,
        layer._plain_problem(inputs, None),
        kept=layer._kept()[0],
        reference=layer._kept()[1],
        deterministic=True,
        precision=layer.precision,
        dtype=layer._plain_call(inputs).dtype,
        certify=certify,
    )


def _measure(layer: Any, inputs: Array, results: Mapping[int, Array], solved: Any) -> _Measurement:
    settings, fold = _layers.Settings.of(layer), layer._fold()
    problem = layer._plain_problem(inputs, None)
    constant = _layers.current_constant(settings, problem.linear_map, *layer._kept())
    problem, constant = settings.prepared(problem, constant)
    step = _bounds.first_step(settings.solver, problem, constant, True)
    scale = problem.scale if isinstance(problem, NormalizedProblem) else constant

    def activated(y: Array) -> Array:
        y = y.astype(problem.dtype)
        if fold is not None:
            s, t = (jnp.expand_dims(one.astype(y.dtype), range(y.ndim - 1)) for one in fold)
            y = s * y + t
        return settings.prior.prox(y, 1.0)

    plain, one, many = (activated(results[which]) for which in (_PLAIN, _ONE, _ALL))
    objective = jnp.abs(problem.objective(solved.value))
    gap = solved.certificate
    relative = jnp.where(gap > 0, gap / jnp.where(objective > 0, objective, 1), 0)
    return _Measurement(
        lipschitz=jnp.asarray(jnp.inf if scale is None else jnp.max(scale)),
        step_size=jnp.max(step),
        change_one=_change(one, plain),
        change=_change(many, plain),
        gap=jnp.max(gap),
        relative_gap=jnp.max(relative),
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


def _record(records: Any, path: str) -> Any:
    for part in path.split(".") if path != "(model)" else ():
        records = records.get(part, records.get(int(part)) if part.isdigit() else None)
        if records is None:
            return None
    record = records.get("surgery")
    return record[0] if isinstance(record, tuple | list) else record


def rows(
    found: _plan.Plan, candidates: Mapping[str, Any], changes: Mapping[str, Changes]
) -> tuple[surgery.ReplacedLayer, ...]:
    """The rows of the report."""
    result = []
    for path, one in found.replaced.items():
        own = changes.get(path)
        nan = np.full((), np.nan)
        numbers: Any = _Measurement(*[nan] * len(_Measurement._fields))
        if own is not None and own.measured is not None:
            numbers = _Measurement(*map(np.asarray, own.measured))
        for index in np.ndindex(numbers.change.shape):
            values = {
                field: float(array[index])
                for field, array in zip(_Measurement._fields, numbers, strict=True)
            }
            result.append(
                surgery.ReplacedLayer(
                    name=path + "".join(f"[{i}]" for i in index),
                    kind=candidates[path].kind,
                    activation=one.activation,
                    prior=repr(one.prior),
                    num_iters=_iterations(one.solver),
                    model_change=np.nan if own is None else own.model,
                    normalization=one.normalization or "",
                    dropout=one.dropout or "",
                    tau=one.tau,
                    note=one.note,
                    **values,
                )
            )
    return tuple(result)


def _iterations(solver: Any) -> int:
    if hasattr(solver, "num_iters"):
        return int(solver.num_iters)
    return int(solver.num_outer) * int(solver.num_inner)


def totals(changes: Mapping[str, Changes]) -> tuple[float, float]:
    """How much one iteration and all change the model's output."""
    one, many = (changes.get(name, Changes(None, np.nan)).model for name in ("(one)", "(all)"))
    return one, many
