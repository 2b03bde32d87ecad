"""Trace-time errors in one wording: what was expected, what was got.

Structure (shapes, dtypes, counts, names) is always checked. Values are checked only where they are
concrete numbers: a traced value cannot raise, and is reported in the result instead.
"""

from collections.abc import Collection
from typing import Any, NoReturn

import jax
import jax.core
import jax.numpy as jnp
import numpy as np


def fail(what: str, expected: object, got: object) -> NoReturn:
    """Raise ValueError in the library's one wording."""
    raise ValueError(f"{what}: expected {expected}, got {got}.")


def instance(what: str, value: Any, kind: type, wanted: str) -> None:
    """Require an object of a class."""
    if not isinstance(value, kind):
        fail(what, wanted, named(value))


def function(what: str, value: Any) -> None:
    """Require what can be called."""
    if not callable(value):
        fail(what, "a function", named(value))


def named(value: Any) -> str:
    """What an argument is, in a few words: its type, and the shape of an array."""
    if isinstance(value, str | int | float | None):
        return repr(value)
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, jax.Array | np.ndarray):
        return f"an array of {value.dtype}"
    return f"an object of type {type(value).__name__}"


def _concrete(what: str, value: Any, wanted: str) -> np.ndarray | None:
    """The real value as a numpy array if it is known, None if it is traced."""
    if isinstance(value, int | float):
        return np.asarray(value)
    dtype = getattr(value, "dtype", None)
    if dtype is None or not (jnp.issubdtype(dtype, np.bool_) or is_real_dtype(dtype)):
        fail(what, wanted, named(value))
    if isinstance(value, jax.core.Tracer) or not isinstance(
        value, np.ndarray | np.generic | jax.Array
    ):
        return None
    return np.asarray(value)


def is_real_dtype(dtype: Any) -> bool:
    """Whether it is a dtype of integers or of real floating-point numbers."""
    return jnp.issubdtype(dtype, np.integer) or jnp.issubdtype(dtype, np.floating)


def random_key(
    what: str, key: Any, expected: str = "a random key such as jax.random.key(0)"
) -> None:
    """Require one key, typed or of the raw kind that `jax.random.PRNGKey` makes."""
    dtype = getattr(key, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        if jnp.shape(key):
            fail(what, expected, f"keys of shape {jnp.shape(key)}")
    elif dtype != np.uint32 or len(key.shape) != 1:
        fail(what, expected, named(key))


def is_real(value: Any) -> bool:
    """Whether it is a number or an array, traced or not."""
    return isinstance(value, int | float | np.ndarray | np.generic | jax.Array)


def held_by(what: str, value: Any, dtype: Any) -> None:
    """Require, of a known Python or numpy number, that it neither over- nor underflows in a dtype.

    XLA rounds numbers below the smallest normal one to zero, on CPU as on accelerators.
    """
    if not isinstance(value, int | float | np.ndarray | np.generic):
        return
    floats, size = jnp.finfo(dtype), np.abs(np.asarray(value, np.float64))
    is_lost = (size > 0) & ((size < float(floats.tiny)) | (size > float(floats.max)))
    if np.any(is_lost & np.isfinite(size)):
        wanted = f"0 or a size in {float(floats.tiny):.3g}..{float(floats.max):.3g}, as of {dtype}"
        fail(what, wanted, value)


def positive(what: str, value: Any, wanted: str = "a number > 0") -> None:
    """Require value > 0 wherever it is concrete."""
    known = _concrete(what, value, wanted)
    if known is not None and not np.all(known > 0):
        fail(what, wanted, value)


def finite(what: str, value: Any) -> None:
    """Require a finite number wherever it is concrete."""
    known = _concrete(what, value, "a finite number")
    if known is not None and not np.all(np.isfinite(known)):
        fail(what, "a finite number", value)


def non_negative(what: str, value: Any) -> None:
    """Require value >= 0 wherever it is concrete."""
    known = _concrete(what, value, "a number >= 0")
    if known is not None and not np.all(known >= 0):
        fail(what, "a number >= 0", value)


def at_most(what: str, value: Any, largest: float, why: str) -> None:
    """Require value <= largest wherever it is concrete."""
    wanted = f"a number <= {largest:g} ({why} is at most {largest:g})"
    known = _concrete(what, value, wanted)
    if known is not None and not np.all(known <= largest):
        fail(what, wanted, value)


def ordered(what: str, lower: Any, upper: Any, wanted: str = "lower <= upper") -> None:
    """Require lower <= upper wherever both are concrete."""
    lo, hi = _concrete(what, lower, wanted), _concrete(what, upper, wanted)
    if lo is not None and hi is not None and not np.all(lo <= hi):
        fail(what, wanted, f"{lower} and {upper}")


def member(what: str, value: Any, allowed: Collection[Any]) -> None:
    """Require one of a few names."""
    if not isinstance(value, str | None) or value not in allowed:
        fail(what, "one of " + ", ".join(repr(a) for a in allowed), named(value))


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
        is_variable = hasattr(array, "__jax_array__")
        wanted = "an array, as variable[...] is" if is_variable else "an array"
        fail(what, wanted, type(array).__name__)
    dtype = jnp.result_type(array)
    if not jnp.issubdtype(dtype, jnp.floating):
        fail(f"dtype of {what}", "a real floating-point dtype", dtype)


def shape_of(what: str, array: Any) -> tuple[int, ...]:
    """The shape of an array of numbers, which is required; () of a number."""
    if isinstance(array, int | float | complex):
        return ()
    dtype = getattr(array, "dtype", None)
    if dtype is None or not (jnp.issubdtype(dtype, np.number) or jnp.issubdtype(dtype, np.bool_)):
        fail(what, "an array of numbers", named(array))
    return jnp.shape(array)


def real_array(what: str, array: Any) -> None:
    """Require an array of real numbers, of integers or of booleans."""
    shape_of(what, array)
    if jnp.issubdtype(jnp.result_type(array), jnp.complexfloating):
        fail(f"dtype of {what}", "a real dtype", jnp.result_type(array))


def activations(what: str, x: Any) -> None:
    """Require an array of real numbers, its last axis that of the features."""
    real_array(what, x)
    if not jnp.shape(x):
        fail(f"shape of {what}", "at least the axis of the features", ())


def rank(what: str, array: Any, expected: int) -> None:
    """Require exactly `expected` axes."""
    if len(shape_of(what, array)) != expected:
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


def shape(what: str, value: Any, *, minimum: int = 0) -> tuple[int, ...]:
    """Require a sequence of integers >= minimum, and return it as a tuple."""
    if not isinstance(value, tuple | list):
        wanted = "a tuple of integers" + ", such as x.shape" * hasattr(value, "shape")
        fail(what, wanted, named(value))
    return tuple(count(what, one, minimum=minimum) for one in value)


def trailing(what: str, array: Any, shape: tuple[int, ...]) -> None:
    """Require that the array's last axes have exactly this shape (leading batch axes are free)."""
    given = shape_of(what, array)
    if given[max(len(given) - len(shape), 0) :] != shape:
        fail(f"shape of {what}", "(..., " + ", ".join(map(str, shape)) + ")", given)


def broadcastable(what: str, array: Any, shape: tuple[int, ...]) -> None:
    """Require that the array broadcasts to `shape` without changing it."""
    given = shape_of(what, array)
    try:
        fits = jnp.broadcast_shapes(given, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        fail(f"shape of {what}", f"one that broadcasts to {shape}", given)
