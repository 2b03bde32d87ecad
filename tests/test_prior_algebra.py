"""A number times a prior, weights 0, weights of singular values, and priors on meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import PRIORS, SHAPES
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import stochsolvers as ss
from stochsolvers import prox
from stochsolvers.testing import _prox as contract


@ss.value_object
class Own(prox.Prior):
    """g(u) = |u_1| + … on |u_i| ≤ 1, with all formulas."""

    def _value(self, u):
        return jnp.where(jnp.all(jnp.abs(u) <= 1), jnp.sum(jnp.abs(u)), jnp.inf)

    def _prox(self, v, step):
        return jnp.clip(prox.L1(1.0)._prox(v, step), -1, 1)

    def _conjugate(self, w):
        return jnp.sum(jax.nn.relu(jnp.abs(w) - 1))


ACTIVATIONS = "Tanh", "Sigmoid", "Softplus", "ELU", "Softsign", "Arctan", "LeakyReLU", "Activation"


@pytest.mark.parametrize("name", PRIORS)
def test_a_number_times_a_prior(name, rng):
    """By the definitions of value, prox, conjugate and projection, at c = 2.5 traced and not."""
    prior, c, step = PRIORS[name], 2.5, 0.3
    v = jnp.asarray(2 * rng.normal(size=SHAPES.get(name, (4,))))
    prior = jax.tree.map(lambda leaf: jnp.asarray(leaf, v.dtype), prior)

    @jax.jit
    def both(prior, c, v):
        scaled = c * prior
        u, w = prior.prox(v, c * step), c * prior.dual_projection(v / c, 0.01 / c)
        want = u, c * prior.value(u), w, c * prior.conjugate(0.99 * w / c)
        got = scaled.prox(v, step), scaled.value(u), scaled.dual_projection(v, 0.01)
        return want, (*got, scaled.conjugate(0.99 * w))

    for want, got in zip(*both(prior, c, v), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13)
    simpler = type(prior)._times is not ss.Prior._times  # an equal of its own class
    assert type(c * prior) is (type(prior) if simpler else prox.Scaled)
    assert simpler or name in {*ACTIVATIONS, "Scaled"}
    assert (prior * c).separable == prior.separable


def test_products_are_the_simplest_equal():
    assert 2.0 * prox.L1(0.25) == prox.L1(0.5) == prox.L1(0.25) * 2
    assert 2.0 * prox.NonNegative() == prox.NonNegative()
    assert 2.0 * prox.ElasticNet(0.25, 0.5) == prox.ElasticNet(0.5, 1.0)
    assert 2.0 * prox.GroupL2(0.25, axis=0) == prox.GroupL2(0.5, axis=0)
    assert 2.0 * prox.Entropy(0) == prox.Entropy(0, gamma=2.0)
    assert 2.0 * (1.5 * Own()) == prox.Scaled(Own(), 3.0)
    assert (np.float64(2.0) * Own()).factor == 2.0
    weights = np.array([1.0, 2.0, 3.0])
    for three in (weights * prox.L1(0.5), prox.L1(0.5) * jnp.asarray(weights)):
        np.testing.assert_array_equal(three.gamma, weights / 2)
    column = jnp.ones((2, 1)) * (weights * prox.L1(0.5))
    assert column.gamma.shape == (2, 3)
    np.testing.assert_allclose(column.value(jnp.ones((2, 3))), 6.0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: 0 * prox.L1(), "factor of a prior: expected a number > 0, got 0"),
        (lambda: -1.0 * prox.NonNegative(), "factor of a prior"),
        (
            lambda: jnp.ones(3) * Own(),
            "a number for Own, which has no weights of its own, got shape",
        ),
        (lambda: prox.Scaled(1.0, 2.0), "prior of Scaled: expected a Prior"),
        (lambda: prox.LogBarrier(0), r"a number > 0 \(NonNegative\(\) is the limit\), got 0"),
        (lambda: prox.SymmetricLogBarrier(0.0), r"Box\(-1, 1\) is the limit"),
        (lambda: prox.leaky_relu_prior(0.0), r"NonNegative\(\) is the limit, the ReLU of slope 0"),
        (lambda: prox.Entropy(gamma=0.0), r"Simplex\(\) is the limit"),
        (lambda: prox.L2Ball(0.0), "radius"),
        (lambda: prox.ElasticNet(1.0, -1.0), "ridge"),
        (lambda: prox.Simplex(0.5), "axis"),
        (lambda: prox.Simplex((0, 0)).prox(jnp.ones((2, 2)), 1.0), "different axes"),
        (
            lambda: prox.NuclearNorm(weights=np.array([1.0, 2.0])),
            "weights: expected non-increasing numbers",
        ),
        (lambda: prox.NuclearNorm(weights=np.array([1.0, -2.0])), "weights"),
        (
            lambda: prox.NuclearNorm(weights=np.ones(3)).prox(jnp.ones((2, 4)), 1.0),
            r"shape of weights: expected \(2,\), got \(3,\)",
        ),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()
    with pytest.raises(TypeError):
        "2" * prox.L1()


def test_axes_of_a_scaled_prior_are_checked():
    A, x = ss.Dense(jnp.ones((3, 4))), jnp.ones((2, 3))
    for prior in (prox.Scaled(prox.GroupL2(axis=0), 2.0), prox.Simplex(axis=0)):
        with pytest.raises(ValueError, match="one of the layer's own axes"):
            ss.LayerProblem(A, x, prior=prior)


def test_layers_and_certificates_with_a_scaled_prior(rng):
    def solve(prior, x):
        layer = ss.nnx.SolverLinear(4, 3, solver=ss.ProxGD(300), prior=prior, rngs=nnx.Rngs(0))
        solution = layer.solve(x, certify=True)
        return solution.value, solution.certificate

    x = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)
    value, certificate = solve(1.5 * Own(), x)
    doubled = prox.Box(-1, 1), prox.L1(1.5)
    want = np.clip(doubled[1].prox(value, 1.0), -1, 1)  # the prox at one step, by its two parts
    np.testing.assert_allclose((1.5 * Own()).prox(value, 1.0), want)
    assert np.all(certificate < 1e-4)
    direct = solve(prox.Scaled(prox.L1(0.3), 0.5), x), solve(prox.L1(0.15), x)
    np.testing.assert_allclose(direct[0][0], direct[1][0], atol=1e-6)
    np.testing.assert_allclose(direct[0][1], direct[1][1], rtol=0.2, atol=1e-5)
    balls = solve(prox.Scaled(prox.L2Ball(0.5), 3.0), x), solve(prox.L2Ball(0.5), x)
    np.testing.assert_allclose(balls[0][0], balls[1][0], atol=1e-6)
    assert np.all(balls[0][1] < 1e-4)


# --- weights 0 ------------------------------------------------------------------------------------

AT_ZERO = {  # the prior with weight 0, its limit
    "L1": (prox.L1, prox.Zero()),
    "SquaredHinge": (prox.SquaredHinge, prox.Zero()),
    "GroupL2": (prox.GroupL2, prox.Zero()),
    "NuclearNorm": (prox.NuclearNorm, prox.Zero()),
    "weighted": (lambda g: prox.NuclearNorm(g, weights=jnp.asarray([2.0, 1.0])), prox.Zero()),
    "NonNegativeL1": (prox.NonNegativeL1, prox.NonNegative()),
    "ElasticNet": (lambda g: prox.ElasticNet(g, 0.0), prox.Zero()),
    "leaky": (lambda g: prox.leaky_relu_prior(1.0 - g), prox.Zero()),
}


@pytest.mark.parametrize("name", AT_ZERO)
def test_the_limits_of_weights_are_reached(name, rng):
    make, limit = AT_ZERO[name]
    v = jnp.asarray(rng.normal(size=(2, 3)))
    points = jnp.stack([v, v.at[0].set(0), jnp.zeros((2, 3))])

    def at(gamma, point):
        return make(gamma).prox(point, 0.7)

    @jax.jit
    @jax.vmap
    def near(point):
        proxes = at(0.0, point), at(1e-9, point), limit.prox(point, 0.7)
        by_weight, by_point = jax.jacrev(at, (0, 1))(0.0, point)
        return proxes, by_weight, by_point, jax.jacrev(limit.prox)(point, 0.7)

    (reached, close, want), by_weight, by_point, slope = near(points)
    np.testing.assert_allclose(reached, want, atol=1e-14)
    np.testing.assert_allclose(close, want, atol=1e-8)
    np.testing.assert_allclose(by_point, slope, atol=1e-13)
    assert np.all(np.isfinite(by_weight))
    differences = (jax.jit(at)(1e-7, v) - reached[0]) / 1e-7
    np.testing.assert_allclose(by_weight[0], differences, atol=1e-6)

    def dual(prior, w):
        return prior.conjugate(w), prior.dual_projection(w), prior.value(jnp.abs(w))

    duals = jnp.stack([v, -jnp.abs(v), jnp.zeros((2, 3))])
    mine, theirs = (jax.jit(jax.vmap(lambda w, p=p: dual(p, w)))(duals) for p in (make(0.0), limit))
    for one, other in zip(mine, theirs, strict=True):
        np.testing.assert_array_equal(one, other)
    assert jax.grad(lambda g: make(g).conjugate(duals[2]))(0.0) == 0


def test_an_elastic_net_without_weight_is_a_ridge(rng):
    v = jnp.asarray(rng.normal(size=(2, 3)))
    prior = prox.ElasticNet(0.0, 2.0)
    np.testing.assert_allclose(prior.prox(v, 0.5), v / 2)
    np.testing.assert_allclose(prior.conjugate(v), np.sum(v**2) / 4)
    np.testing.assert_array_equal(prior.dual_projection(v), v)


# --- weights of singular values -------------------------------------------------------------------


def pool_adjacent_violators(x):
    """The nearest non-increasing sequence."""
    blocks = []
    for entry in x:
        blocks.append([entry])
        while len(blocks) > 1 and np.mean(blocks[-2]) < np.mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    return np.concatenate([np.full(len(block), np.mean(block)) for block in blocks])


SEQUENCES = {  # weights of four singular values
    "falling": [2.0, 1.5, 0.7, 0.0],
    "steep": [9.0, 2.0, 0.5, 0.1],
    "equal": [1.0, 1.0, 1.0, 1.0],
    "Ky Fan": [1.0, 1.0, 0.0, 0.0],
    "spectral": [3.0, 0.0, 0.0, 0.0],
}


@jax.jit
def _weighted(weights, v, way):
    """Both maps at t = 0 and ±1e-6 along a way, their derivatives, and what else they are held to."""
    prior = prox.NuclearNorm(0.4, weights=weights)

    def maps(t):
        point, step = v + t * way, 0.7 + 0.3 * t
        return prior.prox(point, step), prior.dual_projection(point, 0.01 * step)

    at = jax.lax.map(maps, jnp.asarray([0.0, 1e-6, -1e-6]))
    slopes = jax.jvp(maps, (0.0,), (1.0,))[1]
    moreau = v - prior.prox(v, 1.0), prior.dual_projection(v)
    tall = jnp.swapaxes(prior.prox(jnp.swapaxes(v, 1, 2), 0.7), 1, 2)
    return at, slopes, moreau, tall, prox.NuclearNorm(0.4).prox(v, 0.7)


@pytest.mark.parametrize("name", SEQUENCES)
def test_weighted_nuclear_norms(name, rng):
    """Against isotonic regression in numpy, Moreau's identity, and differences of both maps."""
    weights = np.array(SEQUENCES[name])
    v, way = (rng.normal(size=(6, 4, 5)) for _ in "12")
    v[5] = np.eye(4, 5)  # all singular values equal
    at, slopes, moreau, tall, unweighted = _weighted(weights, v, way)
    (u, dual), *sides = zip(*map(np.asarray, at), strict=True)
    for got, matrix in zip(u, v, strict=True):
        p, sigma, q = np.linalg.svd(matrix, full_matrices=False)
        f = np.maximum(pool_adjacent_violators(sigma - 0.28 * weights), 0)
        np.testing.assert_allclose(got, (p * f) @ q, atol=1e-12)
    sums = np.cumsum(np.linalg.svd(dual, compute_uv=False), -1)
    bounds = 0.4 * np.cumsum(weights)
    assert np.all(sums <= bounds - 0.007 * np.sqrt([1, 2, 3, 4]) + 1e-12)
    np.testing.assert_allclose(*moreau, atol=1e-12)
    differences = [(a - b) / 2e-6 for a, b in zip(*sides, strict=True)]
    for slope, side in zip(slopes, differences, strict=True):
        assert np.all(np.isfinite(slope))
        np.testing.assert_allclose(slope[:5], side[:5], atol=1e-7)
    if name == "equal":
        np.testing.assert_allclose(u, unweighted, atol=1e-13)
        np.testing.assert_allclose(slopes[0][5], differences[0][5], atol=1e-7)
    np.testing.assert_allclose(tall, u, atol=1e-12)


