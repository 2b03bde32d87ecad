"""What a call with hostile arguments did, and whether that is a defect."""

import re
import signal
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

WORDING = re.compile(r"(?s)^\S.*: expected .+, got .+\.$")
LIMIT = 60
"""Seconds after which a call hangs."""

DEFECTS = (
    "foreign error",  # not in the library's wording
    "accepted",  # of a wrong kind, and a result
    "NaN lost",  # in an argument, and no sign of it
    "NaN born",  # of finite numbers
    "infinite",  # of finite numbers, where float64 gives a number that float32 has
    "wrong",  # another number than in float64
    "hangs",
)


class Outcome(NamedTuple):
    """A verdict, and the message or the numbers behind it."""

    verdict: str
    detail: str = ""

    @property
    def is_defect(self) -> bool:
        return self.verdict in DEFECTS


class Hangs(Exception):  # noqa: N818 - no error of a call
    pass


def attempt(call: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    """The result, or the exception."""

    def stop(*_: object) -> None:
        raise Hangs

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            return call(), None
    except Exception as error:  # whatever it is, it is the verdict
        return None, error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def of_error(error: BaseException) -> Outcome:
    """A clear error is a ValueError or a TypeError in the library's wording."""
    if isinstance(error, Hangs):
        return Outcome("hangs")
    if type(error).__module__ == "flax.errors":  # names the cause, and links to its explanation
        return Outcome("error of Flax", f"{type(error).__name__}: {error}"[:300])
    clear = isinstance(error, ValueError | TypeError) and WORDING.match(str(error))
    message = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return Outcome("clear error" if clear else "foreign error", message[:300])


def of_wrong_kind(call: Callable[[], Any], allowed: bool) -> Outcome:
    """The verdict on what is of a wrong kind: an error is wanted, unless a value is documented."""
    result, error = attempt(call)
    if error is not None:
        return of_error(error)
    return Outcome("value" if allowed else "accepted", str(result).replace("\n", " ")[:120])


def of_numbers(
    call: Callable[[], Any], exact: Callable[[], Any] | None, has_nan: bool, has_inf: bool
) -> Outcome:
    """The verdict on hostile numbers.

    Args:
      call: with arguments in float32.
      exact: the same in float64, or None where the two are not comparable.
      has_nan: whether an argument has one.
      has_inf: whether an argument has one.
    """
    result, error = attempt(call)
    if error is not None:
        return of_error(error)
    leaves = dict(named_leaves(result))
    reported = any(name.endswith("finite") and not np.all(leaf) for name, leaf in leaves.items())
    numbers = {name: leaf for name, leaf in leaves.items() if leaf.dtype.kind == "f"}
    strict = {name: leaf for name, leaf in numbers.items() if not name.endswith("?")}
    nans = [name for name, leaf in numbers.items() if np.isnan(leaf).any()]
    infinite = [name for name, leaf in strict.items() if np.isinf(leaf).any()]
    if has_nan:
        shown = nans or reported or any(np.isinf(leaf).any() for leaf in numbers.values())
        return Outcome("NaN passed on" if shown else "NaN lost", show(leaves))
    if reported:
        return Outcome("reported")
    if nans and not has_inf:
        return Outcome("NaN born", f"{nans}")
    if exact is None:
        return Outcome("value")
    wide, error = attempt(exact)
    if error is not None:
        return Outcome("value", f"not in float64: {error}"[:200])
    reference = dict(named_leaves(wide))
    for name, leaf in strict.items():
        wrong = compare(leaf, np.asarray(reference.get(name, leaf)), name in infinite)
        if wrong and not (has_inf and np.isnan(leaf).any()):
            verdict = "infinite" if name in infinite and not has_inf else "wrong"
            return Outcome(verdict, f"{name}: {wrong}")
    return Outcome("value")


def compare(leaf: np.ndarray, wide: np.ndarray, infinite: bool) -> str:
    """A difference beyond what float32 allows: 2% of the largest entry, and what underflows."""
    if leaf.shape != wide.shape:
        return f"shape {leaf.shape} and {wide.shape} in float64"
    with np.errstate(all="ignore"):
        narrow = wide.astype(np.float32).astype(np.float64)
        leaf = leaf.astype(np.float64)
        same = (leaf == narrow) | (np.isnan(leaf) & np.isnan(narrow)) | ~np.isfinite(narrow)
        finite = narrow[np.isfinite(narrow)]
        largest = np.max(np.abs(finite), initial=0.0)
        close = np.abs(leaf - narrow) <= 0.02 * largest + 1e-36
    if np.all(same | close):
        return ""
    i = np.argmax(~(same | close))
    return f"{leaf.flat[i]:.4g}, in float64 {wide.flat[i]:.4g}"


def named_leaves(result: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays and numbers of a result with their paths; a path that ends in ? may be infinite."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(result):
        if jnp.issubdtype(getattr(leaf, "dtype", np.float64), jax.dtypes.prng_key):
            continue
        name = jax.tree_util.keystr(path).strip("[]'.")
        array = np.asarray(leaf)
        if array.dtype.kind in "fiub":
            yield name, array
        elif array.dtype.kind == "V":  # bfloat16
            yield name, array.astype(np.float32)


def show(leaves: dict[str, np.ndarray]) -> str:
    return str({k: np.array2string(v, precision=3, threshold=6) for k, v in leaves.items()})[:200]


def in_float64(tree: Any) -> Any:
    """The tree with its float32 arrays in float64."""

    def widen(leaf: Any) -> Any:
        is_narrow = (
            isinstance(leaf, jax.Array | np.ndarray | np.generic) and leaf.dtype == "float32"
        )
        return jnp.asarray(leaf, jnp.float64) if is_narrow else leaf

    return jax.tree.map(widen, tree)
