"""Norms that are not squared, spectral normalisation, penalties and projections, against dense SVDs."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from oracles import convolution_matrix
from sklearn.linear_model import Lasso

import stochsolvers as ss
from stochsolvers import lipschitz


def matrix_of(layer, shape, dtype=jnp.float64):
    """The matrix (inputs, outputs) of a function that is affine in inputs of this shape, by its columns."""
    size = int(np.prod(shape))
    points = np.concatenate([np.zeros((1, size)), np.eye(size)]).astype(dtype)
    images = np.asarray(layer(points.reshape(-1, *shape)), np.float64).reshape(size + 1, -1)
    return images[1:] - images[:1]


def top(matrix):
    return np.linalg.svd(matrix, compute_uv=False)[0]


def kernel(rng, *shape):
    return jnp.asarray(rng.normal(size=shape))


K2 = (3, 3, 2, 4)
MAPS = {
    "dense": lambda rng: ss.Dense(kernel(rng, 6, 9)),
    "zero-padded": lambda rng: ss.Conv(kernel(rng, *K2), (5, 4)),
    "strided, grouped": lambda rng: ss.Conv(
        kernel(rng, *K2), (5, 4), strides=2, feature_group_count=2
    ),
    "circular": lambda rng: ss.Conv(kernel(rng, *K2), (5, 4), padding="CIRCULAR"),
    "1-D, dilated": lambda rng: ss.Conv(kernel(rng, 3, 2, 3), (9,), kernel_dilation=2),
    "3-D": lambda rng: ss.Conv(kernel(rng, 2, 3, 2, 2, 2), (3, 4, 3)),
    "transposed": lambda rng: ss.conv_transpose(kernel(rng, *K2), (3, 3), strides=2),
    "contraction": lambda rng: ss.Contraction("...pc,gcn->...pgn", kernel(rng, 2, 3, 4), (5, 3)),
    "function": lambda rng: ss.linear_map(lambda x: jnp.cumsum(x, axis=-1), (6,)),
}


@jax.jit
def numbers(A):
    values = ss.singular_values(A, grid="operator")
    norms = ss.spectral_norm_bracket(A), ss.spectral_norm(A)
    return *norms, ss.stable_rank(A), values, ss.condition_number(A)


@pytest.mark.parametrize("name", MAPS)
def test_norm_bracket_rank_and_condition_are_those_of_the_matrix(name, rng):
    A = MAPS[name](rng)
    sigma = np.linalg.svd(matrix_of(jax.jit(lambda x: A(x)), A.in_shape), compute_uv=False)
    (lower, upper), norm, rank, values, condition = map(np.asarray, numbers(A))
    assert lower <= sigma[0] <= upper
    accuracy = 1e-9 if A.dtype == jnp.float64 else 1e-4
    assert upper - lower <= 1e2 * accuracy * upper
    np.testing.assert_allclose(norm, sigma[0], rtol=accuracy)
    np.testing.assert_allclose(rank, np.sum(sigma**2) / sigma[0] ** 2, rtol=accuracy)
    np.testing.assert_allclose(values[: len(sigma)], sigma, atol=accuracy * sigma[0])
    assert not np.any(values[len(sigma) :] > accuracy * sigma[0])
    np.testing.assert_allclose(condition, values[0] / values[-1], rtol=1e-6)


def test_the_squared_constants_are_squares_where_lemma_2_is_exact(rng):
    circular, padded = MAPS["circular"](rng), MAPS["zero-padded"](rng)
    norm = ss.spectral_norm(circular)
    np.testing.assert_allclose(norm**2, ss.lipschitz_constant(circular), rtol=1e-9)
    assert abs(ss.spectral_norm(padded) ** 2 / ss.lipschitz_constant(padded) - 1) > 1e-3


@pytest.mark.parametrize("name", ["dense", "zero-padded", "circular", "transposed"])
def test_the_derivative_of_the_norm(name, rng):
    """<u, dA v> at the singular vectors; the penalty's is 2 max(0, σ − c) times that."""
    A = MAPS[name](rng)
    direction = jax.tree.map(lambda leaf: kernel(rng, *leaf.shape), A)
    P, sigma, Q = np.linalg.svd(matrix_of(A, A.in_shape))
    expected = P[:, 0] @ matrix_of(direction, A.in_shape) @ Q[0]
    kept = lipschitz.norm_refresh(A, lipschitz.norm_state(A))

    @jax.jit
    def derivatives(A):
        functions = (
            ss.spectral_norm,
            lambda A: ss.spectral_penalty([A, A], sigma[0] - 0.5),
            lambda A: ss.spectral_penalty(A, sigma[0] + 0.5),
            lambda A: lipschitz.kept_norm(A, kept),
            lambda A: lipschitz.norm_step(A, kept, num_steps=3)[0],
        )
        return [jax.grad(function)(A) for function in functions]

    found = [
        sum(jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (g, direction)), strict=True))
        for g in derivatives(A)
    ]
    np.testing.assert_allclose(found, np.array([1, 2, 0, 1, 1]) * expected, rtol=1e-4, atol=1e-9)


