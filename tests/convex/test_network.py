"""Networks as values: what programs encode, Flax and back, pruning, decomposition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import optimize

from stochsolvers import convex

N, D, P, C = 8, 3, 6, 2


@pytest.fixture
def X(rng):  # noqa: N802 - as in the formulas
    return rng.standard_normal((N, D))


@pytest.fixture
def patterns(X):
    return convex.sample_patterns(jax.random.key(3), X, P)


def relu(a):
    return np.maximum(a, 0)


def in_cones(rng, X, patterns, *batch):
    """Random values of the cone program: multiples of the gates, and of gates of neighbouring draws."""
    size = rng.uniform(0, 1, (*batch, 2, patterns.num, 1))
    return jnp.asarray(size * np.asarray(patterns.gates).T)


def test_a_network_is_its_formula(rng, X):
    W, b = rng.standard_normal((D, 5)), rng.standard_normal(5)
    for a, c in (
        (rng.standard_normal(5), 0.3),
        (rng.standard_normal((5, C)), rng.standard_normal(C)),
    ):
        network = convex.Network(W, a, b, c)
        expected = (relu(X @ W + b) @ a + c).T
        np.testing.assert_allclose(network(X), expected, rtol=1e-12)
        np.testing.assert_allclose(jax.jit(lambda network, X: network(X))(network, X), expected)
        y = rng.standard_normal(expected.shape)
        objective = 0.5 * np.sum((expected - y) ** 2)
        decay = 0.35 * (np.sum(W**2) + np.sum(b**2) + np.sum(a**2))
        np.testing.assert_allclose(network.objective(X, y, 0.7), objective + decay, rtol=1e-12)
        balanced = network.balanced()
        np.testing.assert_allclose(balanced(X), expected, rtol=1e-12)
        norms = np.linalg.norm(np.vstack([W, b]), axis=0) * np.linalg.norm(
            np.atleast_2d(a.T), axis=0
        )
        np.testing.assert_allclose(balanced.penalty(), norms.sum(), rtol=1e-12)


def test_a_gated_network_is_its_formula(rng, X):
    W, G = rng.standard_normal((2, D, 5))
    a, b, c, h = (rng.standard_normal(k) for k in (5, 5, (), 5))
    network = convex.GatedNetwork(W, a, b, c, gates=G, gate_bias=h)
    np.testing.assert_allclose(network(X), ((X @ G + h >= 0) * (X @ W + b)) @ a + c, rtol=1e-12)
    kept = network.take(np.array([1, 3]))
    expected = ((X @ G + h >= 0) * (X @ W + b))[:, [1, 3]] @ a[[1, 3]] + c
    np.testing.assert_allclose(kept(X), expected, rtol=1e-12)


def test_compact_leaves_dead_neurons_out():
    network = convex.Network(np.array([[1.0, 0, 2], [1, 0, 3]]), np.array([1.0, 2, 0]))
    assert network.compact().width == 1
    assert network.balanced().penalty() == pytest.approx(np.sqrt(2))


@pytest.mark.parametrize("batch", [(), (C,)])
def test_a_value_of_the_cone_program_is_a_network(rng, X, patterns, batch):
    y = rng.standard_normal((*batch, N))
    problem = convex.ReLUProblem(X, y, patterns, 0.3)
    U = in_cones(rng, X, patterns, *batch)
    network = convex.recover(problem, U)
    new = rng.standard_normal((5, D))
    np.testing.assert_allclose(network(X), problem.linear_map.adjoint(U), atol=1e-12)
    np.testing.assert_allclose(network(new), problem.predict(U, new), atol=1e-12)
    objective = jnp.sum(problem.objective(U))
    np.testing.assert_allclose(network.objective(X, y, 0.3), objective, rtol=1e-12)


@pytest.mark.parametrize("kind", ["one", "one-vs-rest", "joint"])
def test_a_value_of_the_gated_program_is_a_gated_network(rng, X, patterns, kind):
    y = rng.standard_normal(N if kind == "one" else (C, N))
    joint = kind == "joint"
    regularizer = "nuclear" if joint else "group"
    problem = convex.GatedProblem(X, y, patterns, 0.3, regularizer=regularizer, joint=joint)
    V = jnp.asarray(rng.standard_normal(problem.shape)).at[..., 1, :].set(0)
    network = convex.recover(problem, V)
    new = rng.standard_normal((5, D))
    np.testing.assert_allclose(network(new), problem.predict(V, new), atol=1e-12)
    objective = jnp.sum(problem.objective(V))
    np.testing.assert_allclose(network.objective(X, y, 0.3), objective, rtol=1e-12)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("outputs", [None, C])
def test_flax_modules_predict_what_networks_predict(rng, X, gated, outputs):
    W, G = rng.standard_normal((2, D, 5))
    a = rng.standard_normal(5 if outputs is None else (5, outputs))
    b, h = rng.standard_normal((2, 5))
    c = rng.standard_normal(() if outputs is None else outputs)
    gates = {"gates": G, "gate_bias": h} if gated else {}
    network = (convex.GatedNetwork if gated else convex.Network)(W, a, b, c, **gates)
    expected = np.reshape(network(X), (-1, N)).T
    module = convex.to_nnx(network)
    np.testing.assert_allclose(module(jnp.asarray(X)), expected, atol=1e-12)
    trained = nnx.state(module, nnx.Param)
    assert sum(p.size for p in jax.tree.leaves(trained)) == W.size + a.size + b.size + c.size
    linen, variables = convex.to_linen(network)
    np.testing.assert_allclose(linen.apply(variables, jnp.asarray(X)), expected, atol=1e-12)
    drawn = jax.eval_shape(linen.init, jax.random.key(0), jnp.asarray(X))
    assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, variables)
    if not gated:
        assert isinstance(module.hidden, nnx.Linear)
        assert isinstance(module.output, nnx.Linear)
        for trained in (module, variables, (linen, variables), network):
            again = convex.as_network(trained)
            np.testing.assert_array_equal(again(X), network(X))


def test_a_trained_flax_network_is_a_candidate(rng, X):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(D, 7, use_bias=False, rngs=rngs)
            self.output = nnx.Linear(7, 1, use_bias=False, rngs=rngs)

    module = Net(nnx.Rngs(1))
    value, patterns = convex.from_network(module, X)
    problem = convex.ReLUProblem(X, rng.standard_normal(N), patterns, 0.3)
    expected = module.output(nnx.relu(module.hidden(jnp.asarray(X))))[:, 0]
    np.testing.assert_allclose(problem.linear_map.adjoint(value), expected, rtol=1e-5, atol=1e-6)
    assert problem.violation(value) < 1e-6
    decay = convex.as_network(module).objective(X, problem.y, 0.3)
    assert problem.objective(value) <= decay + 1e-6


def test_candidates_with_biases_and_several_outputs(rng, X):
    network = convex.Network(
        rng.standard_normal((D, 6)), rng.standard_normal((6, C)), rng.standard_normal(6)
    )
    value, patterns = convex.from_network(network, X)
    ones = np.concatenate([X, np.ones((N, 1))], axis=1)
    problem = convex.ReLUProblem(ones, rng.standard_normal((C, N)), patterns, 0.3)
    np.testing.assert_allclose(problem.linear_map.adjoint(value), network(X), atol=1e-12)
    assert np.all(problem.violation(value) < 1e-12)


def test_prune_leaves_independent_neurons(rng, X):
    """Every neuron twice, in different sizes, and more neurons than data."""
    for a in (rng.standard_normal(20), rng.standard_normal((20, C))):
        W = rng.standard_normal((D, 20))
        network = convex.Network(np.tile(W, 2), np.concatenate([a, 0.3 * a]))
        pruned = convex.prune(network, X)
        np.testing.assert_allclose(pruned(X), network(X), atol=1e-10)
        assert pruned.penalty() <= network.balanced().penalty() + 1e-10
        rows = np.reshape(pruned.output, (pruned.width, -1))
        columns = np.einsum("nj,jc->ncj", relu(X @ pruned.hidden), rows)
        columns = columns.reshape(-1, pruned.width)
        assert np.linalg.matrix_rank(columns) == pruned.width <= N * rows.shape[1]


def test_prune_gated(rng, X):
    W, G = rng.standard_normal((2, D, 30))
    network = convex.GatedNetwork(W, rng.standard_normal(30), gates=G)
    pruned = convex.prune(network, X)
    np.testing.assert_allclose(pruned(X), network(X), atol=1e-10)
    assert pruned.width <= N


def test_decompose_predicts_the_same_at_a_bounded_cost(rng, X, patterns):
    for outputs in ((), (C,)):
        y = rng.standard_normal((*outputs, N))
        problem = convex.GatedProblem(X, y, patterns, 0.3)
        V = jnp.asarray(rng.standard_normal(problem.shape)).at[..., 1, :].set(0)
        found = convex.decompose(problem, V)
        np.testing.assert_allclose(found.network(X), problem.linear_map.adjoint(V), atol=1e-9)
        assert 0 <= found.cost <= found.cost_bound
        rise = found.network.objective(X, y, 0.3) - jnp.sum(problem.objective(V))
        assert rise == pytest.approx(found.cost, rel=1e-9)


def test_decompose_finds_the_cheapest_pair(rng, X, patterns):
    """Against SLSQP on ||b + v|| + ||b|| for the gate of one neuron."""
    problem = convex.GatedProblem(X, rng.standard_normal(N), patterns, 1.0)
    for i in range(3):
        v = rng.standard_normal(D)
        G = np.where(patterns.mask[:, i], 1.0, -1.0)[:, None] * X
        start = np.linalg.norm(v) * 50 * np.asarray(patterns.gates)[:, i]
        best = optimize.minimize(
            lambda b, v=v: np.linalg.norm(b + v) + np.linalg.norm(b),
            start,
            method="SLSQP",
            constraints={
                "type": "ineq",
                "fun": lambda b, G=G, v=v: np.concatenate([G @ b, G @ (b + v)]),
            },
            options={"maxiter": 500, "ftol": 1e-12},
        )
        V = jnp.zeros(problem.shape).at[i].set(v)
        cost = convex.decompose(problem, V, num_rounds=50).cost + np.linalg.norm(v)
        assert cost <= best.fun * (1 + 1e-5) + 1e-9
        assert cost >= np.linalg.norm(v) * (1 - 1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: convex.Network(np.ones((2, 3)), np.ones(2)), "output of Network"),
        (lambda: convex.Network(np.ones((2, 3)), np.ones(3), np.ones(2)), "hidden_bias"),
        (lambda: convex.Network(np.ones(3), np.ones(3)), "hidden of Network"),
        (lambda: convex.Network(np.ones((2, 3), int), np.ones(3)), "dtype"),
        (lambda: convex.GatedNetwork(np.ones((2, 3)), np.ones(3), gates=np.ones((3, 2))), "gates"),
        (lambda: convex.Network(np.ones((2, 3)), np.ones(3))(np.ones((4, 3))), "data of Network"),
        (lambda: convex.as_network(object()), "network"),
        (lambda: convex.to_nnx(3, 4), "problem"),
        (lambda: convex.from_network(convex.Network(np.ones((2, 3)), np.zeros(3)), np.eye(2)), "network"),
        (lambda: convex.from_network(convex.Network(np.eye(2), np.ones(2)), np.full((2, 2), np.nan)), "X"),
        (lambda: convex.prune(None, np.eye(2)), "network"),
        (lambda: convex.prune(convex.Network(np.ones((2, 1)), np.ones(1)), np.full((2, 2), np.nan)), "X"),
        (lambda: convex.separate(jax.random.key(0), np.full((2, 2), np.nan), np.ones(2)), "X"),
        (lambda: convex.separate(jax.random.key(0), np.eye(2), np.full(2, np.nan)), "dual point"),
        (lambda: convex.prune(convex.Network(np.ones((2, 1)), np.ones(1)), np.ones(2)), "X"),
    ],
)  # fmt: skip
def test_errors_say_what_was_expected(make, message):
    with pytest.raises(ValueError, match=f"{message}.*expected"):
        make()
