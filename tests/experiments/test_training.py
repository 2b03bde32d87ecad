"""The network, the schedule, training and evaluation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import stochsolvers as ss
from experiments import data, networks, training
from experiments.networks import BlockConfig, LeNet, LeNetConfig


@pytest.fixture
def toy(rng) -> data.Dataset:
    """Images of two classes, bright above or bright below, 16×16."""

    def split(count):
        labels = rng.integers(0, 2, count).astype(np.int32)
        images = rng.integers(0, 60, (count, 16, 16, 1), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[8 * label : 8 * label + 8] += 150
        return data.Split(images, labels)

    train = split(64)
    mean, std = data.pixel_statistics(train.images)
    return data.Dataset("toy", train, split(24), split(40), ("up", "down"), mean, std)


def builder(toy, method="prox-sg", variant="D-D"):
    config = LeNetConfig(toy.image_shape, 2, variant, BlockConfig(method, num_iters=3))
    return lambda rngs: LeNet(config, rngs=rngs)


@pytest.mark.parametrize("variant", ["D-D", "D-ND", "ND-D"])
@pytest.mark.parametrize("method", ["dropout", "prox-sg"])
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
    assert training.count_parameters(model) == 62_006

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


def test_modes(toy):
    images = training.normalise(toy.test.images[:4], toy.mean, toy.std)
    random = {}
    for method in ("dropout", "prox-sg"):
        model = builder(toy, method)(nnx.Rngs(0))
        for mode in ("train", "test", "deterministic"):
            networks.set_mode(model, mode)
            random[method, mode] = not np.array_equal(model(images), model(images))
    assert {key for key, value in random.items() if value} == {
        ("dropout", "train"),
        ("prox-sg", "train"),
        ("prox-sg", "test"),
    }


@pytest.mark.parametrize("total", [1, 2, 3, 9, 100])
def test_learning_rate_falls_in_thirds(total):
    rates = np.array(jax.vmap(training.staged_learning_rate((1e-2, 1e-3, 1e-4), total))(jnp.arange(total)))
    steps = np.arange(total)
    expected = np.where(steps < total / 3, 1e-2, np.where(steps < 2 * total / 3, 1e-3, 1e-4))
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


def test_weight_decay_is_coupled_and_momentum_accumulates():
    config = training.TrainConfig(epochs=1, momentum=0.9, weight_decay=5e-4)
    transform = training.optimizer(config, total_steps=30)
    weight, velocity, state = jnp.asarray(2.0), 0.0, None
    state = transform.init(weight)
    for gradient in (1.0, -0.5):
        velocity = 0.9 * velocity + gradient + 5e-4 * float(weight)
        update, state = transform.update(jnp.asarray(gradient), state, weight)
        np.testing.assert_allclose(update, -1e-2 * velocity, rtol=1e-6)
        weight = weight + update


@pytest.mark.parametrize("method", ["dropout", "prox-sg"])
def test_training_learns_and_is_reproducible(toy, method):
    config = training.TrainConfig(epochs=6, batch_size=16, learning_rates=(0.2, 0.02, 0.002), seed=1)
    first = training.train(builder(toy, method), toy, config, label="toy")
    assert [record["epoch"] for record in first.history] == list(range(1, 7))
    assert first.history[-1]["train_loss"] < first.history[0]["train_loss"]
    assert first.history[-1]["validation_accuracy"] > 90

    again = training.train(builder(toy, method), toy, config, label="toy")
    assert [r["train_loss"] for r in again.history] == [r["train_loss"] for r in first.history]
    other = dataclasses.replace(config, seed=2)
    other = training.train(builder(toy, method), toy, other, label="toy")
    assert other.history[0]["train_loss"] != first.history[0]["train_loss"]


def test_lipschitz_constants_are_fresh_after_training(toy):
    config = training.TrainConfig(epochs=1, batch_size=16)
    model = training.train(builder(toy), toy, config, label="toy").model
    for layer in (model.penultimate, model.last):
        singular = np.linalg.norm(np.asarray(layer.kernel[...]), 2)
        np.testing.assert_allclose(layer.lipschitz[...], singular**2, rtol=1e-4)


def test_evaluation_counts_every_image_once(toy):
    model = builder(toy)(nnx.Rngs(0))
    whole = training.evaluate(model, toy.test, toy, deterministic=True)
    networks.set_mode(model, "deterministic")
    logits = model(training.normalise(toy.test.images, toy.mean, toy.std))
    expected = 100 * np.mean(np.argmax(logits, axis=-1) == toy.test.labels)
    np.testing.assert_allclose(whole, [expected])
    parts = training.evaluate(model, toy.test, toy, deterministic=True, batch_size=11)
    np.testing.assert_allclose(parts, whole)


def test_trials_are_independent_and_reproducible(toy):
    model = builder(toy)(nnx.Rngs(0))
    first = training.evaluate(model, toy.test, toy, trials=8)
    assert first.shape == (8,)
    assert len(set(first)) > 1
    np.testing.assert_array_equal(training.evaluate(model, toy.test, toy, trials=8), first)


def test_divergence_names_the_step(toy):
    config = training.TrainConfig(epochs=3, batch_size=16, learning_rates=(1e30,))
    with pytest.raises(training.DivergenceError, match=r"toy: the loss is (nan|inf) at step \d+"):
        training.train(builder(toy, "dropout"), toy, config, label="toy")


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"epochs": 0}, "epochs: expected at least 1"), ({"batch_size": 65}, "expected 1 to 64")],
)
def test_impossible_configurations(toy, changes, message):
    config = dataclasses.replace(training.TrainConfig(epochs=1, batch_size=16), **changes)
    with pytest.raises(training.ConfigurationError, match=message):
        training.train(builder(toy), toy, config, label="toy")
