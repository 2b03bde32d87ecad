"""The modules of a Linen network by path, and its layers, Dropouts and BatchNorms marked in a trace."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from stochsolvers import _checks, _programs
from stochsolvers._typing import join_static, split_static
from stochsolvers.linen._evaluation import in_evaluation
from stochsolvers.linen._following import Path
from stochsolvers.linen._layers import SolverLayer, linear_map_of
from stochsolvers.linen._replaced import TWINS, ReplacedLayers, fresh_traces
from stochsolvers.linen._spectral import SpectralNorm
from stochsolvers.reports._known_layers import inherits_unchanged
from stochsolvers.surgery import _obstacles
from stochsolvers.surgery._plan import Candidate
from stochsolvers.surgery._survey import Survey
from stochsolvers.surgery._survey import survey as survey_of
from stochsolvers.surgery._where import Chosen

_OTHERS = (nn.ConvLocal, nn.Einsum, SolverLayer)
_WRAPPERS: dict[type, str] = {
    nn.SpectralNorm: "nn.SpectralNorm",
    nn.WeightNorm: "nn.WeightNorm",
    SpectralNorm: "ss.linen.SpectralNorm",
}


@dataclasses.dataclass
class Network:
    """What a forward pass shows of a network.

    Attributes:
      modules: by path as text, in the order of their first calls.
      survey: what stands around its layers.
      roots: by path, the number of modules that contain both a module and the lifted transforms around it.
      traces: by path, what JAX traces while a module is called: the network, or a lifted transform in it.
      rewritten: the wrappers that call a layer with another kernel, by the layer's path.
      variables: of the network, by path as text.
    """

    modules: dict[str, Any]
    survey: Survey
    roots: dict[str, int]
    traces: dict[str, list[Any]]
    rewritten: dict[str, str]
    variables: dict[str, Any]


def name(path: Path) -> str:
    """A path as text: blocks_0/Conv_0."""
    return "/".join(path) or "(model)"


def path_of(label: str) -> Path:
    """The path of such a text."""
    return () if label == "(model)" else tuple(label.split("/"))


def look(
    module: nn.Module,
    variables: Mapping[str, Any],
    inputs: tuple[Any, ...],
    options: dict[str, Any],
    rngs: Mapping[str, Any] | None,
) -> Network:
    """Trace a forward pass; nothing is computed."""
    if isinstance(module, ReplacedLayers):
        _checks.fail("module", "a plain network (see restore_layers)", "one with replaced layers")
    modules: dict[str, Any] = {}
    roots: dict[str, int] = {}
    traces: dict[str, list[Any]] = {}
    rewritten: dict[str, str] = {}
    wrappers: list[str] = []

    def mark(call, args, kwargs, context):
        one: Any = context.module
        if context.method_name != "__call__" or one.scope is None:
            return call(*args, **kwargs)
        label = name(one.path)
        modules.setdefault(label, one)
        roots.setdefault(label, _root(one.scope))
        trace, seen = one.scope.root.trace_level, traces.setdefault(label, [])
        if trace not in seen:
            seen.append(trace)
        if isinstance(one, tuple(_WRAPPERS)):
            wrappers.append(_WRAPPERS.get(type(one), type(one).__name__))
            try:
                return call(*args, **kwargs)
            finally:
                wrappers.pop()
        if wrappers:
            rewritten.setdefault(label, wrappers[-1])
        args, kwargs = inputs_first(args, kwargs)
        kind = _kind(one, args, kwargs)
        if kind is None or not args:
            return call(*args, **kwargs)
        marked = _programs.mark_input(args[0], kind, label)
        output = marked if kind == "dropout" else call(marked, *args[1:], **kwargs)
        return _programs.mark_output(output, kind, label)

    traced, static = split_static((inputs, options))

    def forward(variables: Any, rngs: Any, traced: Any, mutable: Any) -> Any:
        inputs, options = join_static(traced, static)
        traces.clear()  # of a pass that failed
        with fresh_traces(), nn.intercept_methods(mark):
            return module.apply(variables, *inputs, rngs=rngs, mutable=mutable, **options)[0]

    def surveyed(mutable: Any) -> Survey:
        return survey_of(functools.partial(forward, mutable=mutable), dict(variables), rngs, traced)

    survey = in_evaluation(surveyed)
    flat = traverse_util.flatten_dict(cast(Any, nn.unbox(dict(variables))), sep="/")
    return Network(modules, survey, roots, traces, rewritten, flat)


def inputs_first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The arguments of a layer's call, its inputs by position where they are given by name."""
    if args or "inputs" not in kwargs:
        return args, kwargs
    return (kwargs["inputs"],), {name: one for name, one in kwargs.items() if name != "inputs"}


