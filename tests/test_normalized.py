"""Problems and layers in normalised units, and outputs before the activation."""

import dataclasses
import functools

import catalogue
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import stochsolvers as ss

KEY = jax.random.key(3)
SOLVERS = {
    "ProxGD": ss.ProxGD(5),
    "momentum": ss.ProxGD(5, momentum=True),
    "fixed step": ss.ProxGD(5, 0.01),
    "remat": ss.ProxGD(5, derivative="remat"),
    "truncated": ss.ProxGD(5, derivative=ss.Truncated(2)),
    "ProxSG": ss.ProxSG(0.5, 5, decay=0.9),
    "expected smoothness": ss.ProxSG(0.5, 5, ss.InverseExpectedSmoothness()),
    "MS2GD": ss.MS2GD(0.5, 2, 3),
    "random lengths": ss.MS2GD(0.5, 2, 3, random_inner=True),
    "NSync": ss.NSync(0.5, 5),
}
each_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())


def normal(rng, *shape, dtype=jnp.float64):
    return jnp.asarray(rng.normal(size=shape), dtype)


def columns(A):
    """The images of the unit vectors, one in a row."""
    n = int(np.prod(A.in_shape))
    return A(jnp.eye(n, dtype=A.dtype).reshape(n, *A.in_shape)).reshape(n, -1)


def dense_matrix(A):
    return np.asarray(jax.jit(columns)(A))


# maps and losses times a number


@pytest.mark.parametrize("name", catalogue.MAPS)
def test_maps_times_a_number(name):
    A = catalogue.MAPS[name].astype(jnp.float64)

    @jax.jit
    def run(A):
        some, again = (
            m.restrict(jnp.array([0])).restrict_outputs(jnp.array([0])) for m in (2 * A, A)
        )
        scaled = 3 * A, A * np.float64(-0.5), A / jnp.asarray(4.0)
        norms = [ss.lipschitz_constant(m, grid="padded") for m in (2 * A, A)]
        return [columns(m) for m in (A, *scaled, again, some)], norms

    (matrix, *scaled, again, some), (double, norm) = run(A)
    for found, factor in zip(scaled, (3, -0.5, 0.25), strict=True):
        np.testing.assert_allclose(found, factor * np.asarray(matrix), atol=1e-14)
    np.testing.assert_allclose(double / norm, 4, rtol=1e-6)
    np.testing.assert_allclose(some, 2 * np.asarray(again), atol=1e-14)
    with pytest.raises(TypeError):
        A * jnp.ones(3)
    with pytest.raises(TypeError):
        "2" * A


# problems


@pytest.mark.parametrize("name", catalogue.LOSSES)
def test_a_normalised_problem_is_the_plain_one_in_other_units(name, rng):
    """F(z) = L F₀(z/L) − <b, z>, with a Hessian of norm at most 1, attained by squares."""
    loss, targets = catalogue.LOSSES[name]
    x, b = targets.astype(jnp.float64), normal(rng, 3)
    if name == "CrossEntropy":  # the features last, one map for each class
        A = ss.linear_map(lambda W, u: u @ W, x.shape, normal(rng, 4, 3), dtype=jnp.float64)
        b = normal(rng, 3, 3)
    else:
        A = ss.Dense(normal(rng, 4, 3))
    plain = ss.LayerProblem(A, x, bias=b, loss=loss, ridge=0.2, prior=ss.prox.L1(0.1))
    problem = plain.normalized()
    matrix = dense_matrix(A)
    L = float(loss.smoothness) * np.linalg.norm(matrix, 2) ** 2 + 0.2
    z = normal(rng, *plain.shape)
    unbiased = ss.LayerProblem(A, x, loss=loss, ridge=0.2)

    @jax.jit
    def run(z):
        image = jnp.broadcast_to(b, z.shape) - A(loss.derivative(jnp.zeros_like(x), x))
        norm = ss.lipschitz_constant(problem.linear_map)
        return {
            "value": problem.smooth(z),
            "again": problem.normalized().smooth(z),
            "expected": L * unbiased.smooth(z / L) - plain.sum(jnp.broadcast_to(b, z.shape) * z),
            "gradient": problem.gradient(z),
            "derivative": jax.grad(lambda z: jnp.sum(problem.smooth(z)))(z),
            "first": ss.prox_gd(problem, step_size=1.0, num_iters=1).value,
            "layer": plain.prior.prox(image, 1.0),  # of A x + b for squares
            "smoothness": problem.smoothness(norm),
        }

    found = run(z)
    np.testing.assert_allclose(found["value"], found["expected"], rtol=1e-7)
    np.testing.assert_allclose(found["gradient"], found["derivative"], rtol=1e-9)
    np.testing.assert_allclose(found["first"], found["layer"], rtol=1e-12)
    np.testing.assert_allclose(found["smoothness"], 1, rtol=1e-6)
    np.testing.assert_allclose(found["again"], found["value"])
    solution = ss.prox_gd(problem, step_size=1.0, num_iters=300, momentum=True, certify=True)
    assert jnp.all(solution.certificate < 1e-6)


