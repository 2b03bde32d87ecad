"""How much the replaced layers change their outputs and the network's, from one compiled pass.

In it every replaced layer computes three outputs, the plain one, that of one iteration and that of all, and
returns the one that a switch says. With all switches at "plain" the layers see what they see in the plain
network.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from stochsolvers import surgery
from stochsolvers._compilation import jit_once
from stochsolvers._typing import Array, join_static, split_static
from stochsolvers.linen._evaluation import in_evaluation
from stochsolvers.linen._replaced import ReplacedLayers, base_of, fresh_traces, twin_of
from stochsolvers.linen._survey import inputs_first, name
from stochsolvers.surgery import _measurement, _plan

_PLAIN, _ONE, _ALL = range(3)


def measured(
    replaced: ReplacedLayers,
    found: _plan.Plan,
    kinds: Mapping[str, str],
    variables: Mapping[str, Any],
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    rngs: Mapping[str, Any] | None,
) -> tuple[list[surgery.ReplacedLayer], float, float]:
    """The rows of the report, and the relative changes of the network's output with one iteration and all."""
    paths = [name(one.path) for one in replaced.layers]
    seen: dict[str, list[_measurement.Measurement]] = {path: [] for path in paths}
    traced, static = split_static((arguments, options))

    def store(index: int, structure: Any, *leaves: Array) -> None:
        copies = [np.array(leaf) for leaf in leaves]
        seen[paths[index]].append(jax.tree.unflatten(structure, copies))

    @jit_once
    def run(variables: Any, rngs: Any, traced: Any, switches: Array) -> Any:
        inputs, options = join_static(traced, static)

        def forward(mutable: Any) -> Any:
            with fresh_traces(), nn.intercept_methods(_switching(replaced, switches, store)):
                return replaced.module.apply(
                    variables, *inputs, rngs=rngs, mutable=mutable, **options
                )[0]

        return in_evaluation(forward)

    def outputs(switches: Any) -> Any:
        result = run(dict(variables), rngs, traced, jnp.asarray(switches, jnp.int32))
        jax.block_until_ready(result)
        jax.effects_barrier()
        return result

    plain = outputs([_PLAIN] * len(paths))
    of_plain = {path: [_measurement.numbers(one) for one in calls] for path, calls in seen.items()}

    def change(switches: Any) -> float:
        return _measurement.relative_change(outputs(switches), plain)

    alone = {
        path: change([_ALL * (i == k) for i in range(len(paths))]) for k, path in enumerate(paths)
    }
    rows = [
        row
        for path, one in found.replaced.items()
        for row in _measurement.rows_of(path, kinds[path], one, of_plain[path], alone[path])
    ]
    return rows, change([_ONE] * len(paths)), change([_ALL] * len(paths))


def _switching(replaced: ReplacedLayers, switches: Array, store: Callable[..., None]) -> Any:
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
        leaves, structure = jax.tree.flatten(values)
        jax.debug.callback(functools.partial(store, index, structure), *leaves)
        which = switches[index]
        return jnp.where(
            which == _PLAIN, results.plain, jnp.where(which == _ONE, results.one, results.all)
        )

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


def unmeasured(found: _plan.Plan, kinds: Mapping[str, str]) -> list[surgery.ReplacedLayer]:
    """The rows of the report without measurements."""
    return [
        row
        for path, one in found.replaced.items()
        for row in _measurement.rows_of(path, kinds[path], one, [], float("nan"))
    ]
