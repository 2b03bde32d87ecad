"""Simplex, softmax and ball: prox and conjugate by enumeration and bisection, certificates by scipy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import stochsolvers as ss
from stochsolvers import prox

WIDE, INF = np.longdouble, jnp.inf


def by_faces(v):
    """The nearest point of the simplex: the best of the projections onto the planes of all faces."""
    best, least = None, np.inf
    for size in range(1, len(v) + 1):
        for face in map(list, itertools.combinations(range(len(v)), size)):
            u = np.zeros_like(v)
            u[face] = v[face] - (np.sum(v[face]) - 1) / size
            if np.all(u >= 0) and np.sum((u - v) ** 2) < least:
                best, least = u, np.sum((u - v) ** 2)
    return best


def sorted_projection(v):
    """Onto the simplex, along the last axis, in extended precision, by sorting."""
    v = v.astype(WIDE) - np.max(v.astype(WIDE), -1, keepdims=True)
    ordered = -np.sort(-v, -1)
    thresholds = (np.cumsum(ordered, -1) - 1) / np.arange(1, v.shape[-1] + 1)
    last = np.sum(ordered > thresholds, -1, keepdims=True) - 1
    return np.maximum(v - np.take_along_axis(thresholds, last, -1), 0)


@pytest.mark.optimized
def test_projections_onto_the_simplex(rng):
    v = np.concatenate([s * rng.normal(size=(20, 5)) for s in (0.1, 1.0, 10.0)])
    v = np.concatenate([v, [[0.2] * 5, [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [3, 2, 2, 2, -9]]])
    u = prox.Simplex().prox(jnp.asarray(v), 0.3)
    np.testing.assert_allclose(u, [by_faces(row) for row in v], atol=1e-15)
    np.testing.assert_array_equal(u, prox.Simplex().prox(jnp.asarray(v), 7.0))
    first = jnp.moveaxis(prox.Simplex(0).prox(jnp.asarray(v.T), 1.0), 0, -1)
    np.testing.assert_allclose(first, u, atol=1e-15)
    both = prox.Simplex((0, 2)).prox(jnp.asarray(v[:60].reshape(3, 20, 5)), 1.0)
    flat = v[:60].reshape(3, 20, 5).transpose(1, 0, 2).reshape(20, 15)
    flat = sorted_projection(flat).reshape(20, 3, 5).transpose(1, 0, 2)
    np.testing.assert_allclose(both, flat.astype(float), atol=1e-15)


ROWS = 40


def rows():
    """Vectors of all sizes, with ties, and with gaps at which entries leave the support."""
    seeded, index = np.random.default_rng(3), np.arange(ROWS)
    random = [size * seeded.normal(size=ROWS) for size in (1e-3, 0.1, 1.0, 10.0, 1e3, 1e6)]
    gaps = [np.where(index == 0, 0.0, -gap) for gap in (0, 0.5, 0.9, 0.999, 1, 1.001, 1.5)]
    ladders = [-np.geomspace(1e-6, 2, ROWS), -np.linspace(0, 1.2, ROWS), -((0.3 * index) ** 2)]
    return np.array([*random, *gaps, *ladders, 1e6 - np.linspace(0, 30, ROWS)])


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_projections_keep_their_digits(dtype):
    v, eps = rows().astype(dtype), np.finfo(dtype).eps
    project = jax.jit(lambda v: prox.Simplex().prox(v, 1.0))
    u = np.asarray(project(jnp.asarray(v)))
    assert np.max(np.abs(u - sorted_projection(v))) < 4 * eps
    assert np.max(np.abs(np.sum(u, -1, dtype=WIDE) - 1)) < 8 * eps
    assert prox.Simplex().value(jnp.asarray(u)) == 0
    huge = np.finfo(dtype).max * np.array([[1, -1, 1, 0], [-1, -1, -1, -0.5]], dtype)
    np.testing.assert_array_equal(project(jnp.asarray(huge)), [[0.5, 0, 0.5, 0], [0, 0, 0, 1]])
    slow = np.cumsum(np.geomspace(1, 1e-9, 200))[None].astype(dtype)  # drops entries slowly
    np.testing.assert_allclose(
        prox.Simplex().prox(jnp.asarray(slow), 1.0), sorted_projection(slow), atol=4 * eps
    )


def test_jacobian_of_the_projection():
    v = jnp.asarray([0.3, 0.5, -0.4, 0.45])
    jacobian = jax.jacrev(lambda v: prox.Simplex().prox(v, 1.0))(v)
    support = np.array([1.0, 1.0, 0.0, 1.0])
    np.testing.assert_allclose(jacobian, np.diag(support) - np.outer(support, support) / 3)


def log_root(alpha, beta, y):
    """Log u at α u + β log u = y, u ≤ 1, by bisection."""
    low, high = np.full(y.shape, -11_000, WIDE), np.zeros(y.shape, WIDE)
    for _ in range(90):
        middle = (low + high) / 2
        below = alpha * np.exp(middle) + beta * middle < y
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return (low + high) / 2


def tempered(v, alpha, beta):
    """The u with α u_i + β log u_i = v_i + c, Σ u_i = 1, by bisection in log max u."""
    v = v.astype(WIDE)
    below = np.max(v, -1, keepdims=True) - v
    low = np.full((*v.shape[:-1], 1), -np.log(WIDE(v.shape[-1])))
    high = np.zeros_like(low)
    for _ in range(70):
        middle = (low + high) / 2
        top = alpha * np.exp(middle) + beta * middle
        total = np.sum(np.exp(log_root(alpha, beta, top - below)), -1, keepdims=True)
        low, high = np.where(total < 1, middle, low), np.where(total < 1, high, middle)
    return np.exp(log_root(alpha, beta, alpha * np.exp(low) + beta * low - below))


STEPS = (1e-3, 0.01, 0.1, 0.9, 1.1, 3, 30)


@pytest.mark.optimized
def test_softmax_at_any_step_keeps_its_digits():
    exact = {}
    for dtype in (np.float32, np.float64):
        v, info = rows().astype(dtype), np.finfo(dtype)
        v = v.astype(np.float32).astype(dtype)  # the same numbers, for one oracle
        below = np.max(v, -1, keepdims=True) - v
        solve = jax.jit(lambda v, step: prox.Entropy().prox(v, step))
        for step in map(np.float32, STEPS):
            if step not in exact:
                exact[step] = tempered(v, 1 - WIDE(step), WIDE(step))
            u, want = np.asarray(solve(jnp.asarray(v), dtype(step))), exact[step]
            assert u.dtype == dtype
            error, normal = np.abs(u - want), want > 10 * info.tiny
            assert np.max(error) < 24 * info.eps
            allowed = 24 * info.eps * (1 + below / step) * want
            assert np.all((error <= allowed) | ~normal)
            assert np.max(np.abs(np.sum(u, -1, dtype=WIDE) - 1)) < 24 * info.eps
            assert np.isfinite(prox.Entropy().value(jnp.asarray(u)))


@pytest.mark.optimized
def test_softmax_at_the_unit_step_to_the_bit(rng):
    v = jnp.asarray(np.concatenate([rows(), 3 * rng.normal(size=(20, ROWS))]), jnp.float32)
    prior = prox.Entropy(gamma=4.0)
    np.testing.assert_array_equal(prior.prox(v, 0.25), jax.nn.softmax(v))
    solve = jax.jit(lambda v, step: prox.Entropy(axis=0).prox(v, step))
    np.testing.assert_array_equal(solve(v, 1.0), jax.jit(lambda v: jax.nn.softmax(v, 0))(v))
    weight = jnp.asarray(rng.normal(size=v.shape), jnp.float32)
    slopes = [
        jax.grad(lambda v, f=f: jnp.sum(weight * f(v)))(v)
        for f in (lambda v: prox.Entropy().prox(v, 1.0), jax.nn.softmax)
    ]
    np.testing.assert_allclose(*slopes, atol=1e-6)


def test_limits_of_softmax_for_short_and_long_steps(rng):
    v = jnp.asarray(rng.normal(size=(20, 6)))
    short, long = (prox.Entropy().prox(v, step) for step in (1e-9, 1e9))
    np.testing.assert_allclose(short, prox.Simplex().prox(v, 1.0), atol=1e-6)
    np.testing.assert_allclose(long, 1 / 6, atol=1e-8)


def test_infinite_and_huge_entries():
    huge = np.finfo(np.float32).max
    for prior in (prox.Entropy(), prox.Simplex()):
        with jax.debug_nans(True):
            masked, pull = jax.vjp(lambda v, p=prior: p.prox(v, 0.5), jnp.asarray([0.3, -INF, 0.1]))
            slope = pull(jnp.asarray([1.0, 2.0, 3.0]))[0]
            far = prior.prox(jnp.asarray([huge, -huge, -INF, 0], jnp.float32), 0.5)
        np.testing.assert_allclose(masked[::2], prior.prox(jnp.asarray([0.3, 0.1]), 0.5))
        assert masked[1] == slope[1] == 0
        np.testing.assert_array_equal(far, [1, 0, 0, 0])
    assert prox.Entropy().conjugate(jnp.asarray([2.0, -INF])) == 2.5


def test_derivatives_are_finite_over_the_range():
    v = jnp.asarray(rows(), jnp.float32)
    weight = jnp.asarray(np.random.default_rng(0).normal(size=v.shape), jnp.float32)

    def total(prior, v, step):
        return jnp.sum(weight * prior.prox(v, step))

    for prior in (prox.Entropy(gamma=1.0), prox.Simplex(), prox.L2Ball(2.0)):
        slope = jax.jit(jax.grad(total, (0, 1, 2), allow_int=True))
        for step in (1e-6, 1e-3, 0.1, 1.0, 30.0, 1e4):
            slopes = slope(prior, v, jnp.float32(step))
            assert all(np.all(np.isfinite(s)) for s in jax.tree.leaves(slopes))
            assert np.max(np.abs(slopes[1])) < 10  # prox is nonexpansive
        second = jax.jit(jax.grad(lambda v, p=prior: jnp.sum(jax.grad(total, 1)(p, v, 0.3) ** 2)))
        assert np.all(np.isfinite(second(v)))


def test_conjugate_of_the_entropy(rng):
    prior, w = prox.Entropy(), np.concatenate([s * rng.normal(size=(6, 3)) for s in (0.1, 1, 20)])
    a, b = np.meshgrid(*2 * [np.linspace(0, 1, 801)])
    grid = np.stack([a, b, 1 - a - b], -1)[a + b <= 1 + 1e-12].clip(0)
    with np.errstate(all="ignore"):
        g = np.sum(np.where(grid > 0, grid * np.log(grid), 0) - 0.5 * grid**2, -1)
    least = np.max(w @ grid.T - g, -1)
    got, slope = jax.jit(jax.vmap(jax.value_and_grad(prior.conjugate)))(jnp.asarray(w))
    assert np.all(got >= least - 1e-14)
    np.testing.assert_allclose(got, least, atol=2e-4)
    np.testing.assert_allclose(slope, tempered(w, -1, 1).astype(float), atol=1e-9)
    value = jax.vmap(prior.value)(slope)  # equality of Fenchel at the maximiser
    np.testing.assert_allclose(got, np.sum(w * np.asarray(slope), -1) - value, atol=1e-13)
    gammas = jnp.asarray([[0.5], [2.0]])
    together = prox.Entropy(gamma=gammas).conjugate(jnp.asarray(w[:2]))
    apart = [prox.Entropy(gamma=g).conjugate(x) for g, x in zip(gammas[:, 0], w[:2], strict=True)]
    np.testing.assert_allclose(together, sum(apart))
    far = jnp.asarray([1e6, -1e6, 1e6 - 1], jnp.float32)
    near = float(prior.conjugate(jnp.asarray([0.0, -1.0])))
    assert float(prior.conjugate(far)) == pytest.approx(1e6 + near, rel=6e-8)


def test_the_ball(rng):
    v = rng.normal(size=(4, 3, 5))
    radius = np.array([[0.5], [1.0], [9.0]])
    norms = np.sqrt(np.sum(v**2, (0, 2), keepdims=True))[0]
    prior = prox.L2Ball(radius[None], axis=(0, 2))
    u = prior.prox(jnp.asarray(v), 0.3)
    np.testing.assert_allclose(u, v * np.minimum(1, radius / norms), rtol=1e-14)
    assert prior.value(u) == 0
    assert prior.value(1.001 * u) == np.inf
    np.testing.assert_allclose(prior.conjugate(jnp.asarray(v)), np.sum(radius * norms), rtol=1e-14)
    assert np.all(np.isfinite(jax.grad(prior.conjugate)(jnp.zeros((4, 3, 5)))))


def test_values_off_the_simplex():
    for prior in (prox.Simplex(), prox.Entropy()):
        assert prior.value(jnp.asarray([0.5, 0.5])) < 1
        assert prior.value(jnp.asarray([1.0, 0.0])) < 1
        for outside in ([0.5, 0.501], [1.001, -0.001], [0.3, 0.3]):
            assert prior.value(jnp.asarray(outside)) == np.inf


# --- certificates ---------------------------------------------------------------------------------


def entropy(u):
    with np.errstate(all="ignore"):
        return np.sum(np.where(u > 0, u * np.log(u), 0) - 0.5 * u * u, -1)


def softmax(t):
    e = np.exp(t - np.max(t))
    return e / np.sum(e)


def ball(t, radius=0.8):
    return t * np.minimum(1, radius / max(np.linalg.norm(t), 1e-300))


CASES = {  # the prior, g on its domain, and its prox at the step η
    "Simplex": (prox.Simplex(), lambda u: 0 * u[..., 0], lambda v, s: sorted_projection(v)),
    "Entropy": (prox.Entropy(gamma=0.5), lambda u: 0.5 * entropy(u), None),
    "L2Ball": (prox.L2Ball(0.8), lambda u: 0 * u[..., 0], lambda v, s: ball(v)),
    "ElasticNet": (
        prox.ElasticNet(0.4, 0.3),
        lambda u: np.sum(0.4 * np.abs(u) + 0.15 * u * u, -1),
        lambda v, s: np.sign(v) * np.maximum(np.abs(v) - 0.4 * s, 0) / (1 + 0.3 * s),
    ),
    "NonNegativeL1": (
        prox.NonNegativeL1(0.4),
        lambda u: 0.4 * np.sum(u, -1),
        lambda v, s: np.maximum(v - 0.4 * s, 0),
    ),
}


def least(kernel, x, bias, ridge, g, step_of):
    """The minimum of the objective in float64: accelerated steps, or BFGS in softmax coordinates."""

    def gradient(z):
        return kernel.T @ (kernel @ z - x) - bias + ridge * z

    def objective(z):
        fit = 0.5 * np.sum((kernel @ z - x) ** 2) - bias @ z + 0.5 * ridge * z @ z
        return fit + g(z)

    def in_coordinates(t):
        u = softmax(t)
        slope = gradient(u) + 0.5 * (np.log(u) - u)
        return objective(u), u * (slope - u @ slope)

    if step_of is None:
        start, options = np.zeros(kernel.shape[1]), {"gtol": 1e-10}
        return scipy.optimize.minimize(in_coordinates, start, jac=True, options=options).fun
    step = 1 / (np.linalg.norm(kernel, 2) ** 2 + ridge)
    z = ahead = np.zeros(kernel.shape[1])
    best, t = np.inf, 1.0
    for k in range(1500):
        moved = np.asarray(step_of(ahead - step * gradient(ahead), step), float)
        t, before = (1.0 if k % 100 == 0 else 0.5 + np.sqrt(0.25 + t * t)), t
        ahead, z = moved + (before - 1) / t * (moved - z), moved
        best = min(best, objective(z))
    return best


@pytest.mark.optimized
@pytest.mark.parametrize("name", CASES)
def test_certificates_in_single_precision(name, rng):
    """At least the true gap at every iterate, and of the order of round-off at the last."""
    prior, g, step_of = CASES[name]
    kernel, x = (rng.normal(size=shape).astype(np.float32) for shape in ((4, 7), (5, 4)))
    bias = (0.3 * rng.normal(size=7) - 0.2).astype(np.float32)
    wide = [a.astype(float) for a in (kernel, x, bias)]

    @jax.jit
    def iterates(ridge, x):
        problem = ss.LayerProblem(
            ss.Dense(jnp.asarray(kernel)), x, bias=bias, prior=prior, ridge=ridge
        )
        longest = 1 / (np.linalg.norm(wide[0], 2) ** 2 + ridge)

        def run(share):
            step = jnp.asarray(share * longest, x.dtype)
            return ss.prox_gd(problem, num_iters=1000, step_size=step, momentum=True).value

        # at these shares of 1/L about as far as in 3, 30 and 1,000 iterations
        z = jax.vmap(run)(jnp.asarray([1e-5, 1e-3, 1.0], x.dtype))
        return z, jax.lax.map(problem.certificate, z)

    for ridge in (0.0, 1e-3, 0.5):
        z, bounds = (np.asarray(a, float) for a in iterates(jnp.float32(ridge), jnp.asarray(x)))
        ridge = float(np.float32(ridge))
        best = np.array([least(wide[0], row, wide[2], ridge, g, step_of) for row in wide[1]])
        fit = 0.5 * np.sum((z @ wide[0].T - wide[1]) ** 2, -1) - z @ wide[2]
        gap = fit + 0.5 * ridge * np.sum(z * z, -1) + g(z) - best
        assert np.all(bounds >= gap)
        assert np.all(np.isfinite(bounds)) or name == "NonNegativeL1"
        assert np.all(bounds[-1] < 3e-4 * (1 + np.abs(best)))
