"""Solvers in place of layers of Linen networks: the same bits at one iteration, and back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import serialization, traverse_util
from linen_variables import drawn

import stochsolvers as ss

KEY = jax.random.key(3)
ONE = ss.ProxGD(1)
LIFTED = {"params": 0, "solver_state": 0}


class Cell(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.relu(nn.Dense(x.shape[-1], name="dense")(x)), None


class ConvBlock(nn.Module):
    """A convolution, its batch normalisation, and its activation outside."""

    size: tuple
    options: tuple = ()

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, self.size, name="conv", **dict(self.options))(x)
        return nn.BatchNorm(use_running_average=not train, name="norm")(x)


class Head(nn.Module):
    @nn.jit
    @nn.compact
    def __call__(self, x):
        x = nn.sigmoid(nn.DenseGeneral((3, 2), name="split")(x))
        return nn.softplus(nn.DenseGeneral(5, axis=(-2, -1), name="join")(x))


class Network(nn.Module):
    """Modules from setup and compact ones; scan, remat, vmap and jit; convolutions of every rank."""

    def setup(self):
        self.blocks = [
            ConvBlock((3, 3)),
            ConvBlock((2, 2), (("strides", 2), ("padding", "VALID"), ("use_bias", False))),
        ]
        lifted = nn.scan(
            nn.remat(Cell), variable_axes=LIFTED, split_rngs={"params": True}, length=3
        )
        self.stack = lifted()
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        self.bare = nn.scan(Cell, length=2, **axes)()
        self.twins = nn.vmap(nn.Dense, axis_size=2, in_axes=None, **axes)(4)
        self.line = nn.Conv(4, (3,), padding="CIRCULAR")
        self.volume = nn.Conv(4, (2, 2, 2), feature_group_count=2)
        self.mlp = nn.Sequential([nn.Dense(6), nn.elu, nn.Dense(4), jnp.arctan, nn.Dense(4)])
        self.drop = nn.Dropout(0.25)
        self.last, self.head = nn.Dense(4), Head()

    def encode(self, x, train=False):
        for block in self.blocks:
            x = nn.leaky_relu(block(x, train), 0.1)
        x = jnp.tanh(self.line(x.mean(1)))
        return nn.relu6(self.volume(x[:, :, None, None])).mean((1, 2, 3))

    def __call__(self, x, train=False):
        x = self.encode(x, train)
        x, _ = self.stack(x, None)
        x, _ = self.bare(x, None)
        x = nn.soft_sign(self.twins(x)).sum(0)
        x = nn.softmax(self.mlp(x))
        x = self.drop(x, deterministic=not train)
        return self.head(nn.hard_tanh(self.last(x)))


REPLACED = (
    "blocks_0/conv", "blocks_1/conv", "line", "volume", "stack/dense", "bare/dense", "twins", "mlp/layers_0",
    "mlp/layers_2", "last", "head/split", "head/join",
)  # fmt: skip


@pytest.fixture(scope="module")
def network():
    """A network, its variables with some batch statistics, and images."""
    rng = np.random.default_rng(7)
    x = jnp.asarray(rng.normal(size=(2, 6, 6, 3)), jnp.float32)
    module = Network()
    variables = drawn(module, rng, x)
    names = ("blocks_0", "blocks_1")
    variables["batch_stats"] = {
        name: {
            "norm": {
                k: jnp.asarray(rng.uniform(0.5, 2, size=4), jnp.float32) for k in ("mean", "var")
            }
        }
        for name in names
    }
    for name in names:
        own = variables["params"][name]["norm"]
        own["scale"], own["bias"] = (
            jnp.asarray(rng.uniform(0.5, 2, size=4), jnp.float32) for _ in range(2)
        )
    return module, variables, x


@pytest.fixture(scope="module")
def one_iteration(network):
    module, variables, x = network
    return ss.linen.replace_layers(module, variables, "*", solver=ONE, inputs=x, measure=False)


@pytest.mark.optimized
def test_one_iteration_is_the_plain_network_to_the_last_bit(network, one_iteration):
    module, variables, x = network
    swapped, own, report = one_iteration
    assert tuple(row.name for row in report.rows) == REPLACED
    jax.tree.map(np.testing.assert_array_equal, own["params"], variables["params"])
    kept = traverse_util.flatten_dict(own["solver_state"], sep="/")
    with_constant = {path.rpartition("/")[0] for path in kept}
    assert with_constant == set(REPLACED) - {
        "bare/dense",
        "twins",
    }  # whose transforms do not lift it
    np.testing.assert_array_equal(
        jax.jit(swapped.apply)(own, x), jax.jit(module.apply)(variables, x)
    )
    for method in ("encode", Network.encode, module.encode):
        call = functools.partial(swapped.apply, method=method)
        assert jax.eval_shape(call, own, x).shape == (2, 4)


@pytest.mark.optimized
def test_images_smaller_than_the_filter(rng):
    """Of which the library's own convolution adds in another order."""
    module = nn.Sequential(
        [nn.Conv(256, (3, 3)), nn.relu, nn.Conv(64, (2, 2), padding="VALID"), nn.relu]
    )
    x = jnp.asarray(rng.normal(size=(1, 2, 2, 256)), jnp.float32)
    variables = drawn(module, rng, x)
    swapped, own, report = ss.linen.replace_layers(
        module, variables, "*", solver=ONE, inputs=x, measure=False
    )
    assert len(report.rows) == 2
    np.testing.assert_array_equal(
        jax.jit(swapped.apply)(own, x), jax.jit(module.apply)(variables, x)
    )


