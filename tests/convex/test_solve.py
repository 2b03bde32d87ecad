"""Solvers of gated programs against an optimum found by scipy, and their certificates."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

import stochsolvers as ss
from stochsolvers import convex
from stochsolvers.convex import _algorithm, _bound, _factor, _metric, _solve, _terms

LOSSES = {
    "squares": (lambda u, y: 0.5 * np.sum((u - y) ** 2), lambda u, y: u - y),
    "logistic": (
        lambda u, y: np.sum(np.logaddexp(0, -y * u)),
        lambda u, y: -y / (1 + np.exp(y * u)),
    ),
}


def instance(rng, n=24, d=3, num=6, outputs=None):
    X = rng.standard_normal((n, d))
    gates = rng.standard_normal((d, num))
    y = np.where(rng.standard_normal((n,) if outputs is None else (outputs, n)) > 0, 1.0, -1.0)
    patterns = convex.Patterns(jnp.asarray(gates), jnp.asarray(X @ gates >= 0))
    return X, y, patterns


def oracle(X, y, mask, beta, loss="squares", smoothing=1e-9):
    """The optimum of one program with the group norm, by L-BFGS on smoothed norms, then a polished bound."""
    d, num = X.shape[1], mask.shape[1]
    A = np.concatenate([mask[:, [i]] * X for i in range(num)], 1)
    value, slope = LOSSES[loss]

    def objective(v, eps):
        V = v.reshape(num, d)
        norms = np.sqrt((V**2).sum(1) + eps)
        g = A.T @ slope(A @ v, y) + (beta * V / norms[:, None]).ravel()
        return value(A @ v, y) + beta * norms.sum(), g

    v = np.zeros(num * d)
    for eps in (1e-2, 1e-4, 1e-6, 1e-8, 1e-10, 1e-12, 1e-14):
        options = {"maxiter": 5000, "maxfun": 20000, "ftol": 1e-16, "gtol": 1e-11}
        v = minimize(objective, v, (eps,), jac=True, method="L-BFGS-B", options=options).x
    V = v.reshape(num, d)
    return value(A @ v, y) + beta * np.linalg.norm(V, axis=1).sum()


@pytest.mark.parametrize(
    "solver", [convex.KernelADMM(), convex.FISTA(), convex.LandmarkADMM(landmarks=8)]
)
def test_reaches_the_optimum_of_every_output(rng, solver):
    X, y, patterns = instance(rng, outputs=3)
    problem = convex.GatedProblem(X, jnp.asarray(y), patterns, 0.8)
    solution = convex.solve(problem, solver=solver, tol=1e-8)
    mask = np.asarray(patterns.mask, float)
    truth = np.array([oracle(X, row, mask, 0.8) for row in y])
    np.testing.assert_allclose(solution.objectives[-1], truth, rtol=1e-7)
    np.testing.assert_allclose(
        problem.objective(solution.value), solution.objectives[-1], rtol=1e-12
    )
    assert np.all(solution.certificate <= 1e-8 * solution.objectives[-1] * 1.01)
    assert np.all(solution.certificate >= solution.objectives[-1] - truth - 1e-6)
    assert np.all(solution.status == ss.solvers.Status.CONVERGED)
    assert len(set(np.asarray(solution.iterations).tolist())) > 1  # each its own stop


@pytest.fixture
def large(monkeypatch):
    """All programs are taken for large ones; no other test's have these shapes."""
    monkeypatch.setattr(_algorithm, "MANY_PRODUCTS", 0)


@pytest.mark.parametrize(
    "solver", [convex.KernelADMM(), convex.FISTA(), convex.LandmarkADMM(landmarks=8)]
)
def test_large_programs_reach_their_optima_in_fewer_iterations(rng, large, monkeypatch, solver):
    X, y, patterns = instance(rng, n=60, d=2, num=12, outputs=2)
    problem = convex.GatedProblem(X, jnp.asarray(y), patterns, 0.8)
    solution = convex.solve(problem, solver=solver, tol=1e-8)
    truth = np.array([oracle(X, row, np.asarray(patterns.mask, float), 0.8) for row in y])
    np.testing.assert_allclose(solution.objectives[-1], truth, rtol=1e-7)
    assert np.all(solution.certificate <= 1e-8 * solution.objectives[-1] * 1.01)
    assert np.all(solution.certificate >= solution.objectives[-1] - truth - 1e-6)
    again = convex.solve(problem, solver=solver, tol=1e-7, init=solution.value)
    assert np.sum(again.iterations) < 0.5 * np.sum(solution.iterations)
    monkeypatch.undo()
    jax.clear_caches()
    plain = convex.solve(problem, solver=solver, tol=1e-8)
    assert np.sum(solution.iterations) < np.sum(plain.iterations)


