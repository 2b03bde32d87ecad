"""Reports on whole Linen networks."""

import functools
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from flax.core import DenyList, tracers

from stochsolvers import _checks, _layers, reports
from stochsolvers._typing import Array, join_static, split_static
from stochsolvers.linen._layers import RECORDS, STATE, SolverLayer, linear_map_of
from stochsolvers.reports import _certificates, _lipschitz, _trace

_MUTABLE = DenyList(STATE)  # what a training pass writes is dropped; constants are not refreshed


@reports.certify.register(nn.Module)
def certify(
    module: nn.Module,
    variables: Mapping[str, Any],
    *inputs: Any,
    rngs: Mapping[str, Array] | None = None,
    **options: Any,
) -> reports.CertificateReport:
    r"""How well every solver layer of a network solves its problem at these inputs, as a table.

    One `apply`, compiled once for each module and shape; no variable is updated.

    What the layers record is the collection "solver_records". `nn.jit`, `nn.remat` and, with the same
    solver layers in every branch, `nn.cond` lift it as they are; `nn.scan` and `nn.vmap` where it is
    among their axes, as in

        nn.scan(Block, variable_axes={"params": 0, "solver_records": 0}, ...)

    and then each layer of the stack, or each step, has a row. Other loops and JAX's own transforms do
    not lift it.

    Args:
      module: the network, not bound to variables.
      variables: its variables, as `init` returns them.
      *inputs: of the network, for instance a batch of images.
      rngs: keys of the random streams, where layers sample.
      **options: keyword arguments of the network's call, such as a `deterministic` of its own. Arrays
        are traced, the rest is static.

    Returns:
      `CertificateReport`, a row for each call of a solver layer, in call order.

    Raises:
      ValueError: for an empty batch, and for a solver layer within a transform that drops its records.
    """
    _check_variables(variables)
    traced, static = split_static((inputs, options))
    try:
        hash(module)
        observe = functools.partial(_observations, module)
    except TypeError:  # arrays among its attributes: nothing to remember the compilation by
        observe = jax.jit(functools.partial(_observe, module), static_argnums=3)
    return _certificates.certificate_report(observe(variables, rngs, traced, static))


def _observe(module, variables, rngs, traced, static):
    inputs, options = join_static(traced, static)
    called = []

    def note(call, args, kwargs, context):
        layer, scope = context.module, cast(Any, context.module.scope)
        if isinstance(layer, SolverLayer) and context.method_name == "solve":
            called.append(_label(layer.path))
            leaks = scope.trace_level != tracers.current_trace()  # a transform of JAX
            if leaks or not layer.is_mutable_collection(RECORDS):
                _certificates.lost(called[-1], _KEPT_BY)
        return call(*args, **kwargs)

    with _certificates.numbered_calls(), nn.intercept_methods(note):
        try:
            _, written = module.apply(variables, *inputs, rngs=rngs, mutable=_MUTABLE, **options)
        except TypeError as error:  # a branch or a loop, of another structure now
            if called and RECORDS in str(error):
                _certificates.lost(called[-1], _KEPT_BY)
            raise
    flat = traverse_util.flatten_dict(written.get(RECORDS, {}))
    return {_label(path[:-1]): calls for path, calls in flat.items()}


_KEPT_BY = (
    'one that lifts "solver_records", such as nn.scan(..., variable_axes={"solver_records": 0, ...}), '
    "or nn.cond with the same solver layers in every branch"
)


def _check_variables(variables: Any) -> None:
    if not isinstance(variables, Mapping):
        got = type(variables).__name__
        _checks.fail("variables", "the collections that init returns (see Module.unbind)", got)


_observations = functools.partial(jax.jit, static_argnums=(0, 4))(_observe)


