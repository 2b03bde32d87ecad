"""Reports on whole NNX networks."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import errors, nnx

from stochsolvers import _checks, _layers, _programs, reports
from stochsolvers._compilation import jit_once
from stochsolvers._typing import join_static, split_static
from stochsolvers.linear_maps import LinearMap
from stochsolvers.nnx._conv_transpose import SolverConvTranspose
from stochsolvers.nnx._dropout import linear_map_of
from stochsolvers.nnx._equilibrium import DeepEquilibrium, EquilibriumConv, EquilibriumLinear
from stochsolvers.nnx._equilibrium_base import Equilibrium, promotes_plainly
from stochsolvers.nnx._layers import SolverConv, SolverLinear
from stochsolvers.nnx._linear_general import SolverLinearGeneral
from stochsolvers.nnx._proxprop import ProxPropConv, ProxPropLinear
from stochsolvers.nnx._solver_layer import SolverLayer, SolverRecord
from stochsolvers.nnx._spectral import SpectralNorm
from stochsolvers.nnx._stand_ins import FrozenBatchNorm
from stochsolvers.reports import _certificates, _lipschitz, _trace
from stochsolvers.reports._known_layers import inherits_unchanged, keeps_digits


@reports.certify.register(nnx.Module)
def certify(
    model: nnx.Module,
    *inputs: Any,
    deterministic: bool | None = None,
    progress: bool | None = None,
    **options: Any,
) -> reports.CertificateReport:
    r"""How well every solver and equilibrium layer of a network solves its problem here, as a table.

    One forward pass of a copy of the model, compiled once for each structure and shape. The model
    itself is unchanged: parameters, statistics, random streams and modes.

    The model may call its solver layers directly, and within `nnx.jit`, `nnx.remat`, `nnx.grad`,
    `nnx.vmap` and `nnx.scan` over a stack of layers (one row for each of the stack), and `nnx.cond` and
    `nnx.switch` with the same solver layers in every branch (one row, of the branch taken). Other
    transforms drop what the layers record: JAX's own, loops (`nnx.fori_loop`, `nnx.while_loop`), and
    `nnx.vmap` and `nnx.scan` with one layer for all steps.

    Args:
      model: holds its solver layers. Layers that sample do so, as in any other call of the model.
      *inputs: of the model, for instance a batch of images.
      deterministic: True for full gradients and no dropout, False to sample; None, the default, for
        the modes that the modules have.
      progress: whether to show on the standard error that it is at work; None for a terminal, after two
        seconds.
      **options: keyword arguments of the model's call. Arrays are traced, the rest is static.

    Returns:
      `CertificateReport`, a row for each call of a solver layer, in call order.

    Raises:
      ValueError: for an empty batch, and for a solver layer within a transform that drops its records.
    """
    _checks.instance("model of certify", model, nnx.Module, "an nnx.Module")
    graph, state = nnx.split(model)
    traced, static = split_static((inputs, options))
    with _certificates.waiting("certificates of the layers", progress):
        seen = _observations(graph, state, traced, static, deterministic)
        return _certificates.certificate_report(seen)


@functools.partial(jit_once, static_argnums=(0, 3, 4))
def _observations(graph, state, traced, static, deterministic):
    model = nnx.merge(graph, state, copy=True)
    if deterministic is not None:
        model.set_attributes(deterministic=deterministic, raise_if_not_found=False)
    called = _listen(model)
    inputs, options = join_static(traced, static)
    with _certificates.numbered_calls(), _layers.observed_by(reports.observe):
        try:
            _, records = nnx.capture(model, SolverRecord)(*inputs, **options)
        except (TypeError, ValueError) as error:  # a branch or a loop, of another structure now
            if called and "__captures__" in str(error):
                _certificates.fail_dropped_records(called[-1], _KEPT_BY)
            raise
    flat = nnx.to_flat_state(records)
    seen = {_name(path[:-1]): record.get_value() for path, record in flat}
    for name in called:
        if name not in seen:
            _certificates.fail_dropped_records(name, _KEPT_BY)
    return seen


_KEPT_BY = (
    "none, nnx.jit, nnx.remat, nnx.grad, nnx.vmap or nnx.scan over a stack of layers, "
    "or nnx.cond with the same solver layers in every branch"
)


def _listen(model: nnx.Module) -> list[str]:
    """Make the solver layers write their names on the list that is returned, as they are called."""
    called: list[str] = []

    def listening(cls: Any, name: str) -> Any:
        def solve(self, *args, **options):
            called.append(name)
            try:
                self.report_label = name  # NNX refuses within transforms of JAX
            except errors.TraceContextError:
                _certificates.fail_dropped_records(name, _KEPT_BY)
            return cls.solve(self, *args, **options)

        return type(cls.__name__, (cls,), {"solve": solve})

    for path, module in list(nnx.iter_modules(model)):
        if isinstance(module, SolverLayer | Equilibrium):
            module.report_label = _name(path)  # pyright: ignore[reportAttributeAccessIssue]
            object.__setattr__(module, "__class__", listening(type(module), _name(path)))
    return called


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path)) or "(model)"


@reports.lipschitz_report.register(nnx.Module)
def lipschitz_report(
    model: nnx.Module,
    input_shape: tuple[int, ...],
    *,
    dtype: Any = None,
    radius: float | None = None,
    progress: bool | None = None,
    **options: Any,
) -> reports.LipschitzReport:
    r"""Spectral norms of the layers of a network at inference, and a bound on its Lipschitz constant.

    The forward pass of a copy in evaluation mode is traced, not run, to see which layers are called,
    in which order and on which shapes. The model itself is unchanged.

    Layers with a certified norm: `nnx.Linear`, `LinearGeneral`, `Einsum`, `Conv` and `ConvTranspose`
    with one to three spatial axes, the solver, equilibrium and ProxProp layers, `nnx.BatchNorm`,
    whose norm is its largest scale, and `LayerNorm`, `RMSNorm`, `GroupNorm` and `InstanceNorm`, which have
    max|γ| / sqrt(ε), reached at inputs without variance. The norm is exact for contractions and circular
    padding, and a bracket under zero padding. Subclasses count if they override no method, and layers if
    they have Flax's own `dot_general` and `promote_dtype` and are called with their own kernel. A solver
    layer and the BatchNorm that `replace_layers` has folded into it share a row, with the constant of both
    together; if the BatchNorm has changed since, they have none before `refresh_lipschitz`. Within
    `nnx.scan` over a stack of layers each of them has a row.

    The bound is that of the graph of the forward pass: residual connections, concatenations and other
    parallel paths, slices, pools, interpolation, loops of known length. It includes the Lipschitz constants
    of the operations between the layers: 1 for ReLU, tanh, softplus and pools of disjoint windows, |c| for a
    scaling by c, the norm of a matrix or a kernel that other modules apply. An activation of `jax.nn` is
    recognised by the operations that it consists of; the name of a function is not used. Operations
    without a constant, such as `sign`, and those whose constant is not known are named, and make the
    bound infinite. Products of two functions of the input, as in attention, have a constant for inputs in a
    ball alone: give its radius. The bound holds in exact arithmetic: rounding, as by a cast to bfloat16,
    adds the relative precision of the dtype.

    Args:
      model: the network.
      input_shape: of its input, batch axis included: (1, 32, 32, 3).
      dtype: of its input; float32 by default.
      radius: r, if the bound is to hold for inputs x of this shape with ||x|| ≤ r; None for all inputs.
      progress: whether to show on the standard error how many layers are done; None for a terminal, after
        two seconds.
      **options: keyword arguments of the model's call, static.

    Returns:
      `LipschitzReport`, a row for each call of a layer, in call order.
    """
    _checks.instance("model of lipschitz_report", model, nnx.Module, "an nnx.Module")
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)

    def forward(parameters, inputs):
        copy = nnx.merge(graph, parameters, rest, copy=True)
        copy.eval()
        _mark_layers(copy)
        return copy(inputs, **options)

    input_shape = _checks.shape("input_shape", input_shape, minimum=1)
    inputs = jax.ShapeDtypeStruct(input_shape, jnp.float32 if dtype is None else dtype)
    trace = _trace.trace(forward, parameters, inputs)
    modules = {_name(path): module for path, module in nnx.iter_modules(model)}
    arrays = jax.tree.leaves(parameters)
    parts = [_part(modules[call.label], call, arrays) for call in trace.calls]
    owners = [
        _owner(tuple(key.key for key in path if hasattr(key, "key")), modules)
        for path, _ in jax.tree_util.tree_leaves_with_path(parameters)
    ]
    strays = {owners[index]: position for index, position in reversed(trace.strays.items())}
    for name in list(strays):  # a wrapper and what it wraps have one row
        if isinstance(modules[name], _WRAPPERS):
            wrapped = "" if name == _name(()) else f"{name}."
            if any(other.startswith(wrapped) for other in strays.keys() - {name}):
                del strays[name]
    kinds = {name: type(modules[name]).__name__ for name in strays}
    return _lipschitz.norms_report(trace, parts, strays, kinds, radius, progress)


def _owner(path: tuple[Any, ...], modules: Mapping[str, nnx.Module]) -> str:
    """The name of the module that a parameter belongs to, itself or in a container."""
    names = (_name(path[:end]) for end in range(len(path) - 1, -1, -1))
    return next(name for name in names if name in modules)


_WRAPPERS = (nnx.WeightNorm, nnx.SpectralNorm, SpectralNorm)  # they call layers with other kernels


def _mark_layers(model: nnx.Module) -> None:
    """Make the layers that have a bound mark their calls."""
    rewritten = set()
    for _, module in nnx.iter_modules(model):
        if isinstance(module, _WRAPPERS):
            rewritten |= {id(inner) for _, inner in nnx.iter_modules(module)}
    known = [pair for pair in nnx.iter_modules(model) if _is_known(pair[1])]
    for path, module in known:
        if id(module) not in rewritten:
            module.report_label = _name(path)  # pyright: ignore[reportAttributeAccessIssue]
            object.__setattr__(module, "__class__", _marking(type(module)))


# The layers whose norm the report computes: class -> the linear map of such a layer for inputs of a shape
# (batch axes included). A function raises ValueError for options that it does not cover.
_LINEAR_MAPS: dict[type, Callable[[Any, tuple[int, ...]], LinearMap]] = {
    nnx.Linear: linear_map_of,
    nnx.Conv: linear_map_of,
    nnx.ConvTranspose: linear_map_of,
    nnx.LinearGeneral: linear_map_of,
    nnx.Einsum: linear_map_of,
    SolverLinear: linear_map_of,
    SolverConv: linear_map_of,
    SolverConvTranspose: linear_map_of,
    SolverLinearGeneral: linear_map_of,
    ProxPropLinear: linear_map_of,
    ProxPropConv: linear_map_of,
}
_EQUILIBRIA = (EquilibriumLinear, EquilibriumConv, DeepEquilibrium)
_NORMALISATIONS = (nnx.BatchNorm, FrozenBatchNorm)
_STANDARDISATIONS = (nnx.LayerNorm, nnx.RMSNorm, nnx.GroupNorm, nnx.InstanceNorm)


_OPERATIONS = (
    "dot_general", "dot_general_cls", "conv_general_dilated", "einsum_op", "promote_dtype",
)  # fmt: skip


def _is_known(module: Any) -> bool:
    """Whether a module computes what its class in the tables above does."""
    if inherits_unchanged(type(module), _EQUILIBRIA) is not None:
        units = getattr(module, "layers", [module])
        kinds = [inherits_unchanged(type(unit), _EQUILIBRIA) for unit in units]
        return None not in kinds and all(map(promotes_plainly, units))
    known = (*_LINEAR_MAPS, *_NORMALISATIONS, *_STANDARDISATIONS)
    base = inherits_unchanged(type(module), known)
    if base in _STANDARDISATIONS and not _is_plain(module):
        return False
    return (
        base is not None
        and keeps_digits(module)
        and all(getattr(module, name) is default for name, default in _operations(base).items())
    )


def _is_plain(module: Any) -> bool:
    """Whether a normalisation takes the moments of one device's arrays, in groups of whole examples."""
    grouped = isinstance(module, nnx.GroupNorm) and module.reduction_axes is not None
    return module.axis_name is None and not grouped


