"""Proximal operators against brute force in numpy that shares no code with the library."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from catalogue import each_prior
from hypothesis import given
from hypothesis import strategies as st

import stochsolvers as ss
from stochsolvers import prox

INF = np.inf

# The priors by their definitions, on one entry: g(u), an interval containing the domain.
ELEMENTWISE = {
    "zero": (prox.Zero(), lambda u: 0 * u, (-INF, INF)),
    "relu": (prox.NonNegative(), lambda u: np.where(u >= 0, 0.0, INF), (0, INF)),
    "hinge": (
        prox.SquaredHinge(0.7, 0.3),
        lambda u: 0.35 * np.maximum(-u - 0.3, 0) ** 2,
        (-INF, INF),
    ),
    "log": (prox.LogBarrier(0.8), lambda u: -0.8 * np.log(u), (0, INF)),
    "symmetric": (prox.SymmetricLogBarrier(0.1), lambda u: -0.1 * np.log(1 - u**2), (-1, 1)),
    "interval": (
        prox.IntervalLogBarrier(0.3),
        lambda u: -0.3 * (np.log(u) + np.log(1 - u)),
        (0, 1),
    ),
    "l1": (prox.L1(0.6), lambda u: 0.6 * np.abs(u), (-INF, INF)),
    "box": (
        prox.Box(-0.5, 2.0),
        lambda u: np.where((u >= -0.5) & (u <= 2), 0.0, INF),
        (-0.5, 2),
    ),
}
SMOOTH = {"log", "symmetric", "interval"}
GROUPED = {
    "group": prox.GroupL2(0.7, axis=-1),
    "nuclear": prox.NuclearNorm(0.7),
    "psd": prox.PositiveSemidefinite(),
}
ALL = {**{name: entry[0] for name, entry in ELEMENTWISE.items()}, **GROUPED}
names = pytest.mark.parametrize("name", list(ALL))
elementwise_names = pytest.mark.parametrize("name", list(ELEMENTWISE))
reals = st.floats(-20, 20, allow_nan=False)
steps = st.floats(1e-3, 10)


def _argmin(objective, lower, upper, rounds=40):
    """Minimiser of a convex function on an interval: grids around the best point, refined."""
    for _ in range(rounds):
        grid = np.linspace(lower, upper, 41)
        with np.errstate(all="ignore"):
            values = objective(grid)
        best = int(np.nanargmin(np.where(np.isnan(values), INF, values)))
        lower, upper = grid[max(best - 1, 0)], grid[min(best + 1, 40)]
    return 0.5 * (lower + upper)


def _matrix(rng, *shape):
    return rng.normal(size=shape)


@jax.jit
def _prox(prior, v, step):
    """The prox, in one program for all numbers of a prior."""
    return prior.prox(v, step)


def _along(function):
    """(point, way) ↦ the function's derivative along the way, by forward mode and by differences."""

    @jax.jit
    def both(point, way):
        def moved(t):
            return function(*(p + t * d for p, d in zip(point, way, strict=True)))

        right, left = jax.vmap(moved)(jnp.asarray([1e-6, -1e-6]))
        return jax.jvp(moved, (0.0,), (1.0,))[1], (right - left) / 2e-6

    return both


# --- values, against minimisation -----------------------------------------------------------------


@elementwise_names
@given(v=reals, step=steps)
def test_elementwise_prox_minimises(name, v, step):
    prior, g, (lower, upper) = ELEMENTWISE[name]
    u = float(prior.prox(jnp.asarray(v), step))

    def objective(x):
        return 0.5 * (x - v) ** 2 + step * g(x)

    best = _argmin(objective, max(lower, -40.0), min(upper, 40.0))
    assert u == pytest.approx(best, abs=3e-7)  # the square root of round-off: values were compared
    assert objective(np.float64(u)) <= objective(np.float64(best)) + 1e-13 * (1 + v * v)


@elementwise_names
def test_value_is_the_sum_of_its_definition(name, rng):
    prior, g, (lower, upper) = ELEMENTWISE[name]
    u = rng.uniform(max(lower, -3), min(upper, 3), size=(3, 4))
    np.testing.assert_allclose(prior.value(jnp.asarray(u)), np.sum(g(u)), rtol=1e-13)
    for outside in (lower - 0.1, upper + 0.1):
        if np.isfinite(outside):
            assert prior.value(jnp.asarray([0.5, outside])) == INF


def test_barriers_are_infinite_on_their_walls():
    assert prox.LogBarrier().value(jnp.zeros(2)) == INF
    assert prox.SymmetricLogBarrier().value(jnp.ones(2)) == INF
    assert prox.IntervalLogBarrier().value(jnp.asarray([0.5, 1.0])) == INF
    assert prox.Box(-1.0, 1.0).value(jnp.ones(2)) == 0
    assert prox.NonNegative().value(jnp.zeros(2)) == 0


def test_group_prox_minimises(rng):
    v, step = _matrix(rng, 3, 4), 0.9
    u = np.asarray(GROUPED["group"].prox(jnp.asarray(v), step))
    for row in range(3):

        def objective(x, v=v[row]):
            return 0.5 * np.sum((x - v) ** 2) + step * 0.7 * np.linalg.norm(x)

        found = scipy.optimize.minimize(objective, np.ones(4), method="BFGS", tol=1e-10)
        np.testing.assert_allclose(u[row], found.x, atol=1e-6)
    small = 0.1 * v
    assert np.all(np.asarray(GROUPED["group"].prox(jnp.asarray(small), 3.0)) == 0)


@pytest.mark.parametrize("shape", [(3, 3), (4, 2), (2, 4)])
def test_nuclear_prox_minimises(shape, rng):
    v, weight = 2 * _matrix(rng, *shape), 0.45
    u = np.asarray(prox.NuclearNorm(0.9).prox(jnp.asarray(v), 0.5))

    # 2||U||_* = min ||P||² + ||Q||² over U = PQᵀ: smooth, without any singular value.
    def objective(flat):
        p, q = flat[: shape[0] * 5].reshape(-1, 5), flat[shape[0] * 5 :].reshape(-1, 5)
        gap = p @ q.T - v
        grad = np.concatenate([(gap @ q + weight * p).ravel(), (gap.T @ p + weight * q).ravel()])
        return 0.5 * np.sum(gap**2) + 0.5 * weight * np.sum(flat**2), grad

    start = _matrix(rng, sum(shape) * 5)
    options = {"maxiter": 5000, "ftol": 1e-16, "gtol": 1e-10}
    flat = scipy.optimize.minimize(objective, start, jac=True, method="L-BFGS-B", options=options).x
    p, q = flat[: shape[0] * 5].reshape(-1, 5), flat[shape[0] * 5 :].reshape(-1, 5)
    np.testing.assert_allclose(u, p @ q.T, atol=2e-5)


