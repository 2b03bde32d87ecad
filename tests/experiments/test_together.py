"""Several seeds at once end as each of them alone."""

import dataclasses
import signal

import jax
import numpy as np
import pytest
import toys
from flax import nnx

from experiments import data, table2
from experiments.data import datasets
from experiments.networks import BlockConfig, LeNet, LeNetConfig
from experiments.training import checkpoints, loop

SEEDS = (0, 3)


def parameters(trained):
    return jax.tree.leaves(nnx.state(trained.model, nnx.Param))


def assert_close(found, expected, rtol):
    for mine, theirs in zip(parameters(found), parameters(expected), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=rtol, atol=rtol)
    for mine, theirs in zip(found.history, expected.history, strict=True):
        assert mine.keys() == theirs.keys()
        for key in mine.keys() - {"seconds"}:
            np.testing.assert_allclose(mine[key], theirs[key], rtol=rtol)


def test_digits():
    config = loop.TrainConfig(epochs=1, batch_size=24, learning_rates=(0.01,))
    network = LeNetConfig((32, 32, 1), 10, "ND-D", BlockConfig(num_iters=3))
    few = {}
    for seed in SEEDS:
        whole = datasets.load("digits", None, seed=seed)
        train = data.Split(whole.train.images[:100], whole.train.labels[:100])
        few[seed] = dataclasses.replace(whole, train=train)

    def build(rngs):
        return LeNet(network, rngs=rngs)

    both = loop.train_together(build, few, config, label="both")
    for seed, found in zip(SEEDS, both, strict=True):
        alone = dataclasses.replace(config, seed=seed)
        assert_close(found, loop.train(build, few[seed], alone, label="alone"), 2e-5)


TOYS = {seed: toys.dataset(seed) for seed in SEEDS}
CONFIG = dataclasses.replace(toys.CONFIG, augment=True)


def together(folder=None, config=CONFIG, **options):
    return loop.train_together(
        lambda rngs: toys.TinyNet(rngs=rngs),
        TOYS,
        config,
        label="toys",
        checkpoint=folder,
        **options,
    )


@pytest.fixture(scope="module")
def uninterrupted():
    with jax.enable_x64(False):
        return together()


def test_statistics_dropout_and_augmentation(uninterrupted):
    for seed, found in zip(SEEDS, uninterrupted, strict=True):
        config = dataclasses.replace(CONFIG, seed=seed)
        alone = loop.train(lambda rngs: toys.TinyNet(rngs=rngs), TOYS[seed], config, label="toy")
        assert_close(found, alone, 1e-4)


def test_a_stopped_group_goes_on(uninterrupted, tmp_path, monkeypatch):
    bar = toys.interrupted_bar(toys.STEPS + 2, signal.SIGTERM)
    monkeypatch.setattr(loop, "tqdm", bar)
    with pytest.raises(SystemExit):
        together(tmp_path / "run")
    monkeypatch.undo()
    seen = []
    again = together(tmp_path / "run", watches=[lambda records: seen.append(len(records))])
    assert seen == [1, 2, 3]
    for found, expected in zip(again, uninterrupted, strict=True):
        assert toys.digest(found) == toys.digest(expected)
    # the group's checkpoint is that of these seeds
    with pytest.raises(checkpoints.CheckpointError, match="belongs to another run"):
        toys.train(tmp_path / "run", config=CONFIG)


def test_divergence_names_the_seed():
    config = dataclasses.replace(CONFIG, learning_rates=(1e30,))
    with pytest.raises(loop.DivergenceError, match=r"toys, seed [03]: the loss is"):
        together(config=config)


def test_table2_trains_what_remains_at_once(tmp_path, monkeypatch):
    groups = []

    class EnoughError(Exception):
        pass

    def train(build, datasets, config, **options):
        groups.append((tuple(datasets), options["checkpoint"].name))
        raise EnoughError

    monkeypatch.setattr(loop, "train_together", train)
    for options in ({}, {"seeds_at_once": True}):
        with pytest.raises(EnoughError):
            table2.run(table2.Config(out=tmp_path, seeds=(4, 1), **options))
    assert groups == [((4,), "D-D_dropout_4"), ((4, 1), "D-D_dropout_4-1")]