@functools.cache
def _operations(cls: Any) -> dict[str, Any]:
    """The operations that a Flax layer lets its user replace, by their names in its constructor."""
    defaults: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        parameters = inspect.signature(base.__init__).parameters
        defaults |= {name: parameters[name].default for name in _OPERATIONS if name in parameters}
    return defaults


@functools.cache
def _marking(cls: Any) -> Any:
    """The class of a layer, with its input and output marked."""

    def call(self: Any, inputs, *args, **options):
        if issubclass(cls, nnx.BatchNorm) and not issubclass(cls, FrozenBatchNorm):
            given = (*args, options.get("use_running_average"))[0]
            if not (self.use_running_average if given is None else given):  # the batch's statistics
                return cls.__call__(self, inputs, *args, **options)
        if issubclass(cls, nnx.Einsum):
            given = (*args, options.get("einsum_str"))[0]
            if given is not None and given.replace(" ", "") != self.einsum_str:
                return cls.__call__(self, inputs, *args, **options)  # another map
        if issubclass(cls, _STANDARDISATIONS) and (args or options):
            return cls.__call__(self, inputs, *args, **options)  # with a mask
        inputs = _programs.mark_input(inputs, "layer", self.report_label)
        if issubclass(cls, SolverLayer) and options.get("skip") is not None:
            options["skip"] = _programs.mark_side(options["skip"], "layer", self.report_label)
        outputs = cls.__call__(self, inputs, *args, **options)
        return _programs.mark_output(outputs, "layer", self.report_label)

    return type(cls.__name__, (cls,), {"__call__": call})


