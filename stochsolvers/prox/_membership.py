"""Which elementwise functions are proximal operators: non-decreasing, of slope at most 1."""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stochsolvers import _checks
from stochsolvers.prox import _activations as exact
from stochsolvers.prox import _elementwise as plain
from stochsolvers.prox._base import Prior

_EXPECTED = (
    "a non-decreasing elementwise function of slope at most 1 (the prox of a convex function)"
)
_SLACK = 1e-4  # of slopes, which a function computes in float32


def _bare(function: Any) -> Any:
    """What `jax.jit` and `functools.partial` were put around.

    Not what `functools.wraps` names: the function around it may compute anything.
    """
    while True:
        if isinstance(function, functools.partial):
            function = function.func
        elif hasattr(function, "__wrapped__") and _is_of_jax(type(function)):
            function = function.__wrapped__
        else:
            return function


def _is_of_jax(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in ("jax", "jaxlib")


_OUTSIDE = {
    _bare(function): reason
    for function, reason in [
        (jax.nn.gelu, "GELU, which decreases on (−∞, −0.75): use Softplus() or NonNegative()"),
        (
            jax.nn.silu,
            "SiLU (swish), which decreases on (−∞, −1.28): use Softplus() or NonNegative()",
        ),
        (jax.nn.mish, "mish, which decreases on (−∞, −1.19): use Softplus() or NonNegative()"),
        (
            jax.nn.hard_silu,
            "hard SiLU (hard swish), which decreases between −3 and −1.5 and has slopes up to 1.5: "
            "use NonNegative() or Softplus()",
        ),
        (jax.nn.selu, "SELU, with slopes up to 1.758 below 0 and 1.0507 above: use ELU()"),
        (jax.nn.softmax, "softmax, which is not elementwise"),
        (jax.nn.log_softmax, "log-softmax, which is not elementwise"),
        (jax.nn.glu, "the gated linear unit, which is not elementwise"),
    ]
}

_CLOSED: dict[Any, Callable[..., Prior]] = {
    _bare(function): make
    for function, make in [
        (jnp.tanh, exact.Tanh),
        (jax.nn.tanh, exact.Tanh),
        (jax.lax.tanh, exact.Tanh),
        (jax.nn.sigmoid, exact.Sigmoid),
        (jax.lax.logistic, exact.Sigmoid),
        (jax.scipy.special.expit, exact.Sigmoid),
        (jax.nn.softplus, exact.Softplus),
        (jax.nn.soft_sign, exact.Softsign),
        (jnp.arctan, exact.Arctan),
        (jnp.atan, exact.Arctan),
        (jax.lax.atan, exact.Arctan),
        (jax.nn.elu, exact.ELU),
        (jax.nn.leaky_relu, exact.LeakyReLU),
        (jax.nn.relu, plain.NonNegative),
        (jax.nn.relu6, lambda: plain.Box(0.0, 6.0)),
        (jax.nn.hard_tanh, lambda: plain.Box(-1.0, 1.0)),
        (jax.nn.identity, plain.Zero),
    ]
}


def _keywords(function: Any) -> dict[str, Any] | None:
    """The keywords that `functools.partial` fixes; None where it fixes positions."""
    words: dict[str, Any] = {}
    while (inner := function) is not _bare(inner):
        if isinstance(inner, functools.partial):
            if inner.args:
                return None
            words = {**inner.keywords, **words}
            function = inner.func
        else:
            function = inner.__wrapped__
    return words


@functools.lru_cache(maxsize=256)
def closed_form(function: Any) -> Prior | None:
    """The prior of a function of JAX with formulas of its own."""
    make, words = _CLOSED.get(_bare(function)), _keywords(function)
    if make is None or words is None:
        return None
    try:
        return make(**words)
    except TypeError:  # a keyword that is not a parameter of the prior
        return None


def check(function: Any) -> None:
    """Refuse what is known to be outside the class by name, and anything else on a grid of points."""
    if not callable(function) or not isinstance(function, Hashable):
        _checks.fail("function", _EXPECTED, repr(function))
    if closed_form(function) is not None:
        return
    reason = _OUTSIDE.get(_bare(function))
    if reason:
        _checks.fail("function", _EXPECTED, reason)
    name = getattr(_bare(function), "__name__", type(function).__name__)
    what = f"function {name}"
    x = _grid()
    try:
        with jax.ensure_compile_time_eval():
            value, slope = _evaluate(function, jnp.asarray(x))
            mixed = function(jnp.asarray(np.where(np.arange(len(x)) % 2 == 0, x, 0.5 * x + 1)))
            pairs = jax.eval_shape(function, jax.ShapeDtypeStruct((2, 3), np.float32))
            value, slope, mixed = np.asarray(value), np.asarray(slope), np.asarray(mixed)
    except Exception as error:
        message = str(error).split("\n")[0]
        expected = "an elementwise JAX function of one array, without traced values"
        _checks.fail(what, expected, f"{type(error).__name__}: {message}")
    if value.shape != x.shape or pairs.shape != (2, 3):
        got = f"{pairs.shape} for an array of shape (2, 3)"
        _checks.fail(f"shape of the result of {what}", "that of the argument", got)
    if value.dtype != x.dtype:
        _checks.fail(f"dtype of the result of {what} of float32", "float32", value.dtype)
    _check_values(what, x, value.astype(np.float64), slope.astype(np.float64))
    same = np.abs(mixed - value)[::2] <= 1e-5 * (1 + np.abs(value[::2]))
    if not np.all(same):
        at = x[::2][np.argmin(same)]
        got = f"another value at x = {at:.4g} when other entries change"
        _checks.fail(what, _EXPECTED, got)


def _grid() -> np.ndarray:
    """Fine near 0, up to 1e4, without the integers and halves at which functions have kinks."""
    tails = np.logspace(-6, 4, 401)
    inner = np.linspace(-12.003, 12.0017, 2401)
    return np.unique(np.concatenate([-tails, inner, tails]).astype(np.float32))


def _evaluate(function: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jax.jvp(function, (x,), (jnp.ones_like(x),))


def _check_values(what: str, x: np.ndarray, value: np.ndarray, slope: np.ndarray) -> None:
    """Finite, no slope below 0 or above 1, and no jump between neighbours."""
    for words, numbers in (("value", value), ("slope", slope)):
        if not np.all(np.isfinite(numbers)):
            at = np.argmin(np.isfinite(numbers))
            _checks.fail(what, _EXPECTED, f"the {words} {numbers[at]} at x = {x[at]:.4g}")
    for at, wrong in (
        (np.argmin(slope), np.min(slope) < -_SLACK),
        (np.argmax(slope), np.max(slope) > 1 + _SLACK),
    ):
        if wrong:
            _checks.fail(what, _EXPECTED, f"the slope {slope[at]:.4g} at x = {x[at]:.4g}")
    wide = x.astype(np.float64)
    rise, run = np.diff(value), np.diff(wide)
    noise = 1e-5 * (np.abs(value[1:]) + np.abs(wide[1:])) + 1e-6
    for bad, words in ((rise < -noise, "falls"), (rise > run + noise, "rises")):
        if np.any(bad):
            at = np.argmax(np.where(bad, np.abs(rise), 0))
            got = f"one that {words} by {abs(rise[at]):.4g} between x = {x[at]:.4g} and {x[at + 1]:.4g}"
            _checks.fail(what, _EXPECTED, got)
