"""Which layers of a network compute what a known class does."""

from collections.abc import Iterable
from types import FunctionType
from typing import Any


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
    """Names of the methods and properties that a class itself defines; no fields of a dataclass."""
    fields = getattr(cls, "__dataclass_fields__", {})
    return {
        name
        for name, value in vars(cls).items()
        if isinstance(value, FunctionType | property)
        and name not in fields
        and (name == "__call__" or not name.startswith("__"))
    }
