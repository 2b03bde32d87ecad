"""What holds for every algorithm alike beside the contract of `test_contracts.py`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stochsolvers as ss

KEY = jax.random.key(3)

SOLVERS = {
    "prox_gd": lambda key, p, s, **kw: ss.prox_gd(p, step_size=s, num_iters=4, **kw),
    "fista": lambda key, p, s, **kw: ss.prox_gd(p, step_size=s, num_iters=4, momentum=True, **kw),
    "prox_sg": lambda key, p, s, **kw: ss.prox_sg(key, p, tau=2, step_size=s, num_iters=4, **kw),
    "prox_sg importance": lambda key, p, s, **kw: ss.prox_sg(
        key, p, sampling=ss.estimators.Importance(2), step_size=s, num_iters=4, **kw
    ),
    "ms2gd": lambda key, p, s, **kw: ss.ms2gd(
        key, p, tau=2, step_size=s, num_outer=2, num_inner=2, **kw
    ),
    "ms2gd random": lambda key, p, s, **kw: ss.ms2gd(
        key, p, tau=2, step_size=s, num_outer=2, num_inner=2, random_inner=True, **kw
    ),
    "nsync": lambda key, p, s, **kw: ss.nsync(key, p, tau=2, step_size=s, num_iters=4, **kw),
}
CONFIGURATIONS = {
    "ProxGD": ss.ProxGD(4),
    "ProxSG": ss.ProxSG(0.5, 4),
    "MS2GD": ss.MS2GD(0.5, 2, 2),
    "NSync": ss.NSync(0.5, 4, step_size=0.1),
}
every_solver = pytest.mark.parametrize("solve", SOLVERS.values(), ids=SOLVERS.keys())
every_configuration = pytest.mark.parametrize(
    "configuration", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys()
)


def build(kernel, x, bias):
    return ss.LayerProblem(ss.Dense(kernel), x, bias=bias, prior=ss.prox.L1(0.1), ridge=0.01)


@pytest.fixture
def arrays(rng):
    return tuple(jnp.asarray(rng.normal(size=shape)) for shape in ((4, 3), (5, 4), (3,)))


@every_solver
def test_traces_once_for_a_path_of_steps_weights_inputs_and_keys(solve, arrays):
    traces = 0

    @jax.jit
    def run(key, step, kernel, x, bias, gamma, ridge):
        nonlocal traces
        traces += 1
        prior = ss.prox.L1(gamma)
        problem = ss.LayerProblem(ss.Dense(kernel), x, bias=bias, prior=prior, ridge=ridge)
        return solve(key, problem, step).value

    kernel, x, bias = arrays
    for i in range(3):
        scale = 1.0 + i
        run(
            jax.random.key(i), 0.05 * scale, kernel * scale, x * scale, bias * scale, 0.1 * scale,
            0.01 * scale,
        )  # fmt: skip
    assert traces == 1


def test_traces_once_for_a_path_of_dropout_rates(arrays):
    traces = 0

    @jax.jit
    def run(tau):
        nonlocal traces
        traces += 1
        problem = build(*arrays)
        solutions = (
            ss.prox_sg(KEY, problem, tau=tau, step_size=0.05, num_iters=4),
            ss.ms2gd(KEY, problem, tau=tau, step_size=0.05, num_outer=2, num_inner=2),
            ss.nsync(KEY, problem, tau=tau, step_size=0.05, num_iters=4),
        )
        return [solution.value for solution in solutions]

    problem = build(*arrays)
    for tau in (1, 2, 3):
        sg, vr, cd = run(jnp.asarray(tau))
        fixed = ss.prox_sg(KEY, problem, tau=tau, step_size=0.05, num_iters=4)
        np.testing.assert_allclose(sg, fixed.value, rtol=1e-12)
        fixed = ss.ms2gd(KEY, problem, tau=tau, step_size=0.05, num_outer=2, num_inner=2)
        np.testing.assert_allclose(vr, fixed.value, rtol=1e-12)
        fixed = ss.nsync(KEY, problem, tau=tau, step_size=0.05, num_iters=4)
        np.testing.assert_allclose(cd, fixed.value, rtol=1e-12)
    assert traces == 1


@every_solver
def test_problems_pass_through_jit_as_arguments(solve, arrays):
    traces = 0

    @jax.jit
    def run(key, problem, step):
        nonlocal traces
        traces += 1
        return solve(key, problem, step)

    first = run(KEY, build(*arrays), ss.exponential_decay(0.05, 0.9))
    run(KEY, build(*(2 * a for a in arrays)), ss.exponential_decay(0.01, 0.5))
    assert traces == 1
    eager = solve(KEY, build(*arrays), ss.exponential_decay(0.05, 0.9))
    np.testing.assert_allclose(first.value, eager.value, rtol=1e-12)


@every_solver
@pytest.mark.parametrize("step", [0.0, -1.0])
def test_non_positive_steps_raise(solve, arrays, step):
    with pytest.raises(ValueError, match="step_size: expected a number > 0"):
        solve(KEY, build(*arrays), step)


@pytest.mark.optimized
def test_diagnostics_cost_nothing_when_they_are_not_used(arrays):
    """Compiled with residuals dropped, the solver does the work of a bare loop."""
    kernel, x, bias = arrays

    def library(kernel, x, bias):
        start = jnp.zeros(
            (5, 3)
        )  # a point of one's own, so that no iteration stands outside the loop
        problem = build(kernel, x, bias)
        options = {"step_size": 0.05, "num_iters": 50, "form": "literal"}
        return ss.prox_gd(problem, init=start, **options).value

    def bare(kernel, x, bias):
        def body(z, _):
            v = z - 0.05 * ((z @ kernel.T - x) @ kernel - bias[None] + 0.01 * z)
            return jax.nn.relu(v - 0.005) - jax.nn.relu(-v - 0.005), None

        return jax.lax.scan(body, jnp.zeros((5, 3)), None, length=50)[0]

    cost = [jax.jit(f).lower(kernel, x, bias).compile().cost_analysis() for f in (library, bare)]
    assert cost[0]["flops"] <= cost[1]["flops"] * 1.1


@every_configuration
def test_configurations_are_hashable_values(configuration):
    assert hash(configuration) == hash(configuration)
    assert configuration == type(configuration)(**vars(configuration))


def test_a_prior_of_ones_own(arrays):
    @ss.value_object
    class Absolute(ss.Prior):  # g(u) = |u|, written again
        def _value(self, u):
            return jnp.sum(jnp.abs(u))

        def _prox(self, v, step):
            return jnp.sign(v) * jnp.maximum(jnp.abs(v) - step, 0)

        def _conjugate(self, w):
            return jnp.where(jnp.all(jnp.abs(w) <= 1), 0.0, jnp.inf)

        def _dual_projection(self, w, margin):
            return jnp.clip(w, -(1 - margin), 1 - margin)

    kernel, x, bias = arrays
    ours, theirs = (
        ss.LayerProblem(ss.Dense(kernel), x, bias=bias, prior=prior, ridge=0.1)
        for prior in (Absolute(), ss.prox.L1(1.0))
    )
    z = ss.prox_gd(ours, num_iters=20).value
    np.testing.assert_allclose(z, ss.prox_gd(theirs, num_iters=20).value)
    np.testing.assert_allclose(ours.certificate(z), theirs.certificate(z))


def test_integers_and_numpy_arrays_are_welcome(arrays):
    kernel, x, _ = (np.asarray(a, np.float32) for a in arrays)
    with jax.enable_x64(False):
        problem = ss.LayerProblem(
            ss.Dense(kernel.astype(np.float64)),
            x.astype(np.float64),
            prior=ss.prox.Box(0, 6),
            ridge=0,
        )
        assert problem.dtype == jnp.float32
        jax.grad(lambda p: ss.prox_gd(p, step_size=0.1, num_iters=2).value.sum())(problem)
        restricted = jax.jit(lambda i: ss.Dense(kernel).restrict(i).kernel)(jnp.arange(2))
    np.testing.assert_array_equal(restricted, kernel[:2])


def test_values_with_arrays_compare_by_contents():
    ones = [ss.prox.L1(jnp.ones(n)) for n in (1, 3, 4)]
    assert ones[1] != ones[2]
    assert ones[0] != ones[2]
    assert ones[2] == ss.prox.L1(jnp.ones(4))


def test_a_count_is_not_a_fraction():
    assert ss.ProxSG(1, 4) != ss.ProxSG(1.0, 4)
    assert ss.estimators.TauNice(1) != ss.estimators.TauNice(1.0)
    structures = [jax.tree.structure(ss.estimators.TauNice(tau)) for tau in (1, 1.0)]
    assert structures[0] != structures[1]


@every_configuration
def test_configurations_run_the_functions(configuration, arrays):
    problem = build(*arrays)
    solution = configuration.solve(KEY, problem)
    assert solution.value.shape == (5, 3)
    deterministic = configuration.solve(None, problem, deterministic=True)
    full = ss.prox_gd(problem, num_iters=4, step_size=_deterministic_step(configuration))
    np.testing.assert_allclose(deterministic.value, full.value, rtol=1e-10)


def _deterministic_step(configuration):
    if isinstance(configuration, ss.ProxSG):
        return ss.InverseLipschitz(decay=configuration.decay)
    return configuration.step_size


def test_cached_lipschitz_constant_sets_the_step(arrays):
    problem = build(*arrays)
    cached = ss.ProxGD(4).solve(None, problem, step_constant=jnp.asarray(10.0))
    plain = ss.prox_gd(problem, step_size=1 / 10.01, num_iters=4)
    np.testing.assert_allclose(cached.value, plain.value, rtol=1e-12)


@pytest.mark.parametrize("tau", [0, 5, -1, 0.0, 1.5, True, "half", np.int64(9)])
def test_tau_outside_1_to_n1_raises(arrays, tau):
    with pytest.raises(ValueError, match="tau: expected"):
        ss.prox_sg(KEY, build(*arrays), tau=tau, step_size=0.1, num_iters=2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: ss.prox_gd(p, num_iters=0), "num_iters: expected an integer >= 1, got 0"),
        (lambda p: ss.prox_gd(p, num_iters=2.0), "num_iters: expected an integer"),
        (lambda p: ss.prox_sg(KEY, p, num_iters=2), "tau, sampling: expected exactly one"),
        (
            lambda p: ss.ms2gd(
                KEY, p, sampling=ss.estimators.OutputCoordinates(1), num_outer=1, num_inner=1
            ),
            "sampling: expected an estimator that samples input features",
        ),
        (
            lambda p: ss.prox_gd(p, step_size=ss.InverseSeparable(), num_iters=1),
            "InverseSeparable: expected OutputCoordinates",
        ),
        (lambda p: ss.exponential_decay(0.0, 0.5), "initial step size: expected a number > 0"),
        (lambda p: ss.ProxSG(0.5, 4).solve(None, p), "key: expected a random key"),
        (lambda p: ss.nsync(KEY, p, tau=jnp.array(0), num_iters=2), "tau: expected an integer"),
        (
            lambda p: ss.prox_sg(
                KEY, p, sampling=ss.estimators.TauNice(jnp.array(50)), num_iters=2
            ),
            "tau: expected an integer in 1..4",
        ),
        (lambda p: ss.prox_gd(p, step_size=jnp.ones(3), num_iters=1), "shape of step_size"),
        (lambda p: ss.ProxSG(0.5, 4, step_size=0.1, decay=0.5), "decay: expected 1.0 where"),
        (lambda p: ss.InverseSeparable(-1.0), "scale: expected a number > 0"),
        (
            lambda p: ss.ProxSG(0, 4),
            r"tau: expected an integer >= 1 or a fraction in \(0, 1\], got 0",
        ),
        (lambda p: ss.ProxSG(0.5, 0), "num_iters: expected an integer >= 1"),
        (lambda p: ss.nsync(KEY, p, tau=2, step_size=jnp.ones(2), num_iters=1), "shape of step"),
        (
            lambda p: ss.nsync(
                KEY,
                ss.LayerProblem(p.linear_map, p.inputs, prior=ss.prox.GroupL2(1.0)),
                tau=1,
                num_iters=1,
            ),
            "prior of nsync: expected a separable prior, got GroupL2",
        ),
    ],
)
def test_errors_say_what_was_expected(arrays, call, message):
    problem = build(*arrays)
    with pytest.raises(ValueError, match=message):
        call(problem)


def test_masks_are_the_same_when_the_batch_is_sharded(arrays):
    """Placement must not change the draws; the whole check on several devices is elsewhere."""
    kernel, x, bias = arrays
    run = functools.partial(ss.prox_sg, KEY, tau=2, step_size=0.05, num_iters=4)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    placed = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    sharded = jax.jit(lambda k, x, b: run(build(k, x, b)).value)(kernel, placed, bias)
    np.testing.assert_allclose(sharded, run(build(*arrays)).value, rtol=1e-12)
