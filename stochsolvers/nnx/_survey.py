"""The layers, Dropouts and BatchNorms of an NNX model, marked in a trace of its forward pass."""

import functools
from typing import Any

from flax import nnx

from stochsolvers import _programs
from stochsolvers._typing import join_static, split_static
from stochsolvers.nnx._conv_transpose import SolverConvTranspose
from stochsolvers.nnx._layers import SolverConv, SolverLinear
from stochsolvers.nnx._linear_general import SolverLinearGeneral
from stochsolvers.nnx._solver_layer import SolverLayer
from stochsolvers.nnx._spectral import SpectralNorm
from stochsolvers.reports._known_layers import inherits_unchanged
from stochsolvers.surgery import _obstacles
from stochsolvers.surgery._plan import Candidate
from stochsolvers.surgery._survey import Survey
from stochsolvers.surgery._survey import survey as survey_of
from stochsolvers.surgery._where import Chosen

SOLVERS: dict[type, type[SolverLayer]] = {
    nnx.Linear: SolverLinear,
    nnx.Conv: SolverConv,
    nnx.ConvTranspose: SolverConvTranspose,
    nnx.LinearGeneral: SolverLinearGeneral,
}
_OTHERS = (nnx.Einsum, nnx.LoRA, nnx.LoRALinear)
_ATTRIBUTES = frozenset(
    (
        "solver", "prior", "ridge", "loss", "normalize", "output", "lipschitz", "reference", "rngs",
        "deterministic", "rng_collection", "fold_scale", "fold_shift", "folds", "spatial_shape",
    )
)  # fmt: skip
_WRAPPERS = (nnx.SpectralNorm, nnx.WeightNorm, SpectralNorm)
NORM, DROPOUT = nnx.BatchNorm, nnx.Dropout


def name(path: tuple[Any, ...]) -> str:
    """The path of a module as text: blocks.0.conv1."""
    return ".".join(map(str, path)) or "(model)"


def modules_of(model: nnx.Module) -> dict[str, nnx.Module]:
    """All modules by path, in the order of the model's attributes."""
    return {name(path): module for path, module in nnx.iter_modules(model)}


def survey(model: nnx.Module, inputs: Any, options: dict[str, Any]) -> Survey:
    """Trace the model in evaluation, with its layers, Dropouts and BatchNorms marked; it is unchanged."""
    graph, state = nnx.split(model)
    traced, static = split_static((inputs, options))

    def forward(state: Any, traced: Any) -> Any:
        copy = nnx.merge(graph, state, copy=True)
        copy.eval()
        for path, module in list(nnx.iter_modules(copy)):
            kind = _kind(module)
            if kind is not None:
                module.surgery_label = name(path)  # pyright: ignore[reportAttributeAccessIssue]
                object.__setattr__(module, "__class__", _marking(type(module), kind))
        inputs, options = join_static(traced, static)
        return copy(*inputs, **options)  # pyright: ignore[reportCallIssue]

    return survey_of(forward, state, traced)


def _kind(module: Any) -> Any:
    if isinstance(module, NORM):
        known = inherits_unchanged(type(module), (NORM,)) and module.axis in (-1,)
        return "norm" if known else None
    if isinstance(module, DROPOUT):
        known = inherits_unchanged(type(module), (DROPOUT,))
        return "dropout" if known and module.rate > 0 else None
    return "layer" if isinstance(module, (*SOLVERS, *_OTHERS)) else None


@functools.cache
def _marking(cls: Any, kind: Any) -> Any:
    """The class of a module, with the input and output of its calls marked."""

    def call(self: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        if kind == "norm" and not _is_plain_norm(args, options):
            return cls.__call__(self, inputs, *args, **options)
        if kind == "dropout" and options.get("deterministic"):
            return inputs
        inputs = _programs.mark_input(inputs, kind, self.surgery_label)
        outputs = inputs if kind == "dropout" else cls.__call__(self, inputs, *args, **options)
        return _programs.mark_output(outputs, kind, self.surgery_label)

    return type(cls.__name__, (cls,), {"__call__": call})


def _is_plain_norm(args: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """Whether a BatchNorm is called with its running statistics on the whole input."""
    given = (*args, options.get("use_running_average"))[0]
    return (given is None or bool(given)) and options.get("mask") is None


def candidates(model: nnx.Module, chosen: dict[str, Chosen]) -> dict[str, Candidate]:
    """The linear layers among the modules that are meant, each with what is against it."""
    rewritten: dict[int, str] = {}
    for _, module in nnx.iter_modules(model):
        if isinstance(module, _WRAPPERS):
            kind = type(module).__name__
            rewritten |= {id(inner): kind for _, inner in nnx.iter_modules(module)}
    found = {}
    for path, (module, named) in chosen.items():
        layers = (*SOLVERS, *_OTHERS)
        if not isinstance(module, layers) and not named:
            continue
        reason = _obstacle(module)
        if id(module) in rewritten and not reason:
            reason = _obstacles.of_wrapper(rewritten[id(module)])
        found[path] = Candidate(type(module).__name__, reason, stack_shape(module) != ())
    return found


def _obstacle(module: Any) -> str:
    """What is against a solver in a module's place, whatever surrounds it."""
    if isinstance(module, SolverLayer):
        return f"{_obstacles.ALREADY}; restore_layers makes it a plain one"
    if isinstance(module, nnx.LoRA | nnx.LoRALinear):
        return _obstacles.LOW_RANK
    reason = _obstacles.of_class(module, SOLVERS, "nnx")
    if reason:
        return reason
    taken = sorted(_ATTRIBUTES.intersection(vars(module)))
    if taken:
        return f"it has an attribute {taken[0]!r} of its own, which a solver layer needs"
    reason = _obstacles.of_options(module)
    if not reason and isinstance(module, nnx.LinearGeneral):
        reason = _obstacles.of_contraction(module.axis, module.batch_axis)
    return reason


def kernel_ndim(layer: Any) -> int:
    """The number of axes of the kernel of one layer."""
    if isinstance(layer, nnx.Conv | nnx.ConvTranspose):
        return len(layer.kernel_size) + 2
    if isinstance(layer, nnx.LinearGeneral):
        return len(layer.in_features) + len(layer.out_features)
    return 2


def stack_shape(layer: Any) -> tuple[int, ...]:
    """The leading axes of a stack of layers, as `nnx.vmap` makes it; () for one layer."""
    if not isinstance(layer, tuple(SOLVERS)):
        return ()
    shape = layer.kernel[...].shape
    return tuple(shape[: len(shape) - kernel_ndim(layer)])


def spatial_shape(layer: Any, input_shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The pixels of a convolution's inputs; None for another layer."""
    if not isinstance(layer, nnx.Conv | nnx.ConvTranspose):
        return None
    rank = len(layer.kernel_size)
    return tuple(input_shape[-rank - 1 : -1])
