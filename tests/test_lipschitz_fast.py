"""The fast Lipschitz constant and its brackets against float64 singular values in numpy."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equivalence.plain_layers import Geometry, dense_matrix

import stochsolvers as ss
from stochsolvers.lipschitz import (
    lipschitz_bracket,
    lipschitz_constant,
    lipschitz_refresh,
    lipschitz_state,
    operator_bracket,
    singular_values,
    strong_convexity,
)
from stochsolvers.lipschitz.machinery import hermitian, spectra, written

# whose round-off is tested as users have it
SINGLE = pytest.param(jnp.float32, marks=pytest.mark.optimized)
RTOL = {jnp.float32: 1e-5, jnp.float64: 1e-9}


def wrapped(kernel, shape):
    """The kernel on its grid, float64; taps beyond it wrap around."""
    torus = np.zeros((*shape, *kernel.shape[2:]))
    for row, column in np.ndindex(*kernel.shape[:2]):
        torus[row % shape[0], column % shape[1]] += np.asarray(kernel[row, column], np.float64)
    return torus


def literal(kernel, shape):
    """max_f σ_max(Â(f))², float64: half of the padded transform."""
    a_hat = np.fft.rfft2(wrapped(kernel, shape), axes=(0, 1))
    return np.linalg.svd(a_hat, compute_uv=False).max() ** 2


def low_pass(rng, size, n1, n2):
    """Filters that decay in space, in channels and in frequency, as trained ones do."""
    kernel = rng.normal(size=(size, size, n1, n2)) * np.arange(1, n1 + 1)[:, None] ** -0.5
    return kernel * np.hanning(size + 2)[1:-1, None, None, None] + 0.05


def adversaries():
    """Kernels that are hard for a search, for Lanczos or for the arithmetic: (kernel, grid)."""
    rng = np.random.default_rng(7)
    n = 20
    plain = rng.normal(size=(3, 3, n, n))
    left, right = rng.normal(size=(3, 3, n, 1)), rng.normal(size=(1, 1, 1, n))
    delta, pair = np.zeros((2, 3, 3, n, n))
    delta[1, 1] = np.linalg.qr(rng.normal(size=(n, n)))[0]
    pair[0, 0], pair[0, 1] = np.eye(n), 1e-7 * rng.normal(size=(n, n))
    start = np.random.default_rng(0).normal(size=n)  # what a fixed start might be
    hidden = np.eye(n) + 2 * np.outer(plain[0, 0, 0], plain[0, 0, 0])
    hidden = hidden - np.outer(hidden @ start, start) / (start @ start)
    graded = plain * 10.0 ** -np.arange(n)
    negative = -np.abs(plain)
    yield from {
        "plain": (plain, (6, 6)),
        "rank one": (left * right, (6, 6)),
        "orthogonal: all singular values and frequencies are equal": (delta, (6, 6)),
        "frequencies that nearly tie": (pair, (6, 6)),
        "hidden from the start vector": (hidden[None, None], (4, 4)),
        "graded": (graded, (6, 6)),
        "of one sign": (negative, (6, 6)),
        "even taps": (rng.normal(size=(2, 4, n, n)), (7, 4)),
        "one by one": (rng.normal(size=(1, 1, n, n)), (4, 4)),
        "wraps around": (rng.normal(size=(5, 3, n, n)), (2, 3)),
        "tall": (rng.normal(size=(3, 3, 3 * n, n)), (4, 4)),
        "few channels": (rng.normal(size=(3, 3, 2, 5)), (6, 7)),
        "one channel": (rng.normal(size=(3, 3, 1, 1)), (6, 7)),
        "low pass": (low_pass(rng, 3, n, n), (6, 6)),
        "small numbers": (plain * 1e-8, (6, 6)),
        "large numbers": (plain * 1e8, (6, 6)),
        "squares that underflow": (plain * 1e-25, (6, 6)),
        "squares that overflow": (plain * 1e25, (6, 6)),
        "subnormal": (plain * 1e-39, (6, 6)),
        "zero": (0 * plain, (6, 6)),
        "one number": (np.where(np.arange(n) == 3, 1.0, 0.0) * np.ones((1, 1, n, 1)), (4, 4)),
    }.items()


ADVERSARIES = dict(adversaries())


@functools.partial(jax.jit, static_argnames="shape")
def fast_and_bracket(kernel, shape):
    conv = ss.Conv(kernel, shape)
    return lipschitz_constant(conv), lipschitz_bracket(conv)


@functools.partial(jax.jit, static_argnames="shape")
def three_numbers(kernel, shape):
    """Those, and the strong convexity; on (6, 6) the latter makes the constant by itself."""
    value, bracket = fast_and_bracket(kernel, shape)
    circular = ss.Conv(kernel, shape, padding="CIRCULAR")
    return value, bracket, strong_convexity(circular, upper=None if shape == (6, 6) else value)


CASES = [pytest.param(name, jnp.float32, marks=pytest.mark.optimized) for name in ADVERSARIES] + [
    (name, jnp.float64) for name, (_, shape) in ADVERSARIES.items() if shape == (6, 6)
]


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=lambda part: getattr(part, "__name__", part))
def test_constant_bracket_and_strong_convexity_of_adversaries(name, dtype):
    kernel, shape = ADVERSARIES[name]
    kernel = np.asarray(kernel, dtype)
    value, (lower, upper), certified = three_numbers(jnp.asarray(kernel), shape)
    exact = literal(kernel, shape)
    floats = jnp.finfo(dtype)
    assert float(lower) <= exact <= float(upper)
    assert value.dtype == lower.dtype == upper.dtype == certified.dtype == dtype
    if floats.tiny < exact < floats.max:
        np.testing.assert_allclose(value, exact, rtol=RTOL[dtype])
        assert upper <= lower * (1.01 if dtype == jnp.float32 else 1 + 1e-8)
    a_hat = np.fft.fft2(wrapped(kernel, shape), axes=(0, 1))
    squares = np.linalg.svd(a_hat, compute_uv=False) ** 2
    least = squares.min() if kernel.shape[2] >= kernel.shape[3] else 0.0
    assert 0 <= float(certified) <= least * (1 + 1e-12)
    if floats.tiny < squares.max() < floats.max:
        slack = 2e-3 if dtype == jnp.float32 else 1e-8
        assert least - float(certified) <= slack * squares.max()


@pytest.mark.optimized
@pytest.mark.parametrize("features", [(20, 40), (5, 8)])
def test_brackets_hold_for_many_kernels(features, rng):
    kernels = rng.normal(size=(100, 3, 3, *features))
    kernels[::2] *= np.exp(rng.normal(size=(50, 3, 3, features[0], 1)))
    kernels[::3] += 0.3
    kernels = kernels.astype(np.float32)
    for kernel in kernels:
        value, (lower, upper) = fast_and_bracket(jnp.asarray(kernel), (5, 4))
        exact = literal(kernel, (5, 4))
        assert float(lower) <= exact <= float(upper) <= 1.003 * float(lower)
        np.testing.assert_allclose(value, exact, rtol=RTOL[jnp.float32])


@pytest.mark.parametrize("dtype", [SINGLE, jnp.float64])
@pytest.mark.parametrize("given", [None, 0.0, 1e3], ids=["search", "too small", "far above"])
def test_strong_convexity_of_large_maps(dtype, given, rng):
    orthogonal = np.linalg.qr(rng.normal(size=(150, 70)))[0]
    square = rng.normal(size=(70, 70))
    kernels = [rng.normal(size=(150, 70)), orthogonal, orthogonal @ square]
    for kernel in kernels:
        kernel = kernel.astype(dtype)
        squares = np.linalg.svd(np.asarray(kernel, np.float64), compute_uv=False) ** 2
        certified = float(strong_convexity(ss.Dense(kernel), upper=given))
        above = max(squares.max(), given or 0.0)
        slack = 2e-3 if dtype == jnp.float32 else 1e-8
        assert squares.min() - slack * above <= certified <= squares.min()
    kernel[0, 0] = np.nan
    assert np.isnan(strong_convexity(ss.Dense(kernel), upper=given))


def test_strong_convexity_of_strides_and_groups(rng):
    for geometry in (
        Geometry((6, 4), (3, 3), 10, 40, "CIRCULAR", strides=(2, 2)),
        Geometry((4, 4), (3, 2), 50, 40, "CIRCULAR", groups=2),
    ):
        kernel = geometry.kernel(rng)
        matrix = dense_matrix(geometry, kernel)
        eigenvalues = np.linalg.eigvalsh(matrix @ matrix.T)
        exact = eigenvalues[0]
        kernel = jnp.asarray(kernel)
        conv = ss.Conv(kernel, geometry.spatial_shape, **geometry.options)
        certified = strong_convexity(conv)
        assert 0 < exact - 1e-8 * eigenvalues[-1] <= certified <= exact

    def scaled(scale):
        return strong_convexity(dataclasses.replace(conv, kernel=scale * kernel))

    np.testing.assert_allclose(jax.vmap(scaled)(jnp.array([1.0, 2.0])), [certified, 4 * certified])


@pytest.mark.optimized
def test_large_layer_in_single_precision(rng):
    for kernel in (rng.normal(size=(3, 3, 160, 160)), low_pass(rng, 3, 160, 160)):
        kernel = kernel.astype(np.float32)
        value, (lower, upper) = fast_and_bracket(kernel, (2, 2))
        exact = literal(kernel, (2, 2))
        np.testing.assert_allclose(value, exact, rtol=RTOL[jnp.float32])
        assert float(lower) <= exact <= float(upper) <= 1.01 * float(lower)


def blocks_of_several_leaves():
    """Kernels whose Cholesky factors have four leaves, on a grid with many frequencies."""
    rng = np.random.default_rng(3)
    n = 70
    plain = rng.normal(size=(3, 2, n, n))
    orthogonal = np.zeros((3, 2, n, n))
    orthogonal[1, 0] = np.linalg.qr(rng.normal(size=(n, n)))[0]
    first_leaf = orthogonal.copy()  # the first leaf alone is nearly singular
    first_leaf[1, 0] += 3 * np.outer(plain[0, 0, 0], np.arange(n) < 20)
    yield plain
    yield plain[:, :, :, :1] * rng.normal(size=n)  # rank one
    yield orthogonal
    yield first_leaf
    yield -np.abs(plain)
    yield plain * 10.0 ** -np.arange(n)
    yield 1e-8 * plain
    yield 0 * plain


@pytest.mark.parametrize("dtype", [SINGLE, jnp.float64])
def test_blocks_of_several_leaves(dtype):
    for kernel in blocks_of_several_leaves():
        kernel = kernel.astype(dtype)
        value, (lower, upper) = fast_and_bracket(kernel, (7, 6))
        exact = literal(kernel, (7, 6))
        assert float(lower) <= exact <= float(upper)
        if exact:
            np.testing.assert_allclose(value, exact, rtol=RTOL[dtype])
            assert upper <= lower * (1.01 if dtype == jnp.float32 else 1 + 1e-8)


@pytest.mark.optimized
@pytest.mark.parametrize(("name", "factored"), [("plain", 1.0), ("low pass", 0.1)])
def test_most_frequencies_need_no_eigenvalue(name, factored, monkeypatch):
    """Of 514 blocks, Lanczos steps for the records alone; a kernel that decays needs few factors."""
    counts = collections.Counter()

    def counted(module, function):
        original = getattr(module, function)

        def wrapped(*args, **options):
            jax.debug.callback(lambda: counts.update([function]))
            return original(*args, **options)

        monkeypatch.setattr(module, function, wrapped)

    counted(hermitian, "cholesky_certificate")
    counted(spectra, "lanczos")
    counted(jnp.linalg, "eigh")
    kernel = jnp.asarray(ADVERSARIES[name][0], jnp.float32)
    fresh = jax.jit(lambda kernel: lipschitz_constant.__wrapped__(ss.Conv(kernel, (32, 32))))
    value = fresh(kernel)
    jax.effects_barrier()
    np.testing.assert_allclose(value, literal(kernel, (32, 32)), rtol=RTOL[jnp.float32])
    assert 1 <= counts["lanczos"] <= np.log(514)
    assert counts["eigh"] <= counts["lanczos"]  # of their small matrices
    assert 1 <= counts["cholesky_certificate"] <= factored * 514 + counts["lanczos"]


@jax.jit
def norms(linear_map):
    bracket = lipschitz_bracket(linear_map)
    return lipschitz_constant(linear_map), bracket, singular_values(linear_map)


GEOMETRIES = {
    "strided": Geometry((6, 4), (3, 2), 20, 24, "CIRCULAR", strides=(3, 2)),
    "strided, many outputs": Geometry((4, 4), (3, 3), 5, 48, "CIRCULAR", strides=(2, 2)),
    "grouped": Geometry((3, 4), (3, 2), 36, 40, "CIRCULAR", dilation=(2, 1), groups=2),
    "depthwise": Geometry((4, 5), (3, 3), 7, 7, "CIRCULAR", groups=7),
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometries_against_the_dense_matrix(name, rng):
    geometry = GEOMETRIES[name]
    kernel = geometry.kernel(rng)
    conv = ss.Conv(jnp.asarray(kernel), geometry.spatial_shape, **geometry.options)
    expected = np.linalg.svd(dense_matrix(geometry, kernel), compute_uv=False)
    value, (lower, upper), values = norms(conv)
    np.testing.assert_allclose(value, expected[0] ** 2, rtol=RTOL[jnp.float64])
    assert lower <= expected[0] ** 2 <= upper <= lower * (1 + 1e-8)
    assert values.shape == expected.shape
    np.testing.assert_allclose(values, expected, atol=1e-12 * expected[0])


@pytest.mark.parametrize("shape", [(20, 30), (4, 3), (1, 5)])
def test_dense_layers(shape, rng):
    kernel = rng.normal(size=shape)
    dense, expected = ss.Dense(jnp.asarray(kernel)), np.linalg.svd(kernel, compute_uv=False)
    value, bracket, values = norms(dense)
    np.testing.assert_allclose(value, expected[0] ** 2, rtol=1e-9)
    np.testing.assert_allclose(values, expected, rtol=1e-11)
    for lower, upper in (bracket, operator_bracket(dense)):
        assert lower <= expected[0] ** 2 <= upper <= lower * (1 + 1e-8)


@pytest.mark.parametrize("spatial", [(5, 4), (2, 2)])  # the taps meet on the second
def test_gradient_is_that_of_the_formula_and_of_finite_differences(spatial, rng):
    kernel, direction = rng.normal(size=(2, 3, 3, 20, 18))

    @functools.partial(jax.jit, static_argnames="method")
    def value_and_slope(kernel, method):
        def constant(kernel):
            return lipschitz_constant(ss.Conv(kernel, spatial, strides=(1, 2)), method=method)

        value, gradient = jax.value_and_grad(constant)(kernel)
        _, forward = jax.jvp(constant, (kernel,), (jnp.asarray(direction),))
        return value, jnp.vdot(gradient, direction), forward

    step = 1e-6
    after = value_and_slope(kernel + step * direction, "formula")[0]
    before = value_and_slope(kernel - step * direction, "formula")[0]
    for method in ("fast", "formula"):
        _, slope, forward = value_and_slope(kernel, method)
        np.testing.assert_allclose(slope, (after - before) / (2 * step), rtol=1e-6)
        np.testing.assert_allclose(forward, slope, rtol=1e-10)


@pytest.mark.parametrize(
    ("features", "options"), [((20, 18), {}), ((9, 40), {"strides": (1, 2)}), ((3, 4), {})]
)
def test_second_derivatives(features, options, rng):
    """Of as many kinds of blocks: by outputs, by inputs, small."""
    kernel, direction = rng.normal(size=(2, 3, 3, *features))

    def slope(kernel):
        constant = lambda kernel: lipschitz_constant(ss.Conv(kernel, (5, 4), **options))  # noqa: E731
        return jax.grad(constant)(kernel)

    @jax.jit
    def slope_and_product(kernel, direction):
        return jax.jvp(slope, (kernel,), (direction,))

    _, product = slope_and_product(kernel, direction)
    reverse = jax.jit(jax.grad(lambda kernel: jnp.vdot(slope(kernel), direction)))(kernel)
    step = 1e-6
    after, before = (
        slope_and_product(kernel + sign * step * direction, direction)[0] for sign in (1, -1)
    )
    np.testing.assert_allclose(product, (after - before) / (2 * step), atol=2e-6)
    np.testing.assert_allclose(reverse, product, atol=1e-9)
    _, single = slope_and_product(*(np.float32(array) for array in (kernel, direction)))
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, product, atol=2e-3 * np.max(np.abs(product)))


def hessian_product(function, point, direction):
    return jax.jvp(jax.grad(function), (point,), (direction,))[1]


@pytest.mark.parametrize("dead", [3, 20])
def test_second_derivatives_beside_eigenvalues_that_repeat(dead, rng):
    """Two dead channels: the smallest singular value is double, the largest is not."""
    kernel = rng.normal(size=(dead + 3, dead + 4))
    kernel[:2] = 0.0
    direction = rng.normal(size=kernel.shape)
    got = hessian_product(lambda k: lipschitz_constant(ss.Dense(k)), jnp.asarray(kernel), direction)

    def slope(kernel):
        left, values, right = np.linalg.svd(kernel)
        return 2 * values[0] * np.outer(left[:, 0], right[0])

    step = 1e-6
    want = (slope(kernel + step * direction) - slope(kernel - step * direction)) / (2 * step)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_third_derivatives_and_vmapped_second_ones(rng):
    kernels, direction = rng.normal(size=(3, 18, 18)), rng.normal(size=(18, 18))

    def second(kernel):
        constant = lambda k: lipschitz_constant(ss.Dense(k))  # noqa: E731
        return hessian_product(constant, kernel, jnp.asarray(direction))

    @jax.jit
    def second_and_third(kernel):
        return jax.jvp(second, (kernel,), (jnp.asarray(direction),))

    mapped = jax.jit(jax.vmap(second))(kernels)
    for one, kernel in zip(mapped, kernels, strict=True):
        np.testing.assert_allclose(one, second_and_third(kernel)[0], atol=1e-9)
    third = second_and_third(kernels[0])[1]
    after, before = (second_and_third(kernels[0] + s * 1e-5 * direction)[0] for s in (1, -1))
    np.testing.assert_allclose(third, (after - before) / 2e-5, atol=1e-5 * np.max(np.abs(third)))


def test_gradient_at_a_tie_is_a_subgradient():
    identity = jnp.zeros((3, 3, 20, 20)).at[1, 1].set(jnp.eye(20))
    gradient = jax.grad(lambda k: lipschitz_constant(ss.Conv(k, (4, 4))))(identity)
    # the constant is homogeneous of degree two, so a subgradient g has <g, kernel> = 2 L
    np.testing.assert_allclose(jnp.vdot(gradient, identity), 2.0, rtol=1e-12)


def test_stacked_layers_by_vmap(rng):
    kernels = jnp.asarray(rng.normal(size=(3, 3, 3, 20, 18)))
    values, brackets = jax.vmap(lambda kernel: fast_and_bracket(kernel, (4, 4)))(kernels)
    slopes = jax.vmap(jax.grad(lambda kernel: lipschitz_constant(ss.Conv(kernel, (4, 4)))))(kernels)
    kernels, slopes = np.asarray(kernels), np.asarray(slopes)
    for k, kernel in enumerate(kernels):
        np.testing.assert_allclose(values[k], literal(kernel, (4, 4)), rtol=1e-9)
        assert brackets.lower[k] <= values[k] * (1 + 1e-9)
        assert values[k] <= brackets.upper[k]
        np.testing.assert_allclose(np.vdot(slopes[k], kernel), 2 * values[k], rtol=1e-9)


def test_numbers_that_are_not_finite_come_through():
    for bad in (jnp.nan, jnp.inf):
        for features in (3, 20):
            kernel = np.ones((3, 3, features, features))
            kernel[0, 1, 2, 0] = bad
            value, bracket = fast_and_bracket(kernel, (4, 4))
            assert not np.isfinite(value)
            assert not np.isfinite(bracket.upper)


def test_unknown_options_are_refused():
    conv = ss.Conv(jnp.ones((3, 3, 1, 1)), (4, 4))
    with pytest.raises(ValueError, match="'fast', 'formula'"):
        lipschitz_constant(conv, method="exact")
    for function in (lipschitz_bracket, singular_values, lipschitz_state):
        with pytest.raises(ValueError, match="'layer', 'padded'"):
            function(conv, grid="circular")
    with pytest.raises(ValueError, match="num_iters"):
        operator_bracket(conv, num_iters=0)
    with pytest.raises(ValueError, match="taps of the layer"):
        lipschitz_refresh(ss.Conv(jnp.ones((3, 1, 1, 1)), (4, 4)), lipschitz_state(conv))


ZERO_PADDED = {
    "same": Geometry((4, 3), (3, 3), 4, 5),
    "strided": Geometry((7, 6), (3, 3), 6, 3, "SAME", strides=(2, 3)),
    "explicit pads": Geometry((5, 4), (3, 2), 3, 4, ((2, 0), (1, 3)), dilation=(1, 2)),
}


@pytest.mark.parametrize("name", ZERO_PADDED)
@pytest.mark.parametrize("dtype", [SINGLE, jnp.float64])
def test_operator_bracket_is_tight_for_small_layers(name, dtype, rng):
    geometry = ZERO_PADDED[name]
    kernel = geometry.kernel(rng).astype(dtype)
    exact = np.linalg.norm(dense_matrix(geometry, kernel.astype(np.float64)), 2) ** 2
    conv = ss.Conv(jnp.asarray(kernel), geometry.spatial_shape, **geometry.options)
    lower, upper = operator_bracket(conv)
    assert float(lower) <= exact <= float(upper)
    assert upper <= lower * (1.003 if dtype == jnp.float32 else 1 + 1e-8)


@pytest.mark.optimized  # the products of such matrices take ten seconds otherwise
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_operator_bracket_of_many_channels_on_few_pixels(dtype, rng):
    """The factors are of an order above a thousand."""
    geometry = Geometry((2, 2), (3, 3), 260, 257)
    kernel = geometry.kernel(rng).astype(dtype)
    exact = np.linalg.norm(dense_matrix(geometry, kernel.astype(np.float64)), 2) ** 2
    conv = ss.Conv(jnp.asarray(kernel), (2, 2))
    lower, upper = operator_bracket(conv)
    assert float(lower) <= exact <= float(upper)
    assert upper <= lower * (1.02 if dtype == jnp.float32 else 1 + 1e-8)


@pytest.mark.parametrize(
    ("geometry", "dtype", "loss"),
    [
        pytest.param(
            Geometry((14, 15), (3, 3), 5, 6), jnp.float32, 3e-3, marks=pytest.mark.optimized
        ),
        (Geometry((14, 15), (3, 3), 6, 5), jnp.float64, 1e-3),
        (Geometry((20, 23), (3, 3), 4, 6, strides=(2, 2)), jnp.float64, 3e-3),
        (Geometry((9, 23), (5, 3), 12, 20, "VALID", strides=(1, 3), groups=2), jnp.float64, 3e-3),
    ],
    ids=["float32", "float64", "strided", "strided and grouped"],
)
def test_operator_bracket_by_lanczos(geometry, dtype, loss, rng, monkeypatch):
    """The steps that large layers take, on one whose dense matrix can still be decomposed."""
    monkeypatch.setattr(written, "DENSE_SIZE", 2**20)
    operator_bracket.clear_cache()
    kernel = geometry.kernel(rng)
    matrix = dense_matrix(geometry, kernel)
    assert matrix.size > 2**20
    gram = matrix @ matrix.T if matrix.shape[0] < matrix.shape[1] else matrix.T @ matrix
    exact = np.linalg.eigvalsh(gram)[-1]
    conv = ss.Conv(jnp.asarray(kernel, dtype), geometry.spatial_shape, **geometry.options)
    lower, upper = operator_bracket(conv, num_iters=40)
    rounded = exact * (1 + 1e-6 * (dtype == jnp.float32))
    assert (1 - loss) * exact <= float(lower) <= rounded
    assert float(upper) >= exact
    assert float(upper) == lipschitz_bracket(conv, grid="padded").upper
    operator_bracket.clear_cache()


def test_refresh_follows_a_moving_kernel(rng):
    kernel = rng.normal(size=(3, 3, 20, 18))
    state = lipschitz_state(ss.Conv(jnp.asarray(kernel), (4, 4)))
    anchors = []
    for step in (0, 1e-4, 1e-3, 1e-3, 1e-1, 1e-4):
        kernel = kernel + step * rng.normal(size=kernel.shape)
        before = state.anchor
        (lower, upper), state = lipschitz_refresh(ss.Conv(jnp.asarray(kernel), (4, 4)), state)
        assert lower <= literal(kernel, (4, 4)) <= upper <= 1.05 * lower
        anchors.append(bool(jnp.all(before == state.anchor)))
    assert anchors == [True, True, True, True, False, True]
