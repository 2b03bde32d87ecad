"""The ReLU program: networks, duality, cones; patches, batch normalisation and three layers."""

import convex_oracles as oracles
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stochsolvers as ss
from stochsolvers.convex import (
    Patterns,
    ReLUProblem,
    ThreeLayerProblem,
    enumerate_patterns,
    sample_patterns,
    whitened,
)

BETA = 0.1


@jax.jit
def values(problem, U):
    """Objective, lower bound, certificate, violation and neurons."""
    parts = problem.objective(U), problem.dual_value(U), problem.certificate(U)
    count = problem.num_active(U).astype(parts[0].dtype)
    return jnp.stack([*parts, problem.violation(U), count])


@pytest.mark.parametrize("seed", range(5))
def test_all_patterns_give_the_optimal_network(seed):
    """Convex optimum = objective of the recovered network = dual value; no L-BFGS run goes below."""
    rng = np.random.default_rng(seed)
    X, y = rng.normal(size=(7, 2)), rng.normal(size=7)
    patterns = enumerate_patterns(X)
    primal, dual, U = oracles.cone_optimum(*oracles.relu_blocks(X, patterns.mask), y, BETA)
    assert abs(primal - dual) <= 1e-9
    objective, bound, gap, violation, count = values(ReLUProblem(X, y, patterns, BETA), U)
    W, a = oracles.network_of(U)
    assert abs(objective - primal) <= 1e-12
    assert abs(oracles.network_objective(W, a, X, y, BETA) - primal) <= 1e-6
    assert primal - 1e-6 <= bound <= primal + 1e-12
    assert 0 <= gap <= 1e-6
    assert violation <= 1e-13
    assert count == len(a)
    best = oracles.best_of_lbfgs(X, y, BETA, rng, width=8, starts=50)
    assert primal - 1e-9 <= best <= 1.1 * primal


def test_sizes_of_products_add_up_what_the_program_subtracts(rng):
    """What bounds round-off: |F|ᵀ r and |F| |U|, in which the two halves do not cancel."""
    X, U, r = (
        rng.normal(size=(6, 2)),
        np.abs(rng.normal(size=(2, 3, 2))),
        np.abs(rng.normal(size=6)),
    )
    patterns = sample_patterns(jax.random.key(0), X, 3)
    D = np.asarray(patterns.mask, float)
    sizes = ReLUProblem(X, rng.normal(size=6), patterns, BETA)._magnitudes()
    both = np.einsum("np,nd,pd->n", D, np.abs(X), U[0] + U[1])
    np.testing.assert_allclose(sizes.adjoint(U), both, rtol=1e-12)
    image = np.einsum("np,nd,n->pd", D, np.abs(X), r)
    np.testing.assert_allclose(sizes(r), [image, image], rtol=1e-12)


def test_the_example_of_three_data():
    """The printed one, with 2 D − I in the constraints, D_2 = diag(1, 1, 0) and D_4 = diag(0, 0, 1)."""
    X = np.array([[2.0, 2.0], [3.0, 3.0], [1.0, 0.0]])
    y = np.array([1.0, -1.0, 2.0])
    patterns = enumerate_patterns(X)
    assert set(oracles.strings(patterns.mask)) == {"111", "110", "001", "000"}
    primal, _, U = oracles.cone_optimum(*oracles.relu_blocks(X, patterns.mask), y, BETA)
    objective, bound, gap, *_ = values(ReLUProblem(X, y, patterns, BETA), U)
    np.testing.assert_allclose([objective, bound], primal, atol=1e-6)
    assert gap <= 1e-6


