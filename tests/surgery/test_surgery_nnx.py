"""Layers of trained NNX models replaced by solvers, and back: bits, checkpoints, stacks, refusals."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import export
from linen_variables import built

import stochsolvers as ss
from stochsolvers.nnx._survey import survey

ACTIVATIONS = {
    "relu": nnx.relu,
    "relu6": nnx.relu6,
    "hard_tanh": nnx.hard_tanh,
    "tanh": jnp.tanh,
    "sigmoid": nnx.sigmoid,
    "softplus": nnx.softplus,
    "soft_sign": nnx.soft_sign,
    "arctan": jnp.arctan,
    "elu": nnx.elu,
    "leaky_relu": nnx.leaky_relu,
    "celu": nnx.celu,
    "log_sigmoid": nnx.log_sigmoid,
    "squareplus": jax.nn.squareplus,
}
SOLVER = ss.ProxGD(3)


class Branches(nnx.Module):
    """One dense layer for each activation."""

    def __init__(self, rngs):
        self.layers = nnx.Dict({name: nnx.Linear(6, 5, rngs=rngs) for name in ACTIVATIONS})

    def __call__(self, x):
        return {name: ACTIVATIONS[name](self.layers[name](x)) for name in ACTIVATIONS}


class ConvNet(nnx.Module):
    """BatchNorm, Dropout, a residual connection, containers."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 6, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.body = nnx.List([nnx.Conv(6, 6, (3, 3), padding="CIRCULAR", rngs=rngs)])
        self.skip = nnx.Conv(6, 6, (1, 1), rngs=rngs)
        self.dropout = nnx.Dropout(0.25, rngs=rngs)
        self.hidden = nnx.Linear(6 * 16, 8, rngs=rngs)
        self.last = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x)))
        x = nnx.relu(x + self.skip(jnp.tanh(self.body[0](x))))
        x = self.dropout(x.reshape(len(x), -1))
        return self.last(nnx.softplus(self.hidden(x)))


@pytest.fixture(scope="module")
def built_once():
    model = ConvNet(nnx.Rngs(0, dropout=1))
    keys = jax.random.split(jax.random.key(2), 4)
    model.norm.mean[...] = jax.random.normal(keys[0], (6,), jnp.float32)
    model.norm.var[...] = jax.random.uniform(keys[1], (6,), jnp.float32, minval=0.5)
    model.norm.scale[...] = jnp.asarray([1.0, -0.5, 0.0, 2.0, 1.5, 0.7], jnp.float32)
    model.norm.bias[...] = jax.random.normal(keys[2], (6,), jnp.float32)
    model.eval()
    return model


@pytest.fixture
def network(built_once):
    """A copy of its own for each test."""
    return nnx.clone(built_once)


IMAGES = jax.random.normal(jax.random.key(3), (4, 4, 4, 3), jnp.float32)


def same(one, other):
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(bool(jnp.array_equal(a, b)) for a, b in leaves)


def replace(model, where="*", inputs=IMAGES, **options):
    options = {"solver": SOLVER, "measure": False, **options}
    return ss.nnx.replace_layers(model, where, inputs=inputs, **options)


@pytest.mark.optimized
def test_one_iteration_is_the_plain_model_bit_for_bit_and_restored_again(rng):
    model = built(lambda: Branches(nnx.Rngs(0)), rng)
    x = jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)
    forward = nnx.jit(lambda model, x: model(x))
    plain, (graph, state) = forward(model, x), nnx.split(model)
    report = replace(model, inputs=x, solver=ss.ProxGD(1))
    assert {row.activation for row in report.rows} == set(ACTIVATIONS)
    assert not report.left
    assert same(forward(model, x), plain)
    ss.nnx.restore_layers(model)
    assert type(model.layers["relu"]) is nnx.Linear
    assert nnx.graphdef(model) == graph
    assert same(nnx.state(model), state)
    assert same(forward(model, x), plain)


