"""Which layers of a network compute what a known class does."""

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np


def inherits_unchanged(cls: type, known: Iterable[type]) -> Any:
    """The first of the known classes that a class inherits from, if it overrides none of its methods.

    Another `__init__` is allowed. None where there is no such class.
    """
    known, added = set(known), set()
    for base in cls.__mro__:
        if base in known:
            return None if any(hasattr(base, name) for name in added) else base
        added |= _methods(base)
    return None


def _methods(cls: type) -> set[str]:
    """Names of the methods and properties that a class itself defines; no fields of a dataclass.

    A method may be a function or any other callable or descriptor, such as a jitted function.
    """
    fields = getattr(cls, "__dataclass_fields__", {})
    return {
        name
        for name, value in vars(cls).items()
        if (callable(value) or hasattr(value, "__get__"))
        and name not in fields
        and (name == "__call__" or not name.startswith("__"))
    }


def keeps_digits(layer: Any) -> bool:
    """Whether a layer computes in real dtypes of 16 bits at least, or in those of its inputs."""
    dtypes = (getattr(layer, name, None) for name in ("dtype", "preferred_element_type"))
    return all(dtype is None or _has_digits(dtype) for dtype in dtypes)


def _has_digits(dtype: Any) -> bool:
    dtype = jnp.dtype(dtype)
    return jnp.issubdtype(dtype, np.floating) and jnp.finfo(dtype).bits >= 16
