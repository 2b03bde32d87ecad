r"""The softmax along an axis, recognised by its program.

exp(u) / Σ exp(u), where the sum is over some axes of the same exp(u), is softmax(u), which is 1-Lipschitz:
its Jacobian is diag(p) − p pᵀ. It is softmax(v) for u = v − c too, whatever c is, if c is constant along
these axes, as the maximum that every implementation subtracts.
"""

from stochsolvers.reports._activations import Match
from stochsolvers.reports._program import Value, is_float

_COPIES = ("stop_gradient", "copy", "copy_p", "broadcast_in_dim")


def softmax_of(value: Value) -> Match | None:
    """What a value is the softmax of, None if it is none."""
    axes = softmax_axes(value)
    if axes is None:
        return None
    source = value.operands[0].operands[0]
    while source.operation == "sub" and _is_constant_along(axes, *source.operands):
        source = source.operands[0]
    return Match(1.0, source)


def softmax_axes(value: Value) -> tuple[int, ...] | None:
    """The axes of the softmax that a value is the result of, None if it is none."""
    if value.operation != "div" or not is_float(value.aval):
        return None
    exponentials, total = value.operands
    if exponentials.operation != "exp" or exponentials.aval.shape != value.aval.shape:
        return None
    sums, places = _kept_axes(total)
    if sums.operation != "reduce_sum" or sums.operands[0] is not exponentials:
        return None
    axes = tuple(int(axis) for axis in sums.equation.params["axes"])
    rest = [axis for axis in range(value.aval.ndim) if axis not in axes]
    return axes if places == rest else None


def _kept_axes(value: Value) -> tuple[Value, list[int]]:
    """What a value is copies of, and for each axis of that the axis of the value."""
    places = list(range(value.aval.ndim))
    while value.operation in _COPIES:
        if value.operation == "broadcast_in_dim":
            options = value.equation.params["broadcast_dimensions"]
            places = [places[int(axis)] for axis in options]
        value = value.operands[0]
    return value, places


def _is_constant_along(axes: tuple[int, ...], x: Value, shift: Value) -> bool:
    """Whether a difference x − c has the entries of x, less the same along the axes."""
    if x.aval.ndim != shift.aval.ndim:
        return False
    if all(shift.aval.shape[axis] == 1 for axis in axes):
        return True
    return not set(_kept_axes(shift)[1]).intersection(axes)