def test_several_iterations_solve_the_layers_problem(network):
    """Each layer's activated output is the K-th iterate on the problem written out densely."""
    report = replace(network, solver=ss.ProxGD(4), ridge=0.1)
    assert [row.name for row in report.rows] == ["body.0", "hidden", "stem"]
    x = np.asarray(jax.random.normal(jax.random.key(5), (2, 96), jnp.float32), np.float64)
    A, b = (
        np.asarray(one[...], np.float64) for one in (network.hidden.kernel, network.hidden.bias)
    )
    L = np.linalg.norm(A, 2) ** 2 + 0.1
    z = np.zeros((2, 8))
    for _ in range(4):
        w = z - (z @ A.T @ A + 0.1 * z) / L + x @ A + b
        z = np.logaddexp(w, 0)
    np.testing.assert_allclose(network.hidden(jnp.asarray(x, jnp.float32)), w, atol=2e-5)


def test_a_batch_norm_is_folded_in_on_the_fly(network):
    """The BatchNorm of what the layer returns is w_K of the folded problem, in float64."""
    plain = np.asarray(network.norm(network.stem(IMAGES)))
    replace(network, "stem", solver=ss.ProxGD(1))
    assert np.array_equal(network.norm(network.stem(IMAGES)), plain)
    ss.nnx.restore_layers(network)
    replace(network, "stem", solver=ss.ProxGD(3))
    columns = jnp.eye(48, dtype=jnp.float32).reshape(48, 4, 4, 3)
    A = np.asarray(
        nnx.Conv.__call__(network.stem, columns) - network.stem.bias[...][None, None, None]
    )
    s = np.asarray(network.norm.scale[...]) / np.sqrt(np.asarray(network.norm.var[...]) + 1e-5)
    t = network.norm.bias[...] - s * network.norm.mean[...]
    A = (A * s).reshape(48, -1).astype(np.float64)
    b = np.tile(np.asarray(network.stem.bias[...] * s + t, np.float64), 16)
    L = float(network.stem.lipschitz[...])
    x, z = np.asarray(IMAGES, np.float64).reshape(4, 48), 0.0
    for _ in range(3):
        w = z - (z @ A.T @ A / L if np.ndim(z) else 0) + x @ A + b
        z = np.maximum(w, 0)
    ours = np.asarray(network.norm(network.stem(IMAGES))).reshape(4, -1)
    np.testing.assert_allclose(ours, w, rtol=2e-4, atol=2e-4)
    network.train()
    again = np.asarray(network.norm(network.stem(IMAGES))).reshape(4, -1)
    np.testing.assert_array_equal(again, ours)  # the statistics are frozen
    network.norm.scale[...] = 2 * network.norm.scale[...]
    ss.nnx.refresh_lipschitz(network)
    np.testing.assert_allclose(network.stem.fold_scale[...], 2 * s, rtol=1e-6)
    np.testing.assert_allclose(network.stem.lipschitz[...], 4 * L, rtol=1e-3)


def test_dropout_becomes_sampling(network):
    network.train()
    plain = nnx.clone(network)
    report = replace(network, "hidden", solver=ss.ProxSG(tau=0.9, num_iters=2))
    assert network.hidden.solver.tau == 0.75
    assert (report.rows[0].dropout, report.rows[0].tau) == ("dropout", 0.75)
    x = jnp.ones((2, 96), jnp.float32)
    assert same(network.dropout(x), x)
    assert not same(network.hidden(x), network.hidden(x))
    network.eval()
    assert same(network.hidden(x), network.hidden(x))
    ss.nnx.restore_layers(network)
    network.train()
    assert same(network(IMAGES), plain(IMAGES))  # the model's random streams have not moved
    report = replace(
        network, "hidden", solver=ss.ProxSG(tau=0.9, num_iters=2), dropout="keep", rngs=nnx.Rngs(0)
    )
    assert network.hidden.solver.tau == 0.9
    assert not same(network.dropout(x), x)
    ss.nnx.restore_layers(network)
    report = replace(network, "hidden")
    assert "the Dropout dropout before it stays: the solver does not sample" in report.rows[0].note


