"""Exact priors of activations, against brute force in long double and formulas of scipy."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx

import stochsolvers as ss
from stochsolvers import prox, testing

INF = np.inf
STEPS = (1e-3, 0.02, 0.1, 0.5, 1.0, 1.5, 3.0, 30.0)
xlogy = scipy.special.xlogy


def _softplus(w):
    return np.maximum(w, 0) + np.log1p(np.exp(-np.abs(w)))


def _sigmoid(w):
    decay = np.exp(-np.abs(w))
    return np.where(w < 0, decay, 1) / (1 + decay)


def _elu(w, alpha: Any = 1.0):
    return np.where(w > 0, w, alpha * np.expm1(np.minimum(w, 0)))


class Case(NamedTuple):
    """A prior, σ and σ′ in numpy, σ in JAX, g in numpy and its closed domain."""

    prior: prox.Prior
    sigma: Any
    slope: Any
    jax: Any
    value: Any
    domain: tuple[float, float]


CASES = {
    "Tanh": Case(
        prox.Tanh(),
        np.tanh,
        lambda w: 1 / np.cosh(np.clip(w, -5e3, 5e3)) ** 2,
        jnp.tanh,
        lambda u: 0.5 * (xlogy(1 + u, 1 + u) + xlogy(1 - u, 1 - u) - u**2),
        (-1, 1),
    ),
    "Sigmoid": Case(
        prox.Sigmoid(),
        _sigmoid,
        lambda w: _sigmoid(w) * _sigmoid(-w),
        jax.nn.sigmoid,
        lambda u: xlogy(u, u) + xlogy(1 - u, 1 - u) - 0.5 * u**2,
        (0, 1),
    ),
    "Softplus": Case(
        prox.Softplus(),
        _softplus,
        _sigmoid,
        jax.nn.softplus,
        lambda u: scipy.special.spence(-np.expm1(-u)) - np.pi**2 / 6,  # spence(z) = Li₂(1 − z)
        (0, INF),
    ),
    "ELU": Case(
        prox.ELU(),
        _elu,
        lambda w: np.exp(np.minimum(w, 0)),
        jax.nn.elu,
        lambda u: np.where(u < 0, xlogy(1 + u, 1 + u) - u - 0.5 * u**2, 0),
        (-1, INF),
    ),
    "ELU of 1/4": Case(
        prox.ELU(0.25),
        lambda w: _elu(w, np.longdouble(0.25)),
        lambda w: np.where(w > 0, 1, np.exp(np.minimum(w, 0)) / 4),
        lambda v: jax.nn.elu(v, 0.25),
        lambda u: np.where(u < 0, xlogy(0.25 + u, 1 + 4 * np.minimum(u, 0)) - u - 0.5 * u**2, 0),
        (-0.25, INF),
    ),
    "Softsign": Case(
        prox.Softsign(),
        lambda w: w / (1 + np.abs(w)),
        lambda w: 1 / (1 + np.abs(w)) ** 2,
        jax.nn.soft_sign,
        lambda u: -np.log1p(-np.abs(u)) - np.abs(u) - 0.5 * u**2,
        (-1, 1),
    ),
    "Arctan": Case(
        prox.Arctan(),
        np.arctan,
        lambda w: 1 / (1 + w**2),
        jnp.arctan,
        lambda u: -np.log(np.cos(u)) - 0.5 * u**2,
        (-np.pi / 2, np.pi / 2),
    ),
    "LeakyReLU": Case(
        prox.LeakyReLU(0.25),
        lambda w: np.where(w > 0, w, w / 4),
        lambda w: np.where(w > 0, 1, 0.25),
        lambda v: jax.nn.leaky_relu(v, 0.25),
        lambda u: 1.5 * np.minimum(u, 0) ** 2,
        (-INF, INF),
    ),
}
names = pytest.mark.parametrize("name", list(CASES))


def _root(sigma, v, step):
    """The root w of (1 − η) σ(w) + η w = v, by bisection in long double."""
    v, step = np.asarray(v, np.longdouble), np.asarray(step, np.longdouble)
    shift = (1 - step) * (sigma(v) - v) / np.minimum(step, 1)
    low, high = v - 1.001 * np.maximum(shift, 0) - 1e-300, v - 1.001 * np.minimum(shift, 0) + 1e-300
    for _ in range(120):
        middle = 0.5 * (low + high)
        below = (1 - step) * sigma(middle) + step * middle < v
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return 0.5 * (low + high)


def _points(dtype):
    """V, among them 0 and both sides of 1 and π/2, and η as a column."""
    size = np.logspace(-6, 6, 97)
    near = np.concatenate([1 + np.array([-1e-3, -1e-6, 0, 1e-6, 1e-3]), np.pi / 2 + size[:20]])
    v = np.concatenate([[0.0], size, -size, near, -near, np.linspace(-10, 10, 101)])
    return v.astype(dtype), np.asarray(STEPS, dtype)[:, None]


@functools.partial(jax.jit, static_argnums=0)
def _everything(kind, parameters, v, step):
    """Prox, pre-activation and the derivatives of prox in v and η."""
    prior = kind(*parameters)
    v, step = jnp.broadcast_arrays(v[None], step)
    u, back = jax.vjp(prior.prox, v, step)
    return u, prior.pre_activation(v, step), *back(jnp.ones_like(u))


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@names
def test_prox_is_sigma_at_the_root_to_the_last_digits(name, dtype):
    case, (v, step) = CASES[name], _points(dtype)
    parameters = jax.tree.leaves(case.prior)
    u, w, dv, dstep = map(np.asarray, _everything(type(case.prior), parameters, v, step))
    assert u.dtype == w.dtype == dtype
    root = _root(case.sigma, *np.broadcast_arrays(v[None].astype(np.longdouble), step))
    exact, info = case.sigma(root), np.finfo(dtype)
    normal = np.abs(exact) >= info.tiny
    units = np.abs(u - exact) / np.spacing(np.where(normal, np.abs(exact), 1).astype(dtype))
    # at η = 1 the digits are those of jax.nn, whose float64 tanh is off by 6.4 units
    assert np.max(units[normal]) <= (4 if dtype is np.float32 else 8)
    assert np.max(np.abs(u[~normal]), initial=0) <= 2 * info.tiny
    wide, slope = step.astype(np.longdouble), case.slope(root)
    scale = (1 - wide) * slope + wide
    smooth = np.abs(root) > 1e-5 if "LU" in name else root == root
    for got, expected in ((dv, slope / scale), (dstep, (exact - root) * slope / scale)):
        assert np.all(np.isfinite(got))
        error = np.abs(got - expected) / (1 + np.abs(expected))
        assert np.max(error[smooth]) <= 40 * info.eps
    # σ(w) = u, as far as w can be a float of the dtype
    room = 8 * info.eps * (np.abs(exact) + slope * np.abs(root))
    assert np.all(np.abs(case.sigma(w.astype(np.longdouble)) - exact) <= room + info.tiny)
    np.testing.assert_array_equal(w[STEPS.index(1.0)], v)


@pytest.mark.optimized
@names
def test_the_unit_step_is_the_activation_of_jax(name):
    case = CASES[name]
    for dtype in (np.float32, np.float64):
        v = jnp.asarray(_points(dtype)[0])
        np.testing.assert_array_equal(case.prior.prox(v, 1.0), case.jax(v))
        jitted = jax.jit(lambda v: (case.prior.prox(v, 1.0), case.jax(v)))(v)
        np.testing.assert_array_equal(*jitted)


# --- values and conjugates ---------------------------------------------------------------------------


def _sample(case, count=41):
    low, high = (np.clip(end, -4, 4) for end in case.domain)
    return np.linspace(low, high, count)[1:-1]


@names
def test_values_are_those_of_their_definition(name):
    case = CASES[name]
    u = _sample(case)
    ends = [end for end in case.domain if np.isfinite(end)]
    beyond = np.array([[0.5 * end, end + 1e-6 * np.sign(end - u[0])] for end in ends])

    @jax.jit
    def values(u, narrow, beyond):
        g = case.prior.value
        return jax.vmap(g)(u), jax.vmap(g)(narrow), g(u), [g(point) for point in beyond]

    wide, narrow, total, outside = values(u, u.astype(np.float32), list(beyond))
    np.testing.assert_allclose(wide, case.value(u), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(narrow, case.value(u), rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(total, np.sum(case.value(u)), rtol=1e-12)
    np.testing.assert_array_equal(outside, np.full(len(ends), INF))


@pytest.mark.optimized
@names
def test_values_keep_their_digits_near_the_ends(name):
    """∫ (σ⁻¹(t) − t) dt from an end of the domain or from 0, by Gauss's rule in long double."""
    case = CASES[name]
    size = np.logspace(-6, -1, 26)
    u = np.concatenate([size, -size] if case.domain[0] < 0 else [size]).astype(np.float32)
    got, slope = jax.jit(jax.vmap(jax.value_and_grad(case.prior.value)))(jnp.asarray(u))
    inverse = {
        "Tanh": lambda t: sum(t ** (2 * k + 1) / (2 * k + 1) for k in range(1, 12)),
        "Sigmoid": lambda t: np.log(t) - np.log1p(-t) - t,
        "Softplus": lambda t: np.log(-np.expm1(-t)),
        "ELU": lambda t: np.where(t < 0, -sum((-t) ** k / k for k in range(2, 25)), 0),
        "ELU of 1/4": lambda t: np.where(t < 0, np.log1p(4 * np.minimum(t, 0)) - t, 0),
        "Softsign": lambda t: t * np.abs(t) / (1 - np.abs(t)),
        "Arctan": lambda t: t**3 / 3 + 2 * t**5 / 15 + 17 * t**7 / 315 + 62 * t**9 / 2835,
        "LeakyReLU": lambda t: np.where(t < 0, 3 * t, 0),
    }[name]
    wide, (nodes, weights) = u.astype(np.longdouble), np.polynomial.legendre.leggauss(16)
    exact = np.zeros_like(wide)
    for k in range(60):
        part = 2.0**-k * (0.75 + 0.25 * nodes)
        exact += 2.0**-k * 0.25 * np.sum(weights[:, None] * inverse(wide * part[:, None]), 0)
    np.testing.assert_allclose(got, exact * wide, rtol=1e-6)
    np.testing.assert_allclose(slope, inverse(wide), rtol=2e-6)


