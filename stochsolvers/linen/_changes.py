"""How much the replaced layers change their outputs and the network's, from one compiled pass.

In it every replaced layer computes three outputs, the plain one, that of one iteration and that of all, and
returns the one that a switch says. With all switches at "plain" the layers see what they see in the plain
network.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from stochsolvers._compilation import jit_once
from stochsolvers._typing import Array, join_static, split_static
from stochsolvers.linen._evaluation import in_evaluation
from stochsolvers.linen._replaced import ReplacedLayers, base_of, fresh_traces, twin_of
from stochsolvers.linen._survey import inputs_first, name
from stochsolvers.surgery import _measurement


def measured(
    replaced: ReplacedLayers,
    stacked: Mapping[str, bool],
    variables: Mapping[str, Any],
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    rngs: Mapping[str, Any] | None,
) -> _measurement.Changes:
    """The changes; `stacked` says by path which layers are a stack, with a measurement for each."""
    paths = [name(one.path) for one in replaced.layers]
    traced, static = split_static((arguments, options))
    recorder = _Counting(stacked)

    @jit_once
    def run(variables: Any, rngs: Any, traced: Any, switches: Array) -> Any:
        inputs, options = join_static(traced, static)

        def forward(mutable: Any) -> Any:
            with fresh_traces(), nn.intercept_methods(_switching(replaced, switches, recorder)):
                return replaced.module.apply(
                    variables, *inputs, rngs=rngs, mutable=mutable, **options
                )[0]

        return in_evaluation(forward)

    def outputs(which: Sequence[int]) -> Any:
        return run(dict(variables), rngs, traced, jnp.asarray(which, jnp.int32))

    return _measurement.measured_changes(paths, outputs, recorder)


class _Counting(_measurement.Recorder):
    """One that numbers the calls of a stack of layers, which are in its order."""

    def __init__(self, stacked: Mapping[str, bool]):
        super().__init__()
        self.stacked = stacked

    def _store(self, path: str, structure: Any, index: Any, *leaves: Any) -> None:
        if self.stacked[path]:
            index = (len(self.seen.get(path, {})),)
        super()._store(path, structure, index, *leaves)


def _switching(replaced: ReplacedLayers, switches: Array, record: _measurement.Recorder) -> Any:
    """An interceptor under which a replaced layer returns what its switch says."""
    indices = {one.path: index for index, one in enumerate(replaced.layers)}
    norms = {
        one.following.absolute(one.path) for one in replaced.layers if one.following is not None
    }
    dropouts = {path for one in replaced.layers for path in one.dropouts}

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.module
        if context.method_name != "__call__" or layer.scope is None:
            return call(*args, **kwargs)
        args, kwargs = inputs_first(args, kwargs)
        if layer.path in dropouts and isinstance(layer, nn.Dropout):
            return args[0]
        if layer.path in norms and isinstance(layer, nn.BatchNorm):
            return call(*args, **kwargs)
        if layer.path not in indices or base_of(layer) is None:
            return call(*args, **kwargs)
        index = indices[layer.path]
        results, values = _of_layer(layer, replaced.layers[index], call(*args), *args)
        record(name(layer.path), values)
        return results.chosen(switches[index])

    return intercept


def _of_layer(layer: Any, own: Any, plain: Array, inputs: Array) -> Any:
    twin = twin_of(layer, own, parent=layer.scope.rewound())
    linear_map, inputs, bias = twin.assembled(inputs)
    problem = own.settings.problem(linear_map, inputs, bias, None)
    fold = None if own.following is None else twin._affine()
    return _measurement.outputs_and_measurement(
        own.settings,
        problem,
        plain,
        fold=fold,
        kept=twin._kept_constant(problem.linear_map),
        precision=layer.precision,
    )
