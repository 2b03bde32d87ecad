"""Layers of other classes that hold the very same parameter variables."""

from typing import Any

import jax
from flax import nnx

from stochsolvers import _checks

_SIZES = ("in_features", "out_features")
_ARGUMENTS: dict[type, tuple[str, ...]] = {
    nnx.Linear: _SIZES,
    nnx.LinearGeneral: _SIZES,
    nnx.Conv: (*_SIZES, "kernel_size", "strides"),
    nnx.ConvTranspose: (*_SIZES, "kernel_size", "strides"),
}
_COMMON = (
    "use_bias", "dtype", "param_dtype", "precision", "promote_dtype", "preferred_element_type",
)  # fmt: skip
_OPTIONS: dict[type, tuple[str, ...]] = {
    nnx.Linear: ("dot_general",),
    nnx.LinearGeneral: ("axis", "dot_general", "dot_general_cls", "batch_axis"),
    nnx.Conv: (
        "padding", "input_dilation", "kernel_dilation", "feature_group_count", "mask", "conv_general_dilated",
    ),
    nnx.ConvTranspose: ("padding", "kernel_dilation", "mask", "transpose_kernel"),
}  # fmt: skip


def twin_of(layer: Any, kind: type, cls: Any, own: type, **options: Any) -> Any:
    """A layer of a class, with the sizes, options, kernel and bias of a plain one.

    Args:
      layer: the plain one.
      kind: its class in `nnx`.
      cls: the class of the twin, which is built as `kind` is.
      own: the class that the twin has its call from.
      **options: of the twin beside the plain layer's, with its `rngs`.

    Raises:
      ValueError: for another class, and for a subclass with a call of its own, which would be lost.
    """
    known: Any = (kind, own)
    if not isinstance(layer, kind) or type(layer).__call__ not in [one.__call__ for one in known]:
        got = f"the class {layer.__name__}" if isinstance(layer, type) else type(layer).__name__
        _checks.fail("layer", f"an nnx.{kind.__name__} without a call of its own", got)
    arguments = (getattr(layer, name) for name in _ARGUMENTS[kind])
    kept = {name: getattr(layer, name) for name in (*_COMMON, *_OPTIONS[kind])}
    twin = cls(*arguments, kernel_init=jax.nn.initializers.zeros, **kept, **options)
    twin.kernel, twin.bias = layer.kernel, layer.bias if layer.use_bias else nnx.data(None)
    return twin
