"""Modules that change their class in place, keeping their variables: what surgery on a model is made of."""

from collections.abc import Iterable
from typing import Any

from flax import nnx

from stochsolvers.surgery import _fold


class AbsorbedDropout(nnx.Dropout):
    """A Dropout whose rate the solver behind it has taken over: its input, unchanged."""

    def __call__(self, inputs: Any, **options: Any) -> Any:
        """The input."""
        return inputs


class FrozenBatchNorm(nnx.BatchNorm):
    """A BatchNorm that is folded into the solver before it: with its running statistics, always."""

    def __call__(self, x: Any, *args: Any, **options: Any) -> Any:
        """The normalised input, as in evaluation."""
        return nnx.BatchNorm.__call__(self, x, use_running_average=True)

    def fold(self) -> tuple[Any, Any]:
        """(s, t) of y ↦ s y + t."""
        scale, bias = (None if one is None else one[...] for one in (self.scale, self.bias))
        return _fold.affine(self.mean[...], self.var[...], scale, bias, self.epsilon)


def become(module: Any, cls: type) -> None:
    """Change the class of a module in place. What is set afterwards is to be named by `keep_track`."""
    module.replaced_class, module.added_names = type(module), ()
    object.__setattr__(module, "__class__", cls)


def keep_track(module: Any, names: Iterable[str]) -> None:
    """The names of the attributes that a change of class has added."""
    module.added_names = tuple(sorted(set(names) - {"replaced_class", "added_names"}))


def restore(module: Any) -> None:
    """Give a module its class back, and drop what was added."""
    plain = getattr(module, "replaced_class", None)
    if plain is None:
        return
    for name in (*module.added_names, "replaced_class", "added_names"):
        delattr(module, name)
    object.__setattr__(module, "__class__", plain)


def refresh_folds(model: nnx.Module) -> None:
    """Fold the present parameters and statistics of BatchNorms into the solvers before them.

    A layer names its BatchNorm by its path at the time of the surgery; the model may have become part of a
    larger one since.
    """
    pairs = [(tuple(map(str, path)), module) for path, module in nnx.iter_modules(model)]
    norms = [(path, module) for path, module in pairs if isinstance(module, FrozenBatchNorm)]
    for path, layer in pairs:
        link = tuple(getattr(layer, "folds", None) or ())
        matching = [pair for pair in norms if link and pair[0][-len(link) :] == link]
        if matching:
            _, norm = max(matching, key=lambda pair: _common(pair[0], path))
            layer.fold_scale[...], layer.fold_shift[...] = norm.fold()  # pyright: ignore


def _common(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    """The length of the common beginning of two paths."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