def test_gaps_are_never_below_the_truth(rng):
    """At feasible points, by the projections' multipliers and by others; D holds for any θ."""
    X, y = rng.normal(size=(7, 2)), rng.normal(size=7)
    patterns = enumerate_patterns(X)
    problem = ReLUProblem(X, y, patterns, BETA)
    primal, _, best = oracles.cone_optimum(*oracles.relu_blocks(X, patterns.mask), y, BETA)

    @jax.jit
    def several(problem, points, multipliers):
        def one(U):
            inside = problem.project(U)
            return jnp.stack(
                [
                    problem.objective(inside),
                    problem.certificate(inside),
                    problem.certificate(inside, multipliers=multipliers),
                    problem.certificate(inside, multipliers=jnp.zeros_like(multipliers)),
                    problem.dual_value(dual=U[0, :7, 0]),
                ]
            )

        return jax.lax.map(one, points)

    noise = rng.normal(size=(6, *problem.shape)) * 10.0 ** -np.arange(6.0)[:, None, None, None]
    blocks, cones = oracles.relu_blocks(X, patterns.mask)
    r = sum(A @ (v - w) for A, v, w in zip(blocks, *best, strict=True)) - y
    multipliers = [
        [oracles.nnls(G.T, s * (A.T @ r))[0] for A, G in zip(blocks, cones, strict=True)]
        for s in (1, -1)
    ]
    found = np.asarray(several(problem, jnp.asarray(best + noise), jnp.asarray(multipliers)))
    truth = found[:, 0] - primal
    assert np.all(truth >= -1e-12)
    for gaps in found.T[1:4]:
        assert np.all(gaps >= truth)
    assert np.all(found[:, 4] <= primal)
    assert np.all(found[-1, 1:3] <= 1e-3)
    assert found[-1, 3] > 1e-2  # without multipliers that of the gated program's norm


def test_gaps_do_not_depend_on_units(rng):
    """That of (sX, sy, s²β) is s² times that of (X, y, β), also where squares leave the range of float32."""
    X, y = np.float32(rng.normal(size=(6, 2))), np.float32(rng.normal(size=6))
    patterns = enumerate_patterns(X)
    U = np.float32(0.1 * rng.normal(size=(2, patterns.num, 2)))

    @jax.jit
    def values(scale):
        problem = ReLUProblem(scale * X, scale * y, patterns, 0.3 * scale**2)
        V = problem.project(U)
        known = problem.certificate(V), problem.dual_value(V), problem.beta_max()
        return jnp.stack(known) / scale**2

    expected = values(jnp.float32(1.0))
    assert np.all(np.isfinite(expected))
    for scale in (2.0**33, 2.0**-33):
        np.testing.assert_allclose(values(jnp.float32(scale)), expected, rtol=1e-4)


def test_outside_the_cones_the_objective_is_infinite(rng):
    X, y = rng.normal(size=(6, 2)), rng.normal(size=6)
    problem = ReLUProblem(X, y, enumerate_patterns(X), BETA)
    U = rng.normal(size=problem.shape)
    objective, _, gap, violation, _ = values(problem, U)
    assert np.isinf(objective)
    assert np.isinf(gap)
    signs = np.where(np.asarray(problem.patterns.mask), 1, -1)
    heights = np.einsum("np,nd,spd->spn", signs, X, U) / np.linalg.norm(X, axis=1)
    largest = np.linalg.norm(U, axis=-1).max()
    np.testing.assert_allclose(violation, -heights.min() / largest, rtol=1e-12)
    _, cones = oracles.relu_blocks(X, problem.patterns.mask)
    nearest = [[oracles.cone_projection(v, G) for v, G in zip(V, cones, strict=True)] for V in U]
    np.testing.assert_allclose(jax.jit(type(problem).project)(problem, U), nearest, atol=1e-12)


@pytest.mark.parametrize("loss", [ss.losses.Squares(), ss.losses.Logistic()])
def test_beta_max(rng, loss):
    """max ‖Π(±Xᵀ D_i r)‖ by non-negative least squares, of each program of a batch."""
    X, y = rng.normal(size=(8, 3)), np.sign(rng.normal(size=(2, 8)))
    patterns = enumerate_patterns(X)
    problem = ReLUProblem(X, y, patterns, BETA, loss=loss)
    slope = -y / (2 if isinstance(loss, ss.losses.Logistic) else 1)
    blocks, cones = oracles.relu_blocks(X, patterns.mask)
    expected = [
        max(
            np.linalg.norm(oracles.cone_projection(s * (A.T @ r), G))
            for s in (1, -1)
            for A, G in zip(blocks, cones, strict=True)
        )
        for r in slope
    ]
    np.testing.assert_allclose(problem.beta_max(), expected, rtol=1e-10)
    at = problem.with_beta(max(expected))
    zero = np.zeros(problem.shape)
    gaps = jax.jit(type(at).certificate)(at, zero)
    assert np.all(gaps <= 1e-9)


