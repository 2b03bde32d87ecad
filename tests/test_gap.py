"""Stopping at a certified gap: for every prior and loss, each example by itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import LOSSES, PRIORS, SHAPES
from flax import nnx

import stochsolvers as ss
from stochsolvers.solvers import Status


@pytest.fixture
def problem(rng):
    kernel, x = rng.normal(size=(8, 5)), rng.normal(size=(4, 8))
    x[0] = 0.0  # solved at once
    x[1] *= 100.0
    return ss.LayerProblem(ss.Dense(jnp.asarray(kernel)), jnp.asarray(x), ridge=0.3)


@jax.jit
def stop_at_gap(problem, gap_tol, tol=None):
    """The solution and P at it."""
    solution = ss.prox_gd(problem, num_iters=2000, gap_tol=gap_tol, tol=tol)
    return solution, problem.objective(solution.value)


def check_gap(problem, gap_tol):
    """All examples end below it, the true gap as well, and none goes on after that."""
    solution, reached = stop_at_gap(problem, gap_tol)
    _, best = stop_at_gap(problem, 1e-6 * gap_tol)
    np.testing.assert_array_equal(solution.status, Status.CONVERGED)
    assert np.all(solution.certificate <= gap_tol)
    assert np.all(reached - best <= solution.certificate + 1e-12)
    assert np.all(solution.residuals[np.max(solution.iterations) :] == 0)
    return solution


@pytest.mark.parametrize("name", PRIORS)
def test_a_certified_gap_stops_each_example_for_every_prior(rng, name):
    prior, shape = PRIORS[name], SHAPES.get(name, (1, 4))[1:]  # of one example
    size = int(np.prod(shape))
    kernel = jnp.asarray(rng.normal(size=(size + 1, size)) / 2)
    A = ss.linear_maps.Matrix(kernel, (size + 1,), shape)
    x = jnp.asarray(rng.normal(size=(3, size + 1)) * np.array([[0.1], [1], [9]]))
    check_gap(ss.LayerProblem(A, x, prior=prior, ridge=0.5), 1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_a_certified_gap_stops_each_example_for_every_loss(rng, name):
    loss, x = LOSSES[name]
    A = ss.Dense(jnp.asarray(rng.normal(size=(4, 3))))
    if name == "CrossEntropy":
        A = ss.linear_map(lambda W, u: u @ W, x.shape, A.kernel, dtype=jnp.float64)
    x, prior = jnp.asarray(x, jnp.float64), ss.prox.L1(0.1)
    check_gap(ss.LayerProblem(A, x, loss=loss, prior=prior, ridge=0.3), 1e-6)


def test_a_certified_gap_without_a_ridge(problem):
    """The dual points are searched for, as ReLU's have to be negative."""
    problem = dataclasses.replace(problem, ridge=0.0)
    for gap_tol in (1e-2, 1e-6):
        solution = check_gap(problem, gap_tol)
        certificate = problem.certificate(solution.value)
        np.testing.assert_allclose(solution.certificate, certificate, rtol=1e-6, atol=1e-15)
        assert len(set(solution.iterations.tolist())) > 1  # each example by itself


def test_a_gap_and_a_tolerance_stop_at_the_first(problem):
    by_gap = stop_at_gap(problem, 1e-8)[0]
    by_both = stop_at_gap(problem, 1e-8, 1e-2)[0]
    by_tol = ss.prox_gd(problem, num_iters=2000, tol=1e-2)
    assert np.all(by_both.iterations <= by_gap.iterations)
    np.testing.assert_array_equal(by_both.iterations, by_tol.iterations)
    np.testing.assert_array_equal(by_both.certificate, problem.certificate(by_both.value))