def test_priors_are_those_of_the_activations(one_iteration):
    priors = {row.name: (row.activation, row.prior) for row in one_iteration.report.rows}
    wanted = {
        "blocks_0/conv": "leaky_relu", "line": "tanh", "volume": "relu6", "stack/dense": "relu",
        "twins": "soft_sign", "mlp/layers_0": "elu", "mlp/layers_2": "arctan", "last": "hard_tanh",
        "head/split": "sigmoid", "head/join": "softplus",
    }  # fmt: skip
    assert {name: priors[name][0] for name in wanted} == wanted
    norms = {row.name: row.normalization for row in one_iteration.report.rows if row.normalization}
    assert norms == {"blocks_0/conv": "blocks_0/norm", "blocks_1/conv": "blocks_1/norm"}
    left = {one.name: one.reason for one in one_iteration.report.left}
    assert list(left) == ["mlp/layers_4"]
    assert "bare/dense" in next(
        note for note in one_iteration.report.notes if "does not lift" in note
    )


def test_initial_parameters_restored_networks_and_checkpoints(network, one_iteration):
    module, variables, x = network
    swapped, own, _ = one_iteration
    again, plain = ss.linen.restore_layers(swapped, own)
    assert again is module
    assert jax.tree.structure(plain) == jax.tree.structure(dict(variables))
    jax.tree.map(np.testing.assert_array_equal, plain, dict(variables))
    assert ss.linen.restore_layers(module, variables)[0] is module
    partial = jax.eval_shape(lambda key, x: swapped.init(key, x, method="encode"), KEY, x)
    assert sorted(partial["params"]) == ["blocks_0", "blocks_1", "line", "volume"]
    drawn = jax.eval_shape(swapped.init, KEY, x)
    assert jax.tree.structure(drawn["params"]) == jax.tree.structure(variables["params"])
    for target, source in ((plain, own), (own, plain)):
        saved = serialization.to_bytes(source["params"])
        loaded = serialization.from_bytes(jax.tree.map(jnp.zeros_like, target["params"]), saved)
        jax.tree.map(np.testing.assert_array_equal, loaded, dict(variables["params"]))


def prox_gd(matrix, x, bias, num_iters):
    """w_K of normalised Prox-GD with a ReLU, in float64: w = c + (1/L)(L I − A A*) z, z = ReLU(w)."""
    z, scale = 0.0, np.linalg.norm(matrix, 2) ** 2
    for _ in range(num_iters):
        w = (
            z - (z @ matrix.T @ matrix) / scale + x @ matrix + bias
            if np.ndim(z)
            else x @ matrix + bias
        )
        z = np.maximum(w, 0)
    return w


class Held(nn.Module):
    """Modules as attributes, and the network within another."""

    layers: tuple

    @nn.compact
    def __call__(self, x):
        for layer in self.layers:
            x = nn.relu(layer(x))
        return x


class Outer(nn.Module):
    inner: nn.Module

    @nn.compact
    def __call__(self, x):
        return self.inner(self.inner(x))


