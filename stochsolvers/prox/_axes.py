"""The axes that the entries of a group or matrix lie along, and the shapes of weights for them."""

from stochsolvers import _checks
from stochsolvers._typing import Array


def check_axes(axes: int | tuple[int, ...]) -> None:
    """Require an integer, or a tuple of them."""
    for axis in axes if isinstance(axes, tuple) else (axes,):
        _checks.count("axis", axis, minimum=-(2**31))


def canonical_axes(axes: int | tuple[int, ...], ndim: int) -> tuple[int, ...]:
    """Axes counted from the front, all different and within the array."""
    axes = axes if isinstance(axes, tuple) else (axes,)
    front = tuple(axis + ndim if axis < 0 else axis for axis in axes)
    if len(set(front)) != len(front) or not all(0 <= axis < ndim for axis in front):
        _checks.fail("axes", f"different axes of an array with {ndim} axes", axes)
    return front


def reduced_shape(like: Array, axes: int | tuple[int, ...]) -> tuple[int, ...]:
    """The shape with 1 in the named axes."""
    front = canonical_axes(axes, like.ndim)
    return tuple(1 if i in front else n for i, n in enumerate(like.shape))


def pair_of_axes(axes: tuple[int, int]) -> tuple[int, int]:
    """Two different integers."""
    if not isinstance(axes, tuple | list) or len(axes) != 2:
        _checks.fail("axes", "two different integers", _checks.named(axes))
    pair = tuple(axes)
    if pair[0] == pair[1]:
        _checks.fail("axes", "two different integers", axes)
    return _checks.count("axes", pair[0], minimum=-99), _checks.count("axes", pair[1], minimum=-99)
