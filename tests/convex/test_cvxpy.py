"""Every program against cvxpy on random instances: optimal value, and certificates at its solution."""

import convex_oracles as oracles
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stochsolvers as ss
from stochsolvers.convex import (
    GatedProblem,
    ReLUProblem,
    ThreeLayerProblem,
    enumerate_patterns,
    sample_patterns,
    solve,
)

cp = pytest.importorskip("cvxpy")
BETA, N, D, C = 0.4, 12, 3, 3


@jax.jit
def values(problem, V):
    """Objective, lower bound and certificate."""
    return jnp.stack([problem.objective(V), problem.dual_value(V), problem.certificate(V)])


def fit_of(loss, u, y):
    """The loss of predictions u, a vector, or a list of one for each output."""
    if isinstance(loss, ss.losses.Logistic):
        return cp.sum(cp.logistic(cp.multiply(-y, u)))
    if isinstance(loss, ss.losses.CrossEntropy):
        return cp.sum(cp.log_sum_exp(cp.vstack(u), axis=0)) - sum(
            map(cp.sum, map(cp.multiply, y, u))
        )
    if isinstance(loss, ss.losses.Huber):
        return cp.sum(cp.huber(u - y, loss.delta)) / 2
    return cp.sum_squares(cp.hstack(u) - np.ravel(y)) / 2


def penalty_of(kind, V):
    """R of a list of P × d weights, one for each output."""
    P, d = V[0].shape
    stacked = [cp.vstack([v[i] for v in V]) for i in range(P)]
    if kind == "group":
        return sum(cp.norm(m, "fro") for m in stacked)
    if kind == "feature":
        return sum(cp.norm(cp.vstack([v[:, k] for v in V]), "fro") for k in range(d))
    if kind == "nuclear":
        return sum(cp.norm(m, "nuc") for m in stacked)
    if kind == "l2":
        return sum(cp.sum_squares(v) for v in V) / 2
    return sum(cp.sum(cp.abs(v)) for v in V)


CASES = {  # regulariser, loss, joint
    "group": ("group", ss.losses.Squares(), False),
    "feature": ("feature", ss.losses.Squares(), False),
    "l1": ("l1", ss.losses.Squares(), False),
    "l2": ("l2", ss.losses.Squares(), False),
    "huber": ("group", ss.losses.Huber(0.5), False),
    "logistic": ("group", ss.losses.Logistic(), False),
    "joint group": ("group", ss.losses.Squares(), True),
    "joint nuclear": ("nuclear", ss.losses.Squares(), True),
    "cross-entropy group": ("group", ss.losses.CrossEntropy(), True),
    "cross-entropy nuclear": ("nuclear", ss.losses.CrossEntropy(), True),
}


@pytest.mark.parametrize("case", CASES)
def test_gated_programs(rng, case):
    kind, loss, joint = CASES[case]
    X, y = rng.normal(size=(N, D)), rng.normal(size=(C, N) if joint else N)
    if isinstance(loss, ss.losses.Logistic):
        y = np.sign(y)
    if isinstance(loss, ss.losses.CrossEntropy):
        y = np.eye(C)[:, np.arange(N) % C]
    patterns = sample_patterns(jax.random.key(0), X, 5)
    masks = np.asarray(patterns.mask, float).T
    V = [cp.Variable((patterns.num, D)) for _ in range(C if joint else 1)]
    u = [sum(cp.multiply(m, X @ v[i]) for i, m in enumerate(masks)) for v in V]
    objective = fit_of(loss, u if joint else u[0], y) + BETA * penalty_of(kind, V)
    optimum = cp.Problem(cp.Minimize(objective)).solve(solver=cp.CLARABEL)
    problem = GatedProblem(X, y, patterns, BETA, loss=loss, regularizer=kind, joint=joint)
    point = np.stack([v.value for v in V]) if joint else V[0].value
    check(problem, point, optimum)


def check(problem, point, optimum):
    value, bound, gap = values(problem, point)
    np.testing.assert_allclose(value, optimum, rtol=1e-6)
    np.testing.assert_allclose(bound, optimum, rtol=1e-3)
    assert bound <= optimum * (1 + 1e-6)
    assert value - optimum - 1e-6 * optimum <= gap <= 1e-3 * optimum


@pytest.mark.parametrize("loss", [ss.losses.Squares(), ss.losses.Logistic()])
@pytest.mark.parametrize("patches", [False, True])
def test_relu_programs(rng, loss, patches):
    X = rng.normal(size=(4, 2, 2) if patches else (7, 3))
    y = rng.normal(size=len(X))
    y = np.sign(y) if isinstance(loss, ss.losses.Logistic) else y
    patterns = enumerate_patterns(X)
    blocks, cones = oracles.relu_blocks(X, patterns.mask)
    optimum, U = cone_program(blocks, cones, loss, y)
    problem = ReLUProblem(X, y, patterns, BETA, loss=loss)
    check(problem, problem.project(U), optimum)


def cone_program(blocks, cones, loss, y):
    U = [[cp.Variable(blocks[0].shape[1]) for _ in blocks] for _ in range(2)]
    u = sum(A @ (v - w) for A, v, w in zip(blocks, *U, strict=True))
    size = sum(cp.norm(v) for part in U for v in part)
    inside = [G @ v >= 0 for part in U for G, v in zip(cones, part, strict=True)]
    objective = fit_of(loss, u, y) + BETA * size
    optimum = cp.Problem(cp.Minimize(objective), inside).solve(solver=cp.CLARABEL)
    return optimum, np.array([[v.value for v in part] for part in U])


@pytest.mark.parametrize("loss", [ss.losses.Squares(), ss.losses.Logistic()])
def test_three_layer_programs(rng, loss):
    X, y = rng.normal(size=(3, 2)), rng.normal(size=3)
    y = np.sign(y) if isinstance(loss, ss.losses.Logistic) else y
    problem = ThreeLayerProblem(X, y, enumerate_patterns(X), BETA, loss=loss)
    blocks, cones = np.asarray(problem.base_map.kernel), np.asarray(problem.cones.matrices)
    optimum, U = cone_program(list(blocks), list(cones), problem.loss, y)
    check(problem, problem.project(U), optimum)
    solution = solve(problem, tol=1e-7)
    assert solution.status == ss.Status.CONVERGED
    found = solution.objectives[-1]
    np.testing.assert_allclose(found, optimum, rtol=2e-7)
    np.testing.assert_allclose(problem.objective(solution.value), found, rtol=1e-12)
    assert 0 <= solution.certificate <= 1e-5 * found
