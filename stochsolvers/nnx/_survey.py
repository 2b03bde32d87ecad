"""The layers, Dropouts and BatchNorms of an NNX model, marked in a trace of its forward pass."""

import functools
from typing import Any

import jax
from flax import nnx

from stochsolvers import surgery
from stochsolvers._typing import join_static, split_static
from stochsolvers.nnx._layers import SolverConv, SolverLinear
from stochsolvers.nnx._linear_general import SolverLinearGeneral
from stochsolvers.nnx._solver_layer import SolverLayer
from stochsolvers.nnx._spectral import SpectralNorm
from stochsolvers.reports._known_layers import inherits_unchanged
from stochsolvers.surgery._plan import Candidate

SOLVERS: dict[type, type[SolverLayer]] = {
    nnx.Linear: SolverLinear,
    nnx.Conv: SolverConv,
    nnx.LinearGeneral: SolverLinearGeneral,
}
_OTHERS = (nnx.ConvTranspose, nnx.Einsum, nnx.LoRA, nnx.LoRALinear)
_ATTRIBUTES = frozenset(
    (
        "solver", "prior", "ridge", "loss", "normalize", "output", "lipschitz", "reference", "rngs",
        "deterministic", "rng_collection", "fold_scale", "fold_shift", "folds", "spatial_shape",
    )
)  # fmt: skip
_WRAPPERS = (nnx.SpectralNorm, nnx.WeightNorm, SpectralNorm)
_PADDINGS = ("SAME", "VALID", "CIRCULAR")
NORM, DROPOUT = nnx.BatchNorm, nnx.Dropout


def name(path: tuple[Any, ...]) -> str:
    """The path of a module as text: blocks.0.conv1."""
    return ".".join(map(str, path)) or "(model)"


def modules_of(model: nnx.Module) -> dict[str, nnx.Module]:
    """All modules by path, in the order of the model's attributes."""
    return {name(path): module for path, module in nnx.iter_modules(model)}


def survey(model: nnx.Module, inputs: Any, options: dict[str, Any]) -> surgery.Survey:
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

    return surgery.survey(forward, state, traced)


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
        inputs = surgery.mark_input(inputs, kind, self.surgery_label)
        outputs = inputs if kind == "dropout" else cls.__call__(self, inputs, *args, **options)
        return surgery.mark_output(outputs, kind, self.surgery_label)

    return type(cls.__name__, (cls,), {"__call__": call})


def _is_plain_norm(args: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """Whether a BatchNorm is called with its running statistics on the whole input."""
    given = (*args, options.get("use_running_average"))[0]
    return (given is None or bool(given)) and options.get("mask") is None


def candidates(model: nnx.Module, chosen: dict[str, surgery.Chosen]) -> dict[str, Candidate]:
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
            kind = rewritten[id(module)]
            reason = f"its kernel is another one at each call, made by {kind}: remove that first"
        found[path] = Candidate(type(module).__name__, reason, stack_shape(module) != ())
    return found


def _obstacle(module: Any) -> str:
    """What is against a solver in a module's place, whatever surrounds it."""
    if isinstance(module, SolverLayer):
        return "it is a solver layer already; restore_layers makes it a plain one"
    if isinstance(module, nnx.ConvTranspose):
        return "it is a transposed convolution, for which there is no solver layer"
    if isinstance(module, nnx.LoRA | nnx.LoRALinear):
        return "its call adds a low-rank product to the kernel's: merge it into the kernel first"
    base = next((kind for kind in SOLVERS if isinstance(module, kind)), None)
    if base is None:
        return f"it is no {', '.join(f'nnx.{kind.__name__}' for kind in SOLVERS)}"
    if inherits_unchanged(type(module), (base,)) is None:
        return f"its class {type(module).__name__} has methods of its own, which would be lost"
    taken = sorted(_ATTRIBUTES.intersection(vars(module)))
    if taken:
        return f"it has an attribute {taken[0]!r} of its own, which a solver layer needs"
    reason = _options_obstacle(module)
    if not reason and isinstance(module, nnx.LinearGeneral):
        axes = tuple(axis if axis < 0 else None for axis in module.axis)
        if module.batch_axis or axes != tuple(range(-len(axes), 0)):
            reason = "it contracts other axes than the last ones, or has batch axes"
    return reason


def _options_obstacle(module: Any) -> str:
    defaults = {
        "dot_general": (None, jax.lax.dot_general),
        "conv_general_dilated": (None, jax.lax.conv_general_dilated),
        "dot_general_cls": (None,),
        "preferred_element_type": (None,),
        "mask": (None,),
    }
    for option, values in defaults.items():
        given = getattr(module, option, None)
        if not any(given is value for value in values):
            return f"it has the option {option}, which a solver layer does not support"
    padding = getattr(module, "padding", None)
    if isinstance(padding, str) and padding.upper() not in _PADDINGS:
        return f"it has the padding {padding!r}, which a solver layer does not support"
    dilation = getattr(module, "input_dilation", None)
    if dilation is not None and any(
        d != 1 for d in ([dilation] if isinstance(dilation, int) else dilation)
    ):
        return "it has the option input_dilation, which a solver layer does not support"
    return ""


def kernel_ndim(layer: Any) -> int:
    """The number of axes of the kernel of one layer."""
    if isinstance(layer, nnx.Conv):
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
    if not isinstance(layer, nnx.Conv):
        return None
    rank = len(layer.kernel_size)
    return tuple(input_shape[-rank - 1 : -1])