def test_modules_as_attributes_and_a_replaced_network_within_another(rng):
    x = jnp.asarray(rng.normal(size=(3, 5)), jnp.float32)
    module = Held((nn.Dense(5), nn.Dense(5, use_bias=False)))
    variables = drawn(module, rng, x)
    swapped, own, report = ss.linen.replace_layers(
        module, variables, "*", solver=ss.ProxGD(3), inputs=x, measure=False
    )
    assert [row.name for row in report.rows] == ["layers_0", "layers_1"]
    assert sorted(own["solver_state"]) == ["layers_0", "layers_1"]
    wanted = x
    for name in ("layers_0", "layers_1"):
        kernel = np.asarray(variables["params"][name]["kernel"])
        bias = variables["params"][name].get("bias", 0)
        wanted = np.maximum(prox_gd(kernel, np.asarray(wanted), np.asarray(bias), 3), 0)
    np.testing.assert_allclose(swapped.apply(own, x), wanted, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(swapped.bind(own)(x), swapped.apply(own, x))
    within = {name: {"inner": tree} for name, tree in own.items()}
    twice = swapped.apply(own, swapped.apply(own, x))
    np.testing.assert_allclose(Outer(swapped).apply(within, x), twice, rtol=1e-5, atol=1e-6)
    assert jax.tree.structure(jax.eval_shape(Outer(swapped).init, KEY, x)) == jax.tree.structure(
        within
    )


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(5, name="dense")(x)
        return nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))


def test_derivatives_at_one_iteration_are_the_plain_ones(rng):
    x = jnp.asarray(rng.normal(size=(3, 7)))
    module = Normalised()
    variables = drawn(module, rng, x)
    swapped, own, _ = ss.linen.replace_layers(
        module, variables, "dense", solver=ONE, inputs=x, measure=False
    )

    @jax.jit
    def gradients(params, x):
        return [
            jax.grad(lambda p, x, f=f, v=v: jnp.sum(f({**v, "params": p}, x) ** 2), (0, 1))(
                params, x
            )
            for f, v in ((swapped.apply, own), (module.apply, variables))
        ]

    got, wanted = gradients(variables["params"], x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), got, wanted)


def test_a_folded_normalisation_against_float64(rng):
    x = jnp.asarray(rng.normal(size=(3, 7)))
    module = Normalised()
    variables = drawn(module, rng, x)
    m, v, a, b = (rng.uniform(0.5, 2, size=5) for _ in range(4))
    variables["batch_stats"]["norm"] = {"mean": jnp.asarray(m), "var": jnp.asarray(v)}
    variables["params"]["norm"] = {"scale": jnp.asarray(a), "bias": jnp.asarray(b)}
    swapped, own, report = ss.linen.replace_layers(
        module, variables, "dense", solver=ss.ProxGD(4), inputs=x
    )
    kernel, bias = (np.asarray(variables["params"]["dense"][name]) for name in ("kernel", "bias"))
    s = a / np.sqrt(v + 1e-5)
    wanted = np.maximum(prox_gd(kernel * s, np.asarray(x), s * (bias - m) + b, 4), 0)
    # in training the statistics are the running ones, and stay
    calls = ((own, {}), (own, {"train": True, "mutable": ["batch_stats"]}))
    for given, options in calls:
        got = swapped.apply(given, x, **options)
        got, written = got if options else (got, {"batch_stats": variables["batch_stats"]})
        np.testing.assert_allclose(got, wanted, rtol=1e-5)
        jax.tree.map(
            np.testing.assert_array_equal, written["batch_stats"], variables["batch_stats"]
        )
    (row,) = report.rows
    np.testing.assert_allclose(row.lipschitz, np.linalg.norm(kernel * s, 2) ** 2, rtol=1e-5)
    plain = np.maximum((np.asarray(x) @ kernel + bias) * s - s * m + b, 0)
    change = np.linalg.norm(wanted - plain) / np.linalg.norm(plain)
    np.testing.assert_allclose([row.change, row.model_change], change, rtol=1e-4)
    assert row.change_one < 1e-6
    assert report.model_change_one < 1e-6
    assert row.gap > 0
    assert "norm is folded in" in str(report)