def test_norms_without_a_derivative_by_the_book(rng):
    """At zero, for tiny kernels, and for kernels that are not finite."""
    zero, tiny = ss.Dense(jnp.zeros((3, 4))), ss.Dense(1e-30 * jnp.ones((3, 4), jnp.float32))
    assert ss.spectral_norm(zero) == 0
    assert not np.any(jax.grad(ss.spectral_norm)(zero).kernel)
    assert np.isnan(ss.stable_rank(zero))
    np.testing.assert_allclose(ss.spectral_norm(tiny), 1e-30 * np.sqrt(12), rtol=1e-6)
    assert np.isnan(ss.spectral_norm(ss.Dense(jnp.full((3, 4), jnp.nan))))
    state = lipschitz.norm_step(tiny, lipschitz.norm_state(tiny))[1]
    broken = ss.Dense(jnp.full((3, 4), jnp.nan, jnp.float32))
    norm, after = lipschitz.norm_step(broken, state)
    assert np.isnan(norm)
    np.testing.assert_array_equal(after.vectors, state.vectors)


def test_a_large_zero_padded_layer(rng):
    """Not written out: a Ritz value within its bracket; the Frobenius norm counts each tap's positions."""
    A = ss.Conv(jnp.asarray(rng.normal(size=(3, 3, 4, 4)), jnp.float32), (40, 40))
    lower, upper = ss.spectral_norm_bracket(A)
    norm = ss.spectral_norm(A)
    assert 0.999 * lower <= norm <= upper <= 1.05 * lower
    positions = np.outer((39, 40, 39), (39, 40, 39))
    squares = np.sum(np.asarray(A.kernel, np.float64) ** 2, axis=(2, 3))
    expected = np.sum(positions * squares) / float(norm) ** 2
    np.testing.assert_allclose(ss.stable_rank(A), expected, rtol=1e-5)
    for function in (ss.condition_number, lambda A: ss.singular_values(A, grid="operator")):
        with pytest.raises(ValueError, match="at most 4194304 entries, got 40960000"):
            function(A)


def flax_layers():
    """Layers of NNX with the shape of an input; then those of Linen, in the same order."""
    rngs = nnx.Rngs(0)
    return [
        (nnx.Linear(5, 7, rngs=rngs), nn.Dense(7), (5,), None),
        (nnx.Conv(2, 4, (3, 3), rngs=rngs), nn.Conv(4, (3, 3)), (6, 5, 2), (6, 5)),
        (
            nnx.Conv(2, 4, 3, 2, kernel_dilation=2, feature_group_count=2, rngs=rngs),
            nn.Conv(4, 3, 2, kernel_dilation=2, feature_group_count=2),
            (9, 2),
            9,
        ),
        (
            nnx.ConvTranspose(2, 3, (2, 3, 2), strides=2, rngs=rngs),
            nn.ConvTranspose(3, (2, 3, 2), strides=(2, 2, 2)),
            (2, 3, 2, 2),
            (2, 3, 2),
        ),
        (
            nnx.LinearGeneral((3, 4), (2, 3), axis=(-2, -1), rngs=rngs),
            nn.DenseGeneral((2, 3), axis=(-2, -1)),
            (3, 4),
            None,
        ),
    ]


