"""Lipschitz constants against singular values of the dense matrix of the layer's own forward pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equivalence.plain_layers import Geometry, dense_matrix
from hypothesis import assume, given
from hypothesis import strategies as st

import stochsolvers as ss
from stochsolvers.lipschitz import (
    feature_lipschitz_constants,
    lipschitz_bracket,
    lipschitz_constant,
    output_lipschitz_constants,
    strong_convexity,
)

CIRCULAR = {
    "odd": Geometry((4, 5), (3, 3), 2, 3, "CIRCULAR"),
    "even": Geometry((5, 4), (2, 4), 3, 2, "CIRCULAR"),
    "strided": Geometry((6, 4), (3, 2), 2, 3, "CIRCULAR", strides=(3, 2)),
    "strided one way": Geometry((4, 6), (3, 3), 3, 2, "CIRCULAR", strides=(1, 2)),
    "dilated": Geometry((5, 4), (3, 2), 2, 2, "CIRCULAR", dilation=(2, 3)),
    "grouped": Geometry((4, 4), (3, 3), 4, 6, "CIRCULAR", groups=2),
    "depthwise strided": Geometry((4, 4), (2, 3), 3, 3, "CIRCULAR", strides=(2, 2), groups=3),
    "wrapping": Geometry((3, 2), (5, 3), 2, 3, "CIRCULAR", dilation=(1, 2)),
    "one pixel": Geometry((1, 1), (3, 3), 4, 3, "CIRCULAR"),
}
each_circular = pytest.mark.parametrize("geometry", CIRCULAR.values(), ids=CIRCULAR)
GRIDS = ("layer", "padded")


def library(geometry, kernel, dtype=jnp.float64):
    return ss.Conv(jnp.asarray(kernel, dtype), geometry.spatial_shape, **geometry.options)


def norm(matrix):
    """Squared spectral norm, by singular values."""
    return np.linalg.norm(matrix, 2) ** 2


def by_feature(matrix, n1):
    """n1 ||A_i||² of the columns of every input feature, the last index of the inputs."""
    return np.array([n1 * norm(matrix[:, i::n1]) for i in range(n1)])


def by_output(matrix, n2):
    """||A_j||² of the rows of every output feature."""
    return np.array([norm(matrix[j::n2]) for j in range(n2)])


@functools.partial(jax.jit, static_argnames="grid")
def constants(conv, *, grid):
    return (
        lipschitz_constant(conv, grid=grid),
        feature_lipschitz_constants(conv, grid=grid),
        output_lipschitz_constants(conv, grid=grid),
    )


@each_circular
def test_circular_constants_are_exact(geometry, rng):
    kernel = geometry.kernel(rng)
    conv, matrix = library(geometry, kernel), dense_matrix(geometry, kernel)
    for grid in GRIDS:
        whole, features, outputs = constants(conv, grid=grid)
        np.testing.assert_allclose(whole, norm(matrix), rtol=1e-11)
        np.testing.assert_allclose(features, by_feature(matrix, geometry.in_features), rtol=1e-11)
        np.testing.assert_allclose(outputs, by_output(matrix, geometry.out_features), rtol=1e-11)


@each_circular
def test_strong_convexity_is_the_smallest_eigenvalue_if_circular(geometry, rng):
    kernel = geometry.kernel(rng)
    matrix = dense_matrix(geometry, kernel)
    smallest = max(np.linalg.eigvalsh(matrix @ matrix.T)[0], 0.0)
    certified = strong_convexity(library(geometry, kernel))
    assert certified <= smallest * (1 + 1e-12)
    np.testing.assert_allclose(certified, smallest, atol=1e-12 * norm(matrix))
    if matrix.shape[0] > matrix.shape[1]:
        assert certified == 0


def test_some_circular_geometry_is_strongly_convex(rng):
    geometry = CIRCULAR["strided"]
    assert strong_convexity(library(geometry, geometry.kernel(rng))) > 1e-2


@jax.jit
def four_numbers(conv):
    value, formula = lipschitz_constant(conv), lipschitz_constant(conv, method="formula")
    return value, formula, lipschitz_bracket(conv), strong_convexity(conv, upper=value)


@pytest.mark.parametrize("seed", [1, 2, 5, 6])
def test_constants_of_random_shapes(seed):
    """More than 16 channels, where one frequency rules out the others; every second kernel decays."""
    rng = np.random.default_rng(seed)
    groups, strides = int(rng.integers(1, 3)), tuple(map(int, rng.integers(1, 3, size=2)))
    spatial = tuple(int(s * n) for s, n in zip(strides, rng.integers(1, 4, size=2), strict=True))
    n1, n2 = (int(groups * n) for n in rng.integers(17, 25, size=2))
    kernel_size = tuple(map(int, rng.integers(1, 5, size=2)))
    geometry = Geometry(spatial, kernel_size, n1, n2, "CIRCULAR", strides, groups=groups)
    kernel = geometry.kernel(rng)
    if seed % 2:
        kernel *= np.arange(1, kernel.shape[2] + 1)[:, None] ** -1.0
    conv, matrix = library(geometry, kernel), dense_matrix(geometry, kernel)
    value, formula, (lower, upper), certified = four_numbers(conv)
    np.testing.assert_allclose(value, norm(matrix), rtol=1e-9)
    np.testing.assert_allclose(formula, norm(matrix), rtol=1e-9)
    assert lower <= norm(matrix) * (1 + 1e-13)
    assert norm(matrix) * (1 - 1e-13) <= upper <= lower * (1 + 1e-8)
    least = max(np.linalg.eigvalsh(matrix @ matrix.T)[0], 0.0)
    assert 0 <= certified <= least + 1e-13 * norm(matrix)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 1), (1, 4)])
def test_dense_constants_are_exact(shape, rng):
    kernel = rng.normal(size=shape)
    dense = ss.Dense(kernel)
    for grid in GRIDS:
        whole, features, outputs = constants(dense, grid=grid)
        np.testing.assert_allclose(whole, norm(kernel), rtol=1e-12)
        np.testing.assert_allclose(features, by_feature(kernel.T, shape[0]))
        np.testing.assert_allclose(outputs, by_output(kernel.T, shape[1]))
    smallest = np.linalg.eigvalsh(kernel.T @ kernel)[0] if shape[1] <= shape[0] else 0.0
    certified = strong_convexity(dense)
    assert 0 <= certified <= smallest + 1e-15
    np.testing.assert_allclose(certified, smallest, atol=1e-12 * norm(kernel))


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_strong_convexity_at_the_ends_of_the_range(dtype):
    floats = jnp.finfo(dtype)
    for scale in (
        1.0,
        float(floats.tiny) ** 0.5,
        float(floats.max) ** 0.5,
        1e4 * float(floats.tiny),
    ):
        kernel = jnp.asarray(np.array([[3.0, 1.0], [1.0, 3.0]]) * (0.4 * scale), dtype)
        exact = np.linalg.svd(np.asarray(kernel, np.longdouble).astype(float), compute_uv=False)
        certified = strong_convexity(ss.Dense(kernel))
        assert 0 <= float(certified) <= float(exact[-1]) ** 2 * (1 + 1e-12)
    assert strong_convexity(ss.Dense(jnp.ones((8, 4), dtype) * float(floats.max) ** 0.7)) == 0
    assert jnp.isnan(strong_convexity(ss.Dense(jnp.full((4, 2), jnp.nan, dtype))))


@pytest.mark.optimized
def test_strong_convexity_of_a_rank_deficient_map_is_not_invented(rng):
    column = rng.normal(size=(6, 1))
    kernel = np.concatenate([column, 3 * column, column], axis=1)  # rank 1: λ_min is exactly 0
    for dtype in (jnp.float32, jnp.float64):
        assert strong_convexity(ss.Dense(jnp.asarray(kernel, dtype))) == 0
    images = ss.Conv(jnp.asarray(np.ones((1, 1, 4, 2))), (3, 3), padding="CIRCULAR")
    assert strong_convexity(images) == 0


@pytest.mark.parametrize("padding", ["SAME", "VALID", ((1, 1), (1, 1))])
def test_strong_convexity_promises_nothing_under_zero_padding(padding, rng):
    conv = ss.Conv(jnp.asarray(rng.normal(size=(3, 3, 2, 2))), (4, 4), padding=padding)
    assert strong_convexity(conv) == 0


def test_strong_convexity_promises_nothing_if_strides_do_not_divide(rng):
    conv = ss.Conv(
        jnp.asarray(rng.normal(size=(3, 3, 9, 2))), (5, 4), padding="CIRCULAR", strides=(2, 2)
    )
    assert strong_convexity(conv) == 0


pads = st.tuples(st.integers(0, 4), st.integers(0, 4))


@st.composite
def geometries(draw):
    groups = draw(st.sampled_from([1, 1, 2]))
    size = st.integers(1, 3)
    return Geometry(
        draw(st.sampled_from([(3, 4), (4, 4), (5, 4)])),
        draw(st.tuples(size, size)),
        2 * groups,
        3 * groups if draw(st.booleans()) else groups,
        draw(st.sampled_from(["SAME", "CIRCULAR"]) | st.tuples(pads, pads)),
        draw(st.tuples(size, size)),
        draw(st.sampled_from([(1, 1), (2, 1), (1, 2)])),
        groups,
    )


@given(geometries(), st.integers(0, 10**6))
def test_padded_grid_is_an_upper_bound(geometry, seed):
    rng = np.random.default_rng(seed)
    extents = [
        d * (k - 1) + 1 for k, d in zip(geometry.kernel_size, geometry.dilation, strict=True)
    ]
    if not isinstance(geometry.padding, str):
        sizes = zip(geometry.spatial_shape, geometry.padding, extents, strict=True)
        assume(all(n + sum(pair) >= k for n, pair, k in sizes))  # some output pixel
    kernel = geometry.kernel(rng)
    if seed % 2:
        kernel = np.abs(kernel)  # the top singular vector then has no sign changes to hide in
    conv, matrix = library(geometry, kernel), dense_matrix(geometry, kernel)
    slack = 1 + 1e-11
    whole, features, outputs = constants(conv, grid="padded")
    assert norm(matrix) <= whole * slack
    assert np.all(by_feature(matrix, geometry.in_features) <= features * slack)
    assert np.all(by_output(matrix, geometry.out_features) <= outputs * slack)


@pytest.mark.parametrize(
    "geometry",
    [
        Geometry((4, 4), (2, 2), 2, 3, ((7, 5), (6, 0))),
        Geometry((4, 4), (3, 3), 2, 3, ((5, 5), (5, 5)), strides=(2, 3)),
        Geometry((5, 4), (3, 3), 2, 3, "VALID", dilation=(2, 1)),
        Geometry((5, 4), (3, 3), 2, 3, "CIRCULAR", strides=(2, 3)),
        Geometry((4, 4), (1, 2), 2, 3, "SAME", strides=(3, 3)),
    ],
)
def test_padded_grid_bounds_the_corner_cases(geometry, rng):
    kernel = np.abs(geometry.kernel(rng))
    bound = lipschitz_constant(library(geometry, kernel), grid="padded")
    exact = norm(dense_matrix(geometry, kernel))
    assert exact <= bound * (1 + 1e-11)
    assert bound <= 9 * exact  # a bound, not a triviality


def test_pads_that_hold_the_whole_convolution_make_the_padded_grid_nearly_tight(rng):
    """With full padding the layer is injective into its torus: the bound's slack is the torus' rim."""
    geometry = Geometry((12, 12), (3, 3), 1, 1, ((2, 2), (2, 2)))
    kernel = np.abs(geometry.kernel(rng))
    bound = lipschitz_constant(library(geometry, kernel), grid="padded")
    exact = norm(dense_matrix(geometry, kernel))
    assert exact <= bound <= 1.25 * exact


def test_layer_grid_can_be_too_small_under_zero_padding():
    """Lemma 2 on the layer's own grid, as printed, is not an upper bound for a zero-padded layer.

    On a 4 × 4 grid with the 3 × 3 kernel below it misses a fifth of the squared norm, and a gradient
    step of 1/L is then too long. The padded grid is a bound.
    """
    geometry = Geometry((4, 4), (3, 3), 1, 1, "SAME")
    kernel = np.array([[0.0, -1.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 1.0]])[:, :, None, None]
    conv, exact = library(geometry, kernel), norm(dense_matrix(geometry, kernel))
    np.testing.assert_allclose(lipschitz_constant(conv) / exact, 0.804, atol=1e-3)
    assert lipschitz_constant(conv, grid="padded") >= exact


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("features", "dilation"), [((2, 3), (1, 1)), ((3, 2), (2, 1))])
def test_zero_padding_is_the_literal_formula(grid, features, dilation, rng):
    """max over all (u, v) of λ_max(Â(:,:,u,v) Â(:,:,u,v)ᴴ) with the flipped kernel, in numpy."""
    kernel = rng.normal(size=(3, 2, *features))
    filters = np.zeros((2 * dilation[0] + 1, dilation[1] + 1, *features))
    filters[:: dilation[0], :: dilation[1]] = kernel
    shape = (5, 5) if grid == "layer" else (5 + len(filters) - 1, 5 + 2 - 1)
    a_hat = np.fft.fft2(filters[::-1, ::-1], s=shape, axes=(0, 1))
    gram = np.einsum("uvij,uvik->uvjk", a_hat, a_hat.conj())
    literal = np.linalg.eigvalsh(gram)[..., -1].max()
    conv = ss.Conv(jnp.asarray(kernel), (5, 5), padding="SAME", kernel_dilation=dilation)
    np.testing.assert_allclose(lipschitz_constant(conv, grid=grid), literal, rtol=1e-12)


@pytest.mark.parametrize(
    "geometry", [CIRCULAR["strided"], Geometry((4, 4), (3, 3), 2, 2, "SAME")], ids=["fold", "same"]
)
def test_gradient_by_finite_differences(geometry, rng):
    kernel, direction = geometry.kernel(rng), geometry.kernel(rng)
    step = 1e-6

    @jax.jit
    def total(kernel):
        whole, features, outputs = constants(library(geometry, kernel), grid="padded")
        return whole + 0.7 * jnp.sum(features) + 0.3 * jnp.sum(outputs**2)

    slope = (total(kernel + step * direction) - total(kernel - step * direction)) / (2 * step)
    gradient = jax.jit(jax.grad(total))(jnp.asarray(kernel))
    np.testing.assert_allclose(np.vdot(gradient, direction), slope, rtol=1e-6)


def test_gradient_at_equal_eigenvalues_is_finite():
    orthogonal = jnp.eye(3)
    assert np.all(np.isfinite(jax.grad(lambda k: lipschitz_constant(ss.Dense(k)))(orthogonal)))
    delta = jnp.zeros((3, 3, 2, 2)).at[1, 1].set(jnp.eye(2))  # the identity as a convolution
    gradient = jax.jit(jax.grad(lambda k: lipschitz_constant(ss.Conv(k, (4, 4)))))(delta)
    assert np.all(np.isfinite(gradient))
    # the constant is homogeneous of degree two, so a subgradient g has <g, kernel> = 2 L
    np.testing.assert_allclose(jnp.vdot(gradient, delta), 2.0, rtol=1e-12)


@pytest.mark.optimized
@pytest.mark.parametrize("grid", GRIDS)
def test_single_precision(grid, rng):
    kernel = rng.normal(size=(3, 3, 8, 16))
    narrow = ss.Conv(jnp.asarray(kernel, jnp.float32), (8, 8))
    wide = ss.Conv(jnp.asarray(kernel, jnp.float32).astype(jnp.float64), (8, 8))
    coarse = ss.Conv(jnp.asarray(kernel, jnp.bfloat16), (8, 8))
    rounded = ss.Conv(coarse.kernel.astype(jnp.float64), (8, 8))
    compiled = jax.jit(lambda conv: lipschitz_constant(conv, grid=grid))
    assert compiled(narrow).dtype == compiled(coarse).dtype == jnp.float32
    np.testing.assert_allclose(compiled(narrow), compiled(wide), rtol=2e-6)
    np.testing.assert_allclose(compiled(coarse), compiled(rounded), rtol=2e-6)


def test_zero_kernel():
    for linear_map in (ss.Dense(jnp.zeros((3, 2))), ss.Conv(jnp.zeros((3, 3, 2, 2)), (4, 4))):
        assert lipschitz_constant(linear_map) == 0
        assert not np.any(feature_lipschitz_constants(linear_map))
        assert not np.any(output_lipschitz_constants(linear_map))
        assert strong_convexity(linear_map) == 0


def test_unknown_grid_is_refused():
    for function in (
        lipschitz_constant,
        feature_lipschitz_constants,
        output_lipschitz_constants,
    ):
        with pytest.raises(ValueError, match="'layer', 'padded'"):
            function(ss.Conv(jnp.ones((3, 3, 1, 1)), (4, 4)), grid="circular")
        with pytest.raises(ValueError, match="'layer', 'padded'"):
            function(ss.Dense(jnp.ones((3, 2))), grid="full")
