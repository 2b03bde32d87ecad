"""Arguments by their kinds, and what is put in the place of a good one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Sizes(NamedTuple):
    """Of the arrays of a call."""

    batch: int = 2
    n1: int = 4
    n2: int = 3


DEGENERATE = {
    "no example": Sizes(batch=0),
    "one example": Sizes(batch=1),
    "one input": Sizes(n1=1),
    "one output": Sizes(n2=1),
    "sizes of one": Sizes(1, 1, 1),
}
"""Empty batches and axes of size one."""


class Argument(NamedTuple):
    """A good value, its kind, and the names of the substitutes that are documented values."""

    good: Any
    kind: str
    allowed: tuple[str, ...] = ()


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


NOTHING = {
    "a string": "abc",
    "None": None,
    "a list of strings": ["a", "b"],
    "a dict": {"a": 1},
    "an object": object(),
    "a class": int,
}
"""What no argument of the library is, but for None where it has a meaning."""

KEY = jax.random.key(7)
WRONG_KINDS: dict[str, dict[str, Any]] = {
    "array": {
        **NOTHING,
        "complex numbers": lambda good: jnp.asarray(good) * (1 + 1j),
        "a random key": KEY,
        "a scalar": np.float32(0.5),
        "one axis more": lambda good: jnp.asarray(good)[..., None],
        "another length": lambda good: jnp.concatenate([jnp.atleast_1d(good)] * 2, axis=-1),
    },
    "number": {
        **NOTHING,
        "a complex number": 1j,
        "a random key": KEY,
        "seven numbers": np.ones(7, np.float32),
        "NaN": float("nan"),
    },
    "count": {
        **NOTHING,
        "a fraction": 1.5,
        "a whole float": 2.0,
        "True": True,
        "a complex number": 2j,
        "NaN": float("nan"),
        "minus one": -1,
        "a random key": KEY,
        "two counts": np.array([2, 2]),
    },
    "key": {
        **NOTHING,
        "a float": 0.5,
        "an array of floats": np.ones(2, np.float32),
        "two keys": jax.random.split(KEY),
    },
    "object": {
        **NOTHING,
        "a number": 1.5,
        "an array": np.ones((4, 3), np.float32),
        "a random key": KEY,
    },
    "name": {
        **NOTHING,
        "another name": "nonsense",
        "a number": 3,
    },
    "shape": {
        **NOTHING,
        "a negative size": (-1,),
        "a fraction": (1.5,),
        "an array": np.ones((2, 2), np.float32),
    },
    "other": {},  # what another one's function takes
    "weight": {},  # of another one's object
    "function": {
        "a string": "abc",
        "None": None,
        "a number": 1.5,
        "a dict": {"a": 1},
        "a random key": KEY,
    },
}
"""For each kind of argument, what is not of that kind: a value, or a function of the good one."""

CASTS: dict[str, Callable[[Any], Any]] = {
    "integers": lambda good: jnp.asarray(good).astype(jnp.int32),
    "booleans": lambda good: jnp.asarray(good) > 0,
    "float16": lambda good: jnp.asarray(good).astype(jnp.float16),
}
"""Other dtypes of an array: refused, or the value is that of the same numbers in float32."""

ENTRIES = {
    "NaN": np.nan,
    "inf": np.inf,
    "-inf": -np.inf,
    "1e30": 1e30,
    "-1e30": -1e30,
    "1e-30": 1e-30,
    "denormal": 1e-42,
    "zero": 0.0,
}
"""Hostile entries of an array."""


def with_entries(good: Any, number: float, everywhere: bool) -> jax.Array:
    """The array with a hostile number in its first entry, or in all of them."""
    array = np.array(good, np.float32)
    if everywhere:
        array = np.full_like(array, number)
    elif array.size:
        array.flat[0] = number
    return jnp.asarray(array)


NUMBERS = {
    "NaN": np.nan,
    "inf": np.inf,
    "-inf": -np.inf,
    "1e30": 1e30,
    "1e-30": 1e-30,
    "denormal": 1e-42,
    "zero": 0.0,
    "minus one": -1.0,
    "True": True,
    "an integer": 1,
    "a numpy number": np.float32(0.5),
    "a jax number": jnp.float32(0.5),
}
"""Hostile numbers in the place of a scalar."""


def substitute(argument: Argument, name: str) -> Any:
    """The wrong kind of that name."""
    wrong = WRONG_KINDS[argument.kind][name]
    return wrong(argument.good) if getattr(wrong, "__name__", "") == "<lambda>" else wrong
