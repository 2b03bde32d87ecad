"""Objective (5), its terms and gradient, and the certificate that bounds the true gap."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles import convolution_matrix, nnls_by_pivoting, nnls_layer, objective

import stochsolvers as ss
from stochsolvers.problems import _products

PRIORS = {
    "Zero": ss.prox.Zero(),
    "NonNegative": ss.prox.NonNegative(),
    "SquaredHinge": ss.prox.SquaredHinge(2.0, 0.3),
    "LogBarrier": ss.prox.LogBarrier(0.4),
    "SymmetricLogBarrier": ss.prox.SymmetricLogBarrier(0.2),
    "IntervalLogBarrier": ss.prox.IntervalLogBarrier(0.3),
    "L1": ss.prox.L1(0.5),
    "Box": ss.prox.Box(-0.2, 0.4),
    "GroupL2": ss.prox.GroupL2(0.5),
    "NuclearNorm": ss.prox.NuclearNorm(0.5, axes=(-3, -2)),
    "PositiveSemidefinite": ss.prox.PositiveSemidefinite(axes=(-3, -2)),
}


def dense_problem(rng, n1, n2, *, batch=(3,), ridge=0.0, prior=None, bias=True):
    return ss.LayerProblem(
        ss.Dense(jnp.asarray(rng.normal(size=(n1, n2)))),
        jnp.asarray(rng.normal(size=(*batch, n1))),
        bias=jnp.asarray(rng.normal(size=n2)) if bias else None,
        prior=prior or ss.prox.NonNegative(),
        ridge=ridge,
    )


def conv_problem(rng, *, ridge=0.0, prior=None, padding="SAME", features=(2, 3)):
    kernel = rng.normal(size=(3, 3, *features))
    return ss.LayerProblem(
        ss.Conv(jnp.asarray(kernel), (4, 4), padding=padding),
        jnp.asarray(rng.normal(size=(2, 4, 4, features[0]))),
        bias=jnp.asarray(rng.normal(size=features[1])),
        prior=prior or ss.prox.NonNegative(),
        ridge=ridge,
    )


@jax.jit
def columns(linear_map):
    size = linear_map.in_shape
    return linear_map(jnp.eye(np.prod(size)).reshape(-1, *size))


def as_dense(linear_map):
    """Matrix K (inputs, outputs) of the layer, from its plain forward pass."""
    matrix = np.asarray(columns(linear_map))
    return matrix.reshape(len(matrix), -1)


objective_of = jax.jit(lambda problem, z: problem.objective(z))


def step_for(problem):
    """1/L, L = ||A||² + λ."""
    return 1 / (np.linalg.norm(as_dense(problem.linear_map), 2) ** 2 + problem.ridge)


@functools.partial(jax.jit, static_argnames=("num_iters", "momentum"))
def iterates(problem, step_size, counts, *, num_iters=1, momentum=False):
    """z and P(z) after so many solves more, each of `num_iters` iterations from the last point."""

    def solve(_, z):
        options = {"num_iters": num_iters, "momentum": momentum, "step_size": step_size}
        return ss.prox_gd(problem, init=z, **options).value

    def after(z, count):
        z = jax.lax.fori_loop(0, count, solve, z)
        return z, (z, problem.objective(z))

    return jax.lax.scan(after, jnp.zeros(problem.shape, problem.dtype), counts)[1]


def certificates_of(problem, points):
    """Of 25 points of a problem with two examples.

    As (5, 10) examples, so that one program serves these tests and that of optima known exactly.
    """
    inputs = np.broadcast_to(problem.inputs, (25, *problem.inputs.shape))
    bias = np.broadcast_to(problem.bias, (1, 10, *points.shape[2:]))
    many = ss.LayerProblem(
        problem.linear_map,
        inputs.reshape(5, 10, *inputs.shape[2:]),
        bias=bias,
        prior=problem.prior,
        ridge=problem.ridge,
    )
    return np.asarray(many.certificate(points.reshape(5, 10, *points.shape[2:]))).reshape(25, 2)


def test_objective_matches_numpy(rng):
    problem = dense_problem(rng, 6, 4, ridge=0.7)
    z = rng.normal(size=problem.shape)
    want = [
        objective(np.asarray(problem.linear_map.kernel), x, np.asarray(problem.bias), 0.7, zi)
        for x, zi in zip(np.asarray(problem.inputs), z, strict=True)
    ]
    np.testing.assert_allclose(problem.smooth(jnp.asarray(z)), want, rtol=1e-13)
    assert np.all(np.isinf(problem.objective(jnp.asarray(z))))  # z has negative entries
    np.testing.assert_allclose(problem.objective(jnp.abs(z)), problem.smooth(jnp.abs(z)))


@pytest.mark.parametrize("make", [lambda r: dense_problem(r, 6, 4, ridge=0.7), conv_problem])
def test_smooth_part_is_the_mean_of_its_terms_plus_ridge(rng, make):
    problem = make(rng)
    z = jnp.asarray(rng.normal(size=problem.shape))
    terms = problem.terms(z)
    assert terms.shape == (*problem.batch_shape, problem.linear_map.in_features)
    ridge = 0.5 * problem.ridge * np.sum(np.asarray(z) ** 2, axis=tuple(range(1, z.ndim)))
    np.testing.assert_allclose(np.mean(terms, axis=-1) + ridge, problem.smooth(z), rtol=1e-13)


@pytest.mark.parametrize("make", [lambda r: dense_problem(r, 6, 4, ridge=0.7), conv_problem])
def test_gradient_by_finite_differences(rng, make):
    problem = make(rng)
    z = np.asarray(rng.normal(size=problem.shape))
    direction = rng.normal(size=problem.shape)
    h = 1e-5
    difference = (problem.smooth(z + h * direction) - problem.smooth(z - h * direction)) / (2 * h)
    along = np.sum(np.asarray(problem.gradient(z)) * direction, axis=tuple(range(1, z.ndim)))
    np.testing.assert_allclose(along, difference, rtol=1e-7)


@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_batch_axes_are_problems_of_their_own(rng, batch):
    problem = dense_problem(rng, 5, 3, batch=batch)
    z = np.abs(rng.normal(size=problem.shape))

    @jax.jit
    def each(problem, z):
        return problem.objective(z), problem.certificate(z), problem.gradient(z)

    value, certificate, gradient = each(problem, z)
    assert value.shape == certificate.shape == batch
    assert gradient.shape == z.shape


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.5])
def test_certificate_bounds_the_gap_to_the_nnls_optimum(rng, ridge):
    for n1, n2 in ((6, 4), (9, 9)):
        problem = dense_problem(rng, n1, n2, batch=(8,), ridge=ridge)
        kernel, bias = np.asarray(problem.linear_map.kernel), np.asarray(problem.bias)
        inputs = np.asarray(problem.inputs)
        best = np.array([nnls_layer(kernel, x, bias, ridge) for x in inputs])
        least = np.array(
            [objective(kernel, x, bias, ridge, z) for x, z in zip(inputs, best, strict=True)]
        )
        for scale in (1.0, 1e-2, 1e-4):
            z = np.maximum(best + scale * rng.normal(size=best.shape), 0)
            gap = np.asarray(objective_of(problem, z)) - least
            certificate = np.asarray(problem.certificate(z))
            assert np.all(certificate >= gap - 1e-13 * (1 + np.abs(least)))
            if ridge == 0.5:  # well conditioned: the bound is also a useful one
                assert np.all(certificate <= 100 * gap + 1e-12)
        assert np.all(np.asarray(problem.certificate(best)) < 1e-6)


def test_certificate_without_any_curvature_is_a_duality_gap(rng):
    # more outputs than inputs: A A* is singular; a negative bias keeps the optimum bounded
    problem = dense_problem(rng, 4, 9, batch=(6,), bias=False)
    object.__setattr__(problem, "bias", jnp.asarray(-0.1 - rng.uniform(size=9)))
    kernel, bias = np.asarray(problem.linear_map.kernel), np.asarray(problem.bias)
    assert float(ss.lipschitz.strong_convexity(problem.linear_map)) == 0.0
    ridge = 1e-9  # the oracle's only, for its Cholesky factor
    best = np.array([nnls_layer(kernel, x, bias, ridge) for x in np.asarray(problem.inputs)])
    least = np.asarray(objective_of(problem, best))
    for scale in (1.0, 1e-2):
        z = np.maximum(best + scale * rng.normal(size=best.shape), 0)
        certificate = np.asarray(problem.certificate(z))
        assert np.all(np.isfinite(certificate))
        assert np.all(certificate >= np.asarray(objective_of(problem, z)) - least - 1e-12)
    solved = ss.prox_gd(problem, num_iters=20_000, momentum=True)
    assert np.all(np.asarray(problem.certificate(solved.value)) < 1e-5)


@pytest.mark.parametrize("name", PRIORS)
def test_certificate_with_ridge_holds_for_every_prior(rng, name):
    problem = conv_problem(rng, ridge=0.5, prior=PRIORS[name], features=(3, 2))
    counts = np.array([1, 2, 27] + [40] * 6 + [200] * 15 + [1000])
    points, reached = map(np.asarray, iterates(problem, step_for(problem), counts))
    certificates = certificates_of(problem, points)
    assert np.all(certificates[-1] < 1e-6)
    assert np.all(np.isfinite(certificates))
    gap, round_off = reached - reached[-1], 1e-13 * (1 + np.abs(reached))  # at most the gap
    assert np.all(certificates[:3] >= gap[:3])
    assert np.all(certificates >= gap - round_off)


@pytest.mark.parametrize("name", ["Box", "SymmetricLogBarrier", "IntervalLogBarrier"])
def test_bounded_priors_have_a_duality_gap_without_ridge(rng, name):
    problem = conv_problem(rng, prior=PRIORS[name], features=(2, 5))
    step_size = step_for(problem)
    points, reached = iterates(problem, step_size, np.array([4]), num_iters=1000, momentum=True)
    early, value = iterates(problem, step_size, np.array([3]))
    certificate = jax.jit(jax.vmap(problem.certificate))(jnp.concatenate([points, early]))
    assert np.all(certificate[0] < 1e-3)
    assert np.all(np.isfinite(certificate[1]))
    assert np.all(certificate[1] >= value[0] - reached[0])


@pytest.mark.parametrize("bias", [0.0, -0.05])
def test_certificate_of_an_expanding_layer_without_ridge(rng, bias):
    """More outputs than inputs, no curvature, and an optimum that reproduces the input."""
    kernel, x = rng.normal(size=(6, 24)), rng.normal(size=(5, 6))
    problem = ss.LayerProblem(ss.Dense(jnp.asarray(kernel)), x, bias=np.full(24, bias))
    solved = ss.prox_gd(problem, num_iters=5000, momentum=True)
    certificate = np.asarray(problem.certificate(solved.value))
    best = np.array([nnls_layer(kernel, xi, np.full(24, bias), 1e-10) for xi in x])
    gap = np.asarray(objective_of(problem, solved.value) - objective_of(problem, best))
    assert np.all(certificate >= gap)
    assert np.all(certificate < 1e-6)


def test_a_tiny_ridge_does_not_spoil_the_certificate(rng):
    kernel, x = rng.normal(size=(5, 8)), rng.normal(size=(4, 5))
    certificates = []
    for ridge in (0.0, 1e-6):
        problem = ss.LayerProblem(
            ss.Dense(jnp.asarray(kernel)), x, bias=np.full(8, -0.1), ridge=ridge
        )
        z = ss.prox_gd(problem, num_iters=30, momentum=True).value
        certificates.append(np.asarray(problem.certificate(z)))
    assert np.all(certificates[1] <= 1.1 * certificates[0] + 1e-5)


def test_certificate_is_infinite_where_nothing_can_be_promised(rng):
    unbounded = ss.LayerProblem(
        ss.Dense(jnp.zeros((3, 2))), jnp.ones((1, 3)), bias=jnp.ones(2)
    )  # −<b, z> has no minimum over z ≥ 0
    assert np.isinf(unbounded.certificate(jnp.ones((1, 2))))
    problem = dense_problem(rng, 6, 4, ridge=0.1)
    assert np.all(np.isinf(problem.certificate(-jnp.ones(problem.shape))))  # infeasible


@pytest.mark.optimized
def test_float32_certificate_is_not_below_the_float64_gap(rng):
    kernel, bias = (a.astype(np.float32) for a in (rng.normal(size=(20, 12)), rng.normal(size=12)))
    inputs = rng.normal(size=(50, 20)).astype(np.float32)
    problem = ss.LayerProblem(ss.Dense(jnp.asarray(kernel)), inputs, bias=bias, ridge=1e-3)
    z = ss.prox_gd(problem, num_iters=2000, momentum=True).value
    assert z.dtype == jnp.float32
    certificate = np.asarray(problem.certificate(z), np.float64)
    kernel, bias, inputs, z = (np.asarray(a, np.float64) for a in (kernel, bias, inputs, z))
    for x, zi, bound in zip(inputs, z, certificate, strict=True):
        best = nnls_layer(kernel, x, bias, 1e-3)
        least = objective(kernel, x, bias, 1e-3, best)
        assert bound >= objective(kernel, x, bias, 1e-3, zi) - least - 1e-13
        assert bound < 1e-3


@pytest.mark.optimized
@pytest.mark.parametrize("kind", ["dense", "convolution", "grouped"])
def test_float32_certificates_of_wide_layers_are_small(rng, kind):
    """Sums of hundreds of products: the bound holds, and is a ten-thousandth of the objective."""
    if kind == "dense":
        make, shape, inputs = ss.Dense, (300, 310), (4, 300)
    else:
        groups = 2 if kind == "grouped" else 1
        make = functools.partial(ss.Conv, spatial_shape=(6, 5), feature_group_count=groups)
        shape, inputs = (3, 3, 20 // groups, 30), (4, 6, 5, 20)
    kernel = (rng.normal(size=shape) / np.prod(shape[:-1]) ** 0.5).astype(np.float32)
    x = np.maximum(rng.normal(size=inputs), 0).astype(np.float32)
    problem = ss.LayerProblem(make(jnp.asarray(kernel)), x, ridge=2.0**-9)
    wide = kernel.astype(np.float64)
    if kind != "dense":
        wide = convolution_matrix(wide, (6, 5), (1, 1), [(1, 1)] * 2, (1, 1), groups).T
    step_size = 1 / (np.linalg.norm(wide, 2) ** 2 + 2.0**-9)
    z = ss.prox_gd(problem, num_iters=1500, momentum=True, step_size=step_size).value
    certificate = np.asarray(problem.certificate(z), np.float64)
    flat = (len(z), -1)
    rows = [a.astype(np.float64).reshape(flat) for a in (x, np.asarray(z))]
    for bound, inputs, found in zip(certificate, *rows, strict=True):
        value = functools.partial(objective, wide, inputs, np.zeros(wide.shape[1]), 2.0**-9)
        least = value(nnls_by_pivoting(wide, inputs, 2.0**-9, found > 0))
        assert bound >= value(found) - least
        assert bound < 1e-4 * least


@functools.partial(jax.jit, static_argnames="adjoint")
def blocked(A, operand, adjoint):
    return _products.in_blocks(A, operand, adjoint=adjoint)


@functools.partial(jax.jit, static_argnames="adjoint")
def whole(A, operand, adjoint):
    return A.adjoint(operand) if adjoint else A(operand)


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 1, 4096, 3), {}),
        ((1, 1, 2**16, 1), {}),  # so many blocks that their sum needs its second float
        ((3, 3, 100, 4), {"strides": (2, 1)}),
        ((3, 2, 130, 8), {"padding": "CIRCULAR", "feature_group_count": 2}),
        ((2, 3, 70, 5), {"kernel_dilation": (1, 2), "padding": ((1, 2), (0, 3))}),
        ((9, 9, 3, 4), {"padding": "VALID"}),
    ],
)
def test_blocked_products_are_within_their_bound(shape, options, rng):
    """Equal terms, whose roundings all go one way, and random ones."""
    groups = options.get("feature_group_count", 1)
    spatial = (10, 9) if shape[2] < 2**16 else (1, 2)
    for one in (lambda *size: np.full(size, 0.1), lambda *size: rng.normal(size=size)):
        kernel = one(*shape).astype(np.float32)
        conv = ss.Conv(jnp.asarray(kernel), spatial, **options)
        exact = ss.Conv(jnp.asarray(kernel, np.float64), spatial, **options)
        bounds = ss.Conv(jnp.asarray(np.abs(kernel), np.float64), spatial, **options)
        x = (7 * one(1, *spatial, shape[2] * groups)).astype(np.float32)
        z = (7 * one(1, *conv.out_shape)).astype(np.float32)
        for adjoint, operand in ((False, x), (True, z)):
            (total, rest), error = blocked(conv, jnp.asarray(operand), adjoint)
            found = np.asarray(total, np.float64) + np.asarray(rest, np.float64)
            want, bound = (
                whole(A, jnp.asarray(sign(operand), np.float64), adjoint)
                for A, sign in ((exact, np.asarray), (bounds, np.abs))
            )
            assert np.all(np.abs(found - want) <= error * bound)
            assert error < 50 * np.finfo(np.float32).eps


def diagonal(values):
    """Diagonal matrices on the spatial axes of (..., 4, 4, features)."""
    return np.einsum("...ic,ij->...ijc", values, np.eye(values.shape[-2]))


def feature_pairs(rng, shape):
    """Pairs (3, 4) or (4, 3) of random signs along the last axis, and which of them are not zero."""
    pairs = rng.permuted(np.broadcast_to([3.0, 4.0], shape), axis=-1)
    return pairs * rng.choice([-1.0, 1.0], shape), rng.random(shape[:-1])[..., None] < 0.6


def optimum(name, rng, shape):
    """A point z, a subgradient of g there, and g in numpy: numbers with few binary digits."""
    chosen, part = rng.random(shape) < 0.6, rng.choice([0.25, 0.5, 1.0], shape)
    sign = rng.choice([-1.0, 1.0], shape)
    total = functools.partial(np.sum, axis=(-3, -2, -1))
    if name == "Zero":
        return sign * part, 0.0 * part, lambda u: 0.0
    if name == "NonNegative":
        return part * chosen, -part * ~chosen, lambda u: 0.0
    if name == "SquaredHinge":
        z = sign * part
        return z, -2.0 * np.maximum(-z - 0.25, 0), lambda u: total(np.maximum(-u - 0.25, 0) ** 2)
    if name == "LogBarrier":
        return part, -0.5 / part, lambda u: -0.5 * total(np.log(u))
    if name == "SymmetricLogBarrier":
        z = 0.5 * sign * chosen
        return z, z, lambda u: -0.375 * total(np.log(1 - u**2))
    if name == "IntervalLogBarrier":
        z = 0.5 + 0.25 * sign * chosen
        return z, 4.0 * z - 2.0, lambda u: -0.375 * total(np.log(u * (1 - u)))
    if name == "L1":
        z = sign * part * chosen
        return z, np.where(chosen, 0.5 * sign, 0.25 * sign), lambda u: 0.5 * total(np.abs(u))
    if name == "Box":
        z = np.where(chosen, 0.5 * (sign > 0), 0.25)
        return z, sign * part * chosen, lambda u: 0.0
    if name == "GroupL2":
        pairs, some = feature_pairs(rng, shape)
        z, subgradient = pairs * some / 4, np.where(some, pairs / 4, pairs / 8)
        return z, subgradient, lambda u: 1.25 * np.sum(np.linalg.norm(u, axis=-1), axis=(-2, -1))
    values, some = part[..., 0, :], chosen[..., 0, :]
    if name == "NuclearNorm":

        def nuclear(u):
            return 0.5 * np.sum(np.linalg.svd(np.moveaxis(u, -1, -3))[1], axis=(-2, -1))

        return diagonal(values * some), diagonal(np.where(some, 0.5, 0.25 * values)), nuclear
    return diagonal(values * some), -diagonal(values * ~some), lambda u: 0.0


EXACT = {
    **{name: PRIORS[name] for name in ("Zero", "NonNegative", "L1", "PositiveSemidefinite")},
    "SquaredHinge": ss.prox.SquaredHinge(2.0, 0.25),
    "LogBarrier": ss.prox.LogBarrier(0.5),
    "SymmetricLogBarrier": ss.prox.SymmetricLogBarrier(0.375),
    "IntervalLogBarrier": ss.prox.IntervalLogBarrier(0.375),
    "Box": ss.prox.Box(0.0, 0.5),
    "GroupL2": ss.prox.GroupL2(1.25),
    "NuclearNorm": ss.prox.NuclearNorm(0.5, axes=(-3, -2)),
}
# whose round-off is tested as users have it
SINGLE = pytest.param(np.float32, marks=pytest.mark.optimized)
SCALES = (0.0, 1e-6, 1e-4, 1e-2, 1.0)
near = jax.jit(lambda prior, v, step_size: prior.prox(v, step_size))


@pytest.mark.parametrize("dtype", [np.float64, SINGLE])
@pytest.mark.parametrize("name", PRIORS)
def test_certificates_bound_the_gap_to_an_optimum_known_exactly(rng, name, dtype):
    """The bias is chosen so that z* is optimal: b = A (A* z* − x) + λ z* + q, q ∈ ∂g(z*), exactly.

    P(z) − P(z*) = ½ ||A* (z − z*)||² + (λ/2) ||z − z*||² + g(z) − g(z*) − <q, z − z*>.
    """
    shape, prior = (len(SCALES), 10, 4, 4, 2), EXACT[name]
    kernel = rng.integers(-4, 5, size=(3, 3, 3, 2)) / 4
    inputs = rng.integers(-8, 9, size=(1, 10, 4, 4, 3)) / 4
    best, subgradient, value = optimum(name, rng, (1, *shape[1:]))
    matrix = as_dense(ss.Conv(jnp.asarray(kernel), (4, 4)))
    flat = (*best.shape[:2], -1)
    dual = ((best.reshape(flat) @ matrix.T) - inputs.reshape(flat)) @ matrix
    scales = np.reshape(SCALES, (-1, 1, 1, 1, 1))
    for ridge in (0.0, 2.0**-7, 0.5):
        bias = dual.reshape(best.shape) + ridge * best + subgradient
        assert np.array_equal(bias, bias.astype(np.float32))
        start = (best + scales * rng.normal(size=shape)).astype(dtype)
        z = near(prior, start, 1e-9 if name.endswith("Barrier") else 1e-30)
        z = np.where(scales > 0, z, best.astype(dtype))
        problem = ss.LayerProblem(
            ss.Conv(jnp.asarray(kernel, dtype), (4, 4)),
            np.broadcast_to(inputs, (len(SCALES), *inputs.shape[1:])).astype(dtype),
            bias=bias.astype(dtype),
            prior=prior,
            ridge=ridge,
        )
        certificate = np.asarray(problem.certificate(z), np.float64)
        move = np.asarray(z, np.float64) - best
        image = move.reshape(*shape[:2], -1) @ matrix.T
        gap = 0.5 * np.sum(image**2, axis=-1)
        gap += np.sum(0.5 * ridge * move**2 - subgradient * move, axis=(-3, -2, -1))
        gap += value(best + move) - value(best)
        assert np.all(certificate >= gap - 1e-13)
        if ridge > 0 or name != "Zero":  # without curvature, Zero has no dual point but one
            assert np.all(certificate[0] < (1e-9 if dtype is np.float64 else 0.1))
        if ridge == 0.5 and dtype is np.float64:  # well conditioned: also a useful bound
            condition = np.linalg.norm(matrix, 2) ** 2 / ridge
            assert np.all(certificate[:3] <= condition * gap[:3] + 1e-11)


@pytest.mark.parametrize("dtype", [np.float64, SINGLE])
@pytest.mark.parametrize("kind", ["dense", "circular"])
def test_certificates_by_the_curvature_of_large_maps(rng, kind, dtype):
    """No prior and no ridge, and the smallest eigenvalue λ of A A* comes from a search.

    Along its eigenvector the bound ||∇F||² / (2λ) is the gap itself: any larger λ would be too large.
    """
    make, size = ss.Dense, (150, 40)
    if kind == "circular":
        make = functools.partial(ss.Conv, spatial_shape=(4, 3), padding="CIRCULAR")
        size = (3, 2, 36, 20)
    kernel = rng.integers(-4, 5, size=size) / 4
    exact = make(jnp.asarray(kernel))
    matrix = as_dense(exact)
    eigenvalues, vectors = np.linalg.eigh(matrix.T @ matrix)
    assert eigenvalues[0] > 1e-2 * eigenvalues[-1]
    best = rng.integers(-4, 5, size=exact.out_shape) / 4
    moves = np.stack([vectors[:, 0], rng.normal(size=best.size), vectors[:, -1], 0 * vectors[:, 0]])
    z = (best + moves.reshape(-1, *best.shape)).astype(dtype)
    x = rng.integers(-8, 9, size=(len(z), *exact.in_shape)) / 4
    flat = (len(z), -1)
    bias = ((best.ravel() @ matrix.T - x.reshape(flat)) @ matrix).reshape(z.shape)
    problem = ss.LayerProblem(
        make(jnp.asarray(kernel, dtype)),
        x.astype(dtype),
        bias=bias.astype(dtype),
        prior=ss.prox.Zero(),
    )
    certificate = np.asarray(problem.certificate(z), np.float64)
    move = (np.asarray(z, np.float64) - best).reshape(flat)
    gap = 0.5 * np.sum((move @ matrix.T) ** 2, axis=-1)
    assert np.all(certificate >= gap - 1e-12)
    assert certificate[0] <= 1.1 * gap[0]
    assert np.all(certificate[1:3] <= 1.1 * eigenvalues[-1] / eigenvalues[0] * gap[1:3])
    assert certificate[3] < (1e-9 if dtype is np.float64 else 0.1)


def exact_gaps(kernel, x, z, ridge):
    """P(z) − min P of unconstrained problems in two variables, ½ ∇ᵀH⁻¹∇, and the minimisers."""
    kernel, x, z = (np.asarray(a, np.longdouble) for a in (kernel, x, z))
    ridge = np.longdouble(np.float32(ridge))
    gradient = (z @ kernel.T - x) @ kernel + ridge * z
    (a, b), (_, c) = kernel.T @ kernel + ridge * np.eye(2, dtype=np.longdouble)
    inverse = np.array([[c, -b], [-b, a]]) / (a * c - b * b)
    return 0.5 * np.sum(gradient @ inverse * gradient, axis=-1), z - gradient @ inverse


@pytest.mark.optimized
def test_float32_certificates_cover_their_own_round_off(rng):
    """Inputs that z reproduces but for the rounding of A* z, where all that is left is round-off."""
    count = 0
    for _ in range(30):
        kernel = rng.normal(size=(4, 2)).astype(np.float32)
        z = np.abs(rng.normal(size=(20, 2))).astype(np.float32)
        x = z @ kernel.T
        gap, best = exact_gaps(kernel, x, z, 0.0)
        for prior in (ss.prox.Zero(), ss.prox.NonNegative()):
            problem = ss.LayerProblem(ss.Dense(jnp.asarray(kernel)), x, prior=prior)
            certificate = np.asarray(problem.certificate(jnp.asarray(z)), np.longdouble)
            inside = np.all(best >= 0, axis=-1)
            assert np.all(certificate[inside] >= gap[inside])
            assert np.all(certificate[inside] < 1e-3)
            count += np.sum(inside)
    assert count > 1000


@pytest.mark.optimized
@pytest.mark.parametrize("ridge", [1e-5, 1e-3])
def test_float32_certificates_of_ill_conditioned_layers(rng, ridge):
    """A* z cancels: z of size 1000 along a singular direction of 0.002."""
    for _ in range(10):
        left, right = (np.linalg.qr(rng.normal(size=(n, 2)))[0] for n in (4, 2))
        kernel = (left * [1.0, 2e-3] @ right.T).astype(np.float32)
        start = 1000 * right[:, 1] * (1 + 0.1 * rng.normal(size=(40, 1)))
        x = (start @ kernel.T.astype(np.float64) * (1 + ridge / 4e-6)).astype(np.float32)
        z = exact_gaps(kernel, x, start, ridge)[1].astype(np.float32)
        z += rng.choice([0.0, 1e-2], (40, 1)).astype(np.float32) * right[:, 1].astype(np.float32)
        problem = ss.LayerProblem(
            ss.Dense(jnp.asarray(kernel)), x, prior=ss.prox.Zero(), ridge=ridge
        )
        certificate = np.asarray(problem.certificate(jnp.asarray(z)), np.longdouble)
        assert np.all(certificate >= exact_gaps(kernel, x, z, ridge)[0])


@pytest.mark.parametrize("name", ["NonNegative", "GroupL2"])
def test_an_example_has_the_certificate_that_it_has_alone(rng, name):
    kernel, x = rng.normal(size=(6, 9)), rng.normal(size=(3, 6))

    def problem(x):
        return ss.LayerProblem(
            ss.Dense(jnp.asarray(kernel)), x, bias=np.full(9, -0.1), prior=PRIORS[name]
        )

    z = ss.prox_gd(problem(x), num_iters=2000, momentum=True).value
    z = z.at[1].set(1.0).at[2].add(1e-4)
    together = problem(x).certificate(z)
    for i in range(3):
        alone = problem(x[i : i + 1]).certificate(z[i : i + 1])[0]
        np.testing.assert_allclose(alone, together[i], rtol=1e-6, atol=1e-13)


@pytest.mark.parametrize("name", PRIORS)
def test_certificates_without_ridge_go_to_zero_with_iterations(rng, name):
    # Zero is bounded by curvature alone, and CIRCULAR padding has some; no other needs any
    padding = "CIRCULAR" if name == "Zero" else "SAME"
    problem = conv_problem(rng, prior=PRIORS[name], features=(3, 2), padding=padding)
    curvature = float(ss.lipschitz.strong_convexity(problem.linear_map))
    assert (curvature > 0) == (name == "Zero")
    counts = np.array([1, 9] + [4] * 22 + [2])  # of solves with fifty iterations
    options = {"num_iters": 50, "momentum": True}
    points, _ = iterates(problem, step_for(problem), counts, **options)
    certificates = certificates_of(problem, points)
    early, late, last = (np.max(certificates[k]) for k in (0, 1, -1))
    assert late < 0.1 * early
    assert last < 1e-8


def test_overflow_is_no_certificate():
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 4, 6)) * 1e20, jnp.float32)
    for inputs, z in ((1.0, 1.0), (np.nan, 1.0), (1e30, 1e30)):
        problem = ss.LayerProblem(
            ss.Conv(kernel, (6, 5)), jnp.full((1, 6, 5, 4), inputs, jnp.float32), ridge=0.1
        )
        certificate = problem.certificate(jnp.full(problem.shape, z))
        assert np.all(np.isinf(certificate))


def test_lower_precision_is_computed_in_float32(rng):
    layer = nnx.Linear(6, 4, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    x = jnp.asarray(rng.normal(size=(2, 6)), jnp.bfloat16)
    problem = ss.LayerProblem(ss.Dense(layer.kernel[...]), x, bias=layer.bias[...])
    assert problem.dtype == jnp.float32
    assert ss.prox_gd(problem, num_iters=3).value.dtype == jnp.float32


def test_skip_connection_as_a_bias_of_full_shape(rng):
    problem = dense_problem(rng, 6, 4)
    skip = jnp.asarray(rng.normal(size=problem.shape))
    moved = ss.LayerProblem(problem.linear_map, problem.inputs, bias=problem.bias[None] + skip)
    z = jnp.asarray(rng.normal(size=problem.shape))
    np.testing.assert_allclose(moved.gradient(z), problem.gradient(z) - skip, rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": np.ones((2, 7))}, "shape of inputs.*expected.*6.*got.*7"),
        ({"inputs": np.ones((2, 6), int)}, "dtype of inputs.*floating"),
        ({"bias": np.ones(5)}, "shape of bias.*broadcasts"),
        ({"ridge": -0.1}, "ridge: expected a number >= 0, got -0.1"),
        ({"ridge": np.ones(2)}, "shape of ridge: expected 0 axes"),
        ({"inputs": [[1.0] * 6]}, "inputs of LayerProblem: expected an array, got list"),
        ({"prior": ss.prox.L1(np.ones((2, 1)))}, "weights of L1: expected at most 1 axes"),
        ({"prior": ss.prox.GroupL2(1.0, axis=0)}, "axis of GroupL2.*from the end"),
        ({"prior": ss.prox.NuclearNorm(1.0)}, "axis of NuclearNorm"),
    ],
)
def test_bad_structure_raises_at_trace_time(arguments, message):
    good = {"inputs": np.ones((2, 6)), "bias": np.ones(4), "ridge": 0.0}
    with pytest.raises(ValueError, match=message):
        ss.LayerProblem(ss.Dense(jnp.ones((6, 4))), **{**good, **arguments})


def test_variable_of_another_shape_raises(rng):
    with pytest.raises(ValueError, match=r"shape of the variable z: expected \(3, 4\)"):
        dense_problem(rng, 6, 4).gradient(jnp.ones((4,)))


@pytest.mark.parametrize("prior", [ss.prox.NonNegative(), ss.prox.GroupL2(0.1)])
def test_certificates_from_what_is_known(rng, prior):
    """With ‖A‖² and λ_min(A A*) at hand, given or kept, as without; with worse numbers, larger."""
    kernel, x, z = (jnp.asarray(rng.normal(size=s)) for s in ((8, 5), (3, 8), (3, 5)))
    problem = ss.LayerProblem(ss.Dense(kernel), x, prior=prior)
    z, squares = jnp.abs(z), np.linalg.svd(kernel, compute_uv=False) ** 2
    plain = problem.certificate(z)
    known = problem.certificate(z, squared_norm=squares[0], strong_convexity=squares[-1])
    np.testing.assert_allclose(known, plain, rtol=1e-6)
    np.testing.assert_array_equal(problem.certifier()(z), plain)
    certifier = problem.certifier(squared_norm=squares[0], strong_convexity=squares[-1])
    np.testing.assert_allclose(jax.jit(lambda c, z: c(z))(certifier, z), plain, rtol=1e-6)
    assert np.all(problem.certificate(z, strong_convexity=0.1 * squares[-1]) >= plain)


@pytest.mark.optimized
def test_the_certificate_of_a_large_layer_copies_no_kernel():
    """With ‖A‖² and λ_min(A A*) at hand it needs less memory than the kernel."""

    def certificate(kernel, x, z, squared_norm):
        problem = ss.LayerProblem(ss.Dense(kernel), x, ridge=1e-3)
        return problem.certificate(z, squared_norm=squared_norm, strong_convexity=0.0)

    shapes = ((16384, 4096), (2, 16384), (2, 4096), ())
    operands = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    analysis = jax.jit(certificate).lower(*operands).compile().memory_analysis()
    assert analysis.temp_size_in_bytes < 0.5 * 4 * 16384 * 4096


def test_repr_has_shapes_and_numbers_not_entries(rng):
    A = ss.Dense(jnp.asarray(rng.normal(size=(64, 32)), jnp.float32))
    problem = ss.LayerProblem(
        A, jnp.zeros((5, 64), jnp.float32), prior=ss.prox.L1(jnp.float32(0.3))
    )
    assert repr(problem) == (
        "LayerProblem(linear_map=Dense(kernel=float32[64, 32]), inputs=float32[5, 64], loss=Squares(), "
        "bias=None, prior=L1(gamma=float32(0.3)), ridge=float32(0.0))"
    )
    seen = []
    jax.eval_shape(lambda gamma: seen.append(repr(ss.prox.L1(gamma))), 1.0)
    assert seen == ["L1(gamma=float64[])"]
    assert repr(ss.prox.L1(0.3)) == "L1(gamma=0.3)"
