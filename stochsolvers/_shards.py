"""Types of arrays within `shard_map`."""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

_Tree = TypeVar("_Tree")


def varying(tree: _Tree, like: object) -> _Tree:
    """The tree, marked as varying over every mesh axis over which some array of `like` varies.

    `shard_map` asks the carry of a loop to begin, and the branches of a choice to end, with one type.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return tree
    axes = {axis for leaf in jax.tree.leaves(like) for axis in _axes(leaf)}

    def cast(leaf):
        missing = sorted(axes - _axes(leaf))
        return lax.pcast(jnp.asarray(leaf), tuple(missing), to="varying") if missing else leaf

    return jax.tree.map(cast, tree)


def _axes(leaf: object) -> frozenset[str]:
    kind = jax.typeof(leaf)
    # jax 0.11 renamed it
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying
