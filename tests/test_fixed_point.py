"""Solvers of problems z = h(z), and the accelerated iterations on layers, against numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixed_points import Shallow, deep, equilibrium, matrix, shallow
from test_meshes import KINDS, on_mesh

import stochsolvers as ss
from stochsolvers.solvers import Status
from stochsolvers.solvers.sequential_averaging import SequentialAveraging

KEY = jax.random.key(0)
SOLVERS = {
    "FixedPoint": ss.FixedPoint(1500, tol=1e-10),
    "damped": ss.FixedPoint(3000, tol=1e-10, step_size=0.6),
    "Anderson": ss.Anderson(1500, tol=1e-10),
    "ProxGD": ss.ProxGD(1500, tol=1e-10),
    "FISTA": ss.ProxGD(3000, tol=1e-10, momentum=True),
    "restart": ss.ProxGD(1500, tol=1e-10, momentum=True, restart=True),
}
every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())


@every_solver
def test_the_equilibrium_is_found_and_its_gap_certified(solver, rng):
    problem, want = (p := shallow(rng)), equilibrium(p)
    solution = solver.solve(None, problem, trace_objective=True, certify=True)
    np.testing.assert_array_equal(solution.status, Status.CONVERGED)
    np.testing.assert_allclose(solution.value, want, rtol=1e-7, atol=1e-8)
    gap = solution.objectives[-1] - problem.objective(jnp.asarray(want))
    assert np.all(solution.certificate >= gap - 1e-12)
    assert len(set(solution.iterations.tolist())) > 1  # each example stops by itself


@pytest.mark.optimized
def test_one_iteration_is_the_layer_to_the_last_bit(rng):
    problem = shallow(rng)
    start = jnp.asarray(rng.normal(size=problem.shape))
    for solver in (ss.FixedPoint(1), ss.Anderson(1), ss.ProxGD(1)):
        value = solver.solve(None, problem, init=start).value
        np.testing.assert_array_equal(value, jax.jit(problem.layer)(start))


def anderson_path(layer, z, memory, num_iters):
    """T(y_k) and ||T(y_k) − y_k|| for one example, by the constrained least squares of the definition."""
    pairs, values, sizes, before, y = [], [], [], np.inf, z
    mixed, wait, patience = False, 0, 1
    for _ in range(num_iters):
        value = layer(y)
        size = np.linalg.norm(value - y)
        values.append(value)
        sizes.append(size)
        if mixed and size > before:
            pairs, wait, patience = pairs[-1:], patience, 2 * patience
        else:
            pairs, before = [*pairs, (value, value - y)][-memory:], size
            wait, patience = max(wait - 1, 0), max(patience // 2, 1) if mixed else patience
        used = pairs[-1:] if wait else pairs
        mixed = len(used) > 1
        G = np.array([g for _, g in used])
        H = G @ G.T
        H = H / np.trace(H) + 1e-10 * np.eye(len(G))
        weights = np.linalg.solve(H, np.ones(len(G)))
        y = weights / weights.sum() @ np.array([v for v, _ in used])
    return np.array(values), np.array(sizes)


@pytest.mark.parametrize("memory", [1, 2, 5])
def test_anderson_is_its_definition(memory, rng):
    problem, count = shallow(rng), 12
    W, drive = np.asarray(problem.weights), np.asarray(problem.drive)
    solution = ss.Anderson(count, memory=memory).solve(None, problem)
    for i, c in enumerate(drive):
        values, _ = anderson_path(lambda z, c=c: np.maximum(W @ z + c, 0) @ W, 0 * c, memory, count)
        np.testing.assert_allclose(solution.value[i], values[-1], rtol=1e-4, atol=1e-9)
        steps = np.linalg.norm(np.diff(values, axis=0, prepend=0), axis=1)
        np.testing.assert_allclose(solution.residuals[:, i], steps, rtol=1e-3, atol=1e-8)
    plain = ss.FixedPoint(count).solve(None, problem)
    if memory == 1:
        np.testing.assert_allclose(solution.value, plain.value, rtol=1e-12)


def hard_problems(rng, count=40):
    """Equilibria of few dimensions with norms up to 1 − 1e-3, where mixing often goes wrong."""
    W = np.stack([matrix(rng, 3, 1 - 10 ** -rng.uniform(0.5, 3)) for _ in range(count)])
    c = rng.normal(size=(count, 8, 3)) * 10.0 ** rng.integers(-3, 3, size=(count, 1, 1))
    return Shallow(jnp.asarray(W), jnp.asarray(c))


def test_acceleration_is_never_much_worse_than_the_plain_iteration(rng):
    problems = hard_problems(rng)

    @jax.jit
    @jax.vmap
    def iterations(problem):
        solvers = (
            ss.FixedPoint(20000, tol=1e-9),
            ss.Anderson(20000, tol=1e-9),
            ss.ProxGD(20000, tol=1e-9, momentum=True, restart=True),
        )
        solutions = [solver.solve(None, problem) for solver in solvers]
        return [s.iterations for s in solutions], [s.status for s in solutions]

    (plain, mixed, restarted), status = iterations(problems)
    np.testing.assert_array_equal(np.stack(status), Status.CONVERGED)
    assert np.all(mixed <= plain + 1 + np.log2(plain)), np.max(mixed - plain)
    assert np.median(mixed) <= 0.5 * np.median(plain)
    assert np.sum(restarted) <= 0.6 * np.sum(plain)
    assert np.all(restarted <= 2 * plain + 10)


def test_acceleration_of_a_layer_with_a_prior(rng):
    kernel, x = rng.normal(size=(30, 40)), rng.normal(size=(6, 30))
    problem = ss.LayerProblem(ss.Dense(jnp.asarray(kernel)), jnp.asarray(x), ridge=0.5)
    want = ss.prox_gd(problem, num_iters=4000).value
    options = {"tol": 1e-8, "num_iters": 4000}
    plain = ss.FixedPoint(**options).solve(None, problem)
    np.testing.assert_array_equal(plain.iterations, ss.prox_gd(problem, **options).iterations)
    for solver in (ss.Anderson(**options), ss.ProxGD(**options, momentum=True, restart=True)):
        solution = solver.solve(None, problem)
        np.testing.assert_array_equal(solution.status, Status.CONVERGED)
        np.testing.assert_allclose(solution.value, want, atol=1e-6)
        assert np.all(solution.value >= 0)
        assert np.all(solution.iterations <= 0.5 * plain.iterations)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_many_steps_after_convergence_stay_finite(dtype, rng):
    problem = shallow(rng, dtype=dtype)
    still = dataclasses.replace(problem, drive=problem.drive.at[0].set(-1.0))  # z = 0 at once
    with jax.debug_nans(True):
        restarted = ss.ProxGD(800, momentum=True, restart=True)
        for solver in (ss.Anderson(800), restarted)[: 1 + (dtype == np.float32)]:
            solution = solver.solve(None, still)
            assert np.all(solution.finite)
            np.testing.assert_array_equal(solution.value[0], 0.0)
            again = solver.solve(None, still, init=solution.value)
            np.testing.assert_allclose(again.value, solution.value, rtol=1e-4, atol=1e-6)
    if dtype == np.float32:
        assert np.all(np.isfinite(unrolled_gradient(ss.Anderson(800), still)))


def unrolled_gradient(solver, problem):
    def loss(drive):
        return jnp.sum(solver.solve(None, dataclasses.replace(problem, drive=drive)).value ** 2)

    return jax.jit(jax.grad(loss))(problem.drive)


@every_solver
def test_results_do_not_depend_on_the_other_examples(solver, rng):
    problem = shallow(rng)
    bad = problem.drive.at[0].set(jnp.nan).at[3].set(1e200)
    among = solver.solve(None, dataclasses.replace(problem, drive=bad))
    for i in (1, 2):
        alone = solver.solve(None, dataclasses.replace(problem, drive=problem.drive[i : i + 1]))
        np.testing.assert_allclose(among.value[i : i + 1], alone.value, rtol=1e-12, atol=1e-14)
        np.testing.assert_array_equal(among.iterations[i : i + 1], alone.iterations)
        np.testing.assert_array_equal(among.status[i], Status.CONVERGED)
    np.testing.assert_array_equal(among.status[0], Status.DIVERGED)


def test_no_convergence_is_shown(rng):
    problem = shallow(rng)
    for solver in (ss.FixedPoint(2, tol=1e-9), ss.Anderson(2, tol=1e-9)):
        np.testing.assert_array_equal(solver.solve(None, problem).status, Status.MAX_ITERS)
    # z = relu(z + 1) has no solution
    endless = Shallow(jnp.eye(3), jnp.ones((2, 3)))
    for solver in (ss.FixedPoint(3000, tol=1e-3), ss.ProxGD(3000, tol=1e-3)):
        np.testing.assert_array_equal(solver.solve(None, endless).status, Status.UNBOUNDED)
    status = ss.Anderson(3000, tol=1e-3).solve(None, endless).status
    assert not np.any(status == Status.CONVERGED)
    assert np.all(np.isinf(ss.FixedPoint(3).solve(None, endless, certify=True).certificate))


def test_certified_gaps_stop_the_iteration(rng):
    problem = shallow(rng)
    best = problem.objective(jnp.asarray(equilibrium(problem)))
    for solver in (ss.FixedPoint(3000, gap_tol=1e-6), ss.Anderson(3000, gap_tol=1e-6)):
        solution = solver.solve(None, problem)
        np.testing.assert_array_equal(solution.status, Status.CONVERGED)
        assert np.all(problem.objective(solution.value) - best <= 1e-6)
        assert np.all(solution.certificate <= 1e-6)
        again = problem.certificate(solution.value)
        np.testing.assert_allclose(solution.certificate, again, rtol=1e-6)
    assert np.any(solution.iterations % 10 != 0)  # looked at after every iteration


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_mesh(kind, rng):
    weights = jnp.asarray(matrix(rng, 5, 0.9))

    def solve(drive):
        problem = Shallow(weights, drive)
        every = []
        for solver in (ss.FixedPoint(9), ss.Anderson(9, tol=1e-6), ss.ProxGD(9, gap_tol=1e-3)):
            solution = solver.solve(None, problem, certify=True, trace_objective=True)
            every.append((solution.value, solution.objectives, solution.certificate))
        return every

    on_mesh(kind, solve, jnp.asarray(rng.normal(size=(2, 5))))


def test_under_vmap_and_traced_once(rng):
    problem, traces = shallow(rng), 0

    @jax.jit
    def run(problem, tol):
        nonlocal traces
        traces += 1
        return ss.Anderson(300, tol=tol).solve(None, problem)

    together = run(problem, 1e-8)
    run(dataclasses.replace(problem, weights=0.5 * problem.weights), 1e-6)
    assert traces == 1
    each = Shallow(jnp.broadcast_to(problem.weights, (4, 20, 20)), problem.drive)
    mapped = jax.vmap(lambda p: ss.Anderson(300, tol=1e-8).solve(None, p))(each)
    np.testing.assert_array_equal(mapped.iterations, together.iterations)
    np.testing.assert_allclose(mapped.value, together.value, rtol=1e-9, atol=1e-12)


def test_without_batch_axes_and_with_two(rng):
    problem = shallow(rng)
    solver = ss.Anderson(300, tol=1e-8)
    want = solver.solve(None, problem)
    two = dataclasses.replace(problem, drive=problem.drive.reshape(2, 2, 20))
    solution = solver.solve(None, two)
    np.testing.assert_array_equal(solution.iterations, want.iterations.reshape(2, 2))
    np.testing.assert_allclose(solution.value.reshape(4, 20), want.value, rtol=1e-9, atol=1e-12)
    one = solver.solve(None, dataclasses.replace(problem, drive=problem.drive[2]))
    np.testing.assert_array_equal(one.iterations, want.iterations[2])
    np.testing.assert_allclose(one.value, want.value[2], rtol=1e-9, atol=1e-12)


def test_entries_whose_squares_overflow(rng):
    kernel, x = (rng.normal(size=s).astype(np.float32) for s in ((16, 8), (3, 16)))
    for solver in (ss.Anderson(3000, tol=1e-6), ss.FixedPoint(3000, tol=1e-6)):
        huge, unit = (ss.LayerProblem(ss.Dense(kernel), scale * x) for scale in (1e20, 1.0))
        solution, best = (solver.solve(None, problem) for problem in (huge, unit))
        np.testing.assert_array_equal(solution.status, Status.CONVERGED)
        np.testing.assert_allclose(solution.value / 1e20, best.value, rtol=1e-3, atol=1e-4)


def test_sequential_averaging_selects_the_solution_of_least_prior():
    """W = diag(1, 1, ½) has the fixed points (a, b, 0), a, b ≥ 0; the nearest to (2, −3, 1) is (2, 0, 0)."""
    problem = Shallow(jnp.diag(jnp.array([1.0, 1.0, 0.5])), jnp.zeros(3))
    nearest, start = jnp.array([2.0, -3.0, 1.0]), jnp.array([5.0, 4.0, 3.0])
    plain = ss.FixedPoint(200).solve(None, problem, init=start).value
    np.testing.assert_allclose(plain, [5.0, 4.0, 0.0], atol=1e-12)
    for step, contraction in ((1.0, 0.0), (0.5, 0.5)):

        def solver(count, step=step, contraction=contraction, **options):
            return SequentialAveraging(
                lambda z: z - nearest, step, contraction, num_iters=count, **options
            )

        errors = []
        for count in (100, 1000, 10000):
            value = solver(count).solve(None, problem, init=start).value
            errors.append(np.linalg.norm(value - np.array([2.0, 0.0, 0.0])))
        np.testing.assert_allclose(errors[1:], np.array(errors[:-1]) / 10, rtol=0.1)
        assert errors[0] < 0.2
        stopped = solver(10000, tol=1e-2).solve(None, problem, init=start)
        assert stopped.status == Status.CONVERGED
        assert 100 < stopped.iterations < 2000
        np.testing.assert_allclose(stopped.value, [2.0, 0.0, 0.0], atol=0.05)


def test_what_is_refused(rng):
    problem = shallow(rng)
    for solver in (ss.ProxSG(0.5, 2), ss.MS2GD(0.5, 2, 2), ss.NSync(0.5, 2)):
        for deterministic in (True, False):
            with pytest.raises(ValueError, match="expected a LayerProblem, got Shallow"):
                solver.solve(KEY, problem, deterministic=deterministic)
    rule = ss.InverseExpectedSmoothness()
    sam = SequentialAveraging
    calls = [
        (lambda: ss.ProxGD(2).solve(None, problem.drive), "a LayerProblem or a FixedPointProblem"),
        (lambda: ss.ProxGD(2, form="gram").solve(None, problem), "problem of form 'gram'"),
        (lambda: ss.ProxGD(2, rule).solve(None, problem), "of InverseExpectedSmoothness"),
        (lambda: ss.FixedPoint(2).solve(None, deep(rng), certify=True), "certificate of Deep"),
        (lambda: ss.FixedPoint(2, gap_tol=1.0).solve(None, deep(rng)), "certificate of Deep"),
        (
            lambda: ss.FixedPoint(2).solve(None, deep(rng), trace_objective=True),
            "objective of Deep: expected a problem that has one",
        ),
        (lambda: ss.Anderson(2, memory=0), "memory: expected an integer >= 1, got 0"),
        (lambda: ss.ProxGD(2, restart=True), "restart: expected False without momentum"),
        (lambda: sam(jnp.sin, 1.0, 1.0, num_iters=2), "contraction: expected a number < 1"),
        (lambda: sam(jnp.ones(3), 1.0, 0.5, num_iters=2), "gradient: expected a function of z"),
        (lambda: sam(jnp.sin, 0.0, 0.5, num_iters=2), "prior_step: expected a number > 0"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()