@reports.lipschitz_report.register(nn.Module)
def lipschitz_report(
    module: nn.Module,
    variables: Mapping[str, Any],
    input_shape: tuple[int, ...],
    *,
    dtype: Any = None,
    rngs: dict[str, Array] | None = None,
    **options: Any,
) -> reports.LipschitzReport:
    r"""Spectral norms of the layers of a network, and a bound on its Lipschitz constant.

    As `stochsolvers.nnx.lipschitz_report`, for `nn.Dense`, two-dimensional `nn.Conv`, their solvers and
    `nn.BatchNorm`. Batch normalisation has a bound where it is called with `use_running_average`, so
    pass what your network needs for that among the options. Solvers count as deterministic.

    Args:
      module: the network.
      variables: its variables.
      input_shape: of its input, batch axis included: (1, 32, 32, 3).
      dtype: of its input; float32 by default.
      rngs: keys of the random streams, where the call needs them.
      **options: keyword arguments of the network's call, static, such as `train=False`.

    Returns:
      `LipschitzReport`, a row for each call of a layer, in call order.
    """
    _check_variables(variables)
    layers: dict[str, nn.Module] = {}
    variables = dict(variables)
    parameters = variables.pop("params", {})

    def mark(call, args, kwargs, context):
        layer: Any = context.module
        if context.method_name != "__call__" or not _is_known(layer, args, kwargs):
            return call(*args, **kwargs)
        label = _label(layer.path)
        layers[label] = layer.clone(parent=None)
        marked = _trace.mark_input(args[0], label)
        return _trace.mark_output(call(marked, *args[1:], **kwargs), label)

    def forward(parameters, inputs):
        with nn.intercept_methods(mark):
            return module.apply(
                {"params": parameters, **variables}, inputs, rngs=rngs, mutable=_MUTABLE, **options
            )[0]

    inputs = jax.ShapeDtypeStruct(tuple(input_shape), jnp.float32 if dtype is None else dtype)
    trace = _trace.trace(forward, parameters, inputs)
    flat: Any = traverse_util.flatten_dict({"params": parameters, **variables}, sep="/")
    parts = [_part(layers[call.label], call, flat) for call in trace.calls]
    owners = [
        _label(tuple(key.key for key in path)[:-1])
        for path, _ in jax.tree_util.tree_leaves_with_path(parameters)
    ]
    strays = {owners[index]: position for index, position in reversed(trace.strays.items())}
    return _lipschitz.norms_report(trace, parts, strays, dict.fromkeys(strays, "parameters"))


def _label(path: tuple[str, ...]) -> str:
    return "/".join(path) or "(model)"


def _is_known(layer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call is that of a layer whose norm the report computes, with its own parameters."""
    if not args or _within_reparametrisation(layer):
        return False
    if isinstance(layer, nn.BatchNorm):
        given = (*args[1:], kwargs.get("use_running_average"))[0]
        running = layer.use_running_average if given is None else given
        return bool(running) and type(layer).__call__ is nn.BatchNorm.__call__
    plain = (nn.Dense.__call__, nn.Conv.__call__, SolverLayer.__call__)
    return isinstance(layer, nn.Dense | nn.Conv) and type(layer).__call__ in plain


def _within_reparametrisation(layer: Any) -> bool:
    """Whether a layer is called with other kernels than its own."""
    while isinstance(layer, nn.Module):
        if isinstance(layer, nn.WeightNorm | nn.SpectralNorm):
            return True
        layer = layer.parent
    return False


def _part(layer: Any, call: Any, flat: Mapping[str, Array]) -> _lipschitz.Part:
    prefix = "" if call.label == "(model)" else f"{call.label}/"
    kind = type(layer).__name__
    if isinstance(layer, nn.BatchNorm):
        scale, variance = flat.get(f"params/{prefix}scale"), flat[f"batch_stats/{prefix}var"]
        return _lipschitz.Part(kind, normalisation=(scale, variance, layer.epsilon))
    kernel = flat[f"params/{prefix}kernel"]
    try:
        linear_map = linear_map_of(layer, kernel, call.input_shape)
    except ValueError:  # not a two-dimensional convolution, or one with other options
        return _lipschitz.Part(kind)
    if not isinstance(layer, SolverLayer):
        return _lipschitz.Part(kind, linear_map)
    kept = flat.get(f"{STATE}/{prefix}lipschitz")
    if kept is not None:
        current = _layers.is_current(flat[f"{STATE}/{prefix}reference"], linear_map)
        kept = kept if current else None
    return _lipschitz.Part(
        kind, linear_map, solver=layer.solver, ridge=layer.ridge, step_constant=kept
    )
