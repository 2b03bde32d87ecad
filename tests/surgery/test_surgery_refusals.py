"""Layers that look as if a solver could take their place, and in whose model it would change the function."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import stochsolvers as ss


class Net(nnx.Module):
    """A function of one layer's output."""

    def __init__(self, function, layer=nnx.Linear):
        self.layer, self.function = layer(4, 4, rngs=nnx.Rngs(0)), function

    def __call__(self, x):
        return self.function(self.layer(x))


def replace(model, where="layer"):
    options = {"solver": ss.ProxGD(3), "inputs": jnp.ones((4, 4)), "measure": False}
    return ss.nnx.replace_layers(model, where, **options)


@pytest.mark.parametrize(
    "function",
    [
        lambda y: jax.nn.relu(0.5 * y + 0.5 * y.T),
        lambda y: jnp.maximum(y, y[:, ::-1]),
        lambda y: jax.nn.relu((y + y.reshape(2, 8).T.reshape(4, 4)) / 2),
        lambda y: jax.nn.relu(jax.lax.optimization_barrier((jnp.ones((4, 4)), y))[0] - y),
    ],
)
def test_functions_of_entries_at_different_places_are_no_activations(function):
    with pytest.raises(ValueError, match="layer 'layer': expected one that a solver can replace"):
        replace(Net(function))


def test_activations_of_rearranged_outputs_are_found():
    for function in (lambda y: jax.nn.silu(-y.T), lambda y: jnp.tanh(y.T).T + 0 * y):
        with pytest.raises(ValueError, match="expected one that a solver can replace"):
            replace(Net(function))
    shrunk = replace(Net(lambda y: (lambda v: 0.5 * v + 0.5 * jnp.tanh(v))(y.T.reshape(2, 8))))
    assert [row.activation for row in shrunk.rows] == ["custom"]
    assert [row.activation for row in replace(Net(lambda y: jax.nn.relu(y.T[None])[0])).rows] == [
        "relu"
    ]


def test_a_subclass_whose_call_is_no_function_is_left():
    class Jitted(nnx.Linear):
        @nnx.jit
        def __call__(self, x):
            return 5 * nnx.Linear.__call__(self, x)

    with pytest.raises(ValueError, match="Jitted has methods of its own"):
        replace(Net(jax.nn.relu, Jitted))


def test_the_lines_of_a_report_are_not_long():
    reason = "another array is added before the activation, " * 6
    left = ss.surgery.LayerLeft("blocks.0.convolution", "Conv", reason)
    report = ss.surgery.ReplacementReport((), (left,), 0.0, 0.0, (reason,))
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 120
    assert [line.strip() for line in lines] == [line for line in map(str.strip, lines) if line]
    assert str(report).split().count("array") == 12


def test_a_layer_that_the_library_has_no_map_for_does_not_stop_the_others():
    class Padded(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.same = nnx.Conv(2, 2, (3, 3), rngs=rngs)
            self.reflect = nnx.Conv(2, 2, (3, 3), padding="REFLECT", rngs=rngs)

        def __call__(self, x):
            return jax.nn.relu(self.reflect(jax.nn.relu(self.same(x))))

    report = ss.nnx.replace_layers(
        Padded(), nnx.Conv, solver=ss.ProxGD(1), inputs=jnp.ones((1, 5, 5, 2)), measure=False
    )
    assert [row.name for row in report.rows] == ["same"]
    assert "padding 'REFLECT'" in report.left[0].reason


def test_inputs_by_name_are_inputs_in_linen():
    class Named(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dropout(0.5)(inputs=x, deterministic=True)
            return jax.nn.relu(nn.Dense(4)(inputs=x))

    x = jnp.ones((2, 3), jnp.float32)
    variables = Named().init(jax.random.key(0), x)
    found = ss.linen.replace_layers(Named(), variables, "*", solver=ss.ProxGD(1), inputs=x)
    assert [row.activation for row in found.report.rows] == ["relu"]
    plain = Named().apply(variables, x)
    assert jnp.array_equal(found.module.apply(found.variables, x), plain)


def test_layers_that_the_library_normalises_are_left():
    with pytest.raises(ValueError, match="made by SpectralNorm: remove that first"):
        replace(
            Net(jax.nn.relu, lambda *args, rngs: ss.nnx.SpectralNorm(nnx.Linear(*args, rngs=rngs))),
            "*",
        )

    class Normalised(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jax.nn.relu(ss.linen.SpectralNorm(nn.Dense(4))(x, update_stats=False))

    x = jnp.ones((2, 4), jnp.float32)
    variables = Normalised().init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="SpectralNorm: remove that first"):
        ss.linen.replace_layers(
            Normalised(), variables, "*", solver=ss.ProxGD(2), inputs=x, measure=False
        )


@pytest.mark.parametrize(
    ("wrapper", "named"),
    [(nn.SpectralNorm, "nn.SpectralNorm"), (ss.linen.SpectralNorm, "ss.linen.SpectralNorm")],
)
def test_the_wrapper_that_makes_another_kernel_is_named(wrapper, named):
    class Wrapped(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(4, name="dense")
            return nn.relu(wrapper(dense, name="wrapper")(x, update_stats=False))

    x = jnp.ones((2, 4))
    variables = Wrapped().init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=f"made by {named}: remove that first"):
        ss.linen.replace_layers(
            Wrapped(), variables, "dense", solver=ss.ProxGD(3), inputs=x, measure=False
        )


def test_the_columns_of_a_report_say_what_they_are():
    long = replace(Net(jax.nn.relu), "layer")
    name = "encoder.blocks.10.mlp.up.0"
    number = dict.fromkeys(("lipschitz", "step_size", "change_one", "change", "gap"), 0.0123456)
    row = dataclasses.replace(long.rows[0], name=name, activation="leaky_relu", **number)
    header, rule, *_ = str(dataclasses.replace(long, rows=(row,))).splitlines()
    assert "  K  change, K = 1  change  of model" in header
    assert len(rule) < 120