def test_reports_on_a_network_with_replaced_layers(rng):
    """The bound, of the layer and its normalisation in one row, is above the norms of Jacobians."""
    x = jnp.asarray(rng.normal(size=(3, 7)), jnp.float32)
    module = Normalised()
    variables = drawn(module, rng, x)
    own = variables["batch_stats"]["norm"]
    own["mean"], own["var"] = (
        jnp.asarray(rng.uniform(0.2, 3, size=5), jnp.float32) for _ in range(2)
    )
    swapped, own, made = ss.linen.replace_layers(
        module, variables, "dense", solver=ss.ProxGD(5), inputs=x
    )
    report = ss.lipschitz_report(swapped, own, x.shape)
    assert [(row.name, row.kind) for row in report.rows] == [("dense", "SolverDense")]
    points = jnp.asarray(rng.normal(size=(40, 7)), jnp.float32)
    jacobians = jax.jit(jax.vmap(jax.jacobian(lambda x: swapped.apply(own, x[None])[0])))(points)
    sampled = np.linalg.norm(jacobians, 2, axis=(1, 2)).max()
    assert sampled <= report.bound * (1 + 1e-5) < np.inf
    (row,) = ss.certify(swapped, own, x).rows
    assert row.name == "dense"
    np.testing.assert_allclose(row.gap_max, made.rows[0].gap, rtol=1e-4, atol=1e-7)


class Stack(nn.Module):
    axes: tuple

    @nn.compact
    def __call__(self, x):
        scanned = nn.scan(
            Cell, variable_axes=dict(self.axes), split_rngs={"params": True}, length=3
        )
        return scanned(name="stack")(x, None)[0]


@pytest.mark.parametrize("lifted", [True, False])
def test_a_stack_is_a_loop_of_solver_layers(lifted, rng):
    x = jnp.asarray(rng.normal(size=(3, 5)), jnp.float32)
    module = Stack(tuple((LIFTED if lifted else {"params": 0}).items()))
    variables = drawn(module, rng, x)
    solver = ss.ProxGD(3)
    swapped, own, report = ss.linen.replace_layers(
        module, variables, "stack/dense", solver=solver, inputs=x
    )
    assert [row.name for row in report.rows] == [f"stack/dense[{i}]" for i in range(3)]
    layer, hidden = ss.linen.SolverDense(5, solver=solver, normalize=True), x
    for i, row in enumerate(report.rows):
        params = jax.tree.map(lambda p, i=i: p[i], variables["params"]["stack"]["dense"])
        kernel = np.asarray(params["kernel"], np.float64)
        np.testing.assert_allclose(row.lipschitz, np.linalg.norm(kernel, 2) ** 2, rtol=1e-5)
        hidden = layer.apply({"params": params}, hidden)
    np.testing.assert_allclose(swapped.apply(own, x), hidden, rtol=1e-5, atol=1e-6)
    assert ("solver_state" in own) == lifted


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dropout(0.25, name="drop")(x, deterministic=not train)
        return nn.relu(nn.Dense(5, name="dense")(x))


def test_a_rate_becomes_a_sampling(rng):
    x = jnp.asarray(rng.normal(size=(3, 8)), jnp.float32)
    module = Dropped()
    variables = drawn(module, rng, x)
    options = {"inputs": x, "measure": False}
    swapped, own, report = ss.linen.replace_layers(
        module, variables, "dense", solver=ss.ProxSG(0.5, 3), **options
    )
    assert (report.rows[0].dropout, report.rows[0].tau) == ("drop", 0.75)
    layer = ss.linen.SolverDense(5, solver=ss.ProxSG(0.75, 3), normalize=True)
    params = {"params": variables["params"]["dense"]}
    still = jax.jit(functools.partial(layer.apply, deterministic=True))(params, x)
    np.testing.assert_allclose(jax.jit(swapped.apply)(own, x), still, rtol=1e-5, atol=1e-6)
    train = jax.jit(lambda key: swapped.apply(own, x, train=True, rngs={"dropout": key}))
    draws = [train(jax.random.key(k)) for k in (0, 0, 1)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2])
    # one sampled iteration from 0 is the plain layer behind a τ-nice dropout
    once, own, _ = ss.linen.replace_layers(
        module, variables, "dense", solver=ss.ProxSG(0.5, 1), **options
    )
    draw = np.asarray(once.apply(own, x, train=True, rngs={"dropout": KEY}))
    kernel, bias = (np.asarray(params["params"][name]) for name in ("kernel", "bias"))
    masks = np.array([[i >> k & 1 for k in range(8)] for i in range(256) if i.bit_count() == 6])
    for row, out in zip(np.asarray(x), draw, strict=True):
        every = np.maximum((masks * row * 8 / 6) @ kernel + bias, 0)
        assert np.min(np.abs(every - out).max(axis=1)) < 1e-5
    kept, own, report = ss.linen.replace_layers(
        module, variables, "dense", solver=ONE, inputs=x, measure=False
    )
    assert "stays" in report.rows[0].note
    rngs = {"dropout": KEY}
    np.testing.assert_array_equal(
        kept.apply(own, x, train=True, rngs=rngs), module.apply(variables, x, train=True, rngs=rngs)
    )


