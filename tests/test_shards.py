"""Within `shard_map`, its checks on, everything runs, whichever of its arguments differs between devices.

One device is enough for the checks; values on several are compared in tests/experiments/test_parallel.py.
"""

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


def layer(key, kernel, x):
    module = ss.nnx.SolverLinear(*kernel.shape, solver=ss.ProxSG(0.5, 3), rngs=nnx.Rngs(0))
    module.kernel = nnx.Param(kernel)
    return module(x, rngs=key)


PER_EXAMPLE = {
    "prox_gd": lambda _, k, x: ss.prox_gd(problem(k, x), num_iters=4).value,
    "fista, remat": lambda _, k, x: (
        ss.prox_gd(problem(k, x), num_iters=4, momentum=True, derivative="remat").value
    ),
    "implicit": lambda _, k, x: (
        ss.prox_gd(problem(k, x), num_iters=60, derivative="implicit").value
    ),
    "tolerance": lambda _, k, x: (
        ss.prox_gd(problem(k, x), num_iters=60, tol=1e-6, derivative="implicit").value
    ),
    "prox_sg": lambda key, k, x: ss.prox_sg(key, problem(k, x), tau=5, num_iters=3).value,
    "ms2gd": lambda key, k, x: (
        ss.ms2gd(key, problem(k, x), tau=5, num_outer=2, num_inner=2, step_size=0.05).value
    ),
    "nsync": lambda key, k, x: ss.nsync(key, problem(k, x), tau=5, num_iters=3).value,
    "certificate": lambda _, k, x: problem(k, x).certificate(jnp.abs(x[:, : k.shape[1]])),
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
    return rng.normal(size=(N1, N2)) / 5, rng.normal(size=(4, N1))


def of_size(name, kernel, x):
    """All of the arrays, or so little that the constant needs no search."""
    wide = name in ("prox_gd", "certificate", "layer")
    return (kernel, x) if wide else (kernel[:6, :5], x[:, :6])


def value_and_slope(function, key, k, x):
    """f(k, x), and the derivative of Σ sin f in k."""

    def loss(k):
        value = function(key, k, x)
        return jnp.sum(jnp.sin(value)), value

    slope, value = jax.grad(loss, has_aux=True)(k)
    return value, slope


alone = jax.jit(value_and_slope, static_argnums=0)  # on no mesh


@pytest.mark.parametrize("name", PER_EXAMPLE)
def test_of_a_part_of_the_batch(name, arrays):
    function, arrays = PER_EXAMPLE[name], of_size(name, *arrays)

    def part(k, x):
        value, slope = value_and_slope(function, KEY, lax.pcast(k, ("data",), to="varying"), x)
        return value, lax.psum(slope, "data")

    whole, data = PartitionSpec(), PartitionSpec("data")
    mapped = jax.shard_map(part, mesh=MESH, in_specs=(whole, data), out_specs=(data, whole))
    for mine, theirs in zip(jax.jit(mapped)(*arrays), alone(function, KEY, *arrays), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", PER_EXAMPLE)
def test_of_a_kernel_of_its_own_and_a_shared_batch(name, arrays):
    function, data = PER_EXAMPLE[name], PartitionSpec("data")
    kernel, x = of_size(name, *arrays)
    mapped = jax.shard_map(
        lambda k, x: function(KEY, k[0], x),
        mesh=MESH,
        in_specs=(data, PartitionSpec()),
        out_specs=data,
    )
    value, _ = alone(function, KEY, kernel, x)
    np.testing.assert_allclose(jax.jit(mapped)(kernel[None], x), value, rtol=1e-9)


@pytest.mark.parametrize("name", ["prox_sg", "ms2gd", "nsync"])
def test_a_key_of_its_own(name, arrays):
    function, data = PER_EXAMPLE[name], PartitionSpec("data")
    kernel, x = of_size(name, *arrays)

    def part(k, x):
        return function(jax.random.fold_in(KEY, lax.axis_index("data")), k, x)

    mapped = jax.shard_map(part, mesh=MESH, in_specs=(PartitionSpec(), data), out_specs=data)
    value, _ = alone(function, jax.random.fold_in(KEY, 0), kernel, x)
    np.testing.assert_allclose(jax.jit(mapped)(kernel, x), value, rtol=1e-9)


@pytest.mark.parametrize("derivative", ["unrolled", "implicit"])
def test_a_bias_and_a_point_of_its_own(derivative, arrays, rng):
    """The kernel and the inputs are the same everywhere."""
    (kernel, x), data = arrays, PartitionSpec("data")
    start = np.abs(rng.normal(size=(4, N2)))

    def solve(start):
        shared = ss.LayerProblem(ss.Dense(kernel), x, bias=start, ridge=0.5)
        options = {"derivative": derivative, "tol": 1e-6 if derivative == "implicit" else None}
        solution = ss.prox_gd(shared, num_iters=20, init=start, **options)
        return solution.value, problem(kernel, x).certificate(start)

    mapped = jax.shard_map(solve, mesh=MESH, in_specs=data, out_specs=(data, data))
    for mine, theirs in zip(jax.jit(mapped)(start), jax.jit(solve)(start), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-9)


@pytest.mark.parametrize("function", OF_THE_KERNEL.values(), ids=OF_THE_KERNEL)
def test_of_a_kernel_of_its_own(function, arrays):
    kernel, data = arrays[0], PartitionSpec("data")
    mapped = jax.shard_map(lambda k: function(k[0])[None], mesh=MESH, in_specs=data, out_specs=data)
    alone = jax.jit(function)(kernel)
    np.testing.assert_allclose(jax.jit(mapped)(kernel[None])[0], alone, rtol=1e-9)
