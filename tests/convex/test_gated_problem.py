"""The gated program: its regularisers and losses, dual values, gaps and the largest useful β."""

import functools
import math

import convex_oracles as oracles
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import stochsolvers as ss
from stochsolvers.convex import (
    FISTA,
    GatedMap,
    GatedProblem,
    KernelADMM,
    Patterns,
    sample_patterns,
    solve,
)

BETA, N, D, C = 0.6, 14, 3, 3


def norms(kind, V, *, joint):
    """The groups' norms of V, shape (P, d) or (C, P, d)."""
    V = V if joint else V[None]
    if kind == "group":
        return np.sqrt(np.sum(V**2, axis=(0, 2)))
    if kind == "feature":
        return np.sqrt(np.sum(V**2, axis=(0, 1)))
    if kind == "l1":
        return np.abs(V).ravel()
    return np.linalg.svd(np.moveaxis(V, 0, -1), compute_uv=False).ravel()


def shrink(kind, V, threshold, *, joint):
    W = V if joint else V[None]
    if kind == "nuclear":
        left, sigma, right = np.linalg.svd(np.moveaxis(W, 0, -1), full_matrices=False)
        return np.moveaxis(left * np.maximum(sigma - threshold, 0)[:, None] @ right, -1, 0)
    axes = {"group": (0, 2), "feature": (0, 1), "l1": ()}[kind]
    sizes = np.sqrt(np.sum(W**2, axis=axes, keepdims=True)) if axes else np.abs(W)
    W = W * np.maximum(1 - threshold / np.maximum(sizes, 1e-300), 0)
    return W if joint else W[0]


def loss_of(loss, y):
    """Value and slope in the predictions, shape (n,) or (C, n)."""

    def squares(u):
        return 0.5 * np.sum((u - y) ** 2), u - y

    def logistic(u):
        return np.sum(np.logaddexp(0, -y * u)), -y * scipy.special.expit(-y * u)

    def entropy(u):
        value = np.sum(scipy.special.logsumexp(u, axis=0)) - np.sum(y * u)
        return value, scipy.special.softmax(u, axis=0) - y

    return {ss.losses.Squares: squares, ss.losses.Logistic: logistic}.get(type(loss), entropy)


def data(rng, case):
    X = rng.normal(size=(N, D))
    y = rng.normal(size=(C, N))
    if case.startswith("cross-entropy"):
        y = np.eye(C)[:, np.arange(N) % C]
    if "joint" not in case and case != "one-vs-rest":
        y = y[0]
    return X, np.sign(y) if case == "logistic" else y


CASES = {  # regulariser, loss, joint
    "group": ("group", ss.losses.Squares(), False),
    "feature": ("feature", ss.losses.Squares(), False),
    "l1": ("l1", ss.losses.Squares(), False),
    "logistic": ("group", ss.losses.Logistic(), False),
    "joint group": ("group", ss.losses.Squares(), True),
    "joint nuclear": ("nuclear", ss.losses.Squares(), True),
    "cross-entropy joint feature": ("feature", ss.losses.CrossEntropy(), True),
}


@jax.jit
def values(problem, V):
    """Objective, lower bound, certificate and neurons of several points."""

    def of_one(v):
        parts = problem.objective(v), problem.dual_value(v), problem.certificate(v)
        return jnp.stack([*parts, problem.num_active(v).astype(parts[0].dtype)])

    return jax.lax.map(of_one, V)


def instance(rng, case):
    kind, loss, joint = CASES[case]
    X, y = data(rng, case)
    patterns = sample_patterns(jax.random.key(0), X, 6)
    problem = GatedProblem(X, y, patterns, BETA, loss=loss, regularizer=kind, joint=joint)
    matrix, fit = oracles.gated_matrix(X, patterns.mask), loss_of(loss, y)

    def value_and_slope(V):
        flat = V.reshape(*V.shape[:-2], -1)
        value, r = fit(flat @ matrix.T)
        return value, (r @ matrix).reshape(V.shape)

    return problem, matrix, value_and_slope