def test_export(rng):
    x = jnp.asarray(rng.normal(size=(3, 8)), jnp.float32)
    module = Dropped()
    variables = drawn(module, rng, x)
    swapped, own, _ = ss.linen.replace_layers(
        module, variables, "dense", solver=ss.ProxGD(3), inputs=x, measure=False
    )
    call = jax.jit(swapped.apply)
    exported = jax.export.export(call)(own, x)
    np.testing.assert_array_equal(exported.call(own, x), call(own, x))


def test_what_nn_jit_has_traced_of_one_network_is_not_the_others(rng):
    x = jnp.asarray(rng.normal(size=(2, 4)), jnp.float32)
    module = Head()
    variables = drawn(module, rng, x)
    plain = module.apply(variables, x)  # traced
    swapped, own, report = ss.linen.replace_layers(
        module, variables, "*", solver=ss.ProxGD(3), inputs=x, measure=False
    )
    assert [row.name for row in report.rows] == ["split", "join"]
    assert not np.allclose(swapped.apply(own, x), plain)
    np.testing.assert_array_equal(module.apply(variables, x), plain)


class Odd(nn.Module):
    """What cannot be replaced."""

    @nn.compact
    def __call__(self, x):
        twice = nn.Dense(4, name="twice")
        x = nn.relu(twice(nn.relu(twice(x))))
        x = nn.gelu(nn.Dense(4, name="gelu")(x))
        x = nn.relu(
            nn.SpectralNorm(nn.Dense(4, name="normed"), name="spectral")(x, update_stats=False)
        )
        x = nn.relu(Scaled(4, name="scaled")(x))
        x = nn.relu(x + nn.Dense(4, name="residual")(x))
        x = nn.relu(nn.ConvTranspose(4, (3,), mask=jnp.ones((3, 4, 4)), name="transposed")(x))
        mirrored = nn.Conv(4, (3,), padding="REFLECT", name="mirrored")
        return nn.Dense(2, name="logits")(nn.relu(mirrored(x)))


class Scaled(nn.Dense):
    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


def test_what_is_left_and_what_is_refused(rng):
    x = jnp.asarray(rng.normal(size=(2, 4)), jnp.float32)
    module = Odd()
    variables = drawn(module, rng, x)

    def replace(where, **options):
        options = {"solver": ONE, "inputs": x, "measure": False} | options
        return ss.linen.replace_layers(module, variables, where, **options)

    reasons = {
        "twice": "called 2 times", "gelu": "GELU decreases", "normed": "made by nn.SpectralNorm",
        "scaled": "methods of its own", "residual": "another array is added", "mirrored": "padding",
        "transposed": "the option mask", "logits": "leaves the network without an activation",
    }  # fmt: skip
    _, _, report = replace(["*", "logits"], prior=ss.prox.Zero())
    left = {one.name: one.reason for one in report.left}
    for name, reason in reasons.items():
        if name in left:
            assert reason in left[name]
        with pytest.raises(ValueError, match=f"layer '{name}': expected one that a solver"):
            replace(name)
    assert set(left) == {"twice", "normed", "scaled", "mirrored", "transposed"}
    wrong = [
        ({"where": "logit"}, "where: expected the path of a module, such as logits"),
        ({"where": nn.Embed}, "where: expected something that a layer of the model matches"),
        ({"where": "spectral*"}, "where: expected a layer that a solver can replace"),
        ({"where": "gelu", "solver": "fista"}, "solver of replace_layers: expected a Solver"),
        ({"where": "gelu", "prior": "relu"}, "prior of replace_layers: expected"),
        ({"where": "gelu", "dropout": "drop"}, "dropout of replace_layers: expected one of"),
    ]
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            replace(**options)
    with pytest.raises(ValueError, match="module of replace_layers: expected an nn"):
        ss.linen.replace_layers(None, variables, "*", solver=ONE, inputs=x)
    with pytest.raises(ValueError, match="variables: expected the collections that init returns"):
        ss.linen.replace_layers(module, x, "*", solver=ONE, inputs=x)
    swapped, own, _ = replace("logits", prior=ss.prox.Zero())
    with pytest.raises(ValueError, match="module: expected a plain network"):
        ss.linen.replace_layers(swapped, own, "*", solver=ONE, inputs=x)