def test_large_programs_of_patches_and_other_losses(rng, large):
    X = rng.standard_normal((26, 3, 2))
    gates = rng.standard_normal((2, 9))
    patterns = convex.Patterns(jnp.asarray(gates), jnp.asarray(X @ gates >= 0))
    y = jnp.asarray(np.where(rng.standard_normal(26) > 0, 1.0, -1.0))
    problem = convex.GatedProblem(X, y, patterns, 0.5)
    first = convex.solve(problem, solver=convex.KernelADMM(), tol=1e-8)
    second = convex.solve(problem, solver=convex.FISTA(), tol=1e-8)
    np.testing.assert_allclose(first.objectives[-1], second.objectives[-1], rtol=2e-8)
    X, y, patterns = instance(rng, n=50, d=2, num=10)
    logistic = {"loss": ss.losses.Logistic()}
    problem = convex.GatedProblem(X, jnp.asarray(y), patterns, 0.5, **logistic)
    solution = convex.solve(problem, tol=1e-7)
    truth = oracle(X, y, np.asarray(patterns.mask, float), 0.5, "logistic")
    np.testing.assert_allclose(solution.objectives[-1], truth, rtol=1e-6)
    assert 0 <= solution.certificate <= 1.01e-7 * solution.objectives[-1]


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_a_step_in_the_metric_is_the_prox_of_the_dense_one(rng, large, scale):
    X, y, patterns = instance(rng, n=41, d=2, num=7, outputs=2)
    problem = convex.GatedProblem(scale * X, jnp.asarray(y), patterns, 0.9 * scale)
    metric = _metric.metric_of(problem)
    mask = np.asarray(patterns.mask, float)
    a, G = np.asarray(metric.direction), np.asarray(metric.root) @ np.asarray(metric.root).T
    np.testing.assert_allclose(np.linalg.norm(a), 1)
    rows = (mask @ a)[:, None] * scale * X
    np.testing.assert_allclose(G, rows.T @ rows, rtol=1e-9)
    assert abs(a @ np.linalg.svd(mask)[2][0]) > 0.999
    c = np.array([3.0, 0.5]) * scale**2
    Y, g = rng.standard_normal((2, 2, 7, 2)) / scale
    g *= scale**2
    V, value, _ = _metric.step(problem, metric, *map(jnp.asarray, (Y, g, c)), jnp.zeros((2, 2)))
    V = np.asarray(V)
    assert np.any(V == 0)
    for one in range(2):
        M = c[one] * np.eye(14) + np.kron(np.outer(a, a), G)
        slope = g[one] + (M @ (V[one] - Y[one]).ravel()).reshape(7, 2)
        norms = np.linalg.norm(V[one], axis=1, keepdims=True)
        inside = np.linalg.norm(slope, axis=1) <= 0.9 * scale * (1 + 1e-9)
        assert np.all(inside | (norms[:, 0] > 0))
        wanted = -0.9 * scale * V[one] / np.where(norms > 0, norms, 1)
        np.testing.assert_allclose(np.where(norms > 0, slope, 0), wanted, atol=1e-2 * scale)
        np.testing.assert_allclose(value[one], 0.9 * scale * norms.sum(), rtol=1e-12)
        length = (V[one] - Y[one]).ravel() @ M @ (V[one] - Y[one]).ravel()
        own = c[one] * np.sum((V[one] - Y[one]) ** 2)
        np.testing.assert_allclose(
            own + np.sum(metric.coordinates(jnp.asarray(V - Y))[one] ** 2), length, rtol=1e-9
        )


PYSCNN = 13.254362725424699
"""With pyscnn 0.0.10 in float32, the same after 1,000 and 20,000 iterations; of these arrays, in benchmarks/:

    from _convex_peer import PySCNN
    peer = PySCNN({"X": X, "y": y, "gates": gates, "mask": X @ gates >= 0, "beta": np.float32(0.8)}, 30.0)
    peer.objective(peer.run(20_000))
"""


def test_reaches_the_objective_of_an_independent_package(rng):
    X, gates = (np.float32(rng.standard_normal(shape)) for shape in ((40, 4), (4, 12)))
    y = np.where(rng.standard_normal(40) > 0, 1.0, -1.0)
    wide = X.astype(float)
    patterns = convex.Patterns(jnp.asarray(gates, float), jnp.asarray(X @ gates >= 0))
    problem = convex.GatedProblem(wide, y, patterns, float(np.float32(0.8)))
    solution = convex.solve(problem, tol=1e-8)
    V, mask = np.asarray(solution.value), X @ gates >= 0
    residual = np.einsum("np,nd,pd->n", mask, wide, V) - y
    found = 0.5 * residual @ residual + np.float32(0.8) * np.linalg.norm(V, axis=1).sum()
    assert found <= PYSCNN * (1 + 1e-8)
    assert PYSCNN - solution.certificate <= found <= PYSCNN + solution.certificate + 1e-6


