"""What one trace says about the layers of a model: activations by their operations, never by their names."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stochsolvers as ss
from stochsolvers import _programs
from stochsolvers.surgery import _fold, _survey, _where

prox = ss.prox


def layer(x, label):
    return _programs.mark_output(2 * _programs.mark_input(x, "layer", label), "layer", label)


def dropout(x, label):
    return _programs.mark_output(_programs.mark_input(x, "dropout", label), "dropout", label)


def max_pool(x):
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3), (1, 1), "SAME")


def gelu(x):
    """Another function, with a famous name."""
    return jnp.maximum(x, 0)


def relu(x):
    return jnp.sin(x)


KNOWN = {
    "relu": (jax.nn.relu, prox.NonNegative()),
    "relu by another name": (gelu, prox.NonNegative()),
    "relu by where": (lambda x: jnp.where(x > 0, x, 0), prox.NonNegative()),
    "relu in bfloat16": (lambda x: jax.nn.relu(x.astype(jnp.bfloat16)), prox.NonNegative()),
    "relu of a reshape": (lambda x: jax.nn.relu(x.reshape(3, 4)), prox.NonNegative()),
    "relu behind a pool": (lambda x: jax.nn.relu(max_pool(x)), prox.NonNegative()),
    "relu, scaled": (lambda x: 3 * jax.nn.relu(x), prox.NonNegative()),
    "relu in jit": (jax.jit(lambda x: jax.nn.relu(x).sum()), prox.NonNegative()),
    "relu6": (jax.nn.relu6, prox.Box(0.0, 6.0)),
    "hard tanh": (jax.nn.hard_tanh, prox.Box(-1.0, 1.0)),
    "clip": (lambda x: jnp.clip(x, -0.5, 2.0), prox.Box(-0.5, 2.0)),
    "tanh": (jnp.tanh, prox.Tanh()),
    "sigmoid": (jax.nn.sigmoid, prox.Sigmoid()),
    "softplus": (jax.nn.softplus, prox.Softplus()),
    "soft sign": (jax.nn.soft_sign, prox.Softsign()),
    "arctan": (jnp.arctan, prox.Arctan()),
    "elu": (jax.nn.elu, prox.ELU(1.0)),
    "elu, 0.3": (lambda x: jax.nn.elu(x, 0.3), prox.ELU(0.3)),
    "leaky relu": (jax.nn.leaky_relu, prox.LeakyReLU(0.01)),
    "leaky relu, 0.2": (functools.partial(jax.nn.leaky_relu, negative_slope=0.2), prox.LeakyReLU(0.2)),
}  # fmt: skip
GENERAL = {
    "celu": lambda x: jax.nn.celu(x, 0.7),
    "log sigmoid": jax.nn.log_sigmoid,
    "hard sigmoid": jax.nn.hard_sigmoid,
    "squareplus": jax.nn.squareplus,
    "flat tanh": lambda x: 0.5 * jnp.tanh(2 * x),
    "soft threshold": lambda x: jnp.sign(x) * jnp.maximum(jnp.abs(x) - 0.5, 0),
    "product": lambda x: (x > 0) * x,
}
REFUSED = {
    "gelu": (jax.nn.gelu, "GELU decreases"),
    "exact gelu": (lambda x: jax.nn.gelu(x, approximate=False), "GELU decreases"),
    "silu": (jax.nn.silu, "SiLU"),
    "silu by hand": (lambda x: x * jax.nn.sigmoid(1.702 * x), "SiLU"),
    "mish": (jax.nn.mish, "mish"),
    "hard silu": (jax.nn.hard_silu, "hard SiLU"),
    "selu": (jax.nn.selu, "SELU has slopes"),
    "elu, 2": (lambda x: jax.nn.elu(x, 2.0), "alpha of ELU"),
    "sine by another name": (relu, "the prox of no convex function: the slope"),
    "floor": (jnp.floor, "the prox of no convex function"),
    "nothing": (lambda x: x, "leaves the network without an activation"),
    "softmax": (jax.nn.softmax, "no elementwise activation"),
    "gated": (lambda x: x[:, :2] * jax.nn.sigmoid(x[:, 2:]), "slice"),
    "two uses": (lambda x: (jnp.tanh(x), x + 1), "leaves the network"),
    "residual": (lambda x: jax.nn.relu(x + jnp.arange(12.0).reshape(4, 3)), "SolverResNetBlock"),
    "learned slope": (lambda x: jnp.where(x > 0, x, x * jnp.arange(12.0).reshape(4, 3)), "mul"),
    "dropout": (lambda x: jnp.tanh(dropout(x, "d")), "the Dropout 'd' follows"),
}


@pytest.fixture(scope="module")
def survey():
    functions = {name: function for name, (function, _) in (KNOWN | REFUSED).items()} | GENERAL

    def network(x):
        return {name: function(layer(x, name)) for name, function in functions.items()}

    found = _survey.survey(network, jnp.ones((4, 3), jnp.float32))
    return {call.label: call for call in found.layers}


@pytest.mark.parametrize("name", KNOWN)
def test_activations_of_jax_have_their_exact_priors(survey, name):
    assert survey[name].prior == KNOWN[name][1]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_prox_is_refused_with_the_reason(survey, name):
    assert survey[name].prior is None
    assert REFUSED[name][1] in survey[name].reason


def test_other_functions_of_the_class_are_taken_from_their_operations(survey):
    x = jnp.linspace(-4, 4, 33, dtype=jnp.float32)
    for name, function in GENERAL.items():
        prior = survey[name].prior
        assert isinstance(prior, prox.Activation), name
        np.testing.assert_allclose(prior.function(x), function(x), rtol=1e-6, err_msg=name)
        assert pickle.loads(pickle.dumps(prior)) == prior
        assert hash(pickle.loads(pickle.dumps(prior))) == hash(prior)


def test_loops_calls_and_shapes_within_transforms():
    def network(x):
        def body(carry, _):
            return jax.nn.relu(layer(carry, "in a scan")), None

        x = jax.lax.scan(body, x, None, length=3)[0]
        x = jax.vmap(lambda row: jnp.tanh(layer(row, "in a vmap")))(x)
        inner = jax.checkpoint(lambda x: jnp.tanh(layer(dropout(x, "drop").reshape(-1), "inner")))
        return jax.jit(inner)(x) + jnp.tanh(layer(layer(x, "first"), "twice")).reshape(-1)

    found = _survey.survey(network, jnp.ones((4, 3), jnp.float32))
    calls = {call.label: call for call in found.layers}
    assert calls["in a scan"].loops == ("scan",)
    assert calls["in a vmap"].input_shape == (3,)
    assert calls["inner"].prior == prox.Tanh()
    assert "the layer 'twice' follows" in calls["first"].reason
    assert found.dropouts == (_survey.DropoutCall("drop", ("inner",), False),)


def test_folding_is_the_normalisation_in_float64(rng):
    kernel, x = rng.standard_normal((5, 4)), rng.standard_normal((3, 5))
    b, m, beta, gamma = rng.standard_normal((4, 4))
    v = rng.random(4)
    fold = _fold.affine(*map(jnp.asarray, (m, v, gamma, beta)), 1e-5)
    for bias in (None, b):
        wide, shift = _fold.folded(jnp.asarray(kernel), bias, fold)
        y = x @ kernel + (0 if bias is None else bias)
        expected = (y - m) / np.sqrt(v + 1e-5) * gamma + beta
        np.testing.assert_allclose(x @ np.asarray(wide) + np.asarray(shift), expected, rtol=1e-12)


MODULES = {"conv1": 1, "blocks.0.conv1": 2.0, "blocks.1.conv1": 3, "blocks.1.norm": "x"}


def test_selection():
    def paths(where):
        return list(_where.select(where, MODULES))

    assert paths("conv1") == ["conv1"]
    assert paths("blocks.*.conv1") == ["blocks.0.conv1", "blocks.1.conv1"]
    assert paths(str) == ["blocks.1.norm"]
    assert paths([float, "conv1"]) == ["conv1", "blocks.0.conv1"]
    assert paths(lambda path, module: module == 3) == ["blocks.1.conv1"]
    assert _where.select(["*", "conv1"], MODULES)["conv1"].named
    with pytest.raises(ValueError, match=r"such as blocks.1.conv1, blocks.0.conv1"):
        paths("block.1.conv1")
    with pytest.raises(ValueError, match="expected a path, a type"):
        paths(3)
    with pytest.raises(ValueError, match="at least one"):
        paths([])
