"""Someone trains a convex ReLU network on own data, gets the gap, the Flax network, the estimator.

Needs the extra `sklearn`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import stochsolvers as ss


def message(call):
    """What an error says."""
    try:
        call()
    except ValueError as error:
        return str(error)
    raise AssertionError("no error")


# own data, as numpy has them: float64, rows of examples
rng = np.random.default_rng(0)
X = rng.normal(size=(80, 3))
y = np.abs(X[:, 0]) - X[:, 1]
key = jax.random.key(0)

patterns = ss.convex.sample_patterns(key, X, 30)
problem = ss.convex.GatedProblem(X, y, patterns, beta=0.1)
solution = ss.convex.solve(problem, tol=1e-3)
V = solution.value
objective = float(problem.objective(V))
assert float(solution.certificate) <= 1e-3 * objective
# the objective, by hand: squares, and a norm for each neuron
on = np.asarray(X @ patterns.gates >= 0, np.float64)
predicted = np.einsum("np,np->n", on, X @ np.asarray(V, np.float64).T)
by_hand = 0.5 * np.sum((predicted - y) ** 2) + 0.1 * np.linalg.norm(V, axis=1).sum()
np.testing.assert_allclose(objective, by_hand, rtol=1e-3)
assert 0 < int(problem.num_active(V)) <= len(V)

# the network, in Flax: what the program predicts
network = ss.convex.to_nnx(problem, V)
np.testing.assert_allclose(
    network(jnp.asarray(X, jnp.float32))[:, 0], predicted, rtol=1e-3, atol=1e-3
)

# labels of classes are one-hot columns; a wrong layout says which it should be
labels = (y > 0).astype(int)
classes = ss.convex.GatedProblem(
    X, jax.nn.one_hot(labels, 2).T, patterns, 0.1, loss=ss.losses.CrossEntropy(), joint=True
)
scores = classes.predict(ss.convex.solve(classes, tol=1e-2).value, X)
assert float((scores.argmax(0) == labels).mean()) > 0.9
gated = ss.convex.GatedProblem
assert "(80,) or (C, 80)" in message(lambda: gated(X, y[:, None], patterns, 1.0))
assert "floating-point" in message(lambda: gated(X, labels, patterns, 1.0))
assert "sample_patterns" in message(lambda: gated(X, y, 30, 1.0))
assert "solution.value" in message(lambda: ss.convex.to_nnx(problem, solution))
assert "KernelADMM()" in message(lambda: ss.convex.solve(problem, solver="ADMM"))

# the estimator, within scikit-learn's own tools
model = ss.convex.ConvexReLURegressor(beta=0.1, num_gates=30, gated=True, random_state=0)
model.fit(X, y)
assert model.score(X, y) > 0.9
assert 0 <= model.gap_ < np.inf
scores = cross_val_score(make_pipeline(StandardScaler(), model), X, y, cv=2)
print(f"{model.n_active_} neurons, R² {model.score(X, y):.2f}, held out {scores.mean():.2f}")