def test_the_report(network):
    plain = network(IMAGES)
    report = replace(network, ["*", "hidden"], measure=True)
    rows = {row.name: row for row in report.rows}
    left = {one.name: one.reason for one in report.left}
    assert "SolverResNetBlock" in left["skip"]
    assert "without an activation" in left["last"]
    assert report.model_change_one == 0
    change = jnp.linalg.norm(network(IMAGES) - plain) / jnp.linalg.norm(plain)
    assert report.model_change == pytest.approx(float(change), rel=1e-3)
    assert all(row.change_one < 1e-6 < row.change for row in report.rows)
    assert rows["stem"].normalization == "norm"
    assert rows["hidden"].lipschitz == pytest.approx(
        np.linalg.norm(network.hidden.kernel[...], 2) ** 2, rel=1e-3
    )
    assert rows["hidden"].step_size == 1
    text = str(report)
    assert "stem: norm is folded in" in text
    assert "Left as they are:" in text
    assert set(report.as_dict()) >= {"name", "change", "gap", "relative_gap"}
    assert report.plot().get_xlabel() == "relative change in percent"


def test_checkpoints_go_both_ways(network):
    plain = nnx.clone(network)
    replace(network, ["body.0", "hidden", "stem"])
    trained = jax.tree.map(
        lambda leaf: 1.01 * leaf, nnx.to_pure_dict(nnx.state(network, nnx.Param))
    )
    assert jax.tree.structure(trained) == jax.tree.structure(
        nnx.to_pure_dict(nnx.state(plain, nnx.Param))
    )
    for model in (network, plain):
        state = nnx.state(model, nnx.Param)
        nnx.replace_by_pure_dict(state, trained)
        nnx.update(model, state)
    again = pickle.loads(pickle.dumps(network))
    assert same(again(IMAGES), network(IMAGES))
    ss.nnx.restore_layers(network)  # with the weights that were loaded meanwhile
    assert same(network(IMAGES), plain(IMAGES))
    ss.nnx.restore_layers(again)
    assert same(again(IMAGES), plain(IMAGES))


def test_training_and_export(network):
    replace(network, ["body.0", "hidden", "stem"])
    optimizer = nnx.Optimizer(network, optax.sgd(1e-4), wrt=nnx.Param)

    @nnx.jit
    def train(model, optimizer):
        loss, gradient = nnx.value_and_grad(lambda model: jnp.mean(model(IMAGES) ** 2))(model)
        optimizer.update(model, gradient)
        return loss

    losses = [float(train(network, optimizer)) for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]
    ss.nnx.refresh_lipschitz(network)
    network.eval()
    graph, state = nnx.split(network)
    exported = export.export(jax.jit(lambda state, x: nnx.merge(graph, state)(x)))(state, IMAGES)
    np.testing.assert_allclose(exported.call(state, IMAGES), network(IMAGES), rtol=1e-5, atol=1e-6)