def test_semidefinite_prox_minimises(rng):
    v = _matrix(rng, 3, 3)
    u = np.asarray(GROUPED["psd"].prox(jnp.asarray(v), 0.3))

    def objective(flat):
        factor = flat.reshape(3, 3)
        gap = factor @ factor.T - v
        return 0.5 * np.sum(gap**2), ((gap + gap.T) @ factor).ravel()

    options = {"maxiter": 5000, "ftol": 1e-16, "gtol": 1e-11}
    flat = scipy.optimize.minimize(
        objective, _matrix(rng, 9), jac=True, method="L-BFGS-B", options=options
    ).x
    np.testing.assert_allclose(u, flat.reshape(3, 3) @ flat.reshape(3, 3).T, atol=2e-5)
    np.testing.assert_array_equal(u, u.T)
    assert GROUPED["psd"].value(jnp.asarray(u)) == 0
    assert GROUPED["psd"].value(jnp.asarray(v)) == INF
    assert GROUPED["psd"].value(-jnp.eye(3)) == INF


def test_values_of_group_and_nuclear(rng):
    u = _matrix(rng, 2, 3, 4)
    np.testing.assert_allclose(
        GROUPED["group"].value(jnp.asarray(u)), 0.7 * np.sum(np.sqrt(np.sum(u**2, -1)))
    )
    np.testing.assert_allclose(
        GROUPED["nuclear"].value(jnp.asarray(u)),
        0.7 * sum(np.sum(np.sqrt(np.maximum(np.linalg.eigvalsh(m @ m.T), 0))) for m in u),
    )


# --- theory ---------------------------------------------------------------------------------------


@names
def test_firmly_non_expansive(name, rng):
    prior = ALL[name]
    v, w = 3 * _matrix(rng, 20, 3, 3), 3 * _matrix(rng, 20, 3, 3)
    u, other = (np.asarray(_prox(prior, point, 0.7)) for point in (v, w))
    du, dv = u - other, v - w
    assert np.all(np.sum(du * du, (1, 2)) <= np.sum(du * dv, (1, 2)) + 1e-12)


@jax.jit
def _moreau(prior, v, step):
    """u = prox(v, η), the subgradient (v − u)/η, its round-off removed, and g(u) + g*(s)."""
    u = prior.prox(v, step)
    s = prior.dual_projection((v - u) / step)
    return u, s, prior.value(u) + prior.conjugate(s)


@names
@pytest.mark.parametrize("step", [0.05, 1.0, 7.0])
def test_fenchel_young_holds_with_equality(name, step, rng):
    # v − u = ηs with s a subgradient at u: this is Moreau's identity, v = u + ηs.
    prior = ALL[name]
    v = 2 * _matrix(rng, 3, 3)
    u, s, total = map(np.asarray, _moreau(prior, v, step))
    np.testing.assert_allclose(s, (v - u) / step, atol=1e-13)
    np.testing.assert_allclose(total, np.sum(u * s), atol=1e-11)


@names
def test_fenchel_young_inequality(name, rng):
    prior = ALL[name]
    for _ in range(5):
        u = prior.prox(jnp.asarray(2 * _matrix(rng, 3, 3)), 0.8)
        w = prior.dual_projection(jnp.asarray(2 * _matrix(rng, 3, 3)), 1e-3)
        bound = prior.value(u) + prior.conjugate(w)
        assert np.isfinite(bound)
        assert bound >= jnp.sum(u * w) - 1e-10


@elementwise_names
def test_conjugate_is_the_supremum(name):
    prior, g, (lower, upper) = ELEMENTWISE[name]
    for w in (-2.3, -0.6, -0.01, 0.0, 0.01, 0.6, 2.3):
        lo, hi = max(lower, -1e3), min(upper, 1e3)
        best = _argmin(lambda u, w=w: g(u) - w * u, lo, hi)
        with np.errstate(all="ignore"):
            supremum = w * best - g(np.float64(best))
        conjugate = float(prior.conjugate(jnp.asarray(w)))
        if np.isinf(conjugate):  # the supremum grows with the search interval
            assert abs(best) > 999
            if w == 0:
                assert name == "log"
        else:
            assert conjugate == pytest.approx(supremum, abs=1e-6)


@names
@pytest.mark.parametrize("margin", [0.0, 0.2, 5.0])
def test_dual_projection_is_the_nearest_point(name, margin, rng):
    prior = ALL[name]
    w = jnp.asarray(2 * _matrix(rng, 3, 3))
    z = prior.dual_projection(w, margin)
    assert np.isfinite(prior.conjugate(z))
    np.testing.assert_allclose(prior.dual_projection(z, margin), z, atol=1e-13)
    # Nearest: <w − z, y − z> ≤ 0 for every y of the set, here for projections of other points.
    for _ in range(10):
        y = prior.dual_projection(jnp.asarray(3 * _matrix(rng, 3, 3)), margin)
        assert jnp.sum((w - z) * (y - z)) <= 1e-11


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@names
def test_projected_points_are_feasible_in_any_precision(name, dtype, rng):
    project = jax.jit(lambda prior, w: (prior.dual_projection(w), prior.prox(w, 0.3)))
    evaluate = jax.jit(lambda prior, w, u: (prior.conjugate(w), prior.value(u)))
    points = project(ALL[name], jnp.asarray(100 * _matrix(rng, 8, 6, 6), dtype))
    assert np.all(np.isfinite(evaluate(ALL[name], *points)))


@pytest.mark.optimized
def test_semidefinite_dual_points_with_a_large_skew_part(rng):
    """The projection's symmetric part is 0 up to the round-off of the skew part: still in the domain."""
    prior = prox.PositiveSemidefinite()
    a = rng.normal(size=(200, 2, 2))
    w = jnp.asarray(a @ a.transpose(0, 2, 1) + 10 * (a - a.transpose(0, 2, 1)))
    assert jnp.all(jax.vmap(prior.conjugate)(prior.dual_projection(w)) == 0)
    assert prior.conjugate(jnp.array([[1e-6, 10.0], [-10.0, 0.0]])) == INF


def test_margin_keeps_a_distance():
    w = jnp.asarray([-3.0, -0.1, 0.0, 4.0])
    np.testing.assert_allclose(prox.NonNegative().dual_projection(w, 0.5), [-3, -0.5, -0.5, -0.5])
    np.testing.assert_allclose(prox.L1(1.0).dual_projection(w, 0.25), [-0.75, -0.1, 0, 0.75])
    np.testing.assert_allclose(prox.Box(-INF, 1.0).dual_projection(w, 0.5), [0.5, 0.5, 0.5, 4])
    np.testing.assert_allclose(prox.Box(0.0, INF).dual_projection(w, 0.5), [-3, -0.5, -0.5, -0.5])
    np.testing.assert_allclose(prox.Box(-INF, INF).dual_projection(w, 0.5), np.zeros(4))
    assert prox.Box(0.0, INF).conjugate(w) == INF
    assert prox.Box(0.0, INF).conjugate(-jnp.abs(w)) == 0
    projected = prox.PositiveSemidefinite().dual_projection(jnp.diag(jnp.asarray([1.0, -2.0])), 0.5)
    np.testing.assert_allclose(projected, np.diag([-0.5, -2.0]), atol=1e-15)