def test_logistic_loss(rng):
    X, y, patterns = instance(rng)
    problem = convex.GatedProblem(X, jnp.asarray(y), patterns, 0.5, loss=ss.losses.Logistic())
    solution = convex.solve(problem, tol=1e-7)
    truth = oracle(X, y, np.asarray(patterns.mask, float), 0.5, "logistic")
    np.testing.assert_allclose(solution.objectives[-1], truth, rtol=1e-6)
    assert 0 <= solution.certificate <= 1.01e-7 * solution.objectives[-1]


@pytest.mark.parametrize("regularizer", ["feature", "l1", "l2", "nuclear", "group"])
def test_kernel_admm_and_fista_agree_on_joint_outputs(rng, regularizer):
    X, y, patterns = instance(rng, outputs=2)
    options = {"regularizer": regularizer, "joint": True}
    problem = convex.GatedProblem(X, jnp.asarray(y), patterns, 0.7, **options)
    first = convex.solve(problem, solver=convex.KernelADMM(), tol=1e-8)
    second = convex.solve(problem, solver=convex.FISTA(), tol=1e-8)
    np.testing.assert_allclose(first.objectives[-1], second.objectives[-1], rtol=2e-8)
    for solution in (first, second):
        np.testing.assert_allclose(
            problem.objective(solution.value), solution.objectives[-1], rtol=1e-10
        )
        assert solution.status == ss.solvers.Status.CONVERGED
        assert 0 <= solution.certificate <= 1.01e-8 * solution.objectives[-1]


def test_cross_entropy_of_joint_outputs(rng):
    X, _, patterns = instance(rng)
    labels = np.eye(3)[rng.integers(0, 3, len(X))].T
    options = {"loss": ss.losses.CrossEntropy(), "joint": True}
    problem = convex.GatedProblem(X, jnp.asarray(labels), patterns, 0.3, **options)
    solution = convex.solve(problem, tol=1e-6)
    assert solution.status == ss.solvers.Status.CONVERGED
    # a certificate by other code
    assert problem.certificate(solution.value) <= 1e-2 * solution.objectives[-1]
    assert 0 <= solution.certificate <= 1.01e-6 * solution.objectives[-1]


def test_ridge_is_kernel_regression(rng):
    X, y, patterns = instance(rng)
    problem = convex.GatedProblem(X, jnp.asarray(y), patterns, 0.7, regularizer="l2")
    value = convex.solve(problem, tol=1e-12).value
    D = np.asarray(patterns.mask, float)
    K = (X @ X.T) * (D @ D.T)
    r = np.linalg.solve(K + 0.7 * np.eye(len(X)), y)
    np.testing.assert_allclose(value, np.einsum("np,n,nd->pd", D, r, X), atol=1e-5)


def test_zero_from_beta_max_on(rng):
    X, y, patterns = instance(rng)
    problem = convex.GatedProblem(X, jnp.asarray(y), patterns, 1.0)
    problem = problem.with_beta(problem.beta_max() * (1 + 1e-12))
    solution = convex.solve(problem, tol=1e-10)
    assert not np.any(solution.value)
    assert solution.iterations <= 1
    assert solution.certificate <= 1e-10 * solution.objectives[-1]


def test_a_path_compiles_once_and_warm_starts_help(rng):
    X, y, patterns = instance(rng)
    problem = convex.GatedProblem(X, jnp.asarray(y), patterns, 1.0)
    betas = problem.beta_max() * 2.0 ** -np.arange(6)
    before = _solve._solve._cache_size()
    path = convex.regularization_path(problem, betas, solver=convex.FISTA(4000), tol=1e-6)
    convex.solve(
        problem.with_beta(0.3), init=path[0].value, solver=convex.FISTA(jnp.asarray(3000)), tol=1e-3
    )
    assert _solve._solve._cache_size() - before <= 2  # max_iters as a number and as an array
    for beta, solution in zip(betas, path, strict=True):
        cold = convex.solve(problem.with_beta(beta), tol=1e-6)
        np.testing.assert_allclose(solution.objectives[-1], cold.objectives[-1], rtol=2e-6)
    again = convex.solve(problem.with_beta(betas[-1]), init=path[-1].value, tol=1e-6)
    assert again.iterations <= 3


