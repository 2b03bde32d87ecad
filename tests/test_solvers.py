"""Convergence at the rates that theory gives, against optima from scipy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
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
    from stochsolvers.solvers.semi_stochastic import _random_length

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

    @jax.jit
    def both(problem, z):
        return [
            [e(KEY, problem, z) for e in (estimator, estimator.prepare(problem))]
            for estimator in (serial, fixed)
        ]

    for plain, prepared in both(problem, z):
        np.testing.assert_allclose(prepared, plain, rtol=1e-12)


def test_nsync_is_stable_by_default(rng):
    """A unit step, proposition 6's, diverges on a layer of any size; the default does not."""
    kernel, x = rng.normal(size=(30, 20)), rng.normal(size=(2, 30))
    problem = ss.LayerProblem(ss.Dense(kernel), x, ridge=0.1)
    for solution in (
        ss.nsync(jax.random.key(0), problem, tau=10, num_iters=2000),
        ss.NSync(10, 2000).solve(jax.random.key(0), problem),
    ):
        assert np.all(problem.certificate(solution.value) < 1e-6)
    unit = ss.nsync(jax.random.key(0), problem, tau=10, num_iters=500, step_size=1.0)
    assert not np.any(unit.finite)


def test_a_constant_that_overflows_is_reported_by_all_alike(rng):
    """The function, the class and both layers: not finite, no error."""
    kernel, x = np.full((8, 4), 1e30, np.float32), rng.normal(size=(2, 8)).astype(np.float32)
    problem = ss.LayerProblem(ss.Dense(kernel), x)
    layer = ss.nnx.SolverLinear(8, 4, solver=ss.ProxGD(3), rngs=nnx.Rngs(0))
    layer.kernel[...] = jnp.asarray(kernel)
    module = ss.linen.SolverDense(4, solver=ss.ProxGD(3))
    variables = {"params": {"kernel": kernel, "bias": np.zeros(4, np.float32)}}
    for solution in (
        ss.prox_gd(problem, num_iters=3),
        ss.ProxGD(3).solve(None, problem),
        jax.jit(lambda p: ss.prox_gd(p, num_iters=3))(problem),
        layer.solve(x),
        module.apply(variables, x, method="solve"),
        ss.NSync(2, 3).solve(jax.random.key(0), problem),
        ss.ProxSG(2, 3).solve(jax.random.key(0), problem),
    ):
        assert not np.any(solution.finite)


def test_nan_inputs_are_reported_eager_and_jitted(rng):
    kernel, x = rng.normal(size=(8, 4)), rng.normal(size=(2, 8))
    x[0, 3] = np.nan
    problem = ss.LayerProblem(ss.Dense(kernel), x, ridge=0.1)
    for run in (ss.prox_gd, jax.jit(ss.prox_gd, static_argnames="num_iters")):
        np.testing.assert_array_equal(run(problem, num_iters=3).finite, [False, True])
    np.testing.assert_array_equal(
        np.isfinite(problem.certificate(jnp.zeros((2, 4)))), [False, True]
    )


def test_a_zero_map_takes_the_scale_for_its_step():
    problem = ss.LayerProblem(ss.Dense(jnp.zeros((4, 3))), jnp.ones((2, 4)), bias=jnp.ones(3))
    for rule in (ss.InverseLipschitz(scale=0.3), ss.InverseExpectedSmoothness(scale=0.3)):
        z = ss.prox_gd(problem, step_size=rule, num_iters=1).value
        np.testing.assert_allclose(z, 0.3, rtol=1e-6)
    z = ss.nsync(jax.random.key(0), problem, tau=3, num_iters=1, step_size=ss.InverseSeparable(0.3))
    np.testing.assert_allclose(z.value, 0.3, rtol=1e-6)


def test_numbers_of_any_kind_are_the_same_solver(rng):
    assert ss.ProxGD(np.int64(3)) == ss.ProxGD(3)
    assert hash(ss.MS2GD(0.5, np.int32(2), np.int8(3))) == hash(ss.MS2GD(0.5, 2, 3))
    assert ss.ProxSG(jnp.float32(0.5), 3) == ss.ProxSG(0.5, 3)
    kernel, x = rng.normal(size=(8, 4)).astype(np.float32), rng.normal(size=(2, 8))
    problem = ss.LayerProblem(ss.Dense(kernel), x.astype(np.float32), ridge=np.float64(0.1))
    assert problem.dtype == jnp.float32
    key = jax.random.key(0)
    for tau in (jnp.float32(0.5), np.float64(0.5), np.float32(0.5)):
        z = ss.prox_sg(key, problem, tau=tau, num_iters=3).value
        np.testing.assert_array_equal(z, ss.prox_sg(key, problem, tau=0.5, num_iters=3).value)
    for step in (np.float64(0.1), jnp.float64(0.1), np.float32(0.1)):
        assert ss.ProxGD(3, step_size=step).solve(None, problem).value.dtype == jnp.float32
        assert ss.nsync(key, problem, tau=2, step_size=step, num_iters=2).value.dtype == jnp.float32


def test_objectives_of_huge_points_are_no_nan():
    problem = ss.LayerProblem(ss.Dense(jnp.zeros((4, 3), jnp.float32)), jnp.ones(4, jnp.float32))
    assert problem.objective(jnp.full(3, 1e20, jnp.float32)) == 2.0
    slope = jax.grad(lambda ridge: ss.LayerProblem(
        ss.Dense(jnp.zeros((4, 3))), jnp.ones(4), ridge=ridge).smooth(jnp.full(3, 2.0)))(0.0)  # fmt: skip
    np.testing.assert_allclose(slope, 6.0)


def test_strict_modes_of_jax(rng):
    """What Flax's own layers pass, solvers, layers and certificates pass: ranks, dtypes and NaNs at once."""
    x = rng.normal(size=(2, 6, 5, 3)).astype(np.float32)
    flat, key = x.reshape(2, -1)[:, :8], jax.random.key(0)
    strict = jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict")
    with strict[0], strict[1], jax.debug_nans(True):
        conv = ss.nnx.SolverConv(
            3, 4, (3, 3), solver=ss.ProxSG(2, 3), ridge=0.1, rngs=nnx.Rngs(0, dropout=1)
        )
        linear = ss.nnx.SolverLinear(8, 4, solver=ss.ProxGD(3, tol=1e-3), rngs=nnx.Rngs(0))
        linear.bias[...] = 0.1 + linear.bias[...]
        for layer, inputs in ((conv, x), (linear, flat)):
            layer.solve(inputs, certify=True)
            ss.certify(layer, inputs)
        problem = linear.problem(flat)
        ss.prox_sg(key, problem, tau=0.5, num_iters=2)
        ss.prox_sg(key, problem, sampling=ss.estimators.Importance(2, by="gradient"), num_iters=2)
        ss.ms2gd(key, problem, tau=2, num_outer=2, num_inner=2, random_inner=True)
        ss.nsync(key, problem, tau=2, num_iters=2)
        ss.prox_gd(problem, num_iters=4, momentum=True, derivative="remat", trace_objective=True)
        jax.grad(lambda p: ss.prox_gd(p, num_iters=9, tol=1e-6).value.sum())(problem)
        ss.lipschitz_report(linear, flat.shape)