@pytest.mark.parametrize(
    ("name", "minimiser"),
    [("relu", 1.3), ("hinge", -0.2), ("symmetric", 0.0), ("interval", 0.5), ("l1", 0.0)],
)
def test_minimisers_are_fixed_points(name, minimiser):
    for step in (0.01, 1.0, 30.0):
        assert float(ALL[name].prox(jnp.asarray(minimiser), step)) == pytest.approx(minimiser)


# --- activations ----------------------------------------------------------------------------------


@pytest.mark.optimized
def test_familiar_activations(rng):
    v = jnp.concatenate(
        [jnp.asarray([0.0, -0.0, 1.0, -1.0, 6.0]), jnp.asarray(5 * rng.normal(size=50))]
    )
    pairs = [
        (prox.Zero(), lambda x: x),
        (prox.NonNegative(), jax.nn.relu),
        (prox.leaky_relu_prior(0.2), lambda x: jax.nn.leaky_relu(x, 0.2)),
        (prox.Box(-1.0, 1.0), jax.nn.hard_tanh),
        (prox.Box(0.0, 6.0), jax.nn.relu6),
    ]
    for prior, activation in pairs:
        np.testing.assert_allclose(prior.prox(v, 1.0), activation(v), rtol=1e-15)
        inner = v[5:]
        np.testing.assert_allclose(
            jax.vmap(jax.grad(lambda x, p=prior: p.prox(x, 1.0)))(inner),
            jax.vmap(jax.grad(activation))(inner),
            rtol=1e-15,
        )
    for prior, activation in pairs[:4]:  # at the kinks too
        np.testing.assert_allclose(
            jax.vmap(jax.grad(lambda x, p=prior: p.prox(x, 1.0)))(v),
            jax.vmap(jax.grad(activation))(v),
        )


def test_smooth_activations_stay_as_close_as_documented():
    v = jnp.linspace(-10, 10, 2001)
    softplus = jnp.abs(prox.LogBarrier(1.0).prox(v, 1.0) - jax.nn.softplus(v))
    tanh = jnp.abs(prox.SymmetricLogBarrier(0.1).prox(v, 1.0) - jnp.tanh(v))
    sigmoid = jnp.abs(prox.IntervalLogBarrier(0.25).prox(v + 0.5, 1.0) - jax.nn.sigmoid(v))
    assert jnp.max(softplus) < 0.31
    assert jnp.max(tanh) < 0.061
    assert jnp.max(sigmoid) < 0.05


def test_the_step_changes_the_shape_of_all_but_indicators():
    v = jnp.asarray([-1.5, 0.3, 2.0])
    for prior in (prox.Zero(), prox.NonNegative(), prox.Box(-1.0, 1.0)):
        np.testing.assert_array_equal(prior.prox(v, 1.0), prior.prox(v, 0.25))
    np.testing.assert_allclose(prox.SquaredHinge(1.0).prox(v, 0.25), [-1.5 / 1.25, 0.3, 2.0])
    np.testing.assert_allclose(prox.L1(2.0).prox(v, 0.25), prox.L1(0.5).prox(v, 1.0))


# --- precision ------------------------------------------------------------------------------------


def _bisect(derivative, lower, upper):
    """The root of an increasing function, on a logarithmic scale, in extended precision."""
    lower, upper = np.log(lower), np.log(upper)
    for _ in range(90):
        middle = 0.5 * (lower + upper)
        below = derivative(np.exp(middle)) < 0
        lower, upper = np.where(below, middle, lower), np.where(below, upper, middle)
    return np.exp(0.5 * (lower + upper))


def _oracle(name, v, c):
    """(u, distance to the nearest wall) in long double, each accurate in itself."""
    v, c = v.astype(np.longdouble), c.astype(np.longdouble)
    tiny, big = np.full_like(v, 1e-60), np.full_like(v, 1e8)
    if name == "log":
        u = _bisect(lambda x: x - v - c / x, tiny, big)
        return u, u
    if name == "symmetric":
        a = np.abs(v)
        small = _bisect(lambda x: x - a + 2 * c * x / (1 - x * x), tiny, 0 * v + 0.9)
        wall = _bisect(lambda d: d + (a - 1) - 2 * c * (1 - d) / (d * (2 - d)), tiny, 0 * v + 0.9)
        near = small < 0.5
        return np.sign(v) * np.where(near, small, 1 - wall), np.where(near, 1 - small, wall)
    low = _bisect(lambda x: x - v - c / x + c / (1 - x), tiny, 0 * v + 0.9)
    high = _bisect(lambda d: d - (1 - v) - c / d + c / (1 - d), tiny, 0 * v + 0.9)
    return np.where(low < 0.5, low, 1 - high), np.where(low < 0.5, low, high)


BARRIERS = {
    "log": prox.LogBarrier,
    "symmetric": prox.SymmetricLogBarrier,
    "interval": prox.IntervalLogBarrier,
}


def _sweep(dtype):
    size = np.logspace(-6, 6, 61)
    v = np.concatenate([-size, size, 1 + size[:30], 1 - size[:30], [0.0, 0.5, 1.0, -1.0]])
    v, c = np.meshgrid(v.astype(dtype), np.logspace(-8, 3, 23).astype(dtype))
    return v.ravel(), c.ravel()


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", list(BARRIERS))
def test_barriers_keep_their_digits(name, dtype):
    v, c = _sweep(dtype)
    u = np.asarray(BARRIERS[name](jnp.asarray(c)).prox(jnp.asarray(v), 1.0))
    assert u.dtype == dtype
    exact, _ = _oracle(name, v, c)
    nonzero = exact != 0
    error = np.abs(u[nonzero] - exact[nonzero]) / np.abs(exact[nonzero])
    assert np.max(error) < 4 * np.finfo(dtype).eps
    value = jax.vmap(lambda x, w: BARRIERS[name](w).value(x))(jnp.asarray(u), jnp.asarray(c))
    assert np.all(np.isfinite(value))


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", list(BARRIERS))
def test_barrier_derivatives_keep_their_digits(name, dtype):
    v, c = _sweep(dtype)
    u, wall = _oracle(name, v, c)
    wide = c.astype(np.longdouble)
    if name == "log":
        curvature, slope = 1 / u**2, -1 / u
    else:
        low = name == "interval"
        other = 1 - wall if low else 2 - wall
        curvature = 1 / wall**2 + 1 / other**2
        near_zero = u < 0.5 if low else u < 0
        # In the symmetric case a difference of the terms would cancel for small u.
        slope = (1 / wall - 1 / other) * np.where(near_zero, -1, 1) if low else 2 * u / wall / other

    def scalar(x, w):
        return BARRIERS[name](w).prox(x, 1.0)

    v, c = jnp.asarray(v), jnp.asarray(c)
    du, dc = jax.jit(jax.vmap(jax.grad(scalar, (0, 1))))(v, c)
    scale = 1 + wide * curvature
    np.testing.assert_allclose(du, 1 / scale, rtol=30 * np.finfo(dtype).eps)
    np.testing.assert_allclose(
        dc, -slope / scale, rtol=30 * np.finfo(dtype).eps, atol=float(np.finfo(dtype).tiny)
    )
    _, forward = jax.jvp(scalar, (v, c), (jnp.ones_like(v), jnp.zeros_like(c)))
    np.testing.assert_allclose(forward, du, rtol=1e-6)
    second = jax.jit(jax.vmap(jax.grad(jax.grad(scalar))))(v, c)
    assert np.all(np.isfinite(second))


