"""Dropouts before replaced layers: which are absorbed, and what the report says of the others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import stochsolvers as ss

KEY = jax.random.key(3)
SOLVER = ss.ProxSG(0.5, 1)


class Masks(nn.Module):
    """A Dropout in a program that JAX keeps."""

    @nn.jit
    @nn.compact
    def __call__(self, x):
        return nn.Dropout(0.5, deterministic=False, name="drop")(x)


class Inside(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.Dense(5, name="dense")(Masks(name="masks")(x)))


class Tail(nn.Module):
    @nn.jit
    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.Dense(5, name="dense")(x))


class Outside(nn.Module):
    """The layer in such a program, the Dropout before it."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dropout(0.5, deterministic=False, name="drop")(x)
        return Tail(name="tail")(x)


class OfOneModule(nn.Module):
    """A method in such a program and one outside of it; both modules are those of the network."""

    def setup(self):
        self.drop = nn.Dropout(0.5, deterministic=False)
        self.dense = nn.Dense(5)

    @nn.jit
    def masked(self, x):
        return self.drop(x)

    def __call__(self, x):
        return nn.relu(self.dense(self.masked(x)))


class Together(nn.Module):
    """A Dropout and its layer in the same program."""

    @nn.jit
    @nn.compact
    def __call__(self, x):
        x = nn.Dropout(0.5, deterministic=False, name="drop")(x)
        return nn.relu(nn.Dense(5, name="dense")(x))


class Within(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Together(name="both")(x)


def replaced(module):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8)), jnp.float32)
    variables = module.init({"params": KEY, "dropout": KEY}, x)
    swapped, own, report = ss.linen.replace_layers(
        module, variables, "*", solver=SOLVER, inputs=x, measure=False, rngs={"dropout": KEY}
    )
    keys = jax.random.split(KEY, 2)
    return report, lambda: [swapped.apply(own, x, rngs={"dropout": key}) for key in keys]


@pytest.mark.parametrize(
    "module", [Inside(), Outside(), OfOneModule()], ids=lambda m: type(m).__name__
)
def test_a_dropout_that_a_program_of_nn_jit_separates_from_its_layer_stays(module):
    report, draws = replaced(module)
    (row,) = report.rows
    assert row.dropout == ""
    assert (
        "before it stays: an nn.jit, nn.remat, nn.vmap, nn.scan or the like is around" in row.note
    )
    for _ in range(2):  # traced, and kept
        one, other = draws()
        assert not np.array_equal(one, other)


def test_a_dropout_in_the_program_of_its_layer_is_absorbed():
    report, draws = replaced(Within())
    assert report.rows[0].dropout == "both/drop"
    for _ in range(2):
        one, other = draws()
        assert not np.array_equal(one, other)


class Shared(nn.Module):
    """A Dropout that two layers read."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dropout(0.25, deterministic=False, name="drop")(x)
        return nn.relu(nn.Dense(5, name="left")(x)) * jnp.tanh(nn.Dense(5, name="right")(x))


class SharedNnx(nnx.Module):
    def __init__(self, rngs):
        self.drop = nnx.Dropout(0.25, rngs=rngs)
        self.left, self.right = (nnx.Linear(8, 5, rngs=rngs) for _ in range(2))

    def __call__(self, x):
        x = self.drop(x)
        return nnx.relu(self.left(x)) * jnp.tanh(self.right(x))


def test_two_layers_behind_one_dropout_sample_by_themselves():
    ours = ss.nnx.replace_layers(
        SharedNnx(nnx.Rngs(0)), "*", solver=SOLVER, inputs=jnp.ones((3, 8)), measure=False
    )
    for report in (replaced(Shared())[0], ours):
        notes = {row.name: row.note for row in report.rows}
        for name, other in (("left", "right"), ("right", "left")):
            assert (
                f"the Dropout drop is before {other} too: each layer samples by itself"
                in notes[name]
            )
        assert "left: the Dropout drop is before right too" in str(report)
