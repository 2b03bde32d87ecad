"""The leaves of a parameter tree by their paths."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from stochsolvers import _checks


def path_string(path: Any) -> str:
    """Keys with slashes between: "block/linear/kernel"; without the `value` of a Flax variable."""
    keys = [
        str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path
    ]
    if keys and keys[-1] == "value":
        keys = keys[:-1]
    return "/".join(keys)


def matches(function: Callable[[str, Any], Any], params: Any) -> tuple[bool, str]:
    """Whether f(path, leaf) is not None for a leaf, computing nothing; the leaves as text, 8 of them."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        if not (hasattr(leaf, "dtype") or isinstance(leaf, int | float | complex)):
            _checks.fail(f"params at {path_string(path)}", "an array", _checks.named(leaf))
    found: list[bool] = []

    def look(path: Any, leaf: Any) -> None:
        found.append(function(path_string(path), leaf) is not None)

    jax.eval_shape(lambda tree: jax.tree_util.tree_map_with_path(look, tree), params)
    leaves = [
        f"{path_string(path) or 'an array'} of shape {tuple(getattr(leaf, 'shape', ()))}"
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    ]
    more = [f"{len(leaves) - 8} more"] if len(leaves) > 8 else []
    return any(found), ", ".join(leaves[:8] + more) or "no leaves"


def moved(function: Callable[[str, Any], Any], updates: Any, params: Any, what: str) -> Any:
    """The updates u that lead to f(path, θ + u) wherever that is not None: f(θ + u) − θ.

    Raises:
      ValueError: if there are no parameters.
    """
    if params is None:
        _checks.fail(f"params of {what}", "the parameters, as update's third argument", None)

    def of_leaf(path, update, param):
        if update is None:
            return None
        name = f" of {path_string(path)}" if path else ""
        _checks.floating(f"params{name}", param)
        _checks.floating(f"updates{name}", update)
        param, update = jnp.asarray(param), jnp.asarray(update)
        if update.shape != param.shape:
            _checks.fail(f"shape of updates{name}", param.shape, update.shape)
        after = function(path_string(path), param + update.astype(param.dtype))
        return update if after is None else (after.astype(param.dtype) - param).astype(update.dtype)

    try:
        jax.tree.map(lambda *_: None, updates, params, is_leaf=lambda u: u is None)
    except (ValueError, TypeError) as error:
        _checks.fail(
            f"updates of {what}", "a tree of the parameters' structure", f"another ({error})"
        )
    return jax.tree_util.tree_map_with_path(of_leaf, updates, params, is_leaf=lambda u: u is None)