@pytest.mark.parametrize("number", range(5))
def test_the_true_norm_of_a_normalised_layer_is_the_bound(number, rng):
    """Beside Flax's wrappers, called the same way: in training, at eval, kept and certified."""
    layer, linen_layer, shape, pixels = flax_layers()[number]
    x = jnp.asarray(rng.normal(size=(2, *shape)), jnp.float32)
    options = {} if pixels is None else {"spatial_shape": pixels}
    ours = ss.nnx.SpectralNorm(layer, bound=2.0, certified=True, **options, rngs=nnx.Rngs(0))
    before = jax.tree.map(np.asarray, nnx.state(ours, nnx.Param))
    ours(x, update_stats=True)

    def norm(function):
        return top(matrix_of(jax.jit(function), shape, jnp.float32))

    np.testing.assert_allclose(norm(lambda x: nnx.clone(ours)(x)), 2.0, rtol=1e-4)
    ours.eval()
    for _ in range(2):  # computed at the call, then kept; nothing is written
        found = norm(ours)
        np.testing.assert_allclose(found, 2.0, rtol=2e-3)
        assert found <= 2.0 + 1e-5
        ss.nnx.refresh_lipschitz(ours)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(ours, nnx.Param))

    theirs, twin = nn.SpectralNorm(linen_layer), ss.linen.SpectralNorm(linen_layer)
    key = jax.random.key(0)

    def init(module):
        return jax.jit(functools.partial(module.init, update_stats=False))(key, x)

    @functools.partial(jax.jit, static_argnames="update_stats")
    def stats_of(variables, update_stats):
        return twin.apply(variables, x, update_stats=update_stats, mutable="batch_stats")[1]

    variables, own = (init(module) for module in (theirs, twin))
    assert jax.tree.structure(variables["params"]) == jax.tree.structure(own["params"])
    other = init(ss.linen.SpectralNorm(linen_layer, bound=3.0))
    jax.tree.map(np.testing.assert_array_equal, own["params"], other["params"])  # not normalised
    own = {**own, **stats_of(own, update_stats=True)}
    kept = {**own, **stats_of(own, update_stats=False)}
    evaluate = jax.jit(functools.partial(twin.apply, update_stats=False))
    for stored in (own, kept):
        found = top(matrix_of(functools.partial(evaluate, stored), shape, jnp.float32))
        np.testing.assert_allclose(found, 1.0, rtol=1e-4)

    @jax.jit
    def of_flax(stats):
        return theirs.apply({**variables, **stats}, x, update_stats=True, mutable="batch_stats")[1]

    stats = {"batch_stats": variables["batch_stats"]}
    for _ in range(100):
        stats = of_flax(stats)
    true = norm(lambda x: theirs.apply({**variables, **stats}, x, update_stats=False))
    if number == 0:  # a matrix that is a matrix
        np.testing.assert_allclose(true, 1.0, rtol=1e-3)
    else:
        assert abs(true - 1) > 0.03