def test_the_cap_is_reported_and_progress_is_told(rng):
    X, y, patterns = instance(rng)
    problem = convex.GatedProblem(X, jnp.asarray(y), patterns, 0.05)
    seen = []
    solver = convex.FISTA(5)
    solution = convex.solve(problem, solver=solver, tol=1e-9, progress=lambda *a: seen.append(a))
    jax.effects_barrier()
    assert solution.status == ss.solvers.Status.MAX_ITERS
    assert solution.iterations == 5
    assert sorted(int(k) for k, _, _ in seen) == [0, 1, 2, 3, 4]
    truth = oracle(X, y, np.asarray(patterns.mask, float), 0.05)
    assert solution.certificate >= solution.objectives[-1] - truth


@pytest.mark.optimized
def test_certificates_in_float32_are_never_below_the_truth(rng):
    X, y, patterns = instance(rng, n=40, d=4, num=8)
    truth = oracle(X, y, np.asarray(patterns.mask, float), 0.2)
    X, y = X.astype(np.float32), y.astype(np.float32)
    patterns = convex.Patterns(patterns.gates.astype(jnp.float32), patterns.mask)
    problem = convex.GatedProblem(X, jnp.asarray(y), patterns, np.float32(0.2))
    solve = jax.jit(lambda p, tol: convex.solve(p, tol=tol))
    for tol in (1e-2, 1e-4, 1e-6):
        for solution in (convex.solve(problem, tol=tol), solve(problem, tol)):
            V = np.asarray(solution.value, float)
            A = np.concatenate([np.asarray(problem.patterns.mask)[:, [i]] * X for i in range(8)], 1)
            own = 0.5 * np.sum((A.astype(float) @ V.ravel() - y) ** 2)
            own += float(np.float32(0.2)) * np.linalg.norm(V, axis=1).sum()
            assert own - truth <= solution.certificate + 1e-6
            assert solution.certificate <= (tol + 1e-3) * own


def test_patches_are_summed(rng):
    X = rng.standard_normal((12, 3, 2))
    gates = rng.standard_normal((2, 4))
    patterns = convex.Patterns(jnp.asarray(gates), jnp.asarray(X @ gates >= 0))
    y = np.where(rng.standard_normal(12) > 0, 1.0, -1.0)
    problem = convex.GatedProblem(X, jnp.asarray(y), patterns, 0.5)
    first = convex.solve(problem, solver=convex.KernelADMM(), tol=1e-8)
    second = convex.solve(problem, solver=convex.FISTA(), tol=1e-8)
    np.testing.assert_allclose(first.objectives[-1], second.objectives[-1], rtol=2e-8)
    assert 0 <= first.certificate <= 1.01e-8 * first.objectives[-1]


def test_the_bound_within_jit_is_that_of_the_host(rng):
    X, y, patterns = instance(rng)
    problem = convex.GatedProblem(X, jnp.asarray(y), patterns, 0.5)
    V, s = rng.standard_normal(problem.shape), rng.standard_normal(y.shape)
    host = _bound.certificate(problem, V, s)
    np.testing.assert_allclose(
        _terms.certificate(problem, jnp.asarray(V), jnp.asarray(s)), host, rtol=1e-9
    )


@pytest.mark.parametrize("large", [1024, 4])  # of a block, whose halves are inverted one by one
def test_the_blocked_factor_solves(rng, monkeypatch, large):
    monkeypatch.setattr(_factor, "BLOCK", large)
    M = rng.standard_normal((23, 23))
    M = M @ M.T
    b = rng.standard_normal((2, 23))
    factor = _factor.factor(jnp.asarray(M), 0.3, block=8)
    wanted = np.linalg.solve(M + 0.3 * np.eye(23), b.T).T
    np.testing.assert_allclose(factor.solve(jnp.asarray(b)), wanted, rtol=1e-9)
    np.testing.assert_allclose(factor.solve(jnp.asarray(b[0])), wanted[0], rtol=1e-9)