@pytest.mark.parametrize("case", CASES)
def test_optimum_dual_value_and_gap(rng, case):
    """Against proximal gradient descent in numpy: P = optimum = D, and no gap below the truth."""
    kind, loss, joint = CASES[case]
    problem, matrix, fit = instance(rng, case)
    measure = functools.partial(norms, kind, joint=joint)
    best, optimum = oracles.proximal_optimum(
        matrix,
        fit,
        lambda V: BETA * measure(V).sum(),
        lambda V, step: shrink(kind, V, step * BETA, joint=joint),
        problem.shape,
        loss.smoothness,
    )
    noise = rng.normal(size=(5, *problem.shape)) * 10.0 ** -np.arange(5.0)[:, None, None].reshape(
        5, *(1,) * len(problem.shape)
    )
    points = np.concatenate([best[None], best + noise, np.zeros((1, *problem.shape))])
    objective, dual, gap, active = np.asarray(values(problem, jnp.asarray(points))).T
    expected = [fit(V)[0] + BETA * measure(V).sum() for V in points]
    np.testing.assert_allclose(objective, expected, rtol=1e-13)
    np.testing.assert_allclose(dual[0], optimum, rtol=1e-9)
    assert np.all(dual <= optimum * (1 + 1e-12))
    assert np.all(gap >= objective - optimum)
    np.testing.assert_allclose(gap, objective - dual, rtol=1e-6, atol=1e-10 * optimum)
    sizes = np.linalg.norm(best if joint else best[None], axis=(0, 2))
    assert active[0] == np.sum(sizes > 0)
    assert active[-1] == 0


@pytest.mark.parametrize("case", CASES)
def test_zero_is_a_solution_from_beta_max_on(rng, case):
    """R°(∇F(0)) by brute force over many directions V with R(V) = 1, and by subgradients."""
    kind, _, joint = CASES[case]
    problem, _, fit = instance(rng, case)
    slope = fit(np.zeros(problem.shape))[1]
    largest = float(problem.beta_max())
    directions = [*rng.normal(size=(50, *problem.shape)), slope]
    for k, _ in enumerate(norms(kind, slope, joint=joint)):
        if kind == "group":
            directions.append(slope * (np.arange(slope.shape[-2]) == k)[:, None])
        elif kind == "feature":
            directions.append(slope * (np.arange(slope.shape[-1]) == k))
    if kind == "l1":
        directions.append(np.where(np.abs(slope) == np.abs(slope).max(), slope, 0))
    if kind == "nuclear":
        for i in range(slope.shape[1]):
            left, sigma, right = np.linalg.svd(slope[:, i], full_matrices=False)
            one = np.zeros_like(slope)
            one[:, i] = sigma[0] * np.outer(left[:, 0], right[0])
            directions.append(one)
    ratios = [np.sum(slope * V) / norms(kind, V, joint=joint).sum() for V in directions]
    np.testing.assert_allclose(max(ratios), largest, rtol=1e-12)
    certified = values(problem.with_beta(largest), jnp.zeros((1, *problem.shape)))[0, 2]
    assert 0 <= certified <= 1e-9 * fit(np.zeros(problem.shape))[0]


def test_one_versus_rest_is_a_batch_of_programs(rng):
    X, y = data(rng, "one-vs-rest")
    patterns = sample_patterns(jax.random.key(0), X, 6)
    problem = GatedProblem(X, y, patterns, BETA)
    V = rng.normal(size=problem.shape)
    assert problem.batch_shape == (C,)
    each = [GatedProblem(X, row, patterns, BETA) for row in y]
    for method in ("objective", "dual_value", "certificate"):
        alone = [getattr(p, method)(v) for p, v in zip(each, V, strict=True)]
        np.testing.assert_allclose(getattr(problem, method)(V), alone, rtol=1e-12)
    np.testing.assert_allclose(problem.beta_max(), [p.beta_max() for p in each], rtol=1e-14)