def test_the_gradient_through_the_normalisation(rng):
    """Against central differences in float64, in training and at eval, and with the norm held constant."""
    layer = nnx.Conv(2, 3, (3, 3), param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    x, weights = kernel(rng, 2, 4, 5, 2), kernel(rng, 2, 4, 5, 3)
    direction = kernel(rng, *layer.kernel.shape)
    held = {}
    for through in (True, False):
        model = ss.nnx.SpectralNorm(
            layer, bound=0.7, spatial_shape=(4, 5), n_steps=4, differentiate_norm=through
        )
        for _ in range(20):
            model(x)
        graph, params, stats = nnx.split(model, nnx.Param, ...)

        @jax.jit
        def loss(t, training, graph=graph, params=params, stats=stats):
            model = nnx.merge(graph, params, stats, copy=True)
            model.layer_instance.kernel[...] += t * direction
            outs = [jnp.sum(weights * model(x, update_stats=flag) ** 2) for flag in (True, False)]
            return jnp.stack(outs)[training]

        for training in (0, 1):
            held[through, training] = jax.grad(loss)(0.0, training)
            if through:
                difference = (loss(1e-5, training) - loss(-1e-5, training)) / 2e-5
                np.testing.assert_allclose(held[True, training], difference, rtol=1e-6)
    factor = 0.7 / ss.spectral_norm(model.linear_map())
    plain = jax.grad(lambda W: jnp.sum(weights * (factor * ss.Conv(W, (4, 5))(x)) ** 2))(
        layer.kernel[...]
    )
    for training in (0, 1):
        np.testing.assert_allclose(held[False, training], jnp.vdot(plain, direction), rtol=1e-6)


def test_a_training_step_of_nnx_tracks_the_norm(rng):
    """nnx.Optimizer and nnx.jit; the parameters are the optimiser's, never the normalised ones."""
    model = ss.nnx.SpectralNorm(
        nnx.Conv(3, 5, (3, 3), rngs=nnx.Rngs(0)), spatial_shape=6, shrink_only=True, bound=0.5
    )
    optimizer = nnx.Optimizer(model, optax.sgd(0.05), wrt=nnx.Param)
    x = jnp.asarray(rng.normal(size=(4, 6, 6, 3)), jnp.float32)

    @nnx.jit
    def step(model, optimizer):
        gradient = nnx.grad(lambda model: -jnp.mean(model(x) ** 2))(model)
        optimizer.update(model, gradient)

    structure = nnx.graphdef(model)
    for _ in range(10):
        step(model, optimizer)
    assert nnx.graphdef(model) == structure
    A = model.linear_map()
    tracked = lipschitz.norm_step(A, model.norm_state())[0]
    np.testing.assert_allclose(tracked, ss.spectral_norm(A), rtol=1e-3)
    model.eval()
    evaluated = jax.jit(lambda x: model(x))(x)  # closes over the model, which writes nothing
    by_hand = model.layer_instance(x) - model.layer_instance.bias[...].reshape(1, 1, 1, -1)
    by_hand = by_hand * (0.5 / ss.spectral_norm(A)) + model.layer_instance.bias[...].reshape(
        1, 1, 1, -1
    )
    np.testing.assert_allclose(evaluated, by_hand, atol=1e-5)
    loose = ss.nnx.SpectralNorm(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), bound=100.0, shrink_only=True)
    np.testing.assert_array_equal(loose(x), loose.layer_instance(x))


def test_a_loaded_kernel_is_not_normalised_by_the_norm_of_another(rng):
    model = ss.nnx.SpectralNorm(nnx.Linear(4, 6, rngs=nnx.Rngs(0)), update_stats=False)
    ss.nnx.refresh_lipschitz(model)
    model.layer_instance.kernel[...] = model.layer_instance.kernel[...] * (1 + 1e-3)
    np.testing.assert_allclose(top(matrix_of(model, (4,), jnp.float32)), 1.0, rtol=1e-5)


def test_an_array_or_a_layer_is_no_map():
    for wrong in (jnp.eye(3), nnx.Linear(3, 3, rngs=nnx.Rngs(0))):
        with pytest.raises(ValueError, match="map of spectral_norm: expected a LinearMap such as"):
            ss.spectral_norm(wrong)


def test_training_leaves_a_singular_vector_that_is_no_longer_the_first():
    model = ss.nnx.SpectralNorm(nnx.Linear(6, 6, use_bias=False, rngs=nnx.Rngs(0)))
    eye = jnp.eye(6, dtype=jnp.float32)
    for scale in (1.0, 20.0):  # the kept vector is the first unit vector, exactly
        model.layer_instance.kernel[...] = eye.at[0, 0].set(2.0).at[3, 3].set(scale)
        for _ in range(3):
            model(eye)
    np.testing.assert_allclose(np.linalg.norm(model(eye), 2), 1.0, rtol=1e-3)