def test_what_cannot_be_solved_is_refused(rng):
    X, y, patterns = instance(rng)
    problem = convex.GatedProblem(X, jnp.asarray(y), patterns, 0.5)
    logistic = convex.GatedProblem(X, jnp.asarray(y), patterns, 0.5, loss=ss.losses.Logistic())
    prior = ss.prox.NonNegative()
    other = convex.GatedProblem(X, jnp.asarray(y), patterns, 0.5, regularizer=prior)
    for wrong, call in {
        "regularizer of convex.solve.*ss.ProxGD": lambda: convex.solve(other),
        "problem of convex.solve": lambda: convex.solve("no problem"),
        "solver of convex.solve": lambda: convex.solve(problem, solver=ss.ProxGD(3)),
        "loss of KernelADMM": lambda: convex.solve(logistic, solver=convex.KernelADMM()),
        "problem of ConeADMM": lambda: convex.solve(problem, solver=convex.ConeADMM()),
        "shape of init": lambda: convex.solve(problem, init=np.zeros(3)),
        "tol": lambda: convex.solve(problem, tol=-1.0),
        "max_iters": lambda: convex.FISTA(-1),
    }.items():
        with pytest.raises(ValueError, match=wrong):
            call()


def test_what_round_off_keeps_from_its_tolerance_ends_early(rng, monkeypatch):
    monkeypatch.setattr(_algorithm, "STALLED", 30)
    X, y, patterns = instance(rng)
    X, y = jnp.asarray(X, jnp.float32), jnp.asarray(y, jnp.float32)
    patterns = convex.Patterns(patterns.gates.astype(jnp.float32), patterns.mask)
    problem = convex.GatedProblem(X, y, patterns, np.float32(0.01))
    seen = []
    solution = convex.solve(problem, tol=1e-9, progress=lambda k, *_: seen.append(int(k)))
    jax.effects_barrier()
    assert solution.iterations < 5000
    assert solution.status == ss.solvers.Status.MAX_ITERS
    assert solution.certificate > 1e-9 * solution.objectives[-1]
    assert sorted(seen) == list(range(int(solution.iterations)))


def test_fista_ends_at_round_off(rng, monkeypatch):
    monkeypatch.setattr(_algorithm, "STALLED", 50)
    X, y, patterns = instance(rng)
    X, y = jnp.asarray(X, jnp.float32), jnp.asarray(y, jnp.float32)
    patterns = convex.Patterns(patterns.gates.astype(jnp.float32), patterns.mask)
    loss = ss.losses.Logistic()
    problem = convex.GatedProblem(X, y, patterns, np.float32(0.5), loss=loss)
    solution = convex.solve(problem, solver=convex.FISTA(50_000), tol=1e-12)
    assert solution.iterations < 10_000
    assert solution.status == ss.solvers.Status.MAX_ITERS
    assert solution.certificate <= 1e-4 * solution.objectives[-1]


def test_a_known_problem_within_jit(rng):
    X, y, patterns = instance(rng)
    problem = convex.GatedProblem(X, jnp.asarray(y), patterns, 0.5)
    wanted = convex.solve(problem, tol=1e-8)
    solution = jax.jit(lambda: convex.solve(problem, tol=1e-8))()
    np.testing.assert_allclose(solution.objectives, wanted.objectives, rtol=1e-12)
    assert 0 <= solution.certificate <= 1.01e-8 * solution.objectives[-1]


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from stochsolvers import convex
from stochsolvers.convex import _algorithm
jax.config.update("jax_enable_x64", True)
rng = np.random.default_rng(0)
X, gates, y = rng.standard_normal((32, 3)), rng.standard_normal((3, 5)), rng.standard_normal(32)

def put(array, *spec):
    return jax.device_put(jnp.asarray(array), NamedSharding(mesh, P(*spec)))

values = {}
for kind in ("Auto", "Explicit"):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(getattr(jax.sharding.AxisType, kind),))
    with jax.set_mesh(mesh):
        for split, few in ((False, 0), (False, 2**25), (True, 2**25), (True, 0)):
            if kind == "Explicit" and not split or kind == "Auto" and split and not few:
                continue
            _algorithm.MANY_PRODUCTS = few
            jax.clear_caches()
            one = "data" if split else None
            patterns = convex.Patterns(put(gates), put(X @ gates >= 0, one))
            problem = convex.GatedProblem(put(X, one), put(y, one), patterns, 0.4)
            for solver in (convex.KernelADMM(), convex.FISTA()):
                solution = convex.solve(problem, solver=solver, tol=1e-9)
                assert solution.certificate <= 1.01e-9 * solution.objectives[-1]
                value, of = np.asarray(solution.value), f"{solver}, {few}"
                np.testing.assert_allclose(value, values.setdefault(of, value), atol=1e-9)
            bounds = problem.beta_max(), problem.dual_value(solution.value), problem.certificate(value)
            np.testing.assert_allclose(bounds, values.setdefault(few, bounds), 1e-9, 1e-12)
"""


def test_data_over_eight_devices_gives_the_same():
    flags = "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")
    environment = {**os.environ, "XLA_FLAGS": flags}
    subprocess.run([sys.executable, "-c", SHARDED], env=environment, check=True)