def test_the_solvers_of_the_library_go_to_the_optimum(rng):
    """The prox on cones is that of the sum: FISTA's limit is the optimum of the dual's own solver."""
    X, y = rng.normal(size=(5, 2)), rng.normal(size=5)
    patterns = enumerate_patterns(X)
    primal, *_ = oracles.cone_optimum(*oracles.relu_blocks(X, patterns.mask), y, BETA)
    problem = ReLUProblem(X, y, patterns, BETA)
    solution = ss.ProxGD(300, momentum=True, restart=True).solve(None, problem)
    np.testing.assert_allclose(problem.objective(solution.value), primal, rtol=1e-6)


def test_derivatives_of_the_prox_on_cones(rng):
    """In the weights, the data and β, along random directions, against differences."""
    X, y = rng.normal(size=(5, 2)), rng.normal(size=5)
    patterns = enumerate_patterns(X)[:4]
    shape = (2, 4, 2)
    point = rng.normal(size=shape), X, 0.3
    way = rng.normal(size=shape), rng.normal(size=X.shape), 1.0
    weights = rng.normal(size=shape)

    def prox(V, X, beta):
        prior = ReLUProblem(X, y, patterns, beta).prior
        return jnp.sum(prior.prox(V, 0.7) * weights)

    @jax.jit
    def slopes(point, way):
        gradient = jax.grad(prox, argnums=(0, 1, 2))(*point)
        ahead = prox(*jax.tree.map(lambda p, w: p + 1e-6 * w, point, way))
        behind = prox(*jax.tree.map(lambda p, w: p - 1e-6 * w, point, way))
        return sum(jax.tree.map(lambda g, w: jnp.sum(g * w), gradient, way)), (
            ahead - behind
        ) / 2e-6

    point, way = jax.tree.map(jnp.asarray, (point, way))
    np.testing.assert_allclose(*slopes(point, way), rtol=1e-6)


def test_mixed_precision_is_that_of_the_wider(rng):
    X, y = rng.normal(size=(6, 2)), rng.normal(size=6)
    patterns = enumerate_patterns(X)
    for a, b in ((np.float32(X), y), (X, np.float32(y))):
        problem = ReLUProblem(a, b, patterns, BETA)
        assert problem.dtype == problem.cones.rows.dtype == problem.beta.dtype == jnp.float64


def test_patches_share_their_weights(rng):
    """The program of patches, and the convolutional network that is its solution."""
    X, y = rng.normal(size=(4, 2, 2)), rng.normal(size=4)
    patterns = enumerate_patterns(X)
    primal, dual, U = oracles.cone_optimum(*oracles.relu_blocks(X, patterns.mask), y, BETA)
    assert abs(primal - dual) <= 1e-9
    problem = ReLUProblem(X, y, patterns, BETA)
    objective, bound, gap, *_ = values(problem, U)
    W, a = oracles.network_of(U)
    np.testing.assert_allclose([objective, bound], primal, atol=1e-6)
    assert gap <= 1e-6
    np.testing.assert_allclose(oracles.network_objective(W, a, X, y, BETA), primal, rtol=1e-12)
    new = rng.normal(size=(3, 2, 2))
    expected = np.maximum(new @ W, 0).sum(1) @ a
    np.testing.assert_allclose(problem.predict(U, new), expected, atol=1e-12)


