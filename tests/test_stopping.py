"""Tolerances: each example stops where the criterion says, and says how it ended."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import each_prior

import stochsolvers as ss
from stochsolvers.solvers import Status

KEY = jax.random.key(2)


@pytest.fixture
def problem(rng):
    kernel, x = rng.normal(size=(8, 5)), rng.normal(size=(4, 8))
    x[0] = 0.0  # solved at once
    x[1] *= 100.0
    return ss.LayerProblem(ss.Dense(jnp.asarray(kernel)), jnp.asarray(x), ridge=0.3)


def step_of(problem):
    return 1.0 / (np.linalg.norm(problem.linear_map.kernel, 2) ** 2 + 0.3)


def solve(problem, num_iters=300, **options):
    return ss.prox_gd(problem, step_size=step_of(problem), num_iters=num_iters, **options)


def path_of(problem, momentum, num_iters):
    """Iterates and the points where the gradient was taken, one numpy loop an example."""
    K, step = np.asarray(problem.linear_map.kernel), step_of(problem)
    iterates, origins = [], []
    for x in np.asarray(problem.inputs):
        z = y = np.zeros(K.shape[1])
        t, zs, ys = 1.0, [z], []
        for _ in range(num_iters):
            new = np.maximum(y - step * (K.T @ (K @ y - x) + 0.3 * y), 0.0)
            ys.append(y)
            t_next = 0.5 * (1 + np.sqrt(1 + 4 * t**2))
            y = new + (t - 1) / t_next * (new - z) if momentum else new
            z, t = new, t_next
            zs.append(z)
        iterates.append(zs)
        origins.append(ys)
    return np.array(iterates), np.array(origins)


@pytest.mark.parametrize("momentum", [False, True])
def test_each_example_stops_at_the_first_iterate_that_meets_the_criterion(problem, momentum):
    tol, cap = 1e-4, 300
    solution = solve(problem, cap, tol=tol, momentum=momentum, trace_objective=True)
    iterates, origins = path_of(problem, momentum, cap)
    moved = np.linalg.norm(iterates[:, 1:] - origins, axis=-1)
    small = moved <= tol * np.maximum(1.0, np.linalg.norm(iterates[:, 1:], axis=-1))
    stops = np.argmax(small, axis=1) + 1
    np.testing.assert_array_equal(solution.iterations, stops)
    np.testing.assert_array_equal(solution.status, Status.CONVERGED)
    assert len(set(stops)) > 2
    objectives = np.asarray(problem.objective(solution.value))
    for i, stop in enumerate(stops):
        np.testing.assert_allclose(solution.value[i], iterates[i, stop], atol=1e-10)
        steps = np.linalg.norm(np.diff(iterates[i], axis=0), axis=-1)
        np.testing.assert_allclose(solution.residuals[:stop, i], steps[:stop], atol=1e-10)
        np.testing.assert_array_equal(solution.residuals[stop:, i], 0.0)
        np.testing.assert_allclose(solution.objectives[stop - 1 :, i], objectives[i])
    assert solution.residuals.shape == solution.objectives.shape == (cap, 4)


def test_the_cap_and_divergence_are_reported(problem):
    short = solve(problem, 5, tol=1e-12)
    np.testing.assert_array_equal(short.status[1:], Status.MAX_ITERS)
    np.testing.assert_array_equal(short.iterations[1:], 5)
    np.testing.assert_allclose(short.value, solve(problem, 5).value, rtol=1e-12)
    np.testing.assert_allclose(short.residuals, solve(problem, 5).residuals, rtol=1e-12)
    poisoned = ss.LayerProblem(
        problem.linear_map, problem.inputs.at[2].set(jnp.nan), ridge=problem.ridge
    )
    solution = solve(poisoned, tol=1e-4)
    np.testing.assert_array_equal(solution.status == Status.DIVERGED, [False, False, True, False])
    np.testing.assert_array_equal(solution.finite, [True, True, False, True])
    healthy = np.array([0, 1, 3])
    np.testing.assert_allclose(solution.value[healthy], solve(problem, tol=1e-4).value[healthy])


@pytest.mark.optimized
@pytest.mark.parametrize("entry", [1e20, jnp.inf, jnp.nan])
def test_a_constant_that_overflows_is_not_convergence(entry):
    A = ss.Dense(jnp.full((4, 3), entry, jnp.float32))
    problem = ss.LayerProblem(A, jnp.ones((2, 4), jnp.float32), prior=ss.prox.L1(0.1))
    solution = ss.prox_gd(problem, num_iters=5, tol=1e-3)
    np.testing.assert_array_equal(solution.status, Status.DIVERGED)
    np.testing.assert_array_equal(solution.finite, False)


@each_prior
def test_a_stopped_example_is_its_own_fixed_point_for_every_prior(rng, prior):
    A = ss.Conv(jnp.asarray(rng.normal(size=(2, 2, 2, 3)) / 3), (3, 3))
    x = rng.normal(size=(3, 3, 3, 2)) * np.array([0.1, 1, 9]).reshape(3, 1, 1, 1)
    step, tol = 0.1, 1e-6

    @jax.jit
    def run(x):
        problem = ss.LayerProblem(A, x, prior=prior, ridge=0.5)
        solution = ss.prox_gd(problem, step_size=step, num_iters=500, tol=tol)
        z = solution.value
        again = prior.prox(z - step * problem.gradient(z), step)
        return solution, problem.norm(again - z), problem.norm(z)

    together, moved, size = run(x)
    np.testing.assert_array_equal(together.status, Status.CONVERGED)
    assert np.all(moved <= tol * np.maximum(1.0, size))
    for i in range(3):  # beside copies of itself
        alone, _, _ = run(x[i : i + 1].repeat(3, axis=0))
        np.testing.assert_array_equal(alone.iterations, together.iterations[i])
        np.testing.assert_allclose(alone.value[0], together.value[i], atol=1e-10)


def test_no_tolerance_no_status(problem):
    solution = solve(problem, 3)
    assert solution.status is None
    assert solution.iterations is None
    assert solution.certificate is None


def test_a_single_example_and_vmap_stop_alike(problem):
    together = solve(problem, tol=1e-4)

    def one(x):
        single = ss.LayerProblem(problem.linear_map, x, ridge=problem.ridge)
        return ss.prox_gd(single, step_size=step_of(problem), num_iters=300, tol=1e-4)

    mapped = jax.jit(jax.vmap(one))(problem.inputs)
    np.testing.assert_array_equal(mapped.iterations, together.iterations)
    np.testing.assert_array_equal(mapped.status, together.status)
    np.testing.assert_allclose(mapped.value, together.value, atol=1e-12)


def test_one_trace_for_all_tolerances_and_a_configuration_of_them(problem):
    traces = 0

    @jax.jit
    def run(tol):
        nonlocal traces
        traces += 1
        return ss.ProxGD(300, step_of(problem), tol=tol).solve(None, problem)

    loose, tight = run(1e-2), run(1e-6)
    assert traces == 1
    assert np.all(loose.iterations <= tight.iterations)
    np.testing.assert_allclose(tight.value, solve(problem, tol=1e-6).value, rtol=1e-12)


def test_derivatives_of_a_stopped_solution_are_implicit(problem):
    def loss(x, tol):
        p = ss.LayerProblem(problem.linear_map, x, ridge=0.3)
        return jnp.sum(jnp.sin(solve(p, 400, tol=tol).value))

    got, want = (
        jax.jit(jax.grad(loss), static_argnums=1)(problem.inputs, tol) for tol in (1e-12, None)
    )
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_certificates_bound_the_gap_for_every_solver(problem):
    best = problem.objective(solve(problem, 400).value)
    step, options = 0.01, {"certify": True}
    for solution in (
        solve(problem, 3, tol=1e-9, **options),
        ss.prox_sg(KEY, problem, tau=4, step_size=step, num_iters=3, **options),
        ss.ms2gd(KEY, problem, tau=4, step_size=step, num_outer=2, num_inner=2, **options),
        ss.nsync(KEY, problem, tau=4, step_size=step, num_iters=3, **options),
    ):
        gap = problem.objective(solution.value) - best
        np.testing.assert_allclose(solution.certificate, problem.certificate(solution.value))
        assert np.all(solution.certificate >= gap - 1e-12)


def test_bad_tolerances_raise(problem):
    with pytest.raises(ValueError, match="tol: expected a number >= 0, got -1"):
        solve(problem, 3, tol=-1.0)
    with pytest.raises(ValueError, match="tol: expected a number >= 0, got -1"):
        ss.ProxGD(3, tol=-1.0)


@pytest.mark.optimized
def test_divergence_is_no_convergence(rng):
    """Norms overflow long before the entries do: a step of 5/L, an L1 prior, 2,000 iterations."""
    kernel, x = (rng.normal(size=s).astype(np.float32) for s in ((16, 8), (3, 16)))
    problem = ss.LayerProblem(ss.Dense(kernel), x, prior=ss.prox.L1(0.1))
    step = 5.0 / ss.lipschitz_constant(problem.linear_map)
    solution = ss.prox_gd(problem, step_size=step, num_iters=2000, tol=1e-6)
    np.testing.assert_array_equal(solution.status, ss.Status.DIVERGED)
    assert not np.any(solution.finite)


@pytest.mark.optimized
def test_inputs_whose_squares_overflow_converge_to_the_solution(rng):
    kernel, x = (rng.normal(size=s).astype(np.float32) for s in ((16, 8), (3, 16)))
    huge = ss.LayerProblem(ss.Dense(kernel), 1e20 * x, prior=ss.prox.NonNegative())
    unit = ss.LayerProblem(ss.Dense(kernel), x, prior=ss.prox.NonNegative())
    solution = ss.prox_gd(huge, num_iters=3000, tol=1e-6)
    best = ss.prox_gd(unit, num_iters=3000, tol=1e-6)
    np.testing.assert_array_equal(solution.status, ss.Status.CONVERGED)
    np.testing.assert_allclose(solution.value / 1e20, best.value, rtol=1e-3, atol=1e-4)


@pytest.mark.optimized
@pytest.mark.parametrize("momentum", [False, True])
def test_an_unbounded_problem_does_not_converge(rng, momentum):
    """16 -> 64 without a ridge: ||z|| grows for ever, so that a relative test is met in the end."""
    kernel = (rng.normal(size=(16, 64)) / 4).astype(np.float32)
    x = rng.normal(size=(3, 16)).astype(np.float32)
    options = {"num_iters": 12000, "tol": 1e-4, "momentum": momentum}
    problem = ss.LayerProblem(ss.Dense(kernel), x, bias=np.full(64, 0.1, np.float32))
    solution = ss.prox_gd(problem, **options)
    assert np.all(np.isinf(problem.certificate(solution.value)))
    np.testing.assert_array_equal(solution.status, ss.Status.UNBOUNDED)
    bounded = ss.LayerProblem(ss.Dense(kernel), x, bias=problem.bias, ridge=0.1)
    np.testing.assert_array_equal(ss.prox_gd(bounded, **options).status, ss.Status.CONVERGED)


def test_a_start_at_the_solution_converges_at_once(problem):
    best = solve(problem, num_iters=3000, tol=1e-10).value
    again = solve(problem, tol=1e-6, init=best)
    np.testing.assert_array_equal(again.status, ss.Status.CONVERGED)
    np.testing.assert_array_equal(again.iterations, 1)
