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
from stochsolvers._compilation import jit_once
from stochsolvers._typing import Array, join_static, split_static
from stochsolvers.nnx import _survey
from stochsolvers.nnx._solver_layer import SolverLayer, SolverRecord
from stochsolvers.surgery import _measurement, _plan

_PLAIN, _ONE, _ALL = 0, 1, 2


class Changes(NamedTuple):
    """Of one replaced layer: its measurements, and how much it alone changes the model's output.

    The entries "(one)" and "(all)" are those of the model with every layer replaced. Of a stack of layers
    there are measurements for each index.
    """

    numbers: dict[tuple[int, ...], dict[str, float]]
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
            switches[name] = _Switch(jnp.zeros(stack, jnp.int32))
            module.surgery_switch = switches[name]  # pyright: ignore[reportAttributeAccessIssue]
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
        "(one)": Changes({}, _measurement.relative_change(outputs(**{"": _ONE})[0], plain)),
        "(all)": Changes({}, _measurement.relative_change(outputs(**{"": _ALL})[0], plain)),
    }
    for name in switches:
        alone = _measurement.relative_change(outputs(**{name: _ALL})[0], plain)
        changes[name] = Changes(numbers[name], alone)
    return changes


class _Switch(nnx.Variable):
    """Which output a layer of the measured copy returns."""


@functools.cache
def _switching(cls: Any) -> Any:
    def call(self: Any, inputs: Array, **options: Any) -> Array:
        results, values = _measurement.outputs_and_measurement(
            _layers.Settings.of(self),
            self._plain_problem(inputs, None),
            self._plain_call(inputs),
            fold=self._fold(),
            kept=(self._kept()[0], None),  # of this very kernel
            precision=self.precision,
        )
        self.sow(SolverRecord, "surgery", values)
        which = self.surgery_switch[...]
        return jnp.where(
            which == _PLAIN, results.plain, jnp.where(which == _ONE, results.one, results.all)
        )

    return type(cls.__name__, (cls,), {"__call__": call})


def _numbers(records: Any, path: str) -> dict[tuple[int, ...], dict[str, float]]:
    """The measurements of a layer, of a stack for each index."""
    for part in path.split(".") if path != "(model)" else ():
        records = records[part] if part in records else records[int(part)]
    (record,) = records["surgery"]
    return {
        index: _measurement.numbers(jax.tree.map(lambda leaf, i=index: leaf[i], record))
        for index in np.ndindex(record.change.shape)
    }


def rows(
    found: _plan.Plan, candidates: Mapping[str, Any], changes: Mapping[str, Changes]
) -> tuple[surgery.ReplacedLayer, ...]:
    """The rows of the report."""
    unknown: Any = Changes({(): {}}, np.nan)
    return tuple(
        _measurement.row(path, index, candidates[path].kind, one, numbers, own.model)
        for path, one in found.replaced.items()
        for own in [changes.get(path, unknown)]
        for index, numbers in own.numbers.items()
    )


def totals(changes: Mapping[str, Changes]) -> tuple[float, float]:
    """How much one iteration and all change the model's output."""
    one, many = (changes.get(name, Changes({}, np.nan)).model for name in ("(one)", "(all)"))
    return one, many