def test_ridge_and_priors_of_ones_own(rng):
    """ "l2" and a `Prior` have the objective and the certificates of `LayerProblem`."""
    X, y = data(rng, "group")
    patterns = sample_patterns(jax.random.key(0), X, 4)
    A = oracles.gated_matrix(X, patterns.mask)
    ridge = GatedProblem(X, y, patterns, BETA, regularizer="l2")
    best = np.linalg.solve(A.T @ A + BETA * np.eye(A.shape[1]), A.T @ y).reshape(ridge.shape)
    optimum = 0.5 * np.sum((A @ best.ravel() - y) ** 2) + 0.5 * BETA * np.sum(best**2)
    np.testing.assert_allclose(ridge.objective(best), optimum, rtol=1e-12)
    np.testing.assert_allclose(ridge.dual_value(best), optimum, rtol=1e-9)
    assert np.isinf(ridge.beta_max())
    elastic = ss.prox.ElasticNet(0.5, 2.0)
    mixed = GatedProblem(X, y, patterns, BETA, regularizer=elastic)
    extra = BETA * np.sum(0.5 * np.abs(best) + best**2)
    expected = 0.5 * np.sum((A @ best.ravel() - y) ** 2) + extra
    np.testing.assert_allclose(mixed.objective(best), expected, rtol=1e-12)
    again = mixed.with_beta(2 * BETA).objective(best)
    np.testing.assert_allclose(again, expected + extra, rtol=1e-12)
    with pytest.raises(ValueError, match=r"regularizer of beta_max: expected one of .*, got"):
        mixed.beta_max()


def test_a_path_of_beta_compiles_once(rng):
    problem, _, _ = instance(rng, "group")
    traces = []

    @jax.jit
    def objective(problem, V):
        traces.append(1)
        return problem.objective(V)

    V = jnp.ones(problem.shape)
    plain = float(objective(problem.with_beta(1e-9), V))
    size = np.sum(np.linalg.norm(V, axis=-1))
    for beta in (0.3, 2.0):
        value = objective(problem.with_beta(beta), V)
        np.testing.assert_allclose(value, plain + beta * size, rtol=1e-7)
        assert problem.with_beta(beta).beta == beta
    assert len(traces) == 1


def test_predictions_of_other_data(rng):
    problem, _, _ = instance(rng, "joint group")
    V, new = rng.normal(size=problem.shape), rng.normal(size=(5, D))
    gates = np.asarray(problem.patterns.gates)
    expected = np.einsum("np,nd,cpd->cn", new @ gates >= 0, new, V)
    np.testing.assert_allclose(problem.predict(V, new), expected, atol=1e-13)
    np.testing.assert_allclose(problem.predict(V, problem.X), problem.linear_map.adjoint(V))
    np.testing.assert_array_equal(problem.predict(V), problem.linear_map.adjoint(V))


def test_solvers_of_the_library(rng):
    """FISTA stops at a certified gap; SGD samples data and comes near."""
    problem, _, _ = instance(rng, "group")
    fista = ss.ProxGD(3000, momentum=True, restart=True, gap_tol=1e-8)
    solution = fista.solve(None, problem, certify=True)
    assert solution.certificate <= 1e-8
    best = float(problem.objective(solution.value))
    sampling = ss.estimators.TauNice(4, shared=True)
    solver = ss.ProxSG(None, 400, decay=0.99, sampling=sampling)
    near = solver.solve(jax.random.key(0), problem).value
    assert best - 1e-8 <= problem.objective(near) <= 1.1 * best


def test_single_precision_certificates_hold(rng):
    """Gaps of float32 arrays against the optimum of the same numbers in float64."""
    X, y = (np.float64(np.float32(a)) for a in data(rng, "group"))
    patterns = sample_patterns(jax.random.key(0), X, 6)
    beta = float(np.float32(BETA))
    problem, matrix = GatedProblem(X, y, patterns, beta), oracles.gated_matrix(X, patterns.mask)
    best, optimum = oracles.proximal_optimum(
        matrix,
        lambda V: (
            0.5 * np.sum((matrix @ V.ravel() - y) ** 2),
            (matrix.T @ (matrix @ V.ravel() - y)).reshape(V.shape),
        ),
        lambda V: beta * np.linalg.norm(V, axis=1).sum(),
        lambda V, step: shrink("group", V, step * beta, joint=False),
        problem.shape,
        1.0,
    )
    scales = 10.0 ** -np.arange(8)[:, None, None]
    points = np.float32(best + rng.normal(size=(8, *problem.shape)) * scales)
    gates = Patterns(np.float32(patterns.gates), patterns.mask)
    narrow = GatedProblem(np.float32(X), np.float32(y), gates, np.float32(beta))
    gaps = values(narrow, jnp.asarray(points))[:, 2]
    assert gaps.dtype == jnp.float32
    truth = [float(problem.objective(np.float64(V))) - optimum for V in points]
    assert np.all(np.asarray(gaps, np.float64) >= truth)
    assert gaps[-1] <= 1e-4 * optimum


