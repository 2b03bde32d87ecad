"""Convergence at the rates that theory gives, against optima from scipy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import nnls_layer, objective, prox_gradient

import stochsolvers as ss

KEY = jax.random.key(7)


class Case:
    """A dense non-negative problem with its optimum from NNLS."""

    def __init__(self, rng, n1=8, n2=6, batch=4, ridge=0.0):
        self.kernel, self.bias = rng.normal(size=(n1, n2)), rng.normal(size=n2)
        self.inputs, self.ridge = rng.normal(size=(batch, n1)), ridge
        self.problem = ss.LayerProblem(
            ss.Dense(jnp.asarray(self.kernel)),
            jnp.asarray(self.inputs),
            bias=jnp.asarray(self.bias),
            ridge=ridge,
        )
        self.best = np.array([nnls_layer(self.kernel, x, self.bias, ridge) for x in self.inputs])
        self.least = np.array(
            [
                objective(self.kernel, x, self.bias, ridge, z)
                for x, z in zip(self.inputs, self.best, strict=True)
            ]
        )
        self.eigenvalues = np.linalg.eigvalsh(self.kernel.T @ self.kernel) + ridge

    def gap(self, z):
        return np.asarray(self.problem.objective(z)) - self.least


def test_prox_gd_is_the_numpy_loop_of_equation_3(rng):
    case = Case(rng, ridge=0.3)
    step = 1 / case.eigenvalues[-1]
    path = prox_gradient(
        case.kernel,
        case.inputs[0],
        case.bias,
        0.3,
        lambda v, eta: np.sign(v) * np.maximum(np.abs(v) - 0.4 * eta, 0),
        step,
        7,
    )
    problem = ss.LayerProblem(
        case.problem.linear_map,
        case.inputs[0],
        bias=case.bias,
        prior=ss.prox.L1(0.4),
        ridge=0.3,
    )
    solution = ss.prox_gd(problem, step_size=step, num_iters=7, trace_objective=True)
    np.testing.assert_allclose(solution.value, path[-1], rtol=1e-12)
    steps = np.linalg.norm(np.diff(path, axis=0), axis=1)
    np.testing.assert_allclose(solution.residuals, steps, rtol=1e-10)
    want = [
        objective(case.kernel, case.inputs[0], case.bias, 0.3, z) + 0.4 * np.sum(np.abs(z))
        for z in path[1:]
    ]
    np.testing.assert_allclose(solution.objectives, want, rtol=1e-12)


def test_prox_gd_meets_its_rate(rng):
    case = Case(rng)
    lipschitz = case.eigenvalues[-1]
    solution = ss.prox_gd(case.problem, num_iters=200, trace_objective=True)
    gaps = np.asarray(solution.objectives) - case.least
    k = np.arange(1, 201)[:, None]
    distance = np.sum(case.best**2, axis=1)
    assert np.all(gaps <= lipschitz * distance / (2 * k) + 1e-12)
    assert np.all(np.diff(solution.objectives, axis=0) <= 1e-12)  # and never goes up


def test_momentum_meets_its_faster_rate(rng):
    case = Case(rng, n1=6, n2=6)
    solution = ss.prox_gd(case.problem, num_iters=300, momentum=True, trace_objective=True)
    k = np.arange(1, 301)[:, None]
    bound = 2 * case.eigenvalues[-1] * np.sum(case.best**2, axis=1) / (k + 1) ** 2
    assert np.all(np.asarray(solution.objectives) - case.least <= bound + 1e-12)


def test_prox_gd_converges_linearly_with_a_ridge(rng):
    case = Case(rng, n1=4, n2=6, ridge=1.0)  # the ridge is the only curvature in two directions
    contraction = 1 - 1.0 / case.eigenvalues[-1]
    for num_iters in (5, 20, 80):
        z = ss.prox_gd(case.problem, num_iters=num_iters).value
        distance = np.linalg.norm(z - case.best, axis=1)
        allowed = contraction**num_iters * np.linalg.norm(case.best, axis=1)
        assert np.all(distance <= allowed + 1e-12)


def test_ms2gd_converges_linearly_where_prox_sg_stalls(rng):
    case = Case(rng, n1=12, n2=5, ridge=0.5)
    step = ss.InverseExpectedSmoothness()
    sg = ss.prox_sg(KEY, case.problem, tau=4, step_size=step, num_iters=1200)
    assert np.all(case.gap(sg.value) > 1e-4)  # a constant step leaves a floor of noise
    gaps = [
        case.gap(
            ss.ms2gd(KEY, case.problem, tau=4, step_size=step, num_outer=outer, num_inner=40).value
        ).max()
        for outer in (5, 15, 30)
    ]
    assert gaps[1] < 1e-2 * gaps[0]
    assert gaps[2] < 1e-10


@pytest.mark.parametrize(
    "settings",
    [
        {"tau": 1, "num_outer": 30, "num_inner": 60, "random_inner": True},  # S2GD
        {"tau": 1, "num_outer": 30, "num_inner": 40},  # SVRG
        {"sampling": ss.estimators.SerialImportance(), "num_outer": 30, "num_inner": 30},
        {"sampling": ss.estimators.TauNice(4, shared=True), "num_outer": 20, "num_inner": 30},
    ],
    ids=["S2GD", "SVRG", "serial importance", "shared"],
)
def test_variance_reduced_settings_reach_the_optimum(rng, settings):
    case = Case(rng, n1=12, n2=5, ridge=0.5)
    solution = ss.ms2gd(KEY, case.problem, step_size=ss.InverseExpectedSmoothness(), **settings)
    np.testing.assert_allclose(solution.value, case.best, atol=1e-4)
    assert solution.residuals.shape == (settings["num_outer"] * settings["num_inner"], 4)


def test_random_inner_lengths_follow_their_law():
    from stochsolvers.solvers.ms2gd import _random_length

    keys = jax.random.split(jax.random.key(0), 20_000)
    lengths = np.asarray(jax.vmap(lambda k: _random_length(k, 0.3, 4))(keys))
    want = 0.7 ** np.array([3, 2, 1, 0])
    counts = np.bincount(lengths, minlength=5)[1:]
    np.testing.assert_allclose(counts / counts.sum(), want / want.sum(), atol=0.015)


def test_prox_sg_with_decay_settles_near_the_optimum(rng):
    case = Case(rng, n1=12, n2=5, ridge=0.5)
    step = ss.InverseExpectedSmoothness(decay=0.998)
    start = case.gap(jnp.zeros(case.problem.shape)).mean()
    solution = ss.prox_sg(KEY, case.problem, tau=6, step_size=step, num_iters=3000)
    assert case.gap(solution.value).mean() < 0.02 * start


def test_the_papers_first_step_grows_at_small_tau(rng):
    """The paper's first step is too long for τ = 1: the reason for expected smoothness."""
    case = Case(rng, n1=64, n2=5, batch=16)
    paper = ss.prox_sg(KEY, case.problem, tau=1, num_iters=60)
    theory = ss.prox_sg(
        KEY, case.problem, tau=1, step_size=ss.InverseExpectedSmoothness(), num_iters=60
    )
    start = case.gap(jnp.zeros(case.problem.shape)).mean()
    assert case.gap(paper.value).mean() > 10 * start
    assert case.gap(theory.value).mean() < 3 * start  # its floor of noise


