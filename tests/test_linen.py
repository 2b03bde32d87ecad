"""Linen layers: the plain layers' parameter trees, random streams, the cache collection."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx, serialization

import stochsolvers as ss

ONE = ss.ProxGD(1, step_size=1.0)


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jax.nn.relu(nn.Conv(4, (3, 3), strides=2, name="conv")(x))
        return jax.nn.relu(nn.Dense(6, name="dense")(x.reshape(len(x), -1)))


class Twin(nn.Module):
    solver: ss.Solver

    @nn.compact
    def __call__(self, x):
        x = ss.linen.SolverConv(4, (3, 3), strides=2, solver=self.solver, name="conv")(x)
        x = x.reshape(len(x), -1)
        return ss.linen.SolverDense(6, solver=self.solver, name="dense")(x)


@pytest.fixture
def images(rng):
    return jnp.asarray(rng.normal(size=(3, 6, 6, 2)), jnp.float32)


@pytest.mark.optimized
def test_saved_checkpoint_of_a_plain_network_loads_into_its_twin(images):
    variables = Plain().init(jax.random.key(0), images)
    saved = serialization.to_bytes(variables["params"])
    template = Twin(ONE).init(jax.random.key(1), images)["params"]
    assert jax.tree.structure(template) == jax.tree.structure(variables["params"])
    loaded = serialization.from_bytes(template, saved)
    outputs = Twin(ONE).apply({"params": loaded}, images), Plain().apply(variables, images)
    np.testing.assert_array_equal(*outputs)


def test_initial_parameters_are_those_of_the_plain_layers(images):
    ours = Twin(ss.ProxGD(3)).init(jax.random.key(0), images)
    plain = Plain().init(jax.random.key(0), images)
    jax.tree.map(np.testing.assert_array_equal, ours["params"], plain["params"])
    assert jax.tree.map(jnp.shape, ours["solver_state"]) == {
        "conv": {"lipschitz": (), "reference": (68,)},
        "dense": {"lipschitz": (), "reference": (66,)},
    }


def test_constant_is_kept_once_refreshed_and_optional(images):
    model = Twin(ss.ProxGD(3))
    variables = model.init(jax.random.key(0), images)
    double = jax.tree.map(lambda p: 2 * p, variables["params"])
    want = model.apply({"params": double}, images)  # no collection: computed at the call
    # weights loaded beside the state of the initialisation: nothing was refreshed yet
    np.testing.assert_allclose(model.apply({**variables, "params": double}, images), want)
    _, updated = model.apply(variables, images, mutable=["solver_state"])
    # a step of training keeps the constant, weights of another network do not
    trained = jax.tree.map(lambda p: 1.1 * p, variables["params"])
    kept = model.apply({**updated, "params": trained}, images)
    assert not np.allclose(kept, model.apply({"params": trained}, images))  # too small by 1.21
    loaded = model.apply({**updated, "params": double}, images)
    np.testing.assert_allclose(loaded, want, rtol=1e-5)
    value, updated = model.apply({**updated, "params": double}, images, mutable=["solver_state"])
    np.testing.assert_allclose(
        updated["solver_state"]["dense"]["lipschitz"],
        4 * variables["solver_state"]["dense"]["lipschitz"],
        rtol=1e-5,
    )
    np.testing.assert_allclose(value, want, rtol=1e-5)


def test_random_stream_and_deterministic(rng):
    layer = ss.linen.SolverDense(4, solver=ss.ProxSG(0.5, 3))
    x = jnp.asarray(rng.normal(size=(2, 8)), jnp.float32)
    variables = layer.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x)
    one, again, other = (
        layer.apply(variables, x, rngs={"dropout": jax.random.key(k)}) for k in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
    still = layer.apply(variables, x, deterministic=True)
    np.testing.assert_array_equal(still, layer.copy(deterministic=True).apply(variables, x))


def test_linen_and_nnx_are_the_same_layer(rng):
    x = jnp.asarray(rng.normal(size=(2, 8)), jnp.float32)
    solver = ss.ProxGD(5, momentum=True)
    ours = ss.nnx.SolverLinear(8, 4, solver=solver, ridge=0.1, rngs=nnx.Rngs(0))
    params = {"kernel": ours.kernel[...], "bias": ours.bias[...]}
    layer = ss.linen.SolverDense(4, solver=solver, ridge=0.1)
    np.testing.assert_allclose(layer.apply({"params": params}, x), ours(x), rtol=1e-6)


def test_gradients_flow(images):
    model = Twin(ss.ProxGD(3))
    variables = model.init(jax.random.key(0), images)

    def loss(params):
        return jnp.sum(model.apply({**variables, "params": params}, images) ** 2)

    grads = jax.grad(loss)(variables["params"])
    assert all(np.any(g != 0) and np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))


def test_inputs_without_spatial_axes_are_refused():
    layer = ss.linen.SolverConv(4, (3, 3), solver=ONE)
    with pytest.raises(ValueError, match="shape of SolverConv's inputs: expected"):
        layer.init(jax.random.key(0), jnp.ones((3, 4)))


def test_options_that_would_be_ignored_are_refused(images):
    layer = ss.linen.SolverDense(4, solver=ONE, dot_general=lambda *a, **k: None)
    with pytest.raises(ValueError, match="dot_general of SolverDense: expected the default"):
        layer.init(jax.random.key(0), jnp.ones((3, 4)))


def test_a_constant_of_another_image_size_is_not_used(rng):
    layer = ss.linen.SolverConv(3, (3, 3), solver=ss.ProxGD(5), ridge=0.1, padding="CIRCULAR")
    small, large = (jnp.asarray(rng.normal(size=(2, n, n, 2)), jnp.float32) for n in (3, 8))
    variables = layer.init(jax.random.key(0), small)
    _, state = layer.apply(variables, small, mutable=["solver_state"])
    variables = {**variables, **state}
    want = layer.apply({"params": variables["params"]}, large)  # computed at the call
    np.testing.assert_array_equal(layer.apply(variables, large), want)
