"""Within `shard_map`, its checks on, everything runs, whichever of its arguments differs between devices.

One device is enough for the checks; values on several are compared in tests/experiments/test_parallel.py.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, Mesh, PartitionSpec

import stochsolvers as ss
from stochsolvers.lipschitz import lipschitz_bracket, operator_bracket

KEY = jax.random.key(2)
MESH = Mesh(np.array(jax.devices()[:1]), ("data",), axis_types=(AxisType.Auto,))
N1, N2 = 20, 18  # wide enough for the search of the constant


def problem(kernel, x):
    return ss.LayerProblem(ss.Dense(kernel), x, ridge=0.5)


def conv(kernel):
    return ss.Conv(kernel[None, None] * jnp.ones((3, 1, 1, 1)), (4, 20), strides=(1, 1))


def layer(kernel, x):
    module = ss.nnx.SolverLinear(N1, N2, solver=ss.ProxSG(0.5, 3), rngs=nnx.Rngs(0, dropout=1))
    module.kernel = nnx.Param(kernel)
    return module(x)


PER_EXAMPLE = {
    "prox_gd": lambda k, x: ss.prox_gd(problem(k, x), num_iters=4).value,
    "fista, remat": lambda k, x: (
        ss.prox_gd(problem(k, x), num_iters=4, momentum=True, derivative="remat").value
    ),
    "implicit": lambda k, x: ss.prox_gd(problem(k, x), num_iters=60, derivative="implicit").value,
    "tolerance": lambda k, x: (
        ss.prox_gd(problem(k, x), num_iters=60, tol=1e-6, derivative="implicit").value
    ),
    "prox_sg": lambda k, x: ss.prox_sg(KEY, problem(k, x), tau=5, num_iters=3).value,
    "ms2gd": lambda k, x: (
        ss.ms2gd(KEY, problem(k, x), tau=5, num_outer=2, num_inner=2, step_size=0.05).value
    ),
    "nsync": lambda k, x: ss.nsync(KEY, problem(k, x), tau=5, num_iters=3).value,
    "certificate": lambda k, x: problem(k, x).certificate(jnp.abs(x[:, :N2])),
    "layer": layer,
}
OF_THE_KERNEL = {
    "constant": lambda k: ss.lipschitz_constant(ss.Dense(k)),
    "constant of a convolution": lambda k: ss.lipschitz_constant(conv(k)),
    "bracket": lambda k: lipschitz_bracket(conv(k)).upper,
    "operator bracket": lambda k: operator_bracket(conv(k), num_iters=4).lower,
}


@pytest.fixture
def arrays(rng):
    return jnp.asarray(rng.normal(size=(N1, N2)) / 5), jnp.asarray(rng.normal(size=(4, N1)))


@pytest.mark.parametrize("function", PER_EXAMPLE.values(), ids=PER_EXAMPLE)
def test_of_a_part_of_the_batch(function, arrays):
    def value_and_slope(k, x):
        def loss(k):
            value = function(k, x)
            return jnp.sum(jnp.sin(value)), value

        slope, value = jax.grad(loss, has_aux=True)(k)
        return value, slope

    def part(k, x):
        value, slope = value_and_slope(lax.pcast(k, ("data",), to="varying"), x)
        return value, lax.psum(slope, "data")

    whole, data = PartitionSpec(), PartitionSpec("data")
    mapped = jax.shard_map(part, mesh=MESH, in_specs=(whole, data), out_specs=(data, whole))
    for mine, theirs in zip(jax.jit(mapped)(*arrays), value_and_slope(*arrays), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("function", PER_EXAMPLE.values(), ids=PER_EXAMPLE)
def test_of_a_kernel_of_its_own_and_a_shared_batch(function, arrays):
    (kernel, x), data = arrays, PartitionSpec("data")
    mapped = jax.shard_map(
        lambda k, x: function(k[0], x),
        mesh=MESH,
        in_specs=(data, PartitionSpec()),
        out_specs=data,
    )
    np.testing.assert_allclose(jax.jit(mapped)(kernel[None], x), function(kernel, x), rtol=1e-9)


@pytest.mark.parametrize("name", ["prox_sg", "ms2gd", "nsync"])
def test_a_key_of_its_own(name, arrays, monkeypatch):
    data = PartitionSpec("data")

    def part(k, x):
        own = jax.random.fold_in(KEY, lax.axis_index("data"))
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules[__name__], "KEY", own)
            return PER_EXAMPLE[name](k, x)

    mapped = jax.shard_map(part, mesh=MESH, in_specs=(PartitionSpec(), data), out_specs=data)
    value = jax.jit(mapped)(*arrays)
    monkeypatch.setattr(sys.modules[__name__], "KEY", jax.random.fold_in(KEY, 0))
    np.testing.assert_allclose(value, PER_EXAMPLE[name](*arrays), rtol=1e-9)


@pytest.mark.parametrize("derivative", ["unrolled", "implicit"])
def test_a_bias_and_a_point_of_its_own(derivative, arrays, rng):
    """The kernel and the inputs are the same everywhere."""
    (kernel, x), data = arrays, PartitionSpec("data")
    start = jnp.abs(jnp.asarray(rng.normal(size=(4, N2))))

    def solve(start):
        shared = ss.LayerProblem(ss.Dense(kernel), x, bias=start, ridge=0.5)
        options = {"derivative": derivative, "tol": 1e-6 if derivative == "implicit" else None}
        solution = ss.prox_gd(shared, num_iters=20, init=start, **options)
        return solution.value, problem(kernel, x).certificate(start)

    mapped = jax.shard_map(solve, mesh=MESH, in_specs=data, out_specs=(data, data))
    for mine, theirs in zip(jax.jit(mapped)(start), solve(start), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-9)


@pytest.mark.parametrize("function", OF_THE_KERNEL.values(), ids=OF_THE_KERNEL)
def test_of_a_kernel_of_its_own(function, arrays):
    kernel, data = arrays[0], PartitionSpec("data")
    mapped = jax.shard_map(lambda k: function(k[0])[None], mesh=MESH, in_specs=data, out_specs=data)
    np.testing.assert_allclose(jax.jit(mapped)(kernel[None])[0], function(kernel), rtol=1e-9)
