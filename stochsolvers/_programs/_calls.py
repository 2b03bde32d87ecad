"""Equations of a jaxpr that contain others."""

from collections.abc import Iterator
from typing import Any

CALLS = (
    "jit", "pjit", "closed_call", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call",
)  # fmt: skip


def body(equation: Any) -> Any:
    """The jaxpr of a call that is entered, or None."""
    if equation.primitive.name not in CALLS:
        return None
    return next((jaxpr for jaxpr, _ in parts(equation)), None)


def parts(equation: Any) -> Iterator[tuple[Any, Any]]:
    """The jaxprs within an equation, each with the arrays that it closes over."""
    for parameter in equation.params.values():
        for part in parameter if isinstance(parameter, tuple | list) else (parameter,):
            jaxpr = getattr(part, "jaxpr", part)
            if hasattr(jaxpr, "eqns"):
                yield jaxpr, getattr(part, "consts", ())


def display_name(equation: Any) -> str:
    """The name of a jitted function or of a primitive; of a call of one operation, the latter's."""
    inner = body(equation)
    named = equation.primitive.name in ("jit", "pjit")
    if inner is not None and not named and len(inner.eqns) == 1:
        return display_name(inner.eqns[0])
    return str(equation.params.get("name", equation.primitive.name))
