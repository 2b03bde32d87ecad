"""Linear maps against plain Flax layers and the dense matrices that those layers are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equivalence.plain_layers import Geometry, dense_matrix, forward
from flax import linen as nn
from flax import nnx

import stochsolvers as ss
from stochsolvers.tensor_product import t_product

GEOMETRIES = {
    "same": Geometry((5, 4), (3, 3), 2, 3),
    "same even strided": Geometry((5, 4), (2, 4), 2, 3, strides=(2, 1)),
    "same dilated strided": Geometry((5, 4), (3, 2), 2, 3, strides=(2, 2), dilation=(2, 1)),
    "same depthwise": Geometry((4, 4), (3, 2), 3, 6, groups=3),
    "stride beyond the kernel": Geometry((5, 4), (1, 2), 2, 3, strides=(2, 3)),
    "valid strided": Geometry((5, 4), (3, 2), 2, 3, "VALID", strides=(2, 1)),
    "valid dilated": Geometry((5, 4), (2, 3), 2, 3, "VALID", dilation=(3, 1)),
    "circular": Geometry((4, 4), (3, 3), 2, 3, "CIRCULAR"),
    "circular even strided": Geometry((5, 4), (2, 4), 2, 3, "CIRCULAR", strides=(1, 2)),
    "circular uneven stride": Geometry((5, 4), (3, 3), 2, 3, "CIRCULAR", strides=(2, 3)),
    "circular grouped": Geometry((4, 4), (3, 3), 4, 6, "CIRCULAR", strides=(2, 2), groups=2),
    "circular wrapping": Geometry((3, 2), (5, 3), 2, 3, "CIRCULAR", dilation=(1, 2)),
    "pairs grouped": Geometry((5, 4), (3, 3), 4, 6, ((0, 2), (3, 1)), groups=2),
    "pairs beyond the kernel": Geometry((4, 4), (2, 2), 2, 3, ((4, 5), (0, 3)), strides=(3, 2)),
    "1-D same": Geometry((7,), (4,), 3, 2, dilation=(1,)),
    "1-D valid": Geometry((7,), (3,), 3, 2, "VALID"),
    "1-D causal": Geometry((7,), (3,), 2, 3, "CAUSAL", strides=(2,), dilation=(2,)),
    "1-D circular grouped": Geometry((7,), (3,), 4, 6, "CIRCULAR", strides=(3,), groups=2),
    "1-D pairs": Geometry((6,), (2,), 2, 3, ((3, 4),), strides=(3,)),
    "3-D same": Geometry((3, 4, 2), (3, 2, 1), 2, 3),
    "3-D strided grouped": Geometry((4, 3, 3), (2, 3, 2), 4, 2, strides=(2, 1, 2), groups=2),
    "3-D circular": Geometry((3, 2, 3), (2, 2, 3), 2, 3, "CIRCULAR", strides=(1, 2, 1)),
    "3-D pairs dilated": Geometry(
        (3, 3, 4), (2, 1, 2), 2, 3, ((1, 0), (0, 2), (2, 1)), strides=(2, 2, 1), dilation=(2, 1, 3)
    ),
}
each_geometry = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
TIGHT = {"rtol": 1e-12, "atol": 1e-12}


def library(geometry, kernel):
    return ss.Conv(jnp.asarray(kernel), geometry.spatial_shape, **geometry.options)


@jax.jit
def each_of(linear_map, *points):
    return [linear_map(point) for point in points]


@jax.jit
def adjoint_of_each(linear_map, *points):
    return [linear_map.adjoint(point) for point in points]


@each_geometry
def test_conv_forward_is_the_plain_layer(geometry, rng):
    kernel = geometry.kernel(rng)
    conv = library(geometry, kernel)
    x = rng.normal(size=(2, 3, *geometry.in_shape))
    expected = np.asarray(forward(geometry)(kernel, x))
    assert expected.shape == (2, 3, *conv.out_shape)
    cases = [(x, expected), (x[0], expected[0]), (x[1, 2], expected[1, 2])]
    images = each_of(conv, *[part for part, _ in cases])
    for image, (_, want) in zip(images, cases, strict=True):
        np.testing.assert_allclose(image, want, **TIGHT)


@each_geometry
def test_conv_adjoint_is_the_transposed_matrix(geometry, rng):
    kernel = geometry.kernel(rng)
    conv, matrix = library(geometry, kernel), dense_matrix(geometry, kernel)
    z = rng.normal(size=(2, 3, *conv.out_shape))
    expected = (z.reshape(6, -1) @ matrix).reshape(2, 3, *geometry.in_shape)
    pulled, first, one = adjoint_of_each(conv, z, z[0], z[1, 0])
    np.testing.assert_allclose(pulled, expected, **TIGHT)
    np.testing.assert_allclose(first, expected[0], **TIGHT)
    np.testing.assert_allclose(one, expected[1, 0], **TIGHT)
    x = rng.normal(size=(2, 3, *geometry.in_shape))
    left, right = np.vdot(each_of(conv, x)[0], z), np.vdot(x, pulled)
    assert abs(left - right) <= 1e-13 * np.linalg.norm(x) * np.linalg.norm(z)


@each_geometry
def test_conv_restriction_is_a_set_of_columns(geometry, rng):
    kernel = geometry.kernel(rng)
    indices = rng.permutation(geometry.in_features)[: max(geometry.in_features - 1, 1)]
    part = library(geometry, kernel).restrict(jnp.asarray(indices))
    size = int(np.prod(geometry.spatial_shape))
    full = dense_matrix(geometry, kernel).reshape(-1, size, geometry.in_features)
    columns = full[:, :, indices].reshape(len(full), -1)
    x = rng.normal(size=(2, *part.in_shape))
    expected = (x.reshape(2, -1) @ columns.T).reshape(2, *part.out_shape)
    np.testing.assert_allclose(each_of(part, x)[0], expected, **TIGHT)
    assert part.in_features == len(indices)


@pytest.mark.parametrize(
    "name", ["same even strided", "circular grouped", "pairs grouped", "1-D causal", "3-D circular"]
)
def test_conv_is_nnx_conv(name, rng):
    geometry = GEOMETRIES[name]
    kernel = jnp.asarray(geometry.kernel(rng))
    layer = nnx.Conv(
        geometry.in_features,
        geometry.out_features,
        geometry.kernel_size,
        use_bias=False,
        kernel_init=lambda *_: kernel,
        rngs=nnx.Rngs(0),
        **geometry.options,
    )
    x = jnp.asarray(rng.normal(size=(3, *geometry.in_shape)))
    np.testing.assert_allclose(library(geometry, kernel)(x), layer(x), **TIGHT)


def test_conv_is_its_documented_sum(rng):
    kernel, x = rng.normal(size=(2, 3, 2, 2)), rng.normal(size=(4, 5, 2))
    conv = ss.Conv(
        jnp.asarray(kernel),
        (4, 5),
        strides=(2, 1),
        padding=((1, 2), (0, 3)),
        kernel_dilation=(1, 2),
    )
    padded = np.pad(x, ((1, 2), (0, 3), (0, 0)))
    expected = np.zeros(conv.out_shape)
    for p, q, j in np.ndindex(*expected.shape):
        for a, b, i in np.ndindex(2, 3, 2):
            expected[p, q, j] += kernel[a, b, i, j] * padded[2 * p + a, q + 2 * b, i]
    assert expected.shape == (3, 4, 2)
    np.testing.assert_allclose(conv(jnp.asarray(x)), expected, **TIGHT)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_dense_is_the_plain_layer(batch, rng):
    kernel = jnp.asarray(rng.normal(size=(4, 3)))
    dense = ss.Dense(kernel)
    x, z = jnp.asarray(rng.normal(size=(*batch, 4))), jnp.asarray(rng.normal(size=(*batch, 3)))
    layer = nnx.Linear(4, 3, use_bias=False, kernel_init=lambda *_: kernel, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(dense(x), layer(x), **TIGHT)
    plain = nn.Dense(3, use_bias=False, param_dtype=jnp.float64)
    np.testing.assert_allclose(dense(x), plain.apply({"params": {"kernel": kernel}}, x), **TIGHT)
    np.testing.assert_allclose(dense.adjoint(z), np.asarray(z) @ np.asarray(kernel).T, **TIGHT)
    assert abs(jnp.vdot(dense(x), z) - jnp.vdot(x, dense.adjoint(z))) < 1e-13 * 100
    assert (dense.in_shape, dense.out_shape) == ((4,), (3,))


def test_restriction_with_traced_indices(rng):
    dense = ss.Dense(jnp.asarray(rng.normal(size=(4, 3))))
    geometry = GEOMETRIES["circular grouped"]
    conv = library(geometry, geometry.kernel(rng))
    indices = jnp.array([3, 1])

    @jax.jit
    def restricted(indices):
        return dense.restrict(indices), conv.restrict(indices)

    small, images = restricted(indices)
    np.testing.assert_array_equal(small.kernel, np.asarray(dense.kernel)[[3, 1]])
    np.testing.assert_array_equal(images.kernel, conv.restrict(np.array([3, 1])).kernel)


def test_gradients_reach_the_kernel(rng):
    geometry = GEOMETRIES["circular grouped"]
    kernel, direction = geometry.kernel(rng), geometry.kernel(rng)
    z = jnp.asarray(rng.normal(size=(2, 2, 6)))
    x = rng.normal(size=geometry.in_shape)

    def product(kernel):
        return jnp.vdot(x, library(geometry, kernel).adjoint(z))

    gradient = jax.grad(product)(jnp.asarray(kernel))
    # <x, A* z> is linear in the kernel: the directional derivative is the value at the direction
    expected = np.vdot(dense_matrix(geometry, direction) @ x.ravel(), z)
    np.testing.assert_allclose(np.vdot(gradient, direction), expected, rtol=1e-11)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_narrow_inputs_are_promoted_as_in_flax(dtype, rng):
    geometry = GEOMETRIES["same"]
    kernel = jnp.asarray(geometry.kernel(rng), jnp.float32)
    conv = library(geometry, kernel)
    x = jnp.asarray(rng.normal(size=(3, *geometry.in_shape)), dtype)
    assert conv(x).dtype == jnp.float32
    assert conv.adjoint(conv(x).astype(dtype)).dtype == jnp.float32
    assert ss.Dense(kernel[0, 0])(x).dtype == jnp.float32
    expected = forward(geometry)(kernel.astype(jnp.float64), x.astype(jnp.float64))
    np.testing.assert_allclose(conv(x), expected, rtol=1e-4, atol=1e-5)


def on_torus(kernel, shape, low):
    """The tensor A (n2, n1, W, H) with A ⊛ X the cross-correlation whose windows start at −low."""
    kh, kw, n1, n2 = kernel.shape
    tensor = np.zeros((n2, n1, *shape))
    for a, b in np.ndindex(kh, kw):
        tensor[:, :, (low[0] - a) % shape[0], (low[1] - b) % shape[1]] += kernel[a, b].T
    return tensor


@pytest.mark.parametrize("kernel_size", [(3, 3), (2, 4), (5, 3)])
def test_circular_convolution_is_the_t_product(kernel_size, rng):
    kernel, x = rng.normal(size=(*kernel_size, 2, 3)), rng.normal(size=(4, 4, 2))
    low = [(k - 1) // 2 for k in kernel_size]
    tensor = on_torus(kernel, (4, 4), low)
    product = t_product(jnp.asarray(tensor), jnp.asarray(x.transpose(2, 0, 1)[:, None]))
    conv = ss.Conv(jnp.asarray(kernel), (4, 4), padding="CIRCULAR")
    expected = np.asarray(product)[:, 0].transpose(1, 2, 0)
    np.testing.assert_allclose(conv(jnp.asarray(x)), expected, **TIGHT)


def test_dense_is_the_t_product_on_one_site(rng):
    kernel, x = rng.normal(size=(4, 3)), rng.normal(size=4)
    product = t_product(
        jnp.asarray(kernel.T[:, :, None, None]), jnp.asarray(x[:, None, None, None])
    )
    np.testing.assert_allclose(ss.Dense(jnp.asarray(kernel))(x), product[:, 0, 0, 0], **TIGHT)


@pytest.mark.parametrize(
    ("padding", "low"), [("SAME", (1, 0)), ("VALID", (0, 0)), (((2, 2), (1, 1)), (2, 1))]
)
def test_zero_padded_convolution_is_a_cropped_t_product(padding, low, rng):
    kernel, x = rng.normal(size=(3, 2, 2, 3)), rng.normal(size=(4, 4, 2))
    conv = ss.Conv(jnp.asarray(kernel), (4, 4), padding=padding)
    torus = np.zeros((2, 1, 4 + 3 - 1, 4 + 2 - 1))
    torus[:, 0, :4, :4] = x.transpose(2, 0, 1)
    tensor = on_torus(kernel, torus.shape[2:], low)
    product = np.asarray(t_product(jnp.asarray(tensor), jnp.asarray(torus)))
    rows, columns, _ = conv.out_shape
    expected = product[:, 0, :rows, :columns].transpose(1, 2, 0)
    np.testing.assert_allclose(conv(jnp.asarray(x)), expected, **TIGHT)


KERNEL = np.ones((3, 3, 2, 6))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ss.Dense(jnp.ones(3)), "2 axes"),
        (lambda: ss.Dense(jnp.ones((3, 2), int)), "floating"),
        (lambda: ss.Dense(jnp.ones((3, 2), complex)), "floating"),
        (lambda: ss.Conv(jnp.ones((3, 3, 2)), (4, 4)), "4 axes"),
        (lambda: ss.Conv(jnp.asarray(KERNEL, int), (4, 4)), "floating"),
        (lambda: ss.Conv(KERNEL, (4, 4), padding="same"), "'CIRCULAR'"),
        (lambda: ss.Conv(KERNEL, (4, 4), padding="REFLECT"), "'CIRCULAR'"),
        (lambda: ss.Conv(KERNEL, (4, 4), padding=((1, -1), (0, 0))), ">= 0"),
        (lambda: ss.Conv(KERNEL, (4, 4), padding=((1, 1),)), "two"),
        (lambda: ss.Conv(KERNEL, (4, 4), padding=((1, 1), (1, 1), (1, 1))), "two"),
        (lambda: ss.Conv(KERNEL, (4, 4), padding=(1, 1)), "pairs"),
        (lambda: ss.Conv(KERNEL, (4, 4), padding=((0.5, 1), (1, 1))), "integers"),
        (lambda: ss.Conv(KERNEL, (4, 4), feature_group_count=4), "divisor of n2 = 6"),
        (lambda: ss.Conv(KERNEL, (4, 4), feature_group_count=0), "feature_group_count"),
        (lambda: ss.Conv(KERNEL, (4, 4), strides=(0, 1)), "strides"),
        (lambda: ss.Conv(KERNEL, (4, 4), strides=(1, 1, 1)), "strides"),
        (lambda: ss.Conv(KERNEL, (4, 4), kernel_dilation=(1, 0)), "kernel_dilation"),
        (lambda: ss.Conv(KERNEL, (4, 4, 1)), "spatial_shape"),
        (lambda: ss.Conv(KERNEL, (4, 0)), "spatial_shape"),
        (lambda: ss.Conv(KERNEL, ()), "one to three spatial axes"),
        (lambda: ss.Conv(np.ones((2, 2, 2, 2, 1, 1)), (4, 4, 4, 4)), "one to three spatial axes"),
        (lambda: ss.Conv(KERNEL, (4, 4), padding="CAUSAL"), "'CIRCULAR', got"),
        (lambda: ss.Conv(KERNEL[0], 4, padding=(1, 1)), "one .low, high. pair"),
        (lambda: ss.Conv(KERNEL[0], 4, strides=(1, 1)), "one integer"),
        (lambda: ss.Conv(KERNEL[0], 4, padding=-1), ">= 0"),
        (lambda: ss.Conv(KERNEL, (4, 4), circular_low=1), "'CIRCULAR', got 'SAME'"),
        (lambda: ss.Conv(KERNEL, 4, padding="CIRCULAR", circular_low=(1, 3)), r"in 0\.\.2, got 3"),
        (lambda: ss.Conv(KERNEL, 4, padding="CIRCULAR", circular_low=(1,)), "2 integers"),
        (lambda: ss.Conv(KERNEL, (4, 2), padding="VALID"), "at least one pixel"),
        (lambda: ss.Conv(KERNEL, (4, 4), padding="VALID", kernel_dilation=(2, 1)), "one pixel"),
    ],
)
def test_bad_structure_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("shape", [(5,), (4, 3), ()])
def test_dense_refuses_arguments_of_another_shape(shape):
    dense = ss.Dense(jnp.ones((4, 2)))
    with pytest.raises(ValueError, match=r"Dense: expected \(\.\.\., 4\)"):
        dense(jnp.ones(shape))
    with pytest.raises(ValueError, match=r"Dense\.adjoint: expected \(\.\.\., 2\)"):
        jax.eval_shape(dense.adjoint, jnp.ones(shape))


@pytest.mark.parametrize("shape", [(4, 4, 3), (4, 5, 2), (4, 2), (3, 5, 4, 2)])
def test_conv_refuses_arguments_of_another_shape(shape):
    conv = ss.Conv(KERNEL, (4, 4))
    with pytest.raises(ValueError, match=r"Conv: expected \(\.\.\., 4, 4, 2\)"):
        jax.eval_shape(conv, jnp.ones(shape))
    with pytest.raises(ValueError, match=r"Conv\.adjoint: expected \(\.\.\., 4, 4, 6\)"):
        conv.adjoint(jnp.ones(shape))