def test_maps_without_a_scale():
    """Zero is normalised to itself; a norm that overflows does not pass for zero."""
    x = jnp.ones((1, 4), jnp.float32)
    zero = ss.LayerProblem(ss.Dense(jnp.zeros((4, 3), jnp.float32)), x, bias=jnp.ones(3))
    solution = ss.prox_gd(zero.normalized(), step_size=1.0, num_iters=1)
    assert jnp.all(solution.value == 1)
    huge = ss.LayerProblem(ss.Dense(jnp.full((4, 3), 1e30, jnp.float32)), x)
    assert not ss.prox_gd(huge.normalized(), step_size=1.0, num_iters=2).finite.any()


# layers


@pytest.mark.optimized
@pytest.mark.parametrize("name", catalogue.PRIORS)
def test_one_iteration_is_the_trained_layer_to_the_last_bit(name):
    prior = catalogue.PRIORS[name]
    linear = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    linear.kernel[...] *= 7.3
    linear.bias[...] = catalogue.normal(21, 3)
    layer, kind, inputs = linear, ss.nnx.SolverLinear, catalogue.VECTORS
    if name in catalogue.SHAPES or name == "NonNegative":  # on matrices
        layer = nnx.Conv(2, 3, (3, 3), rngs=nnx.Rngs(1))
        kind, inputs = ss.nnx.SolverConv, catalogue.IMAGES

    @jax.jit
    def run(x):
        def twin(solver, **options):
            twin = kind.from_layer(layer, solver=solver, prior=prior, normalize=True, **options)
            return twin(x)

        momentum = ss.ProxGD(1, 1.0, momentum=True)
        solved = twin(ss.ProxGD(1), ridge=0.3), twin(momentum)
        return solved, prior.prox(layer(x), 1.0), twin(momentum, output="pre_activation"), layer(x)

    solved, activated, before, plain = run(inputs)
    for output in solved:
        np.testing.assert_array_equal(output, activated)
    np.testing.assert_array_equal(before, plain)


