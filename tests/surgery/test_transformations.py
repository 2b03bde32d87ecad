"""Layers within JAX's own transformations, in branches, and shared by the examples of a batch."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import stochsolvers as ss


class Transformed(nnx.Module):
    """A layer within each of JAX's transformations."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        names = ("jit", "checkpoint", "vmap", "taken", "skipped")
        self.layers = nnx.Dict({name: nnx.Linear(4, 4, rngs=rngs) for name in names})

    def activated(self, name):
        return lambda x: jnp.tanh(self.layers[name](x))

    def __call__(self, x):
        for name in ("jit", "checkpoint", "vmap"):
            x = getattr(jax, name)(self.activated(name))(x)
        return jax.lax.cond(x[0, 0] < 2, self.activated("taken"), self.activated("skipped"), x)


def test_what_a_report_measures_within_transformations_of_jax():
    """The changes are those of dense arithmetic on what each layer sees."""
    model = Transformed()
    x = jax.random.normal(jax.random.key(1), (3, 4), jnp.float32)
    seen, plain = {}, np.asarray(x, np.float64)
    for name in ("jit", "checkpoint", "vmap", "taken"):
        layer: Any = model.layers[name]
        A, b = (np.asarray(one[...], np.float64) for one in (layer.kernel, layer.bias))
        L = np.linalg.norm(A, 2) ** 2
        y = np.tanh(plain @ A + b)
        z = np.tanh(y + plain @ A + b - y @ A.T @ A / L)
        seen[name], plain = np.linalg.norm(z - y) / np.linalg.norm(y), y
    report = ss.nnx.replace_layers(model, "*", solver=ss.ProxGD(2), inputs=x)
    rows = {row.name.removeprefix("layers."): row for row in report.rows}
    for name, change in seen.items():
        assert rows[name].change_one == 0, name
        np.testing.assert_allclose(rows[name].change, change, rtol=1e-4, err_msg=name)
        assert rows[name].model_change > 0
        assert 0 < rows[name].gap < np.inf
    assert np.isnan(rows["skipped"].change)
    assert "it was not run at these inputs" in rows["skipped"].note
    assert report.model_change_one == 0


def test_a_layer_that_examples_share_has_one_row():
    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x):
            one = nn.vmap(
                nn.Dense, in_axes=0, variable_axes={"params": None}, split_rngs={"params": False}
            )
            return nn.relu(one(3, name="one")(x))

    x = jax.random.normal(jax.random.key(1), (4, 5), jnp.float32)
    variables = Shared().init(jax.random.key(0), x)
    found = ss.linen.replace_layers(Shared(), variables, "*", solver=ss.ProxGD(2), inputs=x)
    (row,) = found.report.rows
    assert row.name == "one"
    np.testing.assert_allclose(row.change, row.model_change, rtol=1e-5)


def test_a_step_behind_a_layer_is_no_activation():
    model = nnx.Sequential(
        nnx.Linear(4, 4, rngs=nnx.Rngs(0)), jax.grad(lambda x: jax.nn.relu(x).sum())
    )
    with pytest.raises(ValueError, match="rises by 1 between"):
        ss.nnx.replace_layers(model, "*", solver=ss.ProxGD(2), inputs=jnp.ones((2, 4)))