def test_a_kernel_of_zeros_stays_finite():
    model = ss.nnx.SpectralNorm(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), bound=0.5)
    model.layer_instance.kernel[...] = jnp.zeros((4, 3), jnp.float32)
    x = jnp.ones((2, 4), jnp.float32)
    gradient = nnx.grad(lambda model: jnp.sum((model(x) - 1) ** 2))(model)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(gradient))
    model.eval()
    report = ss.lipschitz_report(model, (1, 4))
    assert report.bound < 1e-6
    model.layer_instance.kernel[...] = jnp.ones((4, 3), jnp.float32)
    np.testing.assert_allclose(ss.lipschitz_report(model, (1, 4)).bound, 0.5, rtol=1e-5)


def test_a_kept_norm_is_not_that_of_images_of_another_shape():
    """8 × 2 and 4 × 4 pixels: the kept vector has the size of both, the layers have different norms."""
    module = ss.linen.SpectralNorm(nn.Conv(1, (1, 3)))
    kernel, x = jnp.ones((1, 3, 1, 1), jnp.float32), jnp.zeros((1, 8, 2, 1), jnp.float32)
    variables = module.init(jax.random.key(0), x, update_stats=False)
    variables["params"] = jax.tree.map(
        lambda leaf: kernel if leaf.ndim == 4 else leaf, variables["params"]
    )
    _, kept = module.apply(variables, x, update_stats=False, mutable="batch_stats")
    variables = {**variables, **kept}
    matrix = matrix_of(
        lambda x: module.apply(variables, x, update_stats=False), (4, 4, 1), jnp.float32
    )
    np.testing.assert_allclose(top(matrix), 1.0, rtol=1e-5)


@pytest.mark.parametrize("name", ["dense", "contraction", "circular"])
def test_clipping_is_min_of_every_singular_value_and_the_bound(name, rng):
    A = MAPS[name](rng)
    matrix = matrix_of(A, A.in_shape)
    P, sigma, Q = np.linalg.svd(matrix, full_matrices=False)
    bound = 0.6 * sigma[0]
    B = ss.clip_singular_values(A, bound, taps="grid" if name == "circular" else "kernel")
    expected = (P * np.minimum(sigma, bound)) @ Q
    np.testing.assert_allclose(matrix_of(B, A.in_shape), expected, atol=1e-10)
    unchanged = ss.clip_singular_values(A, 1.001 * sigma[0])
    np.testing.assert_allclose(matrix_of(unchanged, A.in_shape), matrix, atol=1e-10)


@pytest.mark.parametrize("wrap", [True, False])
def test_clipping_within_the_taps_is_the_nearest_kernel(wrap, rng):
    """Against the convex program; under zero padding near it."""
    import cvxpy as cp

    W = rng.normal(size=(3, 2, 3))
    parts = [
        convolution_matrix(unit.reshape(W.shape), (8,), (1,), [(1, 1)], (1,), wrap=wrap)
        for unit in np.eye(W.size)
    ]
    bound = 0.7 * top(np.tensordot(W.ravel(), parts, 1))
    variable = cp.Variable(W.size)
    inside = cp.sigma_max(sum(variable[i] * part for i, part in enumerate(parts))) <= bound
    cp.Problem(cp.Minimize(cp.sum_squares(variable - W.ravel())), [inside]).solve()
    best = np.linalg.norm(variable.value - W.ravel())
    A = ss.Conv(jnp.asarray(W), (8,), padding="CIRCULAR" if wrap else "SAME")
    B = ss.clip_singular_values(A, bound, tolerance=1e-5 if wrap else 1e-3)
    np.testing.assert_allclose(top(matrix_of(B, A.in_shape)), bound, rtol=1e-3)
    distance = np.linalg.norm(B.kernel - W)
    assert (1 - 1e-4) * best <= distance <= (1 + (1e-4 if wrap else 0.1)) * best
    assert distance < 0.9 * 0.3 * np.linalg.norm(W)  # of scaling


