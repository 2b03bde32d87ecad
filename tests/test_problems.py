"""Objective (5), its terms and gradient, and the certificate that bounds the true gap."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles import nnls_layer, objective

import stochsolvers as ss

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


def as_dense(problem):
    """Matrix K (inputs, outputs) of the layer, from its plain forward pass."""
    A = problem.linear_map
    size = int(np.prod(A.in_shape))
    return np.asarray(A(jnp.eye(size).reshape(size, *A.in_shape))).reshape(size, -1)


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
    z = jnp.abs(jnp.asarray(rng.normal(size=problem.shape)))
    assert problem.objective(z).shape == batch
    assert problem.certificate(z).shape == batch
    assert problem.gradient(z).shape == z.shape


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
            gap = np.asarray(problem.objective(z)) - least
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
    least = np.asarray(problem.objective(best))
    for scale in (1.0, 1e-2):
        z = np.maximum(best + scale * rng.normal(size=best.shape), 0)
        certificate = np.asarray(problem.certificate(z))
        assert np.all(np.isfinite(certificate))
        assert np.all(certificate >= np.asarray(problem.objective(z)) - least - 1e-12)
    solved = ss.prox_gd(problem, num_iters=20_000, momentum=True)
    assert np.all(np.asarray(problem.certificate(solved.value)) < 1e-5)


@pytest.mark.parametrize("name", PRIORS)
def test_certificate_with_ridge_holds_for_every_prior(rng, name):
    problem = conv_problem(rng, ridge=0.5, prior=PRIORS[name])
    solved = ss.prox_gd(problem, num_iters=4000)
    least = np.asarray(problem.objective(solved.value))  # at least the minimum
    assert np.all(np.asarray(problem.certificate(solved.value)) < 1e-6)
    for num_iters in (1, 3, 30):
        z = ss.prox_gd(problem, num_iters=num_iters).value
        gap = np.asarray(problem.objective(z)) - least
        certificate = np.asarray(problem.certificate(z))
        assert np.all(np.isfinite(certificate))
        assert np.all(certificate >= gap)


@pytest.mark.parametrize("name", ["Box", "SymmetricLogBarrier", "IntervalLogBarrier"])
def test_bounded_priors_have_a_duality_gap_without_ridge(rng, name):
    problem = conv_problem(rng, prior=PRIORS[name], features=(2, 5))
    solved = ss.prox_gd(problem, num_iters=4000, momentum=True)
    least = np.asarray(problem.objective(solved.value))
    assert np.all(np.asarray(problem.certificate(solved.value)) < 1e-3)
    z = ss.prox_gd(problem, num_iters=3).value
    certificate = np.asarray(problem.certificate(z))
    assert np.all(np.isfinite(certificate))
    assert np.all(certificate >= np.asarray(problem.objective(z)) - least)


@pytest.mark.parametrize("bias", [0.0, -0.05])
def test_certificate_of_an_expanding_layer_without_ridge(rng, bias):
    """More outputs than inputs, no curvature, and an optimum that reproduces the input."""
    kernel, x = rng.normal(size=(6, 24)), rng.normal(size=(5, 6))
    problem = ss.LayerProblem(ss.Dense(jnp.asarray(kernel)), x, bias=np.full(24, bias))
    solved = ss.prox_gd(problem, num_iters=5000, momentum=True)
    certificate = np.asarray(problem.certificate(solved.value))
    best = np.array([nnls_layer(kernel, xi, np.full(24, bias), 1e-10) for xi in x])
    gap = np.asarray(problem.objective(solved.value) - problem.objective(best))
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


def test_lower_precision_is_computed_in_float32(rng):
    layer = nnx.Linear(6, 4, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    x = jnp.asarray(rng.normal(size=(2, 6)), jnp.bfloat16)
    problem = ss.LayerProblem(ss.Dense(layer.kernel[...]), x, bias=layer.bias[...])
    assert problem.dtype == jnp.float32
    assert ss.prox_gd(problem, num_iters=3).value.dtype == jnp.float32


def test_skip_connection_as_a_bias_of_full_shape(rng):
    problem = dense_problem(rng, 6, 4)
    skip = jnp.asarray(rng.normal(size=problem.shape))
    moved = ss.LayerProblem(problem.linear_map, problem.inputs, bias=problem.bias + skip)
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