@ss.value_object
class Short(GatedMap):
    """A(r) too near zero by 4 log2(2n) eps Σ|terms|, the most that certificates take products to be off."""

    def __call__(self, x):
        image = super().__call__(x)
        sizes = GatedMap(jnp.abs(self.X), self.patterns)(jnp.abs(x))
        off = 4 * math.log2(2 * len(self.X)) * jnp.finfo(x.dtype).eps * sizes
        return jnp.sign(image) * jnp.maximum(jnp.abs(image) - off, 0)


def test_the_round_off_of_the_dual_norm_is_counted():
    """The products of one neuron cancel; its norm, as computed, allows a dual point that is none.

    min ½(v_1 − 2)² + ½ Σ_j (v_2 − y_j)² + β(|v_1| + |v_2|) at v = (2 − β, 0), where |Σ_j y_j| > β: the gap is
    (|Σ_j y_j| − β)²/(2m) for m data y_j.
    """
    m, beta = 1024, 1.0
    off = 4 * np.log2(2 * (m + 1)) * np.finfo(np.float32).eps * 1000 * m
    y = np.float32(np.append(2.0, 1000 * (-1.0) ** np.arange(m)))
    y[1] += beta + 0.9 * off
    mask = np.arange(m + 1)[:, None] > 0
    patterns = Patterns(np.ones((1, 2), np.float32), np.concatenate([~mask, mask], 1))
    problem = GatedProblem(np.ones((m + 1, 1), np.float32), y, patterns, np.float32(beta))
    rounded = Short(problem.X, problem.patterns)
    object.__setattr__(problem, "linear_map", rounded)
    V = np.float32([[2 - beta], [0.0]])
    truth = (abs(np.sum(np.float64(y[1:]))) - beta) ** 2 / (2 * m)
    assert truth > 0.01
    image = np.abs(np.asarray(rounded(jnp.asarray(y) - problem.linear_map.adjoint(V))))
    assert np.all(image <= beta)  # as if s = 1 were feasible
    assert truth <= problem.certificate(V) < np.inf


@pytest.mark.parametrize("solver", [KernelADMM(), FISTA()], ids=["KernelADMM", "FISTA"])
def test_solutions_do_not_depend_on_units(rng, solver):
    X, y = np.float32(rng.normal(size=(6, 3))), np.float32(rng.normal(size=6))
    patterns = sample_patterns(jax.random.key(0), X, 5)
    solved = jax.jit(
        lambda s: solve(GatedProblem(s * X, s * y, patterns, 0.3 * s**2), solver=solver, tol=1e-3)
    )
    for scale in (2.0**33, 2.0**-33):
        solution = solved(jnp.float32(scale))
        assert solution.status == ss.Status.CONVERGED
        assert solution.certificate <= 2e-3 * solution.objectives[0]


@pytest.mark.parametrize("kind", ["group", "feature", "l1", "nuclear"])
def test_gaps_do_not_depend_on_units(rng, kind):
    """That of (sX, sy, s²β) is s² times that of (X, y, β), also where squares leave the range of float32."""
    joint = kind == "nuclear"
    X = np.float32(rng.normal(size=(6, 3)))
    y = np.float32(rng.normal(size=(2, 6) if joint else 6))
    patterns = sample_patterns(jax.random.key(0), X, 5)
    V = np.float32(0.1 * rng.normal(size=(2, 5, 3) if joint else (5, 3)))[..., : patterns.num, :]

    @jax.jit
    def values(scale):
        options = {"regularizer": kind, "joint": joint}
        problem = GatedProblem(scale * X, scale * y, patterns, 0.3 * scale**2, **options)
        solved = solve(problem, tol=1e-3)
        known = (
            problem.certificate(V),
            problem.dual_value(V),
            problem.beta_max(),
            solved.certificate,
        )
        return jnp.stack(known) / scale**2, solved.status

    expected, status = values(jnp.float32(1.0))
    assert status == ss.Status.CONVERGED
    for scale in (2.0**33, 2.0**-33):
        found, status = values(jnp.float32(scale))
        np.testing.assert_allclose(found[:3], expected[:3], rtol=1e-4)
        if status == ss.Status.CONVERGED:  # never by a wrong gap
            assert found[3] <= 2e-3 * expected[0]