def test_values_on_the_walls():
    values = [
        (prox.Tanh(), [-1.0, 1.0], 2 * np.log(2) - 1),
        (prox.Sigmoid(), [0.0, 1.0], -0.5),
        (prox.Softplus(), [0.0], 0.0),
        (prox.ELU(0.25), [-0.25], 0.25 - 0.5 * 0.25**2),
        (prox.Softsign(), [-1.0, 0.5], INF),
        (prox.Arctan(), [1.5707964], INF),  # the float32 next to π/2 is above it
        (prox.LeakyReLU(0.0), [-1e-6, 0.5], INF),
        (prox.LeakyReLU(0.0), [0.0, 0.5], 0.0),
        (prox.LeakyReLU(1.0), [-2.0], 0.0),
    ]
    points = [np.asarray(u, np.float32) for _, u, _ in values]
    evaluate = jax.jit(lambda us: [case[0].value(u) for case, u in zip(values, us, strict=True)])
    for (prior, _, expected), got in zip(values, evaluate(points), strict=True):
        assert got == pytest.approx(expected, abs=3e-7), prior
    assert prox.Softplus().conjugate(jnp.zeros(2)) == pytest.approx(np.pi**2 / 3, rel=1e-15)
    for prior in (prox.Softplus(), prox.ELU(), prox.LeakyReLU(0.3)):
        assert prior.conjugate(jnp.asarray([-1.0, 1e-9])) == INF
        np.testing.assert_array_equal(
            prior.dual_projection(jnp.asarray([-1.0, 2.0]), 0.5), [-1, -0.5]
        )
    assert prox.LeakyReLU(1.0).conjugate(jnp.asarray([-1e-9])) == INF


