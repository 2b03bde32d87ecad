"""Lipschitz bounds of solver layers into which a BatchNorm is folded, against dense Jacobians in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import stochsolvers as ss


class Network(nnx.Module):
    """A convolution and a dense layer, each with its BatchNorm and its activation."""

    def __init__(self, rng):
        options: dict = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
        self.conv = nnx.Conv(2, 3, (2, 2), padding="CIRCULAR", **options)
        self.dense = nnx.Linear(27, 5, **options)
        self.norms = nnx.List([nnx.BatchNorm(n, **options) for n in (3, 5)])
        for norm in self.norms:
            for variable in (norm.mean, norm.bias, norm.scale, norm.var):
                value = rng.normal(size=variable.shape) if variable is not norm.var else None
                value = rng.uniform(0.3, 3, variable.shape) if value is None else value
                variable[...] = jnp.asarray(value, variable.dtype)
        self.norms[0].scale[...] = jnp.asarray([0.0, -2.0, 0.5])

    def __call__(self, x):
        x = nnx.relu(self.norms[0](self.conv(x)))
        return jnp.tanh(self.norms[1](self.dense(x.reshape(-1, 27))))


SHAPE = (1, 3, 3, 2)


def replaced(model, num_iters):
    inputs = jnp.ones(SHAPE, jnp.float64)
    ss.nnx.replace_layers(
        model,
        "*",
        solver=ss.ProxGD(num_iters),
        inputs=inputs,
        ridge=0.1,
        measure=False,
        prior="auto",
    )


def report_of(model):
    return ss.lipschitz_report(model, SHAPE, dtype=jnp.float64)


def steepest(model, points):
    """The largest norm of the Jacobians of the conv part and of the whole, at some points."""
    graph, state = nnx.split(model)

    @jax.jit
    def jacobians(state, points):
        model = nnx.merge(graph, state)
        first = lambda x: model.norms[0](model.conv(x.reshape(SHAPE)))  # noqa: E731
        both = lambda x: (first(x).ravel(), model(x.reshape(SHAPE)).ravel())  # noqa: E731
        return jax.vmap(jax.jacfwd(both))(points)

    return [np.linalg.norm(one, 2, axis=(1, 2)).max() for one in jacobians(state, points)]


@pytest.mark.parametrize("num_iters", [1, 3])
def test_a_layer_and_the_batch_norm_in_it_have_one_bound(num_iters, rng):
    model = Network(rng)
    model.eval()
    points = jnp.asarray(3 * rng.normal(size=(40, 18)))
    norms = []
    for layer, norm in ((model.conv, model.norms[0]), (model.dense, model.norms[1])):
        s = np.asarray(norm.scale[...]) / np.sqrt(np.asarray(norm.var[...]) + 1e-5)
        norms.append((layer, s))
    plain = report_of(model)
    replaced(model, num_iters)
    report = report_of(model)
    assert [(row.name, row.kind) for row in report.rows] == [
        ("conv", "SolverConv"),
        ("dense", "SolverLinear"),
    ]
    assert not any(row.note for row in report.rows)
    first, whole = steepest(model, points)
    assert first <= report.rows[0].constant < np.inf
    assert whole <= report.bound < np.inf
    np.testing.assert_allclose(report.bound, report.product, rtol=1e-12)
    matrix = np.asarray(model.dense.kernel[...]) * norms[1][1]
    np.testing.assert_allclose(report.rows[1].upper, np.linalg.norm(matrix, 2), rtol=1e-6)
    if num_iters == 1:
        np.testing.assert_allclose(report.bound, plain.bound, rtol=2e-3)
    # other values of the BatchNorm, of which the layer does not know: no bound, and then that of the new ones
    model.norms[0].scale[...] = 20 * model.norms[0].scale[...]
    stale = report_of(model)
    assert stale.bound == np.inf
    assert "refresh_lipschitz" in stale.rows[0].note
    ss.nnx.refresh_lipschitz(model)
    fresh = report_of(model)
    assert steepest(model, points)[0] <= fresh.rows[0].constant
    np.testing.assert_allclose(fresh.rows[0].constant, 20 * report.rows[0].constant, rtol=0.2)


def test_what_reads_the_layer_past_its_batch_norm_has_no_bound(rng):
    class Past(Network):
        def __call__(self, x):
            y = self.conv(x)
            return nnx.relu(self.norms[0](y)) + (y if self.past else 0)

        past = False

    model = Past(rng)
    model.eval()
    replaced_one = {"solver": ss.ProxGD(2), "inputs": jnp.ones(SHAPE), "measure": False}
    ss.nnx.replace_layers(model, "conv", **replaced_one)
    assert report_of(model).bound < np.inf
    model.past = True
    assert report_of(model).bound == np.inf


class Leaking(nnx.Module):
    """An affine layer whose bias depends on the input too, before a BatchNorm."""

    def __init__(self, axis=-1):
        rngs = nnx.Rngs(0)
        self.layer = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, axis=axis, use_running_average=True, rngs=rngs)
        self.norm.scale[...] = jnp.asarray([1.0, 2.0, 3.0, 50.0], jnp.float32)

    def __call__(self, x):
        self.layer.bias.set_value(100 * x[0])
        return self.norm(self.layer(x))


class Along(Leaking):
    """Normalised along another axis than the layer's outputs."""

    def __call__(self, x):
        return self.norm(self.layer(x))


def test_a_layer_and_a_batch_norm_that_are_not_one_map_are_bounded_apart():
    assert ss.lipschitz_report(Leaking(), (2, 4)).bound == np.inf
    model = Along(axis=1)
    kernel = np.diag([1.0, 1.0, 1.0, 0.01]).astype(np.float32)
    model.layer.kernel[...] = jnp.asarray(kernel)
    assert ss.lipschitz_report(model, (2, 4, 4)).bound >= 49.9

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=True, axis=1)(nn.Dense(4)(x))

    variables = {
        "params": {
            "Dense_0": {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(4, jnp.float32)},
            "BatchNorm_0": {"scale": model.norm.scale[...], "bias": jnp.zeros(4, jnp.float32)},
        },
        "batch_stats": {
            "BatchNorm_0": {"mean": jnp.zeros(4, jnp.float32), "var": jnp.ones(4, jnp.float32)}
        },
    }
    assert ss.lipschitz_report(Linen(), variables, (2, 4, 4)).bound >= 49.9
