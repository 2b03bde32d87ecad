"""Equilibrium problems: the layer of every prior, objectives, certificates, compositions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import PRIORS, SHAPES
from scipy.optimize import minimize

import stochsolvers as ss
from stochsolvers.equilibrium import DeepProblem, EquilibriumProblem, Regularized

DRAWS = 150  # pairs of points for each prior, 4,200 in all


def scaled(matrix, norm):
    return matrix * (norm / np.linalg.norm(matrix, 2))


def kernel_of(rng, n_in, n_out, norm=0.9):
    """A kernel (n_in, n_out) of this norm."""
    return scaled(rng.normal(size=(n_in, n_out)), norm)


def dense_problem(rng, n=6, hidden=8, batch=(3,), norm=0.9, prior=None):
    kernel = jnp.asarray(kernel_of(rng, n, hidden, norm))
    drive = jnp.asarray(rng.normal(size=(*batch, hidden)))
    return EquilibriumProblem(ss.Dense(kernel), drive, prior=prior or ss.prox.NonNegative())


@jax.jit
def values(problem, z):
    return problem.layer(z), problem.objective(z)


@pytest.mark.parametrize("name", PRIORS)
def test_the_layer_is_the_gradient_of_a_convex_function(rng, name):
    """Firm non-expansiveness of h, and G above its tangents by (1 − ω²)/2 ||b − a||²."""
    prior, shape = PRIORS[name], SHAPES.get(name, (1, 4))[1:]
    hidden, omega = int(np.prod(shape)), 0.9
    A = ss.linear_maps.Matrix(jnp.asarray(kernel_of(rng, 5, hidden, omega)), (5,), shape)
    drive = jnp.asarray(rng.normal(size=(2 * DRAWS, *shape)))
    drive = drive.at[DRAWS:].set(drive[:DRAWS])  # pairs of one problem
    sizes = 10.0 ** rng.uniform(-2, 1, size=(2 * DRAWS, 1))
    z = rng.normal(size=(2 * DRAWS, 5)) * sizes
    h, G = values(EquilibriumProblem(A, drive, prior=prior), jnp.asarray(z))
    (a, b), (ha, hb), (Ga, Gb) = (np.split(np.asarray(x), 2) for x in (z, h, G))
    step, move = b - a, hb - ha
    scale = 1 + np.sum(a**2 + b**2, -1)
    assert np.all(np.sum(move * step, -1) - np.sum(move**2, -1) >= -1e-7 * scale)
    tangent = Ga + np.sum((a - ha) * step, -1) + (1 - omega**2) / 2 * np.sum(step**2, -1)
    assert np.all(np.isfinite(G))
    assert np.all(Gb - tangent >= -1e-7 * scale)


POTENTIALS = {  # S with S′ = σ, in numpy
    "relu": (ss.prox.NonNegative(), lambda v: 0.5 * np.maximum(v, 0) ** 2),
    "l1": (ss.prox.L1(0.3), lambda v: 0.5 * np.maximum(np.abs(v) - 0.3, 0) ** 2),
    "tanh": (ss.prox.Tanh(), lambda v: np.logaddexp(v, -v) - np.log(2)),
    "softmax": (ss.prox.Entropy(), lambda v: np.logaddexp.reduce(v)),
    "ball": (ss.prox.L2Ball(0.8), lambda v: ball_potential(np.linalg.norm(v))),
}


def ball_potential(r, radius=0.8):
    return np.where(r <= radius, 0.5 * r**2, radius * r - 0.5 * radius**2)


def plain_iteration(problem, count=400, alpha_map=None):
    step = problem.layer if alpha_map is None else alpha_map
    return jax.jit(lambda z: jax.lax.fori_loop(0, count, lambda _, z: step(z), z))(
        jnp.zeros(problem.shape, problem.dtype)
    )


@pytest.mark.parametrize("name", POTENTIALS)
def test_the_equilibrium_minimises_the_objective(rng, name):
    """G and its minimiser by scipy, from a potential that is written down."""
    prior, potential = POTENTIALS[name]
    problem = dense_problem(rng, prior=prior)
    W, c = np.asarray(problem.linear_map.kernel).T, np.asarray(problem.drive)

    def value_of(z, c):
        return 0.5 * z @ z - np.sum(potential(W @ z + c))

    z = np.asarray(plain_iteration(problem, 600))
    G0 = values(problem, jnp.zeros(problem.shape))[1]
    shift = np.asarray(G0) - [value_of(np.zeros(6), row) for row in c]
    for row, c_row, value, offset in zip(
        z, c, values(problem, jnp.asarray(z))[1], shift, strict=False
    ):
        found = minimize(value_of, np.zeros(6), (c_row,), method="BFGS", options={"gtol": 1e-9})
        np.testing.assert_allclose(row, found.x, atol=2e-6)
        np.testing.assert_allclose(value, found.fun + offset, atol=1e-10)


def test_the_gradient_is_that_of_the_objective(rng):
    problem = dense_problem(rng, prior=ss.prox.Softplus())
    z = jnp.asarray(rng.normal(size=(3, 6)))
    slope = jax.jit(jax.grad(lambda z: jnp.sum(problem.objective(z))))(z)
    np.testing.assert_allclose(problem.gradient(z), slope, rtol=1e-9, atol=1e-12)


def relu_layer(W, c, z):
    """In numpy, for one example; W from z to the hidden units."""
    return W.T @ np.maximum(W @ z + c, 0)


def relu_equilibrium(W, c, alpha=1.0, count=30000):
    """Of layers W_i, c_i one after the other, to round-off."""
    z = np.zeros(W[0].shape[1], W[0].dtype)
    for _ in range(count):
        before = z
        for Wi, ci in zip(W, c, strict=True):
            z = (1 - alpha) * z + alpha * relu_layer(Wi, ci, z)
        if np.linalg.norm(z - before) <= 1e-20 * (1 + np.linalg.norm(z)):
            break
    return z


def arrays_of(problem, dtype=np.float64):
    """W (hidden, z) and c of a problem."""
    W, c = problem.linear_map.kernel.T, problem.drive
    return np.asarray(W).astype(dtype), np.asarray(c).astype(dtype)


def exact(problem):
    """The same in more than float64, in which the truth of a certificate is computed."""
    return arrays_of(problem, np.longdouble)


def objective_of_relu(W, c, z):
    return 0.5 * z @ z - 0.5 * np.sum(np.maximum(W @ z + c, 0) ** 2)


@jax.jit
def bounds(problem, points):
    certifier = problem.certifier()
    return jax.lax.map(lambda z: (certifier(z), certifier.distance(z)), points)


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_certificates_are_never_below_the_truth(rng, dtype):
    """From far away down to round-off, in both precisions, against the arrays as they are."""
    loose = []
    for norm in (0.3, 0.9, 0.99, 0.9999):
        problem = jax.tree.map(
            lambda leaf: leaf.astype(dtype) if hasattr(leaf, "dtype") else leaf,
            dense_problem(rng, batch=(4,), norm=norm),
        )
        W, c = exact(problem)
        truth = np.stack([relu_equilibrium([W], [row]) for row in c])
        sizes = (1.0, 1e-2, 1e-5, 1e-7, 1e-8, 0.0)
        plain = [truth + size * rng.normal(size=truth.shape) for size in sizes]
        points = jnp.asarray(np.stack(plain), dtype)
        gaps, distances = (np.asarray(x, np.longdouble) for x in bounds(problem, points))
        for k, i in np.ndindex(gaps.shape):
            z = np.asarray(points[k, i]).astype(np.longdouble)
            away = np.linalg.norm(z - truth[i])
            gap = objective_of_relu(W, c[i], z) - objective_of_relu(W, c[i], truth[i])
            assert gap <= gaps[k, i] + 1e-18
            assert away <= distances[k, i]
            if k == 1:
                loose.append((norm, distances[k, i] / away * (1 - norm**2)))
    assert max(ratio for norm, ratio in loose if norm < 0.999) < 1.01
    assert max(ratio for _, ratio in loose) < 1.2  # of 1 − ω², few digits are left in float32


def test_there_is_no_certificate_where_the_norm_is_one(rng):
    problem = dense_problem(rng, norm=1.0)
    z = jnp.zeros(problem.shape)
    assert np.all(np.isinf(problem.certificate(z)))
    assert np.all(np.isinf(problem.distance(z)))
    assert np.all(np.isfinite(problem.distance(z, squared_norm=0.9)))  # taken on trust


@jax.jit
def joint(problem, z):
    return problem.objective(z), problem.certificate(z), problem.distance(z)


def test_two_layers_minimise_a_joint_objective(rng):
    layers = [dense_problem(rng, 5, hidden, (2,), 0.8) for hidden in (6, 4)]
    problem = DeepProblem(layers)
    z = plain_iteration(problem)
    (W1, c1), (W2, c2) = map(arrays_of, layers)
    best, _, _ = joint(problem, z)
    for row, a, b, value in zip(np.asarray(z), c1, c2, best, strict=False):

        def objective(s, a=a, b=b):
            s, t = s[:6], s[6:]
            y = W1.T @ s
            gradient = np.r_[s - a - W1 @ (W2.T @ t), t - b - W2 @ y]
            return 0.5 * (s @ s + t @ t) - a @ s - b @ t - y @ (W2.T @ t), gradient

        options = {"ftol": 1e-16, "gtol": 1e-12, "maxiter": 5000}
        found = minimize(
            objective, np.zeros(10), jac=True, bounds=[(0, None)] * 10, options=options
        )
        np.testing.assert_allclose(row, W2.T @ found.x[6:], atol=1e-7)
        np.testing.assert_allclose(value, found.fun, atol=1e-12)
    for size in (1.0, 1e-3, 0.0):
        y = z + size * jnp.asarray(rng.normal(size=z.shape))
        value, gap, distance = joint(problem, y)
        assert np.all(value - best <= gap)
        assert np.all(np.linalg.norm(y - z, axis=-1) <= distance)


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("alpha", "dtype"), [(1.0, jnp.float64), (0.3, jnp.float64), (1.0, jnp.float32)]
)
def test_the_distance_of_compositions_is_never_below_the_truth(rng, alpha, dtype):
    layers = [
        EquilibriumProblem(
            ss.Dense(jnp.asarray(kernel_of(rng, 5, 7, norm), dtype)),
            jnp.asarray(rng.normal(size=(3, 7)), dtype),
        )
        for norm in (0.8, 0.95, 0.5)
    ]
    problem = DeepProblem(layers, alpha)
    Ws, cs = zip(*map(exact, layers), strict=True)
    truth = [relu_equilibrium(Ws, [c[i] for c in cs], alpha) for i in range(3)]
    noise = rng.normal(size=(3, 5))
    points = [np.stack(truth) + size * noise for size in (1.0, 1e-4, 1e-7, 0.0)]
    certifier = problem.certifier()
    for z in points:
        z = jnp.asarray(z, dtype)
        away = np.linalg.norm(np.asarray(z).astype(np.longdouble) - truth, axis=-1)
        assert np.all(away <= np.asarray(certifier.distance(z), np.longdouble))


def test_averaged_layers_tend_to_the_minimiser_of_the_sum(rng):
    """The error is O(α): a tenth of α, a tenth of the error."""
    layers = [dense_problem(rng, 8, 8, (), 0.9) for _ in range(3)]
    Ws, cs = zip(*map(arrays_of, layers), strict=True)

    def total(z):
        slope = sum(z - relu_layer(W, c, z) for W, c in zip(Ws, cs, strict=True))
        return sum(objective_of_relu(W, c, z) for W, c in zip(Ws, cs, strict=True)), slope

    found = minimize(total, np.zeros(8), jac=True, method="BFGS", options={"gtol": 1e-11})
    errors = []
    for alpha in (1.0, 0.1, 0.01, 0.001):
        z = plain_iteration(DeepProblem(layers, alpha), int(60 / alpha) + 400)
        errors.append(np.linalg.norm(z - found.x) / np.linalg.norm(found.x))
    assert errors[0] > 0.05
    for larger, smaller in itertools.pairwise(errors[1:]):
        assert 8 < larger / smaller < 12


def test_regularised_layers_are_compositions(rng):
    base = dense_problem(rng)
    W, c = arrays_of(base)
    gradient = jax.tree_util.Partial(lambda target, z: z - target[None], jnp.ones(6))
    for regularized, oracle in (
        (Regularized(ss.prox.L1(0.5), 0.4), lambda z: np.sign(z) * np.maximum(np.abs(z) - 0.2, 0)),
        (
            Regularized(lambda z: z - jnp.ones_like(z), 0.3, contraction=0.7),
            lambda z: 0.7 * z + 0.3,
        ),
        (Regularized(gradient, 0.3, 0.7), lambda z: 0.7 * z + 0.3),
    ):
        problem = DeepProblem([base, regularized])
        z = jnp.asarray(rng.normal(size=(3, 6)))
        expected = [oracle(relu_layer(W, row, y)) for row, y in zip(c, np.asarray(z), strict=True)]
        np.testing.assert_allclose(problem.layer(z), expected, atol=1e-12)
        star = plain_iteration(problem)
        away = np.linalg.norm(z - star, axis=-1)
        distance = problem.distance(z)
        assert np.all(away <= distance)
        assert np.all(distance < 20 * away)
    unknown = DeepProblem([base, Regularized(lambda z: z, 0.3)])
    assert np.all(np.isinf(unknown.distance(z)))


def test_mistakes_are_named(rng):
    base = dense_problem(rng)
    W = base.linear_map
    for message, make in (
        ("linear_map of EquilibriumProblem", lambda: EquilibriumProblem(W.kernel, base.drive)),
        ("prior of EquilibriumProblem", lambda: EquilibriumProblem(W, base.drive, prior="relu")),
        ("shape of drive", lambda: EquilibriumProblem(W, jnp.ones((3, 6)))),
        ("dtype of drive", lambda: EquilibriumProblem(W, jnp.ones((3, 8), int))),
        (
            "axis of GroupL2",
            lambda: EquilibriumProblem(W, base.drive, prior=ss.prox.GroupL2(axis=-2)),
        ),
        ("layers of DeepProblem", lambda: DeepProblem([])),
        ("layers of DeepProblem", lambda: DeepProblem([base, 3])),
        ("shape of z", lambda: DeepProblem([base, dense_problem(rng, n=5)])),
        ("alpha of DeepProblem", lambda: DeepProblem([base], 0.0)),
        ("alpha of DeepProblem", lambda: DeepProblem([base], 1.5)),
        ("objective of DeepProblem", lambda: DeepProblem([base] * 3).objective(base.drive)),
        (
            "certificate of DeepProblem",
            lambda: DeepProblem([base] * 2, 0.5).certificate(base.drive),
        ),
        ("squared_norms of DeepProblem", lambda: DeepProblem([base]).certifier(squared_norms=[])),
        ("step of Regularized", lambda: Regularized(ss.prox.L1(1.0), -1.0)),
        ("prior_or_gradient of Regularized", lambda: Regularized(3, 1.0)),
        ("shape of the variable z", lambda: base.objective(jnp.ones((3, 8)))),
        ("bound", lambda: ss.equilibrium.normalized(W, 0.0)),
        ("problem of equilibrium.solve", lambda: ss.equilibrium.solve(W)),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_only_problems_with_an_objective_are_certified(rng):
    """A tolerance of the gap and a layer's certificate too."""
    one, two = (dense_problem(rng, prior=ss.prox.Tanh()) for _ in range(2))
    averaged = DeepProblem([one, two], alpha=0.5)
    prior = DeepProblem([one, Regularized(ss.prox.L1(0.1), 1.0)])
    for problem in (averaged, DeepProblem([one] * 3), prior):
        assert not problem.has_objective
        with pytest.raises(ValueError, match="certificate of DeepProblem: expected two plain"):
            ss.Anderson(20, gap_tol=1e-3).solve(None, problem)
        with pytest.raises(ValueError, match="certificate of DeepProblem: expected two plain"):
            problem.certifier()(jnp.zeros(problem.shape))
    assert one.has_objective
    assert DeepProblem([one, two]).has_objective


def test_distances_of_tiny_and_huge_drives(rng):
    kernel = jnp.asarray(kernel_of(rng, 6, 8), jnp.float32)
    drive = rng.normal(size=(3, 8))
    for scale in (1e-24, 1e25):
        problem = EquilibriumProblem(ss.Dense(kernel), jnp.asarray(scale * drive, jnp.float32))
        W = np.asarray(kernel, np.float64).T
        truth = scale * np.stack([relu_equilibrium([W], [c]) for c in drive])
        bound = np.asarray(problem.distance(jnp.zeros(problem.shape, jnp.float32)), np.float64)
        size = np.linalg.norm(truth, axis=-1)
        assert np.all((bound >= size) & (bound <= 30 * size))
