"""Equilibrium layers of NNX and Linen: norms that follow training, warm starts, reports, meshes."""

import functools

import catalogue
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import stochsolvers as ss
from stochsolvers import testing

X = catalogue.normal(21, 6, 4)
IMAGES = catalogue.normal(22, 2, 4, 4, 2)


def linear(**options):
    return ss.nnx.EquilibriumLinear(4, 3, 5, rngs=nnx.Rngs(0), **options)


def norm_of(layer, x=X):
    return np.linalg.norm(np.asarray(layer.problem(x).linear_map.kernel, np.float64), 2)


def parameters_of(layer):
    """Of an NNX layer, as a Linen one names them."""
    state = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    layers = state.pop("layers", {})
    return state | {f"layers_{k}": inner for k, inner in layers.items()}


@pytest.mark.parametrize("kind", ["linear", "conv", "deep"])
def test_nnx_and_linen_are_the_same(kind):
    inputs = IMAGES if kind == "conv" else X
    if kind == "linear":
        layer = linear(prior=ss.prox.Tanh(), bound=0.8)
        module = ss.linen.EquilibriumLinear(
            features=3, hidden_features=5, prior=ss.prox.Tanh(), bound=0.8
        )
    elif kind == "conv":
        options = {"strides": 2, "padding": "CIRCULAR", "input_kernel_size": (2, 2)}
        layer = ss.nnx.EquilibriumConv(2, 3, (3, 3), rngs=nnx.Rngs(0), **options)
        module = ss.linen.EquilibriumConv(features=3, kernel_size=(3, 3), **options)
    else:
        layer = ss.nnx.DeepEquilibrium(catalogue.members(ss.nnx), alpha=0.6)
        module = ss.linen.DeepEquilibrium(layers=catalogue.members(ss.linen), alpha=0.6)
    variables = {"params": parameters_of(layer)}
    testing.assert_equivalent((module, variables), layer, inputs, rtol=1e-4)


def anchor_of(norm):
    """The kernel at which a kept norm was last computed in full."""
    return norm["anchor"][0, 0] * norm["scale"]


@nnx.jit
def descend(layer, optimiser, x):
    def loss(layer):
        return jnp.mean((layer(x) - 1.0) ** 2)

    value, slopes = nnx.value_and_grad(loss)(layer)
    optimiser.update(layer, slopes)
    return value


def test_training_keeps_the_norm_within_its_bound():
    layer = linear()
    optimiser = nnx.Optimizer(layer, optax.adam(3e-2), wrt=nnx.Param)
    first = layer.norm.get_value()
    losses = []
    for _ in range(12):
        losses.append(float(descend(layer, optimiser, X)))
        assert norm_of(layer) <= 0.95
    assert losses[-1] < 0.5 * losses[0]
    trained = layer.norm.get_value()
    assert not np.array_equal(first["anchor"], trained["anchor"])  # it followed the kernel
    layer.eval()
    before = layer(X)
    jax.tree.map(np.testing.assert_array_equal, layer.norm.get_value(), trained)
    layer.normalize()
    np.testing.assert_array_equal(anchor_of(layer.norm.get_value()), layer.kernel[...])
    np.testing.assert_allclose(layer(X), before, rtol=0.1, atol=1e-3)
    layer.kernel[...] = 100.0 * layer.kernel[...]  # other weights are loaded
    assert norm_of(layer) <= 0.95


def test_the_state_of_a_linen_layer_follows_its_kernel():
    module = ss.linen.EquilibriumLinear(features=3, hidden_features=5)
    variables = module.init(jax.random.key(0), X)
    expected = module.apply({"params": variables["params"]}, X)
    np.testing.assert_allclose(module.apply(variables, X), expected, rtol=1e-5)
    moved = jax.tree.map(lambda p: 1.5 * p, variables["params"])
    state = {"solver_state": variables["solver_state"]}
    _, after = module.apply({"params": moved, **state}, X, mutable=["solver_state"])
    norm = after["solver_state"]["norm"]
    assert not np.array_equal(anchor_of(norm), anchor_of(state["solver_state"]["norm"]))
    _, still = module.apply(
        {"params": moved, **state}, X, deterministic=True, mutable=["solver_state"]
    )
    jax.tree.map(np.testing.assert_array_equal, still["solver_state"], state["solver_state"])
    _, again = module.apply({"params": moved}, X, method="normalize", mutable=["solver_state"])
    np.testing.assert_array_equal(anchor_of(again["solver_state"]["norm"]), moved["kernel"])


