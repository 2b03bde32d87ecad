"""Derivatives through a solver: implicit against formulas, and the four ways against each other."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import each_prior

import stochsolvers as ss
from stochsolvers.solvers import Implicit, Truncated

KEY = jax.random.key(5)
EXACT = Implicit(tol=1e-13)


def build(kernel, x, bias, *, prior=None, ridge=0.0):
    prior = ss.prox.NonNegative() if prior is None else prior
    return ss.LayerProblem(ss.Dense(kernel), x, bias=bias, prior=prior, ridge=ridge)


def arrays_of(rng, n1=9, n2=5, batch=4):
    return tuple(jnp.asarray(rng.normal(size=shape)) for shape in ((n1, n2), (batch, n1), (n2,)))


def gradients(loss, *arguments):
    return jax.jit(jax.grad(loss, argnums=tuple(range(len(arguments)))))(*arguments)


def step_for(kernel, ridge=0.0, scale=1.0):
    return scale / (np.linalg.norm(kernel, 2) ** 2 + ridge)


def nnls_gradients(kernel, x, bias, weight):
    """d<w, z>/d(kernel, x, bias) for z = H⁻¹c on its active set, H = KᵀK, c = Kᵀx + b, in numpy."""
    from oracles import nnls_layer

    totals = [np.zeros_like(kernel), np.zeros_like(x), np.zeros_like(bias)]
    for i, row in enumerate(x):
        z = nnls_layer(kernel, row, bias, 0.0)
        on = z > 1e-12
        K = kernel[:, on]
        u = np.linalg.solve(K.T @ K, weight[i][on])
        totals[0][:, on] += np.outer(row - K @ z[on], u) - np.outer(K @ u, z[on])
        totals[1][i] = K @ u
        totals[2][on] += u
    return totals


@pytest.mark.parametrize("step_scale", [1.0, 1.9])  # up to 2/L prox-GD converges
def test_implicit_is_the_formula_on_the_active_set(rng, step_scale):
    kernel, x, bias = arrays_of(rng)
    weight = rng.normal(size=(4, 5))
    step = step_for(kernel, scale=step_scale)

    def loss(kernel, x, bias):
        problem = build(kernel, x, bias)
        z = ss.prox_gd(problem, step_size=step, num_iters=600, derivative=EXACT).value
        return jnp.sum(weight * z)

    got = gradients(loss, kernel, x, bias)
    want = nnls_gradients(*(np.asarray(a) for a in (kernel, x, bias)), weight)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-8)


@pytest.mark.parametrize("prior", [ss.prox.NonNegative(), ss.prox.SymmetricLogBarrier(0.5)])
def test_a_warm_start_is_the_gradient_of_the_bias_of_each_example(rng, prior):
    kernel, x, bias = arrays_of(rng, n1=30, n2=20)
    biases = jnp.broadcast_to(bias, (len(x), 20))
    step, weight = step_for(kernel), rng.normal(size=biases.shape)

    def gradient(**options):
        def loss(kernel, biases):
            problem = build(kernel, x, biases, prior=prior)
            derivative = Implicit(1e-13, **options)
            z = ss.prox_gd(problem, step_size=step, num_iters=900, derivative=derivative).value
            return jnp.sum(weight * z)

        return gradients(loss, kernel, biases)

    def error(found):
        return max(float(jnp.max(jnp.abs(a - b))) for a, b in zip(found, exact, strict=True))

    exact = gradient()
    nearby = 1.001 * exact[1]
    assert error(gradient(guess=exact[1], max_iters=1)) < 1e-9
    assert error(gradient(guess=nearby, max_iters=3)) < 0.02 * error(gradient(max_iters=3))
    assert error(gradient(guess=jnp.asarray(rng.normal(size=biases.shape)))) < 1e-9
    with pytest.raises(ValueError, match="guess of Implicit: expected the solution's shape"):
        gradient(guess=exact[1][:2])


@each_prior
def test_implicit_is_unrolled_at_convergence_to_second_order(rng, prior):
    kernel = jnp.asarray(rng.normal(size=(4, 3)))
    x, bias = 2.0 * jnp.asarray(rng.normal(size=(2, 1, 3, 4))), jnp.asarray(rng.normal(size=3))
    step = step_for(kernel, 0.5)

    def loss(derivative, kernel, x, bias, ridge, prior):
        A = ss.Conv(kernel[None, None], (1, 3))  # outputs are matrices, as some priors want
        problem = ss.LayerProblem(A, x, bias=bias, ridge=ridge, prior=prior)
        options = {"form": "literal", "derivative": derivative}
        return jnp.sum(jnp.sin(ss.prox_gd(problem, step_size=step, num_iters=400, **options).value))

    def gradient_and_product(derivative):
        def gradient(kernel):
            arguments = kernel, x, bias, 0.5, prior
            return jax.grad(functools.partial(loss, derivative), (0, 1, 2, 3, 4))(*arguments)

        return jax.jit(lambda: jax.jvp(gradient, (kernel,), (jnp.cos(kernel),)))()

    want, got = gradient_and_product("unrolled"), gradient_and_product(EXACT)
    jax.tree.map(lambda w, g: np.testing.assert_allclose(g, w, atol=1e-6), want, got)


def test_implicit_of_a_convolution_in_forward_and_reverse_mode(rng):
    kernel = jnp.asarray(rng.normal(size=(3, 3, 3, 2)))
    x, tangent = (jnp.asarray(rng.normal(size=(2, 4, 4, 3))) for _ in range(2))
    weight = rng.normal(size=(2, 4, 4, 2))

    def value(x, num_iters, derivative):
        problem = ss.LayerProblem(ss.Conv(kernel, (4, 4)), x, ridge=2.0)
        options = {"form": "literal", "derivative": derivative}
        return ss.prox_gd(problem, step_size=0.02, num_iters=num_iters, **options).value

    def both(x, derivative):
        _, forward = jax.jvp(lambda x: value(x, 800, derivative), (x,), (tangent,))
        (reverse,) = jax.vjp(lambda x: value(x, 800, derivative), x)[1](weight)
        return jnp.sum(weight * forward), jnp.sum(tangent * reverse), reverse

    run = jax.jit(both, static_argnums=1)
    forward, product, reverse = run(x, EXACT)
    np.testing.assert_allclose(forward, product, rtol=1e-9)
    np.testing.assert_allclose(reverse, run(x, "unrolled")[2], atol=1e-6)


def test_implicit_where_the_solution_is_not_unique(rng):
    """Two equal columns: z is not unique, A* z is, and a loss of it has a derivative."""
    kernel, x, _ = (np.asarray(a) for a in arrays_of(rng, n1=6, n2=4, batch=2))
    twin = np.concatenate([kernel, kernel[:, :2]], axis=1)
    weight = rng.normal(size=(2, 6))
    step = step_for(twin)

    def loss(x, kernel):
        z = ss.prox_gd(
            build(kernel, x, None), step_size=step, num_iters=900, derivative=Implicit(tol=1e-8)
        ).value
        return jnp.sum(weight * (z @ kernel.T))

    got = jax.jit(jax.grad(loss))(jnp.asarray(x), jnp.asarray(twin))
    want = jax.jit(jax.grad(loss))(jnp.asarray(x), jnp.asarray(kernel * 2**0.5))
    assert np.all(np.isfinite(got))
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_implicit_solves_examples_side_by_side_and_under_vmap(rng):
    kernel, x, bias = arrays_of(rng)
    step = step_for(kernel)

    def loss(x):
        options = {"step_size": step, "num_iters": 300, "derivative": EXACT}
        return jnp.sum(jnp.sin(ss.prox_gd(build(kernel, x, bias), **options).value))

    batched, mapped, alone = (
        jax.jit(jax.grad(loss))(x),
        jax.jit(jax.vmap(jax.grad(loss)))(x),
        jax.jit(jax.grad(loss))(x[2:3]),
    )
    np.testing.assert_allclose(batched, mapped, atol=1e-9)
    np.testing.assert_allclose(batched[2:3], alone, atol=1e-9)
    dead = jax.jit(jax.grad(loss))(x.at[1].set(jnp.nan))
    np.testing.assert_allclose(dead[2:3], alone, atol=1e-9)


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("linear_map", "kernel", "inputs"),
    [
        (ss.Dense, (64, 64), (32, 64)),
        (lambda kernel: ss.Conv(kernel, (8, 8)), (3, 3, 8, 8), (4, 8, 8, 8)),
    ],
    ids=["dense", "convolution"],
)
def test_memory_of_the_reverse_pass(linear_map, kernel, inputs):
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (kernel, inputs)]

    def bytes_of(derivative, num_iters):
        def loss(kernel, x):
            problem = ss.LayerProblem(linear_map(kernel), x)
            options = {"step_size": 0.01, "num_iters": num_iters, "derivative": derivative}
            return jnp.sum(ss.prox_gd(problem, **options).value ** 2)

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    iterate = 4 * math.prod(inputs)
    implicit = [bytes_of("implicit", k) for k in (50, 800)]
    assert implicit[1] - implicit[0] <= 2 * iterate
    unrolled = [bytes_of("unrolled", k) for k in (50, 800)]
    assert unrolled[1] - unrolled[0] >= 700 * iterate
    assert bytes_of("remat", 800) < unrolled[1] / 8
    assert bytes_of(Truncated(5), 800) < unrolled[0]


SOLVERS = {
    "prox_gd": lambda p, **kw: ss.prox_gd(p, step_size=0.05, num_iters=7, **kw),
    "fista": lambda p, **kw: ss.prox_gd(p, step_size=0.05, num_iters=7, momentum=True, **kw),
    "prox_sg": lambda p, **kw: ss.prox_sg(KEY, p, tau=3, step_size=0.05, num_iters=7, **kw),
    "ms2gd": lambda p, **kw: ss.ms2gd(
        KEY, p, tau=3, step_size=0.05, num_outer=5, num_inner=2, **kw
    ),
    "nsync": lambda p, **kw: ss.nsync(KEY, p, tau=2, step_size=0.05, num_iters=7, **kw),
}


@pytest.mark.parametrize("solve", SOLVERS.values(), ids=SOLVERS.keys())
def test_remat_and_a_long_truncation_are_unrolled(rng, solve):
    def loss(kernel, x, bias, derivative):
        return jnp.sum(jnp.sin(solve(build(kernel, x, bias), derivative=derivative).value))

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)), static_argnums=3)
    arrays = arrays_of(rng)
    want, remat, long, short = (
        jax.tree.leaves(run(*arrays, derivative))
        for derivative in ("unrolled", "remat", Truncated(20), Truncated(2))
    )
    for w, r, t, s in zip(want, remat, long, short, strict=True):
        np.testing.assert_allclose(r, w, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(t, w, rtol=1e-10, atol=1e-12)
        assert s.shape == w.shape
    np.testing.assert_allclose(short[0], want[0], rtol=1e-12)  # the value is the same
    assert not np.allclose(short[1], want[1])


def test_truncated_is_a_restart_from_a_constant(rng):
    kernel, x, bias = arrays_of(rng)

    def truncated(kernel):
        options = {"step_size": 0.05, "num_iters": 7, "derivative": Truncated(3)}
        return jnp.sum(jnp.sin(ss.prox_gd(build(kernel, x, bias), **options).value))

    def by_hand(kernel):
        problem = build(kernel, x, bias)
        start = ss.prox_gd(problem, step_size=0.05, num_iters=4).value
        start = jax.lax.stop_gradient(start)
        last = ss.prox_gd(problem, step_size=0.05, num_iters=3, init=start)
        return jnp.sum(jnp.sin(last.value))

    got, want = (jax.jit(jax.grad(f))(kernel) for f in (truncated, by_hand))
    np.testing.assert_allclose(got, want, rtol=1e-9)


def test_one_trace_for_tolerances_of_the_linear_system(rng):
    traces = 0
    kernel, x, bias = arrays_of(rng)

    @jax.jit
    def run(tol, step):
        nonlocal traces
        traces += 1
        options = {"num_iters": 5, "derivative": Implicit(tol=tol)}
        return ss.prox_gd(build(kernel, x, bias), step_size=step, **options).value

    for tol in (1e-3, 1e-6):
        run(tol, 0.01 + tol)
    assert traces == 1


def test_what_has_no_such_derivative_is_refused(rng):
    problem = build(*arrays_of(rng))
    stochastic = {"tau": 2, "step_size": 0.1, "derivative": "implicit"}
    calls = [
        (lambda: ss.prox_sg(KEY, problem, num_iters=2, **stochastic), "derivative of ProxSG"),
        (lambda: ss.nsync(KEY, problem, num_iters=2, **stochastic), "derivative of NSync"),
        (lambda: ss.ms2gd(KEY, problem, num_outer=1, num_inner=1, **stochastic), "of MS2GD"),
        (lambda: ss.prox_gd(problem, num_iters=2, derivative="exact"), "derivative: expected one"),
        (lambda: ss.ProxGD(2, derivative="exact"), "derivative: expected one of 'unrolled'"),
        (lambda: ss.ProxSG(0.5, 2, derivative="implicit"), "derivative of ProxSG"),
        (
            lambda: ss.ProxGD(2, tol=1e-3, derivative="remat"),
            "derivative where a tolerance is given",
        ),
        (lambda: Truncated(0), "num_iters of Truncated: expected an integer >= 1"),
        (lambda: Implicit(tol=0.0), "tol of Implicit: expected a number > 0"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()