def test_predictions_are_the_networks(rng):
    X, y = rng.normal(size=(6, 3)), rng.normal(size=(2, 6))
    problem = ReLUProblem(X, y, sample_patterns(jax.random.key(0), X, 5), BETA)
    U, new = rng.normal(size=problem.shape), rng.normal(size=(4, 3))
    expected = []
    for u in U:
        W, a = oracles.network_of(u)
        expected.append(np.maximum(new @ W, 0) @ a)
    np.testing.assert_allclose(problem.predict(U, new), expected, atol=1e-12)
    inside = problem.project(U)
    fit = problem.linear_map.adjoint(inside)
    np.testing.assert_allclose(problem.predict(inside), fit, atol=1e-12)


def test_batch_normalisation_is_whitening(rng):
    X = rng.normal(size=(9, 2)) @ rng.normal(size=(2, 4)) + 3
    basis = whitened(X)
    assert basis.data.shape == (9, 3)
    np.testing.assert_allclose(basis.apply(X), basis.data, atol=1e-12)
    weights, scale, shift = rng.normal(size=(4, 5)), rng.uniform(0.5, 2, 5), rng.normal(size=5)
    inner = (X - X.mean(0)) @ weights
    network = scale * inner / np.linalg.norm(inner, axis=0) + shift
    v = np.linalg.lstsq(basis.data, network, rcond=None)[0]
    np.testing.assert_allclose(basis.data @ v, network, atol=1e-12)
    np.testing.assert_allclose(np.sum(v**2, axis=0), scale**2 + shift**2, rtol=1e-12)
    w, gamma, alpha = (np.asarray(part) for part in basis.batch_norm(v.T))
    np.testing.assert_allclose(gamma, scale, rtol=1e-12)
    np.testing.assert_allclose(alpha, shift, atol=1e-12)
    again = (X - X.mean(0)) @ w.T
    np.testing.assert_allclose(np.linalg.norm(again, axis=0), 1, rtol=1e-12)
    np.testing.assert_allclose(gamma * again + alpha, network, atol=1e-12)
    new = rng.normal(size=(3, 4)) + 3
    expected = gamma * ((new - X.mean(0)) @ w.T) + alpha
    np.testing.assert_allclose(basis.apply(new) @ v, expected, atol=1e-12)
    with pytest.raises(ValueError, match=r"data of whitened: expected rows that are not all equal"):
        whitened(np.ones((3, 2)))


def three_layer_network(U, signs, X, width):
    """f(X) and (β/2)(‖a‖² + c²) / β of the parallel networks that the blocks of U are."""
    total, cost = np.zeros(len(X)), 0.0
    for sign, V in zip((1, -1), np.asarray(U), strict=True):
        for z, s in zip(V.reshape(len(V), width, -1), np.asarray(signs), strict=True):
            norms = np.linalg.norm(z, axis=1)
            size = np.linalg.norm(norms)
            if size > 0:
                columns = z / np.maximum(norms, 1e-300)[:, None]
                a, c = s * norms / np.sqrt(size), sign * np.sqrt(size)
                total += np.maximum(np.maximum(X @ columns.T, 0) @ a, 0) * c
                cost += 0.5 * (a @ a + c * c)
    return total, cost


@pytest.mark.parametrize("width", [1, 2])
def test_three_layers(rng, width):
    """The optimum over all blocks is the objective of the recovered networks; L-BFGS stays above it."""
    X, y = rng.normal(size=(4 - width, 2)), rng.normal(size=4 - width)
    first = enumerate_patterns(X)
    problem = ThreeLayerProblem(X, y, first, BETA, width=width)
    features = np.asarray(problem.base_map.kernel)
    cones = np.asarray(problem.cones.matrices)
    primal, dual, U = oracles.cone_optimum(list(features), list(cones), y, BETA)
    assert abs(primal - dual) <= 1e-8
    objective, bound, gap, *_ = values(problem, U)
    np.testing.assert_allclose([objective, bound], primal, atol=1e-6)
    assert gap <= 1e-6
    fit, cost = three_layer_network(U, problem.signs, X, width)
    np.testing.assert_allclose(0.5 * np.sum((fit - y) ** 2) + BETA * cost, primal, rtol=1e-9)
    np.testing.assert_allclose(problem.predict(U, X), fit, atol=1e-12)
    best = descend_three_layers(X, y, rng, width=width)
    assert primal - 1e-9 <= best <= 1.1 * primal