def _part(layer: Any, call: _trace.Call, parameters: Sequence[Any]) -> _lipschitz.Part:
    """What the report needs of a layer for one call, given all of the network's parameters."""
    kind = type(layer).__name__
    path = call.slice_of(_indices(_weights(layer), parameters))
    if path is None:
        return _lipschitz.Part(kind)  # called with another kernel or scale
    layer = _slice_of(layer, path)
    if isinstance(layer, Equilibrium):
        inputs = jnp.zeros(call.input_shape)
        maps = tuple(unit.maps(inputs)[0] for unit in getattr(layer, "layers", [layer]))
        return _lipschitz.Part(kind, equilibrium=(layer.problem(inputs), maps))
    if isinstance(layer, _STANDARDISATIONS):
        return _lipschitz.Part(kind, standardised=_standardisation(layer, call.input_shape))
    if isinstance(layer, _NORMALISATIONS):
        if call.reads_others or not call.reads(layer.var[...]):
            return _lipschitz.Part(kind)  # with another variance
        scale = None if layer.scale is None else layer.scale[...]
        return _lipschitz.Part(
            kind,
            normalisation=(scale, layer.var[...], layer.epsilon),
            fold=layer.fold() if isinstance(layer, FrozenBatchNorm) else None,
            channels_last=layer.axis in (-1, len(call.input_shape) - 1),
        )
    linear_map_for = _LINEAR_MAPS[inherits_unchanged(type(layer), _LINEAR_MAPS)]
    fold = layer._fold() if isinstance(layer, SolverLayer) else None
    if fold is not None:
        if call.reads_others or not call.reads(fold[0]) or layer.output != "pre_activation":
            return _lipschitz.Part(kind)  # with another scale
        layer = nnx.clone(layer)
        layer.kernel[...] = layer._folded_kernel()
    try:
        linear_map = linear_map_for(layer, call.input_shape)
    except ValueError:
        return _lipschitz.Part(kind)
    if not isinstance(layer, SolverLayer):
        return _lipschitz.Part(kind, linear_map)
    constant, reference = (
        None if variable is None else variable[...]
        for variable in (layer.lipschitz, layer.reference)
    )
    return _lipschitz.Part(
        kind,
        linear_map,
        settings=_layers.Settings.of(layer),
        kept=constant,
        reference=reference,
        fold=fold,
    )


