"""A constant between two numbers, and how they were obtained."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeAlias, TypeVar

import jax.numpy as jnp

from stochsolvers import _checks
from stochsolvers._typing import Array, at_least_float32, static_field, value_object
from stochsolvers.linear_maps import LinearMap
from stochsolvers.linear_maps._base import check_map

_Function = TypeVar("_Function", bound=Callable[..., Any])
Grid: TypeAlias = Literal["layer", "padded"]
Method: TypeAlias = Literal["exact", "bound", "probability"]


@value_object
class Bracket:
    """lower ≤ L ≤ upper; `lower, upper = bracket` unpacks it.

    Attributes:
      lower, upper: scalars.
      method: how the ends were obtained.
        "exact": from the singular values of all blocks (lemma 2), or of the matrix written out; the ends
        differ by round-off alone.
        "bound": a Rayleigh quotient from below, a proved bound from above.
        "probability": a Rayleigh quotient from below; the upper end fails with at most
        `failure_probability` over the random start.
      failure_probability: 0 unless `method` is "probability".
    """

    lower: Array
    upper: Array
    method: Method = static_field(default="exact", kw_only=True)
    failure_probability: float = static_field(default=0.0, kw_only=True)

    def __iter__(self) -> Iterator[Array]:
        return iter((self.lower, self.upper))

    def __getitem__(self, index: int) -> Array:
        return (self.lower, self.upper)[index]

    def __len__(self) -> int:
        return 2


def rescaled(
    lower: Array, upper: Array, scale: Array, method: Method = "exact", failure: float = 0.0
) -> Bracket:
    """The bracket times scale²; the ends stay on their sides if they over- or underflow."""
    floats = jnp.finfo(scale.dtype)
    lower = jnp.minimum(lower * scale * scale, floats.max)
    return Bracket(
        jnp.where(lower < floats.tiny, 0.0, lower),  # what is smaller may have been rounded up
        jnp.maximum(upper * scale * scale, floats.tiny),
        method=method,
        failure_probability=failure,
    )


def check_grid(grid: str) -> None:
    """Refuse unknown grids."""
    _checks.member("grid", grid, ("layer", "padded"))


def of_map(function: _Function) -> _Function:
    """The function, which refuses what is no map, state, grid, count or key before JAX looks at it."""
    name = getattr(function, "__name__", "")

    @functools.wraps(function)
    def call(linear_map: LinearMap, *arguments: Any, **options: Any) -> Any:
        check_map(f"map of {name}", linear_map)
        for option, value in options.items():
            if option in _OPTIONS:
                _OPTIONS[option](name, value)
        return function(linear_map, *arguments, **options)

    for attribute in ("lower", "trace", "clear_cache", "__wrapped__"):  # of a jitted function
        if hasattr(function, attribute):
            setattr(call, attribute, getattr(function, attribute))
    return call  # pyright: ignore[reportReturnType]


def of_map_and_state(kind: type, maker: str) -> Callable[[_Function], _Function]:
    """`of_map` of a function whose second argument is a state of that class."""

    def decorate(function: _Function) -> _Function:
        checked = of_map(function)
        what = f"state of {getattr(function, '__name__', '')}"

        @functools.wraps(checked)
        def call(linear_map: LinearMap, state: Any, **options: Any) -> Any:
            _checks.instance(what, state, kind, f"what {maker} returns")
            return checked(linear_map, state, **options)

        return call  # pyright: ignore[reportReturnType]

    return decorate


def _check_grid_of(name: str, grid: Any) -> None:
    grids = ("layer", "padded", "operator") if name == "singular_values" else ("layer", "padded")
    _checks.member("grid", grid, grids)


def _check_key(name: str, key: Any) -> None:
    if key is not None:
        _checks.random_key(f"key of {name}", key)


def _check_tolerance(name: str, tolerance: Any) -> None:
    _checks.non_negative(f"tolerance of {name}", tolerance)
    _checks.rank(f"tolerance of {name}", tolerance, 0)


def _check_probability(name: str, value: Any) -> None:
    is_number = isinstance(value, float | int) and not isinstance(value, bool)
    if not is_number or not 0 < value < 1:
        _checks.fail("failure_probability", "a Python number in (0, 1)", _checks.named(value))


_OPTIONS: dict[str, Callable[[str, Any], object]] = {
    "grid": _check_grid_of,
    "method": lambda name, method: _checks.member("method", method, ("fast", "formula")),
    "num_iters": lambda name, number: _checks.count("num_iters", number),
    "num_steps": lambda name, number: _checks.count("num_steps", number),
    "failure_probability": _check_probability,
    "key": _check_key,
    "tolerance": _check_tolerance,
}


def compute_dtype(linear_map: LinearMap) -> jnp.dtype:
    """float32, or the map's own type if that is wider."""
    return at_least_float32(linear_map.dtype)
