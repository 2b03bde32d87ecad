"""Solver layers of transposed convolutions, and decoders in which they replace those of Flax."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from linen_variables import built, drawn

import stochsolvers as ss

CASES: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((5, 4), {"kernel_size": (3, 2), "strides": 2}),
    ((4, 3), {"kernel_size": (4, 3), "strides": (2, 1), "padding": "CIRCULAR", "transpose_kernel": True}),
    ((6,), {"kernel_size": (3,), "padding": "VALID", "transpose_kernel": True}),
]  # fmt: skip


def by_hand(plain, x, iterations, constant):
    """z_K from the matrix of Flax's layer, in float64: z ← max(0, z − (M(Mᵀz − x) − b)/L); ‖M‖² ≤ L."""
    zeros = jnp.zeros(x.shape[1:], jnp.float64)
    matrix = np.asarray(jax.jacobian(plain)(zeros), np.float64)
    matrix = matrix.reshape(-1, zeros.size)
    b = np.asarray(plain(zeros), np.float64).ravel()
    assert np.linalg.norm(matrix, 2) ** 2 <= constant * (1 + 1e-9)
    flat = np.asarray(x, np.float64).reshape(len(x), -1)
    z = np.zeros((len(x), len(matrix)))
    for _ in range(iterations):
        z = np.maximum(0, z - ((z @ matrix - flat) @ matrix.T - b) / constant)
    return z


@pytest.mark.parametrize(("pixels", "options"), CASES)
def test_iterates_are_those_of_the_dense_problem(rng, pixels, options):
    x = jnp.asarray(rng.normal(size=(2, *pixels, 3)))
    plain = nnx.ConvTranspose(3, 4, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **options)
    plain.bias[...] = jnp.asarray(rng.normal(size=4))
    layer = ss.nnx.SolverConvTranspose.from_layer(plain, solver=ss.ProxGD(5), spatial_shape=pixels)
    z = by_hand(plain, x, 5, layer.lipschitz[...])
    np.testing.assert_allclose(layer(x).reshape(len(x), -1), z, rtol=0, atol=1e-9)

    twin = ss.linen.SolverConvTranspose(
        4, solver=ss.ProxGD(5), param_dtype=jnp.float64, dtype=jnp.float64, **options
    )
    parameters = {"params": {"kernel": plain.kernel[...], "bias": plain.bias[...]}}
    np.testing.assert_allclose(twin.apply(parameters, x).reshape(len(x), -1), z, rtol=0, atol=1e-9)


class Decoder(nnx.Module):
    """Upsampled twice, with a BatchNorm and a Dropout between."""

    def __init__(self, rngs, transpose_kernel):
        options: dict[str, Any] = {"transpose_kernel": transpose_kernel, "rngs": rngs}
        self.up = nnx.ConvTranspose(3, 16, (5, 5), strides=2, **options)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.higher = nnx.ConvTranspose(16, 8, (5, 3), strides=2, padding="CIRCULAR", **options)
        self.last = nnx.ConvTranspose(8, 1, (3, 3), **options)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.up(x)))
        return self.last(jnp.tanh(self.higher(self.dropout(x))))


class LinenDecoder(nn.Module):
    """The same."""

    transpose_kernel: bool

    @nn.compact
    def __call__(self, x, train=False):
        options: dict[str, Any] = {"transpose_kernel": self.transpose_kernel}
        x = nn.ConvTranspose(16, (5, 5), (2, 2), name="up", **options)(x)
        x = nn.relu(nn.BatchNorm(not train, name="norm")(x))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        x = nn.ConvTranspose(8, (5, 3), (2, 2), padding="CIRCULAR", name="higher", **options)(x)
        return nn.ConvTranspose(1, (3, 3), name="last", **options)(jnp.tanh(x))