@names
def test_conjugates_are_suprema(name):
    """Sup of w u − g(u), at u = σ(p) with p − σ(p) = w by bisection."""
    case = CASES[name]
    one_sided = case.domain[1] == INF
    w = np.concatenate([-np.logspace(-5, 2, 30), [] if one_sided else np.logspace(-5, 2, 30)])
    low, high = np.full_like(w, -2e2, np.longdouble), np.full_like(w, 2e2, np.longdouble)
    p = low
    for _ in range(100):
        p = 0.5 * (low + high)
        below = (-_softplus(-p) if name == "Softplus" else p - case.sigma(p)) < w
        low, high = np.where(below, p, low), np.where(below, high, p)
    u = case.sigma(p).astype(np.float64)
    exact = w * u - case.value(u)
    function = jax.jit(jax.vmap(jax.value_and_grad(case.prior.conjugate)))
    got, slope = function(jnp.asarray(w))
    np.testing.assert_allclose(got, exact, rtol=1e-9, atol=2e-14)
    np.testing.assert_allclose(slope, u, rtol=1e-9, atol=1e-13)
    narrow, slope = function(jnp.asarray(w, np.float32))
    np.testing.assert_allclose(narrow, got, rtol=2e-5, atol=1e-37)
    np.testing.assert_allclose(slope, u, rtol=2e-5, atol=1e-37)


