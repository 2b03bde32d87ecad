"""Convolutions as products of windows against the plain operations: values and derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.networks import LeNet, LeNetConfig, patches


def plain(layer, x):
    return nnx.max_pool(layer(x), (2, 2), (2, 2))


@pytest.mark.parametrize(
    ("size", "taps", "channels", "block"),
    [
        ((16, 16, 3), (5, 5), 6, (4, 2)),
        ((11, 14, 2), (4, 3), 3, (2, 6)),  # a row and no column left out; three blocks of columns
        ((12, 8, 1), (3, 5), 2, (4, 4)),  # of the rows no multiple of 4
    ],
)
def test_pooled_is_the_pool_of_the_layer(size, taps, channels, block):
    layer = nnx.Conv(size[-1], channels, taps, padding="VALID", rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.arange(channels, dtype=jnp.float32)
    images = jax.random.normal(jax.random.key(0), (3, *size))
    graph, params = nnx.split(layer)
    weights = jnp.cos(jnp.arange(plain(layer, images).size, dtype=jnp.float32))

    @jax.jit
    def both(params, images):
        def of(function):
            def value(params, images):
                return function(nnx.merge(graph, params), images)

            y, pullback = jax.vjp(value, params, images)
            return y, pullback(weights.reshape(y.shape))

        return of(plain), of(lambda layer, x: patches.pooled(layer, x, block=block))

    expected, found = both(params, images)
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_equal_pixels_have_the_derivative_of_a_pool():
    images = np.random.default_rng(0).integers(0, 3, (2, 8, 4, 5)).astype(np.float32)
    in_blocks = (
        2,
        4,
        2,
        2,
        2,
        5,
    )  # batch, blocks and their rows, blocks and their columns, channels
    blocks = images.reshape(in_blocks).transpose(0, 1, 3, 2, 4, 5)

    def pool(y):
        return nnx.max_pool(y, (2, 2), (2, 2))

    def pool_of_blocks(blocks):
        return patches.merged(patches.max_of_four(blocks))

    expected, pullback = jax.vjp(pool, images)
    found, pullback_of_blocks = jax.vjp(pool_of_blocks, blocks)
    np.testing.assert_array_equal(found, expected)
    slopes = jnp.arange(1.0, 1 + expected.size).reshape(expected.shape)
    (slope,) = pullback_of_blocks(slopes)
    slope = slope.transpose(0, 1, 3, 2, 4, 5).reshape(images.shape)
    np.testing.assert_array_equal(slope, pullback(slopes)[0])


def test_lenet_computes_what_its_layers_do():
    features = LeNet(LeNetConfig((32, 32, 3)), rngs=nnx.Rngs(0)).features
    images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    x = nnx.relu(plain(features.conv1, images))
    x = nnx.relu(plain(features.conv2, x)).reshape(2, -1)
    np.testing.assert_allclose(features(images), x, rtol=1e-5, atol=1e-5)
