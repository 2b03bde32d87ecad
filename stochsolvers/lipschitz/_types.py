"""A constant between two numbers, and how they were obtained."""

from collections.abc import Iterator
from typing import Literal, TypeAlias

import jax.numpy as jnp

from stochsolvers import _checks
from stochsolvers._typing import Array, at_least_float32, static_field, value_object
from stochsolvers.linear_maps import LinearMap

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


def compute_dtype(linear_map: LinearMap) -> jnp.dtype:
    """float32, or the map's own type if that is wider."""
    return at_least_float32(linear_map.dtype)