def _weights(layer: Any) -> list[Any]:
    """The parameters that a layer's constant depends on, or None in their place."""
    if isinstance(layer, Equilibrium):
        units = getattr(layer, "layers", [layer])
        return [weight for unit in units for weight in (unit.input_kernel, unit.kernel)]
    if isinstance(layer, _STANDARDISATIONS):
        return [layer.scale, getattr(layer, "bias", None)]
    return [layer.scale if isinstance(layer, _NORMALISATIONS) else layer.kernel]


def _indices(weights: Sequence[Any], parameters: Sequence[Any]) -> list[list[int]]:
    """Of each weight, its numbers among all parameters of the network."""
    own = [weight.get_value() for weight in weights if weight is not None]
    return [[i for i, array in enumerate(parameters) if array is one] for one in own]


def _slice_of(layer: Any, path: tuple[int, ...]) -> Any:
    """One layer of a stack."""
    if not path:
        return layer
    graph, state = nnx.split(layer)
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[path] if leaf.ndim else leaf, state))


def _standardisation(layer: Any, shape: tuple[int, ...]) -> _lipschitz.Standardisation:
    scale, bias = (
        None if weight is None else weight[...]
        for weight in (layer.scale, getattr(layer, "bias", None))
    )
    return _lipschitz.Standardisation(scale, bias, layer.epsilon, math.prod(shape))