# --- derivatives, transformations --------------------------------------------------------------------


def test_second_derivatives_and_those_of_alpha():
    v = jnp.asarray(np.random.default_rng(0).normal(size=7) * 2)

    def slope(prior, v, step):
        return jax.jvp(lambda v: prior.prox(v, step), (v,), (jnp.ones_like(v),))[1]

    for case in CASES.values():

        @jax.jit
        def difference(prior, v):
            second = jax.jvp(lambda v: slope(prior, v, 0.3), (v,), (jnp.ones_like(v),))[1]
            h = 1e-6
            return second, (slope(prior, v + h, 0.3) - slope(prior, v - h, 0.3)) / (2 * h)

        np.testing.assert_allclose(*difference(case.prior, v), atol=1e-7)

    def by_alpha(alpha):
        prior = prox.ELU(alpha)
        u = prior.prox(v, 0.3)
        conjugate = prior.conjugate(-jnp.abs(v))
        return jnp.sum(jnp.sin(u)) + prior.value(prior.prox(v, 0.5)) + conjugate

    h = 1e-6
    by_alpha = jax.jit(jax.value_and_grad(by_alpha))
    expected = (by_alpha(0.5 + h)[0] - by_alpha(0.5 - h)[0]) / (2 * h)
    np.testing.assert_allclose(by_alpha(0.5)[1], expected, rtol=1e-7)


def test_huge_and_tiny_arguments_are_finite():
    v = jnp.asarray([0.0, 1e-38, 1e-30, 1e20, 3e38, -1e-38, -1e20, -3e38], np.float32)
    for case in CASES.values():
        u, w, dv, dstep = _everything(
            type(case.prior), jax.tree.leaves(case.prior), v, _points(np.float32)[1]
        )
        assert np.all(np.isfinite(u))
        assert not np.any(np.isnan(w))
        assert np.all(np.isfinite(dv) & (dv >= 0))
        assert not np.any(np.isnan(dstep))


def test_leaky_relu_agrees_with_the_squared_hinge():
    v = jnp.linspace(-3, 3, 14)
    hinge, leaky = prox.leaky_relu_prior(0.2), prox.LeakyReLU(0.2)
    for step in (0.1, 1.0, 5.0):
        np.testing.assert_allclose(leaky.prox(v, step), hinge.prox(v, step), rtol=1e-14)
    assert leaky.value(v) == pytest.approx(float(hinge.value(v)), rel=1e-14)
    w = -jnp.abs(v)
    assert leaky.conjugate(w) == pytest.approx(float(hinge.conjugate(w)), rel=1e-14)
    for slope, same in ((0.0, prox.NonNegative()), (1.0, prox.Zero())):
        np.testing.assert_array_equal(prox.LeakyReLU(slope).prox(v, 0.3), same.prox(v, 0.3))
        np.testing.assert_array_equal(
            prox.LeakyReLU(slope).dual_projection(v), same.dual_projection(v)
        )