X, Y = np.random.default_rng(0).normal(size=(4, 2)), np.array([1.0, -1.0, 1.0, 2.0])
PATTERNS = Patterns(np.ones((2, 1)), np.ones((4, 1), bool))
ONE_HOT, LABELS = np.eye(2)[:, [0, 1, 1, 0]], np.sign(Y)
ENTROPY = {"loss": ss.losses.CrossEntropy(), "joint": True}
BAD = {
    "data that are not finite": ((X * np.nan, Y, PATTERNS, 1.0), {}),
    "targets that are not finite": ((X, Y * np.inf, PATTERNS, 1.0), {}),
    "targets of other data": ((X, Y[:3], PATTERNS, 1.0), {}),
    "patterns of other data": ((X[:3], Y[:3], PATTERNS, 1.0), {}),
    "no features": ((X[:, :0], Y, PATTERNS, 1.0), {}),
    "equal targets": ((X, np.ones(4), PATTERNS, 1.0), {}),
    "one class": ((X, np.ones(4), PATTERNS, 1.0), {"loss": ss.losses.Logistic()}),
    "labels 0 and 1": ((X, LABELS > 0.0, PATTERNS, 1.0), {"loss": ss.losses.Logistic()}),
    "other labels": ((X, Y, PATTERNS, 1.0), {"loss": ss.losses.Logistic()}),
    "one class, one-hot": ((X, np.eye(2)[:, [0, 0, 0, 0]], PATTERNS, 1.0), ENTROPY),
    "no probabilities": ((X, 2 * ONE_HOT, PATTERNS, 1.0), ENTROPY),
    "a vector of classes": ((X, Y, PATTERNS, 1.0), ENTROPY),
    "classes apart": ((X, ONE_HOT, PATTERNS, 1.0), {"loss": ss.losses.CrossEntropy()}),
    "beta zero": ((X, Y, PATTERNS, 0.0), {}),
    "beta below zero": ((X, Y, PATTERNS, -1.0), {}),
    "beta not finite": ((X, Y, PATTERNS, np.inf), {}),
    "a name for beta": ((X, Y, PATTERNS, "large"), {}),
    "several betas": ((X, Y, PATTERNS, np.ones(2)), {}),
    "a mask for patterns": ((X, Y, PATTERNS.mask, 1.0), {}),
    "an unknown regularizer": ((X, Y, PATTERNS, 1.0), {"regularizer": "l3"}),
    "matrices of one output": ((X, Y, PATTERNS, 1.0), {"regularizer": "nuclear"}),
    "no loss": ((X, Y, PATTERNS, 1.0), {"loss": ss.losses.Squares}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    arguments, options = BAD[case]
    with pytest.raises(ValueError, match=r"(?s)^\S.*: expected .+, got .+\.$"):
        GatedProblem(*arguments, **options)


def test_traced_values_are_not_checked():
    """Values that are not known do not raise."""
    value = jax.jit(lambda X, y, b: GatedProblem(X, y, PATTERNS, b).objective(jnp.ones((1, 2))))
    assert np.isnan(value(X * np.nan, Y, -1.0))


BAD_METHODS = {
    "beta not finite": lambda problem: problem.with_beta(np.inf),
    "a name for beta": lambda problem: problem.with_beta("large"),
    "patches of other data": lambda problem: problem.predict(np.zeros(problem.shape), X[None]),
}


@pytest.mark.parametrize("case", BAD_METHODS)
def test_bad_input_of_methods(case):
    problem = GatedProblem(X, Y, PATTERNS, 1.0)
    with pytest.raises(ValueError, match=r"(?s)^\S.*: expected .+, got .+\.$"):
        BAD_METHODS[case](problem)