def descend_three_layers(X, y, rng, *, width, count=4, starts=12):
    """The least objective that L-BFGS finds over parallel networks with unit columns."""
    d = X.shape[1]

    def objective(flat):
        parts = flat.reshape(starts, count, width * d + width + 1)
        W = parts[..., : width * d].reshape(starts, count, width, d)
        W = W / jnp.sqrt(jnp.sum(W**2, -1, keepdims=True) + 1e-12)
        a, c = parts[..., width * d : -1], parts[..., -1]
        hidden = jax.nn.relu(jnp.einsum("nd,sckd->scnk", X, W))
        outer = jax.nn.relu(jnp.einsum("scnk,sck->scn", hidden, a))
        r = jnp.einsum("scn,sc->sn", outer, c) - jnp.asarray(y)[None]
        decay = jnp.sum(a**2, (1, 2)) + jnp.sum(c**2, 1)
        return 0.5 * jnp.sum(r**2, 1) + 0.5 * BETA * decay

    total = jax.jit(jax.value_and_grad(lambda flat: jnp.sum(objective(flat))))
    begin = rng.normal(size=starts * count * (width * d + width + 1))
    end = oracles.minimize(
        lambda flat: tuple(np.asarray(p, float) for p in total(flat)),
        begin,
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 200},
    ).x
    return float(jnp.min(objective(end)))


X, Y = np.random.default_rng(0).normal(size=(4, 2)), np.array([1.0, -1.0, 1.0, 2.0])
PATTERNS = Patterns(np.ones((2, 1)), np.ones((4, 1), bool))
BAD = {
    "data that are not finite": lambda: ReLUProblem(X * np.nan, Y, PATTERNS, 1.0),
    "targets of other data": lambda: ReLUProblem(X, Y[:3], PATTERNS, 1.0),
    "equal targets": lambda: ReLUProblem(X, np.ones(4), PATTERNS, 1.0),
    "one class": lambda: ReLUProblem(X, np.ones(4), PATTERNS, 1.0, loss=ss.losses.Logistic()),
    "beta zero": lambda: ReLUProblem(X, Y, PATTERNS, 0),
    "classes": lambda: ReLUProblem(X, np.eye(4), PATTERNS, 1.0, loss=ss.losses.CrossEntropy()),
    "no loss": lambda: ReLUProblem(X, Y, PATTERNS, 1.0, loss=None),
    "other multipliers": lambda: ReLUProblem(X, Y, PATTERNS, 1.0).certificate(
        np.zeros((2, 1, 2)), multipliers=np.ones((2, 1, 3))
    ),
    "two points": lambda: ReLUProblem(X, Y, PATTERNS, 1.0).dual_value(np.zeros((2, 1, 2)), dual=Y),
    "no point": lambda: ReLUProblem(X, Y, PATTERNS, 1.0).dual_value(),
    "new data of other features": lambda: ReLUProblem(X, Y, PATTERNS, 1.0).predict(
        np.zeros((2, 1, 2)), np.ones((3, 3))
    ),
    "patches of three layers": lambda: ThreeLayerProblem(X[:, None], Y, PATTERNS, 1.0),
    "too many data": lambda: ThreeLayerProblem(
        np.ones((20, 2)), np.arange(20.0), Patterns(np.ones((2, 1)), np.ones((20, 1), bool)), 1.0
    ),
    "too many blocks": lambda: ThreeLayerProblem(X, Y, enumerate_patterns(X), 1.0, width=9),
    "patches of batch normalisation": lambda: whitened(np.ones((2, 2, 2))),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    with pytest.raises(ValueError, match=r"(?s)^\S.*: expected .+, got .+\.$"):
        BAD[case]()
