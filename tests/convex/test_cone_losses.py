"""Cone programs with other losses, patches and joint outputs, and the solver that is chosen for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

import stochsolvers as ss
from stochsolvers import convex
from stochsolvers.convex import _interior_point, _solve
from stochsolvers.solvers import Status

N, D, BETA = 9, 2, 0.2


def draw(rng, patches=None):
    X = rng.standard_normal((N, D) if patches is None else (N, patches, D))
    return X, convex.sample_patterns(jax.random.key(0), X, 5)


def least_by_slsqp(X, mask, value, outputs=1):
    """min Σ ℓ + β Σ ||u|| on the cones by SLSQP over U and the bounds of its norms, of dense matrices."""
    X, mask = np.asarray(X), np.asarray(mask, float)
    X, mask = X.reshape(N, -1, D), mask.reshape(N, -1, mask.shape[-1])
    A = np.einsum("nkd,nkp->npd", X, mask)
    G = (2 * mask - 1).transpose(2, 0, 1)[..., None] * X[None]
    P = len(G)
    shape, num = (2, outputs, P, D), 2 * outputs * P

    def split(z):
        return z[num:].reshape(shape), z[:num]

    def objective(z):
        U, bounds = split(z)
        r, slope = value(np.einsum("npd,cpd->cn", A, U[0] - U[1]))
        pulled = np.einsum("npd,cn->cpd", A, slope)
        return r + BETA * bounds.sum(), np.r_[
            np.full(num, BETA), np.stack([pulled, -pulled]).ravel()
        ]

    def inside(z):
        U, bounds = split(z)
        return np.r_[
            np.einsum("pnkd,scpd->scpnk", G, U).ravel(),
            bounds - np.linalg.norm(U + 1e-9, axis=-1).ravel(),
        ]

    begin = np.r_[np.ones(num), 1e-2 * rng_gates(G, shape).ravel()]
    end = minimize(
        objective, begin, jac=True, method="SLSQP", constraints={"type": "ineq", "fun": inside},
        options={"maxiter": 500, "ftol": 1e-13},
    )  # fmt: skip
    return end.fun


def rng_gates(G, shape):
    """Directions inside the cones."""
    found = [
        np.linalg.lstsq(g.reshape(-1, D), np.ones(g.reshape(-1, D).shape[0]), rcond=None)[0]
        for g in G
    ]
    return np.broadcast_to(np.array(found), shape)


def logistic(y):
    return lambda u: (np.logaddexp(0, -y * u).sum(), -y / (1 + np.exp(y * u)))


def squares(y):
    return lambda u: (0.5 * ((u - y) ** 2).sum(), u - y)


def cross_entropy(y):
    def value(u):
        weights = np.exp(u - u.max(0))
        p = weights / weights.sum(0)
        return -(y * np.log(p)).sum(), p - y

    return value


def huber(y):
    def value(u):
        t, c = u - y, np.clip(u - y, -0.5, 0.5)
        return (c * t - 0.5 * c**2).sum(), c

    return value


CASES = {
    "squares": (ss.losses.Squares(), squares, None),
    "logistic": (ss.losses.Logistic(), logistic, None),
    "huber": (ss.losses.Huber(0.5), huber, None),
    "patches": (ss.losses.Squares(), squares, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_small_programs_are_solved_by_the_interior_point(rng, case):
    loss, oracle, patches = CASES[case]
    X, patterns = draw(rng, patches)
    y = np.sign(rng.standard_normal(N))
    problem = convex.ReLUProblem(X, y, patterns, BETA, loss=loss)
    solution = convex.solve(problem, tol=1e-8)
    value = float(problem.objective(solution.value))
    assert solution.status == Status.CONVERGED
    assert 0 <= solution.certificate <= 1.01e-8 * value
    np.testing.assert_allclose(value, least_by_slsqp(X, patterns.mask, oracle(y)), rtol=1e-6)


def test_fista_agrees(rng):
    X, patterns = draw(rng)
    y = jnp.asarray(np.sign(rng.standard_normal((2, N))))
    problem = convex.ReLUProblem(X, y, patterns, BETA, loss=ss.losses.Logistic())
    exact = convex.solve(problem, tol=1e-8)
    solution = convex.solve(problem, solver=convex.FISTA(2000), tol=1e-4)
    assert np.all(solution.status == Status.CONVERGED)
    excess = solution.objectives[-1] - exact.objectives[-1]
    assert np.all(excess >= -1e-8)
    assert np.all(excess <= solution.certificate)
    assert np.all(solution.certificate <= 3e-4 * solution.objectives[-1])


def test_classes_share_one_program(rng):
    X, patterns = draw(rng)
    y = np.eye(3)[rng.integers(0, 3, N)].T
    loss = ss.losses.CrossEntropy()
    problem = convex.ReLUProblem(X, y, patterns, BETA, loss=loss, joint=True)
    assert problem.shape == (2, 3, patterns.num, D)
    solution = convex.solve(problem, tol=1e-5)
    value = float(problem.objective(solution.value))
    assert solution.status == Status.CONVERGED
    least = least_by_slsqp(X, patterns.mask, cross_entropy(y), outputs=3)
    assert -1e-6 <= value / least - 1 <= 2e-5
    assert value - least <= solution.certificate <= 1e-4 * value
    network = convex.recover(problem, solution.value)
    np.testing.assert_allclose(network(X), problem.predict(solution.value, X), atol=1e-9)
    np.testing.assert_allclose(network.objective(X, y, BETA, loss=loss), value, rtol=1e-9)
    assert problem.num_active(solution.value) == len(network.active())
    assert problem.beta_max().shape == problem.violation(solution.value).shape == ()
    zero = problem.with_beta(1.001 * problem.beta_max())
    assert not np.any(convex.solve(zero, tol=1e-4).value)


def test_the_default_solver(rng, monkeypatch):
    X, patterns = draw(rng)
    y = np.sign(rng.standard_normal(N))
    problem = convex.ReLUProblem(X, y, patterns, BETA)
    edge = convex.Patterns(jnp.zeros((D, 1)), jnp.ones((N, 1), bool))
    on_edge = convex.ReLUProblem(X, y, edge, BETA)
    other = convex.ReLUProblem(X, y, patterns, BETA, loss=ss.losses.Huber())

    def chosen(problem):
        return type(_solve._default(problem, None, 1e-4)).__name__

    assert chosen(problem) == chosen(other) == "InteriorPoint"
    assert chosen(on_edge) == "ConeADMM"
    assert _interior_point.least_margin(problem) > 0 == _interior_point.least_margin(on_edge)
    monkeypatch.setattr(_solve, "_FEW_PRODUCTS", 0)
    assert (chosen(problem), chosen(other)) == ("ConeADMM", "FISTA")


def test_what_cannot_be_solved_is_refused(rng):
    X, patterns = draw(rng)
    y = np.eye(3)[rng.integers(0, 3, N)].T
    loss = ss.losses.CrossEntropy()
    joint = convex.ReLUProblem(X, y, patterns, BETA, loss=loss, joint=True)
    for wrong, call in {
        "joint: expected True": lambda: convex.ReLUProblem(X, y, patterns, BETA, loss=loss),
        "problem of InteriorPoint": lambda: convex.solve(joint, solver=convex.InteriorPoint()),
        "loss of ConeADMM": lambda: convex.solve(joint, solver=convex.ConeADMM()),
    }.items():
        with pytest.raises(ValueError, match=wrong):
            call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, key: convex.solve(p, tol="x"), "tol: expected a number >= 0, got 'x'."),
        (
            lambda p, key: convex.FISTA("x"),
            "max_iters: expected an integer in 0..2147483647, got 'x' of type str.",
        ),
        (lambda p, key: convex.regularization_path(3, [1.0]), "problem of regularization_path"),
        (lambda p, key: convex.train_network(key, p.X, p.y, 1.0, tol=-1.0), "tol: expected"),
        (lambda p, key: convex.train_network(key, p.X, p.y, "1"), "beta: expected a number > 0"),
        (lambda p, key: convex.ThreeLayerProblem(p.X, p.y, p.patterns.mask, 1.0), "patterns of"),
        (
            lambda p, key: jax.jit(lambda X: convex.sample_patterns(key, X, 5).mask)(p.X),
            "data of sample_patterns: expected known numbers, got a traced array.",
        ),
    ],
)
def test_bad_arguments_are_refused_in_one_wording(rng, call, message):
    X, patterns = draw(rng)
    problem = convex.ReLUProblem(X, np.sign(rng.standard_normal(N)), patterns, BETA)
    with pytest.raises(ValueError, match=f"(?s)^{message}"):
        call(problem, jax.random.key(0))
