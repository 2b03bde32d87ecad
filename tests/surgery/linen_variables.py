"""Variables of Linen modules, and NNX modules, without compiling their initialisers."""

import math

import jax
import jax.numpy as jnp
from flax import nnx


def drawn(module, rng, *inputs):
    """Variables shaped as those of `module.init`: Gaussian kernels and biases, the rest from 0.5 to 1.5."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return jax.tree_util.tree_map_with_path(
        lambda path, like: _leaf(rng, str(path[-1].key), like), shapes
    )


def built(make, rng):
    """The NNX module that `make` builds, with numbers as those of `drawn`; its streams begin with key 0."""
    graph, state = nnx.split(nnx.eval_shape(make))

    def leaf(path, like):
        if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        if not jnp.issubdtype(like.dtype, jnp.floating):
            return jnp.zeros(like.shape, like.dtype)
        return _leaf(rng, "/".join(map(str, path)), like)

    return nnx.merge(graph, nnx.map_state(leaf, state))


def _leaf(rng, name, like):
    if "kernel" in name:
        fan_in = max(1, math.prod(like.shape[:-1]))
        values = rng.normal(size=like.shape) / math.sqrt(fan_in)
    elif "bias" in name:
        values = 0.1 * rng.normal(size=like.shape)
    else:
        values = rng.uniform(0.5, 1.5, size=like.shape)
    return jnp.asarray(values, like.dtype)
