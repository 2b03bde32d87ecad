"""What all checks share: one wording, float64, random arrays, counts of traces."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from stochsolvers._typing import Array


@contextlib.contextmanager
def own_dtypes() -> Iterator[None]:
    """JAX's usual promotion of dtypes, whatever the process has, and products in full precision."""
    with jax.numpy_dtype_promotion("standard"), jax.default_matmul_precision("highest"):
        yield


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """The same, in float64."""
    with jax.enable_x64(True), own_dtypes():
        yield


def broke(what: str, expected: object, got: object) -> NoReturn:
    """Raise AssertionError in the library's one wording."""
    raise AssertionError(f"{what}: expected {expected}, got {got}.")


def require(condition: Any, what: str, expected: object, got: object) -> None:
    """`broke` unless the condition holds for all entries."""
    if not np.all(condition):
        broke(what, expected, got)


def attempt(what: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What the function returns; an error of any kind becomes an AssertionError that says where."""
    try:
        return function(*args, **kwargs)
    except AssertionError:
        raise
    except Exception as error:
        message = f"{what}: expected a result, got {type(error).__name__}: {error}"
        raise AssertionError(message) from error


def same_shape(what: str, got: Any, shape: tuple[int, ...]) -> None:
    """Require a shape."""
    try:
        chex.assert_shape(got, shape)
    except AssertionError:
        broke(f"shape of {what}", shape, jnp.shape(got))


def same_dtype(what: str, got: Any, dtype: Any) -> None:
    """Require a dtype."""
    require(got.dtype == dtype, f"dtype of {what}", jnp.dtype(dtype), got.dtype)


def close(
    what: str, got: Any, expected: Any, *, rtol: float | None = None, words: str = ""
) -> None:
    """Require equality of two trees of arrays, relative to the largest entry of each.

    Args:
      what: what is compared.
      got: the object's.
      expected: the oracle's.
      rtol: relative tolerance; by default a small multiple of the round-off of the narrower dtype.
      words: what was expected; the numbers where the two differ most are always said.
    """
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    for mine, theirs in pairs:
        same_shape(what, mine, jnp.shape(theirs))
        allowed = tolerance(mine, theirs) if rtol is None else rtol
        a, b = np.asarray(mine, np.float64), np.asarray(theirs, np.float64)
        size = np.max(np.abs(b[np.isfinite(b)]), initial=0.0) + 1e-30
        try:
            chex.assert_trees_all_close(a, b, rtol=0, atol=allowed * size)
        except AssertionError:
            off = np.where(a == b, 0.0, np.nan_to_num(np.abs(a - b), nan=np.inf))
            at = np.unravel_index(np.argmax(off), off.shape)
            where = f" at {tuple(int(i) for i in at)}" if off.ndim else ""
            got_ = f"{a[at]:.8g}{where} (difference {off[at]:.2g}, allowed {allowed * size:.2g})"
            broke(what, f"{words + ', ' if words else ''}{b[at]:.8g}", got_)


def tolerance(*arrays: Any) -> float:
    """2000 units of round-off of the narrowest dtype."""
    kinds = [jnp.result_type(array) for array in arrays]
    return 2000 * max(float(jnp.finfo(k).eps) for k in kinds if jnp.issubdtype(k, jnp.floating))


def cast(tree: Any, dtype: Any) -> Any:
    """A tree with its real floating-point arrays in another dtype; numbers and the rest stay."""
    kind = jnp.dtype(dtype)

    def convert(leaf):
        return in_numpy(lambda a: a.astype(kind), leaf) if is_real(leaf) else leaf

    return jax.tree.map(convert, tree)


def in_numpy(function: Callable[..., Any], *arrays: Any) -> Any:
    """The function of arrays, by numpy where they are JAX's and concrete: nothing is compiled for it."""
    traced = any(isinstance(array, Tracer) for array in arrays)
    if traced or not any(isinstance(array, jax.Array) for array in arrays):
        return function(*arrays)
    return jnp.asarray(function(*map(np.asarray, arrays)))


def is_real(leaf: Any) -> bool:
    """Whether a leaf is an array of real floats."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def scaled(tree: Any, factor: float) -> Any:
    """A tree with its real floating-point leaves multiplied, numbers included."""

    def scale(leaf):
        return (
            in_numpy(lambda a: a * factor, leaf)
            if is_real(leaf) or isinstance(leaf, float)
            else leaf
        )

    return jax.tree.map(scale, tree)


def as_arrays(tree: Any) -> Any:
    """A tree with its Python floats as arrays."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, float) else leaf, tree)


def normal(seed: int, shape: tuple[int, ...], dtype: Any = jnp.float64) -> Array:
    """Standard normal numbers that are the same at every call."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def traced_once(what: str, function: Callable[..., Any], arguments: Sequence[tuple]) -> list[Any]:
    """Results of the jitted function at all arguments, for which it must be compiled once.

    Chex counts the traces of a function by its source, over the whole process; a check runs many times.
    """
    traces, results = 0, []

    def counted(*args):
        nonlocal traces
        traces += 1
        return function(*args)

    jitted = jax.jit(counted)
    for number, args in enumerate(arguments, 1):
        results.append(attempt(f"jit of {what}", jitted, *args))
        if traces > 1:
            got = f"{traces} after {number} calls (structure that changes, or is not hashable)"
            broke(f"compilations of {what} for a path of values", 1, got)
    return results


def passes_as_a_value(what: str, value: Any) -> None:
    """Require that an object is a pytree, its arrays among the leaves, and survives a round trip."""
    leaves, structure = jax.tree.flatten(value)
    for field in dataclasses.fields(value) if dataclasses.is_dataclass(value) else ():
        static = field.metadata.get("role") == "static"
        is_array = hasattr(getattr(value, field.name), "dtype")
        words = "an array that is traced (not a static field), so that derivatives reach it"
        require(not (static and is_array), f"{what}.{field.name}", words, "a static array")
    rebuilt = attempt(f"{what} rebuilt from its leaves", jax.tree.unflatten, structure, leaves)
    require(
        not (len(leaves) == 1 and leaves[0] is value),
        what,
        "a JAX pytree (a class under stochsolvers.value_object)",
        f"{type(value).__name__}, which JAX takes for a leaf",
    )
    try:
        chex.assert_trees_all_equal_structs(value, rebuilt)
    except AssertionError:
        broke(f"structure of {what} after a round trip", structure, jax.tree.structure(rebuilt))
    require(value == rebuilt, f"{what} after a round trip", "an equal object", repr(rebuilt))


def slope(
    function: Callable[[Any], Array], point: Any, direction: Any, step: float = 1e-5
) -> Array:
    """(f(p + h d) − f(p − h d)) / 2h, for trees."""

    def at(sign):
        def move(p, d):
            return in_numpy(lambda p, d: p + sign * step * d, p, d)

        return function(jax.tree.map(move, point, direction))

    return in_numpy(lambda right, left: (right - left) / (2 * step), at(1), at(-1))


def directions(tree: Any, seed: int = 1) -> Any:
    """Random numbers shaped as the real arrays of a tree; zeros for its other leaves."""
    leaves, structure = jax.tree.flatten(tree)
    drawn = [
        normal(seed + i, jnp.shape(leaf), leaf.dtype) if is_real(leaf) else 0
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, drawn)
