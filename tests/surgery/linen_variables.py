"""Variables of Linen modules without compiling their initialisers."""

import math

import jax
import jax.numpy as jnp


def drawn(module, rng, *inputs):
    """Variables shaped as those of `module.init`: Gaussian kernels and biases, the rest from 0.5 to 1.5."""

    def leaf(path, like):
        name = path[-1].key
        if "kernel" in name:
            fan_in = max(1, math.prod(like.shape[:-1]))
            values = rng.normal(size=like.shape) / math.sqrt(fan_in)
        elif "bias" in name:
            values = 0.1 * rng.normal(size=like.shape)
        else:
            values = rng.uniform(0.5, 1.5, size=like.shape)
        return jnp.asarray(values, like.dtype)

    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return jax.tree_util.tree_map_with_path(leaf, shapes)
