"""How much the replaced layers change their outputs and the model's, from one compiled pass of a copy.

In the copy every replaced layer computes three outputs, the plain one, that of one iteration and that of all,
and returns the one that a switch in its state says. With all switches at "plain" the layers see what they see
in the plain model.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from stochsolvers import _layers
from stochsolvers._compilation import jit_once
from stochsolvers._typing import Array, join_static, split_static
from stochsolvers.nnx import _survey
from stochsolvers.nnx._solver_layer import SolverLayer
from stochsolvers.surgery import _measurement, _plan


def measured(
    model: nnx.Module, found: _plan.Plan, arguments: Any, options: dict[str, Any]
) -> _measurement.Changes:
    """Run a copy of a model in which layers have been replaced; the model itself is unchanged."""
    graph, state = nnx.split(model)
    copy = nnx.merge(graph, state, copy=True)
    recorder, switches = _measurement.Recorder(), {}
    for path, module in list(nnx.iter_modules(copy)):
        label: Any = _survey.name(path)
        if label in found.replaced and isinstance(module, SolverLayer):
            switches[label] = _Switch(_numbered(_survey.stack_shape(module)))
            module.surgery_switch = switches[label]  # pyright: ignore[reportAttributeAccessIssue]
            module.surgery_record = functools.partial(recorder, label)  # pyright: ignore
            object.__setattr__(module, "__class__", _switching(type(module)))
    graph, _ = nnx.split(copy)
    traced, static = split_static((arguments, options))

    @jit_once
    def run(state: Any, traced: Any) -> Any:
        copy = nnx.merge(graph, state, copy=True)
        copy.eval()
        inputs, options = join_static(traced, static)
        return copy(*inputs, **options)  # pyright: ignore[reportCallIssue]

    def outputs(which: Sequence[int]) -> Any:
        for switch, one in zip(switches.values(), which, strict=True):
            switch[...] = switch[...].at[..., 0].set(one)
        return run(nnx.state(copy), traced)

    return _measurement.measured_changes(list(switches), outputs, recorder)


class _Switch(nnx.Variable):
    """Which output a layer of the measured copy returns, and its index in a stack."""


def _numbered(stack: tuple[int, ...]) -> Array:
    numbers = np.stack([np.zeros(stack), *np.indices(stack)], axis=-1)
    return jnp.asarray(numbers, jnp.int32)


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
        switch = self.surgery_switch[...]
        self.surgery_record(values, switch[1:])
        return results.chosen(switch[0])

    return type(cls.__name__, (cls,), {"__call__": call})
