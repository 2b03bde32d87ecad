"""Convolutions as products of windows against the plain operations: values and derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.networks import LeNet, LeNetConfig, patches


def plain(layer, x):
    return nnx.max_pool(layer(x), (2, 2), (2, 2))


def values_and_slopes(layer, images, *functions):
    """Of each function of the layer and the images, and of the layer itself if only one is given."""
    graph, params = nnx.split(layer)

    def of(function, params, images):
        y, pullback = jax.vjp(lambda p, x: function(nnx.merge(graph, p), x), params, images)
        slopes = pullback(jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))
        return jax.tree.leaves((y, slopes))

    if len(functions) == 1:
        functions = (*functions, lambda layer, x: layer(x))
    return jax.jit(lambda *both: [of(function, *both) for function in functions])(params, images)


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
    function = functools.partial(patches.pooled, block=block)
    found, expected = values_and_slopes(layer, images, function, plain)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "taps", "bias"),
    [
        ((2, 2), (3, 3), True),
        ((3, 2), (3, 2), False),
        ((4, 3), (5, 4), True),
        ((3, 4), (3, 3), True),
    ],
)
def test_convolved_is_the_layer(size, taps, bias):
    layer = nnx.Conv(4, 6, taps, use_bias=bias, rngs=nnx.Rngs(0))
    images = jax.random.normal(jax.random.key(0), (5, *size, 4))
    for found, expected in zip(*values_and_slopes(layer, images, patches.convolved), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_what_is_no_product_is_left_to_the_layer():
    images = jnp.ones((1, 2, 2, 4))
    for options in ({"strides": 2}, {"feature_group_count": 2}, {"padding": "CIRCULAR"}):
        layer = nnx.Conv(4, 6, (3, 3), rngs=nnx.Rngs(0), **options)
        np.testing.assert_array_equal(patches.convolved(layer, images), layer(images))


def test_bfloat16_layers_compute_in_bfloat16():
    layer = nnx.Conv(4, 6, (3, 3), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    found, expected = (
        f(jnp.ones((1, 2, 2, 4))) for f in (lambda x: patches.convolved(layer, x), layer)
    )
    assert found.dtype == expected.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        *(x.astype(jnp.float32) for x in (found, expected)), rtol=0.03, atol=0.03
    )


@pytest.mark.parametrize("size", [(4, 6), (5, 4)])
def test_max_pool_is_the_pool(size):
    images = jax.random.normal(jax.random.key(0), (2, *size, 3))
    y, pullback = jax.vjp(lambda x: nnx.max_pool(x, (2, 2), (2, 2), padding="SAME"), images)
    found, slopes = jax.vjp(patches.max_pool, images)
    np.testing.assert_array_equal(found, y)
    np.testing.assert_array_equal(slopes(y), pullback(y))


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