@pytest.mark.optimized
@pytest.mark.parametrize("transpose_kernel", [False, True])
def test_decoders_keep_their_bits_for_one_iteration(rng, transpose_kernel):
    x = jnp.asarray(rng.normal(size=(2, 3, 4, 3)), jnp.float32)
    module = LinenDecoder(transpose_kernel)
    variables = drawn(module, rng, x)
    plain = jax.jit(module.apply)(variables, x)
    swapped, own, report = ss.linen.replace_layers(
        module, variables, "*", solver=ss.ProxGD(1), inputs=x, measure=False
    )
    assert [(row.name, row.kind, row.normalization) for row in report.rows] == [
        ("up", "ConvTranspose", "norm"),
        ("higher", "ConvTranspose", ""),
    ]
    np.testing.assert_array_equal(jax.jit(swapped.apply)(own, x), plain)

    forward = nnx.jit(lambda model, x: model(x))
    model = built(lambda: Decoder(nnx.Rngs(0, dropout=1), transpose_kernel), rng)
    for name, values in variables["params"].items():
        for key, value in values.items():
            getattr(getattr(model, name), key)[...] = value
    for key, value in variables["batch_stats"]["norm"].items():
        getattr(model.norm, key)[...] = value
    model.eval()
    np.testing.assert_array_equal(forward(model, x), plain)
    report = ss.nnx.replace_layers(
        model, nnx.ConvTranspose, solver=ss.ProxGD(1), inputs=x, measure=False
    )
    assert {row.name for row in report.rows} == {"up", "higher"}
    (left,) = report.left
    assert left.name == "last"
    assert "without an activation" in left.reason
    np.testing.assert_array_equal(forward(model, x), plain)
    ss.nnx.restore_layers(model)
    assert type(model.up) is nnx.ConvTranspose
    np.testing.assert_array_equal(forward(model, x), plain)


def test_more_iterations_with_a_folded_normalisation(rng):
    """Both front ends, against the dense problem of the layer and its BatchNorm as one map."""
    x = jnp.asarray(rng.normal(size=(2, 3, 4, 3)))
    module = LinenDecoder(True)
    variables = jax.tree.map(lambda leaf: leaf.astype(float), drawn(module, rng, x))

    def folded(x):
        y = nn.ConvTranspose(16, (5, 5), (2, 2), transpose_kernel=True).apply(
            {"params": variables["params"]["up"]}, x
        )
        collections = {name: variables[name]["norm"] for name in ("params", "batch_stats")}
        return nn.BatchNorm(True).apply(collections, y)

    swapped, own, _ = ss.linen.replace_layers(
        Head(), variables, "up", solver=ss.ProxGD(3), inputs=x, measure=False, normalize=False
    )
    z = by_hand(folded, x, 3, own["solver_state"]["up"]["lipschitz"])
    np.testing.assert_allclose(swapped.apply(own, x).reshape(len(x), -1), z, rtol=0, atol=1e-9)

    up = nnx.ConvTranspose(3, 16, (5, 5), strides=2, transpose_kernel=True, rngs=nnx.Rngs(0))
    norm = nnx.BatchNorm(16, use_running_average=True, rngs=nnx.Rngs(0))
    for key, value in variables["params"]["up"].items():
        setattr(up, key, nnx.Param(value))
    for collection, kind in (("params", nnx.Param), ("batch_stats", nnx.BatchStat)):
        for key, value in variables[collection]["norm"].items():
            setattr(norm, key, kind(value))
    model = nnx.Sequential(up, norm, nnx.relu)
    ss.nnx.replace_layers(
        model, "layers.0", solver=ss.ProxGD(3), inputs=x, measure=False, normalize=False
    )
    np.testing.assert_allclose(model(x).reshape(len(x), -1), z, rtol=0, atol=1e-9)


class Head(nn.Module):
    """The decoder's first layers alone."""

    @nn.compact
    def __call__(self, x):
        x = nn.ConvTranspose(16, (5, 5), (2, 2), transpose_kernel=True, name="up")(x)
        return nn.relu(nn.BatchNorm(True, name="norm")(x))