class Stack(nnx.Module):
    """Layers made by `nnx.vmap` and called by `nnx.scan`."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return nnx.Linear(4, 4, rngs=rngs)

        self.layers = make(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x, layer):
            return nnx.relu(layer(x))

        return forward(x, self.layers)


def test_scanned_stacks_are_the_explicit_loop():
    model, x = Stack(nnx.Rngs(0)), jax.random.normal(jax.random.key(1), (5, 4), jnp.float32)
    kernels, biases = model.layers.kernel[...], model.layers.bias[...]
    report = replace(model, inputs=x, measure=True)
    assert [row.name for row in report.rows] == ["layers[0]", "layers[1]", "layers[2]"]
    expected = x
    for kernel, bias, row in zip(kernels, biases, report.rows, strict=True):
        assert row.lipschitz == pytest.approx(np.linalg.norm(kernel, 2) ** 2, rel=1e-3)
        plain = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        plain.kernel[...], plain.bias[...] = kernel, bias
        expected = ss.nnx.SolverLinear.from_layer(plain, solver=SOLVER, normalize=True)(expected)
    np.testing.assert_allclose(model(x), expected, rtol=1e-4, atol=1e-5)
    ss.nnx.restore_layers(model)
    with pytest.raises(ValueError, match="more than once, in a loop"):
        replace(Repeated(nnx.Rngs(0)), inputs=x)


class Repeated(nnx.Module):
    """One layer, three times."""

    def __init__(self, rngs):
        self.layer = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        graph, state = nnx.split(self.layer)
        step = lambda x, _: (nnx.relu(nnx.merge(graph, state)(x)), None)  # noqa: E731
        return jax.lax.scan(step, x, None, length=3)[0]


class Kinds(nnx.Module):
    """1-D and 3-D convolutions, a general layer, jit and remat."""

    def __init__(self, rngs):
        self.line = nnx.Conv(4, 4, (3,), rngs=rngs)
        self.past = nnx.Conv(4, 4, (3,), padding="CAUSAL", kernel_dilation=2, rngs=rngs)
        self.volume = nnx.Conv(4, 4, (2, 2, 2), rngs=rngs)
        self.general = nnx.LinearGeneral((2, 4), (3, 2), axis=(-2, -1), rngs=rngs)
        self.mlp = nnx.Linear(2, 3, rngs=rngs)

    def __call__(self, x):  # (batch, 2, 2, 2, 4)
        y = nnx.relu(self.volume(x))
        y = nnx.jit(lambda layer, y: nnx.relu(layer(y)))(self.line, y.reshape(len(x), 8, 4))
        y = nnx.relu(self.past(y))
        y = nnx.remat(lambda layer, y: jnp.tanh(layer(y)))(self.general, y.reshape(len(x), 4, 2, 4))
        return nnx.relu(self.mlp(y))


@pytest.mark.optimized
def test_all_kinds_of_layers_within_transforms(rng):
    model = built(lambda: Kinds(nnx.Rngs(0)), rng)
    x = jnp.asarray(rng.normal(size=(2, 2, 2, 2, 4)), jnp.float32)
    plain = model(x)
    report = replace(model, inputs=x, solver=ss.ProxGD(1))
    assert {row.name: row.kind for row in report.rows} == {
        "general": "LinearGeneral", "line": "Conv", "mlp": "Linear", "past": "Conv", "volume": "Conv",
    }  # fmt: skip
    assert same(model(x), plain)
    assert type(model.general) is ss.nnx.SolverLinearGeneral
    ss.nnx.restore_layers(model)
    replace(model, "general", inputs=x)
    assert not same(model(x), plain)


class Own(nnx.Linear):
    """A call of its own."""

    def __call__(self, x):
        return 2 * super().__call__(x)


class Refused(nnx.Module):
    """Whatever cannot be replaced."""

    def __init__(self, rngs):
        self.gelu = nnx.Linear(4, 4, rngs=rngs)
        self.twice = nnx.Linear(4, 4, rngs=rngs)
        self.lora = nnx.LoRALinear(4, 4, lora_rank=2, rngs=rngs)
        self.own = Own(4, 4, rngs=rngs)
        self.transposed = nnx.ConvTranspose(4, 4, (3,), mask=jnp.ones((3, 4, 4)), rngs=rngs)
        self.weight = nnx.WeightNorm(nnx.Linear(4, 4, rngs=rngs), rngs=rngs)
        self.masked = nnx.Conv(4, 4, (3,), mask=jnp.ones((3, 4, 4)), rngs=rngs)
        self.unused = nnx.Linear(4, 4, rngs=rngs)
        self.good = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.twice(nnx.relu(self.twice(nnx.gelu(self.gelu(x))))))
        x = nnx.relu(self.own(nnx.relu(self.lora(x))))
        x = nnx.relu(self.weight(nnx.relu(self.transposed(x))))
        return nnx.relu(self.good(nnx.relu(self.masked(x))))


REASONS = {
    "gelu": "GELU decreases",
    "twice": "it is called 2 times",
    "lora": "low-rank product",
    "own": "methods of its own",
    "transposed": "the option mask",
    "weight.layer_instance": "made by WeightNorm",
    "masked": "the option mask",
    "unused": "it is not called",
}


def test_what_cannot_be_replaced_is_left_or_refused_by_name():
    model, x = Refused(nnx.Rngs(0)), jnp.ones((2, 5, 4), jnp.float32)
    report = replace(model, inputs=x)
    assert [row.name for row in report.rows] == ["good"]
    left = {
        one.name: one.reason for one in report.left if "." not in one.name or "weight" in one.name
    }
    assert left.keys() >= REASONS.keys()
    for name, reason in REASONS.items():
        assert reason in left[name]
        with pytest.raises(ValueError, match=reason):
            replace(model, name, inputs=x)
    with pytest.raises(ValueError, match="a solver layer already; restore_layers"):
        replace(model, lambda path, _: path == "good", inputs=x)


@pytest.mark.parametrize(
    ("where", "options", "message"),
    [
        ("hiden", {}, "such as hidden"),
        ("dropout", {}, "Dropout: it is no nnx.Linear"),
        (nnx.Embed, {}, "something that a layer of the model matches"),
        ("last", {}, "prior=ss.prox.Zero"),
        ("stem", {"fold_batch_norm": False}, "fold_batch_norm=True"),
        ("hidden", {"solver": 10}, r"expected a Solver such as ProxGD\(10\), got 10"),
        ("hidden", {"prior": "relu"}, "a Prior such as"),
        ("hidden", {"dropout": "drop"}, "dropout of replace_layers"),
        ("body.0", {"solver": ss.ProxSG(tau=0.5, num_iters=2)}, "rngs of the layer 'body.0'"),
    ],
)
def test_errors_say_what_to_do(network, where, options, message):
    before = nnx.graphdef(network)
    with pytest.raises(ValueError, match=message):
        replace(network, where, **options)
    assert nnx.graphdef(network) == before
    assert not hasattr(network.stem, "replaced_class")


def test_a_given_prior_and_wrong_inputs(network):
    report = replace(network, "last", prior=ss.prox.L1(0.1))
    assert "the prior is given" in report.rows[0].note
    assert report.rows[0].activation == ""
    with pytest.raises((TypeError, ValueError)):
        replace(network, "hidden", inputs=jnp.ones((2, 5, 5, 3), jnp.float32))
    with pytest.raises(ValueError, match=r"expected an nnx.Module"):
        replace(nnx.relu)


def test_a_model_that_others_wrote(monkeypatch, rng):
    """VGG16 of lpips-nnx: all 13 layers by their activations, one pair replaced, to the last bit; bounded."""
    from lpips_nnx import vgg

    monkeypatch.setattr(vgg.VGG16Features, "_load_weights", lambda self: None)
    graph, state = nnx.split(nnx.eval_shape(lambda: vgg.VGG16Features(rngs=nnx.Rngs(0))))
    draw = lambda leaf: jnp.asarray(0.05 * rng.standard_normal(leaf.shape, np.float32))  # noqa: E731
    model = nnx.merge(graph, jax.tree.map(draw, state))
    images = jnp.asarray(rng.normal(size=(1, 16, 16, 3)), jnp.float32)
    found = survey(model, (images,), {})
    assert [call.prior for call in found.layers] == [ss.prox.NonNegative()] * 13
    assert [call.input_shape[1] for call in found.layers] == [16] * 2 + [8] * 2 + [4] * 3 + [
        2
    ] * 3 + [1] * 3
    plain = model(images)
    replace(model, ["conv_0", "conv_5"], inputs=images, solver=ss.ProxGD(1))
    assert type(model.conv_0) is ss.nnx.SolverConv
    assert same(model(images), plain)

    class Shallow(nnx.Module):
        def __init__(self):
            self.whole = model

        def __call__(self, x):
            return self.whole(x)[1]

    report = ss.lipschitz_report(Shallow(), images.shape)
    layers = [(row.name, row.kind) for row in report.rows if not row.note]
    assert layers == [
        ("whole.conv_0", "SolverConv"),
        ("whole.conv_2", "Conv"),
        ("whole.conv_5", "SolverConv"),
        ("whole.conv_7", "Conv"),
    ]
    assert {row.note for row in report.rows[4:]} == {"the output does not depend on it"}
    moved = images + jnp.asarray(1e-2 * rng.normal(size=images.shape), jnp.float32)
    change, shift = (
        np.asarray(a) - np.asarray(b) for a, b in ((model(moved)[1], plain[1]), (moved, images))
    )
    gain = np.linalg.norm(change) / np.linalg.norm(shift)
    assert gain <= report.bound < np.inf
    ss.nnx.restore_layers(model)
    assert same(model(images), plain)