def _root(scope: Any) -> int:
    """How many modules contain the outermost scope that can be reached from one."""
    while scope.parent is not None:
        scope = scope.parent
    return len(scope.path)


def _kind(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    if isinstance(module, nn.BatchNorm):
        given = (*args[1:], kwargs.get("use_running_average"))[0]
        known = inherits_unchanged(type(module), (nn.BatchNorm,)) and module.axis == -1
        given = module.use_running_average if given is None else given
        return "norm" if known and given and kwargs.get("mask") is None else None
    if isinstance(module, nn.Dropout):
        known = inherits_unchanged(type(module), (nn.Dropout,)) and module.rate > 0
        return "dropout" if known else None
    return "layer" if isinstance(module, (*TWINS, *_OTHERS)) else None


def candidates(network: Network, chosen: Mapping[str, Chosen]) -> dict[str, Candidate]:
    """The linear layers among the modules that are meant, each with what is against it."""
    found = {}
    for label, (module, named) in chosen.items():
        if not isinstance(module, (*TWINS, *_OTHERS)) and not named:
            continue
        kind = type(module).__name__
        reason = _obstacle(module)
        if label in network.rewritten and not reason:
            reason = _obstacles.of_wrapper(network.rewritten[label])
        reason = reason or _far_norm(network, label) or _map_obstacle(network, label)
        found[label] = Candidate(kind, reason, _stacked(network, label))
    return found


def _far_norm(network: Network, label: str) -> str:
    """Whether the normalisation behind a layer is outside of a transform around the layer."""
    for call in network.survey.layers:
        if call.label == label and call.normalization is not None:
            own, norm = path_of(label), path_of(call.normalization)
            common = next(
                (i for i, (a, b) in enumerate(zip(own, norm, strict=False)) if a != b),
                min(len(own), len(norm)),
            )
            if common < max(network.roots[label], network.roots[call.normalization]):
                return (
                    f"the BatchNorm {call.normalization!r} behind it is outside of the nn.scan, nn.vmap, "
                    "nn.remat or nn.jit around it"
                )
    return ""


def apart(network: Network, dropout: str, layer: str) -> str:
    """Whether a transform is around a Dropout and not around a layer behind it, or the other way round.

    The solver learns while JAX traces whether the Dropout samples; of a program that `nn.jit` keeps it would
    learn that once.
    """
    if network.traces[dropout] == network.traces[layer]:
        return ""
    return "an nn.jit, nn.remat, nn.vmap, nn.scan or the like is around one of the two alone"


def _map_obstacle(network: Network, label: str) -> str:
    """Why the library has no linear map for a layer, or ""."""
    calls = [call for call in network.survey.layers if call.label == label]
    shape, ndim = _kernel_shape(network, label), kernel_ndim(network.modules[label])
    if not calls or shape is None or ndim is None:
        return ""
    kernel = jax.ShapeDtypeStruct(shape[len(shape) - ndim :], jnp.float32)
    layer, inputs = network.modules[label], calls[0].input_shape
    try:
        jax.eval_shape(lambda kernel: linear_map_of(layer, kernel, inputs), kernel)
    except ValueError as error:
        return str(error).rstrip(".")
    return ""


def _stacked(network: Network, label: str) -> bool:
    shape, ndim = _kernel_shape(network, label), kernel_ndim(network.modules[label])
    return shape is not None and ndim is not None and len(shape) > ndim


def _kernel_shape(network: Network, label: str) -> tuple[int, ...] | None:
    kernel = network.variables.get("/".join(("params", *path_of(label), "kernel")))
    return None if kernel is None else jnp.shape(kernel)


def kernel_ndim(layer: Any) -> int | None:
    """The number of axes of the kernel of one layer."""
    if isinstance(layer, nn.Conv | nn.ConvTranspose):
        return (1 if isinstance(layer.kernel_size, int) else len(layer.kernel_size)) + 2
    if isinstance(layer, nn.DenseGeneral):
        sizes = layer.axis, layer.features
        return sum(1 if isinstance(size, int) else len(size) for size in sizes)
    return 2 if isinstance(layer, nn.Dense) else None


def _obstacle(module: Any) -> str:
    """What is against a solver in a module's place, whatever surrounds it."""
    if isinstance(module, SolverLayer):
        return _obstacles.ALREADY
    reason = _obstacles.of_class(module, TWINS, "nn") or _obstacles.of_options(module)
    if not reason and isinstance(module, nn.DenseGeneral):
        reason = _obstacles.of_contraction(module.axis, tuple(module.batch_dims))
    return reason
