"""Projection of weights onto the maps of bounded norm, after every step of an optimiser."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import optax
from jax import lax

from stochsolvers import _checks
from stochsolvers._typing import Array, Scalar
from stochsolvers.linear_maps import Dense, LinearMap, Transposed
from stochsolvers.lipschitz import clip_singular_values, normalising_factor, spectral_norm
from stochsolvers.optax._leaves import matches, moved


class ProjectState(NamedTuple):
    """The number of steps."""

    num_steps: Array


def dense_kernels(path: str, leaf: Any) -> LinearMap | None:
    """The default: a leaf with two axes, named "kernel", is that of a dense layer."""
    is_kernel = path.rpartition("/")[2] in ("kernel", "") and jnp.ndim(leaf) == 2
    return Dense(leaf) if is_kernel else None


def project_spectral_norm(
    bound: Scalar = 1.0,
    *,
    maps: Callable[[str, Array], LinearMap | None] = dense_kernels,
    method: Literal["clip", "scale"] = "clip",
    every: int = 1,
) -> optax.GradientTransformation:
    r"""u ← P(θ + u) − θ with P the projection of each layer's kernel onto {||A|| ≤ c}.

    The last transformation of a chain: after `optax.apply_updates` every layer that `maps` names has
    ||A|| ≤ c, to the round-off of the parameters' dtype.

    Args:
      bound: c > 0, traced.
      maps: from a leaf's path, as "conv/kernel", and its array to the map of which it is the kernel, or None
        for a leaf that stays: `lambda path, W: ss.Conv(W, (32, 32)) if W.ndim == 4 else None`. By default
        every leaf with two axes named "kernel" is dense.
      method: "clip", the Euclidean projection, which clips the singular values (`clip_singular_values`); or
        "scale", A min(1, c / ||A||), which is cheaper for convolutions.
      every: the number of steps from one projection to the next.

    Raises:
      ValueError: for a bound ≤ 0; in `init`, if `maps` names no leaf of the parameters; in `update`, without
        parameters, or for maps that do not hold the leaf as their kernel.
    """
    _checks.positive("bound", bound)
    _checks.rank("bound", bound, 0)
    _checks.function("maps", maps)
    _checks.member("method", method, ("clip", "scale"))
    every = _checks.count("every", every)

    def project(path: str, leaf: Array) -> Array | None:
        linear_map = maps(path, leaf)
        if linear_map is None:
            return None
        if method == "scale":
            factor = normalising_factor(spectral_norm(linear_map), bound, shrink_only=True)
            return leaf * factor.astype(leaf.dtype)
        kept: Any = linear_map.base if isinstance(linear_map, Transposed) else linear_map
        if getattr(kept, "kernel", None) is not leaf:
            wanted = "one with the leaf as its kernel (or method='scale')"
            _checks.fail(f"map of {path}", wanted, type(kept).__name__)
        return clip_singular_values(kept, bound).kernel

    def init(params: Any) -> ProjectState:
        found, leaves = matches(maps, params)
        if not found:
            _checks.fail(
                "params of project_spectral_norm",
                "a leaf that maps makes a LinearMap (by default one named kernel with two axes): give maps, "
                "from a path and an array to an ss.Conv(array, image_shape), say, or None",
                leaves,
            )
        return ProjectState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        count = state.num_steps + 1

        def project_all(updates):
            return moved(project, updates, params, "project_spectral_norm")

        if every == 1:
            updates = project_all(updates)
        else:
            updates = lax.cond(count % every == 0, project_all, lambda u: u, updates)
        return updates, ProjectState(count)

    return optax.GradientTransformation(init, update)
