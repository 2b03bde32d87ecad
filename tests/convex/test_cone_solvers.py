"""Solvers of cone programs against each other, the network that they give, and plain training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize, nnls

import stochsolvers as ss
from stochsolvers import convex
from stochsolvers.convex import _cone_points


@pytest.fixture
def program(rng):
    X, y = rng.standard_normal((7, 2)), rng.standard_normal((2, 7))
    patterns = convex.enumerate_patterns(jnp.asarray(X))
    problem = convex.ReLUProblem(jnp.asarray(X), jnp.asarray(y), patterns, 0.2)
    return X, y, problem


def network_objective(X, y, U, beta):
    """Of neurons u/√||u|| with outputs ±√||u||, written out."""
    flat = np.concatenate([U[0], U[1]])
    signs = np.repeat([1.0, -1.0], len(U[0]))
    size = np.linalg.norm(flat, axis=1)
    used = size > 0
    W1, w2 = flat[used] / np.sqrt(size[used])[:, None], signs[used] * np.sqrt(size[used])
    residual = np.maximum(X @ W1.T, 0) @ w2 - y
    return 0.5 * residual @ residual + 0.5 * beta * (np.sum(W1**2) + w2 @ w2)


def trained(X, y, beta, rng, starts=8, width=12):
    """The least objective that L-BFGS reaches on the network."""
    d = X.shape[1]

    def objective(p):
        W, w = p[: d * width].reshape(width, d), p[d * width :]
        H = np.maximum(X @ W.T, 0)
        r = H @ w - y
        g = (np.outer(r, w) * (H > 0)).T @ X + beta * W
        return 0.5 * r @ r + 0.5 * beta * p @ p, np.append(g.ravel(), H.T @ r + beta * w)

    runs = [
        minimize(objective, rng.standard_normal(width * (d + 1)), jac=True, method="L-BFGS-B")
        for _ in range(starts)
    ]
    return min(run.fun for run in runs)


def test_interior_point_is_the_global_optimum_of_the_network(rng, program):
    X, y, problem = program
    solution = convex.solve(problem, solver=convex.InteriorPoint(500), tol=1e-8)
    assert np.all(solution.status == ss.solvers.Status.CONVERGED)
    assert np.all(solution.certificate <= 1.01e-8 * solution.objectives[-1])
    for U, row, value in zip(np.asarray(solution.value), y, solution.objectives[-1], strict=True):
        np.testing.assert_allclose(network_objective(X, row, U, 0.2), value, rtol=1e-6)
        assert trained(X, row, 0.2, rng) >= value * (1 - 2e-8)


def test_cone_admm_agrees_and_certifies(program):
    _, _, problem = program
    exact = convex.solve(problem, solver=convex.InteriorPoint(500), tol=1e-9)
    for tol in (1e-2, 1e-4):
        solution = convex.solve(problem, solver=convex.ConeADMM(), tol=tol)
        assert np.all(solution.status == ss.solvers.Status.CONVERGED)
        np.testing.assert_allclose(
            problem.objective(solution.value), solution.objectives[-1], rtol=1e-9
        )
        excess = solution.objectives[-1] - exact.objectives[-1]
        assert np.all(excess <= solution.certificate + 1e-9)
        assert np.all(excess >= -1e-8)
        assert np.all(solution.certificate <= 1.01 * tol * solution.objectives[-1])
        assert np.all(problem.violation(solution.value) <= 1e-12)


def test_cone_admm_reaches_a_small_gap_within_its_cap(rng):
    X, gates = rng.standard_normal((60, 5)), rng.standard_normal((5, 15))
    patterns = convex.Patterns(jnp.asarray(gates), jnp.asarray(X @ gates >= 0))
    y = jnp.asarray(rng.standard_normal((2, 60)))
    problem = convex.ReLUProblem(jnp.asarray(X), y, patterns, 0.4)
    solution = convex.solve(problem, solver=convex.ConeADMM(1500), tol=1e-4)
    exact = convex.solve(problem, solver=convex.InteriorPoint(500), tol=1e-8)
    best = exact.objectives[-1]
    assert np.all(solution.status == ss.solvers.Status.CONVERGED)
    assert np.all(solution.certificate <= 1.01e-4 * solution.objectives[-1])
    assert np.all(solution.objectives[-1] - solution.certificate <= best * (1 + 1e-9))
    assert np.all(solution.objectives[-1] >= best * (1 - 1e-8))
    assert np.all(problem.violation(solution.value) <= 1e-12)


def test_projection_in_the_metric_of_the_data(rng):
    X = np.concatenate([rng.standard_normal((9, 3)), np.zeros((9, 1))], axis=1)
    X[:, 3] = X[:, 0] - X[:, 1]  # of rank 3
    gates = rng.standard_normal((4, 5))
    patterns = convex.Patterns(jnp.asarray(gates), jnp.asarray(X @ gates >= 0))
    problem = convex.ReLUProblem(jnp.asarray(X), jnp.arange(9.0), patterns, 0.2)
    inside = _cone_points.Inside.of(problem, problem.X.T @ problem.X)
    Z = jnp.asarray(rng.standard_normal((2, 5, 4)))
    U = np.asarray(_cone_points.projected(inside, Z, Z @ problem.X.T, 20_000))
    Q = np.linalg.svd(X, full_matrices=False)[0][:, :3]
    for i, sign in enumerate(np.where(X @ gates >= 0, 1.0, -1.0).T):
        for z, u in zip(Z[:, i], U[:, i], strict=True):
            a, _ = nnls((sign[:, None] * Q).T, -Q.T @ (X @ z))
            np.testing.assert_allclose(X @ u, X @ z + Q @ (Q.T @ (sign * a)), atol=1e-10)
    moved, u, objective = _cone_points.feasible(problem, inside, Z, Z @ problem.X.T)
    np.testing.assert_allclose(problem.objective(moved), objective, rtol=1e-12)
    np.testing.assert_allclose(problem.linear_map.adjoint(moved), u, atol=1e-10)


def test_a_single_program_and_a_warm_start(program):
    X, y, problem = program
    single = convex.ReLUProblem(jnp.asarray(X), jnp.asarray(y[0]), problem.patterns, 0.2)
    exact = convex.solve(single, solver=convex.InteriorPoint(500), tol=1e-9)
    for solver in (convex.ConeADMM(), convex.InteriorPoint()):
        first = convex.solve(single, solver=solver, tol=1e-3)
        again = convex.solve(single, solver=solver, init=exact.value, tol=1e-3)
        assert first.value.shape == exact.value.shape == (2, problem.patterns.num, 2)
        assert again.objectives[-1] <= exact.objectives[-1] * (1 + 1e-9)
    outside = convex.solve(single, solver=solver, init=-100 * exact.value, tol=1e-3)
    np.testing.assert_allclose(outside.objectives, first.objectives, rtol=1e-9)


def test_what_it_cannot_solve_is_refused(program):
    X, y, problem = program
    signs = jnp.sign(jnp.asarray(y))
    logistic = convex.ReLUProblem(
        jnp.asarray(X), signs, problem.patterns, 0.2, loss=ss.losses.Logistic()
    )
    border = convex.Patterns(jnp.zeros((2, 1)), jnp.ones((7, 1), bool))
    edge = convex.ReLUProblem(jnp.asarray(X), jnp.asarray(y), border, 0.2)
    for wrong, call in {
        "loss of ConeADMM": lambda: convex.solve(logistic, solver=convex.ConeADMM()),
        "problem of InteriorPoint": lambda: jax.jit(
            lambda problem: convex.solve(problem, solver=convex.InteriorPoint())
        )(logistic),
        "problem of KernelADMM": lambda: convex.solve(problem, solver=convex.KernelADMM()),
        "gates of InteriorPoint": lambda: convex.solve(edge, solver=convex.InteriorPoint()),
    }.items():
        with pytest.raises(ValueError, match=wrong):
            call()
