"""Shared aliases, and the decorator that makes a class a value object."""

import dataclasses
import functools
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Scalar = float | Array

_T = TypeVar("_T")


def static_field(**kwargs: Any) -> Any:
    """Mark a field of a value object as structure: hashed, compared, never traced."""
    return dataclasses.field(metadata={"role": "static"}, **kwargs)


def count_field(**kwargs: Any) -> Any:
    """Mark a field that is structure as a Python number, and traced as an array."""
    return dataclasses.field(metadata={"role": "count"}, **kwargs)


@dataclass_transform(
    frozen_default=True, field_specifiers=(static_field, count_field, dataclasses.field)
)
def value_object(cls: type[_T]) -> type[_T]:
    """Make `cls` a frozen dataclass and a JAX pytree.

    Fields are traced unless declared with `static_field` or `count_field`. The class's own
    `__post_init__` checks run when a user constructs the object and not when JAX rebuilds it with
    tracers, axis numbers or placeholders for leaves, so that `jit`, `vmap(in_axes=...)` and
    `eval_shape` pass through.

    Two objects are equal if their fields are, types included: a count 1 is not a fraction 1.0. Of an array
    with axes `repr` has the dtype and the shape, as in Dense(kernel=float32[64, 32]).
    """
    own_repr = "__repr__" in vars(cls)
    cls = dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
    roles = {
        field.name: field.metadata.get("role", "data")
        for field in dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
    }

    def is_data(name, value):
        role = roles[name]
        return role == "data" or (role == "count" and isinstance(value, jax.Array | np.ndarray))

    def flatten_with_keys(obj):
        values = [(name, getattr(obj, name)) for name in roles]
        data = [(name, value) for name, value in values if is_data(name, value)]
        static = [(name, type(v), v) for name, v in values if not is_data(name, v)]
        children = tuple((jax.tree_util.GetAttrKey(name), value) for name, value in data)
        return children, (tuple(name for name, _ in data), tuple(static))

    def flatten(obj):
        children, structure = flatten_with_keys(obj)
        return tuple(value for _, value in children), structure

    def unflatten(structure, children):
        names, static = structure
        obj = object.__new__(cls)
        for name, value in zip(names, children, strict=True):
            object.__setattr__(obj, name, value)
        for name, _, value in static:
            object.__setattr__(obj, name, value)
        return obj

    def fields_of(obj):
        return tuple((type(value), value) for value in (getattr(obj, name) for name in roles))

    def equal(self, other):
        if type(self) is not type(other):
            return NotImplemented
        return all(
            mine is theirs or (kind is other_kind and bool(np.array_equal(mine, theirs)))
            for (kind, mine), (other_kind, theirs) in zip(
                fields_of(self), fields_of(other), strict=True
            )
        )

    def represented(self):
        fields = (f"{name}={_represented(getattr(self, name))}" for name in roles)
        return f"{type(self).__qualname__}({', '.join(fields)})"

    if not own_repr:
        cls.__repr__ = represented  # pyright: ignore[reportAttributeAccessIssue]
    cls.__eq__ = equal  # pyright: ignore[reportAttributeAccessIssue]
    cls.__hash__ = lambda self: hash((cls, fields_of(self)))  # pyright: ignore
    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def _represented(value: Any) -> str:
    """A field of a value object: of an array the dtype and shape, or its one number."""
    if not isinstance(value, jax.Array | np.ndarray):
        return repr(value)
    is_known = not isinstance(value, jax.core.Tracer) and jnp.issubdtype(value.dtype, np.number)
    if value.shape or not is_known or (isinstance(value, jax.Array) and value.is_deleted()):
        return f"{value.dtype.name}[{', '.join(map(str, value.shape))}]"
    return f"{value.dtype.name}({np.asarray(value)!s})"


def at_least_float32(*dtypes: Any) -> np.dtype:
    """The widest of float32 and the given real dtypes: what arrays of lower precision are computed in."""
    widest = functools.reduce(np.promote_types, map(np.dtype, dtypes), np.dtype(np.float32))
    return jax.dtypes.canonicalize_dtype(widest)


def real(value: Any) -> Any:
    """A Python integer as a float, so that it can be differentiated; anything else as it is."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def as_float(value: Any) -> Any:
    """An integer or a boolean as a float, an array of them as one of floats; floats as they are."""
    if isinstance(value, int | np.integer | np.bool_):
        return float(value)
    return value if jnp.issubdtype(jnp.result_type(value), jnp.floating) else 1.0 * value


def split_static(tree: Any) -> tuple[list[Any], Any]:
    """The numbers and arrays of a tree, to be traced, and the rest of it as hashable structure."""
    leaves, structure = jax.tree.flatten(tree)
    traced = [leaf for leaf in leaves if _is_number(leaf)]
    return traced, (structure, tuple(None if _is_number(leaf) else leaf for leaf in leaves))


def join_static(traced: list[Any], rest: Any) -> Any:
    """The tree of `split_static`."""
    structure, static = rest
    numbers = iter(traced)
    return jax.tree.unflatten(structure, [next(numbers) if s is None else s for s in static])


def _is_number(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") or (isinstance(leaf, int | float) and not isinstance(leaf, bool))