def test_a_layer_starts_where_it_ended():
    layer = linear(warm_start=(6, 3))
    cold = layer.solve(X)
    warm = layer.solve(X)
    assert np.sum(warm.iterations) < np.sum(cold.iterations)
    np.testing.assert_allclose(layer.start[...], warm.value)
    assert layer.solve(X[:2]).value.shape == (2, 3)  # from zero
    assert np.all(layer.solve(X, deterministic=True).iterations == cold.iterations)
    module = ss.linen.EquilibriumLinear(features=3, warm_start=True)
    variables = module.init(jax.random.key(0), X)
    apply = {"mutable": ["solver_state"], "method": "solve"}
    warm, state = module.apply(variables, X, **apply)
    cold = module.apply(variables, X, method="solve")
    assert np.sum(warm.iterations) < np.sum(cold.iterations)
    np.testing.assert_allclose(state["solver_state"]["start"], warm.value)


def test_inputs_may_be_the_drive():
    layer = ss.nnx.EquilibriumLinear(None, 3, 5, use_bias=False, rngs=nnx.Rngs(0))
    drive = catalogue.normal(23, 6, 5)
    assert set(parameters_of(layer)) == {"kernel"}
    np.testing.assert_array_equal(layer.problem(drive).drive, drive)
    conv = ss.nnx.EquilibriumConv(None, 3, (3, 3), 2, spatial_shape=(4, 4), rngs=nnx.Rngs(0))
    assert conv(IMAGES).shape == (2, 4, 4, 3)
    module = ss.linen.EquilibriumLinear(features=3, hidden_features=5, use_input_kernel=False)
    assert set(module.init(jax.random.key(0), drive)["params"]) == {"kernel", "bias"}


class Network(nnx.Module):
    """A plain layer, an equilibrium and a composition with a prior."""

    def __init__(self, rngs):
        self.first = nnx.Linear(4, 5, rngs=rngs)
        self.shallow = ss.nnx.EquilibriumLinear(5, 3, 6, solver=ss.FixedPoint(60), rngs=rngs)
        self.two = ss.nnx.DeepEquilibrium(
            [ss.nnx.EquilibriumLinear(3, 3, bound=0.7, rngs=rngs) for _ in range(2)],
            alpha=0.5,
            regularizer=ss.equilibrium.Regularized(ss.prox.L1(0.1), 0.1),
        )

    def __call__(self, x):
        return self.two(self.shallow(nnx.relu(self.first(x))))