def test_optax_projection_keeps_every_layer_within_the_bound(rng):
    params = {
        "dense": {"kernel": kernel(rng, 4, 5), "bias": jnp.ones(5)},
        "conv": {"kernel": kernel(rng, *K2)},
    }

    def maps(path, leaf):
        return (
            ss.Conv(leaf, (5, 4)) if path == "conv/kernel" else ss.optax.dense_kernels(path, leaf)
        )

    gradient = jax.tree.map(jnp.ones_like, params)
    for every in (1, 2):
        project = ss.optax.project_spectral_norm(0.5, maps=maps, method="scale", every=every)
        optimizer = optax.chain(optax.sgd(0.1), project)
        updates, state = jax.jit(optimizer.update)(gradient, optimizer.init(params), params)
        moved = optax.apply_updates(params, updates)
        assert (ss.spectral_norm(ss.Dense(moved["dense"]["kernel"])) > 0.6) == (every == 2)
        np.testing.assert_allclose(moved["dense"]["bias"], 0.9)
    updates, _ = jax.jit(optimizer.update)(gradient, state, moved)
    moved = optax.apply_updates(moved, updates)
    for A in (ss.Dense(moved["dense"]["kernel"]), ss.Conv(moved["conv"]["kernel"], (5, 4))):
        np.testing.assert_allclose(ss.spectral_norm(A), 0.5, rtol=1e-9)
    clip = ss.optax.project_spectral_norm(0.5)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = clip.update(zero, clip.init(params), params)
    P, sigma, Q = np.linalg.svd(params["dense"]["kernel"], full_matrices=False)
    np.testing.assert_allclose(
        params["dense"]["kernel"] + updates["dense"]["kernel"], (P * np.minimum(sigma, 0.5)) @ Q
    )
    assert not np.any(updates["conv"]["kernel"])


def test_optax_prox_reaches_the_lasso(rng):
    """θ ← prox_{ηg}(θ − η ∇f(θ)) written out in numpy, its limit by coordinate descent."""
    data, coefficients = rng.normal(size=(30, 8)), rng.normal(size=8) * (np.arange(8) < 3)
    targets, weight = data @ coefficients, 0.2
    step = 1 / np.linalg.norm(data.T @ data / 30, 2)
    optimizer = optax.chain(optax.sgd(step), ss.optax.prox(ss.prox.L1(weight), step))

    @jax.jit
    def one(carry, _):
        theta, state = carry
        gradient = {"w": data.T @ (data @ theta["w"] - targets) / 30}
        updates, state = optimizer.update(gradient, state, theta)
        theta = optax.apply_updates(theta, updates)
        return (theta, state), theta["w"]

    theta = {"w": jnp.zeros(8)}
    _, path = jax.lax.scan(one, (theta, optimizer.init(theta)), length=300)
    expected = np.zeros(8)
    for k in range(300):
        v = expected - step * data.T @ (data @ expected - targets) / 30
        expected = np.sign(v) * np.maximum(np.abs(v) - step * weight, 0)
        np.testing.assert_allclose(path[k], expected, atol=1e-12)
    lasso = Lasso(weight, fit_intercept=False, tol=1e-12, max_iter=10000).fit(data, targets)
    np.testing.assert_allclose(path[-1], lasso.coef_, atol=1e-8)
    np.testing.assert_array_equal(np.asarray(path[-1]) == 0, lasso.coef_ == 0)


def test_optax_prox_of_boxes_groups_and_schedules(rng):
    params = {"a": {"kernel": 2 * kernel(rng, 4, 6)}, "b": kernel(rng, 3)}
    zero = jax.tree.map(jnp.zeros_like, params)

    def priors(path, leaf):
        return ss.prox.Box(-0.5, 0.5) if path == "a/kernel" else None

    box = ss.optax.prox(priors, 0.1)
    moved = optax.apply_updates(params, box.update(zero, box.init(params), params)[0])
    np.testing.assert_allclose(moved["a"]["kernel"], np.clip(params["a"]["kernel"], -0.5, 0.5))
    np.testing.assert_array_equal(moved["b"], params["b"])
    group = ss.optax.prox(
        ss.prox.GroupL2(1.0, axis=0), lambda count: 0.5 * (count + 1), where=lambda p, _: p != "b"
    )
    state = group.init(params)
    for eta in (0.5, 1.0):
        updates, state = group.update(zero, state, params)
        norms = np.linalg.norm(params["a"]["kernel"], axis=0)
        shrunk = params["a"]["kernel"] * np.maximum(1 - eta / norms, 0)[None]
        np.testing.assert_allclose(
            params["a"]["kernel"] + updates["a"]["kernel"], shrunk, atol=1e-12
        )


