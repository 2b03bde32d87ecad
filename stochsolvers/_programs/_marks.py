"""Marks at the inputs and outputs of a network's modules.

They are `checkpoint_name`s, identities that JAX's transformations keep, so that they are found within `jit`,
`remat` and `vmap`, in loops and branches, and where JAX takes a jitted function from its cache.
"""

import dataclasses
from typing import Any, Literal

from jax.ad_checkpoint import checkpoint_name

from stochsolvers._programs._calls import parts
from stochsolvers._typing import Array

Kind = Literal["layer", "dropout", "norm"]
_PREFIX = "stochsolvers:"


@dataclasses.dataclass(frozen=True)
class Mark:
    """The start or the end of one call of a marked module, or what it reads beside its input.

    Attributes:
      role: which of these.
      kind: of the module.
      label: of the module.
      shape: of its input.
    """

    role: Literal["input", "output", "side"]
    kind: Kind
    label: str
    shape: tuple[int, ...]

    @property
    def opens(self) -> bool:
        """Whether a call begins here."""
        return self.role == "input"

    @property
    def closes(self) -> bool:
        """Whether it ends here."""
        return self.role == "output"


def mark_input(x: Array, kind: Kind, label: str) -> Array:
    """The input of a module, unchanged.

    The mark contains its shape: within `jax.vmap`, the array of the jaxpr has one more axis, at any place.
    """
    return checkpoint_name(x, f"{_PREFIX}input:{kind}:{'x'.join(map(str, x.shape))}:{label}")


def mark_side(x: Array, kind: Kind, label: str) -> Array:
    """What a module adds to its bias, unchanged."""
    return checkpoint_name(x, f"{_PREFIX}side:{kind}::{label}")


def mark_output(z: Array, kind: Kind, label: str) -> Array:
    """The output of a module, unchanged."""
    return checkpoint_name(z, f"{_PREFIX}output:{kind}::{label}")


def mark_of(equation: Any) -> Mark | None:
    """The mark that an equation is, if it is one."""
    name = str(equation.params.get("name", ""))
    if equation.primitive.name != "name" or not name.startswith(_PREFIX):
        return None
    role, kind, shape, label = name.removeprefix(_PREFIX).split(":", 3)
    sizes = tuple(int(size) for size in shape.split("x") if size)
    return Mark(role, kind, label, sizes)  # pyright: ignore[reportArgumentType]


def has_mark(jaxpr: Any) -> bool:
    """Whether a marked module is called in a jaxpr, or in what it calls."""
    for equation in jaxpr.eqns:
        mark = mark_of(equation)
        if mark is not None and (mark.opens or mark.closes):
            return True
        if any(has_mark(part) for part, _ in parts(equation)):
            return True
    return False