@names
def test_values_and_derivatives_are_finite_in_single_precision(name):
    prior = ALL[name]
    size = np.logspace(-6, 6, 25, dtype=np.float32)
    v = np.concatenate([-size, size, np.zeros(1, np.float32)])
    v = jnp.asarray(v[:, None, None] * np.array([[1, 2], [2, -1]], np.float32))

    def total(v, step):
        return jnp.sum(prior.prox(v, step) * jnp.arange(4.0, dtype=v.dtype).reshape(2, 2))

    gradients = jax.jit(jax.vmap(jax.value_and_grad(total, (0, 1)), in_axes=(0, None)))
    for step in (1e-8, 1e-3, 1.0, 1e3):
        value, (dv, dstep) = gradients(v, jnp.float32(step))
        assert value.dtype == dv.dtype == np.float32
        assert np.all(np.isfinite(value))
        assert np.all(np.isfinite(dv))
        assert np.all(np.isfinite(dstep))


@pytest.mark.optimized
def test_distances_below_the_spacing_of_floats_stay_inside():
    v = jnp.asarray([-1e6, 1e6, -1e30, 1e15], jnp.float32)
    for prior in (prox.SymmetricLogBarrier(1e-8), prox.IntervalLogBarrier(1e-8)):
        u, slope = jax.jit(jax.vmap(jax.value_and_grad(lambda x, p=prior: p.prox(x, 1.0))))(v[:2])
        assert np.isfinite(prior.value(u))
        assert np.all(slope > 0)
    assert np.isfinite(prox.LogBarrier(1e-8).value(prox.LogBarrier(1e-8).prox(v[:2], 1.0)))


# --- range ----------------------------------------------------------------------------------------
#
# |v| over all normal float32, ηγ from 1e-30 to 1e30 in several splits into η and γ, against closed forms
# or bisection in long double, which has 15 bits of exponent.