def test_errors(rng):
    dense, layer = MAPS["dense"](rng), nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    optimizer, params = ss.optax.prox(ss.prox.L1(), 0.1), {"kernel": jnp.ones((2, 2))}
    strange = ss.optax.project_spectral_norm(maps=lambda path, leaf: ss.Dense(leaf[:1]))
    project = ss.optax.project_spectral_norm()
    state = lipschitz.norm_state(dense)
    bad = {
        "bound of SpectralNorm: expected a number > 0, got 0": lambda: ss.nnx.SpectralNorm(
            layer, bound=0
        ),
        "layer_instance of SpectralNorm": lambda: ss.nnx.SpectralNorm(
            nnx.BatchNorm(3, rngs=nnx.Rngs(0))
        ),
        "got LoRALinear": lambda: ss.nnx.SpectralNorm(
            nnx.LoRALinear(3, 4, lora_rank=2, rngs=nnx.Rngs(0))
        ),
        "shrink_only of SpectralNorm": lambda: ss.nnx.SpectralNorm(layer, shrink_only=1),
        "n_steps of SpectralNorm": lambda: ss.nnx.SpectralNorm(layer, n_steps=0),
        "spatial_shape of a layer without pixels": lambda: ss.nnx.SpectralNorm(
            layer, spatial_shape=3
        ),
        "error_on_non_matrix": lambda: ss.nnx.SpectralNorm(
            nnx.Conv(2, 3, (3, 3), rngs=nnx.Rngs(0)), error_on_non_matrix=True
        ),
        "bound of SpectralNorm: expected a number > 0, got -1": lambda: ss.linen.SpectralNorm(
            nn.Dense(3), bound=-1
        ),
        "one of nn.Dense": lambda: ss.linen.SpectralNorm(nn.LayerNorm()),
        "^bound: expected a number > 0": lambda: ss.clip_singular_values(dense, 0.0),
        "map of clip_singular_values": lambda: ss.clip_singular_values(MAPS["function"](rng), 1.0),
        "layer of taps='grid'": lambda: ss.clip_singular_values(
            MAPS["zero-padded"](rng), 1.0, taps="grid"
        ),
        "^bound: expected a number >= 0": lambda: ss.spectral_penalty(dense, -1.0),
        "maps of spectral_penalty": lambda: ss.spectral_penalty([jnp.ones((2, 2))], 1.0),
        "vectors of the state of norm_step": lambda: lipschitz.norm_step(
            MAPS["circular"](rng), state
        ),
        "^prior: expected a Prior": lambda: ss.optax.prox("l1", 0.1),
        "learning_rate: expected a number > 0": lambda: ss.optax.prox(ss.prox.L1(), 0.0),
        "params of prox": lambda: optimizer.update(params, optimizer.init(params)),
        "params of project_spectral_norm": lambda: project.update(params, project.init(params)),
        "map of kernel: expected one with the leaf": lambda: strange.update(
            params, strange.init(params), params
        ),
        r"params of project_spectral_norm: .* give maps, .* got conv/kernel of shape \(3, 3, 2, 4\)": (
            lambda: project.init({"conv": {"kernel": jnp.ones((3, 3, 2, 4))}})
        ),
        "params of project_spectral_norm: .* got no leaves": lambda: project.init({}),
        "method: expected one of 'clip', 'scale'": lambda: ss.optax.project_spectral_norm(
            method="x"
        ),
    }
    for message, call in bad.items():
        with pytest.raises(ValueError, match=message):
            call()