@pytest.mark.parametrize("tau", [1, 3, 5])
def test_nsync_converges_with_separable_steps(rng, tau):
    case = Case(rng, n1=12, n2=5)
    solution = ss.nsync(KEY, case.problem, tau=tau, step_size=ss.InverseSeparable(), num_iters=1500)
    np.testing.assert_allclose(solution.value, case.best, atol=1e-6)


def test_nsync_keeps_the_optimum_of_a_prior_that_moves_zero(rng):
    case = Case(rng, ridge=0.5)
    problem = ss.LayerProblem(
        case.problem.linear_map, case.inputs, prior=ss.prox.LogBarrier(0.3), ridge=0.5
    )
    best = ss.prox_gd(problem, num_iters=3000).value
    steps = ss.InverseSeparable()
    moved = ss.nsync(KEY, problem, tau=2, step_size=steps, num_iters=50, init=best)
    np.testing.assert_allclose(moved.value, best, rtol=1e-9)


def test_custom_schedules_and_exponential_decay(rng):
    case = Case(rng)
    decay = ss.exponential_decay(0.05, 0.9)
    np.testing.assert_allclose([decay(k) for k in range(3)], 0.05 * 0.9 ** np.arange(3))
    one = ss.prox_gd(case.problem, step_size=decay, num_iters=6)
    two = ss.prox_gd(case.problem, step_size=lambda k: 0.05 * 0.9**k, num_iters=6)
    np.testing.assert_array_equal(one.value, two.value)


def test_divergence_is_reported_and_not_raised(rng):
    case = Case(rng)
    solution = jax.jit(lambda p: ss.prox_gd(p, step_size=1e30, num_iters=30))(case.problem)
    assert not np.any(solution.finite)
    bad = jnp.asarray(case.inputs).at[1].set(jnp.nan)
    poisoned = ss.LayerProblem(case.problem.linear_map, bad, bias=case.problem.bias)
    finite = np.asarray(ss.prox_gd(poisoned, num_iters=3).finite)
    np.testing.assert_array_equal(finite, [True, False, True, True])


def test_zero_kernel_has_a_finite_solution():
    problem = ss.LayerProblem(ss.Dense(jnp.zeros((3, 2))), jnp.ones((1, 3)), bias=jnp.ones(2))
    solution = ss.prox_gd(problem, num_iters=4)
    assert np.all(solution.finite)


@pytest.mark.optimized
def test_the_cost_of_shared_sampling_falls_with_tau():
    """τ gathered columns: the work is that of a layer with τ inputs."""
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1000, 64), (32, 1000))]

    def flops(sampling):
        def run(kernel, x):
            problem = ss.LayerProblem(ss.Dense(kernel), x)
            options = {"sampling": sampling, "step_size": 0.01, "num_iters": 10}
            return ss.prox_sg(KEY, problem, **options).value

        return jax.jit(run).lower(*shapes).compile().cost_analysis()["flops"]

    masks, shared = (flops(ss.estimators.TauNice(0.1, shared=s)) for s in (False, True))
    assert shared < masks / 4


@pytest.mark.parametrize("by", ["lipschitz", "gradient"])
@pytest.mark.parametrize("tau", [1, 3])
def test_prepared_importance_draws_the_same(rng, by, tau):
    problem = Case(rng).problem
    serial, fixed = ss.estimators.SerialImportance(by), ss.estimators.Importance(tau, by=by)
    z = jnp.asarray(rng.normal(size=problem.shape))
    for estimator in (serial, fixed):
        plain, prepared = (e(KEY, problem, z) for e in (estimator, estimator.prepare(problem)))
        np.testing.assert_allclose(prepared, plain, rtol=1e-12)