@each_solver
def test_layers_solve_the_normalised_problem(solver):
    """With every solver and step rule, and with what they keep, as the functions do."""
    linear = nnx.Linear(4, 3, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    x = catalogue.VECTORS.astype(jnp.float64)
    options = {"solver": solver, "prior": ss.prox.LogBarrier(0.3), "ridge": 0.1}
    layer = ss.nnx.SolverLinear.from_layer(linear, normalize=True, **options)
    problem = layer.problem(x)
    key = jax.random.key(7)
    expected = solver.solve(key, problem)
    np.testing.assert_allclose(layer(x, rngs=key), expected.value, rtol=1e-9)
    kernel = np.asarray(linear.kernel[...])
    L = np.linalg.norm(kernel, 2) ** 2 + 0.1
    np.testing.assert_allclose(problem.linear_map.kernel, kernel / np.sqrt(L), rtol=1e-6)
    np.testing.assert_allclose(problem.ridge, 0.1 / L, rtol=1e-6)
    layer.kernel[...] *= 10  # the kept constant is of another kernel now
    moved = layer.problem(x)
    expected = 10 * kernel / np.sqrt(100 * L - 9.9)
    np.testing.assert_allclose(moved.linear_map.kernel, expected, rtol=1e-6)
    np.testing.assert_allclose(
        layer(x, rngs=key), solver.solve(key, moved).value, rtol=1e-6, atol=1e-9
    )
    module = ss.linen.SolverDense(3, normalize=True, param_dtype=jnp.float64, **options)
    variables = {"params": {"kernel": linear.kernel[...], "bias": linear.bias[...]}}
    run = module.apply(variables, x, rngs={"dropout": key}, deterministic=True)
    np.testing.assert_allclose(run, layer(x, deterministic=True), rtol=1e-6, atol=1e-9)


@each_solver
@pytest.mark.parametrize("prior", [ss.prox.L1(0.2), ss.prox.LogBarrier(0.3)], ids=["L1", "barrier"])
def test_pre_activations(solver, prior, rng):
    """prox_g(w_K) = z_K, the solution as without it, and derivatives by differences."""
    A, x, b, direction = (rng.normal(size=shape) for shape in ((4, 3), (2, 4), (3,), (3,)))

    def solve(b, **options):
        problem = ss.LayerProblem(ss.Dense(A), x, bias=b, prior=prior, ridge=0.1)
        return solver.solve(KEY, problem, **options)

    @jax.jit
    def run(b):
        """The solution, its derivative, z_K alone and prox_g(w_K)."""
        before = functools.partial(solve, pre_activation=True)
        if isinstance(solver.derivative, ss.Truncated):
            solution, tangent = before(b), None
        else:
            solution, tangent = jax.jvp(before, (b,), (direction,))
        return solution, tangent, solve(b).value, prior.prox(solution.pre_activation, 1.0)

    solution, tangent, again, value = run(b)
    np.testing.assert_allclose(solution.value, again, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(value, solution.value, rtol=1e-9, atol=1e-12)
    if tangent is not None:
        ahead, behind = (
            np.asarray(run(b + s * direction)[0].pre_activation) for s in (1e-6, -1e-6)
        )
        slope = (ahead - behind) / 2e-6
        np.testing.assert_allclose(tangent.pre_activation, slope, rtol=1e-4, atol=1e-6)


def test_pre_activations_of_implicit_derivatives(rng):
    """Both outputs are those of one step more, and the derivative is that of the fixed point."""
    A, x, b = ss.Dense(normal(rng, 4, 3)), normal(rng, 2, 4), normal(rng, 3)
    prior, tight = ss.prox.LogBarrier(0.3), ss.ProxGD(3000)
    for solver in (ss.ProxGD(400, derivative="implicit"), ss.ProxGD(3000, tol=1e-9)):

        def before(b, solver):
            problem = ss.LayerProblem(A, x, bias=b, prior=prior, ridge=0.5)
            return solver.solve(None, problem, pre_activation=True)

        solution = before(b, solver)
        np.testing.assert_allclose(
            prior.prox(solution.pre_activation, 1.0), solution.value, rtol=1e-12
        )
        gradients = [
            jax.grad(lambda b, s=s: jnp.sum(before(b, s).pre_activation ** 2))(b)
            for s in (solver, tight)
        ]
        np.testing.assert_allclose(*gradients, rtol=1e-4)


def test_a_solver_without_a_point_has_no_pre_activation():
    @ss.value_object
    class Plain(ss.Solver):
        num_iters: int = ss.static_field(default=2)

        def step(self, run, k, z, memory):
            return ss.Step(run.prox(z - run.step_size(k) * run.gradient(z), k))

    with pytest.raises(
        ValueError, match=r"point of the solver's Step.*expected an array, got None"
    ):
        Plain().solve(None, catalogue.PROBLEM, pre_activation=True)


def test_options_are_checked():
    rngs = nnx.Rngs(0)
    for make in (
        lambda **o: ss.nnx.SolverLinear(4, 3, solver=ss.ProxGD(1), rngs=rngs, **o),
        lambda **o: ss.linen.SolverDense(3, solver=ss.ProxGD(1), **o),
    ):
        with pytest.raises(ValueError, match=r"output of Solver.*'activation', 'pre_activation'"):
            make(output="logits")
        with pytest.raises(ValueError, match=r"normalize of Solver.*expected True or False, got 1"):
            make(normalize=1)


@pytest.mark.parametrize("output", ["activation", "pre_activation"])
@pytest.mark.parametrize("normalize", [False, True])
def test_reported_bounds_hold(normalize, output, rng):
    """No two inputs are brought further apart, and a bound of one unit step is ||A||."""
    layer = ss.nnx.SolverLinear.from_layer(
        nnx.Linear(4, 3, rngs=nnx.Rngs(0)),
        solver=ss.ProxGD(4), prior=ss.prox.LogBarrier(0.2), ridge=0.1,
        normalize=normalize, output=output,
    )  # fmt: skip
    bound = ss.lipschitz_report(layer, (1, 4)).bound
    x, y = normal(rng, 2, 500, 4, dtype=jnp.float32)
    y = x + 1e-2 * y
    ratio = jnp.linalg.norm(layer(x) - layer(y), axis=-1) / jnp.linalg.norm(x - y, axis=-1)
    assert 0.1 * bound < ratio.max() <= bound * (1 + 1e-3)
    report = str(ss.certify(layer, x[:3]))
    assert "1" in report


def test_a_normalised_problem_follows_its_plain_one(rng):
    """No factor of it can be replaced alone; the default step is one, to the last bit."""
    A, x = ss.Dense(normal(rng, 4, 3)), normal(rng, 2, 4)
    problem = ss.LayerProblem(A, x, ridge=0.3, prior=ss.prox.Tanh()).normalized()
    with pytest.raises(ValueError, match="inputs"):
        dataclasses.replace(problem, inputs=2 * problem.inputs)
    plain = dataclasses.replace(problem.plain, inputs=2 * x)
    doubled = dataclasses.replace(problem, plain=plain)
    np.testing.assert_array_equal(doubled.inputs, plain.normalized().inputs)
    first = jax.jit(lambda p: ss.prox_gd(p, num_iters=1).value)(doubled)
    np.testing.assert_array_equal(first, jax.jit(lambda x: jnp.tanh(A(x)))(2 * x))


def test_pre_activations_keep_their_digits_at_small_steps():
    v, step = jnp.linspace(-0.05, 0.05, 41, dtype=jnp.float32), 1e-4
    for prior in (
        ss.prox.L1(0.3), ss.prox.ElasticNet(0.3, 0.5), ss.prox.NonNegativeL1(0.3),
        2.0 * ss.prox.Tanh(), ss.prox.Tanh(),
    ):  # fmt: skip
        u = prior.prox(v, step)
        again = prior.prox(prior.pre_activation(v, step), 1.0)
        np.testing.assert_allclose(again, u, atol=3e-7)
    assert jnp.isnan(ss.prox.Simplex().prox(jnp.array([1.0, jnp.nan]), 0.5)).all()
    with pytest.raises(TypeError):
        ss.losses.Squares() * "2"
