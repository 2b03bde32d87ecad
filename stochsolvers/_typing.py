"""Shared aliases, and the decorator that makes a class a value object."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform

import jax
import numpy as np
from jax.typing import ArrayLike

Array = jax.Array
Scalar = float | Array | np.ndarray | np.generic
StepSize = ArrayLike | Callable[[Array], ArrayLike]
"""A number, or k -> step size of iteration k = 0, 1, ... (k is a traced integer)."""

_T = TypeVar("_T")


def static_field(**kwargs: Any) -> Any:
    """Mark a field of a value object as structure: hashed, compared, never traced."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, static_field))
def value_object(cls: type[_T]) -> type[_T]:
    """Make `cls` a frozen dataclass and a JAX pytree.

    Fields are traced unless declared with `static_field`. The class's own `__post_init__` checks
    run when a user constructs the object and not when JAX rebuilds it with tracers, axis numbers
    or placeholders for leaves, so that `jit`, `vmap(in_axes=...)` and `eval_shape` pass through.
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
    data = tuple(f.name for f in fields if not f.metadata.get("static", False))
    static = tuple(f.name for f in fields if f.metadata.get("static", False))

    def flatten_with_keys(obj):
        children = tuple((jax.tree_util.GetAttrKey(name), getattr(obj, name)) for name in data)
        return children, tuple(getattr(obj, name) for name in static)

    def flatten(obj):
        children = tuple(getattr(obj, name) for name in data)
        return children, tuple(getattr(obj, name) for name in static)

    def unflatten(aux, children):
        obj = object.__new__(cls)
        for name, value in zip(data + static, (*children, *aux), strict=True):
            object.__setattr__(obj, name, value)
        return obj

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls
