"""Derivatives of solutions of z = h(z): implicit, truncated and unrolled, against differences."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixed_points import Shallow, deep, matrix, shallow
from jax.sharding import PartitionSpec
from test_meshes import KINDS, on_mesh
from test_shards import MESH

import stochsolvers as ss
from stochsolvers.solvers import Implicit, Truncated, _linear
from stochsolvers.solvers.sequential_averaging import SequentialAveraging

EXACT = Implicit(tol=1e-12)
PROBLEMS = {
    "symmetric": lambda rng: shallow(rng, 6, 0.9, smooth=True),
    "not symmetric": lambda rng: deep(rng),
}
every_problem = pytest.mark.parametrize("make", PROBLEMS.values(), ids=PROBLEMS.keys())


def solution(problem, derivative, num_iters=600, **options):
    solver = ss.FixedPoint(num_iters, derivative=derivative, **options)
    return solver.solve(None, problem).value


def loss(problem, derivative, **options):
    return jnp.sum(jnp.sin(solution(problem, derivative, **options)))


def gradient(problem, derivative, **options):
    return jax.jit(jax.grad(functools.partial(loss, derivative=derivative, **options)))(problem)


def close(got, want, **options):
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, **options), got, want)


@every_problem
def test_implicit_is_differences_and_unrolled_in_both_modes_to_second_order(make, rng):
    problem = make(rng)
    way = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), problem)

    @jax.jit
    def differences(problem):
        def at(step):
            return loss(jax.tree.map(lambda p, d: p + step * d, problem, way), "unrolled")

        return (at(1e-5) - at(-1e-5)) / 2e-5

    def first_and_second(derivative):
        def slopes(problem):
            return jax.grad(lambda p: loss(p, derivative))(problem)

        forward = jax.jvp(lambda p: loss(p, derivative), (problem,), (way,))[1]
        return forward, *jax.jvp(slopes, (problem,), (way,))

    got, want = (jax.jit(first_and_second, static_argnums=0)(d) for d in (EXACT, "unrolled"))
    np.testing.assert_allclose(got[0], differences(problem), rtol=1e-6)
    close(got, want, rtol=1e-6, atol=1e-8)


@every_problem
def test_solvers_and_stopping_do_not_change_the_derivative(make, rng):
    problem = make(rng)
    want = gradient(problem, EXACT)
    options = {"tol": 1e-11, "derivative": EXACT}
    for solver in (ss.Anderson(400, **options), ss.ProxGD(900, momentum=True, **options)):
        if isinstance(solver, ss.ProxGD) and not problem.symmetric:
            continue

        def stopped(problem, solver=solver):
            return jnp.sum(jnp.sin(solver.solve(None, problem).value))

        close(jax.jit(jax.grad(stopped))(problem), want, rtol=1e-6, atol=1e-8)


@every_problem
def test_what_is_not_solved_is_nan(make, rng):
    problem = make(rng)

    @functools.partial(jax.jit, static_argnames=("max_iters", "unsolved"))
    def slope(problem, tol, scale=1.0, **options):
        return jax.grad(lambda p: scale * loss(p, Implicit(tol, **options)))(problem)

    want = slope(problem, 1e-12)
    short = slope(problem, 1e-12, max_iters=2)
    for leaf in jax.tree.leaves(short):
        assert np.all(np.isnan(leaf))
    kept = slope(problem, 1e-12, max_iters=2, unsolved="keep")
    for leaf, exact in zip(jax.tree.leaves(kept), jax.tree.leaves(want), strict=True):
        assert np.all(np.isfinite(leaf))
        assert not np.allclose(leaf, exact)
    # round-off is no failure, and no tolerance is too small
    close(slope(problem, 1e-30), want, rtol=1e-8, atol=1e-10)
    narrow = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), problem)
    close(slope(narrow, 1e-30), want, rtol=1e-3, atol=1e-4)
    # nor is a small cotangent, whose square is zero
    tiny = slope(narrow, 1e-5, 1e-30)
    close(jax.tree.map(lambda leaf: 1e30 * np.asarray(leaf), tiny), want, rtol=1e-3, atol=1e-4)


def test_a_failure_is_that_of_one_example():
    """Of z = relu(z + c) with c < 0 and z₀ = 1 the solution is not unique at z = 0, but locally."""
    drive = jnp.array([[-1.0], [0.5]])
    problem = Shallow(jnp.eye(1), drive)  # the second has no equilibrium, and J = 1

    @functools.partial(jax.jit, static_argnames="unsolved")
    @jax.grad
    def slope(drive, unsolved):
        moved = dataclasses.replace(problem, drive=drive)
        derivative = Implicit(unsolved=unsolved)
        return jnp.sum(solution(moved, derivative, num_iters=5))

    got = slope(drive, unsolved=None)
    np.testing.assert_array_equal(got[0], 0.0)
    assert np.isnan(got[1, 0])
    assert np.all(np.isfinite(slope(drive, unsolved="keep")))


def test_unsolved_systems_of_layers_are_kept_unless_asked_otherwise(rng):
    kernel, x = jnp.asarray(rng.normal(size=(9, 5))), jnp.asarray(rng.normal(size=(4, 9)))

    @functools.partial(jax.jit, static_argnames=("max_iters", "unsolved"))
    def slope(tol, **options):
        def value(kernel):
            problem = ss.LayerProblem(ss.Dense(kernel), x, ridge=0.1)
            derivative = Implicit(tol, **options)
            return jnp.sum(ss.prox_gd(problem, num_iters=500, derivative=derivative).value)

        return jax.grad(value)(kernel)

    assert np.all(np.isfinite(slope(1e-12, max_iters=1)))
    assert np.all(np.isnan(slope(1e-12, max_iters=1, unsolved="nan")))
    for tol in (1e-12, 1e-30):
        close(slope(tol, unsolved="nan"), slope(1e-12), rtol=1e-9)


@every_problem
def test_a_warm_start_is_the_gradient_of_what_is_added_to_the_layer(make, rng):
    problem = make(rng)

    @ss.value_object
    class Shifted(type(problem)):
        shift: jax.Array = dataclasses.field(kw_only=True)

        def layer(self, z):
            return type(problem).layer(self, z) + self.shift

    fields = {f.name: getattr(problem, f.name) for f in dataclasses.fields(problem)}
    shifted = Shifted(**fields, shift=jnp.zeros(problem.shape))
    exact = gradient(shifted, EXACT)
    warm = gradient(problem, Implicit(1e-10, max_iters=1, guess=exact.shift))
    close(warm.drive, exact.drive, rtol=1e-8, atol=1e-10)
    with pytest.raises(ValueError, match="guess of Implicit: expected the solution's shape"):
        gradient(problem, Implicit(guess=exact.shift[:1]))


@every_problem
def test_phantom_gradients_are_those_of_a_few_more_steps(make, rng):
    problem = make(rng)

    def by_hand(problem):
        z = jax.lax.stop_gradient(solution(problem, None, tol=1e-11))
        for _ in range(3):
            z = problem.layer(z)
        return jnp.sum(jnp.sin(z))

    want = gradient(problem, EXACT)
    got = gradient(problem, Truncated(3), tol=1e-11)
    close(got, jax.jit(jax.grad(by_hand))(problem), rtol=1e-9, atol=1e-11)
    assert not np.allclose(got.drive, want.drive, rtol=1e-3)
    long = gradient(problem, Truncated(400), tol=1e-11)
    close(long, want, rtol=1e-6, atol=1e-8)
    solver = ss.Anderson(300, tol=1e-8, derivative=Truncated(2))
    stopped = solver.solve(None, problem, certify=problem.symmetric)
    if problem.symmetric:
        np.testing.assert_allclose(stopped.certificate, problem.certificate(stopped.value))
    plain = ss.Anderson(300, tol=1e-8).solve(None, problem)
    two = problem.layer(problem.layer(plain.value))
    np.testing.assert_allclose(stopped.value, two, rtol=1e-12, atol=1e-14)
    np.testing.assert_array_equal(stopped.iterations, plain.iterations)


def test_phantom_gradients_of_a_layer(rng):
    kernel, x = jnp.asarray(rng.normal(size=(9, 5))), jnp.asarray(rng.normal(size=(4, 9)))

    def slope(derivative):
        def value(kernel):
            prior = ss.prox.SymmetricLogBarrier(0.5)
            problem = ss.LayerProblem(ss.Dense(kernel), x, prior=prior, ridge=0.1)
            solver = ss.ProxGD(2000, tol=1e-11, derivative=derivative)
            solution = solver.solve(None, problem, pre_activation=True)
            return jnp.sum(jnp.sin(solution.value) + jnp.cos(solution.pre_activation))

        return jax.jit(jax.grad(value))(kernel)

    np.testing.assert_allclose(slope(Truncated(2000)), slope(Implicit(1e-12)), rtol=1e-6, atol=1e-8)


def test_examples_side_by_side_alone_and_under_vmap(rng):
    problem = deep(rng)

    def slope(drive):
        return jax.grad(
            lambda d: loss(dataclasses.replace(problem, drive=d), Implicit(1e-9), tol=1e-10)
        )(drive)

    together, mapped = jax.jit(slope)(problem.drive), jax.jit(jax.vmap(slope))(problem.drive)
    np.testing.assert_allclose(together, mapped, rtol=1e-12)
    bad = jax.jit(slope)(problem.drive.at[0].set(jnp.nan))
    np.testing.assert_allclose(bad[1:], together[1:], rtol=1e-12)
    assert np.all(np.isnan(bad[0]))


def test_averaged_fixed_points(rng):
    """∂/∂a of the solution nearest to a, selected among (a, b, 0) with a, b ≥ 0."""
    problem = Shallow(jnp.diag(jnp.array([1.0, 1.0, 0.5])), jnp.zeros((1, 3)))
    weights = jnp.array([[1.0, 2.0, 3.0]])

    def value(nearest, derivative, **options):
        pull = jax.tree_util.Partial(lambda a, z: z - a, nearest)
        solver = SequentialAveraging(
            pull, 0.7, 0.3, num_iters=3000, derivative=derivative, **options
        )
        return jnp.sum(weights * solver.solve(None, problem).value)

    for derivative, options in (("unrolled", {}), (Implicit(max_iters=400), {"tol": 1e-2})):
        slope = jax.jit(jax.grad(functools.partial(value, derivative=derivative, **options)))
        got = slope(jnp.array([[2.0, -3.0, 1.0]]))
        np.testing.assert_allclose(got, [[1.0, 0.0, 0.0]], atol=0.03)


@pytest.mark.optimized
@pytest.mark.parametrize(("symmetric", "solver"), [(True, ss.FixedPoint), (False, ss.Anderson)])
def test_memory_of_the_reverse_pass_does_not_grow_with_the_iterations(symmetric, solver):
    n, batch = 64, 32
    square = jax.ShapeDtypeStruct((n, n), jnp.float32)

    @ss.value_object
    class Problem(Shallow):
        pass

    Problem.symmetric = symmetric

    def bytes_of(num_iters, derivative, **options):
        def value(weights, drive):
            one = solver(num_iters, derivative=derivative, **options)
            return jnp.sum(one.solve(None, Problem(weights, drive)).value ** 2)

        shapes = square, jax.ShapeDtypeStruct((batch, n), jnp.float32)
        compiled = jax.jit(jax.grad(value, argnums=(0, 1))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = (bytes_of(count, "implicit", tol=1e-5) for count in (10, 1000))
    assert long == short
    fixed = [bytes_of(count, "implicit") for count in (10, 1000)]
    assert fixed[1] - fixed[0] <= 8 * 1000  # the counter of the iterations
    if solver is ss.FixedPoint:
        assert bytes_of(1000, "unrolled") >= short + 900 * 4 * batch * n


@pytest.mark.parametrize("symmetric", [True, False])
def test_linear_systems_against_numpy(symmetric, rng):
    J = np.stack([matrix(rng, 12, 0.97) for _ in range(5)])
    J = J @ J.transpose(0, 2, 1) if symmetric else J
    v = rng.normal(size=(5, 12)) * 10.0 ** np.arange(-10, 40, 10)[:, None]
    want = np.linalg.solve(np.eye(12) - J, v[..., None])[..., 0]

    @jax.jit
    def run(start):
        def operator(u):
            return u - jnp.einsum("bij,bj->bi", J, u)

        options = {"symmetric": symmetric, "mark": True}
        return _linear.solve(operator, jnp.asarray(v), start, 1e-11, 400, 1, **options)

    for start in (jnp.zeros_like(v), jnp.asarray(want * 1.1)):
        np.testing.assert_allclose(run(start) / want, 1.0, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_implicit_on_a_mesh(kind, rng):
    weights = [jnp.asarray(matrix(rng, 5, 0.9)) for _ in range(2)]

    def slopes(drive):
        problem = Shallow(weights[0], drive, True)
        return jax.grad(lambda p: loss(p, Implicit(1e-6), tol=1e-6))(problem)

    on_mesh(kind, jax.jit(slopes), rng.normal(size=(2, 5)))


@every_problem
def test_within_shard_map(make, rng):
    problem = make(rng)
    whole, data = PartitionSpec(), PartitionSpec("data")

    def slopes(problem):
        solver = ss.Anderson(60, tol=1e-8) if problem.symmetric else ss.FixedPoint(60, tol=1e-8)
        return jax.grad(lambda p: jnp.sum(solver.solve(None, p).value ** 2))(problem)

    specs = jax.tree.map(lambda leaf: whole, problem)
    specs = dataclasses.replace(specs, drive=data)
    mapped = jax.shard_map(slopes, mesh=MESH, in_specs=(specs,), out_specs=specs)
    close(jax.jit(mapped)(problem), jax.jit(slopes)(problem), rtol=1e-8, atol=1e-10)


def test_what_is_refused():
    with pytest.raises(ValueError, match="unsolved of Implicit: expected one of 'nan', 'keep'"):
        Implicit(unsolved="raise")
    with pytest.raises(ValueError, match=r"expected 'implicit', Implicit\(...\) or Truncated"):
        ss.FixedPoint(3, tol=1e-3, derivative="unrolled")
