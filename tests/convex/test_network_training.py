"""Training from the gated program, with separation, against plain descent from random starts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

import stochsolvers as ss
from stochsolvers import convex

N, D, M = 60, 4, 30
OPTIONS = {"width": M, "num_gates": 40, "num_starts": 64, "num_iters": 400}


def instance(seed=0):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((N, D)) / 2
    teacher = np.maximum(X @ rng.standard_normal((D, 6)), 0) @ rng.standard_normal(6)
    y = teacher / teacher.std() + 0.1 * rng.standard_normal(N)
    return rng, X, y


def best_of_random_starts(rng, X, y, beta, starts):
    """L-BFGS of scipy on the network, in plain numpy."""

    def objective(point):
        W, a = point[: D * M].reshape(D, M), point[D * M :]
        hidden = np.maximum(X @ W, 0)
        r = hidden @ a - y
        slope = X.T @ (np.outer(r, a) * (hidden > 0))
        gradient = np.concatenate([slope.ravel(), hidden.T @ r]) + beta * point
        return 0.5 * r @ r + 0.5 * beta * point @ point, gradient

    options = {"maxiter": 2000, "maxfun": 4000}
    draws = 0.3 * rng.standard_normal((starts, M * (D + 1)))
    found = (
        optimize.minimize(objective, point, jac=True, method="L-BFGS-B", options=options)
        for point in draws
    )
    return min(result.fun for result in found)


def test_training_is_below_random_starts():
    rng, X, y = instance()
    beta = 0.2
    trained = convex.train_network(jax.random.key(0), X, y, beta, tol=1e-4, **OPTIONS)
    least = best_of_random_starts(rng, X, y, beta, 8)
    assert trained.gap.objective <= least * (1 + 1e-3)
    network = trained.network
    assert network.width <= M
    assert float(network.objective(X, y, beta)) == pytest.approx(trained.gap.objective, rel=1e-9)
    assert trained.gap.objective == pytest.approx(trained.objectives.min())
    assert len(trained.objectives) == len(trained.gaps) == len(trained.widths)
    assert trained.gap.word == "searched"
    bound = convex.network_gap(network, X, y, beta, method="bound")
    searched = convex.network_gap(network, X, y, beta, method="search", num_starts=64, num_rounds=4)
    assert 0 <= bound.lower_bound <= searched.lower_bound <= least
    assert searched.relative < 0.02
    assert trained.gap.relative < 0.05

    again = convex.train_network(
        jax.random.key(1), X, y, beta, init=network, num_rounds=1, **OPTIONS
    )
    assert again.gap.objective <= trained.gap.objective * (1 + 1e-9)


def test_training_with_hidden_biases():
    _, X, y = instance()
    network = convex.train_network(
        jax.random.key(0), X, y, 0.2, hidden_bias=True, num_rounds=2, **OPTIONS
    )
    assert network.network.hidden_bias is not None
    objective = float(network.network.objective(X, y, 0.2))
    assert objective == pytest.approx(network.gap.objective, rel=1e-9)
    assert 0 <= network.gap.relative < 0.1


def test_training_of_several_outputs():
    _, X, y = instance()
    labels = np.digitize(y, [-0.5, 0.5])
    one_hot = np.eye(3)[labels].T
    loss = ss.losses.CrossEntropy()
    trained = convex.train_network(
        jax.random.key(0), X, one_hot, 0.1, loss=loss, num_rounds=3, **OPTIONS
    )
    assert trained.network.output.shape[1] == 3
    assert np.mean(np.argmax(trained.network(X), axis=0) == labels) > 0.9
    assert trained.gap.relative < 0.2
    value = trained.network(X)
    plain = loss.value(value, jnp.asarray(one_hot)).sum() + 0.1 * trained.network.penalty()
    assert float(plain) == pytest.approx(trained.gap.objective, rel=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": -1.0}, "beta"),
        ({"width": 0}, "width"),
        ({"X": np.full((N, D), np.nan)}, "X"),
        ({"y": np.zeros(N - 1)}, "shape"),
        ({"init": convex.Network(np.ones((D, 1)), np.ones(1), np.ones(1))}, "init"),
    ],
)
def test_errors_say_what_was_expected(change, message):
    _, X, y = instance()
    arguments = {"X": X, "y": y, "beta": 0.1} | change
    with pytest.raises(ValueError, match=f"{message}.*expected"):
        convex.train_network(jax.random.key(0), **arguments)
