"""Solving for equilibria: derivatives, the hidden form, solver layers, examples by themselves."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stochsolvers as ss
from stochsolvers.equilibrium import DeepProblem, EquilibriumProblem, normalized, solve
from stochsolvers.solvers import Status

EXACT = ss.Anderson(300, tol=1e-13, derivative=ss.Implicit(tol=1e-12))
SHAPE = (4, 3)


def dense_problem(kernel, drive, *, prior=None):
    return EquilibriumProblem(ss.Dense(kernel), drive, prior=prior or ss.prox.NonNegative())


def bounded_problem(kernel, drive):
    return EquilibriumProblem(normalized(ss.Dense(2 * kernel), 0.9), drive)


def conv_problem(kernel, drive):
    return EquilibriumProblem(ss.Conv(kernel, SHAPE), drive, prior=ss.prox.Tanh())


def deep_problem(kernel, drive):
    """Two layers of different widths of the same arrays, averaged."""
    layers = [dense_problem(kernel, drive), dense_problem(-kernel[:, :5], drive[..., :5])]
    return DeepProblem(layers, 0.7)


def composition(kernel, drive):
    regularized = ss.equilibrium.Regularized(ss.prox.L1(0.3), 0.2)
    return DeepProblem([dense_problem(kernel, drive), regularized])


CASES = {
    "dense": (dense_problem, (6, 8), (3, 8)),
    "bounded": (bounded_problem, (6, 8), (3, 8)),
    "softmax": (functools.partial(dense_problem, prior=ss.prox.Entropy()), (6, 8), (3, 8)),
    "conv": (conv_problem, (3, 3, 2, 3), (2, *SHAPE, 3)),
    "deep": (deep_problem, (6, 8), (3, 8)),
    "regularised": (composition, (6, 8), (3, 8)),
}


def arrays_of(rng, *shapes):
    """A kernel with ||W|| ≤ 0.9, by its entries, and a drive."""
    kernel, drive = (rng.normal(size=shape) for shape in shapes)
    norm = np.sum(np.linalg.norm(kernel, 2, axis=(-2, -1)))
    return jnp.asarray(kernel * 0.9 / norm), jnp.asarray(drive)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_finite_differences(rng, name):
    """With respect to the kernel, through its norm, and the drive; in reverse and in forward mode."""
    build, *shapes = CASES[name]
    arrays = arrays_of(rng, *shapes)
    directions = tuple(jnp.asarray(rng.normal(size=shape)) for shape in shapes)
    weight = jnp.asarray(rng.normal(size=build(*arrays).shape))

    @jax.jit
    def both(*arrays):
        def loss(*arrays):
            return jnp.vdot(weight, solve(build(*arrays), solver=EXACT).value)

        value, slopes = jax.value_and_grad(loss, (0, 1))(*arrays)
        return value, slopes, jax.jvp(loss, arrays, directions)[1]

    _, slopes, forward = both(*arrays)
    reverse = sum(jnp.vdot(s, d) for s, d in zip(slopes, directions, strict=True))
    step = 1e-5
    ahead, behind = (
        both(*(a + sign * step * d for a, d in zip(arrays, directions, strict=True)))[0]
        for sign in (1, -1)
    )
    np.testing.assert_allclose(reverse, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(forward, reverse, rtol=1e-8)


@pytest.mark.parametrize("name", ["dense", "deep"])
def test_implicit_is_the_limit_of_unrolling(rng, name):
    build, *shapes = CASES[name]
    arrays = arrays_of(rng, *shapes)
    weight = jnp.asarray(rng.normal(size=build(*arrays).shape))

    def gradient(solver, derivative="implicit"):
        def loss(*arrays):
            solution = solve(build(*arrays), solver=solver, derivative=derivative)
            return jnp.vdot(weight, solution.value)

        return jax.jit(jax.grad(loss, (0, 1)))(*arrays)

    expected = gradient(EXACT)
    for solver, derivative, rtol in (
        (ss.FixedPoint(250), "unrolled", 1e-8),
        (ss.FixedPoint(250, tol=1e-12), ss.Truncated(250), 1e-8),
        (ss.FixedPoint(250, tol=1e-12), ss.Truncated(15), 0.5),
    ):
        for found, wanted in zip(gradient(solver, derivative), expected, strict=True):
            error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
            assert error <= rtol


def test_the_hidden_form_has_the_same_equilibrium_and_gradients(rng):
    kernel, drive = arrays_of(rng, (6, 8), (3, 8))
    weight = jnp.asarray(rng.normal(size=(3, 6)))
    fista = ss.ProxGD(3000, momentum=True, restart=True, tol=1e-13, derivative=EXACT.derivative)

    @jax.jit
    def plain(kernel, drive):
        def loss(kernel, drive):
            z = solve(dense_problem(kernel, drive), solver=EXACT).value
            return jnp.vdot(weight, z), z

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(kernel, drive)

    @jax.jit
    def hidden(kernel, drive):
        def loss(kernel, drive):
            problem = dense_problem(kernel, drive).hidden()
            s = solve(problem, solver=fista).value
            return jnp.vdot(weight, problem.equilibrium(s)), problem.equilibrium(s)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(kernel, drive)

    (_, z), slopes = plain(kernel, drive)
    (_, other), others = hidden(kernel, drive)
    np.testing.assert_allclose(z, other, atol=1e-10)
    for found, wanted in zip(others, slopes, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-8 * float(jnp.max(jnp.abs(wanted))))


def test_the_hidden_objective_and_its_certificate(rng):
    """½||s||² − ½||Wᵀs||² − <c, s> in numpy, and its gap from below and above."""
    kernel, drive = arrays_of(rng, (6, 8), (3, 8))
    plain = dense_problem(kernel, drive)
    problem = plain.hidden()
    W, c = np.asarray(plain.linear_map.kernel).T, np.asarray(drive)
    best = plain.hidden_units(solve(plain, solver=EXACT).value)
    least = problem.objective(best)
    for size in (1.0, 1e-3, 0.0):
        s = jnp.abs(best + size * jnp.asarray(rng.normal(size=best.shape)))
        rows = np.asarray(s)
        expected = 0.5 * np.sum(rows**2, -1) - 0.5 * np.sum((rows @ W) ** 2, -1)
        expected -= np.sum(rows * c, -1)
        np.testing.assert_allclose(problem.objective(s), expected, atol=1e-12)
        gap, certificate = problem.objective(s) - least, problem.certificate(s)
        assert np.all(gap <= certificate + 1e-14)
        assert np.all(certificate <= 60 * gap + 1e-12)
    assert np.all(np.isinf(problem.certificate(-jnp.ones_like(best))))


def test_a_solver_layer_run_to_convergence_is_an_equilibrium_layer(rng):
    """In normalised units s = σ((I − A A*/L) s + A x + b): W = (I − A A*/L)^½, values and gradients."""
    kernel, x, bias, weight = (
        jnp.asarray(rng.normal(size=shape)) for shape in ((5, 6), (3, 5), (6,), (3, 6))
    )
    prior, ridge = ss.prox.Tanh(), 0.3

    @jax.jit
    def solver_layer(kernel, x, bias):
        def loss(kernel, x, bias):
            problem = ss.LayerProblem(ss.Dense(kernel), x, bias=bias, prior=prior, ridge=ridge)
            s = solve(problem.normalized(), solver=EXACT).value
            return jnp.vdot(weight, s), s

        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(kernel, x, bias)

    @jax.jit
    def equilibrium_layer(kernel, x, bias):
        def loss(kernel, x, bias):
            gram = kernel.T @ kernel + ridge * jnp.eye(6)
            smoothness = jnp.linalg.norm(kernel, 2) ** 2 + ridge
            values, vectors = jnp.linalg.eigh(jnp.eye(6) - gram / smoothness)
            root = vectors @ jnp.diag(jnp.sqrt(jnp.maximum(values, 1e-30))) @ vectors.T
            drive = x @ kernel + jnp.expand_dims(bias, 0)
            problem = EquilibriumProblem(ss.Dense(root), drive, prior=prior)
            s = problem.hidden_units(solve(problem, solver=EXACT).value)
            return jnp.vdot(weight, s), s

        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(kernel, x, bias)

    (_, s), slopes = solver_layer(kernel, x, bias)
    (_, other), others = equilibrium_layer(kernel, x, bias)
    np.testing.assert_allclose(s, other, atol=1e-10)
    for found, wanted in zip(others, slopes, strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-7 * float(jnp.max(jnp.abs(wanted))))


@pytest.mark.optimized
def test_an_example_does_not_depend_on_the_others(rng):
    """Alone, among others, and among others that diverge: value, iterations, status, gradient."""
    kernel, drive = arrays_of(rng, (6, 8), (5, 8))
    weight = jnp.asarray(rng.normal(size=(6,)))

    @jax.jit
    def run(kernel, drive):
        def loss(drive):
            solution = solve(dense_problem(kernel, drive))
            return jnp.sum(solution.value @ weight), solution

        (_, solution), slope = jax.value_and_grad(loss, has_aux=True)(drive)
        return solution.value, solution.iterations, solution.status, slope

    together = run(kernel, drive)
    wild = run(kernel, drive.at[1].set(jnp.nan).at[3].set(1e300))
    for i in (0, 2, 4):
        alone = run(kernel, drive[i : i + 1])
        for found in (together, wild):
            value, iterations, status, slope = (array[i] for array in found)
            np.testing.assert_allclose(value, alone[0][0], rtol=1e-12, atol=1e-14)
            np.testing.assert_allclose(slope, alone[3][0], rtol=1e-8, atol=1e-12)
            assert (iterations, status) == (alone[1][0], alone[2][0])
    assert wild[2][1] == Status.DIVERGED


def test_no_convergence_is_never_silent(rng):
    problem = dense_problem(*arrays_of(rng, (6, 8), (3, 8)))
    solution = solve(problem, solver=ss.Anderson(2, tol=1e-12))
    assert np.all(solution.status == Status.MAX_ITERS)
    growing = EquilibriumProblem(ss.Dense(jnp.eye(2)), jnp.ones((1, 2)))  # z = z + 1
    for solver in (ss.FixedPoint(100, tol=1e-2), ss.Anderson(100, tol=1e-2)):
        assert solve(growing, solver=solver).status[0] != Status.CONVERGED
    assert np.isinf(growing.certificate(jnp.ones((1, 2))))


def test_a_warm_start_takes_fewer_iterations(rng):
    kernel, drive = arrays_of(rng, (6, 8), (3, 8))
    first = solve(dense_problem(kernel, drive))
    near = dense_problem(kernel, drive + 1e-6)
    cold, warm = solve(near), solve(near, init=first.value, certify=True)
    assert np.all(warm.iterations < cold.iterations)
    np.testing.assert_allclose(warm.value, cold.value, atol=1e-8)
    assert np.all(warm.certificate < 1e-12)


def test_a_gap_stops_the_solve(rng):
    problem = dense_problem(*arrays_of(rng, (6, 8), (3, 8)))
    solution = solve(problem, solver=ss.FixedPoint(500, gap_tol=1e-6))
    assert np.all(solution.status == Status.CONVERGED)
    assert np.all(solution.certificate <= 1e-6)
    exact = problem.objective(solve(problem, solver=EXACT).value)
    assert np.all(problem.objective(solution.value) - exact <= solution.certificate)


def test_options_of_solve(rng):
    problem = dense_problem(*arrays_of(rng, (6, 8), (3, 8)))
    unrolled = solve(problem, derivative="unrolled")
    assert unrolled.residuals.shape == (30, 3)
    assert unrolled.status is None
    own = dataclasses.replace(EXACT, derivative=ss.Truncated(2))
    with pytest.raises(ValueError, match=r"derivative of equilibrium\.solve"):
        solve(problem, solver=own, derivative=ss.Truncated(3))
    with pytest.raises(ValueError, match=r"solver of equilibrium\.solve"):
        solve(problem, solver="anderson")
    single = dataclasses.replace(problem, drive=problem.drive.astype(jnp.bfloat16))
    assert solve(single).value.dtype == jnp.float64  # the map's
