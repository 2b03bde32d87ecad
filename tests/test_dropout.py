"""The dropout layers as functions, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equivalence.plain_layers import Geometry, dense_matrix

import stochsolvers as ss
from stochsolvers import dropout, sampling

KEY = jax.random.key(11)
CONV = Geometry((3, 4), (2, 3), 4, 3)


@pytest.mark.parametrize("batch", [(), (7,), (2, 3)])
def test_tau_nice_dropout_counts_and_rescales(batch, rng):
    x = rng.uniform(1, 2, size=(*batch, 5))
    for tau in range(1, 6):
        dropped = np.asarray(dropout.tau_nice_dropout(KEY, jnp.asarray(x), tau))
        kept = dropped != 0
        np.testing.assert_array_equal(kept.sum(axis=-1), tau)
        np.testing.assert_allclose(dropped, np.where(kept, x * 5 / tau, 0), rtol=1e-15)


def test_tau_nice_dropout_is_unbiased_for_its_mask(rng):
    """The mask is the τ-nice one of the same key, whose law is tested with the samplings."""
    x = jnp.asarray(rng.normal(size=(6, 5)))
    mask = sampling.tau_nice_mask(KEY, 2, 5, (6,))
    np.testing.assert_array_equal(dropout.tau_nice_dropout(KEY, x, 2) != 0, mask)
    np.testing.assert_array_equal(dropout.output_dropout(KEY, x, 2) != 0, mask)


def test_a_fraction_is_a_keep_rate(rng):
    x = jnp.asarray(rng.uniform(1, 2, size=(3, 10)))
    for function in (dropout.tau_nice_dropout, dropout.output_dropout):
        rate = 0.3
        dropped = function(KEY, x, 1.0 - rate)
        np.testing.assert_array_equal(np.sum(np.asarray(dropped) == 0, axis=-1), 3)
        np.testing.assert_array_equal(function(KEY, x, 7), dropped)


def test_all_features_kept_is_the_identity(rng):
    x = jnp.asarray(rng.normal(size=(3, 5)))
    np.testing.assert_array_equal(dropout.tau_nice_dropout(KEY, x, 5), x)
    np.testing.assert_array_equal(dropout.tau_nice_dropout(KEY, x, 1.0), x)
    np.testing.assert_array_equal(dropout.output_dropout(KEY, x, 5), x)


@pytest.mark.parametrize("name", ["tau_nice_dropout", "output_dropout"])
def test_whole_feature_maps_drop(name, rng):
    x = rng.uniform(1, 2, size=(6, 2, 3, 5))
    dropped = np.asarray(getattr(dropout, name)(KEY, jnp.asarray(x), 2, spatial_ndim=2))
    maps = (dropped != 0).reshape(6, 6, 5)
    assert np.all(maps == maps[:, :1])
    np.testing.assert_array_equal(maps[:, 0].sum(axis=-1), 2)
    scale = 5 / 2 if name == "tau_nice_dropout" else 1.0
    np.testing.assert_allclose(dropped, np.where(dropped != 0, scale * x, 0), rtol=1e-15)
    assert len(np.unique(maps[:, 0], axis=0)) > 1  # a mask for every example


def test_without_spatial_axes_every_pixel_is_an_example(rng):
    x = rng.uniform(1, 2, size=(6, 2, 3, 5))
    dropped = np.asarray(dropout.tau_nice_dropout(KEY, jnp.asarray(x), 2))
    np.testing.assert_array_equal((dropped != 0).sum(axis=-1), 2)
    assert len(np.unique((dropped != 0)[0].reshape(6, 5), axis=0)) > 1


def test_output_dropout_does_not_rescale(rng):
    x = rng.uniform(1, 2, size=(7, 5))
    dropped = np.asarray(dropout.output_dropout(KEY, jnp.asarray(x), 3))
    np.testing.assert_array_equal((dropped != 0).sum(axis=-1), 3)
    np.testing.assert_array_equal(dropped, np.where(dropped != 0, x, 0))


@pytest.mark.parametrize("name", ["tau_nice_dropout", "output_dropout"])
def test_a_dropped_feature_is_zero_whatever_it_was(name):
    x = jnp.array([[jnp.inf, jnp.nan, 1.0, 1.0]])
    for seed in range(8):
        dropped = np.asarray(getattr(dropout, name)(jax.random.key(seed), x, 2))[0]
        assert np.sum(dropped == 0) == 2


def test_dtype_is_that_of_the_input():
    x, A = jnp.ones((2, 4), jnp.bfloat16), ss.Dense(jnp.ones((4, 3), jnp.float32))
    for drop in (
        lambda x: dropout.tau_nice_dropout(KEY, x, 3),
        lambda x: dropout.output_dropout(KEY, x, 3),
        lambda x: dropout.importance_dropout(KEY, A, x, 3),
    ):
        assert jax.eval_shape(drop, x).dtype == jnp.bfloat16


@pytest.mark.parametrize("tau", [1, 2, 4, 0.5])
def test_additive_dropout_dense(tau, rng):
    kernel, z = rng.normal(size=(4, 3)), rng.normal(size=(5, 3))
    added = dropout.additive_dropout(KEY, ss.Dense(jnp.asarray(kernel)), jnp.asarray(z), tau)
    count = 2 if tau == 0.5 else tau
    masks = np.asarray(sampling.tau_nice_mask(KEY, count, 4, (5,)))
    for row, mask, point in zip(np.asarray(added), masks, z, strict=True):
        rank_ones = sum(np.outer(kernel[i], kernel[i]) for i in np.flatnonzero(mask))
        np.testing.assert_allclose(row, point - 4 / count * rank_ones @ point, rtol=1e-12)


def test_additive_dropout_convolution(rng):
    kernel, z = CONV.kernel(rng), rng.normal(size=(2, 3, 4, 3))
    conv = ss.Conv(jnp.asarray(kernel), CONV.spatial_shape)
    matrix = dense_matrix(CONV, kernel)
    masks = np.asarray(sampling.tau_nice_mask(KEY, 3, 4, (2,)))
    added = np.asarray(dropout.additive_dropout(KEY, conv, jnp.asarray(z), 3))
    for row, mask, point in zip(added, masks, z.reshape(2, -1), strict=True):
        columns = matrix[:, np.tile(mask, 12)]  # whole feature maps
        expected = point - 4 / 3 * columns @ (columns.T @ point)
        np.testing.assert_allclose(row.ravel(), expected, rtol=1e-11, atol=1e-12)


def test_additive_dropout_of_zero_is_zero(rng):
    A = ss.Dense(jnp.asarray(rng.normal(size=(4, 3))))
    assert not np.any(dropout.additive_dropout(KEY, A, jnp.zeros((2, 3)), 2))


def inclusion(scores, tau):
    """min(1, c s_i) summing to τ, by bisection."""
    low, high = 0.0, tau / scores.min()
    for _ in range(200):
        middle = 0.5 * (low + high)
        if np.minimum(1, middle * scores).sum() > tau:
            high = middle
        else:
            low = middle
    return np.minimum(1, high * scores)


@pytest.mark.parametrize("by", ["gradient", "lipschitz"])
def test_importance_dropout_dense(by, rng):
    kernel, x = rng.normal(size=(5, 3)), rng.normal(size=(8, 5))
    A = ss.Dense(jnp.asarray(kernel))
    drop = jax.jit(lambda x: dropout.importance_dropout(KEY, A, x, 2, by=by))
    dropped = np.asarray(drop(x))
    np.testing.assert_array_equal((dropped != 0).sum(axis=-1), 2)
    norms = np.linalg.norm(kernel, axis=1)
    for row, point in zip(dropped, x, strict=True):
        p = inclusion(norms * np.abs(point) if by == "gradient" else norms**2, 2)
        np.testing.assert_allclose(row, np.where(row != 0, point / p, 0), rtol=1e-10)


def test_importance_dropout_drops_whole_feature_maps(rng):
    kernel, x = CONV.kernel(rng), rng.uniform(1, 2, size=(6, 3, 4, 4))
    conv = ss.Conv(jnp.asarray(kernel), CONV.spatial_shape)
    dropped = np.asarray(jax.jit(lambda x: dropout.importance_dropout(KEY, conv, x, 2))(x))
    ratio = (dropped / x).reshape(6, 12, 4)
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1], ratio.shape), rtol=1e-12)
    np.testing.assert_array_equal((ratio[:, 0] != 0).sum(axis=-1), 2)
    assert np.all(ratio[ratio != 0] >= 1)
    assert len(np.unique(ratio[:, 0] != 0, axis=0)) > 1


@pytest.mark.parametrize("tau", [0, 6, 0.0, 1.5])
def test_counts_out_of_range_are_refused(tau):
    A, x = ss.Dense(jnp.ones((5, 5))), jnp.ones((2, 5))
    for drop in (
        lambda: dropout.tau_nice_dropout(KEY, x, tau),
        lambda: dropout.output_dropout(KEY, x, tau),
        lambda: dropout.additive_dropout(KEY, A, x, tau),
        lambda: dropout.importance_dropout(KEY, A, x, tau),
    ):
        with pytest.raises(ValueError, match="tau"):
            drop()


def test_bad_shapes_are_refused():
    x, A = jnp.ones((2, 5)), ss.Dense(jnp.ones((5, 3)))
    for function in (dropout.tau_nice_dropout, dropout.output_dropout):
        with pytest.raises(ValueError, match="spatial_ndim"):
            function(KEY, x, 2, spatial_ndim=2)
        with pytest.raises(ValueError, match="spatial_ndim"):
            function(KEY, x, 2, spatial_ndim=-1)
    with pytest.raises(ValueError, match=r"z of additive_dropout: expected \(\.\.\., 3\)"):
        dropout.additive_dropout(KEY, A, x, 2)
    with pytest.raises(ValueError, match=r"inputs of LayerProblem: expected \(\.\.\., 5\)"):
        dropout.importance_dropout(KEY, A, jnp.ones((2, 3)), 2)
