"""Reports on whole Linen networks."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from flax.core import tracers

from stochsolvers import _checks, _equilibria, _layers, _programs, reports
from stochsolvers._compilation import jit_once
from stochsolvers._typing import Array, join_static, split_static
from stochsolvers.linear_maps import LinearMap
from stochsolvers.linen._conv_transpose import SolverConvTranspose
from stochsolvers.linen._equilibrium import (
    DeepEquilibrium,
    Equilibrium,
    EquilibriumConv,
    EquilibriumLinear,
    promotes_plainly,
)
from stochsolvers.linen._evaluation import in_evaluation
from stochsolvers.linen._layers import (
    RECORDS,
    STATE,
    SolverConv,
    SolverDense,
    SolverDenseGeneral,
    SolverLayer,
    linear_map_of,
)
from stochsolvers.linen._proxprop import ProxPropConv, ProxPropDense
from stochsolvers.linen._replaced import fresh_traces, is_replaced, takes_a_place
from stochsolvers.reports import _certificates, _lipschitz, _trace
from stochsolvers.reports._known_layers import inherits_unchanged, keeps_digits
from stochsolvers.surgery import _fold


@reports.certify.register(nn.Module)
def certify(
    module: nn.Module,
    variables: Mapping[str, Any],
    *inputs: Any,
    rngs: Mapping[str, Array] | None = None,
    progress: bool | None = None,
    **options: Any,
) -> reports.CertificateReport:
    r"""How well every solver and equilibrium layer of a network solves its problem here, as a table.

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
      progress: whether to show on the standard error that it is at work; None for a terminal, after two
        seconds.
      **options: keyword arguments of the network's call, such as a `deterministic` of its own. Arrays
        are traced, the rest is static.

    Returns:
      `CertificateReport`, a row for each call of a solver layer, in call order.

    Raises:
      ValueError: for an empty batch, and for a solver layer within a transform that drops its records.
    """
    _checks.instance("module of certify", module, nn.Module, "an nn.Module")
    _check_variables(variables)
    traced, static = split_static((inputs, options))
    try:
        hash(module)
        observe = functools.partial(_observations, module)
    except TypeError:  # arrays among its attributes: nothing to remember the compilation by
        observe = jit_once(functools.partial(_observe, module), static_argnums=3)
    with _certificates.waiting("certificates of the layers", progress):
        return _certificates.certificate_report(observe(variables, rngs, traced, static))


def _observe(module, variables, rngs, traced, static):
    inputs, options = join_static(traced, static)
    called = []

    def note(call, args, kwargs, context):
        layer, scope = context.module, cast(Any, context.module.scope)
        if isinstance(layer, SolverLayer | Equilibrium) and context.method_name == "solve":
            called.append(_label(layer.path))
            leaks = scope.trace_level != tracers.current_trace()  # a transform of JAX
            if leaks or not layer.is_mutable_collection(RECORDS):
                _certificates.fail_dropped_records(called[-1], _KEPT_BY)
        return call(*args, **kwargs)

    def run(mutable: Any) -> Any:
        with (
            _certificates.numbered_calls(),
            _layers.observed_by(reports.observe),
            nn.intercept_methods(note),
        ):
            return module.apply(variables, *inputs, rngs=rngs, mutable=mutable, **options)[1]

    try:
        written = in_evaluation(run, also=(RECORDS,))
    except TypeError as error:  # a branch or a loop, of another structure now
        if called and RECORDS in str(error):
            _certificates.fail_dropped_records(called[-1], _KEPT_BY)
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


_observations = functools.partial(jit_once, static_argnums=(0, 4))(_observe)


@reports.lipschitz_report.register(nn.Module)
def lipschitz_report(
    module: nn.Module,
    variables: Mapping[str, Any],
    input_shape: tuple[int, ...],
    *,
    dtype: Any = None,
    radius: float | None = None,
    progress: bool | None = None,
    rngs: dict[str, Array] | None = None,
    **options: Any,
) -> reports.LipschitzReport:
    r"""Spectral norms of the layers of a network, and a bound on its Lipschitz constant.

    As `stochsolvers.nnx.lipschitz_report`, for `nn.Dense`, `DenseGeneral`, `Einsum`, `Conv`,
    `ConvTranspose`, the solver and ProxProp layers, `nn.BatchNorm` and `nn.LayerNorm`, `RMSNorm`, `GroupNorm`
    and `InstanceNorm`. Batch normalisation has a bound where it is called with `use_running_average`, so pass
    what your network needs for that among the options.
    Solvers count as deterministic.

    Args:
      module: the network.
      variables: its variables.
      input_shape: of its input, batch axis included: (1, 32, 32, 3).
      dtype: of its input; float32 by default.
      radius: r, if the bound is to hold for inputs x of this shape with ||x|| ≤ r; None for all inputs.
      progress: whether to show on the standard error how many layers are done; None for a terminal, after
        two seconds.
      rngs: keys of the random streams, where the call needs them.
      **options: keyword arguments of the network's call, static, such as `train=False`.

    Returns:
      `LipschitzReport`, a row for each call of a layer, in call order.
    """
    _checks.instance("module of lipschitz_report", module, nn.Module, "an nn.Module")
    _check_variables(variables)
    input_shape = _checks.shape("input_shape", input_shape, minimum=1)
    layers: dict[str, nn.Module] = {}
    units: dict[str, list[tuple[str, Any]]] = {}
    variables = dict(nn.unbox(variables))
    parameters = variables.pop("params", {})

    wrappers: list[str] = []  # around the call at hand, which have it called with other kernels
    wrapped: dict[str, set[str]] = {}  # labels of what each of them called
    behind: dict[
        str, str
    ] = {}  # normalisation -> the solver layer before it, with which it is one map

    def mark(call, args, kwargs, context):
        layer: Any = context.module
        label = _label(layer.path)
        if isinstance(layer, nn.WeightNorm | nn.SpectralNorm) and context.method_name == "__call__":
            wrappers.append(label)
            try:
                return call(*args, **kwargs)
            finally:
                wrappers.pop()
        for wrapper in wrappers:
            wrapped.setdefault(wrapper, set()).add(label)
        if context.method_name == "__call__" and label in behind:
            return _programs.mark_output(call(*args, **kwargs), "layer", behind.pop(label))
        if wrappers or context.method_name != "__call__" or not _is_known(layer, args, kwargs):
            return call(*args, **kwargs)
        if takes_a_place(layer):  # within the marks of the layer in whose place it is
            layers[label] = layer.clone(parent=None)
            return call(*args, **kwargs)
        if is_replaced(layer):
            output = call(_programs.mark_input(args[0], "layer", label), *args[1:], **kwargs)
            following = cast(Any, layers[label]).following
            if following is None:
                return _programs.mark_output(output, "layer", label)
            behind[_label(following.absolute(layer.path))] = label
            return output
        layers[label] = layer.clone(parent=None)
        if isinstance(layer, Equilibrium):  # those of a composition may be another module's
            members = getattr(layer, "layers", (layer,))
            units[label] = [("/".join(one.path), one.clone(parent=None)) for one in members]
        marked = _programs.mark_input(args[0], "layer", label)
        if isinstance(layer, SolverLayer) and kwargs.get("skip") is not None:
            kwargs = {**kwargs, "skip": _programs.mark_side(kwargs["skip"], "layer", label)}
        return _programs.mark_output(call(marked, *args[1:], **kwargs), "layer", label)

    def forward(parameters, inputs, mutable):
        given = {"params": parameters, **variables}
        with fresh_traces(), nn.intercept_methods(mark):
            return module.apply(given, inputs, rngs=rngs, mutable=mutable, **options)[0]

    def traced(mutable: Any) -> Any:
        layers.clear()
        wrapped.clear()
        behind.clear()
        return _trace.trace(functools.partial(forward, mutable=mutable), parameters, inputs)

    inputs = jax.ShapeDtypeStruct(tuple(input_shape), jnp.float32 if dtype is None else dtype)
    trace = in_evaluation(traced)
    flat: Any = traverse_util.flatten_dict({"params": parameters, **variables}, sep="/")
    paths = [
        tuple(key.key for key in path)
        for path, _ in jax.tree_util.tree_leaves_with_path(parameters)
    ]
    indices = {"/".join(("params", *path)): index for index, path in enumerate(paths)}
    parts = [
        _part(layers[call.label], units.get(call.label, []), call, flat, indices)
        for call in trace.calls
    ]
    strays = {
        _label(paths[index][:-1]): position for index, position in reversed(trace.strays.items())
    }
    for wrapper, inner in wrapped.items():  # one row for both
        if not inner.isdisjoint(strays):
            strays.pop(wrapper, None)
    kinds = dict.fromkeys(strays, "parameters")
    return _lipschitz.norms_report(trace, parts, strays, kinds, radius, progress)


def _label(path: tuple[str, ...]) -> str:
    return "/".join(path) or "(model)"


# The layers whose norm the report computes: class -> the linear map of such a layer, with a kernel, for
# inputs of a shape (batch axes included). A function raises ValueError for options that it does not cover.
_LINEAR_MAPS: dict[type, Callable[[Any, Array, tuple[int, ...]], LinearMap]] = {
    nn.Dense: linear_map_of,
    nn.Conv: linear_map_of,
    nn.ConvTranspose: linear_map_of,
    nn.DenseGeneral: linear_map_of,
    nn.Einsum: linear_map_of,
    SolverDense: linear_map_of,
    SolverConv: linear_map_of,
    SolverConvTranspose: linear_map_of,
    SolverDenseGeneral: linear_map_of,
    ProxPropDense: linear_map_of,
    ProxPropConv: linear_map_of,
}
_EQUILIBRIA = (EquilibriumLinear, EquilibriumConv, DeepEquilibrium)
_NORMALISATIONS = (nn.BatchNorm,)
_STANDARDISATIONS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.InstanceNorm)


def _is_known(layer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call is that of a layer in the tables above."""
    if args and inherits_unchanged(type(layer), _EQUILIBRIA) is not None:
        units = getattr(layer, "layers", (layer,))
        kinds = [inherits_unchanged(type(unit), _EQUILIBRIA) for unit in units]
        return None not in kinds and all(map(promotes_plainly, units))
    known: Any = (*_LINEAR_MAPS, *_NORMALISATIONS, *_STANDARDISATIONS)
    base: Any = inherits_unchanged(type(layer), known)
    if not args or base is None or not keeps_digits(layer):
        return False
    if base in _NORMALISATIONS:
        given = (*args[1:], kwargs.get("use_running_average"))[0]
        return bool(layer.use_running_average if given is None else given)
    if base in _STANDARDISATIONS:
        grouped = base is nn.GroupNorm and layer.reduction_axes is not None
        return len(args) == 1 and not kwargs and layer.axis_name is None and not grouped
    if base is nn.Einsum:
        given = (*args[1:], kwargs.get("einsum_str"))[0]
        if layer.einsum_str is None or given not in (None, layer.einsum_str):
            return False  # the layer does not know its map
    operations = (
        "dot_general", "dot_general_cls", "conv_general_dilated", "conv_general_dilated_cls",
        "promote_dtype",
    )  # fmt: skip
    return all(getattr(layer, name, None) is getattr(base, name, None) for name in operations)