class LinenNetwork(nn.Module):
    """Two plain layers have a joint objective."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(5)(x))
        x = ss.linen.EquilibriumLinear(features=4, hidden_features=6)(x)
        return ss.linen.DeepEquilibrium(layers=catalogue.members(ss.linen))(x)


def steepest(function):
    """The largest norm of a Jacobian at the examples."""
    one = jax.jacobian(lambda x: function(x[None])[0])
    jacobians = jax.jit(jax.vmap(one))(X)
    return max(np.linalg.norm(np.asarray(J, np.float64), 2) for J in jacobians)


def test_reports_of_an_nnx_network():
    model = Network(nnx.Rngs(0))
    report = ss.certify(model, X)
    shallow, two = report.rows
    assert [row.name for row in report.rows] == ["shallow", "two"]
    assert shallow.upper <= 0.95**2 * 1.001
    assert 0 < shallow.gap_max < 1e-3
    assert np.isinf(two.gap_max)
    assert "no objective" in two.note
    for row in report.rows:
        assert 0 < row.distance_max < 0.1
    assert shallow.contraction <= shallow.contraction_bound * 1.01 <= 0.95**2 * 1.02
    assert "distance" in str(report)

    bound = ss.lipschitz_report(model, (1, 4))
    assert [row.name for row in bound.rows] == ["first", "shallow", "two"]
    model.eval()
    assert steepest(model) <= bound.bound < np.inf
    shallow = bound.rows[1]
    np.testing.assert_allclose(shallow.constant, shallow.upper * 0.95 / (1 - 0.95**2), rtol=1e-3)


def test_reports_of_a_linen_network():
    module = LinenNetwork()
    variables = module.init(jax.random.key(0), X)
    report = ss.certify(module, variables, X)
    assert [row.name for row in report.rows] == ["EquilibriumLinear_0", "DeepEquilibrium_0"]
    assert all(row.gap_max < 1e-3 and row.distance_max < 0.1 for row in report.rows)
    bound = ss.lipschitz_report(module, variables, (1, 4))
    assert [row.kind for row in bound.rows] == ["Dense", "EquilibriumLinear", "DeepEquilibrium"]
    assert steepest(functools.partial(module.apply, variables)) <= bound.bound < np.inf


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_layers_run_on_meshes(kind):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(kind,))
    layers = [linear()]
    if (
        kind == AxisType.Explicit
    ):  # where shardings are types; elsewhere the layers' own programs know of none
        layers.append(ss.nnx.DeepEquilibrium(catalogue.members(ss.nnx)))
    expected = [(layer(X), layer.problem(X).distance(layer(X))) for layer in layers]
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, P("data")))
        for layer, (value, distance) in zip(layers, expected, strict=True):
            graph, state = nnx.split(layer)
            state = jax.device_put(state, NamedSharding(mesh, P()))

            @jax.jit
            def run(state, x, graph=graph):
                def total(x):
                    layer = nnx.merge(graph, state, copy=True)
                    value = layer(x)
                    return jnp.sum(value), (value, layer.problem(x).distance(value))

                (_, found), slope = jax.value_and_grad(total, has_aux=True)(x)
                return *found, slope

            found = run(state, x)
            np.testing.assert_allclose(found[0], value, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(found[1], distance, rtol=0.05, atol=1e-5)
            assert np.all(np.isfinite(found[2]))


def test_mistakes_are_named():
    for message, make in (
        ("prior of EquilibriumLinear", lambda: linear(prior="relu")),
        ("bound of EquilibriumLinear", lambda: linear(bound=0.0)),
        ("solver of EquilibriumLinear", lambda: linear(solver=ss.ProxSG(0.5, 3))),
        ("regularizer of EquilibriumLinear", lambda: linear(regularizer=ss.prox.L1(1.0))),
        (
            "padding of EquilibriumConv",
            lambda: ss.nnx.EquilibriumConv(2, 3, (3, 3), padding="VALID", rngs=nnx.Rngs(0)),
        ),
        ("layers of DeepEquilibrium", lambda: ss.nnx.DeepEquilibrium([])),
        ("layers of DeepEquilibrium", lambda: ss.linen.DeepEquilibrium(layers=[nn.Dense(3)])),
        ("prior of EquilibriumLinear", lambda: ss.linen.EquilibriumLinear(features=3, prior=3)),
        (
            "spatial shape of the inputs",
            lambda: ss.nnx.EquilibriumConv(2, 3, (3, 3), spatial_shape=(5, 5), rngs=nnx.Rngs(0))(
                IMAGES
            ),
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_the_bound_holds_in_bfloat16():
    """Also where no norm is kept, as of convolutions without a spatial shape."""
    init = nnx.initializers.normal(3.0)
    for seed in range(4):
        layer = ss.nnx.EquilibriumLinear(
            4, 60, 80, dtype=jnp.bfloat16, kernel_init=init, rngs=nnx.Rngs(seed)
        )
        assert norm_of(layer) <= 0.95
        layer.norm = nnx.data(None)
        assert norm_of(layer) <= 0.95
        assert layer(X).dtype == jnp.bfloat16


def test_within_transformations_that_do_not_see_the_layer():
    """Its norm is not followed, and the values are the same."""
    layer = linear()
    chex.assert_trees_all_close(jax.vmap(lambda x: layer(x))(X), layer(X), atol=1e-5)
    assert jax.jacobian(lambda x: layer(x))(X[0]).shape == (3, 4)


def test_a_warm_start_follows_the_batch_in_linen():
    module = ss.linen.EquilibriumLinear(features=6, warm_start=True)
    variables = module.init(jax.random.key(0), X[:1])
    for most in (200, 1, 1):
        solution, state = module.apply(variables, X, mutable=["solver_state"], method="solve")
        variables = {**variables, **state}
        assert np.all(solution.iterations <= most)


class TanhLayer(ss.nnx.Equilibrium):
    """An equilibrium layer of a user's own, without an objective."""

    def __init__(self, rngs):
        self.kernel = nnx.Param(0.1 * jax.random.normal(rngs.params(), (4, 4)))
        self.init_equilibrium()

    def problem(self, inputs):
        return TanhProblem(self.kernel[...], inputs)


@ss.value_object
class TanhProblem(ss.FixedPointProblem):
    weights: jax.Array
    drive: jax.Array

    batch_shape = property(lambda self: self.drive.shape[:-1])
    shape = property(lambda self: self.drive.shape)
    dtype = property(lambda self: self.drive.dtype)

    def layer(self, z):
        return jnp.tanh(z @ self.weights.T + self.drive)


def test_a_layer_of_ones_own_is_recorded():
    report = str(ss.certify(TanhLayer(nnx.Rngs(0)), X))
    assert "the layer has no objective" in report


@ss.value_object
class Wrong(TanhProblem):
    def layer(self, z):
        return super().layer(z)[..., :1]


def test_a_layer_function_of_another_shape_is_named():
    problem = Wrong(jnp.zeros((4, 4)), jnp.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"Wrong.layer returns: expected \(2, 4\), got \(2, 1\)"):
        ss.FixedPoint(3).solve(None, problem)


def test_options_are_checked():
    with pytest.raises(ValueError, match="bound of EquilibriumLinear: expected a number <= 1"):
        linear(bound=1.5)
    layer = ss.nnx.EquilibriumConv(3, 4, 3, input_kernel_size=5, rngs=nnx.Rngs(0))
    assert layer(jnp.ones((2, 8, 3))).shape == (2, 8, 4)
    module = ss.linen.EquilibriumConv(features=4, kernel_size=3)
    assert module.init_with_output(jax.random.key(0), jnp.ones((2, 8, 3)))[0].shape == (2, 8, 4)