def test_indicators_keep_the_point_before_the_projection():
    v = jnp.asarray([-3.0, -0.1, 0.4, 4.0])
    for prior in (prox.Zero(), prox.NonNegative(), prox.Box(-1.0, 1.0)):
        np.testing.assert_array_equal(prior.pre_activation(v, 0.25), v)
    matrix = jnp.asarray([[1.0, 2.0], [0.0, -3.0]])
    np.testing.assert_array_equal(prox.PositiveSemidefinite().pre_activation(matrix, 0.25), matrix)
    prior = prox.SymmetricLogBarrier(0.3)
    w = prior.pre_activation(v, 0.25)
    np.testing.assert_allclose(prior.prox(w, 1.0), prior.prox(v, 0.25), rtol=1e-13)
    np.testing.assert_array_equal(prior.pre_activation(v, 1.0), v)


# --- any function ------------------------------------------------------------------------------------


class Wrapped:
    """A function that is not known as what it wraps."""

    def __init__(self, function):
        self.function = function

    def __call__(self, x):
        return self.function(x)


@pytest.mark.optimized
@pytest.mark.parametrize("name", ["Tanh", "Softplus", "LeakyReLU"])
def test_a_function_without_a_closed_form(name):
    """The digits of the closed forms; g and g* up to opposite constants."""
    case = CASES[name]
    prior = prox.Activation(Wrapped(case.jax))
    for dtype in (np.float32, np.float64):
        v, step = _points(dtype)
        arguments = type(case.prior), jax.tree.leaves(case.prior), v, step
        known = list(map(np.asarray, _everything(*arguments)))
        u, w, dv, dstep = map(np.asarray, _general(prior, v, step))
        eps = float(np.finfo(dtype).eps)
        assert np.all(
            np.abs(u - known[0]) <= 4 * eps * np.maximum(step, 2) * np.abs(known[0]) + 1e-37
        )
        for got, expected in ((dv, known[2]), (dstep, known[3])):
            assert np.all(np.isfinite(got))
            away = np.abs(known[1]) > 1e-5  # of the kink
            assert np.max((np.abs(got - expected) / (1 + np.abs(expected)))[away]) < 2e3 * eps
        sigma = case.jax(jnp.asarray(w))
        np.testing.assert_allclose(sigma, u, rtol=1e3 * eps, atol=1e-30)
        np.testing.assert_array_equal(u[STEPS.index(1.0)], case.jax(jnp.asarray(v)))

    @jax.jit
    def both(u, far):
        """Values and conjugates with derivatives, and projections, of either prior."""
        w = case.prior.dual_projection(far, 0.01)

        def along(prior):
            points = ((prior.value, u), (prior.conjugate, w))
            slopes = [jax.vmap(jax.value_and_grad(method))(point) for method, point in points]
            return slopes, prior.dual_projection(far, 0.1)

        return along(prior), along(case.prior)

    (mine, projected), (theirs, expected) = both(_sample(case), np.linspace(-3, 3, 18))
    np.testing.assert_allclose(projected, expected, atol=1e-6)
    for got, known in zip(mine, theirs, strict=True):
        (got, slope), (expected, known) = (list(map(np.asarray, pair)) for pair in (got, known))
        np.testing.assert_allclose(slope, known, atol=1e-9)
        np.testing.assert_allclose(got - got[0], expected - expected[0], atol=1e-10)
    outside = np.full(2, case.domain[0] - 1e-3)
    assert jax.jit(prior.value)(outside) == INF or name == "LeakyReLU"


@jax.jit
def _general(prior, v, step):
    v, step = jnp.broadcast_arrays(v[None], step)
    u, back = jax.vjp(prior.prox, v, step)
    return u, prior.pre_activation(v, step), *back(jnp.ones_like(u))


MEMBERS = [
    jax.nn.hard_sigmoid,
    jax.nn.log_sigmoid,
    jax.nn.sparse_plus,
    jax.nn.sparse_sigmoid,
    jax.nn.squareplus,
    functools.partial(jax.nn.celu, alpha=2.0),
]


