"""ProxProp layers of NNX and Linen: the plain layers' parameters and values, another backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import stochsolvers as ss
from stochsolvers.proxprop import ConjugateGradients, Exact, implicit_gradient

STEP = Exact(0.2)
CONV = {"strides": 2, "padding": "SAME", "feature_group_count": 2}


def slopes(layer, x):
    """Of half the squared outputs with respect to the parameters, and the outputs."""
    graph, parameters, rest = nnx.split(layer, nnx.Param, ...)

    def loss(parameters):
        y = nnx.merge(graph, parameters, rest, copy=True)(x)
        return 0.5 * jnp.sum(y**2), y

    (d, y) = jax.jit(jax.grad(loss, has_aux=True))(parameters)
    return d, y


@pytest.mark.optimized
def test_linear(rng):
    x = jnp.asarray(rng.normal(size=(2, 3, 6)), jnp.float32)
    ours = ss.nnx.ProxPropLinear(6, 4, step=STEP, rngs=nnx.Rngs(0))
    plain = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(ours), nnx.state(plain))
    np.testing.assert_array_equal(ours(x), plain(x))
    d, y = slopes(ours, x)
    kernel, bias = implicit_gradient(ss.Dense(plain.kernel[...]), x, y, STEP)
    np.testing.assert_allclose(d["kernel"][...], kernel, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(d["bias"][...], bias, rtol=1e-5, atol=1e-6)
    twin = ss.nnx.ProxPropLinear.from_layer(plain, step=ConjugateGradients(0.1, 2))
    assert twin.kernel is plain.kernel
    assert twin.bias is plain.bias
    assert ss.nnx.ProxPropLinear.from_layer(twin).step == Exact()
    without = ss.nnx.ProxPropLinear.from_layer(nnx.Linear(6, 4, use_bias=False, rngs=nnx.Rngs(0)))
    assert without.bias is None
    assert without(x).shape == (2, 3, 4)


@pytest.mark.optimized
def test_conv(rng):
    x = jnp.asarray(rng.normal(size=(3, 6, 5, 2)), jnp.float32)
    plain = nnx.Conv(2, 4, (3, 3), **CONV, rngs=nnx.Rngs(0))
    ours = ss.nnx.ProxPropConv(2, 4, (3, 3), **CONV, step=STEP, rngs=nnx.Rngs(0))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(ours), nnx.state(plain))
    np.testing.assert_array_equal(ours(x), plain(x))
    twin = ss.nnx.ProxPropConv.from_layer(plain, step=STEP)
    assert twin.kernel is plain.kernel
    (d, y), (of_twin, _) = slopes(ours, x), slopes(twin, x)
    A = ss.Conv(plain.kernel[...], (6, 5), **CONV)
    kernel, bias = implicit_gradient(A, x, y, STEP)
    for found in (d, of_twin):
        np.testing.assert_allclose(found["kernel"][...], kernel, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found["bias"][...], bias, rtol=1e-4, atol=1e-6)


@pytest.mark.optimized
def test_linen_is_the_same_layer(rng):
    images = jnp.asarray(rng.normal(size=(3, 6, 5, 2)), jnp.float32)

    class Net(nn.Module):
        conv: type[nn.Module]
        dense: type[nn.Module]
        options: dict

        @nn.compact
        def __call__(self, x):
            x = jax.nn.relu(self.conv(4, (3, 3), **CONV, name="conv", **self.options)(x))
            return self.dense(4, name="dense", **self.options)(x.reshape(len(x), -1))

    plain = Net(nn.Conv, nn.Dense, {})
    ours = Net(ss.linen.ProxPropConv, ss.linen.ProxPropDense, {"step": STEP})
    variables = plain.init(jax.random.key(0), images)
    mine = ours.init(jax.random.key(0), images)
    jax.tree.map(np.testing.assert_array_equal, mine, variables)
    np.testing.assert_array_equal(ours.apply(variables, images), plain.apply(variables, images))

    def loss(parameters):
        return 0.5 * jnp.sum(ours.apply({"params": parameters}, images) ** 2)

    d = jax.jit(jax.grad(loss))(variables["params"])["dense"]
    parameters = variables["params"]
    hidden = jax.nn.relu(nn.Conv(4, (3, 3), **CONV).apply({"params": parameters["conv"]}, images))
    A, rows = ss.Dense(parameters["dense"]["kernel"]), hidden.reshape(3, -1)
    kernel, bias = implicit_gradient(A, rows, ours.apply(variables, images), STEP)
    np.testing.assert_allclose(d["kernel"], kernel, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(d["bias"], bias, rtol=1e-4, atol=1e-6)
    layer = ss.linen.ProxPropDense(4, step=STEP, dot_general=lambda *a, **k: None)
    with pytest.raises(ValueError, match="dot_general of ProxPropDense: expected the default"):
        layer.init(jax.random.key(0), rows)
    with pytest.raises(ValueError, match="step of proximal backpropagation: expected"):
        ss.linen.ProxPropConv(4, (3, 3), step=0.1)


def test_a_stack_of_models_and_of_examples(rng):
    @nnx.split_rngs(splits=2)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs):
        return ss.nnx.ProxPropLinear(5, 3, step=STEP, rngs=rngs)

    layers = make(nnx.Rngs(0))
    x = jnp.asarray(rng.normal(size=(2, 4, 5)), jnp.float32)

    def loss(layer, x):
        return jnp.sum(layer(x) ** 2)

    d = nnx.vmap(nnx.grad(loss))(layers, x)
    kernel = layers.kernel[...][1]
    y = 2 * (x[1] @ kernel + layers.bias[...][1][None])
    expected, _ = implicit_gradient(ss.Dense(kernel), x[1], y, STEP)
    np.testing.assert_allclose(d["kernel"][...][1], expected, rtol=1e-4, atol=1e-6)
    one = ss.nnx.ProxPropLinear(5, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="vmap over examples would take one for each"):
        jax.vmap(one)(x[0])
    conv = ss.nnx.ProxPropConv(2, 3, (3, 3), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="vmap over examples would take one for each"):
        conv(jnp.ones((4, 4, 2)))


def test_dtypes_precision_and_a_traced_step(rng):
    x = jnp.asarray(rng.normal(size=(4, 5)), jnp.float32)
    low = ss.nnx.ProxPropLinear(5, 3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    d, y = slopes(low, x)
    assert y.dtype == jnp.bfloat16
    assert d["kernel"][...].dtype == jnp.float32
    wide, _ = slopes(ss.nnx.ProxPropLinear(5, 3, rngs=nnx.Rngs(0)), x)
    np.testing.assert_allclose(d["kernel"][...], wide["kernel"][...], rtol=0.1, atol=0.02)
    layer = ss.nnx.ProxPropLinear(5, 3, precision="highest", rngs=nnx.Rngs(0))
    program = str(jax.make_jaxpr(lambda x: jax.vjp(layer, x)[1](x[:, :3]))(x))
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert products
    assert program.count("Precision.HIGHEST") >= len(products)
    traced = ss.nnx.ProxPropLinear(5, 3, step=Exact(jnp.asarray(0.2)), rngs=nnx.Rngs(0))
    same = ss.nnx.ProxPropLinear(5, 3, step=STEP, rngs=nnx.Rngs(0))
    for one, other in zip(
        *(jax.tree.leaves(slopes(each, x)[0]) for each in (traced, same)), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_what_would_be_lost_is_refused():
    class Own(nnx.Linear):
        def __call__(self, inputs):
            return inputs

    rngs = nnx.Rngs(0)
    linear, conv = ss.nnx.ProxPropLinear, ss.nnx.ProxPropConv
    solver = ss.nnx.SolverLinear(3, 2, solver=ss.ProxGD(2), rngs=nnx.Rngs(0, dropout=1))
    for layer in (Own(3, 2, rngs=rngs), solver, nnx.Conv(3, 2, (1,), rngs=rngs), nnx.Linear):
        with pytest.raises(ValueError, match=r"layer: expected an nnx.Linear without a call"):
            linear.from_layer(layer)
    with pytest.raises(ValueError, match=r"layer: expected an nnx.Linear without a call"):
        ss.nnx.SolverLinear.from_layer(linear(3, 2, rngs=rngs), solver=ss.ProxGD(2))
    with pytest.raises(ValueError, match="dot_general of ProxPropLinear: expected the default"):
        linear(3, 2, dot_general=lambda *a, **k: None, rngs=rngs)
    with pytest.raises(ValueError, match="step of proximal backpropagation: expected"):
        conv(3, 2, (3, 3), step=0.1, rngs=rngs)
    with pytest.raises(ValueError, match="conv_general_dilated of ProxPropConv: expected"):
        conv(3, 2, (3, 3), conv_general_dilated=lambda *a, **k: None, rngs=rngs)
    with pytest.raises(ValueError, match="out_sharding of ProxPropLinear: expected the default"):
        linear(3, 2, rngs=rngs)(jnp.ones((1, 3)), out_sharding=jax.sharding.PartitionSpec())
    masked = conv(3, 2, (3, 3), mask=jnp.ones((3, 3, 3, 2)), rngs=rngs)
    with pytest.raises(ValueError, match="mask of ProxPropConv: expected None"):
        masked(jnp.ones((1, 4, 4, 3)))


def test_reports_of_a_model_with_such_layers():
    class Net(nnx.Module):
        def __init__(self, kind, **options):
            self.first = kind(5, 6, rngs=nnx.Rngs(0), **options)
            self.second = kind(6, 3, rngs=nnx.Rngs(1), **options)

        def __call__(self, x):
            return self.second(jax.nn.relu(self.first(x)))

    ours = ss.lipschitz_report(Net(ss.nnx.ProxPropLinear, step=STEP), (4, 5))
    plain = ss.lipschitz_report(Net(nnx.Linear), (4, 5))
    assert float(ours.bound) == float(plain.bound)
    linen = [kind(3) for kind in (ss.linen.ProxPropDense, nn.Dense)]
    variables = linen[1].init(jax.random.key(0), jnp.ones((4, 5)))
    mine, theirs = (ss.lipschitz_report(layer, variables, (4, 5)) for layer in linen)
    assert float(mine.bound) == float(theirs.bound)


def test_through_a_solver_layer_of_nnx(rng):
    """Its random streams and kept constant are inputs; few iterations of conjugate gradients descend."""
    layer = ss.nnx.SolverLinear(5, 3, solver=ss.ProxGD(3), ridge=0.1, rngs=nnx.Rngs(0, dropout=1))
    layer.refresh_lipschitz()
    graph, parameters, rest = nnx.split(layer, nnx.Param, ...)
    x = jnp.asarray(rng.normal(size=(4, 5)), jnp.float32)

    def block(parameters, rest, x):
        return nnx.merge(graph, parameters, rest, copy=True)(x)

    def loss(run, parameters):
        return 0.5 * jnp.sum((run(parameters, rest, x) - 1.0) ** 2)

    implicit = ss.proxprop.through(block, ConjugateGradients(0.5, 3))
    d = jax.jit(jax.grad(lambda p: loss(implicit, p)))(parameters)
    slope = jax.jit(jax.grad(lambda p: loss(block, p)))(parameters)
    pairs = zip(jax.tree.leaves(d), jax.tree.leaves(slope), strict=True)
    assert sum(float(jnp.sum(one * other)) for one, other in pairs) > 0
    moved = jax.tree.map(lambda p, s: p - 0.1 * s, parameters, d)
    assert loss(block, moved) < loss(block, parameters)