def test_a_weighted_nuclear_norm_has_a_duality_gap(rng):
    prior = prox.NuclearNorm(0.5, axes=(-3, -2), weights=jnp.asarray([1.5, 1.0, 0.2]))
    A = ss.Conv(jnp.asarray(rng.normal(size=(2, 2, 2, 3))), (3, 4))
    x = jnp.asarray(rng.normal(size=(2, 3, 4, 2)))
    problem = ss.LayerProblem(A, x, prior=prior)

    @jax.jit
    def run():
        z = jnp.stack([ss.prox_gd(problem, num_iters=n, momentum=True).value for n in (5, 3000)])
        return jax.vmap(problem.objective)(z), jax.lax.map(problem.certificate, z)

    (early, best), bounds = run()
    assert np.all(bounds[0] >= early - best)
    assert np.all(bounds[1] < 1e-6)


class Flat(prox.Simplex):
    """A simplex whose g* is said to be constant."""

    def _conjugate_rise(self, w, value, error):
        return 0.9 * super()._conjugate_rise(w, value, error)


def test_the_contract_holds_the_rise_of_conjugates():
    contract._check_rise("Simplex", prox.Simplex(), (2,))
    with pytest.raises(
        AssertionError, match=r"_conjugate_rise\(w, g\*\(w\), error\): expected at least"
    ):
        contract._check_rise("Flat", Flat(), (2,))


# --- meshes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Simplex", "Entropy"])
def test_priors_on_meshes(name, rng):
    x = jnp.asarray(rng.normal(size=(4, 3)))

    def solve(x):
        problem = ss.LayerProblem(ss.Dense(jnp.eye(3)), x, prior=PRIORS[name], ridge=0.5)
        z, pull = jax.vjp(lambda x: PRIORS[name].prox(x, 0.3), x)
        return z, pull(jnp.sin(z))[0], problem.certificate(ss.prox_gd(problem, num_iters=2).value)

    here = solve(x)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((1,), ("data",), axis_types=(kind,))
        with jax.set_mesh(mesh):
            there = solve(jax.device_put(x, NamedSharding(mesh, P("data"))))
        for one, other in zip(there, here, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12, err_msg=str(kind))
