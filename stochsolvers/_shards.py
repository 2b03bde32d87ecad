"""Types of arrays within `shard_map`."""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

_Tree = TypeVar("_Tree")


def varying(tree: _Tree, like: object) -> _Tree:
    """The tree, its arrays of the type of those that differ between devices where some of `like` do.

    `shard_map` asks the carry of a loop to begin, and the branches of a choice to end, with one type.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return tree
    axes = frozenset[str]().union(*map(_axes, jax.tree.leaves(like)))

    def cast(leaf):
        missing = sorted(axes - _axes(leaf))
        return lax.pcast(jnp.asarray(leaf), tuple(missing), to="varying") if missing else leaf

    return jax.tree.map(cast, tree)


def _axes(leaf: object) -> frozenset[str]:
    kind = jax.typeof(leaf)
    # jax 0.11 renamed it
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying
