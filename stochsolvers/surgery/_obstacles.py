"""Why no solver can take a layer's place, whatever surrounds it: the sentences of both front ends."""

from collections.abc import Collection
from typing import Any

import jax

from stochsolvers.reports._known_layers import inherits_unchanged

ALREADY = "it is a solver layer already"
LOW_RANK = "its call adds a low-rank product to the kernel's: merge it into the kernel first"
_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "dot_general": (None, jax.lax.dot_general),
    "conv_general_dilated": (None, jax.lax.conv_general_dilated),
    "dot_general_cls": (None,),
    "conv_general_dilated_cls": (None,),
    "preferred_element_type": (None,),
    "mask": (None,),
}
_PADDINGS = ("SAME", "VALID", "CIRCULAR", "CAUSAL")


def of_class(module: Any, kinds: Collection[type], room: str) -> str:
    """Whether a module is of none of the kinds of layers, or of a class with methods of its own; "" if not.

    Args:
      module: of the network.
      kinds: that have a solver layer.
      room: how Flax's users call their module, "nnx" or "nn".
    """
    base = next((kind for kind in kinds if isinstance(module, kind)), None)
    if base is None:
        return f"it is no {', '.join(f'{room}.{kind.__name__}' for kind in kinds)}"
    if inherits_unchanged(type(module), (base,)) is None:
        return f"its class {type(module).__name__} has methods of its own, which would be lost"
    return ""


def of_options(module: Any) -> str:
    """The option of a layer that a solver layer does not support, or ""."""
    for option, values in _DEFAULTS.items():
        given = getattr(module, option, None)
        if not any(given is value for value in values):
            return f"it has the option {option}, which a solver layer does not support"
    padding = getattr(module, "padding", None)
    if isinstance(padding, str) and padding.upper() not in _PADDINGS:
        return f"it has the padding {padding!r}, which a solver layer does not support"
    dilation = getattr(module, "input_dilation", None)
    if dilation is not None and any(d != 1 for d in jax.tree.leaves(dilation)):
        return "it has the option input_dilation, which a solver layer does not support"
    return ""


def of_contraction(axes: Any, groups: Any) -> str:
    """Whether a general dense layer contracts other axes than the last ones, or has groups; "" if not."""
    axes = (axes,) if isinstance(axes, int) else tuple(axes)
    if not groups and axes == tuple(range(-len(axes), 0)):
        return ""
    return "it contracts other axes than the last ones, or has batch axes"


def of_wrapper(wrapper: str) -> str:
    """That a module calls the layer with kernels that it makes."""
    return f"its kernel is another one at each call, made by {wrapper}: remove that first"
