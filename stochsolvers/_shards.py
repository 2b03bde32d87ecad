"""Types of arrays within `shard_map`, and on meshes whose axes are explicit."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from stochsolvers._typing import Array

_Tree = TypeVar("_Tree")


def varying(tree: _Tree, like: object) -> _Tree:
    """The tree, marked as varying over every mesh axis over which some array of `like` varies.

    `shard_map` asks the carry of a loop to begin, and the branches of a choice to end, with one type.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return tree
    axes = varying_axes(like)

    def cast(leaf):
        missing = sorted(axes - _axes(leaf))
        return lax.pcast(jnp.asarray(leaf), tuple(missing), to="varying") if missing else leaf

    return jax.tree.map(cast, tree)


def _axes(leaf: object) -> frozenset[str]:
    kind = jax.typeof(leaf)
    # jax 0.11 renamed it
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying


def varying_axes(tree: object) -> set[str]:
    """The mesh axes of `shard_map` over which some array of the tree varies; none elsewhere."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return set()
    return {axis for leaf in jax.tree.leaves(tree) for axis in _axes(leaf)}


def is_explicit() -> bool:
    """Whether an axis of the current mesh is explicit, the default of `jax.make_mesh`."""
    types = jax.sharding.get_abstract_mesh().axis_types
    return any(kind == jax.sharding.AxisType.Explicit for kind in types)


def automatic(function: Callable[..., _Tree], out_specs: Any, *operands: Any) -> _Tree:
    """`function(*operands)`, within which XLA chooses the shardings.

    On a mesh with explicit axes every intermediate array would need a sharding of its own: random masks, the
    carries of loops, transposed convolutions. The results get the shardings `out_specs`, a tree of
    `PartitionSpec`s; elsewhere they are not looked at. All arrays are operands.
    """
    if not is_explicit():
        return function(*operands)
    within: Any = jax.sharding.auto_axes(function, out_sharding=out_specs)
    return within(*operands)


def batch_spec(array: Array, batch_ndim: int) -> jax.sharding.PartitionSpec:
    """How the first `batch_ndim` axes of an array are split over an explicit mesh."""
    return jax.sharding.PartitionSpec(*spec_of(array)[:batch_ndim])


def spec_of(array: Any) -> tuple[Any, ...]:
    """The mesh axes of each of the array's axes."""
    spec = tuple(getattr(jax.typeof(array).sharding, "spec", ()))
    return spec + (None,) * (jnp.ndim(array) - len(spec))


def replicated(function: Callable[..., _Tree]) -> Callable[..., _Tree]:
    """The function, `automatic` with results that are not split: for constants of a kernel."""

    @functools.wraps(function)
    def call(*operands: Any, **options: Any) -> _Tree:
        if not is_explicit():
            return function(*operands, **options)
        arrays = {name: value for name, value in options.items() if isinstance(value, jax.Array)}
        static = {name: value for name, value in options.items() if name not in arrays}

        def run(operands, arrays):
            return function(*operands, **arrays, **static)

        return automatic(run, jax.sharding.PartitionSpec(), operands, arrays)

    for name in ("lower", "trace", "clear_cache", "__wrapped__"):  # of a jitted function
        if hasattr(function, name):
            setattr(call, name, getattr(function, name))
    return call