@pytest.mark.optimized
def test_the_activations_of_jax():
    """The prox of the prior at η = 1 is the function, for known functions in their closed form."""
    v = jnp.linspace(-8, 8, 33)
    known = {
        jnp.tanh: prox.Tanh(),
        jax.nn.sigmoid: prox.Sigmoid(),
        jax.nn.softplus: prox.Softplus(),
        jax.nn.elu: prox.ELU(),
        functools.partial(jax.nn.elu, alpha=0.5): prox.ELU(0.5),
        jax.jit(jax.nn.soft_sign): prox.Softsign(),
        jnp.arctan: prox.Arctan(),
        jax.nn.relu: prox.NonNegative(),
        jax.nn.relu6: prox.Box(0, 6),
        jax.nn.hard_tanh: prox.Box(-1, 1),
        functools.partial(jax.nn.leaky_relu, negative_slope=0.3): prox.LeakyReLU(0.3),
        jax.nn.identity: prox.Zero(),
    }

    @jax.jit
    def compare(v):
        pairs = [(prox.Activation(f).prox(v, 1.0), f(v)) for f in [*known, *MEMBERS]]
        for function, prior in known.items():
            mine, w = prox.Activation(function), prior.dual_projection(v)
            pairs += [(mine.prox(v, 0.3), prior.prox(v, 0.3))]
            pairs += [(mine.value(v), prior.value(v)), (mine.conjugate(w), prior.conjugate(w))]
        return pairs

    for got, expected in compare(v):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (jax.nn.gelu, r"got GELU, which decreases on \(−∞, −0.75\): use Softplus"),
        (functools.partial(jax.nn.gelu, approximate=False), "got GELU"),
        (jax.jit(jax.nn.silu), "got SiLU"),
        (nnx.swish, "got SiLU"),
        (jax.nn.mish, "got mish"),
        (jax.nn.hard_swish, "got hard SiLU"),
        (jax.nn.selu, "got SELU, with slopes up to 1.758.*use ELU"),
        (jax.nn.softmax, "got softmax, which is not elementwise"),
        (lambda x: jax.nn.gelu(x), "got the slope -0.129 at x = -1.4"),
        (lambda x: 1.01 * x, r"function <lambda>: .* got the slope 1.01 at x"),
        (lambda x: -0.5 * x, "got the slope -0.5 at x"),
        (jnp.sign, "got one that rises by 2 between x = -1e-06 and 1e-06"),
        (lambda x: -jnp.floor(x), r"got one that falls by \d+ between"),
        (lambda x: jnp.log(x), "got the value (nan|-inf) at x"),
        (lambda x: x - jnp.mean(x), "when other entries change"),
        (jnp.sum, r"shape of the result .* got \(\)"),
        (lambda x: x > 0, "dtype of the result .* expected float32, got bool"),
        (functools.partial(jax.nn.elu, alpha=1.5), "alpha of ELU: expected a number <= 1"),
        (np.tanh, "expected an elementwise JAX function"),
        (3, "got 3"),
        ([], r"got \[\]"),
    ],
    ids=lambda value: "" if not isinstance(value, str) else value[:20],
)
def test_functions_outside_the_class_are_refused(function, message):
    with pytest.raises(ValueError, match=message):
        prox.Activation(function)


