"""The real arrays of a tree, which are its parameters, and all the rest of it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from stochsolvers._typing import Array, at_least_float32


class Parameters(NamedTuple):
    """The leaves of a tree that are real floating-point arrays or numbers; the others stay as they are."""

    leaves: list[Any]
    others: list[Any]
    places: tuple[bool, ...]
    structure: Any

    @classmethod
    def of(cls, tree: Any) -> "Parameters":
        """Those of a tree."""
        every, structure = jax.tree.flatten(tree)
        places = tuple(map(_is_real, every))
        leaves = [leaf for leaf, real in zip(every, places, strict=True) if real]
        others = [leaf for leaf, real in zip(every, places, strict=True) if not real]
        return cls(leaves, others, places, structure)

    def rebuilt(self, leaves: Sequence[Any]) -> Any:
        """The tree with other parameters."""
        return self._filled(leaves, self.others)

    def cotangent(self, leaves: Sequence[Any]) -> Any:
        """A cotangent of the tree: None, which is zero, for what is no parameter."""
        return self._filled(leaves, [None] * len(self.others))

    def widened(self) -> list[Array]:
        """The leaves in float32 at least."""
        return [jnp.asarray(leaf, at_least_float32(jnp.result_type(leaf))) for leaf in self.leaves]

    def like(self, leaves: Sequence[Array]) -> list[Array]:
        """Other leaves in the dtypes of these."""
        pairs = zip(leaves, self.leaves, strict=True)
        return [new.astype(jnp.result_type(leaf)) for new, leaf in pairs]

    def _filled(self, leaves: Sequence[Any], others: Sequence[Any]) -> Any:
        real, rest = iter(leaves), iter(others)
        every = [next(real) if place else next(rest) for place in self.places]
        return jax.tree.unflatten(self.structure, every)


def _is_real(leaf: Any) -> bool:
    if isinstance(leaf, bool | int):
        return False
    return isinstance(leaf, float) or (
        hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
    )
