"""Norms that are not squared, spectral normalisation, penalties, clipping and projections, against dense SVDs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stochsolvers as ss

KEY = jax.random.key(0)


def matrix_of(layer, shape):
    """The matrix (inputs, outputs) of a function that is affine in inputs of this shape, by its columns."""
    size = int(np.prod(shape))
    offset = layer(jnp.zeros((1, *shape))).reshape(1, -1)
    images = layer(jnp.eye(size).reshape(size, *shape)).reshape(size, -1)
    return np.asarray(images) - np.asarray(offset)


def norm_of(layer, shape):
    return np.linalg.svd(matrix_of(layer, shape), compute_uv=False)[0]


def kernel(rng, *shape):
    return jnp.asarray(rng.normal(size=shape))


def maps(rng):
    k2 = kernel(rng, 3, 3, 2, 4)
    return {
        "dense": ss.Dense(kernel(rng, 6, 9)),
        "zero-padded": ss.Conv(k2, (5, 4)),
        "strided, grouped": ss.Conv(
            kernel(rng, 3, 3, 2, 4), (5, 4), strides=2, feature_group_count=2
        ),
        "circular": ss.Conv(k2, (5, 4), padding="CIRCULAR"),
        "1-D, dilated": ss.Conv(kernel(rng, 3, 2, 3), (9,), kernel_dilation=2),
        "3-D": ss.Conv(kernel(rng, 2, 3, 2, 2, 2), (3, 4, 3)),
        "transposed": ss.conv_transpose(k2, (3, 3), strides=2),
        "contraction": ss.Contraction("...pc,gcn->...pgn", kernel(rng, 2, 3, 4), (5, 3)),
        "function": ss.linear_map(lambda x: jnp.cumsum(x, axis=-1), (6,)),
    }


NAMES = tuple(maps(np.random.default_rng(0)))


@pytest.mark.parametrize("name", NAMES)
def test_norm_bracket_rank_and_condition_are_those_of_the_matrix(name, rng):
    A = maps(rng)[name]
    sigma = np.linalg.svd(matrix_of(A, A.in_shape), compute_uv=False)
    lower, upper = ss.spectral_norm_bracket(A)
    assert lower <= sigma[0] <= upper
    assert upper - lower <= 1e-6 * upper
    np.testing.assert_allclose(ss.spectral_norm(A), sigma[0], rtol=1e-9)
    np.testing.assert_allclose(ss.stable_rank(A), np.sum(sigma**2) / sigma[0] ** 2, rtol=1e-9)
    values = np.asarray(ss.singular_values(A, grid="operator"))
    np.testing.assert_allclose(values[: len(sigma)], sigma, atol=1e-10 * sigma[0])
    if sigma[-1] > 1e-8:
        np.testing.assert_allclose(ss.condition_number(A), sigma[0] / sigma[-1], rtol=1e-7)