def _whole_range():
    """(v, η, γ) in float32, flat."""
    size = np.concatenate([np.logspace(-37.5, 38.5, 77), 10.0 ** np.arange(-7, 0)])
    v = np.concatenate([-size, size, 1 + size[84 // 2 - 8 :], [0.0, 0.5, 1.0, -1.0, 0.75, -0.3]])
    c = np.concatenate([np.logspace(-30, 30, 13), [3e-8, 1e-3, 0.7, 3e7]])
    etas = np.concatenate([np.ones_like(c), c, np.full_like(c, 1e-6), np.full_like(c, 1e6)])
    gammas = np.concatenate([c, np.ones_like(c), 1e6 * c, 1e-6 * c])
    v, eta = np.meshgrid(np.clip(v, -3.4e38, 3.4e38).astype(np.float32), etas.astype(np.float32))
    gamma = np.broadcast_to(gammas.astype(np.float32)[:, None], v.shape)
    return v.ravel(), eta.ravel(), gamma.ravel()


def _exact_odds(a, excess, c):
    """The odds t of the cubic's root, by bisection."""

    def increasing(t):
        fit = np.where(t < 1, t / (1 + t) - a, -1 / (1 + t) - excess)
        return fit + c * (t + t / (1 + 2 * t))

    return _bisect(increasing, np.full_like(a, 1e-90), np.full_like(a, 1e90))


def _exact_symmetric(a, excess, c):
    """u, 1 − u, du/da and du/dc for a ≥ 0."""
    t = _exact_odds(a, excess, c)
    u, wall = t / (1 + t), 1 / (1 + t)
    square = wall * (1 + u)  # 1 − u²
    slope = square**2 / (square**2 + 2 * c * (1 + u * u))
    return u, wall, slope, -2 * u * square / (square**2 + 2 * c * (1 + u * u))


def _exact_prox(name, v, c, shift):
    """u, du/dv and du/dc in long double."""
    if name == "log":
        h = np.sqrt(v * v + 4 * c)
        return np.where(v < 0, 2 * c / (h + np.abs(v)), (np.abs(v) + h) / 2), 0, 1 / h
    if name == "symmetric":
        u, _, slope, by_weight = _exact_symmetric(np.abs(v), np.abs(v) - 1, c)
        return np.sign(v) * u, slope, np.sign(v) * by_weight
    if name == "interval":
        left = v < 0.5
        a, excess = np.where(left, 1 - 2 * v, 2 * v - 1), np.where(left, -2 * v, 2 * v - 2)
        _, wall, slope, by_weight = _exact_symmetric(a, excess, 4 * c)
        u = np.where(left, wall / 2, 1 - wall / 2)
        return u, slope, np.where(left, -2, 2) * by_weight
    if name == "hinge":
        below = v < -shift
        u = np.where(below, (v - c * shift) / (1 + c), v)
        slope = np.where(below, 1 / (1 + c), 1)
        return u, slope, np.where(below, -(v + shift) / (1 + c) ** 2, 0)
    u = np.sign(v) * np.maximum(np.abs(v) - c, 0)
    return u, np.abs(v) > c, -np.sign(v) * (np.abs(v) > c)


def _exact_value(name, u, gamma, shift):
    """g, dg/du, dg/dγ."""
    with np.errstate(all="ignore"):
        h, slope = {
            "log": lambda: (-np.log(u), -1 / u),
            "symmetric": lambda: (-np.log1p(-u * u), 2 * u / ((1 - u) * (1 + u))),
            "interval": lambda: (-np.log(u) - np.log1p(-u), (2 * u - 1) / (u * (1 - u))),
            "hinge": lambda: (np.maximum(-u - shift, 0) ** 2 / 2, -np.maximum(-u - shift, 0)),
            "l1": lambda: (np.abs(u), np.sign(u)),
        }[name]()
    return gamma * h, gamma * slope, h


def _exact_conjugate(name, w, gamma, shift):
    """g*, dg*/dw = u and dg*/dγ = −h(u), with the maximiser u of w u − γ h(u); and the terms' size."""
    if name == "hinge":
        return w * w / (2 * gamma) - shift * w, w / gamma - shift, -((w / gamma) ** 2) / 2
    if name == "log":
        return gamma * (np.log(-gamma / w) - 1), -gamma / w, np.log(-gamma / w)
    root = np.sqrt((4 if name == "interval" else 1) * gamma**2 + w * w)
    if name == "symmetric":
        u = w / (gamma + root)
        low = np.minimum(u * u, 0.5)
        logs = np.where(low < 0.25, np.log1p(-low), np.log(2 * gamma / (gamma + root)))
        q = w * u
        return np.where(-logs < 1e-12, q / 2, q + gamma * logs), u, logs
    low = 2 * gamma / (2 * gamma + np.abs(w) + root)  # u for −|w|
    logs = np.log(low) + np.log1p(-low)
    low_value = -np.abs(w) * low + gamma * logs
    return np.maximum(w, 0) + low_value, np.where(w > 0, 1 - low, low), logs


def _assert_representable(got, exact, scale: Any = 0.0, floor: Any = 1.0, units=32, what=""):
    """Equal to a few units of round-off, wherever the exact result is a normal float32.

    The floor is 1, or the factor of which u times it is the result.
    """
    info = np.finfo(np.float32)
    got, exact = np.asarray(got), np.asarray(exact, np.longdouble)
    fits = np.abs(exact) < 0.99 * info.max
    error = np.abs(got - exact)
    allowed = units * info.eps * np.maximum(np.abs(exact), scale) + 4 * info.tiny * np.maximum(
        floor, 1
    )
    wrong = fits & ~(error <= allowed)
    assert not np.any(wrong), (
        what,
        np.flatnonzero(wrong)[:5],
        wrong.sum(),
        got[wrong][:5],
        exact[wrong][:5],
    )


RANGED = {
    "log": lambda gamma, shift: prox.LogBarrier(gamma),
    "symmetric": lambda gamma, shift: prox.SymmetricLogBarrier(gamma),
    "interval": lambda gamma, shift: prox.IntervalLogBarrier(gamma),
    "hinge": lambda gamma, shift: prox.SquaredHinge(gamma, shift),
    "l1": lambda gamma, shift: prox.L1(gamma),
}
ranged = pytest.mark.parametrize("name", list(RANGED))


def _entrywise(method, name):
    """The function's values and partial derivatives, entry by entry."""

    def function(argument, gamma, shift, *rest):
        return getattr(RANGED[name](gamma, shift), method)(argument, *rest)

    return jax.jit(jax.vmap(jax.value_and_grad(function, (0, 1))))


@pytest.mark.optimized
@ranged
@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_prox_over_the_whole_range(name, shift):
    v, eta, gamma = _whole_range()
    decided = np.abs(np.abs(v) - eta * gamma) > 1e-6 * np.abs(v)  # not on the kink of L1
    v, eta, gamma = v[decided], eta[decided], gamma[decided]
    shift = np.full_like(v, shift)

    def function(v, gamma, eta, shift):
        return RANGED[name](gamma, shift).prox(v, eta)

    u, dv, dgamma, deta = jax.jit(
        lambda *arguments: (
            function(*arguments),
            *jax.vjp(function, *arguments)[1](jnp.ones_like(v))[:3],
        )
    )(v, gamma, eta, shift)
    wide = [array.astype(np.longdouble) for array in (v, eta, gamma, shift)]
    exact, slope, by_weight = _exact_prox(name, wide[0], wide[1] * wide[2], wide[3])
    if name == "log":
        slope = exact * by_weight
    near = name == "l1"  # |v| − ηγ: the round-off of the product is relative to the product
    _assert_representable(u, exact, np.abs(wide[0]) if near or shift[0] else 0.0, what="u")
    _assert_representable(dv, slope, what="du/dv")
    _assert_representable(dgamma, by_weight * wide[1], floor=eta, what="du/dγ")
    _assert_representable(deta, by_weight * wide[2], floor=gamma, what="du/dη")
    for first, second in ((u, exact), (dv, slope)):
        assert np.all(np.isfinite(first) | (np.abs(second) > 3e38))


@pytest.mark.optimized
@ranged
def test_values_over_the_whole_range(name):
    v, eta, gamma = _whole_range()
    u = np.asarray(jax.jit(lambda v, g, e: RANGED[name](g, 0.3).prox(v, e))(v, gamma, eta))
    u = np.where(np.abs(u) < np.finfo(np.float32).tiny, np.float32(0.5), u)
    shift = np.full_like(v, 0.3)
    got, (du, dgamma) = _entrywise("value", name)(u, gamma, shift)
    wide = [array.astype(np.longdouble) for array in (u, gamma, shift)]
    exact, slope, by_weight = _exact_value(name, *wide)
    _assert_representable(got, exact, what="g")
    scale = wide[1] * np.abs(1 / wide[0]) if name == "interval" else 0.0
    _assert_representable(du, slope, scale, what="dg/du")
    _assert_representable(dgamma, by_weight, what="dg/dγ")


@pytest.mark.optimized
@ranged
def test_conjugates_over_the_whole_range(name):
    w, _, gamma = (array[: len(array) // 2] for array in _whole_range())  # γ from 1e-30 to 1e30
    if name == "l1":
        w = np.clip(w, -gamma, gamma)
        assert np.all(_entrywise("conjugate", name)(w, gamma, gamma)[0] == 0)
        return
    if name in ("log", "hinge"):
        w, gamma = w[w < 0], gamma[w < 0]
    shift = np.full_like(w, 0.3)
    got, (dw, dgamma) = _entrywise("conjugate", name)(w, gamma, shift)
    wide = [array.astype(np.longdouble) for array in (w, gamma, shift)]
    exact, u, by_weight = _exact_conjugate(name, *wide)
    # condition: the round-off of the arguments alone moves g* by these
    scale = np.abs(wide[0] * u) + wide[1] if name in ("log", "interval") else 0.0
    _assert_representable(got, exact, scale, what="g*")
    _assert_representable(dw, u, what="dg*/dw")
    _assert_representable(dgamma, by_weight, 1.0 if name == "log" else 0.0, what="dg*/dγ")


@pytest.mark.optimized
@ranged
def test_dual_projections_over_the_whole_range(name):
    w, _, gamma = _whole_range()
    got, (dw, _) = _entrywise("dual_projection", name)(w, gamma, 0 * w)
    low = {"log": -INF, "hinge": -INF, "l1": -gamma}.get(name, -INF)
    high = {"log": -np.finfo(np.float32).tiny, "hinge": np.float32(0), "l1": gamma}.get(name, INF)
    np.testing.assert_array_equal(got, np.clip(w, low, high))
    inside = (w > low) & (w < high)
    np.testing.assert_array_equal(np.asarray(dw)[inside], 1)


@pytest.mark.optimized
def test_the_derivative_of_a_shifted_hinge_keeps_its_digits():
    v, shift = np.float32(-0.3000002), np.float32(0.3)
    got = jax.grad(lambda gamma: prox.SquaredHinge(gamma, shift).prox(jnp.asarray(v), 1.0))(
        jnp.float32(0.7)
    )
    assert float(got) == pytest.approx(-(float(v) + float(shift)) / 1.7**2, rel=1e-6)


@jax.jit
def _group(weight, v):
    """Methods of the prior of a group, with derivatives in v and η, forward and reverse."""
    prior = prox.GroupL2(weight)
    modes = (jax.jacfwd, jax.jacrev)
    return (
        prior.prox(v, 1.0),
        [mode(lambda x: prior.prox(x, 1.0))(v) for mode in modes],
        [mode(lambda s: prox.GroupL2(1.0).prox(v, s))(weight) for mode in modes],
        [mode(prior.dual_projection)(v) for mode in modes],
        prior.value(v),
        jax.grad(prior.value)(v),
        prior.dual_projection(v),
        prior.conjugate(v),
    )


@pytest.mark.optimized
@pytest.mark.parametrize("weight", [1e-30, 1e-20, 1e-3, 1.0, 1e20, 1e30])
@pytest.mark.parametrize("size", [1e-37, 1e-20, 1e-10, 1.0, 1e10, 1e20, 2e38])
def test_group_jacobian_over_the_whole_range(size, weight):
    v = (size * np.array([0.6, -0.8, 1.1])).astype(np.float32)
    wide, c = v.astype(np.longdouble), np.longdouble(np.float32(weight))
    norm = np.sqrt(np.sum(wide**2))
    unit, keeps = wide / norm, (norm > c).astype(np.longdouble)
    u, jacobians, by_steps, dual_jacobians, value, slope, dual, conjugate = _group(
        jnp.float32(weight), jnp.asarray(v)
    )
    _assert_representable(u, keeps * (1 - c / norm) * wide)
    for jacobian, by_step, dual_jacobian in zip(jacobians, by_steps, dual_jacobians, strict=True):
        exact = keeps * ((1 - c / norm) * np.eye(3) + c / norm * np.outer(unit, unit))
        _assert_representable(jacobian, exact)
        _assert_representable(by_step, -keeps * unit)
        inner = c / norm * (np.eye(3) - np.outer(unit, unit))
        _assert_representable(
            dual_jacobian, np.where(keeps == 1, inner, np.eye(3)), c / norm * keeps
        )
    _assert_representable(value, c * norm)
    _assert_representable(slope, c * unit)
    _assert_representable(dual, np.where(keeps == 1, c * unit, wide))
    assert (conjugate == INF) == bool(keeps)


@functools.partial(jax.jit, static_argnums=0)
def _scaled(name, s, v, dv):
    """Prox and dual projection of s v, with derivatives, and what the prior says of s prox(v)."""
    prior, gamma = ALL[name], () if name == "psd" else (0.7 * s,)
    scaled = type(prior)(*gamma).dual_projection
    one = jnp.float32(1)
    maps = (
        jax.jvp(prior.prox, (s * v, jnp.float32(0.4) * s), (dv, one)),
        jax.jvp(scaled, (s * v, jnp.float32(0.1) * s), (dv, one)),
    )
    u = s * prior.prox(v, 0.4)
    return maps, jax.value_and_grad(prior.value)(u), prior.conjugate(-u)


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**-66, 2.0**66, 2.0**120])
@pytest.mark.parametrize("name", list(GROUPED))
def test_norms_and_spectra_are_homogeneous(name, scale, rng):
    # prox of s v at the step s η is s prox(v, η), and the derivatives are the same.
    shape = (2, 3, 4 if name == "nuclear" else 3)
    v, dv = (_matrix(rng, *shape).astype(np.float32) for _ in "12")
    maps, (value, slope), conjugate = _scaled(name, np.float32(scale), v, dv)
    at_one, (value_at_one, slope_at_one), _ = _scaled(name, np.float32(1), v, dv)
    for (u, du), (u_at_one, du_at_one) in zip(maps, at_one, strict=True):
        np.testing.assert_allclose(np.asarray(u) / np.float32(scale), u_at_one, atol=2e-6)
        np.testing.assert_allclose(du, du_at_one, atol=2e-6)
    if name == "psd":
        assert value == conjugate == 0
    else:
        np.testing.assert_allclose(np.asarray(value) / scale, value_at_one, rtol=1e-5)
        np.testing.assert_allclose(slope, slope_at_one, atol=2e-5)


@pytest.mark.parametrize("name", list(GROUPED))
def test_dual_projections_have_the_derivatives_of_finite_differences(name, rng):
    prior = ALL[name]
    along = _along(prior.dual_projection)
    for shape in ((3, 3),) if name == "psd" else ((3, 3), (2, 5), (5, 2)):
        w, dw = 2 * _matrix(rng, *shape), _matrix(rng, *shape)
        tangent, expected = along((w, 0.2), (dw, 0.3))
        np.testing.assert_allclose(tangent, expected, atol=1e-7)
    gradient = jax.grad(lambda w: jnp.sum(jnp.sin(prior.dual_projection(w, 0.2))))
    points = np.stack([np.zeros((3, 3)), np.eye(3), -5 * np.eye(3), np.ones((3, 3))])
    assert np.all(np.isfinite(jax.jit(jax.vmap(gradient))(points)))


# --- derivatives ----------------------------------------------------------------------------------


def _finite_difference(function, point, direction, h=1e-6):
    return (np.asarray(function(point + h * direction)) - function(point - h * direction)) / (2 * h)


@names
def test_derivatives_are_those_of_finite_differences(name, rng):
    """In v and in η, forward, and in v reverse."""
    prior, shape = ALL[name], (2, 3, 3)
    v, dv, cotangent = 2 * _matrix(rng, *shape), _matrix(rng, *shape), _matrix(rng, *shape)
    point, ways = (v, 0.4), (np.stack([dv, 0 * dv]), np.array([0.0, 1.0]))

    @jax.jit
    def evaluate(point):
        pull = jax.vjp(lambda v: prior.prox(v, point[1]), point[0])[1]
        return jax.vmap(_along(prior.prox), (None, 0))(point, ways), pull(cotangent)[0]

    (tangents, expected), pulled = evaluate(point)
    np.testing.assert_allclose(tangents, expected, atol=1e-7)
    np.testing.assert_allclose(np.sum(pulled * dv), np.sum(cotangent * tangents[0]))


@pytest.mark.parametrize("shape", [(5, 2), (2, 5)])
def test_nuclear_derivative_of_oblong_matrices(shape, rng):
    prior = prox.NuclearNorm(0.5)
    v, dv = 2 * _matrix(rng, *shape), _matrix(rng, *shape)
    tangent, expected = _along(lambda v: prior.prox(v, 1.0))((v,), (dv,))
    np.testing.assert_allclose(tangent, expected, atol=1e-7)


@pytest.mark.parametrize("name", sorted(SMOOTH))
def test_second_derivatives(name):
    prior = ALL[name]
    slope = jax.grad(lambda x: prior.prox(x, 0.7))
    first, second = jax.jit(jax.vmap(slope)), jax.jit(jax.vmap(jax.grad(slope)))
    third = jax.jit(jax.vmap(jax.jacfwd(jax.grad(slope))))
    v = jnp.asarray([-3.1, -0.4, 0.0, 0.49, 0.5, 0.7, 2.2])
    np.testing.assert_allclose(second(v), _finite_difference(first, v, 1.0), atol=1e-8)
    np.testing.assert_allclose(third(v), _finite_difference(second, v, 1.0), atol=1e-7)


@pytest.mark.parametrize(
    "v", [np.zeros((3, 3)), np.eye(3), -np.eye(3), 5 * np.eye(3), np.ones((3, 3))]
)
@pytest.mark.parametrize("name", list(GROUPED))
def test_degenerate_matrices_have_finite_derivatives(name, v, rng):
    prior, v = GROUPED[name], jnp.asarray(v)
    gradient = jax.jit(jax.grad(lambda x, s: jnp.sum(jnp.sin(prior.prox(x, s))), (0, 1)))
    for step in (1e-6, 1.0, 50.0):
        assert all(np.all(np.isfinite(g)) for g in gradient(v, step))
    if name == "nuclear":  # 5 I is a smooth point, with all singular values equal
        along = _along(lambda x: prior.prox(x, 1.0))
        tangent, expected = along((5 * np.eye(3),), (_matrix(rng, 3, 3),))
        np.testing.assert_allclose(tangent, expected, atol=1e-8)


def test_weights_differentiate(rng):
    v = jnp.asarray(2 * _matrix(rng, 3, 3))
    for make in (
        prox.SquaredHinge,
        prox.LogBarrier,
        prox.SymmetricLogBarrier,
        prox.IntervalLogBarrier,
        prox.L1,
        prox.GroupL2,
        prox.NuclearNorm,
    ):
        tangent, expected = _along(lambda w, make=make: make(w).prox(v, 0.8))((0.6,), (1.0,))
        np.testing.assert_allclose(tangent, expected, atol=1e-8)
    tangent = jax.jvp(lambda lo: prox.Box(lo, 1.5).prox(v, 1.0), (-0.5,), (1.0,))[1]
    np.testing.assert_array_equal(tangent, v < -0.5)


# --- shapes, transformations, dtypes, errors ------------------------------------------------------


@names
def test_batches_jit_and_vmap_agree(name, rng):
    prior = ALL[name]
    v = jnp.asarray(2 * _matrix(rng, 3, 3, 3))

    @jax.jit
    def evaluate(prior, v):
        together = prior.prox(v, 0.6)
        values = jax.vmap(prior.value)(together), jax.vmap(prior.conjugate)(v)
        rows = [prior.prox(row, 0.6) for row in v]
        return rows, together, jax.vmap(prior.prox, (0, None))(v, 0.6), values

    rows, together, mapped, values = evaluate(prior, v)
    for result in (prior.prox(v, 0.6), together, mapped):
        np.testing.assert_allclose(result, np.stack(rows), atol=1e-13)
    assert all(value.shape == (3,) for value in values)


def test_arrays_of_weights_and_steps(rng):
    v = jnp.asarray(2 * _matrix(rng, 4, 3, 3))
    weights = jnp.asarray([0.1, 0.5, 1.0, 2.0])
    for make in (prox.GroupL2, prox.NuclearNorm, prox.LogBarrier, prox.L1):
        shape = (4, 1, 1)
        together = make(weights.reshape(shape)).prox(v, 0.5)
        apart = jnp.stack([make(w).prox(x, 0.5) for w, x in zip(weights, v, strict=True)])
        np.testing.assert_allclose(together, apart, atol=1e-13)
        np.testing.assert_allclose(make(0.5).prox(v, weights.reshape(shape)), apart, atol=1e-13)
        total = sum(make(w).value(jnp.abs(x)) for w, x in zip(weights, v, strict=True))
        np.testing.assert_allclose(make(weights.reshape(shape)).value(jnp.abs(v)), total)


def test_a_path_of_weights_compiles_once():
    traces = 0

    @jax.jit
    def run(prior, v):
        nonlocal traces
        traces += 1
        return prior.prox(v, 1.0)

    for gamma in (0.1, 0.2, 0.4):
        run(prox.SymmetricLogBarrier(gamma), jnp.ones(3))
    assert traces == 1


def test_axes(rng):
    v = _matrix(rng, 3, 5, 3)
    for make in (lambda axes: prox.NuclearNorm(0.7, axes), prox.PositiveSemidefinite):
        moved = make((0, 2)).prox(jnp.asarray(v), 0.5)
        last = make((-2, -1)).prox(jnp.asarray(np.moveaxis(v, 1, 0)), 0.5)
        np.testing.assert_allclose(moved, np.moveaxis(last, 0, 1), atol=1e-14)
    both = prox.GroupL2(0.7, axis=(0, 2)).prox(jnp.asarray(v), 0.5)
    flat = prox.GroupL2(0.7).prox(jnp.asarray(np.moveaxis(v, 1, 0).reshape(5, 9)), 0.5)
    np.testing.assert_allclose(both, np.moveaxis(np.reshape(flat, (5, 3, 3)), 0, 1), atol=1e-14)
    assert prox.GroupL2(1.0, axis=0) != prox.GroupL2(1.0, axis=1)


@names
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_computed_in_single(name, dtype, rng):
    prior = ALL[name]
    v = jnp.asarray(_matrix(rng, 3, 3), dtype)
    u = prior.prox(v, 0.5)
    assert u.dtype == np.float32
    np.testing.assert_array_equal(u, prior.prox(v.astype(jnp.float32), 0.5))
    assert prior.value(v).dtype == prior.conjugate(v).dtype == np.float32


STRICT = ((), (3, 1), (4, 1, 1))
"""Shapes of weights and steps that broadcast to an array of shape (4, 3, 3); all priors take the last."""


def _with_weight(prior, weight):
    """The prior with its γ, or the bounds of a box, replaced."""
    if isinstance(prior, prox.Box):
        return prox.Box(-weight, weight)
    return dataclasses.replace(prior, gamma=weight) if hasattr(prior, "gamma") else prior


def _fits(prior, shape):
    if isinstance(prior, prox.NuclearNorm | prox.PositiveSemidefinite):
        return shape in ((), (4, 1, 1))
    return True


def _check_all_of(prior, v, step):
    """Every method and its first derivatives, in v's dtype."""
    u = prior.prox(v, step)
    w = prior.dual_projection(v, step)
    results = [u, w, prior.value(u), prior.conjugate(w), prior.value(v), prior.conjugate(v)]
    results += [jax.grad(prior.value)(u), jax.grad(prior.conjugate)(w)]
    for method in (prior.prox, prior.dual_projection):
        results += jax.grad(lambda v, s, m=method: jnp.sum(m(v, s)), (0, 1))(v, 1.0 * step)
    results += jax.tree.leaves(jax.grad(lambda p: jnp.sum(p.prox(v, step)))(prior))
    return results


@each_prior
@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jitted"])
def test_strict_modes(prior, jitted, rng):
    """Ranks and dtypes at weights and steps of every shape; numbers at those of all axes.

    Weights and steps of the other shapes are broadcast to that before they meet an array.
    """
    v = jnp.asarray(_matrix(rng, 4, 3, 3), jnp.float32)

    def arguments(shape):
        weighted = _with_weight(prior, jnp.full(shape, 0.3, jnp.float32))
        return jax.tree.map(jnp.float32, weighted), v, jnp.full(shape, 0.5, jnp.float32)

    def narrow_and_wide(prior):
        us = [prior.prox(v.astype(dtype), 0.5) for dtype in (jnp.bfloat16, jnp.float64)]
        return [(u, prior.value(u), prior.conjugate(u)) for u in us]

    for shape in STRICT:
        if not _fits(prior, shape):
            with pytest.raises(ValueError, match="broadcasts"):
                prior.prox(jnp.ones((4, 3, 3)), jnp.ones(shape))
    with (
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
        jax.debug_nans(True),
    ):
        if jitted:
            fits = [arguments(shape) for shape in STRICT if _fits(prior, shape)]
            results = [jax.eval_shape(_check_all_of, *case) for case in fits[:-1]]
            results.append(jax.jit(_check_all_of)(*fits[-1]))
            halves = [jax.eval_shape(narrow_and_wide, case[0]) for case in fits]
        else:
            case = arguments(STRICT[-1])
            results, halves = [_check_all_of(*case)], [narrow_and_wide(case[0])]
    assert all(result.dtype == np.float32 for result in jax.tree.leaves(results))
    for half in halves:
        for u, value, conjugate in half:
            assert value.dtype == conjugate.dtype == u.dtype


@each_prior
@pytest.mark.parametrize("number", [0.3, 1, np.float64(0.3), np.float32(0.3), np.full((), 0.3)])
def test_weights_and_steps_do_not_change_the_dtype(prior, number):
    v = jax.ShapeDtypeStruct((3, 3), jnp.float32)
    prior = _with_weight(prior, number)
    for method in (prior.prox, prior.dual_projection):
        for result in (
            jax.eval_shape(lambda v, method=method: method(v, number), v),
            jax.eval_shape(jax.jit(method), v, number),
        ):
            assert result.dtype == np.float32
    for method in (prior.value, prior.conjugate):
        assert jax.eval_shape(method, v).dtype == np.float32


@ss.value_object
class _HalfSquare(prox.Prior):
    """g(u) = ½||u||² by two formulas."""

    def _value(self, u):
        return 0.5 * jnp.sum(u * u)

    def _prox(self, v, step):
        return v / (1 + step)


@ss.value_object
class _NotSeparable(_HalfSquare):
    """The same, of a class that says that it is no sum over entries."""

    separable = False


@pytest.mark.parametrize("make", [_HalfSquare, _NotSeparable])
@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jitted"])
def test_a_prior_of_two_formulas(make, jitted, rng):
    prior = make()
    kernel, x = _matrix(rng, 5, 3), _matrix(rng, 2, 5)
    wrap = jax.jit if jitted else (lambda function: function)
    z = jnp.asarray(_matrix(rng, 2, 3))
    v = jnp.asarray(_matrix(rng, 4))
    assert prior.conjugate(v) == INF
    assert prior.conjugate(v.astype(jnp.bfloat16)).dtype == np.float32
    np.testing.assert_array_equal(prior.dual_projection(v, 0.5), v)

    def bound(kernel, ridge):
        problem = ss.LayerProblem(ss.Dense(kernel), jnp.asarray(x), prior=prior, ridge=ridge)
        return problem.certificate(z)

    with jax.debug_nans(True):
        with_ridge = wrap(lambda kernel: bound(kernel, 0.5))(jnp.asarray(kernel))
        wide = jnp.asarray(np.concatenate([kernel, kernel], 1)[:, :6])
    hessian = kernel.T @ kernel + 1.5 * np.eye(3)
    best = np.linalg.solve(hessian, (x @ kernel).T).T
    gap = 0.5 * np.einsum("bi,ij,bj->b", z - best, hessian, z - best)
    assert np.all(with_ridge >= gap * (1 - 1e-12))
    assert np.all(np.isfinite(with_ridge))
    z = jnp.asarray(_matrix(rng, 2, 6))
    with jax.debug_nans(True):  # six outputs of five inputs: F is flat along a line
        without = wrap(lambda kernel: bound(kernel, 0.0))(wide)
    assert np.all(np.isinf(without))


@names
def test_nan_propagates(name):
    assert np.all(np.isnan(_prox(ALL[name], np.full((3, 3), np.nan), 0.5)))


def test_separable():
    assert all(entry[0].separable for entry in ELEMENTWISE.values())
    assert not any(prior.separable for prior in GROUPED.values())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: prox.LogBarrier(0.0), "gamma: expected a number > 0"),
        (lambda: prox.SymmetricLogBarrier(-1.0), "gamma"),
        (lambda: prox.IntervalLogBarrier(np.array([1.0, -1.0])), "gamma"),
        (lambda: prox.SquaredHinge(-0.5), "gamma"),
        (lambda: prox.L1(-0.1), "gamma"),
        (lambda: prox.GroupL2(-0.1), "gamma"),
        (lambda: prox.NuclearNorm(jnp.nan), "gamma"),
        (lambda: prox.Box(1.0, 0.0), "bounds of Box: expected lower <= upper"),
        (lambda: prox.NuclearNorm(1.0, (1, 1)), "axes: expected two different integers"),
        (lambda: prox.PositiveSemidefinite((0, 1, 2)), "axes"),
        (lambda: prox.GroupL2(1.0, axis=0.5), "axis"),
        (lambda: prox.leaky_relu_prior(1.5), "negative_slope"),
        (lambda: prox.leaky_relu_prior(0.0), "negative_slope"),
        (lambda: prox.L1().prox(jnp.ones(2), 0.0), "step_size: expected a number > 0"),
        (lambda: prox.L1().prox(jnp.ones(2), jnp.ones(3)), "step_size"),
        (lambda: prox.L1(jnp.ones(3)).prox(jnp.ones(2), 1.0), "gamma"),
        (lambda: prox.GroupL2(jnp.ones(2)).prox(jnp.ones((3, 2)), 1.0), "gamma"),
        (lambda: prox.GroupL2(axis=2).prox(jnp.ones((3, 2)), 1.0), "axes"),
        (lambda: prox.NuclearNorm(axes=(-1, 1)).prox(jnp.ones((3, 2)), 1.0), "axes"),
        (lambda: prox.PositiveSemidefinite().prox(jnp.ones((3, 2)), 1.0), "square"),
        (lambda: prox.L1().dual_projection(jnp.ones(2), -1.0), "margin"),
        (lambda: prox.Zero().prox(jnp.ones(2, int), 1.0), "dtype of v: expected a real floating"),
        (lambda: prox.Zero().value(jnp.ones(2, complex)), "dtype"),
        (lambda: prox.Zero().conjugate(1), "dtype"),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()
