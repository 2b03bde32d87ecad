"""The network, the schedule, training and evaluation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from flax import nnx

import stochsolvers as ss
from experiments import networks
from experiments.networks import BlockConfig, LeNet, LeNetConfig
from experiments.training import evaluation, loop, training_step


@pytest.mark.parametrize(
    ("variant", "method"), [("D-D", "dropout"), ("D-ND", "prox-sg"), ("ND-D", "prox-sg")]
)
def test_lenet_shapes(variant, method):
    config = LeNetConfig((32, 32, 3), 10, variant, BlockConfig(method))
    model = LeNet(config, rngs=nnx.Rngs(0))
    images = jnp.zeros((4, 32, 32, 3))
    features = model.features(images)
    hidden = model.penultimate(features)
    assert (features.shape, hidden.shape) == ((4, 400), (4, 120))
    assert model.last(hidden).shape == (4, 84)
    assert model(images).shape == (4, 10)
    # every variant and method has the same parameters
    assert loop.count_parameters(model) == 62_006

    for layer, marked in zip((model.penultimate, model.last), variant.split("-"), strict=True):
        if method == "prox-sg" and marked == "D":
            assert isinstance(layer, ss.nnx.SolverLinear)
            assert layer.solver == ss.ProxSG(tau=0.5, num_iters=10, decay=0.9)
        else:
            assert isinstance(layer, networks.DropoutReLU)
            assert layer.dropout.rate == (0.5 if marked == "D" else 0.0)
    assert model.is_stochastic == (method == "prox-sg")


def test_lenet_needs_sixteen_pixels():
    with pytest.raises(ValueError, match="at least 16×16 pixels"):
        LeNet(LeNetConfig((15, 32, 1)), rngs=nnx.Rngs(0))


def test_modes():
    images, random = jnp.ones((4, 16, 16, 1)), {}
    for method in ("dropout", "prox-sg"):
        config = LeNetConfig((16, 16, 1), 2, "ND-D", BlockConfig(method, num_iters=3))
        model = LeNet(config, rngs=nnx.Rngs(0))
        for mode in ("train", "test", "deterministic"):
            networks.set_mode(model, mode)
            random[method, mode] = not np.array_equal(model(images), model(images))
    assert {key for key, value in random.items() if value} == {
        ("dropout", "train"),
        ("prox-sg", "train"),
        ("prox-sg", "test"),
    }


@pytest.mark.parametrize("rates", [(0.1,), (1e-3, 1e-4), (1e-2, 1e-3, 1e-4)])
@pytest.mark.parametrize("total", [1, 2, 3, 9, 100])
def test_learning_rates_take_equal_parts(rates, total):
    found = [training_step.staged(rates, step, total) for step in range(total)]
    starts = [-(-k * total // len(rates)) for k in range(len(rates) + 1)]  # ceil(k total / count)
    expected = np.repeat(rates, np.diff(starts))
    np.testing.assert_array_equal(found, expected)


def test_optimiser_is_sgd_with_momentum_and_weight_decay(rng):
    weight, optimizer = (
        jnp.asarray(2.0),
        training_step.optimizer(training_step.Rates(1e-2, 0.9, 5e-4)),
    )
    state = optimizer.init(weight)
    expected, momentum = 2.0, 0.0
    for gradient in rng.normal(size=5):
        momentum = 0.9 * momentum + gradient + 5e-4 * expected
        expected -= 1e-2 * momentum
        updates, state = optimizer.update(jnp.asarray(gradient), state, weight)
        weight = weight + updates
        np.testing.assert_allclose(weight, expected, rtol=1e-6)


def test_other_optimisers_by_their_formulas(rng):
    rate, first, second, decay = 1e-2, 0.9, 0.99, 5e-4
    rates, gradients = training_step.Rates(rate, first, decay, second), rng.normal(size=5)

    def nesterov(w, g, m, v, k):
        g = g + decay * w
        m = first * m + g
        return w - rate * (g + first * m), m, v

    def adam(w, g, m, v, k, *, coupled=True):
        g = g + decay * w * coupled
        m, v = first * m + (1 - first) * g, second * v + (1 - second) * g**2
        unbiased = m / (1 - first**k) / (np.sqrt(v / (1 - second**k)) + 1e-8)
        return w - rate * (unbiased + decay * w * (not coupled)), m, v

    formulas = {"nesterov": nesterov, "adam": adam}
    formulas["adamw"] = lambda *args: adam(*args, coupled=False)
    for kind, formula in formulas.items():
        weight, optimizer = jnp.asarray(2.0), training_step.optimizer(rates, kind)
        state, expected, m, v = optimizer.init(weight), 2.0, 0.0, 0.0
        for k, gradient in enumerate(gradients, start=1):
            expected, m, v = formula(expected, gradient, m, v, k)
            updates, state = optimizer.update(jnp.asarray(gradient), state, weight)
            weight = weight + updates
        np.testing.assert_allclose(weight, expected, rtol=1e-5)


def test_settings_name_the_optimiser_only_where_it_is_another_one():
    plain = loop.TrainConfig()
    assert "optimizer" not in plain.settings()
    assert set(dataclasses.asdict(plain)) - set(plain.settings()) == set(training_step.ADDED)
    adam = dataclasses.replace(plain, optimizer="adam")
    assert adam.settings() == {**plain.settings(), "optimizer": "adam"}


LONGER = dataclasses.replace(toys.CONFIG, epochs=8)
OPTIONS = {
    "plain": {},
    "seed": {"seed": 2},
    "bf16": {"precision": "bf16"},
    "augment": {"augment": True},
    "adam": {"optimizer": "adam", "learning_rates": (0.02,)},
}


@pytest.fixture(scope="module")
def runs():
    """A run with each of the options."""
    with jax.enable_x64(False):
        return {
            name: toys.train(config=dataclasses.replace(LONGER, **options))
            for name, options in OPTIONS.items()
        }


def test_training_learns_and_is_reproducible(runs):
    for name, run in runs.items():
        assert [record["epoch"] for record in run.history] == list(range(1, 9))
        assert run.history[-1]["train_loss"] < run.history[0]["train_loss"]
        if name != "augment":  # crops by up to four of eight pixels leave little
            assert run.history[-1]["validation_accuracy"] > 90
    losses = {name: [record["train_loss"] for record in run.history] for name, run in runs.items()}
    assert len(set(map(tuple, losses.values()))) == len(OPTIONS)
    again = toys.train(config=LONGER)
    assert [record["train_loss"] for record in again.history] == losses["plain"]


class Sealed:
    """A split that must not be read."""

    def __getattr__(self, name):
        raise AssertionError(f"the test split's {name} was read")


def test_training_reads_no_test_image(runs):
    sealed = dataclasses.replace(toys.dataset(), test=Sealed())
    with pytest.raises(AssertionError, match="the test split's images was read"):
        _ = sealed.test.images
    history = loop.train(lambda rngs: toys.TinyNet(rngs=rngs), sealed, LONGER, label="toy").history
    assert [{**record, "seconds": 0} for record in history] == [
        {**record, "seconds": 0} for record in runs["plain"].history
    ]


def test_batch_statistics_are_carried(runs):
    trained, toy = runs["plain"].model, toys.dataset()
    before = np.asarray(trained.features.norm.mean[...])
    assert np.abs(before).max() > 0.01
    # evaluation reads them and leaves them
    evaluation.evaluate(trained, toy.test, toy)
    np.testing.assert_array_equal(trained.features.norm.mean[...], before)


def test_lipschitz_constants_are_fresh_after_training(runs):
    layer = runs["plain"].model.solver
    singular = np.linalg.norm(np.asarray(layer.kernel[...]), 2)
    np.testing.assert_allclose(layer.lipschitz[...], singular**2, rtol=1e-4)


def test_finetuning_starts_from_what_is_built(runs):
    trained = runs["plain"].model
    graph, state = nnx.split(trained)
    config = dataclasses.replace(toys.CONFIG, epochs=1, learning_rates=(0.0,), weight_decay=0.0)
    tuned = loop.train(
        lambda _: nnx.merge(graph, state, copy=True), toys.dataset(), config, label="toy"
    ).model
    for before, after in zip(
        *(jax.tree.leaves(nnx.state(model, nnx.Param)) for model in (trained, tuned)), strict=True
    ):
        np.testing.assert_array_equal(before, after)


def test_bfloat16_leaves_parameters_and_solvers_alone():
    model = toys.TinyNet(rngs=nnx.Rngs(0))
    training_step.set_precision(model, "bf16")
    images = jnp.ones((2, 8, 8, 1))
    features = model.features(images)
    assert features.dtype == jnp.bfloat16
    assert model.solver(features).dtype == jnp.float32
    assert model(images).dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {
        jnp.dtype("float32")
    }


def test_bfloat16_computes_what_float32_does(runs):
    # the first loss is of equal parameters; of eight bits, seven are behind the point
    first = {}
    for precision in ("float32", "bf16"):
        config = dataclasses.replace(
            toys.CONFIG, epochs=1, precision=precision, learning_rates=(1e-6,)
        )
        first[precision] = toys.train(config=config).history[0]["train_loss"]
    assert first["bf16"] != first["float32"]
    np.testing.assert_allclose(first["bf16"], first["float32"], rtol=2**-7)
    # and a run ends with parameters no further off than another seed's are, by far
    plain, rough, other = (
        np.concatenate([np.ravel(p) for p in jax.tree.leaves(nnx.state(runs[k].model, nnx.Param))])
        for k in ("plain", "bf16", "seed")
    )
    assert np.linalg.norm(rough - plain) < 0.1 * np.linalg.norm(other - plain)


def test_augmentation_crops_and_flips(rng):
    images = rng.integers(1, 255, (64, 8, 8, 1), dtype=np.uint8)
    out = np.asarray(training_step.augmented(jax.random.key(0), jnp.asarray(images)))
    assert (out.shape, out.dtype) == (images.shape, images.dtype)
    seen = set()
    for image, found in zip(images, out, strict=True):
        border = np.pad(image, ((4, 4), (4, 4), (0, 0)))
        candidates = {
            (row, column, flip): border[row : row + 8, column : column + 8][:, :: 1 - 2 * flip]
            for row in range(9)
            for column in range(9)
            for flip in range(2)
        }
        (place,) = (key for key, crop in candidates.items() if np.array_equal(crop, found))
        seen.add(place)
    rows, columns, flips = map(set, zip(*seen, strict=True))
    assert (rows, columns, flips) == (set(range(9)), set(range(9)), {0, 1})


def test_evaluation_counts_every_image_once(runs):
    model, toy = runs["plain"].model, toys.dataset()
    whole = evaluation.evaluate(model, toy.test, toy, deterministic=True)
    networks.set_mode(model, "deterministic")
    logits = model(evaluation.normalise(toy.test.images, toy.mean, toy.std))
    expected = 100 * np.mean(np.argmax(logits, axis=-1) == toy.test.labels)
    np.testing.assert_allclose(whole, [expected])
    parts = evaluation.evaluate(model, toy.test, toy, deterministic=True, batch_size=11)
    np.testing.assert_allclose(parts, whole)


def test_trials_are_independent_and_reproducible():
    model, toy = toys.TinyNet(rngs=nnx.Rngs(0)), toys.dataset()
    first = evaluation.evaluate(model, toy.test, toy, trials=8)
    assert first.shape == (8,)
    assert len(set(first)) > 1
    np.testing.assert_array_equal(evaluation.evaluate(model, toy.test, toy, trials=8), first)


def test_divergence_names_the_step():
    config = dataclasses.replace(toys.CONFIG, learning_rates=(1e30,))
    with pytest.raises(
        loop.DivergenceError, match=r"toy, seed 1: the loss is (nan|inf) at step \d+"
    ):
        toys.train(config=config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"epochs": 0}, "epochs: expected at least 1"), ({"batch_size": 68}, "expected 1 to 67")],
)
def test_impossible_configurations(changes, message):
    with pytest.raises(loop.ConfigurationError, match=message):
        toys.train(config=dataclasses.replace(toys.CONFIG, **changes))
