"""On meshes of both kinds, Auto and Explicit (`jax.make_mesh`'s default), everything runs and is the same.

One device is enough for the types; eight compute the same values in a process of their own.
"""

import subprocess
import sys

import catalogue
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import stochsolvers as ss

KEY = jax.random.key(2)
EXACT, COLUMNS = ss.proxprop.Exact(0.5), ss.proxprop.Exact(0.5, "parameters")
CG = ss.proxprop.ConjugateGradients(0.5, 2)
KINDS = {"auto": (AxisType.Auto,), "explicit": (AxisType.Explicit,)}


def dense(x, kernel):
    return ss.LayerProblem(ss.Dense(kernel), x, bias=jnp.ones(5), ridge=0.1)


def conv(x, kernel, **options):
    return ss.LayerProblem(ss.Conv(kernel, (6, 5), **options), x, ridge=0.1)


def linear_layer(x, kernel, **options):
    layer = ss.nnx.SolverLinear(
        6, 5, solver=ss.ProxSG(2, 3), rngs=nnx.Rngs(0, dropout=1), **options
    )
    layer.kernel = nnx.Param(kernel)
    return layer(x)


def conv_layer(x, kernel, **options):
    layer = ss.nnx.SolverConv(
        3,
        4,
        (3, 3),
        solver=ss.ProxSG(2, 3),
        spatial_shape=(6, 5),
        rngs=nnx.Rngs(0, dropout=1),
        **options,
    )
    layer.kernel = nnx.Param(kernel)
    return layer(x)


DENSE = {
    "prox_gd": lambda x, k: ss.prox_gd(dense(x, k), num_iters=3).value,
    "tol": lambda x, k: ss.prox_gd(dense(x, k), num_iters=40, tol=1e-6).value,
    "gap_tol": lambda x, k: ss.prox_gd(dense(x, k), num_iters=40, gap_tol=1e-9).value,
    "normalized": lambda x, k: (
        ss.prox_gd(dense(x, k).normalized(), step_size=1.0, num_iters=3).value
    ),
    "pre_activation": lambda x, k: (
        ss.ProxGD(3).solve(None, dense(x, k), pre_activation=True).pre_activation
    ),
    "implicit pre_activation": lambda x, k: (
        ss.ProxGD(40, tol=1e-6).solve(None, dense(x, k), pre_activation=True).pre_activation
    ),
    "normalised layer": lambda x, k: linear_layer(x, k, normalize=True),
    "prox_sg": lambda x, k: ss.prox_sg(KEY, dense(x, k), tau=3, num_iters=3).value,
    "importance": lambda x, k: (
        ss.prox_sg(KEY, dense(x, k), sampling=ss.estimators.Importance(3), num_iters=2).value
    ),
    "ms2gd": lambda x, k: ss.ms2gd(KEY, dense(x, k), tau=3, num_outer=2, num_inner=2).value,
    "nsync": lambda x, k: ss.nsync(KEY, dense(x, k), tau=3, num_iters=3).value,
    "layer": linear_layer,
    "proxprop": lambda x, k: ss.proxprop.apply(ss.Dense(k), x, jnp.ones(5), EXACT),
    "proxprop, many rows": lambda x, k: ss.proxprop.apply(ss.Dense(k), x[:, None], None, COLUMNS),
    "proxprop, cg": lambda x, k: ss.proxprop.apply(ss.Dense(k), x, None, CG),
}
CONV = {
    "prox_gd": lambda x, k: ss.prox_gd(conv(x, k), num_iters=3).value,
    "strides": lambda x, k: ss.prox_gd(conv(x, k, strides=2), num_iters=3).value,
    "circular": lambda x, k: ss.prox_gd(conv(x, k, padding="CIRCULAR"), num_iters=3).value,
    "layer": conv_layer,
    "layer with strides": lambda x, k: conv_layer(x, k, strides=2),
    "proxprop": lambda x, k: ss.proxprop.apply(ss.Conv(k, (6, 5)), x, jnp.ones(4), EXACT),
    "proxprop, cg": lambda x, k: ss.proxprop.apply(ss.Conv(k, (6, 5)), x, None, CG),
}
CASES = [((4, 6), (6, 5), f) for f in DENSE.values()] + [
    ((4, 6, 5, 3), (3, 3, 3, 4), f) for f in CONV.values()
]
NAMES = [f"dense {name}" for name in DENSE] + [f"conv {name}" for name in CONV]


