"""Checks of data and targets: structure always, values where they are concrete."""

import dataclasses
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from stochsolvers import _checks
from stochsolvers._typing import Array, at_least_float32
from stochsolvers.losses import CrossEntropy, Logistic, Loss, Scaled


def known(array: Any) -> np.ndarray | None:
    """The array's values, or None if they are traced or spread over hosts."""
    if isinstance(array, jax.core.Tracer) or not getattr(array, "is_fully_addressable", True):
        return None
    return np.asarray(array)


def finite(what: str, array: Any) -> None:
    """Require that all entries are finite."""
    values = known(array)
    if values is not None and not np.all(np.isfinite(values)):
        _checks.fail(what, "finite numbers", f"{int(np.sum(~np.isfinite(values)))} that are not")


def finite_fields(what: str, network: Any) -> None:
    """Require that all weights of a network are finite."""
    for field in dataclasses.fields(network):
        if (value := getattr(network, field.name)) is not None:
            finite(f"{field.name} of {what}", value)


def scalar(value: Any, dtype: Any) -> Array:
    """On the device without compiling anything; a tracer within a transformation, whatever it is."""
    own = known(value)
    return jnp.asarray(value, dtype) if own is None else jax.device_put(own.astype(dtype))


def data(what: str, X: ArrayLike) -> Array:
    """X of shape (n, d) or, of patches, (n, K, d), in float32 or wider."""
    _checks.floating(what, X)
    if jnp.ndim(X) not in (2, 3) or 0 in jnp.shape(X):
        wanted = "(n, d), or (n, K, d) for K patches of each datum, none of them 0"
        _checks.fail(f"shape of {what}", wanted, jnp.shape(X))
    finite(what, X)
    X = jnp.asarray(X)
    return X.astype(at_least_float32(X.dtype))


def data_like(what: str, X: ArrayLike, known: Array) -> Array:
    """X with the axes of other data but the first."""
    X = data(what, X)
    if X.shape[1:] != known.shape[1:]:
        wanted = ", ".join(["n", *map(str, known.shape[1:])])
        _checks.fail(f"shape of {what}", f"({wanted})", X.shape)
    return X


def positive_number(what: str, value: Any) -> None:
    """Require a finite number above 0, traced or not."""
    if not _checks.is_real(value):
        _checks.fail(what, "a number > 0", repr(value))
    _checks.rank(what, value, 0)
    _checks.positive(what, value)
    _checks.finite(what, value)


def number(what: str, value: Any) -> None:
    """Require one number of at least 0, traced or not."""
    if not _checks.is_real(value):
        _checks.fail(what, "a number >= 0", repr(value))
    _checks.rank(what, value, 0)
    _checks.non_negative(what, value)


def iterations(what: str, value: Any) -> None:
    """Require an integer of at least 0, traced or not."""
    dtype = getattr(value, "dtype", None)
    if isinstance(value, np.integer) or dtype is None or not jnp.issubdtype(dtype, jnp.integer):
        _checks.count(what, value, minimum=0, maximum=2**31 - 1)
    else:
        _checks.rank(what, value, 0)
        _checks.non_negative(what, value)


def loss(what: str, value: Any) -> None:
    """Require a loss."""
    if not isinstance(value, Loss):
        _checks.fail(what, "an instance of Loss", repr(value))


def targets(what: str, y: ArrayLike, X: Array, loss: Loss, *, joint: bool) -> Array:
    """y of shape (n,) or (C, n), whose values the loss has a use for."""
    _checks.floating(what, y)
    allowed = (2,) if joint else (1, 2)
    if jnp.ndim(y) not in allowed or jnp.shape(y)[-1] != X.shape[0] or 0 in jnp.shape(y):
        wanted = f"(C, {X.shape[0]})" if joint else f"({X.shape[0]},) or (C, {X.shape[0]})"
        _checks.fail(f"shape of {what}", wanted, jnp.shape(y))
    finite(what, y)
    while isinstance(loss, Scaled):
        loss = loss.loss
    values = known(y)
    if values is not None:
        _check_values(what, values, loss)
    y = jnp.asarray(y)
    return y.astype(at_least_float32(y.dtype))


def labels(what: str, y: np.ndarray, loss: Loss) -> None:
    """Require targets that the loss is defined for."""
    while isinstance(loss, Scaled):
        loss = loss.loss
    if isinstance(loss, Logistic) and not np.all(np.abs(y) == 1):
        _checks.fail(what, "labels -1 and 1", f"other numbers, as {y[np.abs(y) != 1].flat[0]}")
    if isinstance(loss, CrossEntropy):
        if y.ndim < 2 or len(y) < 2:
            _checks.fail(what, "data of at least two classes", "one class")
        if np.any(y < 0) or not np.allclose(np.sum(y, -2), 1, atol=1e-3):
            _checks.fail(what, "the probabilities of the classes of each datum", "other columns")


def _check_values(what: str, y: np.ndarray, loss: Loss) -> None:
    labels(what, y, loss)
    if isinstance(loss, CrossEntropy):
        if np.any(np.all(y == 1, axis=-1)):
            _checks.fail(what, "data of at least two classes", "one class")
    elif y.shape[-1] > 1 and np.any(np.all(y == y[..., :1], axis=-1)):
        classes = isinstance(loss, Logistic)
        wanted = "data of two classes" if classes else "targets that are not all equal"
        _checks.fail(what, wanted, "one class" if classes else f"{y.shape[-1]} equal ones")
