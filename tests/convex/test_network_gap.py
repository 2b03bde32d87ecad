"""How far networks are from optimal: exact, bounded and searched, against enumeration in plain numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

import stochsolvers as ss
from stochsolvers import convex

N, D, M, C = 8, 2, 5, 3
METHODS = ("search", "enumerate", "bound")


def largest_response(X, theta, num=200_001):
    """max |θᵀ(X u)₊| over the unit circle, by a fine grid."""
    angle = np.linspace(0, 2 * np.pi, num)
    units = np.stack([np.cos(angle), np.sin(angle)])
    return np.linalg.norm(np.atleast_2d(theta) @ np.maximum(X @ units, 0), axis=0).max()


def draw(rng, outputs=None, *, bias=False):
    X = rng.standard_normal((N, D))
    shape = M if outputs is None else (M, outputs)
    W, a = 0.4 * rng.standard_normal((D, M)), 0.4 * rng.standard_normal(shape)
    b = 0.4 * rng.standard_normal(M) if bias else None
    c = 0.1 * rng.standard_normal(shape[1:] if outputs else ()) if bias else None
    return X, convex.Network(W, a, b, c)


LOSSES = {
    "squares": ss.losses.Squares(),
    "logistic": ss.losses.Logistic(),
    "huber": 2 * ss.losses.Huber(0.5),
}


@pytest.mark.parametrize("name", LOSSES)
def test_search_is_below_enumeration_and_the_bound_above(rng, name):
    loss = LOSSES[name]
    for case in range(16):
        X, network = draw(rng, bias=case % 2 == 1)
        y = np.sign(rng.standard_normal(N))
        found = [convex.network_gap(network, X, y, 0.3, loss=loss, method=m) for m in METHODS]
        assert found[0].response <= found[1].response <= found[2].response
        assert found[0].gap <= found[1].gap <= found[2].gap
        assert [f.word for f in found] == ["searched", "exact", "bound"]
        objective = float(network.objective(X, y, 0.3, loss=loss))
        assert objective <= found[1].objective <= objective * (1 + 1e-10)
        if case < 6 and network.hidden_bias is None:
            theta = np.asarray(loss.derivative(network(X), jnp.asarray(y)))
            grid = largest_response(X, theta)
            assert grid * (1 - 1e-12) <= found[1].response <= grid * (1 + 1e-5)


def test_the_lower_bound_is_the_fenchel_dual(rng):
    """For squares: max over t of t <Θ, y − c> − ½ t² ||Θ||², t ≤ β/M."""
    X, network = draw(rng, bias=True)
    y = rng.standard_normal(N)
    ones = np.concatenate([X, np.ones((N, 1))], axis=1)
    theta = np.asarray(y - network(X))
    found = convex.network_gap(network, X, y, 0.3)
    units = rng.standard_normal((3, 100_000))
    units /= np.linalg.norm(units, axis=0)
    sampled = np.abs(theta @ np.maximum(ones @ units, 0)).max()
    assert sampled <= found.response <= 1.01 * sampled
    target = y - float(network.output_bias)
    t = min(target @ theta / (theta @ theta), 0.3 / found.response)
    expected = t * target @ theta - 0.5 * t**2 * theta @ theta
    assert found.lower_bound == pytest.approx(expected, rel=1e-9)
    assert found.lower_bound <= expected


def test_several_outputs(rng):
    loss = ss.losses.CrossEntropy()
    for _ in range(10):
        X, network = draw(rng, C)
        y = np.eye(C)[rng.integers(0, C, N)].T
        found = [convex.network_gap(network, X, y, 0.3, loss=loss, method=m) for m in METHODS]
        theta = np.asarray(loss.derivative(network(X), jnp.asarray(y)))
        grid = largest_response(X, theta, 20_001)
        assert grid <= found[1].response * (1 + 1e-12)
        assert grid <= found[2].response * (1 + 1e-12)
        assert found[0].response <= found[1].response
        assert found[0].response == pytest.approx(grid, rel=1e-3)
        assert found[0].gap <= found[1].gap
        assert found[1].word == found[2].word == "bound"


def test_the_bound_holds_for_data_of_any_kind(rng):
    """Wide, duplicated, zero and one-signed data, against ascent."""
    for n, d in ((12, 2), (4, 30), (40, 10)):
        X = rng.standard_normal((n, d))
        X[1], X[2] = 0, X[0]
        network = convex.Network(rng.standard_normal((d, M)), rng.standard_normal(M))
        for data in (X, np.abs(X), 1e4 * X):
            y = rng.standard_normal(n)
            lower, upper = (
                convex.network_gap(network, data, y, 1.0, method=m, num_starts=64)
                for m in ("search", "bound")
            )
            assert lower.response <= upper.response <= 5 * lower.response


def test_a_zero_network_is_optimal_from_beta_max_on(rng):
    X, y = rng.standard_normal((N, D)), rng.standard_normal(N)
    zero = convex.Network(np.zeros((D, 1)), np.zeros(1))
    largest = largest_response(X, y)
    assert convex.network_gap(zero, X, y, 1.001 * largest).relative < 1e-12
    assert convex.network_gap(zero, X, y, 0.9 * largest).relative > 1e-3


def test_better_dual_points_prove_the_optimum():
    """A network whose predictions are off by 1% of the optimum: its gap falls to what its objective lacks."""
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((N, D)), rng.standard_normal(N)
    beta = 0.1 * largest_response(X, y, 2001)
    problem = convex.ReLUProblem(X, y, convex.enumerate_patterns(X), beta)
    U = convex.solve(problem, solver=convex.InteriorPoint(), tol=1e-9, certify=False).value
    network = convex.recover(problem, U)
    least = float(problem.objective(U))
    off = dataclasses.replace(network, hidden=1.01 * network.hidden)
    gaps = [convex.network_gap(off, X, y, beta, num_rounds=k) for k in (0, 1, 8)]
    lacks = gaps[0].objective - least
    assert all(lacks * (1 - 1e-6) <= gap.gap for gap in gaps)
    assert gaps[0].gap >= gaps[1].gap >= gaps[2].gap
    assert gaps[2].gap - lacks < 1e-3 * least
    assert gaps[0].gap - lacks > 2e-3 * least


@pytest.mark.parametrize("seed", range(5))
def test_no_descent_goes_below_the_proved_optimum(seed):
    """All patterns of 8 data: program and network have one optimum, and 50 starts of L-BFGS stay above."""
    rng = np.random.default_rng(seed)
    X, y = rng.standard_normal((N, D)), rng.standard_normal(N)
    beta = 0.1 * largest_response(X, y, 2001)
    problem = convex.ReLUProblem(X, y, convex.enumerate_patterns(X), beta)
    U = convex.solve(problem, solver=convex.InteriorPoint(), tol=1e-9, certify=False).value
    network = convex.recover(problem, U)
    proof = convex.network_gap(network, X, y, beta)
    assert proof.word == "exact"
    assert proof.relative < 1e-6
    assert proof.objective == pytest.approx(float(problem.objective(U)), rel=1e-9)
    assert convex.prune(network, X).width <= N + 1

    def objective(point, m=12):
        W, a = point[: D * m].reshape(D, m), point[D * m :]
        hidden = np.maximum(X @ W, 0)
        r = hidden @ a - y
        slope = X.T @ (np.outer(r, a) * (hidden > 0))
        gradient = np.concatenate([slope.ravel(), hidden.T @ r]) + beta * point
        return 0.5 * r @ r + 0.5 * beta * point @ point, gradient

    least = min(
        optimize.minimize(
            objective, rng.standard_normal(12 * (D + 1)), jac=True, method="L-BFGS-B"
        ).fun
        for _ in range(50)
    )
    assert least >= proof.lower_bound
    assert least >= proof.objective * (1 - 1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 0.0}, "beta"),
        ({"method": "guess"}, "method"),
        ({"X": np.full((N, D), np.nan)}, "X"),
        ({"y": np.full(N, np.inf)}, "y"),
        ({"y": np.zeros(N - 1)}, "shape of y"),
        ({"X": np.zeros((N, D + 1))}, "shape of X"),
        ({"network": 3}, "network"),
        ({"beta": np.inf}, "beta"),
        ({"beta": np.ones(2)}, "beta"),
        ({"y": np.zeros(N), "loss": ss.losses.Logistic()}, "y"),
        ({"loss": ss.losses.CrossEntropy()}, "y"),
        ({"loss": "squares"}, "loss"),
    ],
)
def test_errors_say_what_was_expected(rng, change, message):
    X, network = draw(rng)
    arguments = {"network": network, "X": X, "y": np.ones(N), "beta": 0.1} | change
    options = {name: arguments.pop(name) for name in ("method", "loss") if name in arguments}
    with pytest.raises(ValueError, match=f"{message}.*expected"):
        convex.network_gap(*arguments.values(), **options)


def test_separate_returns_violating_gates(rng):
    X, v = rng.standard_normal((40, 3)), rng.standard_normal(40)
    key = jax.random.key(0)
    found = convex.separate(key, X, v, num_starts=64)
    units = np.asarray(found.gates)
    values = np.abs(v @ np.maximum(X @ units, 0))
    assert np.all(np.diff(values) <= 1e-12)
    np.testing.assert_allclose(np.linalg.norm(units, axis=0), 1, rtol=1e-12)
    np.testing.assert_array_equal(found.mask, X @ units >= 0)
    assert len(np.unique(found.mask, axis=1).T) == found.num
    every = convex.enumerate_patterns(X)
    assert values[0] <= np.linalg.norm(X.T @ (every.mask * v[:, None]), axis=0).max()
    fewer = convex.separate(key, X, v, threshold=0.7 * values[0], num_starts=64, max_gates=2)
    assert fewer.num <= 2
    assert np.all(np.abs(v @ np.maximum(X @ fewer.gates, 0)) > 0.7 * values[0])
    others = convex.separate(key, X, v, fewer, num_starts=64)
    assert others.num == found.num - fewer.num
    assert convex.separate(key, X, v, threshold=2 * values[0], num_starts=64) is None