def run(function, x, kernel):
    """The value and the derivatives, eager and jitted."""

    def loss(x, kernel):
        return jnp.sum(jnp.sin(function(x, kernel)))

    return function(x, kernel), jax.jit(jax.grad(loss, (0, 1)))(x, kernel)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "kernel_shape", "function"), CASES, ids=NAMES)
def test_values_and_gradients_on_a_mesh(kind, shape, kernel_shape, function, rng):
    x, kernel = (jnp.asarray(rng.normal(size=s) / 2) for s in (shape, kernel_shape))
    value, slopes = run(function, x, kernel)
    mesh = jax.make_mesh((1,), ("data",), axis_types=KINDS[kind])
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, P("data")))
        replicated = jax.device_put(kernel, NamedSharding(mesh, P()))
        on_mesh, mesh_slopes = run(function, placed, replicated)
        if kind == "explicit":
            assert jax.typeof(on_mesh).sharding.spec[0] == "data"
            assert jax.typeof(mesh_slopes[0]).sharding.spec[0] == "data"
    np.testing.assert_allclose(on_mesh, value, rtol=1e-10, atol=1e-12)
    for one, other in zip(mesh_slopes, slopes, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_reports_on_a_mesh(kind, rng):
    layer = ss.nnx.SolverLinear(6, 5, solver=ss.ProxGD(4), ridge=0.1, rngs=nnx.Rngs(0))
    x = jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)
    here = ss.certify(layer, x).rows[0]
    mesh = jax.make_mesh((1,), ("data",), axis_types=KINDS[kind])
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, P("data")))
        there = ss.certify(layer, placed).rows[0]
    np.testing.assert_allclose(there.gap_max, here.gap_max, rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kernel_split_over_its_outputs(kind, rng):
    kernel, x = jnp.asarray(rng.normal(size=(6, 4))), jnp.asarray(rng.normal(size=(3, 6)))

    def values(kernel):
        problem = ss.LayerProblem(ss.Dense(kernel), x, ridge=0.1)
        z = ss.prox_sg(KEY, problem, tau=3, num_iters=3).value
        constants = (
            ss.lipschitz_constant(problem.linear_map),
            *ss.operator_bracket(ss.Dense(kernel)),
        )
        return z, problem.certificate(z), *constants

    want = values(kernel)
    mesh = jax.make_mesh((1,), ("model",), axis_types=KINDS[kind])
    with jax.set_mesh(mesh):
        got = values(jax.device_put(kernel, NamedSharding(mesh, P(None, "model"))))
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_implicit_steps_of_a_kernel_split_over_its_outputs(kind, rng):
    kernel, bias, x = (jnp.asarray(rng.normal(size=s)) for s in ((6, 4), (4,), (3, 6)))

    def slopes(kernel, bias, step):
        def loss(kernel, bias):
            return jnp.sum(ss.proxprop.apply(ss.Dense(kernel), x, bias, step) ** 2)

        return jax.grad(loss, (0, 1))(kernel, bias)

    mesh = jax.make_mesh((1,), ("model",), axis_types=KINDS[kind])
    for step in (EXACT, COLUMNS, CG):
        want = slopes(kernel, bias, step)
        with jax.set_mesh(mesh):
            split = jax.device_put(kernel, NamedSharding(mesh, P(None, "model")))
            got = slopes(split, jax.device_put(bias, NamedSharding(mesh, P("model"))), step)
        for one, other in zip(got, want, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


EIGHT_DEVICES = """
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import stochsolvers as ss

assert len(jax.devices()) == 8
key = jax.random.key(0)
kernel, x = jax.random.normal(key, (12, 6)) / 4, jax.random.normal(key, (16, 12))
layer = ss.nnx.SolverLinear(12, 6, solver=ss.ProxSG(4, 3), rngs=nnx.Rngs(0, dropout=1))
graph, parameters, rest = nnx.split(layer, nnx.Param, ...)


def implicit_conv_loss(kernel, x, step):
    conv = ss.Conv(kernel.reshape(3, 2, 2, 6), (2, 3))
    return jnp.sum(ss.proxprop.apply(conv, x.reshape(16, 2, 3, 2), None, step) ** 2)


def implicit_loss(kernel, x, step):
    return jnp.sum(ss.proxprop.apply(ss.Dense(kernel), x, None, step) ** 2)


def values(kernel, x):
    problem = ss.LayerProblem(ss.Dense(kernel), x, ridge=0.1)
    slope = jax.grad(lambda p: jnp.sum(nnx.merge(graph, p, rest, copy=True)(x) ** 2))
    steps = [ss.proxprop.Exact(), ss.proxprop.Exact(form="parameters"), ss.proxprop.ConjugateGradients()]
    implicit = jax.jit(lambda k, x, step: jax.grad(implicit_loss)(k, x, step))
    implicit_conv = jax.jit(lambda k, x, step: jax.grad(implicit_conv_loss)(k, x, step))
    stopped = ss.prox_gd(problem, num_iters=200, tol=1e-5)
    return (
        ss.prox_sg(key, problem, tau=4, num_iters=3).value,
        ss.ms2gd(key, problem, tau=4, num_outer=2, num_inner=2).value,
        ss.nsync(key, problem, tau=3, num_iters=3).value,
        stopped.value,
        stopped.iterations,
        problem.certificate(stopped.value),
        *jax.tree.leaves(jax.jit(slope)(parameters)),
        *(implicit(kernel, x, step) for step in steps),
        *(implicit_conv(kernel, x, step) for step in (steps[0], steps[2])),
    )


want = values(kernel, x)
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        split = jax.device_put(x, NamedSharding(mesh, P("data")))
        got = values(jax.device_put(kernel, NamedSharding(mesh, P())), split)
        assert len(got[0].addressable_shards) == 8
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5)
print("same")
"""


def test_eight_devices_draw_and_compute_the_same(quick_environment):
    flags = f"{quick_environment['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    run = subprocess.run(
        [sys.executable, "-c", EIGHT_DEVICES],
        env={**quick_environment, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.stdout == "same\n", run.stderr


def on_mesh(kind, function, array):
    """The function of an array, and that of the same array with its batch split over a mesh."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=KINDS[kind])
    here = function(array)
    with jax.set_mesh(mesh):
        there = function(jax.device_put(array, NamedSharding(mesh, P("data"))))
    for one, other in zip(jax.tree.leaves(there), jax.tree.leaves(here), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", catalogue.SOLVERS)
def test_solvers_of_the_catalogue(kind, name):
    solver, problem = catalogue.SOLVERS[name], catalogue.PROBLEM

    def solve(x):
        moved = ss.LayerProblem(
            problem.linear_map, x, bias=problem.bias, prior=problem.prior, ridge=problem.ridge
        )
        solution = solver.solve(KEY, moved, certify=True, trace_objective=True)
        return solution.value, solution.objectives, solution.certificate

    on_mesh(kind, solve, problem.inputs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", catalogue.MAPS)
def test_maps_of_the_catalogue(kind, name, rng):
    A = catalogue.MAPS[name]
    x = jnp.asarray(rng.normal(size=(2, *A.in_shape)), A.dtype)

    def solve(x):
        problem = ss.LayerProblem(A, x, ridge=0.5)
        z = ss.prox_gd(problem, num_iters=3).value
        return A(x), A.adjoint(z), z, problem.certificate(z), ss.lipschitz_constant(A)

    on_mesh(kind, solve, x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [n for n in catalogue.LAYERS if n.startswith("nnx")])
def test_layers_of_the_catalogue(kind, name):
    entry = catalogue.LAYERS[name]()
    on_mesh(kind, lambda x: entry.layer(x, rngs=KEY), entry.inputs[:2])
