"""A network in which solvers run in place of some layers, by interception of their calls."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, cast

import jax
from flax import linen as nn

from stochsolvers import _layers
from stochsolvers._typing import Array
from stochsolvers.linen._conv_transpose import SolverConvTranspose
from stochsolvers.linen._following import FollowingNorm, Path
from stochsolvers.linen._layers import (
    SolverConv,
    SolverDense,
    SolverDenseGeneral,
    SolverLayer,
)
from stochsolvers.reports._known_layers import inherits_unchanged

TWINS: dict[type, Any] = {
    nn.Dense: SolverDense,
    nn.Conv: SolverConv,
    nn.ConvTranspose: SolverConvTranspose,
    nn.DenseGeneral: SolverDenseGeneral,
}


@dataclasses.dataclass(frozen=True)
class Replacement:
    """What runs in place of one layer.

    Attributes:
      path: of the layer within the network.
      settings: of the solver.
      following: the batch normalisation behind it that is folded in, or None.
      dropouts: the paths of the Dropouts before it, which pass their inputs through; where there are any, the
        solver samples if they would.
      rng_collection: the random stream of the sampling.
    """

    path: Path
    settings: _layers.Settings
    following: FollowingNorm | None = None
    dropouts: tuple[Path, ...] = ()
    rng_collection: str = "dropout"


@dataclasses.dataclass(frozen=True)
class Plain:
    """A module that Linen does not make a part of the module that holds it."""

    module: nn.Module


class ReplacedLayers(nn.Module):
    """A network with solvers in place of some layers; made by `replace_layers`.

    Its variables are those of the network, at the same paths, with the solvers' constants as "solver_state".
    `apply` and `init` take the methods of the network, by name or as functions.

    Attributes:
      network: the network; `module` is itself.
      layers: what runs in place of which layer.
    """

    network: Plain
    layers: tuple[Replacement, ...]

    @property
    def module(self) -> nn.Module:
        """The network, not bound to variables."""
        return self.network.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """That of the network."""
        return self.call_method(type(self.network.module).__call__, *args, **kwargs)  # pyright: ignore

    def call_method(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A method of the network's class, of the network with its solvers."""
        # on this module's own scope, so that the variables have the paths that they have without it
        bound = self.network.module.clone(parent=cast(Any, self.scope).rewound())
        with replacing(self.path, self.layers):
            return method(bound, *args, **kwargs)

    @nn.nowrap
    def apply(self, variables: Any, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        """As `nn.Module.apply`."""
        return super().apply(variables, *args, method=self._own(method), **kwargs)

    @nn.nowrap
    def init_with_output(self, rngs: Any, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        """As `nn.Module.init_with_output`, which `init` calls."""
        return super().init_with_output(rngs, *args, method=self._own(method), **kwargs)

    @nn.nowrap
    def _own(self, method: Any) -> Any:
        """A method of this module that calls one of the network."""
        if method is None:
            return None
        if isinstance(method, str):
            method = getattr(type(self.network.module), method)
        method = getattr(method, "__func__", method)
        return lambda self, *args, **kwargs: self.call_method(method, *args, **kwargs)


# Of JAX's cache of traced functions: what `nn.jit` has traced of the plain network is not that of its twin.
_traced_for = jax.make_user_context(None)


class _Key:
    """Replacements as a part of that cache's keys."""

    def __init__(self, prefix: Path, layers: tuple[Replacement, ...]):
        self.layers = (prefix, layers)
        try:
            self.number = hash(self.layers)
        except TypeError:  # arrays in a solver or a prior
            self.layers, self.number = id(layers), id(layers)

    def __hash__(self) -> int:
        return self.number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.layers == other.layers


@contextlib.contextmanager
def fresh_traces() -> Iterator[None]:
    """Within it, JAX traces jitted functions afresh, with the interceptors at hand."""
    with _traced_for(object()):
        yield


_replaced: contextvars.ContextVar[frozenset[Path]] = contextvars.ContextVar(
    "_replaced", default=frozenset()
)


@contextlib.contextmanager
def _replaced_at(paths: frozenset[Path]) -> Iterator[None]:
    token = _replaced.set(_replaced.get() | paths)
    try:
        yield
    finally:
        _replaced.reset(token)


def is_replaced(layer: nn.Module) -> bool:
    """Whether a layer's call is that of a solver in the pass at hand."""
    return not isinstance(layer, SolverLayer) and layer.path in _replaced.get()


def takes_a_place(layer: nn.Module) -> bool:
    """Whether a solver runs in place of a layer in the pass at hand."""
    return isinstance(layer, SolverLayer) and layer.path in _replaced.get()


@contextlib.contextmanager
def replacing(prefix: Path, layers: tuple[Replacement, ...]) -> Iterator[None]:
    """Within it, calls of these layers of the network at `prefix` are those of their solvers."""
    by_path = {prefix + one.path: one for one in layers}
    norms = frozenset(
        one.following.absolute(prefix + one.path) for one in layers if one.following is not None
    )
    dropouts = frozenset(prefix + path for one in layers for path in one.dropouts)
    would_sample: dict[Path, bool] = {}  # of the Dropouts, in the pass at hand

    def intercept(call, args, kwargs, context):
        layer: Any = context.module
        if context.method_name != "__call__" or layer.scope is None:
            return call(*args, **kwargs)
        path = layer.path
        if path in by_path and base_of(layer) is not None:
            own = by_path[path]
            flags = [would_sample.get(prefix + one) for one in own.dropouts]
            samples = any(flags) if flags else None
            return _solve(layer, own, call, samples, *args, **kwargs)
        if path in norms and isinstance(layer, nn.BatchNorm) and not layer.is_initializing():
            return _frozen(layer, call, *args, **kwargs)
        if path in dropouts and isinstance(layer, nn.Dropout):
            given = args[1] if len(args) > 1 else kwargs.get("deterministic")
            would_sample[path] = not nn.merge_param("deterministic", layer.deterministic, given)
            return args[0] if args else kwargs["inputs"]
        return call(*args, **kwargs)

    with (
        _traced_for(_Key(prefix, layers)),
        _replaced_at(frozenset(by_path)),
        nn.intercept_methods(intercept),
    ):
        yield


def _solve(
    layer: Any, own: Replacement, call: Callable[..., Array], samples: bool | None, inputs: Array
) -> Array:
    """The call of the solver in place of a layer, on the layer's variables.

    Args:
      layer: bound to variables.
      own: what runs in place of it.
      call: the layer's.
      samples: whether the Dropouts before it would sample; None where there are none.
      inputs: of the layer.
    """
    if samples is None:
        samples = layer.has_rng(own.rng_collection)
    if layer.is_initializing():
        samples = False
    twin = twin_of(layer, own, parent=layer.scope.rewound())
    output = twin(inputs, deterministic=not samples)
    return twin.in_its_place(inputs, output, lambda: call(inputs))


def base_of(layer: Any) -> Any:
    """The class of Flax whose call a layer has, if that is one with a solver twin."""
    return inherits_unchanged(type(layer), tuple(TWINS))


def twin_of(layer: Any, own: Replacement, *, parent: Any = None) -> Any:
    """The solver in place of a layer, with the scope `parent` or none."""
    settings = own.settings
    options = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    options |= {"rng_collection": own.rng_collection, "following": own.following}
    return TWINS[base_of(layer)].from_layer(layer, **options, parent=parent, name=None)


def _frozen(norm: nn.BatchNorm, call: Callable[..., Any], x: Array, *args: Any, **kwargs: Any):
    """A normalisation behind a solver, with its running statistics whatever it is asked to do."""
    if norm.use_running_average is True:
        return call(x)
    copy = norm.clone(parent=norm.scope.rewound(), use_running_average=True)  # pyright: ignore
    return copy(x)