def test_refused_parameters():
    for make, message in (
        (lambda: prox.ELU(1.1), r"alpha of ELU: expected a number <= 1 \(the slope of a prox is"),
        (lambda: prox.ELU(0.0), "alpha of ELU: expected a number > 0"),
        (lambda: prox.LeakyReLU(-0.1), "negative_slope: expected a number >= 0"),
        (lambda: prox.LeakyReLU(1.1), "negative_slope: expected a number <= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_activations_are_values():
    """Made in jit, equal by their function, compiled once for the same function and for all α."""
    traces = 0

    @jax.jit
    def run(prior, v):
        nonlocal traces
        traces += 1
        return prox.Activation(jax.nn.squareplus).prox(prior.prox(v, 0.3), 0.5)

    for _ in range(2):
        run(prox.Activation(jax.nn.celu), jnp.ones(3))
        run(prox.Activation(jnp.tanh), jnp.ones(3))
    assert traces == 2
    for alpha in (0.2, 0.4):
        run(prox.ELU(alpha), jnp.ones(3))
    assert traces == 3
    assert prox.Activation(jnp.tanh) == prox.Activation(jnp.tanh) != prox.Activation(jnp.arctan)


# --- certificates, layers ----------------------------------------------------------------------------


def _iterates(case, data, ridge):
    """Iterates of proximal gradients in float64, σ by bisection, and P."""
    matrix, x, bias = data

    def objective(z):
        residual = z @ matrix.T - x
        smooth = 0.5 * np.sum(residual**2, -1) - z @ bias + 0.5 * ridge * np.sum(z**2, -1)
        return smooth + np.sum(case.value(z), -1)

    step = 1 / (np.linalg.norm(matrix, 2) ** 2 + ridge)
    z, iterates = np.zeros((len(x), matrix.shape[1])), []
    for _ in range(100):
        gradient = (z @ matrix.T - x) @ matrix - bias + ridge * z
        root = _root(case.sigma, z - step * gradient, step)
        z = np.asarray(case.sigma(root), np.float64)
        iterates.append(z)
    return iterates, objective


@jax.jit
def _certified(problem, z):
    """The certificate at z, and a point of the domain far from there."""
    return problem.certificate(z), problem.prior.prox(9 * z, 0.05)


@pytest.mark.optimized
@names
def test_certificates_are_above_the_gap(name):
    """In float32, at early and late iterates, and at points of the domain far from the optimum."""
    case, rng = CASES[name], np.random.default_rng(3)
    orthogonal = np.linalg.qr(rng.normal(size=(8, 3)))[0]
    matrix = (orthogonal * np.linspace(0.8, 1.3, 3)).astype(np.float32)
    x = (3 * rng.normal(size=(2, 8))).astype(np.float32)
    bias = rng.normal(size=3).astype(np.float32)
    wide = [array.astype(np.float64) for array in (matrix, x, bias)]
    for ridge in (0.0, 0.25):
        problem = ss.LayerProblem(
            ss.Dense(jnp.asarray(matrix)),
            jnp.asarray(x),
            bias=jnp.asarray(bias),
            prior=case.prior,
            ridge=jnp.float32(ridge),
        )
        iterates, objective = _iterates(case, wide, ridge)
        best, far = objective(iterates[-1]), iterates[0]
        for start in (iterates[0], iterates[3], None, iterates[-1]):
            z = jnp.asarray(far if start is None else start, np.float32)
            bound, far = map(np.asarray, _certified(problem, z))
            assert np.all(bound >= objective(np.asarray(z, np.float64)) - best - 1e-13)
            assert np.all(np.isfinite(bound))
        assert np.all(bound <= 1e-4)


def test_layers_take_exact_activations():
    """One iteration at η = 1 is the activation of the linear layer."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4)), np.float32)
    for prior, sigma in ((prox.Tanh(), jnp.tanh), (prox.Activation(jax.nn.celu), jax.nn.celu)):
        layer = ss.nnx.SolverLinear(4, 3, solver=ss.ProxGD(1, 1.0), prior=prior, rngs=nnx.Rngs(0))
        linear = x @ layer.kernel[...] + layer.bias[...][None]
        np.testing.assert_allclose(layer(x), sigma(linear), rtol=2e-6, atol=1e-7)


@ss.value_object
class WrongPreActivation(prox.Tanh):
    """Returns v, as an indicator would."""

    def _pre_activation(self, v, step):
        return v


def test_the_contract_sees_a_wrong_pre_activation():
    with pytest.raises(
        AssertionError, match=r"prox\(w, 1\) at w = pre_activation\(v, η\): expected"
    ):
        testing.check_prior(WrongPreActivation(), (4,))


@pytest.mark.optimized
def test_a_wrapped_function_is_judged_by_what_it_computes():
    """`functools.wraps` names tanh and GELU, the bodies are others."""

    @functools.wraps(jnp.tanh)
    def half(x):
        return 0.5 * jnp.tanh(x)

    @functools.wraps(jax.nn.gelu)
    def fine(x):
        return jnp.tanh(x)

    x = jnp.linspace(-2.0, 2.0, 5)
    for function in (half, fine):
        np.testing.assert_array_equal(ss.prox.Activation(function).prox(x, 1.0), function(x))
