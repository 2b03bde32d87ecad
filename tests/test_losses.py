"""Losses against numpy, and every solver, estimator, derivative and certificate with each of them."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy import optimize

import stochsolvers as ss

KEY = jax.random.key(5)
LOSSES = {
    "squares": ss.losses.Squares(),
    "huber": ss.losses.Huber(0.4),
    "logistic": ss.losses.Logistic(),
    "cross-entropy": ss.losses.CrossEntropy(),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def numpy_loss(name, u, x):
    """ℓ(u, x) summed over everything, in numpy."""
    if name == "squares":
        return 0.5 * np.sum((u - x) ** 2)
    if name == "huber":
        t = np.abs(u - x)
        return np.sum(np.where(t <= 0.4, 0.5 * t**2, 0.4 * t - 0.08))
    if name == "logistic":
        return np.sum(np.log1p(np.exp(-x * u)))
    top = u.max(axis=-2, keepdims=True)
    logs = np.log(np.sum(np.exp(u - top), axis=-2, keepdims=True)) + top
    return np.sum(logs) - np.sum(x * u)


def targets(name, rng, shape):
    """x: numbers, signs, or one-hot columns."""
    if name == "logistic":
        return rng.choice([-1.0, 1.0], shape)
    if name == "cross-entropy":
        classes = rng.integers(shape[-2], size=(*shape[:-2], shape[-1]))
        return np.moveaxis(np.eye(shape[-2])[classes], -1, -2)
    return rng.normal(size=shape)


@ss.value_object
class Columns(ss.LinearMap):
    """The same dense map for each of the classes: (classes, n1) to (classes, n2)."""

    kernel: jax.Array
    classes: int = ss.static_field(default=3)

    @property
    def in_shape(self):
        return (self.classes, self.kernel.shape[0])

    @property
    def out_shape(self):
        return (self.classes, self.kernel.shape[1])

    def __call__(self, x):
        return x @ self.kernel


def problem_of(name, rng, *, batch=(2,), n1=5, n2=3, prior=None, ridge=0.0, bias=True, scale=1.0):
    kernel = scale * rng.normal(size=(n1, n2))
    linear_map = Columns(kernel) if name == "cross-entropy" else ss.Dense(kernel)
    x = targets(name, rng, (*batch, *linear_map.in_shape))
    return ss.LayerProblem(
        linear_map,
        x,
        loss=LOSSES[name],
        bias=0.1 * rng.normal(size=n2) if bias else None,
        prior=ss.prox.L1(0.05) if prior is None else prior,
        ridge=ridge,
    )


@every_loss
def test_values_and_derivatives_are_numpys(name, rng):
    loss, shape = LOSSES[name], (3, 4)
    x, u = targets(name, rng, shape), 2 * rng.normal(size=shape)
    np.testing.assert_allclose(jnp.sum(loss.value(u, x)), numpy_loss(name, u, x), rtol=1e-12)
    slope = np.zeros(shape)
    for index in np.ndindex(shape):
        h = np.zeros(shape)
        h[index] = 1e-6
        slope[index] = (numpy_loss(name, u + h, x) - numpy_loss(name, u - h, x)) / 2e-6
    np.testing.assert_allclose(loss.derivative(u, x), slope, atol=1e-8)
    default = ss.Loss.derivative(loss, jnp.asarray(u), jnp.asarray(x))
    np.testing.assert_allclose(loss.derivative(u, x), default, atol=1e-12)


@every_loss
def test_the_smoothness_is_the_largest_curvature(name, rng):
    """|∂ℓ(u) − ∂ℓ(v)| ≤ L_ℓ |u − v|, and nearly equal somewhere."""
    loss, shape, ratios = LOSSES[name], (2, 1), []
    x = targets(name, rng, shape)
    for scale, near in itertools.product((0.01, 1, 5), range(200)):
        u = scale * rng.normal(size=shape) + (x if name in ("squares", "huber") else 0)
        v = u + (0.01 if near % 2 else 1.0) * rng.normal(size=shape)
        moved = np.linalg.norm(loss.derivative(u, x) - loss.derivative(v, x))
        ratios.append(moved / np.linalg.norm(u - v))
    assert max(ratios) <= loss.smoothness * (1 + 1e-9)
    assert max(ratios) >= 0.98 * loss.smoothness


@every_loss
def test_conjugates_are_suprema(name, rng):
    """Fenchel–Young: ℓ(u) + ℓ*(r) ≥ <u, r>, equal at r = ∂ℓ(u); infinite outside the domain."""
    loss, shape = LOSSES[name], (3, 2)
    x = targets(name, rng, shape)
    for _ in range(50):
        u, v = 2 * rng.normal(size=shape), 2 * rng.normal(size=shape)
        r = np.asarray(loss.derivative(u, x))
        conjugate = np.sum(loss.conjugate(r, x))
        np.testing.assert_allclose(numpy_loss(name, u, x) + conjugate, np.sum(u * r), atol=1e-12)
        assert numpy_loss(name, v, x) + conjugate >= np.sum(v * r) - 1e-12
        terms, sizes, _ = loss.gap(v, r, x)
        gap = numpy_loss(name, v, x) + conjugate - np.sum(v * r)
        np.testing.assert_allclose(jnp.sum(terms), gap, atol=1e-12)
        assert np.all(sizes >= np.abs(terms))
    if name != "squares":
        outside = np.asarray(loss.derivative(u, x)) + 1.5
        assert np.isinf(np.sum(loss.conjugate(outside, x)))
        inside = loss.dual_projection(outside, x)
        assert np.isfinite(np.sum(loss.conjugate(inside, x)))
        np.testing.assert_allclose(loss.dual_projection(inside, x), inside, atol=1e-12)
        for _ in range(50):  # the nearest of all points of the domain
            other = np.asarray(loss.derivative(3 * rng.normal(size=shape), x))
            product = np.sum((outside - inside) * (other - inside))
            assert product <= 1e-10


def minimum(problem, name):
    """min P for each example by scipy, from z = u − v with u, v ≥ 0 for the L1 prior."""
    kernel, ridge = np.asarray(problem.linear_map.kernel), float(problem.ridge)
    gamma, shape = problem.prior.gamma, problem.linear_map.out_shape
    size = int(np.prod(shape))
    least = []
    for x in np.asarray(problem.inputs):
        bias = 0.0 if problem.bias is None else np.asarray(problem.bias)

        def objective(uv, x=x, bias=bias):
            z = (uv[:size] - uv[size:]).reshape(shape)
            smooth = numpy_loss(name, z @ kernel.T, x) - np.sum(bias * z)
            return smooth + 0.5 * ridge * np.sum(z**2) + gamma * np.sum(uv)

        start, bounds = np.full(2 * size, 0.1), [(0, None)] * (2 * size)
        options = {"maxiter": 5000, "ftol": 1e-15, "gtol": 1e-10, "maxfun": 10**6}
        found = optimize.minimize(
            objective, start, method="L-BFGS-B", bounds=bounds, options=options
        )
        least.append(found.fun)
    return np.array(least)


@every_loss
@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_certificates_bound_the_gap_and_go_to_zero(name, ridge, rng):
    problem = problem_of(name, rng, ridge=ridge, prior=ss.prox.L1(0.2))
    best = minimum(problem, name)
    bounds = []
    for num_iters in (1, 10, 3000):
        solution = ss.prox_gd(problem, num_iters=num_iters, momentum=num_iters > 10, certify=True)
        gap = np.asarray(problem.objective(solution.value)) - best
        assert np.all(solution.certificate >= gap - 1e-9)
        bounds.append(np.max(solution.certificate))
    assert bounds[2] < 1e-8
    assert bounds[1] < 100 * bounds[0]


@every_loss
@pytest.mark.optimized
def test_float32_certificates_are_above_the_float64_gap(name, rng):
    @jax.jit
    def solve(single, double):
        z = ss.prox_gd(single, num_iters=2000, momentum=True).value
        best = ss.prox_gd(double, num_iters=4000, momentum=True).value
        gap = double.objective(z.astype(jnp.float64)) - double.objective(best)
        return gap, single.certificate(z)

    for _ in range(5):
        given = problem_of(name, rng, prior=ss.prox.L1(0.1), bias=False)
        kernel, x = (np.asarray(a, np.float32) for a in (given.linear_map.kernel, given.inputs))
        gap, bound = solve(
            *(
                ss.LayerProblem(
                    dataclasses.replace(given.linear_map, kernel=jnp.asarray(kernel, dtype)),
                    jnp.asarray(x, dtype),
                    loss=given.loss,
                    prior=given.prior,
                )
                for dtype in (np.float32, np.float64)
            )
        )
        assert np.all(np.asarray(bound, np.float64) >= gap)
        assert np.all(bound < 1e-3)


@every_loss
def test_terms_and_gradient(name, rng):
    problem = problem_of(name, rng, ridge=0.3)

    @jax.jit
    def evaluate(z):
        mean = problem.terms(z).mean(-1) + 0.15 * problem.sum(z**2)
        slope = jax.grad(lambda z: problem.smooth(z).sum())(z)
        return mean, problem.smooth(z), problem.gradient(z), slope

    mean, smooth, gradient, slope = evaluate(rng.normal(size=problem.shape))
    np.testing.assert_allclose(mean, smooth, rtol=1e-12)
    np.testing.assert_allclose(gradient, slope, rtol=1e-10, atol=1e-12)


@every_loss
def test_sampled_gradients_are_unbiased_over_all_subsets(name, rng):
    problem = problem_of(name, rng, n1=4, ridge=0.1)
    z, y = (jnp.asarray(rng.normal(size=problem.shape)) for _ in range(2))
    subsets = [np.isin(np.arange(4), s) for s in itertools.combinations(range(4), 2)]
    draws = [np.broadcast_to(2.0 * s, (2, 4)) for s in subsets]
    tau_nice, shared = ss.estimators.TauNice(2), ss.estimators.TauNice(2, shared=True)

    @jax.jit
    def evaluate(problem, z, y):
        reduced = ss.estimators.VarianceReduced.at(problem, y, tau_nice)
        means = [
            jax.vmap(lambda draw, e=e: e.gradient(problem, z, draw))(np.stack(draws)).mean(0)
            for e in (tau_nice, reduced)
        ]
        masked = tau_nice.gradient(problem, z, jnp.asarray(draws[0]))
        same = masked, shared.gradient(problem, z, jnp.arange(2))
        at_anchor = reduced.gradient(problem, y, jnp.asarray(draws[-1]))
        return means, problem.gradient(z), at_anchor, problem.gradient(y), same

    means, at_z, at_anchor, at_y, (masked, gathered) = evaluate(problem, z, y)
    for mean in means:
        np.testing.assert_allclose(mean, at_z, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(at_anchor, at_y, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(gathered, masked, rtol=1e-10)


@every_loss
def test_expected_smoothness_of_random_pairs(name, rng):
    """E||∇Ψ(z) − ∇Ψ(y)||² ≤ 2 𝓛 (F(z) − F(y) − <∇F(y), z − y>) over all subsets."""
    problem = problem_of(name, rng, n1=4, ridge=0.1)
    estimator = ss.estimators.TauNice(2)
    draws = np.zeros((6, 2, 4))
    for draw, subset in zip(draws, itertools.combinations(range(4), 2), strict=True):
        draw[:, list(subset)] = 2.0

    @jax.jit
    def evaluate(z, y):
        def moved(draw):
            one, other = (estimator.gradient(problem, at, draw) for at in (z, y))
            return problem.sum((one - other) ** 2)

        bregman = problem.smooth(z) - problem.smooth(y) - problem.sum(problem.gradient(y) * (z - y))
        bound = 2 * estimator.expected_smoothness(problem) * bregman
        return jax.vmap(moved)(jnp.asarray(draws)).mean(0), bound

    for scale in (0.1, 1.0, 3.0):
        z, y = (scale * rng.normal(size=problem.shape) for _ in range(2))
        mean, bound = map(np.asarray, evaluate(z, y))
        assert np.all(mean <= bound * (1 + 1e-9))


@every_loss
def test_every_solver_reaches_the_optimum(name, rng):
    problem = problem_of(name, rng, ridge=0.2)
    safe = ss.InverseExpectedSmoothness()
    solutions = {
        "prox_gd": ss.prox_gd(problem, num_iters=500, momentum=True),
        "tol": ss.prox_gd(problem, num_iters=5000, tol=1e-9),
        "prox_sg": ss.prox_sg(KEY, problem, tau=5, step_size=safe, num_iters=2000),
        "ms2gd": ss.ms2gd(KEY, problem, tau=2, step_size=safe, num_outer=60, num_inner=40),
        "nsync": ss.nsync(KEY, problem, tau=2, num_iters=3000),
    }
    for solver, solution in solutions.items():
        assert np.max(problem.certificate(solution.value)) < 1e-5, solver
    assert np.all(solutions["tol"].status == ss.Status.CONVERGED)


@every_loss
def test_derivatives_of_the_solution(name, rng):
    """Implicit derivatives are those of many unrolled iterations, and finite differences agree."""
    problem = problem_of(name, rng, ridge=0.5, batch=(1,))
    weights = jnp.asarray(rng.normal(size=problem.shape))

    def value(bias, ridge, derivative, num_iters):
        moved = ss.LayerProblem(
            problem.linear_map,
            problem.inputs,
            loss=problem.loss,
            bias=bias,
            prior=problem.prior,
            ridge=ridge,
        )
        z = ss.prox_gd(moved, num_iters=num_iters, derivative=derivative).value
        return jnp.sum(weights * z)

    arguments = problem.bias, problem.ridge
    implicit = jax.grad(value, (0, 1))(*arguments, "implicit", 800)
    unrolled = jax.grad(value, (0, 1))(*arguments, "unrolled", 800)
    for one, other in zip(implicit, unrolled, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)
    few = lambda bias, ridge: value(bias, ridge, "unrolled", 5)  # noqa: E731
    check_grads(few, arguments, order=1, modes=["rev"], eps=1e-6, rtol=1e-5)


def test_a_loss_of_two_lines(rng):
    """Value and smoothness alone: solved, differentiated, certified by curvature, and inf without."""

    @ss.value_object
    class PseudoHuber(ss.Loss):  # sqrt(1 + (u − x)²) − 1
        def value(self, u, x):
            return jnp.sqrt(1 + (u - x) ** 2) - 1

    kernel, x = rng.normal(size=(5, 3)), rng.normal(size=(2, 5))
    options = {"loss": PseudoHuber(), "prior": ss.prox.L1(0.05)}
    problem = ss.LayerProblem(ss.Dense(kernel), x, ridge=0.1, **options)
    z = ss.prox_gd(problem, num_iters=2000, momentum=True).value
    assert np.all(problem.certificate(z) < 1e-9)
    assert np.all(np.isinf(ss.LayerProblem(ss.Dense(kernel), x, **options).certificate(z)))
    jax.grad(lambda p: ss.prox_gd(p, num_iters=200, tol=1e-8).value.sum())(problem)


def test_what_is_no_factor_is_refused(rng):
    A, x = ss.Dense(rng.normal(size=(5, 3))), rng.normal(size=(2, 5))
    with pytest.raises(ValueError, match="loss of LayerProblem: expected an instance of Loss"):
        ss.LayerProblem(A, x, loss="squares")
    with pytest.raises(ValueError, match="prior of LayerProblem: expected an instance of Prior"):
        ss.LayerProblem(A, x, prior=jax.nn.relu)
    with pytest.raises(ValueError, match="linear_map of LayerProblem: expected an instance of Lin"):
        ss.LayerProblem(A.kernel, x)
    with pytest.raises(ValueError, match="axis of CrossEntropy: expected an axis of the inputs"):
        ss.LayerProblem(A, x, loss=ss.losses.CrossEntropy())
    with pytest.raises(ValueError, match="axis of CrossEntropy: expected an integer"):
        ss.losses.CrossEntropy(axis=-1)
    with pytest.raises(ValueError, match="delta: expected a number > 0"):
        ss.losses.Huber(0.0)
    problem = ss.LayerProblem(A, np.sign(x), loss=ss.losses.Logistic())
    with pytest.raises(ValueError, match="loss of form 'gram': expected Squares, got Logistic"):
        ss.prox_gd(problem, num_iters=2, form="gram")


def test_a_classifier_on_gated_columns_learns(rng):
    """x one-hot (classes, n data): τ-nice sampling of x is SGD on multinomial regression."""
    data, labels = rng.normal(size=(40, 4)), rng.integers(3, size=40)
    data[np.arange(40), labels] += 2.0
    problem = ss.LayerProblem(
        Columns(jnp.asarray(data)),
        np.eye(3)[labels].T,
        loss=ss.losses.CrossEntropy(),
        prior=ss.prox.Zero(),
        ridge=1.0,
    )
    step = ss.InverseExpectedSmoothness()
    solution = ss.ms2gd(KEY, problem, tau=8, step_size=step, num_outer=60, num_inner=20)
    scores = np.asarray(solution.value) @ data.T
    assert np.mean(np.argmax(scores, 0) == labels) > 0.8
    assert problem.certificate(solution.value) < 1e-3


def test_factors_of_ones_own_are_checked_in_words(rng):
    class Plain(ss.LinearMap):
        in_shape, out_shape = (5,), (5,)

        def __call__(self, x):
            return x

    @ss.value_object
    class Traced(ss.LinearMap):
        kernel: jax.Array
        in_shape: list

        def __call__(self, x):
            return x @ self.kernel

    @ss.value_object
    class NoStep(ss.Solver):
        num_iters: int = ss.static_field()

        def step(self, run, k, z, memory):
            return z

    @ss.value_object
    class NoCount(NoStep):
        num_iters: None = None

    x, eye = rng.normal(size=(2, 5)), jnp.eye(5)
    with pytest.raises(
        ValueError, match="linear_map of LayerProblem: expected a class under the dec"
    ):
        ss.LayerProblem(Plain(), x)
    with pytest.raises(ValueError, match="in_shape of Traced: expected a tuple of integers"):
        Traced(eye, [5])
    with pytest.raises(
        ValueError, match=r"what NoStep.step returns: expected a Step\(value, memory\)"
    ):
        NoStep(3).solve(None, ss.LayerProblem(ss.Dense(eye), x))
    with pytest.raises(ValueError, match="num_iters: expected an integer"):
        NoCount()
    with pytest.raises(TypeError, match="a loss of your own is a subclass of Loss"):
        type("Mine", (ss.losses.Squares,), {})


@pytest.mark.optimized
def test_certificates_of_a_loss_of_ones_own_near_its_minimum(rng):
    """log cosh, written so that its terms are accurate relative to their size, at tiny inputs in float32."""

    @ss.value_object
    class LogCosh(ss.Loss):
        def value(self, u, x):
            t = jnp.abs(u - x)
            return jnp.log1p(jnp.expm1(t) ** 2 * jnp.exp(-t) / 2)

        def conjugate(self, r, x):
            return r * x + r * jnp.arctanh(r) + 0.5 * jnp.log1p(-(r**2))

    for scale in (1e-2, 1e-3, 1e-4):
        kernel, x = rng.normal(size=(10, 6)) / 3, scale * rng.normal(size=(10, 10))
        low, high = (
            ss.LayerProblem(
                ss.Dense(jnp.asarray(kernel, np.float32).astype(dtype)),
                jnp.asarray(x, np.float32).astype(dtype),
                loss=LogCosh(),
                prior=ss.prox.L1(jnp.asarray(2.0**-20, dtype)),
            )
            for dtype in (jnp.float32, jnp.float64)
        )
        z = ss.prox_gd(low, num_iters=50).value
        best = ss.prox_gd(high, num_iters=20000, momentum=True).value
        gap = high.objective(z.astype(jnp.float64)) - high.objective(best)
        assert np.all(np.asarray(low.certificate(z), np.float64) >= gap)
