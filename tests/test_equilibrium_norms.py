"""Maps with a certified bound on their norm: dense, convolutions of every padding and stride, in training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stochsolvers as ss
from stochsolvers.equilibrium import normalized, normalized_refresh


def conv(rng, padding="SAME", strides=1, shape=(4, 5), groups=1, **options):
    kernel = jnp.asarray(rng.normal(size=(3, 2, 4 // groups, 2)))
    return ss.Conv(
        kernel,
        shape,
        strides=(strides, strides),
        padding=padding,
        feature_group_count=groups,
        **options,
    )


MAPS = {
    "dense": lambda rng: ss.Dense(jnp.asarray(rng.normal(size=(7, 5)))),
    "dense of many": lambda rng: ss.Dense(jnp.asarray(rng.normal(size=(40, 30)))),
    "same": conv,
    "circular": lambda rng: conv(rng, "CIRCULAR"),
    "valid": lambda rng: conv(rng, "VALID"),
    "causal": lambda rng: conv(rng, ((2, 0), (1, 0))),
    "strides": lambda rng: conv(rng, strides=2),
    "circular strides": lambda rng: conv(rng, "CIRCULAR", 2, (4, 6)),
    "groups": lambda rng: conv(rng, groups=2),
    "dilated": lambda rng: conv(rng, kernel_dilation=(2, 1)),
    "one axis": lambda rng: ss.Conv(jnp.asarray(rng.normal(size=(3, 2, 2))), (6,)),
    "transposed": lambda rng: conv(rng).T,
    "function": lambda rng: ss.linear_map(
        lambda W, x: jnp.tanh(W) @ x, (5,), jnp.asarray(rng.normal(size=(4, 5)))
    ),
}


def spectral_norm(linear_map):
    units = jnp.eye(int(np.prod(linear_map.in_shape)), dtype=linear_map.dtype)
    rows = linear_map(units.reshape(-1, *linear_map.in_shape))
    return np.linalg.norm(np.asarray(rows, np.float64).reshape(len(units), -1), 2)


@pytest.mark.parametrize("name", MAPS)
def test_the_norm_is_at_most_the_bound(rng, name):
    """By the singular values of the whole matrix; a map within the bound is left alone; gradients."""
    linear_map = MAPS[name](rng)
    flat, unravel = jax.flatten_util.ravel_pytree(linear_map)
    weight = jnp.asarray(rng.normal(size=flat.shape))

    @jax.jit
    def both(flat, bound):
        def inner(flat):
            return jnp.sum(
                weight
                * jax.flatten_util.ravel_pytree(normalized(unravel(flat), bound))[0][: flat.size]
            )

        return normalized(unravel(flat), bound), *jax.value_and_grad(inner)(flat)

    bounded, _, slope = both(flat, 0.95)
    norm = spectral_norm(bounded)
    assert norm <= 0.95
    exact = name in ("dense", "dense of many", "circular", "circular strides", "function")
    assert norm >= (0.9499 if exact else 0.5)
    loose, _, _ = both(flat, 100.0)
    for new, old in zip(jax.tree.leaves(loose), jax.tree.leaves(linear_map), strict=False):
        np.testing.assert_array_equal(new, old)
    direction = jnp.asarray(rng.normal(size=flat.shape))
    step = 1e-5
    ahead, behind = (both(flat + s * step * direction, 0.95)[1] for s in (1, -1))
    np.testing.assert_allclose(
        jnp.vdot(slope, direction), (ahead - behind) / (2 * step), rtol=2e-4, atol=1e-6
    )


@pytest.mark.optimized
@pytest.mark.parametrize("name", ["dense of many", "same"])
def test_the_bound_holds_all_through_training(rng, name):
    """A kernel that moves a little at every step: the state follows it, in float32."""
    linear_map = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), MAPS[name](rng))
    state = ss.lipschitz_state(linear_map, grid="padded")
    refresh, kept = jax.jit(normalized_refresh), 0
    tight = spectral_norm(normalized(linear_map, 0.9))
    for _k in range(25):
        move = 1e-3 * rng.normal(size=linear_map.kernel.shape)
        kernel = linear_map.kernel + jnp.asarray(move, jnp.float32)
        linear_map = dataclasses.replace(linear_map, kernel=kernel)
        before = state
        bounded, state = refresh(linear_map, state, 0.9, tolerance=0.05)
        kept += bool(jnp.all(before.anchor == state.anchor))
        norm = spectral_norm(bounded)
        assert tight * 0.96 <= norm <= 0.9
    assert kept > 5  # most of them without a decomposition


def test_states_of_others_are_refused(rng):
    linear_map = MAPS["same"](rng)
    with pytest.raises(ValueError, match="grid of the state"):
        normalized_refresh(linear_map, ss.lipschitz_state(linear_map))