def _part(
    layer: Any,
    units: Sequence[tuple[str, Any]],
    call: _trace.Call,
    flat: Mapping[str, Array],
    indices: Mapping[str, int],
) -> _lipschitz.Part:
    """What the report needs of a layer for one call.

    Args:
      layer: not bound to variables.
      units: of an equilibrium layer, the paths of its layers and these, not bound to variables.
      call: of it.
      flat: the network's variables, by path.
      indices: of the parameters in the trace, by the same paths.
    """
    prefix = "" if call.label == "(model)" else f"{call.label}/"
    kind = type(layer).__name__
    if isinstance(layer, Equilibrium):
        return _equilibrium_part(layer, units, call, flat, indices)
    names = ("kernel",)
    if isinstance(layer, _STANDARDISATIONS):
        names = ("scale", "bias")
    elif isinstance(layer, _NORMALISATIONS):
        names = ("scale",)
    weights = [f"params/{prefix}{name}" for name in names]
    path = call.slice_of([indices[weight]] for weight in weights if weight in indices)
    if path is None:
        return _lipschitz.Part(kind)  # called with another kernel or scale
    own = {
        name: array[path] if path and np.ndim(array) else array
        for name, array in flat.items()
        if name in weights or name.split("/", 1)[1].startswith(prefix)
    }
    if isinstance(layer, _STANDARDISATIONS):
        scale, bias = map(own.get, weights)
        count = math.prod(call.input_shape)
        standardised = _lipschitz.Standardisation(scale, bias, layer.epsilon, count)
        return _lipschitz.Part(kind, standardised=standardised)
    if isinstance(layer, _NORMALISATIONS):
        variance = own[f"batch_stats/{prefix}var"]
        if call.reads_others or not call.reads(variance):
            return _lipschitz.Part(kind)  # with another variance
        return _lipschitz.Part(
            kind,
            normalisation=(own.get(weights[0]), variance, layer.epsilon),
            channels_last=layer.axis in (-1, len(call.input_shape) - 1),
        )
    linear_map_for = _LINEAR_MAPS[inherits_unchanged(type(layer), _LINEAR_MAPS)]
    kernel, following = own[weights[0]], getattr(layer, "following", None)
    if following is not None:
        of_norm = following.variables(flat, tuple(call.label.split("/")))
        if path:
            of_norm = {name: array[path] for name, array in of_norm.items()}
        kernel = _fold.folded(kernel, None, following.affine(of_norm))[0]
    try:
        linear_map = linear_map_for(layer, kernel, call.input_shape)
    except ValueError:
        return _lipschitz.Part(kind)
    if not isinstance(layer, SolverLayer):
        return _lipschitz.Part(kind, linear_map)
    constant, reference = (
        own.get(f"{STATE}/{prefix}{name}") for name in ("lipschitz", "reference")
    )
    return _lipschitz.Part(
        kind,
        linear_map,
        settings=_layers.Settings.of(layer),
        kept=constant,
        reference=reference,
    )


def _equilibrium_part(
    layer: Any,
    units: Sequence[tuple[str, Any]],
    call: _trace.Call,
    flat: Mapping[str, Array],
    indices: Mapping[str, int],
) -> _lipschitz.Part:
    """What the report needs of an equilibrium layer for one call; arguments as of `_part`."""
    kind, inputs = type(layer).__name__, jnp.zeros(call.input_shape)
    problems, maps = [], []
    for path, unit in units:
        prefix = f"params/{path}/" if path else "params/"
        own = {name.removeprefix(prefix): name for name in indices if name.startswith(prefix)}
        read = {indices[name] for short, name in own.items() if short in ("kernel", "input_kernel")}
        if not read.issubset(call.parameters):
            return _lipschitz.Part(kind)  # called with another kernel, or one of a stack
        bound = unit.bind({"params": {short: flat[name] for short, name in own.items()}})
        problems.append(bound.unit_problem(inputs)[0])
        maps.append(bound.maps(inputs)[0])
    problem = _equilibria.composed(problems, getattr(layer, "alpha", 1.0), layer.regularizer)
    return _lipschitz.Part(kind, equilibrium=(problem, tuple(maps)))
