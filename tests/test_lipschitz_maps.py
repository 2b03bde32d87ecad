"""Norms, brackets, singular values and convexity of every kind of linear map, against matrices in numpy.

The matrices of convolutions are written entry by entry, with nothing of the library.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import convolution_matrix

import stochsolvers as ss
from stochsolvers import linear_maps
from stochsolvers.linear_maps import Contraction, Transposed
from stochsolvers.lipschitz import (
    Bracket,
    feature_lipschitz_constants,
    lipschitz_bracket,
    lipschitz_constant,
    lipschitz_refresh,
    lipschitz_state,
    operator_bracket,
    output_lipschitz_constants,
    singular_values,
    strong_convexity,
)

# whose round-off is tested as users have it
SINGLE = pytest.param(jnp.float32, marks=pytest.mark.optimized)


def pads_of(n, k, stride, padding):
    """(low, high) of one axis for a filter of extent k."""
    if padding == "SAME":
        total = max((-(-n // stride) - 1) * stride + k - n, 0)
        return total // 2, total - total // 2
    return {"CIRCULAR": ((k - 1) // 2, k // 2), "VALID": (0, 0)}[padding]


@dataclasses.dataclass(frozen=True)
class Case:
    spatial: tuple
    taps: tuple
    features: tuple
    strides: tuple = ()
    dilation: tuple = ()
    groups: int = 1
    padding: str = "CIRCULAR"

    def build(self, rng, dtype=np.float64):
        ones = (1,) * len(self.spatial)
        strides, dilation = self.strides or ones, self.dilation or ones
        shape = (*self.taps, self.features[0] // self.groups, self.features[1])
        kernel = rng.normal(size=shape).astype(dtype)
        conv = ss.Conv(
            jnp.asarray(kernel),
            self.spatial,
            strides=strides,
            kernel_dilation=dilation,
            padding=self.padding,
            feature_group_count=self.groups,
        )
        axes = zip(self.spatial, self.taps, strides, dilation, strict=True)
        pads = [pads_of(n, d * (k - 1) + 1, s, self.padding) for n, k, s, d in axes]
        wide, wrap = kernel.astype(np.float64), self.padding == "CIRCULAR"
        geometry = (self.spatial, strides, pads, dilation, self.groups)
        return conv, convolution_matrix(wide, *geometry, wrap=wrap).T  # (inputs, outputs)


CIRCULAR = {
    "1-D": Case((7,), (3,), (3, 4)),
    "1-D strided": Case((9,), (4,), (2, 3), strides=(3,)),
    "1-D dilated, grouped": Case((8,), (3,), (4, 2), dilation=(2,), groups=2),
    "1-D wrapping": Case((3,), (5,), (2, 3)),
    "1-D of many channels": Case((4,), (3,), (18, 20)),
    "1-D of many points": Case((8,), (2,), (18, 17)),  # whose blocks are interpolated from a few
    "2-D": Case((4, 3), (3, 2), (3, 2)),
    "3-D": Case((3, 4, 2), (2, 3, 2), (2, 3)),
    "3-D strided": Case((4, 2, 3), (2, 2, 3), (2, 3), strides=(2, 1, 3)),
    "3-D dilated, grouped": Case((4, 3, 2), (2, 1, 2), (4, 4), dilation=(2, 1, 1), groups=2),
    "3-D of many channels": Case((2, 2, 2), (2, 2, 1), (17, 18)),
}
PADDED = {
    "1-D same": Case((9,), (3,), (3, 4), padding="SAME"),
    "1-D valid, strided": Case((9,), (3,), (3, 4), strides=(2,), padding="VALID"),
    "3-D same": Case((3, 4, 2), (3, 2, 3), (2, 3), padding="SAME"),
    "3-D strided": Case((5, 4, 3), (2, 3, 2), (2, 2), strides=(2, 3, 1), padding="SAME"),
}


def squared(matrix):
    return np.linalg.norm(matrix, 2) ** 2


def by_input(matrix, n1):
    """||A_i||² of the rows of every input feature, the last index of the inputs."""
    return np.array([squared(matrix[i::n1]) for i in range(n1)])


@functools.partial(jax.jit, static_argnames=("grid", "brief", "operator"))
def everything(linear_map, grid="layer", brief=False, operator=True):
    """Every number; if `brief`, those that a transposed map does not simply take from its base.

    `operator_bracket` is of the matrix, which is written out: of a circular convolution it sees nothing else.
    """
    found = {
        "features": feature_lipschitz_constants(linear_map, grid=grid),
        "outputs": output_lipschitz_constants(linear_map, grid=grid),
        "convexity": strong_convexity(linear_map),
    }
    if brief:
        return found
    if operator:
        found["operator"] = operator_bracket(linear_map)
    return found | {
        "constant": lipschitz_constant(linear_map, grid=grid),
        "formula": lipschitz_constant(linear_map, grid=grid, method="formula"),
        "bracket": lipschitz_bracket(linear_map, grid=grid),
        "values": singular_values(linear_map, grid=grid),
    }


def check_exact(linear_map, matrix, dtype=np.float64, **options):
    """Every number of a map whose matrix (inputs, outputs) is known."""
    tight = 1e-9 if dtype == np.float64 else 2e-5
    found, norm = everything(linear_map, **options), squared(matrix)
    n1, n2 = linear_map.in_features, linear_map.out_features
    np.testing.assert_allclose(found["features"], n1 * by_input(matrix, n1), rtol=tight)
    np.testing.assert_allclose(found["outputs"], by_input(matrix.T, n2), rtol=tight)
    values = np.linalg.svd(matrix, compute_uv=False)
    least = values[-1] ** 2 if matrix.shape[1] <= matrix.shape[0] else 0.0
    assert 0 <= float(found["convexity"]) <= least + 1e-15 * norm
    assert float(found["convexity"]) >= least - (5e-3 if dtype == np.float32 else 1e-8) * norm
    if "constant" not in found:
        return
    for name in ("constant", "formula"):
        np.testing.assert_allclose(found[name], norm, rtol=tight)
    for name in {"bracket", "operator"} & set(found):
        lower, upper = found[name]
        assert float(lower) <= norm <= float(upper) <= float(lower) * (1 + 300 * tight)
        assert found[name].method == "exact"
        assert found[name].failure_probability == 0
    got = np.asarray(found["values"])
    slack = 1e-5 * np.sqrt(norm) if dtype == np.float32 else 1e-7 * np.sqrt(norm)
    np.testing.assert_allclose(got, values[: len(got)], atol=slack)
    assert np.all(values[len(got) :] <= slack)  # groups of unequal sides


@pytest.mark.parametrize("name", CIRCULAR)
def test_circular_convolutions_and_their_transposes(name, rng):
    conv, matrix = CIRCULAR[name].build(rng)
    operator = name in ("2-D", "3-D strided", "3-D dilated, grouped", "1-D of many channels")
    check_exact(conv, matrix, operator=operator)
    check_exact(Transposed(conv), matrix.T, brief=name != "3-D strided")


@pytest.mark.optimized
@pytest.mark.parametrize("name", ["1-D of many channels", "3-D", "3-D strided"])
def test_single_precision(name, rng):
    conv, matrix = CIRCULAR[name].build(rng, np.float32)
    check_exact(conv, matrix, np.float32, operator=name == "3-D")


@pytest.mark.parametrize("name", PADDED)
def test_zero_padding(name, rng):
    conv, matrix = PADDED[name].build(rng)
    norm, n1, n2 = squared(matrix), conv.in_features, conv.out_features
    for linear_map, known in ((conv, matrix), (conv.T, matrix.T)):
        brief = linear_map is not conv and name != "3-D strided"
        found = everything(linear_map, "padded", brief=brief)
        if not brief:
            assert norm <= found["constant"] * (1 + 1e-11)
            np.testing.assert_allclose(found["constant"], found["formula"], rtol=1e-9)
            lower, upper = found["operator"]
            assert float(lower) <= norm <= float(upper) <= float(lower) * (1 + 1e-8)
            assert norm <= found["bracket"].upper
        assert found["convexity"] == 0
        slack = 1 + 1e-11
        assert np.all(n1 * by_input(known, n1) <= np.asarray(found["features"]) * slack)
        assert np.all(by_input(known.T, n2) <= np.asarray(found["outputs"]) * slack)
        n1, n2 = n2, n1


# contractions and maps of a user's own


def blockwise(kernel):
    """x (2, groups, c) by a kernel (groups, c, n), the same at both positions."""
    groups, c, _ = kernel.shape
    return Contraction("...pgc,gcn->...pgn", kernel, (2, groups, c))


@ss.value_object
class Blur(ss.LinearMap):
    """Circular blur of an image by its Fourier transform."""

    kernel: jax.Array

    @property
    def in_shape(self):
        return (*self.kernel.shape, 1)

    out_shape = in_shape

    def __call__(self, x):
        transfer = jnp.fft.rfft2(self.kernel)
        transfer = jnp.expand_dims(transfer, range(x.ndim - 3))
        spectrum = jnp.fft.rfft2(x[..., 0]) * transfer
        return jnp.fft.irfft2(spectrum, s=self.kernel.shape)[..., None].astype(x.dtype)


@ss.value_object
class Sum(ss.LinearMap):
    """A + B."""

    one: ss.LinearMap
    other: ss.LinearMap

    @property
    def in_shape(self):
        return self.one.in_shape

    @property
    def out_shape(self):
        return self.one.out_shape

    def __call__(self, x):
        return self.one(x) + self.other(x)


@ss.value_object
class Diagonal(ss.LinearMap):
    """x ↦ d ⊙ x."""

    entries: jax.Array
    bound: jax.Array | None = None

    @property
    def in_shape(self):
        return self.entries.shape

    out_shape = in_shape

    def __call__(self, x):
        return x * self.entries.reshape((1,) * (x.ndim - self.entries.ndim) + self.entries.shape)

    def squared_norm_bound(self):
        return self.bound


def blur_matrix(kernel):
    """(inputs, outputs) of the circular convolution with `kernel`."""
    shape = kernel.shape
    matrix = np.zeros((*shape, *shape))
    for p, a in itertools.product(np.ndindex(*shape), np.ndindex(*shape)):
        q = tuple((x - y) % n for x, y, n in zip(p, a, shape, strict=True))
        matrix[(*q, *p)] = kernel[a]
    return matrix.reshape(kernel.size, -1)


@pytest.mark.parametrize("shape", [(2, 5, 3), (1, 20, 18), (3, 2, 4), (1, 18, 20)])
def test_contractions(shape, rng):
    kernel = rng.normal(size=shape)
    linear_map = blockwise(jnp.asarray(kernel))
    groups, c, n = shape
    matrix = np.zeros((groups, c, groups, n))
    for g in range(groups):
        matrix[g, :, g] = kernel[g]
    whole = np.kron(np.eye(2), matrix.reshape(groups * c, -1))
    check_exact(linear_map, whole)
    check_exact(linear_map.T, whole.T, brief=True)


def test_contractions_that_sum(rng):
    kernel = rng.normal(size=(3, 4, 5)).astype(np.float32)
    matrix = kernel.astype(np.float64).sum(axis=0)
    for equation, shape, whole in (
        ("pc,kcn->pn", (2, 4), np.kron(np.eye(2), matrix)),
        ("sc,kcn->n", (2, 4), np.concatenate([matrix] * 2)),
    ):
        lower, upper = lipschitz_bracket(Contraction(equation, jnp.asarray(kernel), shape))
        assert float(lower) <= squared(whole) <= float(upper) <= 1.001 * float(lower)


def test_a_function_and_its_derivative(rng):
    kernel, direction = (jnp.asarray(rng.normal(size=6)) for _ in range(2))
    matrix = np.diag(np.cumsum(np.asarray(kernel))) + np.eye(6, k=1)

    def of(kernel):
        return linear_maps.linear_map(
            lambda k, x: jnp.cumsum(k) * x + jnp.roll(x, 1).at[0].set(0), (6,), kernel
        )

    check_exact(of(kernel), matrix, brief=True)
    np.testing.assert_allclose(lipschitz_constant(of(kernel)), squared(matrix), rtol=1e-9)
    gradient = jax.grad(lambda k: lipschitz_constant(of(k)))(kernel)
    slope = slope_of(lambda k: lipschitz_constant(of(k)), kernel, direction)
    np.testing.assert_allclose(np.vdot(gradient, direction), slope, rtol=1e-6)


def test_an_fft_blur_and_a_sum_of_two_maps(rng):
    kernel, image = rng.normal(size=(5, 4)), rng.normal(size=(5, 4))
    blur, matrix = Blur(jnp.asarray(kernel)), blur_matrix(kernel)
    np.testing.assert_allclose(blur(image[..., None]).ravel(), image.ravel() @ matrix, atol=1e-12)
    check_exact(blur, matrix)
    conv, of_conv = Case((5, 4), (3, 2), (1, 1), padding="SAME").build(rng)
    check_exact(Sum(blur, conv), matrix + of_conv)
    check_exact(Sum(blur, conv).T, (matrix + of_conv).T, brief=True)


def test_more_inputs_than_outputs_are_written_out_from_the_outputs(rng):
    kernel = rng.normal(size=(6, 2))
    tall = Sum(ss.Dense(jnp.asarray(kernel)), ss.Dense(jnp.asarray(kernel)))
    check_exact(tall, 2 * kernel)
    wide = jax.eval_shape(lipschitz_constant, Sum(*[ss.Dense(jnp.ones((2**20, 2)))] * 2))
    assert wide.shape == ()  # and no identity of 2^20 rows


@pytest.mark.optimized
def test_blur_in_single_precision(rng):
    for _ in range(5):
        kernel = rng.normal(size=(8, 8)).astype(np.float32)
        truth = np.abs(np.fft.fft2(kernel.astype(np.float64))).max() ** 2
        lower, upper = lipschitz_bracket(Blur(jnp.asarray(kernel)))
        assert float(lower) <= truth <= float(upper) <= 1.01 * float(lower)


# too large to be written out


@pytest.mark.parametrize("dtype", [SINGLE, np.float64])
def test_large_maps_by_lanczos(dtype, rng):
    kernel = (rng.normal(size=(52, 48)) + 0.3).astype(dtype)
    blur = Blur(jnp.asarray(kernel))
    truth = np.abs(np.fft.fft2(kernel.astype(np.float64))).max() ** 2
    for linear_map in (blur, blur.T):
        for bracket in (lipschitz_bracket(linear_map), operator_bracket(linear_map, num_iters=64)):
            assert bracket.method == "probability"
            assert bracket.failure_probability == 1e-6
            lower, upper = bracket
            assert lower.dtype == dtype
            assert float(lower) <= truth <= float(upper) <= 1.05 * float(lower)
        estimate = lipschitz_constant(linear_map)
        np.testing.assert_allclose(estimate, truth, rtol=1e-4)
        safe = lipschitz_constant(linear_map, grid="padded")
        assert truth <= float(safe) <= 1.05 * truth
        np.testing.assert_allclose(feature_lipschitz_constants(linear_map), [safe], rtol=1e-5)
        assert strong_convexity(linear_map) == 0
        bracket, _ = lipschitz_refresh(linear_map, lipschitz_state(linear_map))
        assert float(bracket.lower) <= truth <= float(bracket.upper)
    for call in (singular_values, functools.partial(lipschitz_constant, method="formula")):
        with pytest.raises(ValueError, match="at most 4194304 entries, got 6230016"):
            call(blur)


def test_a_bound_of_the_map_is_used(rng):
    entries = jnp.asarray(rng.uniform(size=2100))
    truth = float(jnp.max(entries**2))
    for bound, upper in ((2.0, 2.0), (0.5 * truth, np.inf)):
        linear_map = Diagonal(entries, jnp.asarray(bound))
        bracket = operator_bracket(linear_map)
        assert bracket.method == "bound"
        assert bracket.lower <= truth
        assert bracket.upper == upper
        if np.isfinite(upper):
            assert lipschitz_constant(linear_map, grid="padded") == upper
        assert lipschitz_constant(linear_map) == bound
        slope = jax.grad(lambda m: lipschitz_constant(m, grid="padded"))(linear_map)
        assert slope.bound == 1
        assert operator_bracket(linear_map.T).upper == upper


def test_the_probable_bound_over_many_starts():
    """Eigenvalues that fill an interval: few steps leave the Ritz value 1 % to 20 % low."""
    entries = jnp.sqrt(jnp.linspace(0.0, 1.0, 2100))
    keys = jax.random.split(jax.random.key(0), 300)
    for num_iters, failure in ((4, 0.5), (8, 0.1), (16, 1e-6)):

        def bracket(key, num_iters=num_iters, failure=failure):
            return operator_bracket(
                Diagonal(entries), key=key, num_iters=num_iters, failure_probability=failure
            )

        lower, upper = jax.jit(lambda keys, bracket=bracket: jax.lax.map(bracket, keys))(keys)
        assert np.all(lower <= 1.0)
        assert np.mean(upper < 1.0) <= failure
        root = np.log(1.648 * np.sqrt(2100) / failure) / (2 * num_iters - 1)
        expected = 1 / (1 - root**2) if root < 1 else np.inf
        np.testing.assert_allclose(upper / lower, expected, rtol=1e-11)


@pytest.mark.optimized
def test_spectra_that_are_hard_for_lanczos():
    size = 2100
    for entries in (
        jnp.zeros(size),
        jnp.ones(size),
        jnp.zeros(size).at[5].set(1.0),
        jnp.ones(size).at[5].set(1.001),
        jnp.full(size, 1e-30),
        jnp.full(size, 1e30),
        jnp.geomspace(1.0, 1e-12, size),
    ):
        for dtype in (jnp.float32, jnp.float64):
            entries = entries.astype(dtype)
            truth = float(jnp.max(entries.astype(jnp.float64))) ** 2
            lower, upper = operator_bracket(Diagonal(entries), num_iters=32)
            assert float(lower) <= truth <= float(upper)
            if 1e-37 < truth < 1e37:
                assert float(upper) <= 1.2 * float(lower)


# derivatives, transformations, dtypes, strict modes


def slope_of(function, kernel, direction, step=1e-6):
    return (function(kernel + step * direction) - function(kernel - step * direction)) / (2 * step)


def test_gradients_by_finite_differences(rng):
    stride = Case((4, 2, 2), (2, 1, 2), (2, 3), strides=(2, 1, 1))
    maps = {
        "3-D": (lambda k: dataclasses.replace(stride.build(rng)[0], kernel=k), (2, 1, 2, 2, 3)),
        "1-D transposed": (lambda k: ss.Conv(k, (7,), padding="SAME").T, (3, 3, 4)),
        "contraction": (blockwise, (2, 4, 3)),
        "matrix-free": (Blur, (5, 4)),
        "matrix-free, large": (Blur, (52, 48)),
    }
    for name, (make, shape) in maps.items():
        kernel, direction = (jnp.asarray(rng.normal(size=shape)) for _ in range(2))
        if "large" in name:
            kernel = kernel + 0.3  # its largest singular value is simple
        grid = "padded" if name == "1-D transposed" else "layer"

        def constant(kernel, make=make, grid=grid):
            return lipschitz_constant(make(kernel), grid=grid)

        gradient = jax.jit(jax.grad(constant))(kernel)
        slope = slope_of(constant, kernel, direction)
        np.testing.assert_allclose(np.vdot(gradient, direction), slope, rtol=1e-6, err_msg=name)


def test_derivatives_of_the_safe_constant_of_a_large_map(rng):
    kernel, direction = (jnp.asarray(rng.normal(size=(52, 48))) for _ in range(2))
    kernel = kernel + 0.3

    def safe(kernel):
        return lipschitz_constant(Blur(kernel), grid="padded")

    gradient = jax.grad(safe)(kernel)
    np.testing.assert_allclose(np.vdot(gradient, kernel), 2 * safe(kernel), rtol=1e-9)
    _, forward = jax.jvp(safe, (kernel,), (direction,))
    np.testing.assert_allclose(forward, np.vdot(gradient, direction), rtol=1e-9)


def test_brackets_unpack_and_pass_through_transformations(rng):
    kernels = jnp.asarray(rng.normal(size=(3, 5, 4)))
    one = lipschitz_bracket(ss.Dense(kernels[0]))
    lower, upper = one
    assert len(one) == 2
    assert (one[0], one[1]) == (lower, upper) == (one.lower, one.upper)
    assert one == Bracket(lower, upper)
    assert "exact" in repr(one)
    for each in (
        jax.vmap(lambda k: lipschitz_bracket(ss.Dense(k)))(kernels),
        jax.lax.map(lambda k: lipschitz_bracket(ss.Dense(k)), kernels),
        jax.jit(jax.vmap(lambda k: operator_bracket(ss.Dense(k))))(kernels),
    ):
        assert each.method == "exact"
        assert each.lower.shape == each.upper.shape == (3,)
        np.testing.assert_allclose(each.lower[0], lower, rtol=1e-12)
    large = jax.vmap(lambda scale: operator_bracket(Diagonal(scale * jnp.ones(2100))))(jnp.ones(2))
    assert large.method == "probability"
    assert large.upper.shape == (2,)


def test_a_second_map_of_the_same_kind_compiles_nothing(rng):
    traces = []

    @ss.value_object
    class Counted(Diagonal):
        def __call__(self, x):
            traces.append(x.shape)
            return super().__call__(x)

    for size in (6, 2100):
        for function in (lipschitz_constant, lipschitz_bracket, operator_bracket, strong_convexity):
            function(Counted(jnp.ones(size)))
            before = len(traces)
            function(Counted(2 * jnp.ones(size)))
            assert len(traces) == before


def test_bfloat16_kernels(rng):
    def narrow(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)

    @jax.jit
    def numbers(linear_map):
        constants = [lipschitz_constant(linear_map, grid=grid) for grid in ("layer", "padded")]
        others = strong_convexity(linear_map), feature_lipschitz_constants(linear_map)
        return constants, operator_bracket(linear_map), others

    for linear_map in (
        ss.Conv(narrow(3, 2, 3), (5,)),
        ss.Conv(narrow(3, 2, 3), (5,)).T,
        blockwise(narrow(2, 3, 4)),
        Diagonal(narrow(6)),
        Diagonal(narrow(2100)),
    ):
        constants, (lower, upper), others = numbers(linear_map)
        wide, exact, _ = numbers(linear_map.astype(jnp.float64))
        np.testing.assert_allclose(constants, wide, rtol=1e-3)
        assert float(lower) <= float(exact.upper)
        assert float(exact.lower) <= float(upper)
        for found in (*constants, lower, upper, *others):
            assert found.dtype == jnp.float32


def test_strict_modes(rng):
    """They raise while tracing: nothing is compiled."""
    kernels = (
        rng.normal(size=shape).astype(np.float32) for shape in ((3, 20, 18), (2, 3, 2, 3, 4))
    )
    long, solid = (jnp.asarray(kernel) for kernel in kernels)
    maps = [
        ss.Conv(long, (5,), padding="CIRCULAR"),
        ss.Conv(solid, (2, 3, 2), strides=(1, 1, 2)).T,
        ss.Dense(long[0]),
        Diagonal(long[0, :2, 0]),
        Diagonal(jnp.ones(2100, jnp.float32)),
    ]

    def evaluate(linear_map):
        found = [
            lipschitz_constant(linear_map),
            jax.grad(lambda m: lipschitz_constant(m, grid="padded"), allow_int=True)(linear_map),
            lipschitz_bracket(linear_map),
            operator_bracket(linear_map),
            feature_lipschitz_constants(linear_map),
            output_lipschitz_constants(linear_map),
            strong_convexity(linear_map),
            lipschitz_refresh(linear_map, lipschitz_state(linear_map)),
        ]
        if linear_map.in_features != 2100:
            found += [singular_values(linear_map), lipschitz_constant(linear_map, method="formula")]
        return found

    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        for linear_map in maps:
            jax.eval_shape(evaluate, linear_map)


# maps and kernels that are not in order


def test_maps_that_are_not_what_they_claim():
    @ss.value_object
    class Wrong(Diagonal):
        def __call__(self, x):
            return x[..., :3]

    @ss.value_object
    class Complex(Diagonal):
        def __call__(self, x):
            return jnp.fft.fft(x)

    for size in (6, 2100):
        for function in (lipschitz_constant, lipschitz_bracket, operator_bracket):
            with pytest.raises(ValueError, match="shape of result of Wrong"):
                function(Wrong(jnp.ones(size)))
            with pytest.raises(ValueError, match="dtype of result of Complex"):
                function(Complex(jnp.ones(size)))
    with pytest.raises(ValueError, match="failure_probability"):
        operator_bracket(Diagonal(jnp.ones(3)), failure_probability=0.0)


def test_a_wrong_adjoint_makes_no_false_bound(rng):
    @ss.value_object
    class Half(Diagonal):
        def adjoint(self, z):
            return 0.5 * self(z)

    for size in (6, 2100):
        lower, upper = operator_bracket(Half(2 * jnp.ones(size)))
        assert lower <= 4.0 <= upper


@pytest.mark.parametrize("size", [6, 20, 2100])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_maps_that_are_not_finite(size, bad):
    entries = jnp.ones(size).at[2].set(bad)
    for linear_map in (Diagonal(entries), Diagonal(entries, jnp.asarray(5.0))):
        for function in (lipschitz_bracket, operator_bracket):
            lower, upper = function(linear_map)
            assert not jnp.isfinite(upper)
            assert not lower > 0 or not jnp.isfinite(lower)
        assert not jnp.isfinite(lipschitz_constant(linear_map, grid="padded"))


@pytest.mark.parametrize(
    "dtype", [pytest.param(np.float32, marks=pytest.mark.optimized), np.float64]
)
@pytest.mark.parametrize("order", [3, 17, 64])
def test_no_convexity_is_invented(order, dtype):
    """Zero, rank one, and round-off that leaves nothing: the least eigenvalue is 0."""
    ones, identity = np.ones((order, order), dtype), np.eye(order, dtype=dtype)
    identity[0, 0] = 0
    for kernel in (0 * ones, ones, ones * dtype(1e-30), identity):
        assert strong_convexity(ss.Dense(kernel)) == 0
        for upper in (np.finfo(dtype).tiny, 1.0, np.inf, np.nan):
            assert strong_convexity(ss.Dense(kernel), upper=dtype(upper)) == 0
        assert strong_convexity(ss.Dense(kernel).T) == 0
    if order < 64:  # as in one block of that order
        images = ss.Conv(0 * ones[None, None], (3, 2), padding="CIRCULAR")
        assert strong_convexity(images) == 0


@pytest.mark.optimized
@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e18])
def test_constants_at_the_ends_of_the_range(scale, rng):
    """Squares within the range of float32, products on the way to them outside."""
    for case in (Case((4, 3), (3, 2), (3, 2)), Case((6,), (2,), (2, 3), strides=(2,))):
        conv, matrix = case.build(rng, np.float32)
        conv = dataclasses.replace(conv, kernel=conv.kernel * (0.3 * scale))
        norm = squared(matrix) * 0.09 * scale**2
        n1, n2 = case.features
        for method in ("fast", "formula"):
            found, slope = jax.value_and_grad(lipschitz_constant)(conv, method=method)
            np.testing.assert_allclose(found, norm, rtol=1e-5)
            inner = np.vdot(np.asarray(slope.kernel, float), np.asarray(conv.kernel, float))
            # entries of the gradient are products with scale², the smallest ones subnormal
            np.testing.assert_allclose(inner, 2 * norm, rtol=1e-4, atol=3e-38)
        unit = 0.3 * scale
        np.testing.assert_allclose(
            feature_lipschitz_constants(conv), n1 * by_input(matrix * unit, n1), rtol=1e-4
        )
        np.testing.assert_allclose(
            output_lipschitz_constants(conv), by_input(matrix.T * unit, n2), rtol=1e-4
        )
        expected = np.linalg.svd(matrix * unit, compute_uv=False)
        np.testing.assert_allclose(singular_values(conv), expected, atol=1e-5 * expected[0])


def test_refresh_of_every_kind(rng):
    makers = {
        "transposed": (lambda k: ss.Conv(k, (5,)).T, (3, 20, 18)),
        "contraction": (blockwise, (2, 4, 3)),
        "matrix-free": (Blur, (4, 4)),
        "large": (Blur, (52, 48)),
    }
    for make, shape in makers.values():
        kernel = jnp.asarray(rng.normal(size=shape)) + 0.3
        state = lipschitz_state(make(kernel))
        for _ in range(3):
            kernel = kernel * (1 + 1e-3 * rng.normal(size=shape))
            (lower, upper), state = lipschitz_refresh(make(kernel), state)
            value = lipschitz_constant(make(kernel))
            assert lower <= value * (1 + 1e-9)
            assert value <= upper <= 1.06 * lower
    with pytest.raises(ValueError, match="state of lipschitz_refresh"):
        lipschitz_refresh(ss.Dense(jnp.ones((3, 3))), state)