def test_gaps_that_are_not_reached(problem):
    """Below round-off, at the cap, for NaN, and of a problem without a minimiser."""
    solution = stop_at_gap(problem, 0.0)[0]
    np.testing.assert_array_equal(solution.status, [0, 1, 1, 1])  # the first is zero exactly
    assert np.all(solution.certificate[1:] > 0)
    assert np.all(solution.certificate < 1e-6)
    lost = dataclasses.replace(problem, inputs=problem.inputs.at[1].set(jnp.nan))
    solution = stop_at_gap(lost, 1e-6)[0]
    np.testing.assert_array_equal(solution.status == Status.DIVERGED, np.arange(4) == 1)
    assert solution.certificate[1] == jnp.inf
    kernel = jnp.array([[1.0, -1.0], [0.5, -0.5]])
    unbounded = ss.LayerProblem(ss.Dense(kernel), jnp.ones((1, 2)), bias=0.1)
    solution = stop_at_gap(unbounded, 1e-3)[0]
    assert solution.status[0] == Status.UNBOUNDED
    assert solution.certificate[0] == jnp.inf


def test_a_gap_compiles_once_and_is_differentiated_implicitly(problem):
    traces = 0

    @jax.jit
    def loss(x, gap_tol):
        nonlocal traces
        traces += 1
        p = dataclasses.replace(problem, inputs=x)
        solution = ss.ProxGD(800, gap_tol=gap_tol).solve(None, p, certify=True)
        return jnp.sum(jnp.sin(solution.value)), solution

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    loose, tight = (gradient(problem.inputs, tol)[1].iterations for tol in (1e-1, 1e-12))
    assert traces == 1
    assert np.all(loose <= tight)
    got = gradient(problem.inputs, 1e-18)[0]
    want = jax.grad(lambda x: jnp.sum(jnp.sin(
        ss.prox_gd(dataclasses.replace(problem, inputs=x), num_iters=800).value
    )))(problem.inputs)  # fmt: skip
    np.testing.assert_allclose(got, want, atol=1e-6)
    with pytest.raises(ValueError, match=r"gap_tol of ProxSG: expected None, got 0\.1"):
        ss.ProxSG(2, 3, gap_tol=0.1)
    with pytest.raises(ValueError, match="gap_tol: expected a number >= 0, got -1"):
        ss.ProxGD(3, gap_tol=-1.0)


def test_an_example_that_diverges_has_no_certificate(rng):
    """Although one of its first iterates had."""
    x = jnp.stack([jnp.zeros(12), jnp.asarray(rng.normal(size=12))])
    A = ss.Dense(jnp.asarray(rng.normal(size=(12, 8))))
    problem = ss.LayerProblem(A, x, prior=ss.prox.Zero(), ridge=0.1)
    step = 3.0 / ss.lipschitz_constant(A)
    solution = ss.prox_gd(problem, num_iters=3000, gap_tol=1e-3, step_size=step)
    np.testing.assert_array_equal(solution.status, [Status.CONVERGED, Status.DIVERGED])
    np.testing.assert_array_equal(jnp.isfinite(solution.certificate), [True, False])


def test_a_bounded_problem_is_not_called_unbounded():
    """Slow steady progress at the cap, with a finite certificate."""
    A, x = ss.Dense(jnp.diag(jnp.array([1.0, 0.02]))), jnp.array([[0.0, 1.0]])
    problem = ss.LayerProblem(A, x, bias=jnp.array([0.0, 0.1]), prior=ss.prox.Zero())
    solution = ss.prox_gd(problem, num_iters=48, gap_tol=1e-5)
    assert jnp.isfinite(solution.certificate[0])
    assert solution.status[0] == Status.MAX_ITERS


def test_the_certificate_is_of_the_value_that_is_returned():
    """Of a layer in bfloat16, and of one more step with an implicit derivative."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 12)), jnp.float32)
    linear = nnx.Linear(12, 8, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    solver = ss.ProxGD(500, gap_tol=1e-5)
    layer = ss.nnx.SolverLinear.from_layer(linear, solver=solver, ridge=0.1)
    solution = layer.solve(x.astype(jnp.bfloat16))
    problem = layer.problem(x.astype(jnp.bfloat16))
    np.testing.assert_allclose(solution.certificate, problem.certificate(solution.value))
    again = solver.solve(None, problem, pre_activation=True)
    np.testing.assert_allclose(again.certificate, problem.certificate(again.value), rtol=1e-3)


def test_an_empty_batch(problem):
    empty = dataclasses.replace(problem, inputs=problem.inputs[:0])
    assert ss.prox_gd(empty, num_iters=20, gap_tol=1e-5).certificate.shape == (0,)
    assert empty.certifier()(jnp.zeros(empty.shape)).shape == (0,)
