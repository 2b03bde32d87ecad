"""The map of gated data against its dense matrix."""

import convex_oracles as oracles
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stochsolvers as ss
from stochsolvers.convex import GatedMap, Patterns, sample_patterns
from stochsolvers.convex import _gated_map as module


def example(rng, *shape, num=6):
    X = rng.normal(size=shape)
    return X, sample_patterns(jax.random.key(0), X, num)


ROWS = np.array([3, 0])


@jax.jit
def everything(A, r, V):
    part = A.restrict(jnp.array(ROWS))
    return A(r), A.adjoint(V), A.kernel_matrix(), A.squared_norm_bound(), part.adjoint(V)


@pytest.mark.parametrize("shape", [(7, 3), (5, 4, 3), (7, 9)])  # d ≤ P and d > P
@pytest.mark.parametrize("outputs", [None, 2])
def test_products_are_those_of_the_dense_matrix(rng, shape, outputs):
    X, patterns = example(rng, *shape)
    A = GatedMap(X, patterns, outputs=outputs)
    matrix = oracles.gated_matrix(X, patterns.mask)
    lead = () if outputs is None else (outputs,)
    assert A.in_shape == (*lead, shape[0])
    assert A.out_shape == (*lead, patterns.num, shape[-1])
    assert (shape[-1] > patterns.num) == (shape == (7, 9))
    r = rng.normal(size=(2, *A.in_shape))
    V = rng.normal(size=(2, *A.out_shape))
    weights, predictions, kernel, bound, part = map(np.asarray, everything(A, r, V))
    np.testing.assert_allclose(weights.reshape(2, *lead, -1), r @ matrix, atol=1e-13)
    np.testing.assert_allclose(predictions, V.reshape(2, *lead, -1) @ matrix.T, atol=1e-13)
    np.testing.assert_allclose(part, predictions[..., ROWS], atol=1e-13)
    np.testing.assert_allclose(kernel, matrix @ matrix.T, atol=1e-12)
    top = np.linalg.norm(matrix, 2) ** 2
    assert top <= bound <= 1.02 * top
    assert (A.absolute() is None) == (len(shape) == 3)
    assert np.all(np.abs(matrix) <= oracles.gated_matrix(A.magnitudes().X, patterns.mask))


@pytest.mark.parametrize("shape", [(30, 3), (200, 5), (6, 5, 3)])
def test_the_bound_for_many_data_is_one(rng, shape, monkeypatch):
    X, patterns = example(rng, *shape, num=20)
    A = GatedMap(X, patterns)
    monkeypatch.setattr(module, "_SMALL", 4)
    top = np.linalg.norm(oracles.gated_matrix(X, patterns.mask), 2) ** 2
    assert top <= A.squared_norm_bound() <= (2 if len(shape) == 2 else 10) * top


def test_data_of_zeros_have_the_norm_zero():
    mask = np.ones((3, 1), bool)
    assert GatedMap(np.zeros((3, 2)), Patterns(np.ones((2, 1)), mask)).squared_norm_bound() == 0


def test_large_batches_are_multiplied_in_parts(rng, monkeypatch):
    X, patterns = example(rng, 5, 3)
    r, V = rng.normal(size=(2, 3, 5)), rng.normal(size=(2, 3, patterns.num, 3))
    A = GatedMap(X, patterns)
    whole = A(r), A.adjoint(V)
    monkeypatch.setattr(module, "_ENTRIES", 70)
    np.testing.assert_allclose(A(r), whole[0], atol=1e-14)
    np.testing.assert_allclose(A.adjoint(V), whole[1], atol=1e-14)


def test_the_array_of_all_gated_data_is_not_formed(rng):
    X, patterns = example(rng, 40, 30, num=50)
    A = GatedMap(X, patterns)
    for product, shape in ((A, A.in_shape), (A.adjoint, A.out_shape)):
        program = jax.make_jaxpr(product)(jnp.zeros(shape))
        sizes = [v.aval.size for eqn in program.eqns for v in eqn.outvars]
        assert max(sizes) <= 40 * 50


def test_the_problem_of_a_layer_is_a_program(rng):
    """LayerProblem(GatedMap, y, prior=GroupL2(β)) as it stands, and sampled data."""
    X, patterns = example(rng, 12, 3)
    y, V = rng.normal(size=12), rng.normal(size=(patterns.num, 3))
    prior = ss.prox.GroupL2(0.3, axis=-1)
    problem = ss.LayerProblem(GatedMap(X, patterns), y, prior=prior)
    matrix = oracles.gated_matrix(X, patterns.mask)
    fit = matrix @ V.ravel() - y
    expected = 0.5 * fit @ fit + 0.3 * np.sum(np.linalg.norm(V, axis=1))
    np.testing.assert_allclose(problem.objective(V), expected, rtol=1e-13)
    np.testing.assert_allclose(problem.gradient(V).ravel(), matrix.T @ fit, atol=1e-12)
    estimator = ss.estimators.TauNice(3, shared=True)
    draw = estimator.draw(jax.random.key(0), problem, V)
    sample = estimator.sample(problem, draw)
    assert sample.linear_map.X.shape == (3, 3)
    slope = estimator.gradient(problem, V, draw)
    rows = np.asarray(draw)
    np.testing.assert_allclose(slope.ravel(), 4 * matrix[rows].T @ fit[rows], atol=1e-12)


X, GATES = np.ones((4, 2)), np.ones((2, 3))
PATTERNS = Patterns(GATES, np.ones((4, 3), bool))
BAD = {
    "a datum that is not finite": lambda: GatedMap(np.array([[np.nan, 1.0]]), PATTERNS),
    "a vector": lambda: GatedMap(X[0], PATTERNS),
    "no features": lambda: GatedMap(np.ones((4, 0)), PATTERNS),
    "patterns of other data": lambda: GatedMap(X[:3], PATTERNS),
    "gates of other data": lambda: GatedMap(np.ones((4, 3)), PATTERNS),
    "a mask for patterns": lambda: GatedMap(X, PATTERNS.mask),
    "no outputs": lambda: GatedMap(X, PATTERNS, outputs=0),
    "integers": lambda: GatedMap(np.ones((4, 2), int), PATTERNS),
    "residuals of other data": lambda: GatedMap(X, PATTERNS)(jnp.ones(3)),
    "weights of other gates": lambda: GatedMap(X, PATTERNS).adjoint(jnp.ones((2, 2))),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    with pytest.raises(ValueError, match=r"(?s)^\S.*: expected .+, got .+\.$"):
        BAD[case]()
