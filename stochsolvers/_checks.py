"""Trace-time errors in one wording: what was expected, what was got.

Structure (shapes, dtypes, counts, names) is always checked. Values are checked only where they are
concrete numbers: a traced value cannot raise, and is reported in the result instead.
"""

import numbers
from collections.abc import Collection
from typing import Any, NoReturn

import jax
import jax.core
import jax.numpy as jnp
import numpy as np


def fail(what: str, expected: object, got: object) -> NoReturn:
    """Raise ValueError in the library's one wording."""
    raise ValueError(f"{what}: expected {expected}, got {got}.")


def _concrete(value: Any) -> np.ndarray | None:
    """The value as a numpy array if it is a known number, else None (traced, or no number)."""
    if isinstance(value, jax.core.Tracer) or not isinstance(
        value, numbers.Real | np.ndarray | np.generic | jax.Array
    ):
        return None
    return np.asarray(value)


def is_real(value: Any) -> bool:
    """Whether it is a number or an array, traced or not."""
    return isinstance(value, int | float | np.ndarray | np.generic | jax.Array)


def positive(what: str, value: Any, wanted: str = "a number > 0") -> None:
    """Require value > 0 wherever it is concrete."""
    known = _concrete(value)
    if known is not None and not np.all(known > 0):
        fail(what, wanted, value)


def finite(what: str, value: Any) -> None:
    """Require a finite number wherever it is concrete."""
    known = _concrete(value)
    if known is not None and not np.all(np.isfinite(known)):
        fail(what, "a finite number", value)


def non_negative(what: str, value: Any) -> None:
    """Require value >= 0 wherever it is concrete."""
    known = _concrete(value)
    if known is not None and not np.all(known >= 0):
        fail(what, "a number >= 0", value)


def at_most(what: str, value: Any, largest: float, why: str) -> None:
    """Require value <= largest wherever it is concrete."""
    known = _concrete(value)
    if known is not None and not np.all(known <= largest):
        fail(what, f"a number <= {largest:g} ({why} is at most {largest:g})", value)


def ordered(what: str, lower: Any, upper: Any, wanted: str = "lower <= upper") -> None:
    """Require lower <= upper wherever both are concrete."""
    lo, hi = _concrete(lower), _concrete(upper)
    if lo is not None and hi is not None and not np.all(lo <= hi):
        fail(what, wanted, f"{lower} and {upper}")


def member(what: str, value: Any, allowed: Collection[Any]) -> None:
    """Require one of a few names."""
    if value not in allowed:
        fail(what, "one of " + ", ".join(repr(a) for a in allowed), repr(value))


def count(what: str, value: Any, *, minimum: int = 1, maximum: int | None = None) -> int:
    """Require a Python or numpy integer (no bool) within minimum..maximum, and return it as int."""
    wanted = (
        f"an integer >= {minimum}" if maximum is None else f"an integer in {minimum}..{maximum}"
    )
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        fail(what, wanted, f"{value!r} of type {type(value).__name__}")
    if value < minimum or (maximum is not None and value > maximum):
        fail(what, wanted, value)
    return int(value)


def floating(what: str, array: Any) -> None:
    """Require a real floating-point dtype."""
    if not isinstance(array, jax.Array | np.ndarray | np.generic | float | int):
        fail(what, "an array", type(array).__name__)
    dtype = jnp.result_type(array)
    if not jnp.issubdtype(dtype, jnp.floating):
        fail(f"dtype of {what}", "a real floating-point dtype", dtype)


def rank(what: str, array: Any, expected: int) -> None:
    """Require exactly `expected` axes."""
    if jnp.ndim(array) != expected:
        fail(f"shape of {what}", f"{expected} axes", jnp.shape(array))


def pair_of_counts(what: str, value: Any) -> tuple[int, int]:
    """Require two integers >= 1; a single integer stands for both."""
    pair = (value, value) if isinstance(value, int | np.integer) else value
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        fail(what, "two integers >= 1", repr(value))
    return count(what, pair[0]), count(what, pair[1])


def counts(what: str, value: Any, axes: int) -> tuple[int, ...]:
    """Require one integer >= 1 for each of `axes` axes; a single integer stands for all."""
    each = (value,) * axes if isinstance(value, int | np.integer) else value
    if not isinstance(each, tuple | list) or len(each) != axes:
        fail(what, f"{axes} integers >= 1" if axes > 1 else "one integer >= 1", repr(value))
    return tuple(count(what, one) for one in each)


def trailing(what: str, array: Any, shape: tuple[int, ...]) -> None:
    """Require that the array's last axes have exactly this shape (leading batch axes are free)."""
    if jnp.shape(array)[max(jnp.ndim(array) - len(shape), 0) :] != shape:
        fail(f"shape of {what}", "(..., " + ", ".join(map(str, shape)) + ")", jnp.shape(array))


def broadcastable(what: str, array: Any, shape: tuple[int, ...]) -> None:
    """Require that the array broadcasts to `shape` without changing it."""
    try:
        fits = jnp.broadcast_shapes(jnp.shape(array), shape) == shape
    except ValueError:
        fits = False
    if not fits:
        fail(f"shape of {what}", f"one that broadcasts to {shape}", jnp.shape(array))
